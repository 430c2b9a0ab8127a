"""What has to be known of a format: one row of the table in :mod:`moekit.packed.formats`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moekit import _check

Block = tuple[int, int]


class Part(NamedTuple):
    """Shape and dtypes that a part of a packed stack may have; the first is what :func:`moekit.pack` makes."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


class Layout(NamedTuple):
    """The parts of a packed stack of a given shape."""

    codes: Part
    scales: list[Part]


class Format(NamedTuple):
    """How weights are packed in one format, and how checkpoints name the parts."""

    block: Callable[[str, int, int, Block | None], Block]  # (operation, out, in, wanted) to what is used, or an error
    layout: Callable[[tuple[int, int, int], Block, bool], Layout]  # (shape, block, double_quant)
    pack: Callable[[Tensor, Block], tuple[Tensor, Tensor]]  # one expert [out, in] to its codes and scales


def only_block(op: str, format: str, wanted: Block | None, block: Block) -> Block:
    """The block of a format that has no choice."""
    if wanted is not None and tuple(wanted) != block:
        raise _check.fail(op, "block", f"{block}, the one of {format} (or None)", wanted)
    return block


def divisible(op: str, format: str, name: str, size: int, by: int) -> None:
    """Refuse weights that are not made of whole blocks."""
    if size % by:
        raise _check.fail(op, "weight", f"of {name} divisible by {by}, for {format}", size)


def empty(part: Part, device: torch.device) -> Tensor:
    """Memory for a part."""
    return torch.empty(part.shape, dtype=part.dtypes[0], device=device)


def check_part(op: str, name: str, value: object, part: Part) -> None:
    """``value`` has the shape and one of the dtypes of ``part``."""
    _check.tensor(op, name, value)
    found: Tensor = value  # type: ignore[assignment]
    if found.dtype not in part.dtypes:
        raise _check.wrong_type(op, name, _check.names_of(part.dtypes), found.dtype)
    if tuple(found.shape) != part.shape:
        raise _check.fail(op, name, f"of shape {list(part.shape)}", f"shape {list(found.shape)}")


def as_block(op: str, block: Sequence[int]) -> Block:
    """``block`` is two positive integers."""
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise _check.wrong_type(op, "block", "two integers (rows, columns) or None", block)
    return _check.positive(op, "block", block[0]), _check.positive(op, "block", block[1])
