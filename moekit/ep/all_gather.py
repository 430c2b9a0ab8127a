"""Dispatch of all tokens to all ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moekit import _check
from moekit.ep._agree import Once, agree
from moekit.ep._eager import eager
from moekit.ep._ranks import Shares, called_with, check, numbered, slots_beyond, within
from moekit.ep._started import Handle, Started, combine, send
from moekit.ep._ways import Message, Spread, gathered
from moekit.routing import Routing

_OP = "ep.AllGather"


class AllGather:
    """Exchange of all tokens.

    Every rank gets the tokens of all, in messages of one size, and sends each of them its part of the result, zeros for a
    token that chose no expert here; the N parts of a token are added in float32 (float64 of float64) and rounded once::

        rank 0   a b c          a b c|d 0 0  (experts of rank 0)  a0 b0 c0|d0          a0 + a1, b0 + b1, c0 + c1
        rank 1   d        ->    a b c|d 0 0  (experts of rank 1)  a1 b1 c1|d1    ->    d0 + d1

    Where a token's experts are on almost every rank anyway, this moves little more than :class:`moekit.ep.AllToAll`, with
    less to prepare. The numbers of tokens are read by the host once a call, with ``tokens_per_rank`` never.

    Args:
        group: the ranks that share the experts: a process group, or a mesh of one dimension.
        num_experts: E, of all ranks.
        tokens_per_rank: the most tokens that a rank has, the same number on all ranks. So many rows are always sent, so
            nothing waits for the device, and a CUDA graph can capture the call. None finds it for each call. As nobody
            looks how many slots of the rows are of this rank, the experts need memory for all,
            ``N * tokens_per_rank * K``.
        slot_capacity: with ``tokens_per_rank``: as :class:`moekit.ep.AllToAll` has it.

    Raises:
        ValueError: experts that cannot be shared equally; ``slot_capacity`` alone.
        TypeError: something else than a group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh,
        num_experts: int,
        *,
        tokens_per_rank: int | None = None,
        slot_capacity: int | None = None,
    ) -> None:
        self.shares = Shares.of(_OP, group, num_experts)
        self.tokens_per_rank = None if tokens_per_rank is None else _check.positive(_OP, "tokens_per_rank", tokens_per_rank)
        self._first = Once(_OP, self.shares.group)
        self.slot_capacity = within(_OP, slot_capacity, tokens_per_rank, "tokens_per_rank")
        options = {"tokens_per_rank": tokens_per_rank, "slot_capacity": slot_capacity}
        agree(_OP, self.shares.group, experts=num_experts, **options)
        self._slot_overflow = slots_beyond(self.shares, self.slot_capacity)

    @property
    def slot_overflow(self) -> Tensor | None:
        """Slots of this rank's experts beyond ``slot_capacity`` so far, ``[] int64``; None before a call, and without."""
        return None if self._slot_overflow is None else self._slot_overflow.total

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Routing, Handle]:
        """As :class:`moekit.ep.Dispatcher` has it.

        Raises:
            ValueError: more tokens than ``tokens_per_rank``, on that rank.
        """
        return self.start(tokens, routing).finish()

    def combine(self, rows: Tensor, handle: Handle) -> Tensor:
        """As :class:`moekit.ep.Dispatcher` has it."""
        return combine(_OP, rows, handle)

    @eager
    def start(self, tokens: Tensor, routing: Routing) -> Started:
        """Begin a dispatch."""
        tokens = check(_OP, self.shares.num_experts, tokens, routing)
        weights: Any = routing.weights
        padded, num_slots = self._sizes(tokens, routing)
        way = partial(Spread, tokens=routing.num_tokens, padded=padded)
        numbers, overflow = numbered(routing), self._slot_overflow
        return send(self.shares, way, tokens, weights, numbers, num_slots=num_slots, overflow=overflow)

    def _sizes(self, tokens: Tensor, routing: Routing) -> tuple[int, int | None]:
        """The rows of a rank, and how many of all slots are of this one, at most, if that is known."""
        given, facts = self.tokens_per_rank, called_with(tokens, routing)
        if given is None:
            counts = torch.nn.functional.pad(self.shares.slots(routing), (0, 1), value=routing.num_tokens)
            said = gathered(counts, Message("sizes", _OP, self.shares.group), facts)
            return max(rows for *_, rows, _ in said), sum(of_rank[self.shares.group.rank()] for of_rank in said)
        if routing.num_tokens > given:
            raise _check.fail(_OP, "tokens", f"at most tokens_per_rank ({given})", routing.num_tokens)
        self._first.agree(facts)
        return given, self.slot_capacity
