"""What descriptors can be made of, and such as end where the rows of an expert do.

Past these the copy engine reads zeros, and writes nothing. A descriptor has one size for all of a tensor. But addresses
wrap at 64 bits: two more dimensions whose strides cancel out let every expert's rows be counted from so far below the size
of the third that they end with it. From Triton's ``tools/ragged_tma.py``, which its interpreter cannot run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_ROWS = 2**30  # of a tensor
_ANY = 2**31 - 2**16  # the size of the dimensions that only move the address
_AROUND = 2**34  # elements, which MOST_ROWS times are all there are addresses for


def describes(x: Tensor, *, turned: bool = False) -> bool:
    """Whether a descriptor can be made of ``x``: adjacent last dimension, all else at multiples of 16 bytes.

    ``turned``: of ``x.mT``, which takes longer to make than to look at.
    """
    *steps, last = x.stride()
    if turned:
        steps[-1], last = last, steps[-1]
    if last != 1 or x.data_ptr() % 16 or not x.numel():
        return False
    unit = 16 // math.gcd(16, x.itemsize)
    return all(step > 0 and step % unit == 0 for step in steps)


def describes_ragged(x: Tensor) -> bool:
    """Whether one can be made of the rows of an expert in ``x``, wherever they begin and end."""
    return describes(x) and len(x) <= MOST_ROWS


def leaves_ragged(num_rows: int, dtype: torch.dtype, *widths: int) -> bool:
    """The same of new tensors of these widths."""
    return num_rows <= MOST_ROWS and all(width * dtype.itemsize % 16 == 0 for width in widths)


def describable(rows: Tensor, matrices: Tensor) -> bool:
    """Whether descriptors can be made of both, the matrices stored either way."""
    return describes(rows) and (describes(matrices) or describes(matrices, turned=True))


def ragged(x: Tensor, box: list[int], kind: Any = TensorDescriptor) -> Any:
    """Of ``x [R, N]``, which a plain descriptor can be made of, with at most MOST_ROWS rows."""
    step = x.stride(0)
    return kind(x, [_ANY, _ANY, MOST_ROWS, x.shape[1]], [_AROUND - step, step, step, 1], [1, 1, *box])


@triton.jit
def rows_at(row, end):
    """Where a descriptor has row ``row`` of rows that end at ``end``, but for the column."""
    size = 1 << 30  # MOST_ROWS
    return size, end, row - end + size


@triton.jit
def load_ragged(described, row, end, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of rows ``row`` onwards, of which those from ``end`` on are zeros."""
    around, until, at = rows_at(row, end)
    return tl.reshape(described.load([around, until, at, column]), (ROWS, COLUMNS))


@triton.jit
def store_ragged(described, row, end, column, block):
    """Write a block to rows ``row`` onwards, up to ``end``."""
    value = tl.reshape(block.to(described.dtype), (1, 1, block.shape[0], block.shape[1]))
    around, until, at = rows_at(row, end)
    described.store([around, until, at, column], value)


@triton.jit
def halves_of(block):
    """The left and the right half of a block."""
    halves = tl.reshape(block, (block.shape[0], 2, block.shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))
