"""What has to be known of a format: one row of the table in :mod:`moekit.packed.formats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import _check
from moekit.ops.unpack import Stored

Block = tuple[int, int]
Shape = tuple[int, int, int]


class Part(NamedTuple):
    """Shape and dtypes that a part of a packed stack may have; the first dtype is what :func:`moekit.pack` makes."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def empty(self, device: torch.device) -> Tensor:
        """Memory for it."""
        return torch.empty(self.shape, dtype=self.dtypes[0], device=device)

    def check(self, op: str, name: str, value: Any) -> None:
        """``value`` has the shape and one of the dtypes."""
        _check.tensor(op, name, value)
        if value.dtype not in self.dtypes:
            raise _check.wrong_type(op, name, f"a tensor of {_check.names_of(self.dtypes)}", value.dtype)
        if tuple(value.shape) != self.shape:
            raise _check.fail(op, name, f"of shape {list(self.shape)}", f"shape {list(value.shape)}")


class Layout(NamedTuple):
    """The parts of a packed stack of a given shape."""

    codes: Part
    scales: list[Part]


class Entries(NamedTuple):
    """Tensors of a checkpoint by name, of which those that begin with ``prefix`` are a weight's."""

    op: str
    prefix: str
    tensors: Mapping[str, Tensor]
    block: Block | None
    dtype: torch.dtype | None

    def take(self, suffix: str) -> Tensor:
        """One of them; where there is none, the error says what there is."""
        if self.prefix + suffix not in self.tensors:
            found = sorted(name for name in self.tensors if name.startswith(self.prefix))
            raise _check.fail(self.op, "tensors", f"with {self.prefix + suffix!r}", found or "none of that prefix")
        value = self.tensors[self.prefix + suffix]
        _check.tensor(self.op, self.prefix + suffix, value)
        return value


class Format(NamedTuple):
    """How weights are packed in one format, and how checkpoints name the parts."""

    block: Callable[[str, int, int, Block | None], Block]
    """(operation, out, in, what is asked for) to the rows and columns that share a scale, or an error."""
    layout: Callable[[Shape, Block, bool], Layout]
    """(shape, block, whether scales are doubly quantised) to the parts."""
    pack: Callable[[Tensor, Block], tuple[Tensor, Tensor]]
    """One expert ``[out, in]`` to its codes and its scales."""
    mark: str
    """The end of a name that only this format's checkpoints have."""
    entries: Callable[[Stored, torch.dtype], dict[str, Tensor]]
    """The tensors of a checkpoint by the ends of their names."""
    stored: Callable[[Entries], tuple[Stored, torch.dtype]]
    """And back, with the dtype that is stood for. What it returns is yet to be checked."""


def only_block(op: str, format: str, wanted: Block | None, block: Block) -> Block:
    """The block of a format that leaves no choice."""
    if wanted is not None and tuple(wanted) != block:
        raise _check.fail(op, "block", f"{block}, {format}'s (or None)", wanted)
    return block


def divisible(op: str, what: str, size: int, by: int) -> None:
    """Refuse weights that are not made of whole blocks."""
    if size % by:
        raise _check.fail(op, "weight", f"of {what} divisible by {by}", size)
