"""Deterministic sums over groups of rows, shared by the references."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """``out[i] = sum of values[r] over rows r with index[r] == i``; an index outside ``[0, size)`` is left out.

    Args:
        values: ``[N, ...]``.
        index: integers ``[N]``.
        size: number of groups.

    Returns:
        ``[size, ...]`` in the dtype of ``values``, added in row order: the same bits every run. On a GPU this takes
        the sorting ``index_put`` instead of ``index_add``, whose atomics change the order from run to run.
    """
    kept = (index >= 0) & (index < size)
    target = torch.where(kept, index, size).long()
    zeros = values.new_zeros(size + 1, *values.shape[1:])
    if values.device.type == "cpu":
        return zeros.index_add(0, target, values)[:size]
    return zeros.index_put((target,), values, accumulate=True)[:size]


def expert_of_row(offsets: Tensor, num_rows: int) -> Tensor:
    """``[num_rows]``: the group each row belongs to, from the cumulative row ends; ``len(offsets)`` past the end."""
    rows = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True)
