"""Launcher of the products of few rows an expert: ``grouped_rows``; and what those with packed matrices share with it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, get_num_threads

from moekit.kernels.numba import _gemm_kernels as kernels
from moekit.kernels.numba._bits import HARDWARE_F16
from moekit.kernels.numba._elements import E4M3, F16, KINDS, NONE, SIZES
from moekit.kernels.numba._launch import Nonsense, dense
from moekit.kernels.numba._threads import run
from moekit.kernels.numba._units import DENSE

# Up to here reading an expert's matrix takes longer than multiplying it, beyond PyTorch's products are faster.
_FEW = 4
_COLUMNS = 64  # whole cache lines in every dtype, and whole blocks in every format


class Stack(NamedTuple):
    """The matrices of the experts as kernels see them, distances in bytes."""

    matrices: int
    expert_step: int
    row_step: int
    format: int = DENSE
    scales: int = 0
    height: int = 0


def element_of(dtype: torch.dtype) -> int:
    """The kind of elements that are computed with; NONE for what is left to the reference."""
    element = KINDS.get(dtype, NONE)
    return NONE if element == E4M3 or (element == F16 and not HARDWARE_F16) else element


def grouped_rows(
    rows: Tensor,
    matrices: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    low: Tensor | None = None,
    factors: Tensor | None = None,
    invariant: bool = False,
) -> Any:
    """See :func:`moekit.ops.gemm.grouped_rows`, to which are left: many rows an expert, updates, no dense side.

    A row's sums are its own, so many rows are not left if they are to have the bits that few have (``invariant``).
    """
    if low is not None or factors is not None:
        return NotImplemented
    element = element_of(rows.dtype)
    num_experts, width, features = matrices.shape
    if element == NONE or matrices.dtype is not rows.dtype:
        return NotImplemented
    if not fits(rows, offsets, out, num_experts, width) or not (invariant or few(rows, offsets, _FEW)):
        return NotImplemented
    expert_step, input_step, feature_step = (step * SIZES[element] for step in matrices.stride())
    if input_step == SIZES[element]:
        return multiply(rows, Stack(matrices.data_ptr(), expert_step, feature_step), offsets, out, features, back=False)
    if feature_step == SIZES[element]:
        return multiply(rows, Stack(matrices.data_ptr(), expert_step, input_step), offsets, out, features, back=True)
    return NotImplemented


def fits(rows: Tensor, offsets: Tensor, out: Tensor | None, num_experts: int, width: int) -> bool:
    """Whether kernels take these: ``[R, width]``, ``[num_experts]`` int32, and a dense ``out``."""
    if offsets.dtype is not torch.int32 or offsets.shape != (num_experts,) or rows.shape[1] != width:
        return False
    return out is None or out.stride(1) == 1


def few(rows: Tensor, offsets: Tensor, limit: int) -> bool:
    """Whether the experts that have rows have few of them, on average; so few in all need no look at the offsets."""
    if rows.shape[0] <= 4 * limit:
        return True
    ends = [0, *offsets.tolist()]
    active = len(set(ends)) - 1  # an expert without rows ends where the one before it does
    return ends[-1] <= limit * active


def multiply(rows: Tensor, stack: Stack, offsets: Tensor, out: Tensor | None, features: int, back: bool) -> Any:
    """Each expert's rows times its matrix, of which a row is an output feature, or with ``back`` an input."""
    element, (num_rows, width), num_experts = KINDS[rows.dtype], rows.shape, offsets.shape[0]
    out = torch.empty((num_rows, features), dtype=rows.dtype) if out is None else out
    offsets, rows, size = dense(offsets), rows if rows.stride(1) == 1 else rows.contiguous(), SIZES[element]
    if back:
        # As wide a part of each row of the matrix as can be: short pieces a page apart are slower to read.
        kernel, block = kernels.by_input_kernel, -(-features // (get_num_threads() * _COLUMNS)) * _COLUMNS
    else:
        kernel, block = kernels.by_feature_kernel, kernels.FEATURES
    try:
        run(
            kernel(element, stack.format), features,
            min(num_rows, num_experts) * (width if back else features) * stack.row_step,
            num_rows, rows.data_ptr(), rows.stride(0) * size,
            stack.matrices, stack.expert_step, stack.row_step, stack.scales, stack.height,
            offsets.data_ptr(), num_experts, out.data_ptr(), out.stride(0) * size, width, block=block,
        )  # fmt: skip
    except Nonsense:
        return NotImplemented
    return out
