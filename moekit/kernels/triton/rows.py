"""Row movement: permute, unpermute and its gradient.

All three go token by token: a token's row of tokens (or of its gradient) is read once and used for each of its K rows, so
(T + R)*H elements move where a walk over the rows would read a token K times, K/2 as much again once tokens outgrow the
L2 cache. Rows of no token, which such a walk never meets, are zeroed by further programs of the same launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit import _backend, _check
from moekit.kernels.triton import _launch
from moekit.kernels.triton._halves import block_and_part

_ZERO_ROWS = 128


@triton.jit
def _entries_of(token, exists, token_offsets, num_entries):
    """Where a token's part of the table of rows begins and ends: within the table, whatever the offsets are."""
    first = tl.load(token_offsets + token, mask=exists, other=0)
    last = tl.load(token_offsets + token + 1, mask=exists, other=0)
    return tl.minimum(tl.maximum(first, 0), num_entries), tl.minimum(last, num_entries)


@triton.jit
def _rows_without_token(row_token, block, num_tokens, num_rows, ZERO_ROWS: tl.constexpr):
    """The rows of a block, and which of them have no token."""
    row = block * ZERO_ROWS + tl.arange(0, ZERO_ROWS)
    token = tl.load(row_token + row, mask=row < num_rows, other=0)
    return row, (row < num_rows) & ((token < 0) | (token >= num_tokens))


@triton.jit
def _zero_rows(out, row_token, block, column, num_tokens, num_rows, width, ZERO_ROWS: tl.constexpr):
    """Zero the given columns of those rows of a block that have no token."""
    _, none = _rows_without_token(row_token, block, num_tokens, num_rows, ZERO_ROWS)
    if tl.max(none.to(tl.int32), axis=0) > 0:
        # Row by row: a tile of rows would take the registers that the launch's other programs need.
        first = block * ZERO_ROWS
        for i in range(0, tl.minimum(ZERO_ROWS, num_rows - first)):
            row = first + i
            token = tl.load(row_token + row)
            if (token < 0) | (token >= num_tokens):
                zeros = tl.zeros([column.shape[0]], out.dtype.element_ty)
                tl.store(out + row.to(tl.int64) * width + column, zeros, mask=column < width)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_entries", "token_blocks"])
