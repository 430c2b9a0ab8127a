"""Which rank has which experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moekit import _check
from moekit.ep._overflow import Overflow
from moekit.ep._ways import Tables
from moekit.ops import tables
from moekit.ops.gemm import autocast
from moekit.routing import Routing, require


def one_dimensional(op: str, name: str, mesh: object) -> DeviceMesh:
    """``mesh`` is a DeviceMesh of one dimension, with this rank in it.

    Raises:
        TypeError: no mesh. ValueError: of more dimensions, or of other ranks.
    """
    if not isinstance(mesh, DeviceMesh):
        raise _check.wrong_type(op, name, "a torch.distributed.DeviceMesh of one dimension", type(mesh).__name__)
    if mesh.ndim != 1:
        wanted = f"of one dimension (a part of it: mesh[{(mesh.mesh_dim_names or ('ep',))[-1]!r}])"
        raise _check.fail(op, name, wanted, f"{mesh.ndim}: {mesh}")
    if mesh.get_coordinate() is None:
        raise _check.fail(op, name, f"one that this rank ({dist.get_rank()}) is in", mesh)
    return mesh


def process_group(op: str, group: Any) -> dist.ProcessGroup:
    """The group of ``group``, which may be a mesh of one dimension.

    Raises:
        TypeError: neither.
        ValueError: a mesh of more dimensions, or one without this rank.
    """
    if isinstance(group, DeviceMesh):
        group = one_dimensional(op, "group", group).get_group()
    if not isinstance(group, dist.ProcessGroup):
        wanted = "a torch.distributed.ProcessGroup that this rank is in, or a DeviceMesh of one dimension"
        raise _check.wrong_type(op, "group", wanted, type(group).__name__)
    return group


def check(op: str, num_experts: int, tokens: Tensor, routing: Routing) -> Tensor:
    """What a dispatch needs of its arguments; gives the tokens as they travel: under autocast, as products want them."""
    require(op, routing)
    _check.computable(op, "tokens", tokens)
    _check.tensor_dim(op, "tokens", tokens, 2)
    if routing.weights is None:
        raise _check.fail(op, "routing", "built with weights", "none")
    if routing.num_experts != num_experts:
        raise _check.fail(op, "routing", f"of all {num_experts} experts", routing.num_experts)
    if routing.num_tokens != tokens.shape[0]:
        raise _check.fail(op, "routing", f"of the {tokens.shape[0]} tokens", routing.num_tokens)
    _check.same_device(op, tokens=tokens, routing=routing.indices)
    return autocast(tokens)[0]


def called_with(tokens: Tensor, routing: Routing) -> dict[str, Any]:
    """What has to be the same on all ranks whenever they dispatch; there may be any number of tokens."""
    weights: Any = routing.weights
    graph = torch.is_grad_enabled()
    return {
        "hidden size": tokens.shape[1],
        "experts of a token": routing.topk,
        "dtype of tokens": tokens.dtype,
        "dtype of weights": weights.dtype,
        "tokens need a gradient": graph and tokens.requires_grad,
        "weights need a gradient": graph and weights.requires_grad,
    }


class Shares(NamedTuple):
    """E experts in equal shares over the ranks of a group, in the order of both.

    Attributes:
        op: whose, for errors.
        group: the ranks.
        num_experts: E.
    """

    op: str
    group: dist.ProcessGroup
    num_experts: int

    @staticmethod
    def of(op: str, group: Any, num_experts: int) -> Shares:
        """The shares of a group, or of a mesh of one dimension.

        Raises:
            ValueError: experts that cannot be shared equally.
            TypeError: no group.
        """
        group = process_group(op, group)
        num_experts = _check.positive(op, "num_experts", num_experts)
        if num_experts % group.size():
            raise _check.fail(op, "num_experts", f"a multiple of the {group.size()} ranks of the group", num_experts)
        return Shares(op, group, num_experts)

    @property
    def ranks(self) -> int:
        """N."""
        return self.group.size()

    @property
    def each(self) -> int:
        """How many experts a rank has."""
        return self.num_experts // self.ranks

    def slots(self, routing: Routing) -> Tensor:
        """How many slots each rank has, ``[ranks]`` int64."""
        return routing.tokens_per_expert.view(self.ranks, self.each).sum(1)

    def needs(self, indices: Tensor) -> Tensor:
        """Whether a token goes to a rank, ``[T, ranks]`` bool."""
        owner = (indices // self.each).unsqueeze(-1)  # below 0, or past the last rank, as a slot of nobody is
        return (owner == torch.arange(self.ranks, device=indices.device)).any(1)

    def to_ranks(self, indices: Tensor) -> tuple[Tensor, Tables]:
        """The rows for each rank.

        Args:
            indices: ``[T, K]``, of all experts.

        Returns:
            ``(counts, tables)``: rows of each rank ``[ranks]`` int64; and the rows, by rank, ascending in token, each once a
            rank. There is room for ``T * min(K, ranks)`` of them, whatever the routing, and what is left over comes last.
        """
        most = indices.shape[0] * min(indices.shape[1], self.ranks)
        counts, row_token, _, token_offsets, token_rows = tables.route_map(self.needs(indices), most)
        return counts, (row_token, token_offsets, token_rows)

    def to_ranks_within(self, indices: Tensor, capacity: int) -> tuple[Tensor, Tables]:
        """``capacity`` rows for each rank: those of the first tokens, and then empty ones.

        Returns:
            ``(dropped, tables)``: the rows left out, ``[]`` int64; and those that there are.
        """
        num_tokens = indices.shape[0]
        needs = self.needs(indices).T
        # An empty row is one of a further token, which all ranks need until they have enough.
        wanted = torch.nn.functional.pad(needs, (0, capacity), value=True)
        sent = wanted & (wanted.cumsum(1) <= capacity)
        _, row_token, _, token_offsets, token_rows = tables.route_map(sent.T, self.ranks * capacity)
        row_token.masked_fill_(row_token >= num_tokens, -1)
        dropped = needs.sum() - sent[:, :num_tokens].sum()
        return dropped, (row_token, token_offsets[: num_tokens + 1], token_rows)

    def local(self, numbers: Tensor, weights: Tensor, rows: int | None = None, overflow: Overflow | None = None) -> Routing:
        """The routing over this rank's experts.

        Args:
            numbers: ``[N, K]`` as they travel, as many rows of each rank; the slots of other ranks become -1.
            weights: ``[N, K]``.
            rows: how many slots are of this rank, if that is known. Their tables are no longer than that.
            overflow: what counts the slots that are more, which become -1, too; None: there are none.
        """
        local = numbers - (1 + self.group.rank() * self.each)
        local.masked_fill_(local != local.clamp(0, self.each - 1), -1)
        if rows is not None and overflow is not None:
            overflow.add(_keep_first(local, rows, self.ranks))
        # Not by from_topk: a token that chose an expert twice may have more slots here than there are experts.
        counts, offsets, order, inverse = tables.route_indices(local, self.each)
        return Routing(local, weights, counts, offsets, order[:rows], inverse)


def within(op: str, slot_capacity: int | None, bound: int | None, name: str) -> int | None:
    """The option of that name, which goes with a bound on rows."""
    if slot_capacity is None:
        return None
    if bound is None:
        raise _check.unused(op, "slot_capacity", slot_capacity, f"without {name}: slots are counted")
    return _check.positive(op, "slot_capacity", slot_capacity)


def slots_beyond(shares: Shares, slot_capacity: int | None) -> Overflow | None:
    """What counts the slots beyond that capacity, if there is one."""
    if slot_capacity is None:
        return None
    return Overflow(shares.op, "slot_capacity", f"slots of the experts of rank {shares.group.rank()}")


def _keep_first(local: Tensor, most: int, ranks: int) -> Tensor:
    """Leave ``most`` slots in place, the first of all ranks alike, and make -1 of the others; how many these are."""
    mine = (local >= 0).view(ranks, -1, local.shape[1]).transpose(0, 1)  # by place, and then by rank
    kept = (mine.reshape(-1).cumsum(0) <= most).view(mine.shape).transpose(0, 1)
    local.masked_fill_(~kept.reshape(local.shape), -1)
    return (mine.sum() - most).clamp(min=0)


def numbered(routing: Routing) -> Tensor:
    """The experts of each slot as they travel, ``[T, K]`` int32, from 1: 0 is none, as in rows of zeros, and so is less."""
    return (routing.indices + 1).to(torch.int32)
