"""The products that the experts are made of: as plain functions, or as operators with derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from moekit.ops import gemm, grouped_linear
from moekit.ops.packed_products import packed_rows
from moekit.ops.unpack import Stored


class Products(NamedTuple):
    """:func:`~moekit.ops.gemm.grouped_rows` and what goes with it; of those that write into an ``out`` not all do."""

    rows: Callable[..., Tensor]
    outer: Callable[..., Tensor]
    add: Callable[..., Tensor]
    packed: Callable[..., Tensor]


def _rows(
    rows: Tensor,
    matrices: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    low: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    return _add(grouped_linear.linear_op(rows, matrices, offsets), low, factors, offsets)


def _packed(
    rows: Tensor,
    stored: Stored,
    offsets: Tensor,
    out: Tensor | None = None,
    low: Tensor | None = None,
    factors: Tensor | None = None,
    *,
    back: bool = False,
) -> Tensor:
    product = grouped_linear.packed_linear(rows, *grouped_linear.flat(stored), offsets, back)
    return _add(product, low, factors, offsets)


def _add(out: Tensor, low: Tensor | None, factors: Tensor | None, offsets: Tensor) -> Tensor:
    if low is None or factors is None:
        return out
    return out + grouped_linear.linear_op(low, factors, offsets)


PLAIN = Products(gemm.grouped_rows, gemm.grouped_outer, gemm.grouped_add, packed_rows)
DIFFERENTIABLE = Products(_rows, grouped_linear.outer_op, _add, _packed)
