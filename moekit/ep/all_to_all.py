"""Dispatch by an all-to-all exchange in which a token travels once to each rank that needs it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moekit import _check
from moekit.ep._agree import Once, agree
from moekit.ep._eager import eager
from moekit.ep._exchange import packed
from moekit.ep._overflow import Overflow
from moekit.ep._ranks import Shares, called_with, check, numbered, slots_beyond, within
from moekit.ep._redispatch import Redispatch
from moekit.ep._rounds import Rounds, parts, rounds
from moekit.ep._started import Handle, Started, combine, send
from moekit.ep._ways import Message, Picked, Tables, Uneven, gathered, swapped
from moekit.ops.rows import move_rows
from moekit.routing import Routing

_OP = "ep.AllToAll"


class Sizes(NamedTuple):
    """How much goes where.

    Attributes:
        send: rows to each rank.
        receive: rows from each rank.
        slots: of the rows received, those that are of this rank, or the most of them; None if nobody has looked.
    """

    send: list[int]
    receive: list[int]
    slots: int | None


class Given(NamedTuple):
    """What is sent.

    Attributes:
        tokens: ``[T, H]``.
        weights: ``[T, K]``.
        numbers: ``[T, K]``, as :func:`moekit.ep._ranks.numbered` has them.
    """

    tokens: Tensor
    weights: Any
    numbers: Tensor

    @torch.no_grad()
    def arranged(self, tables: Tables) -> tuple[Tensor, Tensor]:
        """Slots and rows in the order of tables; the gradient is that of the exchange."""
        return move_rows(packed(self.weights, self.numbers), *tables), move_rows(self.tokens, *tables)


class AllToAll:
    """Exchange of deduplicated rows.

    A token goes once to each rank with any of its experts, with its choice and its weights, and one row, already weighted
    and summed over those experts, comes back::

        token t chose experts 1, 2 (rank 0), 5 (rank 2) and 4 (rank 2) of 6, on 2 ranks of 3

        to rank 0:  x[t]  [1, 2, 5, 4]  [w1, w2, w5, w4]      back:  w1 E1(x[t]) + w2 E2(x[t])
        to rank 2:  x[t]  [1, 2, 5, 4]  [w1, w2, w5, w4]      back:  w5 E5(x[t]) + w4 E4(x[t])

    The rows of a rank are those of its own tokens' pairs (token, rank), at most ``min(K, N)`` a token, in place of K.
    Kept for backward are integers only. The sizes are read by the host once a call, with ``capacity`` never. What does not
    depend on them is queued before: the rows to send are put in place, with room for ``T * min(K, N)`` of them, which is at
    most 1.6 times what a uniform routing sends, until they have been sent. With ``max_rows`` there is room for those alone.

    Args:
        group: the ranks that share the experts: a process group, or a mesh of one dimension.
        num_experts: E, of all ranks.
        capacity: the most rows from a rank to a rank. So many are always sent, the first by position and then empty ones,
            so nothing waits for the device, and a CUDA graph can capture the call. A pair (token, rank) beyond it is not
            computed: ``overflow`` counts them, and a RuntimeWarning tells. As nobody looks how many slots of the rows are
            of this rank, the experts need memory for all, ``N * capacity * K``. Run it once before a graph is captured.
        slot_capacity: with a capacity: the most slots that a rank's experts compute, and need memory for. With balanced
            experts there are ``T * K``. Of more, those are left out that come last among the rows of each rank:
            ``slot_overflow`` counts them, and a RuntimeWarning tells.
        max_rows: the most rows that a rank receives at a time, at least the number of ranks. What is more, on any rank,
            goes in rounds of exchange, experts and exchange, for which :func:`moekit.ep.run` (or ``start(...).through``)
            has to run the experts: ``dispatch`` raises an error, on all ranks. What a round leaves for backward is
            recomputed there, round by round, so that rows and activations of one round exist at a time in backward, too;
            the outputs have the same bits as without a bound wherever the experts treat rows alike. Gradients of their
            weights come once a round, and autograd adds them up: a second set of them is there for a moment, so a bound
            saves memory only where that is less than what it keeps away.
        redispatch: the received rows are not kept for backward, but exchanged again there (the tokens are kept). That is of
            what autograd keeps of the rows themselves; a copy that experts make of them is kept as ever.

    Raises:
        ValueError: experts that cannot be shared equally; ``capacity`` and ``max_rows`` together; any of them too small;
            ``slot_capacity`` alone.
        TypeError: something else than a group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh,
        num_experts: int,
        *,
        capacity: int | None = None,
        slot_capacity: int | None = None,
        max_rows: int | None = None,
        redispatch: bool = False,
    ) -> None:
        self.shares = Shares.of(_OP, group, num_experts)
        ranks = self.shares.ranks
        if capacity is not None and max_rows is not None:
            raise _check.unused(_OP, "max_rows", max_rows, f"with a capacity: a rank receives {ranks} times that at most")
        self.capacity = None if capacity is None else _check.positive(_OP, "capacity", capacity)
        self.max_rows = None if max_rows is None else _check.positive(_OP, "max_rows", max_rows, at_least=ranks)
        self.slot_capacity = within(_OP, slot_capacity, capacity, "capacity")
        self.redispatch = redispatch
        options = {"capacity": capacity, "slot_capacity": slot_capacity, "max_rows": max_rows, "redispatch": redispatch}
        agree(_OP, self.shares.group, experts=num_experts, **options)
        self._first = Once(_OP, self.shares.group)
        self._overflow = Overflow(_OP, "the capacity", f"pairs (token, rank) of rank {self.shares.group.rank()}")
        self._slot_overflow = slots_beyond(self.shares, self.slot_capacity)

    @property
    def overflow(self) -> Tensor | None:
        """Pairs (token, rank) of this rank beyond the capacity so far, ``[] int64`` where tokens are; None before a call."""
        return self._overflow.total

    @property
    def slot_overflow(self) -> Tensor | None:
        """Slots of this rank's experts beyond ``slot_capacity`` so far, as ``overflow`` has its pairs; None without."""
        return None if self._slot_overflow is None else self._slot_overflow.total

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
        given, facts = Given(tokens, routing.weights, numbered(routing)), called_with(tokens, routing)
        if self.capacity is not None:
            self._first.agree(facts)
            dropped, tables = self.shares.to_ranks_within(routing.indices, self.capacity)
            self._overflow.add(dropped)
            each = [self.capacity] * self.shares.ranks
            return self._send(given, tables, Sizes(each, each, self.slot_capacity))
        rows, tables = self.shares.to_ranks(routing.indices)
        counts = torch.stack([rows, self.shares.slots(routing)], 1)
        if self.max_rows is not None:
            return self._bounded(given, tables, counts, self.max_rows, facts)
        found = swapped(counts, Message("sizes", _OP, self.shares.group), facts)
        # While sizes are on their way to the host, rows are put in place for any sizes; those that there are come first.
        arranged = given.arranged(tables)
        said, heard = found()
        sizes = Sizes([rows for rows, *_ in said], [rows for rows, *_ in heard], sum(slots for _, slots, _ in heard))
        slots, rows = (part[: sum(sizes.send)] for part in arranged)
        return self._send(given, _prefix(tables, sizes), sizes, (slots, rows))

    def _bounded(
        self, given: Given, tables: Tables, counts: Tensor, max_rows: int, facts: dict[str, Any]
    ) -> Started | Rounds:
        """With a bound on rows: all ranks need to know what each of them receives."""
        group = self.shares.group
        matrix, me = gathered(counts, Message("sizes", _OP, group), facts), group.rank()
        rows = [[rows for rows, *_ in of_rank] for of_rank in matrix]
        sizes = Sizes(rows[me], [of_rank[me] for of_rank in rows], sum(of_rank[me][1] for of_rank in matrix))
        tables, number = _prefix(tables, sizes), rounds(rows, max_rows)
        if number == 1:
            return self._send(given, tables, sizes)
        there, back = (parts(rows, number) for rows in (sizes.send, sizes.receive))
        return Rounds(self.shares, max_rows, *given, counts[:, 0], tables, there, back)

    def _send(self, given: Given, tables: Tables, sizes: Sizes, arranged: Any = (None, None)) -> Started:
        def way(message: Message) -> Picked:
            return Picked(Uneven(message, sizes.send, sizes.receive), tables)

        redispatch = None
        if self.redispatch and torch.is_grad_enabled():
            redispatch = Redispatch(given.tokens, way(Message("rows", _OP, self.shares.group)))
        return send(
            self.shares,
            way,
            *given,
            arranged=arranged,
            num_slots=sizes.slots,
            overflow=self._slot_overflow,
            redispatch=redispatch,
        )


def _prefix(tables: Tables, sizes: Sizes) -> Tables:
    """The tables of the rows that there are."""
    row_token, token_offsets, token_rows = tables
    number = sum(sizes.send)
    return row_token[:number], token_offsets, token_rows[:number]
