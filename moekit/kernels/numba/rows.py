"""Launchers of the row movement: ``permute``, ``unpermute``, ``unpermute_backward``."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from moekit.kernels.numba import _row_kernels
from moekit.kernels.numba._elements import E4M3, KINDS, SIZES
from moekit.kernels.numba._launch import address, dense, streams
from moekit.kernels.numba._threads import run
from moekit.kernels.numba.tables import put, take


def _tables(row_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """The tables as the kernels take them, and whether ``row_token`` is int64."""
    return (
        dense(row_token),
        dense(token_offsets, torch.int32),
        dense(token_rows, torch.int32),
        row_token.dtype is torch.int64,
    )


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
    out = torch.empty((num_rows, width), dtype=tokens.dtype)
    if num_tokens == 0 or out.numel() == 0:
        return out.zero_()
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    row_token, token_offsets, token_rows, wide = _tables(row_token, token_offsets, token_rows)
    size = width * tokens.element_size()
    run(
        _row_kernels.permute_kernel(wide), num_tokens, num_tokens * size + out.nbytes,
        tokens.data_ptr(), tokens.stride(0) * tokens.element_size(),
        row_token.data_ptr(), token_offsets.data_ptr(), token_rows.data_ptr(),
        out.data_ptr(), num_tokens, num_rows, size, streams(out, size),
    )  # fmt: skip
    return out


def unpermute(rows: Tensor, weights: Tensor | None, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Any:
    """``rows [S, H]`` to ``[T, H]``: each token's rows, times their weights, added in float32."""
    element = KINDS.get(rows.dtype, E4M3)
    if element == E4M3 or (weights is not None and weights.dtype is torch.float64):
        return NotImplemented
    num_tokens, (num_rows, width) = token_offsets.shape[0] - 1, rows.shape
    out = torch.empty((num_tokens, width), dtype=rows.dtype)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    weights = _by_row(weights, token_rows, num_rows)
    _, token_offsets, token_rows, _ = _tables(row_token, token_offsets, token_rows)
    size = SIZES[element]
    run(
        _row_kernels.unpermute_kernel(element), num_tokens, rows.nbytes + out.nbytes,
        rows.data_ptr(), rows.stride(0) * size, address(weights), token_offsets.data_ptr(), token_rows.data_ptr(),
        out.data_ptr(), num_rows, width, streams(out, width * size),
    )  # fmt: skip
    return out


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
    drows = torch.empty(rows.shape, dtype=rows.dtype) if want_rows else torch.empty(0, dtype=grad.dtype)
    dweights = torch.empty(num_rows) if want_weights else torch.empty(0, dtype=grad.dtype)
    if num_tokens == 0:
        return drows.zero_(), torch.zeros_like(weights) if want_weights else dweights
    grad, rows, scaled = dense(grad), dense(rows), _by_row(weights, token_rows, num_rows)
    row_token, token_offsets, token_rows, wide = _tables(row_token, token_offsets, token_rows)
    kernel = _row_kernels.unpermute_backward_kernel(element, grad_element, wide, bool(want_rows), bool(want_weights))
    run(
        kernel, num_tokens, grad.nbytes + drows.nbytes + (rows.nbytes if want_weights else 0),
        grad.data_ptr(), rows.data_ptr(), scaled.data_ptr(),
        row_token.data_ptr(), token_offsets.data_ptr(), token_rows.data_ptr(),
        drows.data_ptr(), dweights.data_ptr(), num_tokens, num_rows, width, streams(drows, width * SIZES[element]),
    )  # fmt: skip
    if want_weights and weights.dim() == 2:
        dweights = take(dweights, token_rows.view_as(weights), None)
    return drows, dweights.to(weights.dtype) if want_weights else dweights
