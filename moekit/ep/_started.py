"""A dispatch under way, and what the way back needs: the same for every kind of exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ep._eager import eager
from moekit.ep._exchange import Exchange
from moekit.ep._overflow import Overflow
from moekit.ep._ranks import Shares
from moekit.ep._redispatch import Redispatch
from moekit.ep._ways import Message, Way
from moekit.routing import Routing

Experts = Callable[[Tensor, Routing], Tensor]


@dataclass(eq=False)
class Handle:
    """What the way back needs: integers, and nothing of row size. For one use.

    Attributes:
        op: whose.
        shape: ``[N, H]``, of the rows.
        way: that of results.
        ties: of the exchanges that brought the rows; None: it was used.
        redispatch: what brings the rows again in backward, or None.
    """

    op: str
    shape: torch.Size
    way: Way
    ties: tuple[Tensor, ...] | None
    redispatch: Redispatch | None

    @eager
    def take_back(self, rows: Tensor) -> Tensor:
        """Bring results home."""
        _check.floating(self.op, "rows", rows)
        _check.shape(self.op, "rows", rows, self.shape, "[rows that were dispatched, H]")
        ties, self.ties = self.ties, None
        if ties is None:
            raise _check.fail(self.op, "handle", "of a dispatch that has not been combined", "one that was used")
        return Exchange(rows, self.way, after=ties, beside=self.redispatch).wait().rows


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
    overflow: Overflow | None
    redispatch: Redispatch | None

    @eager
    def finish(self) -> tuple[Tensor, Routing, Handle]:
        """What :meth:`moekit.ep.Dispatcher.dispatch` gives."""
        slots = self.slots.wait()
        numbers: Any = slots.along
        local = self.shares.local(numbers, slots.rows, self.num_slots, self.overflow)
        rows = self.rows.wait()
        handle = Handle(self.shares.op, rows.rows.shape, self.rows.way.back(), (slots.tie, rows.tie), self.redispatch)
        return rows.rows, local, handle

    def through(self, experts: Experts) -> Tensor:
        """The experts' results, ``[T, H]``."""
        rows, local, handle = self.finish()
        out = experts(rows, local) if self.redispatch is None else self.redispatch.run(experts, rows, local)
        del rows, local
        return handle.take_back(out)


def send(
    shares: Shares,
    way: Callable[[Message], Way],
    rows: Tensor,
    weights: Tensor,
    numbers: Tensor,
    *,
    arranged: tuple[Tensor | None, Tensor | None] = (None, None),
    num_slots: int | None = None,
    overflow: Overflow | None = None,
    redispatch: Redispatch | None = None,
) -> Started:
    """Begin to send.

    Args:
        shares: of whose experts the rows are.
        way: of a message.
        rows: ``[T, H]``.
        weights: ``[T, K]``.
        numbers: ``[T, K]``, as :func:`moekit.ep._ranks.numbered` has them.
        arranged: slots and rows as :class:`Exchange` has them.
        num_slots: how many of the slots that arrive are of this rank, if that is known.
        overflow: as :meth:`moekit.ep._ranks.Shares.local` has it.
        redispatch: as :class:`Handle` has it.
    """
    of_slots, of_rows = (way(Message(what, shares.op, shares.group)) for what in ("slots", "rows"))
    slots = Exchange(weights, of_slots, along=numbers, arranged=arranged[0])
    return Started(shares, slots, Exchange(rows, of_rows, arranged=arranged[1]), num_slots, overflow, redispatch)
