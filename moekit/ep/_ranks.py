"""Which rank has which experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moekit import _check
from moekit.ops import tables
from moekit.routing import Routing, require


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
    def of(op: str, group: dist.ProcessGroup, num_experts: int) -> Shares:
        """The shares of a group.

        Raises:
            ValueError: experts that cannot be shared equally.
            TypeError: no group.
        """
        if not isinstance(group, dist.ProcessGroup):
            raise _check.wrong_type(op, "group", "a torch.distributed.ProcessGroup", type(group).__name__)
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

    def check(self, tokens: Tensor, routing: Routing) -> None:
        """What a dispatch needs of its arguments."""
        require(self.op, routing)
        _check.tensor_dim(self.op, "tokens", tokens, 2)
        if routing.weights is None:
            raise _check.fail(self.op, "routing", "built with weights", "none")
        if routing.num_experts != self.num_experts:
            raise _check.fail(self.op, "routing", f"of all {self.num_experts} experts", routing.num_experts)
        if routing.num_tokens != tokens.shape[0]:
            raise _check.fail(self.op, "routing", f"of the {tokens.shape[0]} tokens", routing.num_tokens)
        _check.same_device(self.op, tokens=tokens, routing=routing.indices)

    def to_ranks(self, routing: Routing) -> Routing:
        """The tokens' routing over ranks: each rank at most once a token, ascending."""
        ranks, indices = self.ranks, routing.indices.long()
        owner = torch.where((indices >= 0) & (indices < self.num_experts), indices // self.each, ranks)
        needed = torch.zeros(indices.shape[0], ranks + 1, dtype=torch.bool, device=indices.device)
        needed = needed.scatter_(1, owner, True)[:, :ranks]
        return Routing.from_map(needed, topk=min(ranks, max(routing.topk, 1)))

    def local(self, indices: Tensor, weights: Tensor) -> Routing:
        """The routing over this rank's experts, from numbers of all experts; the slots of other ranks are -1."""
        local = indices - self.group.rank() * self.each
        local = torch.where((indices >= 0) & (local >= 0) & (local < self.each), local, -1)
        # Not by from_topk: a token that chose an expert twice may have more slots here than there are experts.
        return Routing(local, weights, *tables.route_indices(local, self.each))
