"""A dispatch under way, and what the way back needs: the same for every kind of exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ep._again import Again
from moekit.ep._eager import eager
from moekit.ep._exchange import Exchange
from moekit.ep._ranks import Shares
from moekit.ep._ways import Message, Way
from moekit.ops.rows import sum_rows
from moekit.routing import Routing

Experts = Callable[[Tensor, Routing], Tensor]
Tables = tuple[Tensor, Tensor, Tensor]


@dataclass(eq=False)
class Handle:
    """What the way back needs: integers, and nothing of row size. For one use.

    Attributes:
        op: whose.
        shape: ``[N, H]``, of the rows.
        way: that of results.
        ties: of the exchanges that brought the rows; None: it was used.
        tables: of the rows that come back, by which they are summed; None: they are the tokens' already.
        again: what brings the rows again in backward, or None.
    """

    op: str
    shape: torch.Size
    way: Way
    ties: tuple[Tensor, ...] | None
    tables: Tables | None
    again: Again | None

    @eager
    def take_back(self, rows: Tensor) -> Tensor:
        """Bring results home."""
        _check.floating(self.op, "rows", rows)
        _check.shape(self.op, "rows", rows, self.shape, "[rows that were dispatched, H]")
        ties, self.ties = self.ties, None
        if ties is None:
            raise _check.fail(self.op, "handle", "of a dispatch that has not been combined", "one that was used")
        back = Exchange(rows, self.way, after=ties, beside=self.again).wait().rows
        return back if self.tables is None else sum_rows(back, None, *self.tables)


def combine(op: str, rows: Tensor, handle: object) -> Tensor:
    """Bring results home by a handle of ``op``'s own."""
    if not isinstance(handle, Handle) or handle.op != op:
        raise _check.wrong_type(op, "handle", "what dispatch gave", type(handle).__name__)
    return handle.take_back(rows)


@dataclass(eq=False)
class Started:
    """Rows and their slots on their way, the slots first: there is work to do on them while the rows travel."""

    shares: Shares
    slots: Exchange
    rows: Exchange
    num_slots: int | None
    tables: Tables | None
    again: Again | None

    @eager
    def finish(self) -> tuple[Tensor, Routing, Handle]:
        """What :meth:`moekit.ep.Dispatcher.dispatch` gives."""
        slots = self.slots.wait()
        indices: Any = slots.along
        local = self.shares.local(indices - 1, slots.rows, self.num_slots)
        rows = self.rows.wait()
        handle = Handle(
            self.shares.op, rows.rows.shape, self.rows.way.back(), (slots.tie, rows.tie), self.tables, self.again
        )
        return rows.rows, local, handle

    def through(self, experts: Experts) -> Tensor:
        """The experts' results, ``[T, H]``."""
        rows, local, handle = self.finish()
        out = experts(rows, local) if self.again is None else self.again.run(experts, rows, local)
        del rows, local
        return handle.take_back(out)


def numbered(routing: Routing) -> Tensor:
    """The experts of each slot as they travel, ``[T, K]`` int32, from 1: 0 is none, as in rows of zeros."""
    return routing.indices.clamp(min=-1).to(torch.int32) + 1


def send(
    shares: Shares,
    way: Callable[[Message], Way],
    rows: Tensor,
    weights: Tensor,
    numbers: Tensor,
    *,
    num_slots: int | None = None,
    tables: Tables | None = None,
    again: Again | None = None,
) -> Started:
    """Begin to send.

    Args:
        shares: of whose experts the rows are.
        way: of a message.
        rows: ``[S, H]``.
        weights: ``[S, K]``.
        numbers: ``[S, K]``, as :func:`numbered` has them.
        num_slots: how many of the slots that arrive are of this rank, if that is known.
        tables: as :class:`Handle` has them, like ``again``.
        again: see there.
    """
    slots = Exchange(weights, way(Message("slots", shares.op, shares.group)), along=numbers)
    return Started(shares, slots, Exchange(rows, way(Message("rows", shares.op, shares.group))), num_slots, tables, again)
