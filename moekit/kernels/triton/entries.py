"""Entries of a table: the tables that row movers work from, and reading and writing single entries by index."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit import _check
from moekit.kernels.triton import _launch
from moekit.kernels.triton._tiles import ends_within

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows", "num_starts", "topk"])
def _row_tables_kernel(order, row_token, starts, num_rows, num_starts, topk, BLOCK: tl.constexpr):
    """One program writes a block of both tables."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(order + place, mask=place < num_rows, other=-1)
    tl.store(row_token + place, tl.where(slot >= 0, slot // tl.maximum(topk, 1), -1), mask=place < num_rows)
    tl.store(starts + place, place * topk, mask=place < num_starts)


def row_tables(order: Tensor, num_tokens: int, topk: int) -> Any:
    """``moekit::row_tables``: the token of each row and where each token's slots begin."""
    if order.dtype is not torch.int32 or order.dim() != 1:
        return NotImplemented
    _check.in_range("Routing", "order", order, num_tokens * topk, "the number of slots")
    order = order.contiguous()
    num_rows, row_token = order.shape[0], torch.empty_like(order)
    starts = torch.empty(num_tokens + 1, dtype=torch.int32, device=order.device)
    _launch.launch(
        _row_tables_kernel, (_launch.blocks(max(num_rows, num_tokens + 1), _BLOCK),),
        order, row_token, starts, num_rows, num_tokens + 1, topk, BLOCK=_BLOCK,
    )  # fmt: skip
    return row_token, starts


@triton.jit(do_not_specialize=["num_rows", "num_starts", "topk", "num_slots", "num_experts"])
def _row_order_kernel(
    order, weights, offsets, row_token, starts, row_weights, ends,
    num_rows, num_starts, topk, num_slots, num_experts, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program writes a block of the tables, and the first one the ends."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(order + place, mask=place < num_rows, other=-1)
    tl.store(row_token + place, tl.where(slot >= 0, slot // tl.maximum(topk, 1), -1), mask=place < num_rows)
    tl.store(starts + place, place * topk, mask=place < num_starts)
    weight = tl.load(weights + slot, mask=(slot >= 0) & (slot < num_slots), other=0)
    tl.store(row_weights + place, weight, mask=place < num_rows)
    if tl.program_id(0) == 0:
        expert = tl.arange(0, BLOCK_E)
        end = ends_within(offsets, 0, num_experts, num_rows, tl.arange(0, BLOCK_E))
        tl.store(ends + expert, end.to(ends.dtype.element_ty), mask=expert < num_experts)


def row_order(order: Tensor, weights: Tensor, offsets: Tensor, num_tokens: int, topk: int) -> Any:
    """In one launch: :func:`row_tables`, each row's routing weight, and the offsets ascending within the rows."""
    known = order.dtype is torch.int32 and offsets.dtype in (torch.int32, torch.int64) and offsets.dim() == 1
    if not known or order.dim() != 1 or weights.itemsize > 8 or weights.is_complex():
        return NotImplemented
    _check.in_range("Routing", "order", order, num_tokens * topk, "the number of slots")
    order, weights, offsets = order.contiguous(), weights.contiguous(), offsets.contiguous()
    num_rows, row_token, ends = order.shape[0], torch.empty_like(order), torch.empty_like(offsets)
    starts = torch.empty(num_tokens + 1, dtype=torch.int32, device=order.device)
    row_weights = torch.empty(num_rows, dtype=weights.dtype, device=weights.device)
    _launch.launch(
        _row_order_kernel, (_launch.blocks(max(num_rows, num_tokens + 1), _BLOCK),),
        order, bits(weights), offsets, row_token, starts, bits(row_weights), ends,
        num_rows, num_tokens + 1, topk, weights.numel(), len(offsets),
        BLOCK=_BLOCK, BLOCK_E=_launch.power_of_two(len(offsets)),
    )  # fmt: skip
    return row_token, starts, row_weights, ends


@triton.jit(do_not_specialize=["length", "size"])
def _take_kernel(values, index, out, length, size, BLOCK: tl.constexpr):
    """One program reads a block of entries."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(index + i, mask=i < size, other=-1)
    tl.store(out + i, tl.load(values + place, mask=(place >= 0) & (place < length), other=0), mask=i < size)


def take(values: Tensor, index: Tensor, back: Tensor | None) -> Any:
    """``moekit::take``: ``values.flatten()[index]``, zero where the index is out of range."""
    if index.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    values, index = values.contiguous(), index.contiguous()
    out = torch.empty(index.shape, dtype=values.dtype, device=values.device)
    size = index.numel()
    grid = (_launch.blocks(size, _BLOCK),)
    _launch.launch(_take_kernel, grid, bits(values), index, bits(out), values.numel(), size, BLOCK=_BLOCK)
    return out


@triton.jit(do_not_specialize=["length", "size"])
def _put_kernel(values, index, out, length, size, BLOCK: tl.constexpr):
    """One program writes a block of entries."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(index + i, mask=i < size, other=-1)
    inside = (place >= 0) & (place < length)
    tl.store(out + place, tl.load(values + i, mask=inside, other=0), mask=inside)


def put(values: Tensor, index: Tensor, size: int) -> Any:
    """``moekit::put``: ``out[index] = values`` in zeros ``[size]``."""
    if index.dtype not in (torch.int32, torch.int64) or index.numel() != values.numel():
        return NotImplemented
    values, index = values.contiguous(), index.contiguous()
    out = torch.zeros(size, dtype=values.dtype, device=values.device)
    grid = (_launch.blocks(index.numel(), _BLOCK),)
    _launch.launch(_put_kernel, grid, bits(values), index, bits(out), size, index.numel(), BLOCK=_BLOCK)
    return out


def bits(x: Tensor) -> Tensor:
    """The same elements, as integers where kernels do not know the dtype: entries are copied, never computed with."""
    if _launch.computes(x):
        return x
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
