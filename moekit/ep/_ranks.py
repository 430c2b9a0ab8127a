"""Which rank has which experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moekit import _check
from moekit.ops import tables
from moekit.ops.gemm import autocast
from moekit.routing import Routing, require


def process_group(op: str, group: Any) -> dist.ProcessGroup:
    """The group of ``group``, which may be a mesh of one dimension.

    Raises:
        TypeError: neither.
        ValueError: a mesh of more dimensions.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names
            wanted = "a mesh of one dimension" + (f" (mesh[{names[-1]!r}], say)" if names else "")
            raise _check.fail(op, "group", wanted, f"one of {group.ndim}")
        group = group.get_group()
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

    def chosen(self, indices: Tensor) -> Tensor:
        """Whether a slot goes to a rank, ``[T, K, ranks]`` bool."""
        owner = torch.where((indices >= 0) & (indices < self.num_experts), indices // self.each, -1)
        return owner.unsqueeze(-1) == torch.arange(self.ranks, device=indices.device)

    def to_ranks(self, routing: Routing) -> tuple[Routing, Tensor]:
        """The tokens' routing over ranks, each at most once a token, ascending; and the slots of each rank ``[ranks]``."""
        chosen = self.chosen(routing.indices)
        return Routing.from_map(chosen.any(1), topk=min(self.ranks, routing.topk)), chosen.sum((0, 1))

    def local(self, indices: Tensor, weights: Tensor, rows: int | None = None) -> Routing:
        """The routing over this rank's experts, from numbers of all experts; the slots of other ranks are -1.

        ``rows``: how many slots are of this rank, if that is known. Their tables are no longer than that.
        """
        local = indices - self.group.rank() * self.each
        local = torch.where((indices >= 0) & (local >= 0) & (local < self.each), local, -1)
        # Not by from_topk: a token that chose an expert twice may have more slots here than there are experts.
        counts, offsets, order, inverse = tables.route_indices(local, self.each)
        return Routing(local, weights, counts, offsets, order[:rows], inverse)
