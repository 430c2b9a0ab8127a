"""The collectives of expert parallelism, with gradients: functional collectives of PyTorch, on gloo as on NCCL.

An exchange is started and waited for by two autograd nodes, so that what runs between them on the forward (a shared
expert) runs between them on the way back as well, while the rows travel::

    forward    start ---- what runs beside ---- wait
    backward    wait ---- what runs beside ---- start
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.ep._faults import named

_c10d: Any = torch.ops._c10d_functional


# --- what is counted ------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """What this rank has sent to others.

    Attributes:
        bytes: by what was sent: ``"rows"`` (tokens, outputs and their gradients), ``"slots"`` (expert numbers and routing
            weights, and their gradients), ``"sizes"``.
        rows: rows ``[H]`` of tokens or outputs, and of their gradients.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    rows: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())

    def add(self, what: str, sent: Tensor, count: int) -> None:
        """Count ``count`` of the rows of ``sent``."""
        one = sent[:1].numel() * sent.element_size() if sent.shape[0] else 0
        self.bytes[what] = self.bytes.get(what, 0) + count * one
        self.rows += count if what == "rows" else 0


_watching: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what moekit's collectives of this process send to other ranks while the context is open, backward included."""
    seen = Traffic()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


def _count(what: str, sent: Tensor, count: int) -> None:
    for seen in _watching:
        seen.add(what, sent, count)


# --- exchange -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How many rows this rank sends to each rank of a group, and how many it receives from each."""

    send: Sequence[int]
    receive: Sequence[int]

    def back(self) -> Sizes:
        """Those of the way back."""
        return Sizes(self.receive, self.send)


@dataclass(frozen=True)
class Message:
    """One kind of message of a dispatcher.

    Attributes:
        what: ``"rows"`` or ``"slots"``.
        op: the operation, as errors name it.
        group: who exchanges.
    """

    what: str
    op: str
    group: dist.ProcessGroup

    def start(self, rows: Tensor, sizes: Sizes) -> Tensor:
        """Begin to send ``rows [sum(send), ...]``; gives ``[sum(receive), ...]``, to be looked at after :meth:`wait`."""
        rank = self.group.rank()
        _count(self.what, rows, sum(sizes.send) - sizes.send[rank])
        with named(self.op, self.group):
            sent = rows.contiguous()
            return _c10d.all_to_all_single(sent, list(sizes.receive), list(sizes.send), self.group.group_name)

    def wait(self, pending: Tensor) -> Tensor:
        """What arrived."""
        with named(self.op, self.group):
            return _c10d.wait_tensor(pending)


class Exchange:
    """An exchange under way: :meth:`wait` gives what arrived.

    Args:
        rows: ``[sum(sizes.send), ...]``, by the rank they go to.
        sizes: how many go where.
        message: what they are.
    """

    def __init__(self, rows: Tensor, sizes: Sizes, message: Message) -> None:
        self.sizes, self.message = sizes, message
        self.pending: Tensor | None = (
            None  # on its way; not among autograd's tensors, since its shape is another on the way back
        )
        self._link: Any = _Start.apply(rows, self)

    def wait(self) -> Tensor:
        """``[sum(sizes.receive), ...]``, by the rank they come from."""
        arrived: Any = _Wait.apply(self._link, self)
        return arrived

    def start(self, rows: Tensor, sizes: Sizes) -> None:
        """Send."""
        self.pending = self.message.start(rows, sizes)

    def arrived(self) -> Tensor:
        """Wait, and let go."""
        pending, self.pending = self.pending, None
        if pending is None:
            raise RuntimeError(f"moekit.{self.message.op}: an exchange can be waited for once, and went back through once")
        return self.message.wait(pending)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(rows, exchange.sizes)
        return rows.new_empty(0)  # by which autograd knows that the wait comes after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.exchange.arrived(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.arrived()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        exchange = ctx.exchange
        exchange.start(grad, exchange.sizes.back())
        return grad.new_empty(0), None


def exchange(rows: Tensor, sizes: Sizes, message: Message) -> Tensor:
    """Send and receive rows; the gradient goes the other way."""
    return Exchange(rows, sizes, message).wait()


def sizes_of(counts: Tensor, op: str, group: dist.ProcessGroup) -> Sizes:
    """From the number of rows for each rank ``[ranks]``, on their device: the one host read of a layer."""
    message = Message("sizes", op, group)
    each = [1] * group.size()
    received = message.wait(message.start(counts, Sizes(each, each)))
    send, receive = torch.stack([counts, received]).tolist()
    return Sizes(send, receive)