def _permute_kernel(
    tokens, row_token, token_offsets, token_rows, out,
    num_tokens, num_rows, num_entries, token_blocks, parts, width, stride,
    MULTIPLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ZERO_ROWS: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_T tokens' columns once and writes them to the tokens' rows, BLOCK_K of each at a time."""
    if MULTIPLE > 1:
        width, stride = tl.multiple_of(width, MULTIPLE), tl.multiple_of(stride, MULTIPLE)
    block, part = block_and_part(parts)
    column = part * BLOCK_C + tl.arange(0, BLOCK_C)
    if block < token_blocks:
        token = block * BLOCK_T + tl.arange(0, BLOCK_T)
        exists = token < num_tokens
        first, last = _entries_of(token, exists, token_offsets, num_entries)
        mask = exists[:, None] & (column < width)[None, :]
        x = tl.load(tokens + token.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0)
        for k in range(0, tl.max(last - first, axis=0), BLOCK_K):
            # All rows at once: a store may change what is loaded after it, so that nothing of a loop would overlap.
            slot = first[:, None] + k + tl.arange(0, BLOCK_K)[None, :]
            row = tl.load(token_rows + slot, mask=slot < last[:, None], other=-1)
            found = (row >= 0) & (row < num_rows)
            address = out + row.to(tl.int64)[:, :, None] * width + column[None, None, :]
            value = tl.broadcast_to(x[:, None, :], (BLOCK_T, BLOCK_K, BLOCK_C))
            # Past the cache: what is written is K times what is read.
            tl.store(address, value, mask=found[:, :, None] & (column < width)[None, None, :], cache_modifier=".cs")
    else:
        _zero_rows(out, row_token, block - token_blocks, column, num_tokens, num_rows, width, ZERO_ROWS)


def _are_tables(op: str, *tables: Any) -> bool:
    """Whether tables have the dtypes and sizes for so many tokens and rows; the reference takes or refuses what has not.

    Where values may be looked at, tables that do not say the same are refused here.
    """
    row_token, token_offsets, token_rows, num_tokens, num_rows = tables
    integers = row_token.dtype in (torch.int32, torch.int64) and token_offsets.dtype is token_rows.dtype is torch.int32
    if not integers or num_tokens < 0 or token_rows.dim() != 1:
        return False
    if row_token.shape != (num_rows,) or token_offsets.shape != (num_tokens + 1,):
        return False
    if _backend.checks_values(row_token):
        _check.row_tables(op, row_token, token_offsets, token_rows, num_tokens)
    return True


def permute(tokens: Tensor, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Any:
    """``moekit::permute``, for any dtype: rows travel as integers."""
    num_tokens, num_rows = tokens.shape[0], row_token.shape[0]
    if not _are_tables("permute", row_token, token_offsets, token_rows, num_tokens, num_rows):
        return NotImplemented
    out = torch.empty(num_rows, tokens.shape[1], dtype=tokens.dtype, device=tokens.device)
    if out.numel() == 0:
        return out
    source, target = _launch.words(tokens, out)
    width = target.shape[1]
    config = _launch.tile("permute", tokens.device)
    block_t, block_c = _launch.shape_tile(target.device, width, config)
    token_blocks, parts = _launch.blocks(num_tokens, block_t), _launch.blocks(width, block_c)
    _launch.launch(
        _permute_kernel,
        ((token_blocks + _launch.blocks(num_rows, _ZERO_ROWS)) * parts,),
        source, row_token.contiguous(), token_offsets.contiguous(), token_rows.contiguous(), target,
        num_tokens, num_rows, token_rows.shape[0], token_blocks, parts, width, source.stride(0),
        MULTIPLE=_launch.multiple(width, source.stride(0)),
        BLOCK_T=block_t, BLOCK_K=_rows_at_once(num_tokens, token_rows.shape[0]), BLOCK_C=block_c,
        ZERO_ROWS=_ZERO_ROWS, config=config,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_entries"])
def _unpermute_kernel(
    rows, weights, token_offsets, token_rows, out, num_tokens, num_rows, num_entries, parts, width, stride,
    BY_SLOT: tl.constexpr, MULTIPLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One program sums the rows of BLOCK_T tokens in BLOCK_C columns, in the order of the table."""
    if MULTIPLE > 1:
        width, stride = tl.multiple_of(width, MULTIPLE), tl.multiple_of(stride, MULTIPLE)
    block, part = block_and_part(parts)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = part * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = token < num_tokens
    first, last = _entries_of(token, exists, token_offsets, num_entries)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in range(0, tl.max(last - first, axis=0), UNROLL):
        for j in tl.static_range(UNROLL):  # independent loads, so that all of them are in flight at once
            row = tl.load(token_rows + first + k + j, mask=first + k + j < last, other=-1)
            found = (row >= 0) & (row < num_rows)
            address = rows + row.to(tl.int64)[:, None] * stride + column[None, :]
            x = tl.load(address, mask=found[:, None] & (column < width)[None, :], other=0).to(tl.float32)
            if weights is not None:
                # By slot it need not wait for the row.
                place, mask = (first + k + j, first + k + j < last) if BY_SLOT else (row, found)
                weight = tl.load(weights + place, mask=mask, other=0).to(tl.float32)
                x *= tl.where(found, weight, 0.0)[:, None]
            total += x
    address = out + token.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(address, total, mask=exists[:, None] & (column < width)[None, :])


def unpermute(rows: Tensor, weights: Tensor | None, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Any:
    """``moekit::unpermute``."""
    if not _launch.computes(rows, weights):
        return NotImplemented
    rows = _launch.rows_of(rows)
    num_tokens, (num_rows, width) = token_offsets.shape[0] - 1, rows.shape
    fits = _are_tables("unpermute", row_token, token_offsets, token_rows, num_tokens, num_rows)
    if not fits or not _weighs(weights, row_token, token_rows):
        return NotImplemented
    out = torch.empty(num_tokens, width, dtype=rows.dtype, device=rows.device)
    at_once = _rows_at_once(num_tokens, token_rows.shape[0])
    config, multiple = _launch.tile("unpermute", rows.device, rows.dtype), _launch.multiple(width, rows.stride(0))
    if at_once < 8 and multiple == 16:  # as many loads in flight
        config = config._replace(elements=2 * config.elements)
    block_t, block_c = _launch.shape_tile(rows.device, width, config)
    parts = _launch.blocks(width, block_c)
    _launch.launch(
        _unpermute_kernel, (_launch.blocks(num_tokens, block_t) * parts,),
        rows, _launch.dense(weights), token_offsets.contiguous(), token_rows.contiguous(), out,
        num_tokens, num_rows, token_rows.shape[0], parts, width, rows.stride(0),
        BY_SLOT=weights is not None and weights.dim() == 2,
        MULTIPLE=multiple, BLOCK_T=block_t, BLOCK_C=block_c,
        UNROLL=at_once, config=config,
    )  # fmt: skip
    return out


def _weighs(weights: Tensor | None, row_token: Tensor, token_rows: Tensor) -> bool:
    """Whether there are as many weights as rows, or as slots."""
    return weights is None or weights.numel() == (row_token if weights.dim() == 1 else token_rows).shape[0]


def _rows_at_once(num_tokens: int, entries: int) -> int:
    """A token's rows on average, as a power of two up to 8."""
    return min(_launch.power_of_two(_launch.blocks(entries, max(num_tokens, 1))), 8)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_entries"])
def _unpermute_backward_kernel(
    grad, rows, weights, row_token, token_offsets, token_rows, drows, dweights,
    num_tokens, num_rows, num_entries, width, grad_stride, stride,
    BY_SLOT: tl.constexpr, MULTIPLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ZERO_ROWS: tl.constexpr,
):  # fmt: skip
    """One program takes one token: its gradient row against BLOCK_K of its rows at a time."""
    if MULTIPLE > 1:
        width, stride = tl.multiple_of(width, MULTIPLE), tl.multiple_of(stride, MULTIPLE)
        grad_stride = tl.multiple_of(grad_stride, MULTIPLE)
    token = tl.program_id(0)
    if token < num_tokens:
        first, last = _entries_of(token, True, token_offsets, num_entries)
        for k in range(first, last, BLOCK_K):
            slot = k + tl.arange(0, BLOCK_K)
            row = tl.load(token_rows + slot, mask=slot < last, other=-1)
            found = (row >= 0) & (row < num_rows)
            place = slot if BY_SLOT else row
            weight = tl.load(weights + place, mask=found, other=0).to(tl.float32)
            terms = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
            for start in range(0, width, BLOCK_C):
                column = (start + tl.arange(0, BLOCK_C))[None, :]
                mask = found[:, None] & (column < width)
                # As a tile, so that each thread has what it multiplies: all but one row's copies come from the L1 cache.
                across = tl.zeros([BLOCK_K, 1], tl.int32) + column
                g = tl.load(grad + token.to(tl.int64) * grad_stride + across, mask=mask, other=0).to(tl.float32)
                if dweights is not None:
                    x = tl.load(rows + row.to(tl.int64)[:, None] * stride + column, mask=mask, other=0)
                    terms += g * x.to(tl.float32)
                if drows is not None:
                    tl.store(drows + row.to(tl.int64)[:, None] * width + column, g * weight[:, None], mask=mask)
            if dweights is not None:
                # A slot of no row has no gradient, but an entry.
                tl.store(dweights + place, tl.sum(terms, axis=1), mask=(slot < last) if BY_SLOT else found)
    else:
        if drows is not None:
            for start in range(0, width, BLOCK_C):
                column = start + tl.arange(0, BLOCK_C)
                _zero_rows(drows, row_token, token - num_tokens, column, num_tokens, num_rows, width, ZERO_ROWS)
        if dweights is not None and not BY_SLOT:
            row, none = _rows_without_token(row_token, token - num_tokens, num_tokens, num_rows, ZERO_ROWS)
            tl.store(dweights + row, tl.zeros([ZERO_ROWS], tl.float32), mask=none)


def unpermute_backward(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor,
    row_token: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    wanted: list[bool],
) -> Any:
    """``moekit::unpermute_backward``: ``(drows, dweights)``, empty where not wanted."""
    if not _launch.computes(grad, rows, weights):
        return NotImplemented
    shape = (token_offsets.shape[0] - 1, rows.shape[1])
    fits = _are_tables("unpermute", row_token, token_offsets, token_rows, shape[0], rows.shape[0])
    if not fits or grad.shape != shape or not _weighs(weights, row_token, token_rows):
        return NotImplemented
    drows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if wanted[0] else None
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=rows.device) if wanted[1] else None
    grad, rows = _launch.rows_of(grad), _launch.rows_of(rows)
    num_tokens, (num_rows, width) = grad.shape[0], rows.shape
    config = _launch.tile("unpermute_backward", rows.device, rows.dtype)
    if rows.dtype is torch.float32:  # with no limit the assembler of Triton 3.6 spills to stay at 32
        config = config._replace(registers=96)
    most = _rows_at_once(num_tokens, token_rows.shape[0])
    block_k, block_c = _launch.shape_tile(rows.device, width, config, min_rows=most)
    # A row that fills fewer threads takes fewer, so that each still reads 16 bytes at a time.
    full = min(block_k, most) * block_c // (config.elements * _launch.arch(rows.device).warp_size)
    config = config._replace(warps=max(min(config.warps, full), 1))
    _launch.launch(
        _unpermute_backward_kernel,
        (num_tokens + _launch.blocks(num_rows, _ZERO_ROWS),),
        grad, rows, weights.contiguous(), row_token.contiguous(), token_offsets.contiguous(), token_rows.contiguous(),
        drows, dweights,
        num_tokens, num_rows, token_rows.shape[0], width, grad.stride(0), rows.stride(0),
        BY_SLOT=weights.dim() == 2, MULTIPLE=_launch.multiple(width, grad.stride(0), rows.stride(0)),
        BLOCK_K=min(block_k, most), BLOCK_C=block_c, ZERO_ROWS=_ZERO_ROWS, config=config,
    )  # fmt: skip
    return tuple(grad.new_empty(0) if t is None else t for t in (drows, dweights))
