"""Grouped products by which a row's result has the same bits whatever other rows there are, and wherever it stands.

A library chooses tiles, and with them the order of a sum, by the number of rows. Kernels take the same for any number: on a
GPU a tile of fixed sizes, on a CPU sums that no other row takes part in. Where there is none of them (float64, the ``torch``
backend) each row is a product of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import _backend
from moekit.ops import gemm
from moekit.ops.gathered import Gathered, together
from moekit.ops.unpack import Stored, unpack


def rows_product(
    rows: Tensor | Gathered,
    matrices: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    low: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """:func:`moekit.ops.gemm.grouped_rows`."""
    gemm.check_offsets(offsets, matrices.shape[0])
    rows = together(rows)
    gemm.check_depth(rows, matrices.shape[1])
    kernel = _backend.kernel("grouped_rows", rows)
    product = NotImplemented if kernel is None else kernel(rows, matrices, offsets, out, low, factors, invariant=True)
    if product is not NotImplemented:
        return product
    if low is not None and factors is not None:
        return add(rows_product(rows, matrices, offsets, out), low, factors, offsets)
    out = rows.new_empty(rows.shape[0], matrices.shape[2]) if out is None else out
    for expert, block in gemm.blocks(offsets, rows.shape[0]):
        _row_by_row(rows[block], matrices[expert], out[block])
    return out


def packed_product(
    rows: Tensor | Gathered,
    stored: Stored,
    offsets: Tensor,
    out: Tensor | None = None,
    low: Tensor | None = None,
    factors: Tensor | None = None,
    *,
    back: bool = False,
) -> Tensor:
    """:func:`moekit.ops.packed_products.packed_rows`."""
    gemm.check_offsets(offsets, stored.shape[0])
    rows = together(rows)
    gemm.check_depth(rows, stored.shape[1 if back else 2])
    kernel = _backend.kernel("packed_rows", rows)
    product = NotImplemented if kernel is None else kernel(rows, stored, offsets, out, back, low, factors, invariant=True)
    if product is not NotImplemented:
        return product
    if low is not None and factors is not None:
        return add(packed_product(rows, stored, offsets, out, back=back), low, factors, offsets)
    out = rows.new_empty(rows.shape[0], stored.shape[2 if back else 1]) if out is None else out
    for expert, block in gemm.blocks(offsets, rows.shape[0]):
        weight = unpack(stored, expert, expert + 1, rows.dtype, None)[0]
        _row_by_row(rows[block], weight if back else weight.T, out[block])
    return out


def add(out: Tensor, low: Tensor, factors: Tensor, offsets: Tensor) -> Tensor:
    """:func:`moekit.ops.gemm.grouped_add`."""
    return out.add_(rows_product(low, factors, offsets))


def dense(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two matrices: one expert has all rows."""
    whole = torch.full((1,), left.shape[0], dtype=torch.int32, device=left.device)
    return rows_product(left, right.unsqueeze(0), whole)


def _row_by_row(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Each row from the same place in memory: what a library computes may depend on how its operands are aligned."""
    row, result = rows.new_empty(1, rows.shape[1]), out.new_empty(1, out.shape[1])
    for number in range(rows.shape[0]):
        row.copy_(rows[number])
        out[number] = torch.mm(row, matrix, out=result)[0]
