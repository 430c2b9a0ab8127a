"""Routing tables from indices: counting sorts, chunks, padding. Sizes come from shapes, so nothing waits for the GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit import _check
from moekit.kernels.triton import _launch
from moekit.kernels.triton._counting import (
    OF_KEYS,
    chunking,
    count_bins,
    counts_before,
    fill,
    keys_tile,
    sort_tile,
    store_ends,
)
from moekit.kernels.triton.entries import bits

_DIGIT_BITS = 8
_INDICES = (torch.int32, torch.int64)


@triton.jit
def _load_bins(keys, place, num_keys, limit, shift, num_bins, DIGITS: tl.constexpr):
    """The keys at ``place`` and the bins they fall into, -1 for none.

    A key outside ``[0, limit)`` names no bin, or, where bins are digits of keys to sort, counts as ``limit``: it comes last.
    """
    key = tl.load(keys + place, mask=place < num_keys, other=-1)
    valid = (key >= 0) & (key < limit)
    if DIGITS:
        key = tl.where(valid, key, limit).to(tl.int32)
        bin = tl.where(place < num_keys, (key >> shift) & (num_bins - 1), -1)
    else:
        key = tl.where(valid, key, -1).to(tl.int32)
        bin = key
    return key, bin


@triton.jit(do_not_specialize=["num_keys", "chunk", "limit", "num_bins", "shift"])
def _count_kernel(
    keys, histogram, num_keys, chunk, limit, num_bins, shift,
    DIGITS: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program counts the bins of one chunk of keys."""
    block = tl.program_id(0)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(block * chunk, tl.minimum(block * chunk + chunk, num_keys), TILE):
        _, bin = _load_bins(keys, start + tl.arange(0, TILE), num_keys, limit, shift, num_bins, DIGITS)
        counts += count_bins(bin, BLOCK_E)
    place = tl.arange(0, BLOCK_E)
    tl.store(histogram + block * num_bins + place, counts, mask=place < num_bins)


@triton.jit
def _rows_of_tile(bin, base, BLOCK_E: tl.constexpr):
    """A tile's entries by bin: the row of each, if a bin's next row is in ``base``; the entry, its bin, the bins' counts."""
    counts = count_bins(bin, BLOCK_E)
    first = base - tl.cumsum(counts, axis=0) + counts
    entry, sorted_bin = sort_tile(bin, BLOCK_E)
    row = tl.gather(first, tl.minimum(sorted_bin, BLOCK_E - 1), 0) + tl.arange(0, bin.shape[0])
    return row, entry, sorted_bin, counts


