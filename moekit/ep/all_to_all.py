"""Dispatch by an all-to-all exchange in which a token travels once to each rank that needs it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moekit import _check
from moekit.ep._exchange import Exchange, Message, Sizes, exchange, sizes_of
from moekit.ep._ranks import Shares
from moekit.ops.rows import permute, unpermute
from moekit.routing import Routing


class Handle(NamedTuple):
    """What the way back needs: integers, and nothing of row size."""

    ranks: Routing  # tokens to ranks, as a routing whose experts are the ranks
    sizes: Sizes


class AllToAll:
    """Exchange of deduplicated rows.

    A token goes once to each rank with any of its experts, with its choice and its weights, and one row, already weighted
    and summed over those experts, comes back::

        token t chose experts 1, 2 (rank 0), 5 (rank 1) and 4 (rank 1) of 6, on 2 ranks of 3

        to rank 0:  x[t]  [1, 2, 5, 4]  [w1, w2, w5, w4]      back:  w1 E1(x[t]) + w2 E2(x[t])
        to rank 1:  x[t]  [1, 2, 5, 4]  [w1, w2, w5, w4]      back:  w5 E5(x[t]) + w4 E4(x[t])

    The rows of a rank are those of its own tokens' pairs (token, rank), at most ``min(K, N)`` a token, in place of K.
    Kept for backward are integers only. The sizes are read by the host once a call.

    Args:
        group: the ranks that share the experts.
        num_experts: E, of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.shares = Shares.of("ep.AllToAll", group, num_experts)
        self._rows = Message("rows", "ep.AllToAll", group)
        self._slots = Message("slots", "ep.AllToAll", group)

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Routing, Handle]:
        """As :class:`moekit.ep.Dispatcher` has it."""
        return self.start(tokens, routing).finish()

    def start(self, tokens: Tensor, routing: Routing) -> Started:
        """Begin a dispatch."""
        self.shares.check(tokens, routing)
        ranks = self.shares.to_ranks(routing)
        sizes = sizes_of(ranks.tokens_per_expert, "ep.AllToAll", self.shares.group)
        # Rows of no rank come last, and stay at home.
        ranks = dataclasses.replace(ranks, order=ranks.order[: sum(sizes.send)], scored=None)
        rows = Exchange(permute(tokens, ranks), sizes, self._rows)
        weights: Any = routing.weights
        weights = Exchange(permute(weights, ranks), sizes, self._slots)
        indices = exchange(permute(routing.indices.to(torch.int32), ranks), sizes, self._slots)
        return Started(rows, weights, indices, Handle(ranks, sizes), self.shares)

    def combine(self, rows: Tensor, handle: Handle) -> Tensor:
        """As :class:`moekit.ep.Dispatcher` has it."""
        _check.tensor_dim("ep.AllToAll", "rows", rows, 2)
        if rows.shape[0] != sum(handle.sizes.receive):
            raise _check.fail("ep.AllToAll", "rows", f"the {sum(handle.sizes.receive)} dispatched", list(rows.shape))
        return unpermute(exchange(rows, handle.sizes.back(), self._rows), handle.ranks)


class Started(NamedTuple):
    """A dispatch under way."""

    rows: Exchange
    weights: Exchange
    indices: Tensor
    handle: Handle
    shares: Shares

    def finish(self) -> tuple[Tensor, Routing, Handle]:
        """What arrived."""
        rows = self.rows.wait()
        return rows, self.shares.local(self.indices, self.weights.wait()), self.handle
