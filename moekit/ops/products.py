"""What the experts are made of, products and sums of rows: plain functions, with bits for each row alone, or derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.ops import _library, gemm, grouped_linear
from moekit.ops.gathered import Gathered, together
from moekit.ops.packed_products import packed_rows
from moekit.ops.rows import sum_rows
from moekit.ops.unpack import Stored


class Products(NamedTuple):
    """:func:`~moekit.ops.gemm.grouped_rows` and what goes with it; of those that write into an ``out`` not all do.

    ``dense`` multiplies two plain matrices, ``unpermute`` is :data:`~moekit.ops.rows.sum_rows`.
    """

    rows: Callable[..., Tensor]
    outer: Callable[..., Tensor]
    add: Callable[..., Tensor]
    packed: Callable[..., Tensor]
    dense: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    unpermute: Callable[..., Tensor] = _library.plain(sum_rows)


def _rows(
    rows: Tensor | Gathered,
    matrices: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    low: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    return _add(grouped_linear.linear_op(together(rows), matrices, offsets), low, factors, offsets)


def _outer(left: Tensor | Gathered, right: Tensor | Gathered, offsets: Tensor) -> Tensor:
    return grouped_linear.outer_op(together(left), together(right), offsets)


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


def _dense(left: Tensor, right: Tensor) -> Tensor:
    """One expert has all rows."""
    whole = torch.full((1,), left.shape[0], dtype=torch.int32, device=left.device)
    return gemm.grouped_rows(left, right.unsqueeze(0), whole, invariant=True)


PLAIN = Products(gemm.grouped_rows, gemm.grouped_outer, gemm.grouped_add, packed_rows)
INVARIANT = Products(
    functools.partial(gemm.grouped_rows, invariant=True),
    gemm.grouped_outer,
    functools.partial(gemm.grouped_add, invariant=True),
    functools.partial(packed_rows, invariant=True),
    _dense,
)
DIFFERENTIABLE = Products(_rows, _outer, _add, _packed, unpermute=sum_rows)