@triton.jit(do_not_specialize=["num_slots", "chunk", "num_blocks", "num_experts", "topk"])
def _place_slots_kernel(
    indices, histogram, counts, order, weights, row_token, row_weights, starts, offsets, inverse,
    num_slots, chunk, num_blocks, num_experts, topk, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program gives the slots of one chunk their rows. Without a histogram there is one tile of them, counted here.

    Of each row it writes the slot (``order``) or, with ``weights``, what row movers take: its token and its weight.
    """
    block = tl.program_id(0)
    if histogram is None:
        _, expert = _load_bins(indices, tl.arange(0, TILE), num_slots, num_experts, 0, num_experts, False)
        total = count_bins(expert, BLOCK_E)
        before = tl.zeros([BLOCK_E], tl.int32)
    else:
        total, before = counts_before(histogram, block, num_blocks, num_experts, BLOCK_E)
    if block == 0:
        store_ends(total, counts, offsets, num_experts, BLOCK_E)
        if weights is not None:
            tl.store(starts + num_slots // topk, num_slots)
    base = tl.cumsum(total, axis=0) - total + before
    for start in range(block * chunk, tl.minimum(block * chunk + chunk, num_slots), TILE):
        place = start + tl.arange(0, TILE)
        expert, _ = _load_bins(indices, place, num_slots, num_experts, 0, num_experts, False)
        row, entry, expert, found = _rows_of_tile(expert, base, BLOCK_E)
        slot, routed = start + entry, expert < num_experts
        tl.store(inverse + slot, tl.where(routed, row, -1), mask=slot < num_slots)
        if weights is None:
            tl.store(order + row, slot, mask=routed)
        else:
            tl.store(starts + place // topk, place, mask=(place % topk == 0) & (place < num_slots))
            tl.store(row_token + row, slot // topk, mask=routed)
            tl.store(row_weights + row, tl.load(weights + slot, mask=routed), mask=routed)
        base += found
    rest = tl.sum(total, axis=0)
    if weights is None:
        fill(order, rest, num_slots, -1, block, num_blocks)
    else:
        fill(row_token, rest, num_slots, -1, block, num_blocks)
        fill(row_weights, rest, num_slots, 0, block, num_blocks)


def _place_slots(
    indices: Tensor, num_experts: int, counts: Tensor | None, order: Tensor | None, *choice: Tensor | None, topk: int = 1
) -> tuple[Tensor, Tensor]:
    """``(offsets, inverse)``, and the rest into what is given; ``choice``: weights and what is written with them."""
    _check.route_indices(indices, num_experts)
    flat, device, slots = indices.contiguous(), indices.device, indices.numel()
    offsets = torch.empty(num_experts, dtype=torch.int32, device=device)
    inverse = torch.empty(indices.shape, dtype=torch.int32, device=device)
    tiles = keys_tile(slots, num_experts)
    chunk, num_blocks = chunking(slots, tiles["TILE"])
    histogram = None
    if slots > tiles["TILE"]:
        histogram = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=device)
        _launch.launch(
            _count_kernel, (num_blocks,), flat, histogram, slots, chunk, num_experts, num_experts, 0,
            DIGITS=False, config=OF_KEYS, **tiles,
        )  # fmt: skip
    _launch.launch(
        _place_slots_kernel, (num_blocks,), flat, histogram, counts, order, *choice, offsets, inverse,
        slots, chunk, num_blocks, num_experts, topk, config=OF_KEYS, **tiles,
    )  # fmt: skip
    return offsets, inverse


def route_indices(indices: Tensor, num_experts: int) -> Any:
    """``moekit::route_indices``: counts, offsets, order, inverse."""
    if indices.dtype not in _INDICES:
        return NotImplemented
    counts = torch.empty(num_experts, dtype=torch.int64, device=indices.device)
    order = torch.empty(indices.numel(), dtype=torch.int32, device=indices.device)
    offsets, inverse = _place_slots(indices, num_experts, counts, order, None, None, None, None)
    return counts, offsets, order, inverse


def choice_rows(indices: Tensor, weights: Tensor, num_experts: int) -> Any:
    """Of a router's choice ``[T, K]``, without the tables that nobody takes here: see :meth:`moekit.ops.experts_parts.Rows`.

    Each row's token, where each token's slots begin, each row's weight, offsets, inverse.
    """
    slots, device = indices.numel(), indices.device
    if indices.dtype not in _INDICES or not slots or weights.itemsize > 8 or weights.is_complex():
        return NotImplemented
    num_tokens, topk = indices.shape
    weights, row_token = weights.contiguous(), torch.empty(slots, dtype=torch.int32, device=device)
    row_weights = torch.empty(slots, dtype=weights.dtype, device=device)
    starts = torch.empty(num_tokens + 1, dtype=torch.int32, device=device)
    choice = (bits(weights), row_token, bits(row_weights), starts)
    offsets, inverse = _place_slots(indices, num_experts, None, None, *choice, topk=topk)
    return row_token, starts, row_weights, offsets, inverse


# --- the inverse of a table: a radix sort of rows by token -------------------------------------------------------------


@triton.jit(do_not_specialize=["num_keys", "chunk", "num_blocks", "limit", "num_bins", "shift"])
def _place_digits_kernel(
    keys, rows, histogram, sorted_keys, sorted_rows, num_keys, chunk, num_blocks, limit, num_bins, shift,
    LAST: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program moves the keys of one chunk, and the rows with them, to where one digit's order puts them."""
    block = tl.program_id(0)
    total, before = counts_before(histogram, block, num_blocks, num_bins, BLOCK_E)
    base = tl.cumsum(total, axis=0) - total + before
    for start in range(block * chunk, tl.minimum(block * chunk + chunk, num_keys), TILE):
        _, bin = _load_bins(keys, start + tl.arange(0, TILE), num_keys, limit, shift, num_bins, True)
        target, entry, _, found = _rows_of_tile(bin, base, BLOCK_E)
        place = start + entry
        key, _ = _load_bins(keys, place, num_keys, limit, shift, num_bins, True)
        row = place  # the first digit finds the rows in their order
        if rows is not None:
            row = tl.load(rows + place, mask=place < num_keys, other=0)
        if LAST:
            row = tl.where(key < limit, row, -1)
        tl.store(sorted_keys + target, key, mask=place < num_keys)
        tl.store(sorted_rows + target, row, mask=place < num_keys)
        base += found


@triton.jit(do_not_specialize=["num_keys", "num_tokens"])
def _first_of_token_kernel(sorted_keys, offsets, num_keys, num_tokens, steps, BLOCK: tl.constexpr):
    """Where each token's keys begin, by bisection."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + num_keys
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(sorted_keys + middle, mask=low < high, other=0x7FFFFFFF) < token
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    tl.store(offsets + token, low, mask=token <= num_tokens)


def rows_of_tokens(row_token: Tensor, num_tokens: int) -> Any:
    """``moekit::rows_of_tokens``: token offsets ``[T + 1]`` and the rows of each token, ascending."""
    if row_token.dtype not in _INDICES or row_token.dim() != 1:
        return NotImplemented
    _check.row_tokens(row_token, num_tokens)
    keys, rows, num_keys, device = row_token.contiguous(), None, row_token.shape[0], row_token.device
    bits = num_tokens.bit_length()  # the largest key is T itself, for rows of no token
    passes = max(_launch.blocks(bits, _DIGIT_BITS), 1)
    digit = max(_launch.blocks(bits, passes), 1)
    tiles = keys_tile(num_keys, 1 << digit)
    chunk, num_blocks = chunking(num_keys, tiles["TILE"])
    histogram = torch.empty(num_blocks, 1 << digit, dtype=torch.int32, device=device)
    for i in range(passes):
        found = [torch.empty(num_keys, dtype=torch.int32, device=device) for _ in range(2)]
        radix = (num_tokens, 1 << digit, i * digit)
        _launch.launch(
            _count_kernel, (num_blocks,), keys, histogram, num_keys, chunk, *radix, DIGITS=True, config=OF_KEYS, **tiles
        )
        _launch.launch(
            _place_digits_kernel, (num_blocks,), keys, rows, histogram, *found, num_keys, chunk, num_blocks, *radix,
            LAST=i == passes - 1, config=OF_KEYS, **tiles,
        )  # fmt: skip
        keys, rows = found
    offsets = torch.empty(num_tokens + 1, dtype=torch.int32, device=device)
    _launch.launch(
        _first_of_token_kernel, (_launch.blocks(num_tokens + 1, 128),),
        keys, offsets, num_keys, num_tokens, num_keys.bit_length(), BLOCK=128,
    )  # fmt: skip
    return offsets, rows


# --- chunks and padding ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_chunks", "num_places", "num_out"])
def _sort_chunks_kernel(
    sizes, chosen, source, num_chunks, num_places, num_out,
    BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes its share of one chunk: where it begins follows from the chunks before it, in both orders."""
    place = tl.program_id(0)
    chunk = tl.load(chosen + place)
    every, placed = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_P)
    begin = tl.sum(tl.load(sizes + every, mask=(every < num_chunks) & (every < chunk), other=0).to(tl.int64), axis=0)
    earlier = tl.load(chosen + placed, mask=placed < place, other=-1)
    known = (earlier >= 0) & (earlier < num_chunks)
    target = tl.sum(tl.load(sizes + earlier, mask=known, other=0).to(tl.int64), axis=0)
    size = tl.minimum(tl.load(sizes + chunk, mask=(chunk >= 0) & (chunk < num_chunks), other=0), num_out)
    for above in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        row = above + tl.arange(0, BLOCK)
        tl.store(source + target + row, begin + row, mask=(row < size) & (target + row >= 0) & (target + row < num_out))


