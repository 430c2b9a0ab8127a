"""An exchange of rows between ranks, with a gradient.

It is started and waited for by two autograd nodes, so that what runs between them on the forward (a shared expert) runs
between them on the way back as well, while the rows travel::

    forward    start ---- what runs beside ---- wait
    backward    wait ---- what runs beside ---- start

The graph of every rank has the same nodes, whatever came to it: the exchange of results is tied to that of the tokens, so
that gradients go back even from experts whose result has nothing to do with their rows (there were none, say). A rank
that left one out would keep the others waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.ep._ways import Way


class Arrived(NamedTuple):
    """What an exchange brought.

    Attributes:
        rows: the rows.
        along: the integers that came with them; None if none did.
        tie: an empty tensor, by which a later exchange is tied to this one.
    """

    rows: Tensor
    along: Tensor | None
    tie: Tensor


class Beside(Protocol):
    """What travels beside the gradients."""

    def keep(self) -> tuple[Tensor, ...]:
        """What autograd is to keep of it."""
        ...

    def start(self, *kept: Tensor) -> None:
        """Called when they are on their way."""
        ...

    def finish(self) -> None:
        """Called when they are there."""
        ...


class Exchange:
    """An exchange under way.

    Args:
        rows: what to send.
        way: how.
        along: integers ``[len(rows), n]`` int32 that travel with the rows, in the same message; they have no way back.
        after: ties of earlier exchanges.
        beside: what else is to travel on the way back.
    """

    def __init__(
        self,
        rows: Tensor,
        way: Way,
        *,
        along: Tensor | None = None,
        after: Sequence[Tensor] = (),
        beside: Beside | None = None,
    ) -> None:
        self.way, self.along, self.beside = way, along, beside
        # What travels is not among autograd's tensors, for its shape is another on the way back.
        self.pending: Tensor | None = None
        # Something is kept of an exchange of tokens, so that a checkpoint (moekit.ep._rounds) recomputes it on every rank,
        # and nothing of one of results, so that it is not sent again.
        self.marked = not after
        self._link: Any = _Start.apply(self, rows, *after)

    def wait(self) -> Arrived:
        """What arrived. Once."""
        link, self._link = self._link, None  # or the node and this would hold each other
        rows, tie = _Wait.apply(self, link)
        along, self.along = self.along, None
        return Arrived(rows, along, tie)

    def start(self, rows: Tensor, way: Way) -> None:
        """Send."""
        self.pending = way.start(rows)

    def finish(self, way: Way) -> Tensor:
        """Receive, and let go."""
        pending, self.pending = self.pending, None
        if pending is None:
            raise RuntimeError("moekit.ep: an exchange can be waited for once, and gone back through once a backward")
        return way.finish(pending)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, rows: Tensor, *after: Tensor) -> Tensor:
        ctx.exchange, ctx.ties = exchange, len(after)
        along = exchange.along
        exchange.start(rows if along is None else _packed(rows, along), exchange.way)
        return rows.new_empty(0)  # by which autograd knows that the wait comes after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, link: Tensor) -> tuple:
        grad = ctx.exchange.finish(ctx.exchange.way.back())
        if ctx.exchange.beside is not None:
            ctx.exchange.beside.finish()
        return None, grad, *[link] * ctx.ties


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, link: Tensor) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        ctx.save_for_backward(*[link] * exchange.marked, *(exchange.beside.keep() if exchange.beside else ()))
        rows = exchange.finish(exchange.way)
        if exchange.along is not None:
            rows, exchange.along = _unpacked(rows, exchange.along.shape[1], link.dtype)
        return rows, link.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, tie: Tensor) -> tuple:
        exchange, kept = ctx.exchange, ctx.saved_tensors  # under a checkpoint: recomputed now, if experts kept nothing
        exchange.start(grad, exchange.way.back())
        if exchange.beside is not None:
            exchange.beside.start(*kept)
        return None, tie


def _packed(rows: Tensor, along: Tensor) -> Tensor:
    """Both as bytes, ``[S, n]`` uint8: no other type is known to every backend, and holds integers and weights."""
    return torch.cat([_dense(along).view(torch.uint8), _dense(rows).view(torch.uint8)], 1)


def _unpacked(packed: Tensor, integers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    along, rows = packed.split([4 * integers, packed.shape[1] - 4 * integers], 1)
    return _dense(rows).view(dtype), _dense(along).view(torch.int32)


def _dense(values: Tensor) -> Tensor:
    """A copy, for what counts as contiguous may begin anywhere and, if it is empty, have any strides: no place for bytes."""
    return values.clone(memory_format=torch.contiguous_format)
