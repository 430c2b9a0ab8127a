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

from moekit import _backend
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
        arranged: what ``way.arrange`` makes of them (of :func:`packed`, with integers), if that is done.
        after: ties of earlier exchanges.
        beside: what else is to travel on the way back.
    """

    def __init__(
        self,
        rows: Tensor,
        way: Way,
        *,
        along: Tensor | None = None,
        arranged: Tensor | None = None,
        after: Sequence[Tensor] = (),
        beside: Beside | None = None,
    ) -> None:
        # The tables of a way are held here, not by autograd: what is kept of results would be sent again under a checkpoint.
        self.way, self.along, self.arranged, self.beside = way, along, arranged, beside
        self.backend = _backend.current()  # also of backward, wherever that is
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

    def start(self, arranged: Tensor, way: Way) -> None:
        """Send."""
        self.pending = way.start(arranged)

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
        arranged, exchange.arranged = exchange.arranged, None
        if arranged is None:
            arranged = exchange.way.arrange(rows if exchange.along is None else packed(rows, exchange.along))
        exchange.start(arranged, exchange.way)
        return rows.new_empty(0)  # by which autograd knows that the wait comes after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, link: Tensor) -> tuple:
        with _backend.backend(ctx.exchange.backend):
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
        back = exchange.way.back()
        with _backend.backend(exchange.backend):
            exchange.start(back.arrange(grad), back)
            if exchange.beside is not None:
                exchange.beside.start(*kept)
        return None, tie


def packed(rows: Tensor, along: Tensor) -> Tensor:
    """Both as bytes, ``[S, n]`` uint8: no other type is known to every backend, and holds integers and weights."""
    return torch.cat([_bytes(along), _bytes(rows)], 1)


def _bytes(values: Tensor) -> Tensor:
    # What is empty counts as contiguous whatever its strides are, and then its bytes cannot be looked at.
    dense = values.contiguous() if values.numel() else values.new_empty(values.shape)
    return dense.view(torch.uint8)


def _unpacked(bytes_: Tensor, integers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    along, rows = bytes_.split([4 * integers, bytes_.shape[1] - 4 * integers], 1)
    return _values(rows, dtype), _values(along, torch.int32)


def _values(bytes_: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, for bytes may begin where a value may not."""
    return bytes_.clone(memory_format=torch.contiguous_format).view(dtype)