def sort_chunk_rows(split_sizes: Tensor, sorted_idxs: Tensor, num_in: int, num_out: int | None) -> Any:
    """``moekit::sort_chunk_rows``; ``num_out=None`` takes one device-to-host sync."""
    if split_sizes.dtype not in _INDICES or sorted_idxs.dtype not in _INDICES:
        return NotImplemented
    _check.chunks(split_sizes, sorted_idxs, num_in, num_out)
    sizes, chosen = split_sizes.contiguous(), sorted_idxs.contiguous()
    if num_out is None:
        known = (chosen >= 0) & (chosen < sizes.shape[0]) if sizes.shape[0] else chosen < chosen
        found = sizes[chosen[known].long()].long().clamp(0, num_in)
        num_out = int(found.sum())
    source = torch.empty(num_out, dtype=torch.int64, device=sizes.device)
    chunks, places = sizes.shape[0], chosen.shape[0]
    block = 1024
    share = min(_launch.blocks(num_out, max(places, 1) * block), 64)
    _launch.launch(
        _sort_chunks_kernel, (places, share), sizes, chosen, source, chunks, places, num_out,
        BLOCK_E=_launch.power_of_two(chunks), BLOCK_P=_launch.power_of_two(places), BLOCK=block,
    )  # fmt: skip
    return source


