"""The ways that rows go between ranks: functional collectives of PyTorch, on gloo as on NCCL.

A way has a start and a finish, between which the rows travel, and a way back, by which gradients go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.ep._faults import named, read
from moekit.ep._traffic import count

_c10d: Any = torch.ops._c10d_functional


class Way(Protocol):
    """From rows of this rank to rows of this rank."""

    def start(self, rows: Tensor) -> Tensor:
        """Send; what it gives is for :meth:`finish`."""
        ...

    def finish(self, pending: Tensor) -> Tensor:
        """What arrived."""
        ...

    def back(self) -> Way:
        """The way of gradients, and of results."""
        ...


class Message(NamedTuple):
    """One kind of message of a dispatcher.

    Attributes:
        what: ``"rows"``, ``"slots"`` or ``"sizes"``.
        op: the operation, as errors name it.
        group: who exchanges.
    """

    what: str
    op: str
    group: dist.ProcessGroup

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Begin to send ``rows [sum(send), ...]``, by the rank they go to; ``[sum(receive), ...]`` comes."""
        count(self.what, rows, sum(send) - send[self.group.rank()])
        with named(self.op, self.group):
            return _c10d.all_to_all_single(rows.contiguous(), list(receive), list(send), self.group.group_name)

    def all_gather(self, rows: Tensor) -> Tensor:
        """Begin to send ``rows [n, ...]`` to all; ``[ranks * n, ...]`` comes."""
        count(self.what, rows, rows.shape[0] * (self.group.size() - 1))
        with named(self.op, self.group):
            return _c10d.all_gather_into_tensor(rows.contiguous(), self.group.size(), self.group.group_name)

    def wait(self, pending: Tensor) -> Tensor:
        """What arrived."""
        with named(self.op, self.group):
            return _c10d.wait_tensor(pending)


class Uneven(NamedTuple):
    """Each rank gets rows of its own: ``[sum(send), ...]``, by where they go, to ``[sum(receive), ...]``, by where from.

    Attributes:
        message: what goes.
        send: rows to each rank.
        receive: rows from each rank.
    """

    message: Message
    send: Sequence[int]
    receive: Sequence[int]

    def start(self, rows: Tensor) -> Tensor:
        return self.message.all_to_all(rows, self.send, self.receive)

    def finish(self, pending: Tensor) -> Tensor:
        return self.message.wait(pending)

    def back(self) -> Uneven:
        return Uneven(self.message, self.receive, self.send)


class Spread(NamedTuple):
    """Everybody gets everybody's rows: ``[T, ...]`` to ``[ranks * padded, ...]``, those past a rank's own T zero."""

    message: Message
    tokens: int
    padded: int

    def start(self, rows: Tensor) -> Tensor:
        missing = self.padded - self.tokens
        return self.message.all_gather(torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows)

    def finish(self, pending: Tensor) -> Tensor:
        return self.message.wait(pending)

    def back(self) -> Collect:
        return Collect(*self)


class Collect(NamedTuple):
    """Everybody's part of each row comes home, where they are added: ``[ranks * padded, ...]`` to ``[T, ...]``."""

    message: Message
    tokens: int
    padded: int

    def start(self, rows: Tensor) -> Tensor:
        each = [self.padded] * self.message.group.size()
        return self.message.all_to_all(rows, each, each)

    def finish(self, pending: Tensor) -> Tensor:
        parts = self.message.wait(pending)
        parts = parts.view(-1, self.padded, *parts.shape[1:]) if self.padded else parts.unsqueeze(0)
        wide = torch.promote_types(parts.dtype, torch.float32)
        return parts[:, : self.tokens].sum(0, dtype=wide).to(parts.dtype)

    def back(self) -> Spread:
        return Spread(*self)


# --- sizes: what the host reads -------------------------------------------------------------------------------------


def swapped(counts: Tensor, message: Message) -> tuple[list, list]:
    """What this rank says to each rank ``[ranks, ...]``, and what each says to it, as lists: a host read."""
    each = [1] * message.group.size()
    received = message.wait(message.all_to_all(counts, each, each))
    said, heard = read(torch.stack([counts, received]), message.op, message.group)
    return said, heard


def gathered(counts: Tensor, message: Message) -> list:
    """What every rank says, ``[ranks, *counts.shape]`` as a list: a host read."""
    return read(message.wait(message.all_gather(counts.unsqueeze(0))), message.op, message.group)
