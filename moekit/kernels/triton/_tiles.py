"""Tiles of grouped products: where each lies, which programs find out from the offsets, and how it is written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def ends_within(offsets, first, num_experts, num_rows, slot):
    """Where the rows of experts ``first`` onwards end: within the rows and ascending, whatever the offsets are.

    ``slot`` counts from 0 to the experts of the slice or more; it is the caller's, as Gluon wants to know its layout.
    """
    expert = first + slot
    end = tl.load(offsets + expert, mask=(expert >= 0) & (slot < num_experts), other=0)
    # In range before it is cut to 32 bits, which could make any number of it.
    return tl.associative_scan(tl.minimum(tl.maximum(end, 0), num_rows).to(tl.int32), 0, _larger)


@triton.jit
def rows_of_experts(offsets, first, num_experts, num_rows, slot):
    """Of each expert of a slice: first row and end."""
    before = tl.load(offsets + first - 1, mask=first > 0, other=0)
    before = tl.minimum(tl.maximum(before, 0), num_rows).to(tl.int32)
    end = tl.maximum(ends_within(offsets, first, num_experts, num_rows, slot), before)
    begin = tl.maximum(ends_within(offsets, first - 1, num_experts, num_rows, slot), before)
    return begin, end


@triton.jit
def row_blocks(offsets, first, num_experts, num_rows, slot, BLOCK_M: tl.constexpr):
    """Of each expert of a slice: first row, end, and the blocks of rows up to and with its own."""
    begin, end = rows_of_experts(offsets, first, num_experts, num_rows, slot)
    blocks = tl.where(slot < num_experts, (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    return begin, end, tl.cumsum(blocks, 0)


@triton.jit
def place_of(tile, begin, end, through, slot, column_blocks, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Of a tile: its expert in the slice, its first row, the end of the expert's rows, and its block of columns.

    Tiles go expert by expert, and within one by groups of GROUP blocks of rows, so that neighbours in time share operands.
    """
    last = through * column_blocks
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    own = slot == expert
    begin = tl.sum(tl.where(own, begin, 0), 0)
    end = tl.sum(tl.where(own, end, 0), 0)
    inner = tile - tl.max(tl.where(last <= tile, last, 0), 0)
    blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
    group = inner // (GROUP * column_blocks)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    inner -= group * GROUP * column_blocks
    return expert, begin + (group * GROUP + inner % size) * BLOCK_M, end, inner // size


@triton.jit
def place_in(
    tile, begins, ends, slot, blocks_m, blocks_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """Of a tile of matrices, one an expert: its expert, that one's rows, and its first row and column in the matrix."""
    expert = tile // (blocks_m * blocks_n)
    begin = tl.sum(tl.where(slot == expert, begins, 0), 0)
    end = tl.sum(tl.where(slot == expert, ends, 0), 0)
    inner = tile % (blocks_m * blocks_n)
    group = inner // (GROUP * blocks_n)
    inner -= group * GROUP * blocks_n
    together = tl.minimum(blocks_m - group * GROUP, GROUP)
    return expert, begin, end, (group * GROUP + inner % together) * BLOCK_M, inner // together * BLOCK_N


@triton.jit
def low_rank(
    total, low, factors, expert, row, column, width, rank, stride_low, stride_fe, stride_fr, stride_fn,
    RANK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add ``low[row] @ factors[expert]`` to a tile in float32, RANK ranks at a time.

    All of ``row`` must exist.
    """
    for part in tl.static_range(PARTS):
        r = part * RANK + tl.arange(0, RANK)
        left = tl.load(low + row.to(tl.int64)[:, None] * stride_low + r[None, :], mask=(r < rank)[None, :], other=0.0)
        address = factors + expert.to(tl.int64) * stride_fe + r[:, None] * stride_fr + column[None, :] * stride_fn
        right = tl.load(address, mask=(r < rank)[:, None] & (column < width)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def store(out, value, top, column, end, width, stride_out):
    """Write those rows of a tile, from ``top`` on, that are its expert's, rounded once.

    Only the address of the first row is long: those of all elements would take a quarter of the registers.
    """
    row = tl.arange(0, value.shape[0])
    place = (out + top.to(tl.int64) * stride_out) + (row[:, None] * stride_out + column[None, :])
    tl.store(place, value.to(out.dtype.element_ty), mask=(row < end - top)[:, None] & (column < width)[None, :])
