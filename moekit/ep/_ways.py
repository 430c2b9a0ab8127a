"""The ways that rows go between ranks: functional collectives of PyTorch, on gloo as on NCCL.

A way has a start and a finish, between which the rows travel, and a way back, by which gradients go. What is done to rows on
this rank, before and after, is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.ep._agree import agree, mark
from moekit.ep._faults import named, read
from moekit.ep._traffic import count
from moekit.ops.rows import move_rows, sum_rows

_c10d: Any = torch.ops._c10d_functional


class Way(Protocol):
    """From rows of this rank to rows of this rank."""

    def arrange(self, rows: Tensor) -> Tensor:
        """Rows as they travel."""
        ...

    def start(self, arranged: Tensor) -> Tensor:
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


Tables = tuple[Tensor, Tensor, Tensor]
"""Of rows, as :data:`moekit.ops.rows.move_rows` takes them."""


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

    def arrange(self, rows: Tensor) -> Tensor:
        return rows

    def start(self, arranged: Tensor) -> Tensor:
        return self.message.all_to_all(arranged, self.send, self.receive)

    def finish(self, pending: Tensor) -> Tensor:
        return self.message.wait(pending)

    def back(self) -> Uneven:
        return Uneven(self.message, self.receive, self.send)


class Picked(NamedTuple):
    """Each rank gets those rows that it needs: ``[T, ...]`` to ``[sum(receive), ...]``, by where from.

    Attributes:
        uneven: how they travel.
        tables: of the rows that are sent.
    """

    uneven: Uneven
    tables: Tables

    def arrange(self, rows: Tensor) -> Tensor:
        return move_rows(rows, *self.tables)

    def start(self, arranged: Tensor) -> Tensor:
        return self.uneven.start(arranged)

    def finish(self, pending: Tensor) -> Tensor:
        return self.uneven.finish(pending)

    def back(self) -> Summed:
        return Summed(self.uneven.back(), self.tables)


class Summed(NamedTuple):
    """What was picked comes home, where each row's are added: ``[sum(send), ...]`` to ``[T, ...]``."""

    uneven: Uneven
    tables: Tables

    def arrange(self, rows: Tensor) -> Tensor:
        return rows

    def start(self, arranged: Tensor) -> Tensor:
        return self.uneven.start(arranged)

    def finish(self, pending: Tensor) -> Tensor:
        return sum_rows(self.uneven.finish(pending), None, *self.tables)

    def back(self) -> Picked:
        return Picked(self.uneven.back(), self.tables)


class Spread(NamedTuple):
    """Everybody gets everybody's rows: ``[T, ...]`` to ``[ranks * padded, ...]``, those past a rank's own T zero."""

    message: Message
    tokens: int
    padded: int

    def arrange(self, rows: Tensor) -> Tensor:
        missing = self.padded - self.tokens
        return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows

    def start(self, arranged: Tensor) -> Tensor:
        return self.message.all_gather(arranged)

    def finish(self, pending: Tensor) -> Tensor:
        return self.message.wait(pending)

    def back(self) -> Collect:
        return Collect(*self)


class Collect(NamedTuple):
    """Everybody's part of each row comes home, where they are added: ``[ranks * padded, ...]`` to ``[T, ...]``."""

    message: Message
    tokens: int
    padded: int

    def arrange(self, rows: Tensor) -> Tensor:
        return rows

    def start(self, arranged: Tensor) -> Tensor:
        each = [self.padded] * self.message.group.size()
        return self.message.all_to_all(arranged, each, each)

    def finish(self, pending: Tensor) -> Tensor:
        parts = self.message.wait(pending)
        parts = parts.view(-1, self.padded, *parts.shape[1:]) if self.padded else parts.unsqueeze(0)
        wide = torch.promote_types(parts.dtype, torch.float32)
        return parts[:, : self.tokens].sum(0, dtype=wide).to(parts.dtype)

    def back(self) -> Spread:
        return Spread(*self)


# --- sizes: what the host reads -------------------------------------------------------------------------------------
# A mark travels with them, by which each rank sees whether all have been called alike: otherwise the messages that follow
# would be taken for others, whose bytes are of another type or number.


def swapped(counts: Tensor, message: Message, facts: Mapping[str, Any]) -> Callable[[], tuple[list, list]]:
    """What this rank says to each rank ``[ranks, n]``, and what each says to it, as lists, once the result is called.

    Raises:
        ValueError: then, on all ranks, if ``facts`` are not the same on all.
    """
    each = [1] * message.group.size()
    counts = torch.nn.functional.pad(counts, (0, 1), value=mark(facts))
    received = message.wait(message.all_to_all(counts, each, each))
    found = read(torch.stack([counts, received]), message.op, message.group)

    def look() -> tuple[list, list]:
        said, heard = found()
        _alike(message, facts, [of_rank[-1] for of_rank in heard])
        return said, heard

    return look


def gathered(counts: Tensor, message: Message, facts: Mapping[str, Any]) -> list:
    """What every rank says, ``[ranks, *counts.shape]`` as a list: a host read; errors as of :func:`swapped`."""
    counts = torch.nn.functional.pad(counts, (0, 1), value=mark(facts))
    found = read(message.wait(message.all_gather(counts.unsqueeze(0))), message.op, message.group)()
    _alike(message, facts, [of_rank[-1] if counts.dim() == 1 else of_rank[0][-1] for of_rank in found])
    return found


def _alike(message: Message, facts: Mapping[str, Any], marks: Sequence[int]) -> None:
    if len({*marks}) > 1:  # as every rank sees
        agree(message.op, message.group, **facts)