@triton.jit(do_not_specialize=["num_experts", "num_rows", "size", "slots", "row_blocks"])
def _pad_rows_kernel(
    offsets, order, inverse, new_offsets, new_order, new_inverse, num_experts, num_rows, size, slots, row_blocks,
    multiple, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program fills a block of the new order, or of the new inverse."""
    expert = tl.arange(0, BLOCK_E)
    end = tl.load(offsets + expert, mask=expert < num_experts, other=0)
    begin = tl.load(offsets + expert - 1, mask=(expert > 0) & (expert < num_experts), other=0)
    padded = (end - begin + multiple - 1) // multiple * multiple
    new_begin = tl.cumsum(padded, axis=0) - padded
    block = tl.program_id(0)
    if block == 0:
        tl.store(new_offsets + expert, new_begin + padded, mask=expert < num_experts)
    if block < row_blocks:
        row = block * BLOCK + tl.arange(0, BLOCK)
        mine = (row[:, None] >= new_begin[None, :]) & (row[:, None] < (new_begin + end - begin)[None, :])
        old = row + tl.sum(tl.where(mine, (begin - new_begin)[None, :], 0), axis=1)
        full = (tl.sum(mine.to(tl.int32), axis=1) > 0) & (old >= 0) & (old < num_rows)
        tl.store(new_order + row, tl.load(order + old, mask=full, other=-1), mask=row < size)
    else:
        slot = (block - row_blocks) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(inverse + slot, mask=slot < slots, other=-1)
        mine = (row[:, None] >= begin[None, :]) & (row[:, None] < end[None, :])
        moved = row + tl.sum(tl.where(mine, (new_begin - begin)[None, :], 0), axis=1)
        tl.store(new_inverse + slot, tl.where(row >= 0, moved, -1), mask=slot < slots)


def pad_rows(offsets: Tensor, order: Tensor, inverse: Tensor, multiple: int) -> Any:
    """``moekit::pad_rows``: offsets, order and inverse with each expert's rows padded to a multiple."""
    int32 = offsets.dtype is order.dtype is inverse.dtype is torch.int32
    if not (int32 and multiple >= 1 and inverse.is_contiguous()):  # the new inverse has the strides of the old
        return NotImplemented
    _check.routing_tables("Routing.pad_to_multiple", order, inverse, offsets)
    num_experts, num_rows, slots = offsets.shape[0], order.shape[0], inverse.numel()
    size = _launch.blocks(num_rows + num_experts * (multiple - 1), multiple) * multiple
    new_offsets = torch.empty_like(offsets, memory_format=torch.contiguous_format)
    new_order = torch.empty(size, dtype=order.dtype, device=order.device)
    new_inverse = torch.empty_like(inverse)
    block_e = _launch.power_of_two(num_experts)
    block = min(max(8192 // block_e, 1), 128)
    row_blocks = max(_launch.blocks(size, block), 1)
    _launch.launch(
        _pad_rows_kernel, (row_blocks + _launch.blocks(slots, block),),
        offsets.contiguous(), order.contiguous(), inverse, new_offsets, new_order, new_inverse,
        num_experts, num_rows, size, slots, row_blocks, multiple,
        BLOCK=block, BLOCK_E=block_e, config=_launch.Tile(0, 8),
    )  # fmt: skip
    return new_offsets, new_order, new_inverse
