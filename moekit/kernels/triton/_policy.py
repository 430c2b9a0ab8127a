"""How grouped products are cut into tiles: pure functions of shapes, dtypes and architecture, from measurements.

None says that another way is faster, and which one the caller knows: :mod:`moekit.ops.gemm`'s for a product of matrices,
unpacking in slices for a packed one. Rows are told by their average an expert, which is all that the host knows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Blocks(NamedTuple):
    """How a product is cut: rows, columns and depth of a tile, warps, stages of its pipeline, programs a multiprocessor.

    ``turned`` computes the transpose of a tile: the weights are then the operand that comes from registers, which is where
    packed ones are made. ``flat`` makes one loop of those over tiles and over depth, so that a tile's first loads overlap
    the last products of the one before it.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int
    turned: bool = False
    flat: bool = False
    registers: int | None = None


class Shape(NamedTuple):
    """A grouped product: ``num_rows`` rows of ``depth`` by matrices ``[num_experts, depth, width]``."""

    num_rows: int
    num_experts: int
    depth: int
    width: int

    @property
    def rows_an_expert(self) -> float:
        """On average."""
        return self.num_rows / max(self.num_experts, 1)


_DESCRIBED = ("9", "10")  # what has the copy engine, and shared memory for these tiles
_HALVES = (torch.bfloat16, torch.float16)


def described(shape: Shape, dtype: torch.dtype, arch: str) -> Blocks | None:
    """Of operands that the copy engine fetches."""
    if arch not in _DESCRIBED or dtype not in _HALVES:
        return None
    if shape.depth <= 2048:
        return Blocks(128, 256, 64, 8, 3, 1, flat=True)
    return Blocks(128, 256, 64, 8, 4, 1)


def plain(dtype: torch.dtype) -> Blocks:
    """Of operands that threads fetch, on any architecture."""
    return Blocks(128, 128, 64, 4, 3, 2) if dtype in _HALVES else Blocks(64, 64, 32, 4, 2, 2)


def packed(shape: Shape, form: str, dtype: torch.dtype) -> Blocks | None:
    """Of packed weights that are unpacked in registers; None where unpacking them first is faster."""
    rows = shape.rows_an_expert
    if rows > 192:
        return None
    if dtype not in _HALVES:
        return plain(dtype)
    if rows <= 16:
        return Blocks(32, 128, 128, 4, 3, 4, turned=True)
    if rows <= 48:
        return Blocks(64, 128, 64, 4, 4, 3, turned=True)
    if form in ("nf4", "mxfp4"):
        return Blocks(128, 128, 64, 4, 3, 2, turned=True)
    return Blocks(128, 256, 64, 8, 3, 1, turned=True)


def low_rank() -> Blocks:
    """Of an update alone, which takes as long as the rows that it changes take to be read and written."""
    return Blocks(64, 256, 16, 8, 1, 2)
