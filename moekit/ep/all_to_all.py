"""Dispatch by an all-to-all exchange in which a token travels once to each rank that needs it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moekit import _check
from moekit.ep._again import Again
from moekit.ep._agree import agree
from moekit.ep._eager import eager
from moekit.ep._overflow import Overflow
from moekit.ep._ranks import Shares, check
from moekit.ep._rounds import Rounds, parts, rounds
from moekit.ep._started import Handle, Started, combine, numbered, send
from moekit.ep._ways import Message, Uneven, gathered, swapped
from moekit.ops.capacity import limit, padded_to
from moekit.ops.rows import move_rows
from moekit.routing import Routing

_OP = "ep.AllToAll"


class Sizes(NamedTuple):
    """How much goes where.

    Attributes:
        send: rows to each rank.
        receive: rows from each rank.
        slots: of the rows received, those that are of this rank; None if nobody has looked.
    """

    send: list[int]
    receive: list[int]
    slots: int | None


class AllToAll:
    """Exchange of deduplicated rows.

    A token goes once to each rank with any of its experts, with its choice and its weights, and one row, already weighted
    and summed over those experts, comes back::

        token t chose experts 1, 2 (rank 0), 5 (rank 2) and 4 (rank 2) of 6, on 2 ranks of 3

        to rank 0:  x[t]  [1, 2, 5, 4]  [w1, w2, w5, w4]      back:  w1 E1(x[t]) + w2 E2(x[t])
        to rank 2:  x[t]  [1, 2, 5, 4]  [w1, w2, w5, w4]      back:  w5 E5(x[t]) + w4 E4(x[t])

    The rows of a rank are those of its own tokens' pairs (token, rank), at most ``min(K, N)`` a token, in place of K.
    Kept for backward are integers only. The sizes are read by the host once a call, with ``capacity`` never.

    Args:
        group: the ranks that share the experts: a process group, or a mesh of one dimension.
        num_experts: E, of all ranks.
        capacity: the most rows from a rank to a rank. So many are always sent, the first by position and then empty ones,
            so nothing waits for the device, and a CUDA graph can capture the call. A pair (token, rank) beyond it is not
            computed: ``overflow`` counts them, and a RuntimeWarning tells. As nobody looks how many slots of the rows are
            of this rank, the experts need memory for all, ``N * capacity * K``. Run it once before a graph is captured.
        max_rows: the most rows that a rank receives at a time, at least the number of ranks. What is more, on any rank,
            goes in rounds of exchange, experts and exchange, for which :func:`moekit.ep.run` (or ``start(...).through``)
            has to run the experts: ``dispatch`` raises an error, on all ranks. What a round leaves for backward is
            recomputed there, round by round, so that rows and activations of one round exist at a time in backward, too;
            the outputs have the same bits as without a bound wherever the experts treat rows alike.
        redispatch: the received rows are not kept for backward, but exchanged again there (the tokens are kept). That is of
            what autograd keeps of the rows themselves; a copy that experts make of them is kept as ever.

    Raises:
        ValueError: experts that cannot be shared equally; ``capacity`` and ``max_rows`` together; either too small.
        TypeError: something else than a group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh,
        num_experts: int,
        *,
        capacity: int | None = None,
        max_rows: int | None = None,
        redispatch: bool = False,
    ) -> None:
        self.shares = Shares.of(_OP, group, num_experts)
        ranks = self.shares.ranks
        if capacity is not None and max_rows is not None:
            raise _check.unused(_OP, "max_rows", max_rows, f"with a capacity: a rank receives {ranks} times that at most")
        self.capacity = None if capacity is None else _check.positive(_OP, "capacity", capacity)
        self.max_rows = None if max_rows is None else _check.positive(_OP, "max_rows", max_rows, at_least=ranks)
        self.redispatch = redispatch
        agree(_OP, self.shares.group, experts=num_experts, capacity=capacity, max_rows=max_rows, redispatch=redispatch)
        self._overflow = Overflow(_OP, self.shares.group.rank())

    @property
    def overflow(self) -> Tensor | None:
        """Pairs (token, rank) of this rank beyond the capacity so far, ``[] int64`` where tokens are; None before a call."""
        return self._overflow.total

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Routing, Handle]:
        """As :class:`moekit.ep.Dispatcher` has it."""
        return self.start(tokens, routing).finish()

    def combine(self, rows: Tensor, handle: Handle) -> Tensor:
        """As :class:`moekit.ep.Dispatcher` has it."""
        return combine(_OP, rows, handle)

    @eager
    def start(self, tokens: Tensor, routing: Routing) -> Started | Rounds:
        """Begin a dispatch."""
        tokens = check(_OP, self.shares.num_experts, tokens, routing)
        weights: Any = routing.weights
        ranks, slots = self.shares.to_ranks(routing)
        if self.capacity is not None:
            return self._send(tokens, weights, numbered(routing), *self._fixed(ranks, self.capacity))
        message = Message("sizes", _OP, self.shares.group)
        counts = torch.stack([ranks.tokens_per_expert, slots], 1)
        if self.max_rows is None:
            said, heard = swapped(counts, message)
            sizes = Sizes([rows for rows, _ in said], [rows for rows, _ in heard], sum(slots for _, slots in heard))
            return self._send(tokens, weights, numbered(routing), _without_none(ranks, sizes), sizes)
        matrix, me = gathered(counts, message), message.group.rank()
        rows = [[rows for rows, _ in of_rank] for of_rank in matrix]
        sizes = Sizes(rows[me], [of_rank[me] for of_rank in rows], sum(of_rank[me][1] for of_rank in matrix))
        ranks, number = _without_none(ranks, sizes), rounds(rows, self.max_rows)
        if number == 1:
            return self._send(tokens, weights, numbered(routing), ranks, sizes)
        there, back = (parts(rows, number) for rows in (sizes.send, sizes.receive))
        return Rounds(self.shares, self.max_rows, tokens, weights, numbered(routing), ranks, there, back)

    def _send(self, tokens: Tensor, weights: Tensor, numbers: Tensor, ranks: Routing, sizes: Sizes) -> Started:
        tables = ranks.row_tables()
        way = partial(Uneven, send=sizes.send, receive=sizes.receive)
        again = None
        if self.redispatch and torch.is_grad_enabled():
            again = Again(tokens, tables, way(Message("rows", _OP, self.shares.group)))
        return send(
            self.shares,
            way,
            *(move_rows(given, *tables) for given in (tokens, weights, numbers)),
            num_slots=sizes.slots,
            tables=tables,
            again=again,
        )

    def _fixed(self, ranks: Routing, capacity: int) -> tuple[Routing, Sizes]:
        """The routing with ``capacity`` rows a rank."""
        number = self.shares.ranks
        kept = limit(ranks.indices, ranks.indices, number, capacity, "position", "drop")
        limited = padded_to(Routing.from_topk(kept, num_experts=number), capacity)
        self._overflow.add(ranks.tokens_per_expert.sum() - limited.tokens_per_expert.sum())
        each = [capacity] * number
        return limited, Sizes(each, each, None)


def _without_none(ranks: Routing, sizes: Sizes) -> Routing:
    """Without the rows of no rank, which come last, and stay at home."""
    return dataclasses.replace(ranks, order=ranks.order[: sum(sizes.send)])
