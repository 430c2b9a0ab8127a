"""Launcher of the products of few rows an expert: ``grouped_rows``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from moekit.kernels.numba import _gemm_kernels as kernels
from moekit.kernels.numba._bits import HARDWARE_F16
from moekit.kernels.numba._elements import E4M3, F16, KINDS, SIZES
from moekit.kernels.numba._launch import Nonsense, dense
from moekit.kernels.numba._threads import run

# Up to here reading an expert's matrix takes longer than multiplying it, beyond PyTorch's products are faster.
_FEW = 4
_COLUMNS = 64  # whole cache lines in every dtype


def grouped_rows(
    rows: Tensor,
    matrices: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    low: Tensor | None = None,
    factors: Tensor | None = None,
) -> Any:
    """See :func:`moekit.ops.gemm.grouped_rows`, to which are left: many rows an expert, updates, no dense side."""
    if low is not None or factors is not None:
        return NotImplemented
    element = KINDS.get(rows.dtype, E4M3)
    num_experts, width, features = matrices.shape
    if element == E4M3 or (element == F16 and not HARDWARE_F16) or matrices.dtype is not rows.dtype:
        return NotImplemented
    if offsets.dtype is not torch.int32 or offsets.shape != (num_experts,) or rows.shape[1] != width:
        return NotImplemented
    by_feature = matrices.stride(1) == 1
    if not (by_feature or matrices.stride(2) == 1) or (out is not None and out.stride(1) != 1) or not _few(rows, offsets):
        return NotImplemented
    out = torch.empty((rows.shape[0], features), dtype=rows.dtype) if out is None else out
    offsets, rows, size = dense(offsets), rows if rows.stride(1) == 1 else rows.contiguous(), SIZES[element]
    if by_feature:
        kernel, step, block = kernels.by_feature_kernel(element), matrices.stride(2), kernels.FEATURES
    else:
        # As wide a part of each row of the matrix as can be: short pieces a page apart are slower to read.
        kernel, step = kernels.by_input_kernel(element), matrices.stride(1)
        block = -(-features // (get_num_threads() * _COLUMNS)) * _COLUMNS
    try:
        run(
            kernel, features, min(rows.shape[0], num_experts) * width * features * size,
            rows.shape[0], rows.data_ptr(), rows.stride(0) * size,
            matrices.data_ptr(), matrices.stride(0) * size, step * size, offsets.data_ptr(), num_experts,
            out.data_ptr(), out.stride(0) * size, width, block=block,
        )  # fmt: skip
    except Nonsense:
        return NotImplemented
    return out


def _few(rows: Tensor, offsets: Tensor) -> bool:
    """Whether the experts that have rows have few of them, on average; so few in all need no look at the offsets."""
    if rows.shape[0] <= 4 * _FEW:
        return True
    ends = [0, *offsets.tolist()]
    active = len(set(ends)) - 1  # an expert without rows ends where the one before it does
    return ends[-1] <= _FEW * active
