"""Routing: which token goes to which expert, as tables of integers.

Built once from a router's top-k indices or from a map, then shared by every operator of the layer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.jit._trace import is_tracing

from moekit import _check
from moekit.ops import tables

# The default of the tables, only so that a call without them can say how they are made.
_MADE: Any = None
HOW_TO_BUILD = "Routing.from_topk(indices, weights, num_experts=E) or Routing.from_map(routing_map, probs)"


class Scored(NamedTuple):
    """What a router chose from: what the losses of its choice look at.

    Attributes:
        logits: ``[T, E]``, as scores are taken of them.
        score: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``.
        padding_mask: ``[T]`` bool, True for padding, or None.
        link: zeros ``[E]``, by which the gradient of a loss reaches the router's backward; None: it goes to the logits.
    """

    logits: Tensor
    score: str
    padding_mask: Tensor | None
    link: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Routing:
    """Routing tables of T tokens, K slots a token and E experts.

    Rows are expert-major and ascending in token within an expert. There are ``R = T * K`` of them whatever the routing
    (more after :meth:`pad_to_multiple`), so no size depends on values; rows of no expert come last.

    Attributes:
        indices: ``[T, K]`` int32 or int64, the expert of each slot, -1 for none.
        weights: ``[T, K]`` floating routing weights, or None.
        tokens_per_expert: ``[E]`` int64.
        offsets: ``[E]`` int32, cumulative row ends, as ``torch.nn.functional.grouped_mm`` wants them.
        order: ``[R]`` int32, the slot ``t * K + k`` of each row, -1 for none.
        inverse: ``[T, K]`` int32, the row of each slot, -1 for none.
        scored: what :func:`moekit.route` chose from; None of a routing that was made from a choice.

    Made by :func:`moekit.route`, :meth:`from_topk` or :meth:`from_map`, which see to it that the tables belong together.

    Examples:
        >>> import torch, moekit
        >>> routing = moekit.Routing.from_topk(torch.tensor([[0, 2], [1, -1]]), num_experts=3)
        >>> routing.num_rows, routing.offsets.tolist(), routing.order.tolist()
        (4, [1, 2, 3], [0, 2, 1, -1])
        >>> routing.to_map()[0].int().tolist()
        [[1, 0, 1], [0, 1, 0]]
    """

    indices: Tensor
    weights: Tensor | None = None
    tokens_per_expert: Tensor = _MADE
    offsets: Tensor = _MADE
    order: Tensor = _MADE
    inverse: Tensor = _MADE
    scored: Scored | None = None

    def __post_init__(self) -> None:
        indices, counts, offsets = self.indices, self.tokens_per_expert, self.offsets
        made = (indices, counts, offsets, self.order, self.inverse)
        if not all(isinstance(table, Tensor) for table in made):
            kinds = ", ".join(type(table).__name__ for table in made)
            raise _check.wrong_type("Routing", "it", f"made by {HOW_TO_BUILD}", f"indices and tables of the types {kinds}")
        int32 = offsets.dtype is self.order.dtype is self.inverse.dtype is torch.int32
        if not (int32 and self.inverse.shape == indices.shape and counts.shape == offsets.shape and self.order.dim() == 1):
            found = ", ".join(f"{table.dtype} {list(table.shape)}" for table in made)
            wanted = f"of the dtypes and shapes that {HOW_TO_BUILD} gives them"
            raise _check.fail("Routing", "indices and tables", wanted, found)

    @staticmethod
    def from_topk(indices: Tensor, weights: Tensor | None = None, *, num_experts: int) -> Routing:
        """Routing from a router's top-k choice.

        Args:
            indices: ``[T, K]`` int32 or int64 expert numbers; -1 routes nowhere; the same expert twice counts twice.
                K may exceed E (expert parallel, with few experts a rank) if no token has more than E experts.
            weights: ``[T, K]`` floating routing weights, or None.
            num_experts: E.

        Raises:
            ValueError: a shape or device that does not fit, or (on a CPU) an index outside ``[-1, E)``, a token with more
                than E experts or what can only be a map.
            TypeError: indices that are not integers, weights that are not floating.
        """
        num_experts = check_choice(indices, weights, num_experts)
        return Routing(indices, weights, *tables.route_indices(indices, num_experts))

    @staticmethod
    def from_map(routing_map: Tensor, probs: Tensor | None = None, *, topk: int | None = None) -> Routing:
        """Routing from a map.

        Args:
            routing_map: ``[T, E]`` of any dtype; what is not zero is routed.
            probs: ``[T, E]`` floating routing weights, or None.
            topk: K, the most experts a token has. None finds it, at the cost of a device-to-host sync on a GPU.

        Raises:
            ValueError: shapes or devices that do not fit, or (on a CPU) a token with more than ``topk`` experts or what can
            only be indices.
        """
        op = "Routing.from_map"
        _check.routing_map(op, "routing_map", routing_map)
        if probs is not None:
            _check.floating(op, "probs", probs)
            _check.shape(op, "probs", probs, routing_map.shape, "[tokens, experts]")
        _check.same_device(op, routing_map=routing_map, probs=probs)
        num_tokens, num_experts = routing_map.shape
        if topk is not None:
            topk = _check.topk(op, topk, num_experts)
        indices = tables.map_to_indices(routing_map, topk)
        weights = None
        if probs is not None:
            token = torch.arange(num_tokens, device=indices.device).unsqueeze(1)
            weights = tables.take(probs, tables.row_slots(token, indices, num_experts))
        return Routing(indices, weights, *tables.route_indices(indices, num_experts))

    def to_map(self) -> tuple[Tensor, Tensor | None]:
        """The routing as ``(map [T, E] bool, probs [T, E] | None)``; a slot of no expert leaves no mark.

        The same expert twice in one token is one mark, with the sum of its weights.
        """
        experts = torch.arange(self.num_experts, device=self.indices.device)
        chosen = self.indices.unsqueeze(-1) == experts  # [T, K, E]
        probs = None if self.weights is None else torch.where(chosen, self.weights.unsqueeze(-1), 0).sum(1)
        return chosen.any(1), probs

    def pad_to_multiple(self, multiple: int) -> Routing:
        """The same routing with each expert's rows padded to a multiple, as quantised or tiled GEMMs want them.

        Padding rows have ``order`` -1: :meth:`~moekit.permute` fills them with zeros and unpermute ignores them. The
        number of rows is the bound that holds for every routing, so no sync is needed.

        Raises:
            ValueError: a multiple below 1.
        """
        multiple = _check.positive("Routing.pad_to_multiple", "multiple", multiple)
        offsets, order, inverse = tables.pad_rows(self.offsets, self.order, self.inverse, multiple)
        return dataclasses.replace(self, offsets=offsets, order=order, inverse=inverse)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.indices.shape[0]

    @property
    def topk(self) -> int:
        """K, the slots of a token."""
        return self.indices.shape[1]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.tokens_per_expert.shape[0]

    @property
    def num_rows(self) -> int:
        """R, rows of no expert included."""
        return self.order.shape[0]

    def row_weights(self) -> Tensor:
        """The routing weights in row order, ``[R]``, zero for rows of no expert. Differentiable.

        Raises:
            ValueError: the routing was built without weights.
        """
        if self.weights is None:
            raise _check.fail("Routing.row_weights", "weights", "given when the routing is built", None)
        return tables.take(self.weights, self.order, self.inverse)

    def row_tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """``row_token [R]``, ``token_offsets [T + 1]``, ``token_rows [T * K]``: what the row movers work from."""
        token_rows = self.inverse.reshape(-1)
        if is_tracing():  # which would make a constant of the number of tokens
            topk = max(int(self.topk), 1)
            starts = torch.arange(self.num_tokens + 1, dtype=torch.int32, device=self.order.device) * int(self.topk)
            return self.order // topk, starts, token_rows
        return *tables.row_tables(self.order, self.num_tokens, self.topk), token_rows


def require(op: str, routing: object) -> None:
    """``routing`` is a :class:`Routing`."""
    if not isinstance(routing, Routing):
        raise _check.wrong_type(op, "routing", f"a moekit.Routing ({HOW_TO_BUILD})", type(routing).__name__)


def check_choice(indices: Tensor, weights: Tensor | None, num_experts: int) -> int:
    """Refuse what :meth:`Routing.from_topk` refuses; ``num_experts`` as Python's integer."""
    op = "Routing.from_topk"
    _check.tensor_dim(op, "indices", indices, 2)
    _check.integer(op, "indices", indices, _mistaken_for)
    num_experts = _check.positive(op, "num_experts", num_experts)
    if weights is not None:
        _check.floating(op, "weights", weights)
        _check.shape(op, "weights", weights, indices.shape, "[tokens, topk]")
    _check.same_device(op, indices=indices, weights=weights)
    _check.slots_of_token(op, indices, num_experts)
    _check.not_a_map(op, "indices", indices, num_experts)
    return num_experts


def _mistaken_for(indices: Tensor) -> str:
    if indices.dtype is torch.bool:
        return " (a map? use Routing.from_map)"
    return " (weights? the indices come first)" if indices.is_floating_point() else ""
