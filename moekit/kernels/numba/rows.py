"""Launchers of the row movement: ``permute``, ``unpermute``, ``unpermute_backward``."""

from __future__ import annotations

from ctypes import addressof, c_int64
from typing import Any, overload

import torch
from torch import Tensor

from moekit.kernels.numba import _row_kernels
from moekit.kernels.numba._elements import E4M3, KINDS, SIZES
from moekit.kernels.numba._launch import address, dense, streams
from moekit.kernels.numba._threads import run
from moekit.kernels.numba.tables import put, take


def _tables(
    row_token: Tensor, token_offsets: Tensor, token_rows: Tensor, num_tokens: int, num_rows: int
) -> tuple[tuple, tuple, c_int64] | None:
    """The tables as the kernels take them, what has to live as long, and where these leave how the tables differ.

    None for those that only the reference takes, or refuses: of other dtypes or sizes.
    """
    wide = row_token.dtype is torch.int64
    if not (wide or row_token.dtype is torch.int32) or not token_offsets.dtype is token_rows.dtype is torch.int32:
        return None
    if row_token.shape != (num_rows,) or token_offsets.shape != (num_tokens + 1,) or token_rows.dim() != 1:
        return None
    tables = rows, offsets, found = row_token.contiguous(), token_offsets.contiguous(), token_rows.contiguous()
    return (rows.data_ptr(), wide, offsets.data_ptr(), found.data_ptr(), found.numel()), tables, c_int64()


@overload
def _by_row(weights: Tensor, token_rows: Tensor, num_rows: int) -> Tensor: ...
@overload
def _by_row(weights: None, token_rows: Tensor, num_rows: int) -> None: ...
def _by_row(weights: Tensor | None, token_rows: Tensor, num_rows: int) -> Tensor | None:
    """Weights in float32 and in row order, which those by slot ``[T, K]`` are not."""
    if weights is not None and weights.dim() == 2:
        weights = put(weights, token_rows, num_rows)
    return dense(weights, torch.float32)


def permute(tokens: Tensor, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Any:
    """``tokens [T, H]`` of any dtype to ``[S, H]``; zero rows where there is no token."""
    num_tokens, width = tokens.shape
    num_rows = row_token.shape[0]
    tables = _tables(row_token, token_offsets, token_rows, num_tokens, num_rows)
    if tables is None or num_tokens < 1 or num_rows * width == 0:
        return NotImplemented
    arguments, _, difference = tables
    out = torch.empty((num_rows, width), dtype=tokens.dtype)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    size = width * tokens.element_size()
    run(
        _row_kernels.permute_kernel(), num_tokens, num_tokens * size + out.nbytes,
        tokens.data_ptr(), tokens.stride(0) * tokens.element_size(), *arguments,
        out.data_ptr(), num_tokens, num_rows, size, streams(out, size), addressof(difference),
    )  # fmt: skip
    return NotImplemented if difference.value else out


def unpermute(rows: Tensor, weights: Tensor | None, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Any:
    """``rows [S, H]`` to ``[T, H]``: each token's rows, times their weights, added in float32."""
    element = KINDS.get(rows.dtype, E4M3)
    if element == E4M3 or (weights is not None and weights.dtype is torch.float64):
        return NotImplemented
    num_tokens, (num_rows, width) = token_offsets.shape[0] - 1, rows.shape
    tables = _tables(row_token, token_offsets, token_rows, num_tokens, num_rows)
    if tables is None or num_tokens < 1 or not _weighs(weights, token_rows, num_rows):
        return NotImplemented
    arguments, _, difference = tables
    out = torch.empty((num_tokens, width), dtype=rows.dtype)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    weights = _by_row(weights, token_rows, num_rows)
    size = SIZES[element]
    run(
        _row_kernels.unpermute_kernel(element), num_tokens, rows.nbytes + out.nbytes,
        rows.data_ptr(), rows.stride(0) * size, address(weights), *arguments,
        out.data_ptr(), num_tokens, num_rows, width, streams(out, width * size), addressof(difference),
    )  # fmt: skip
    return NotImplemented if difference.value else out


def _weighs(weights: Tensor | None, token_rows: Tensor, num_rows: int) -> bool:
    """Whether there are as many weights as rows, or as slots."""
    if weights is None:
        return True
    return weights.numel() == (num_rows if weights.dim() == 1 else token_rows.numel())


def unpermute_backward(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor,
    row_token: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    wanted: list[bool],
) -> Any:
    """``(drows [S, H], dweights)`` of the weighted unpermute; those that ``wanted`` leaves out are empty."""
    element, grad_element = KINDS.get(rows.dtype, E4M3), KINDS.get(grad.dtype, E4M3)
    if E4M3 in (element, grad_element) or weights.dtype is torch.float64:
        return NotImplemented
    want_rows, want_weights = wanted
    num_tokens, (num_rows, width) = token_offsets.shape[0] - 1, rows.shape
    tables = _tables(row_token, token_offsets, token_rows, num_tokens, num_rows)
    fits = grad.shape == (num_tokens, width) and _weighs(weights, token_rows, num_rows)
    if tables is None or num_tokens < 1 or not fits:
        return NotImplemented
    arguments, _, difference = tables
    drows = torch.empty(rows.shape, dtype=rows.dtype) if want_rows else torch.empty(0, dtype=grad.dtype)
    dweights = torch.empty(num_rows, dtype=torch.float32) if want_weights else torch.empty(0, dtype=grad.dtype)
    grad, rows, scaled = dense(grad), dense(rows), _by_row(weights, token_rows, num_rows)
    kernel = _row_kernels.unpermute_backward_kernel(element, grad_element, bool(want_rows), bool(want_weights))
    run(
        kernel, num_tokens, grad.nbytes + drows.nbytes + (rows.nbytes if want_weights else 0),
        grad.data_ptr(), rows.data_ptr(), scaled.data_ptr(), *arguments,
        drows.data_ptr(), dweights.data_ptr(), num_tokens, num_rows, width, streams(drows, width * SIZES[element]),
        addressof(difference),
    )  # fmt: skip
    if difference.value:
        return NotImplemented
    if want_weights and weights.dim() == 2:
        dweights = take(dweights, token_rows.view_as(weights), None)
    return drows, dweights.to(weights.dtype) if want_weights else dweights
