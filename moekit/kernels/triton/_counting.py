"""A stable counting sort in two launches: blocks count, then every block places its entries.

The second launch needs no scan in between: each block reads the counts of all (a few KiB from the cache) and adds up those
before it. Within a tile entries are sorted by key and place. Atomics count at most, so no order is left to chance.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moekit.kernels.triton import _launch

_MAX_BLOCKS = 128  # about one for each multiprocessor
OF_KEYS = _launch.Tile(0, 8)


def map_tile(num_bins: int) -> dict[str, Any]:
    """The shape of tiles of a map: at most 128 tokens, with all their bins about 2048 entries; and the warps for it."""
    block_e = _launch.power_of_two(num_bins)
    config = _launch.Tile(0, 4 if block_e <= 256 else 16)
    return {"TILE": min(max(2048 // block_e, 1), 128), "BLOCK_E": block_e, "config": config}


def keys_tile(num_keys: int, num_bins: int) -> dict[str, int]:
    """The shape of tiles of keys: as many as each of ``_MAX_BLOCKS`` blocks has to take on, from 128 to 512."""
    tile = min(max(_launch.power_of_two(_launch.blocks(num_keys, _MAX_BLOCKS)), 128), 512)
    return {"TILE": tile, "BLOCK_E": max(_launch.power_of_two(num_bins), 32)}


def chunking(entries: int, tile: int) -> tuple[int, int]:
    """Entries a block takes on, a multiple of ``tile``, and the number of blocks: at least one, which may be empty."""
    chunk = max(_launch.blocks(_launch.blocks(entries, _MAX_BLOCKS), tile), 1) * tile
    return chunk, max(_launch.blocks(entries, chunk), 1)


@triton.jit
def counts_before(histogram, block, num_blocks, num_bins, BLOCK_E: tl.constexpr):
    """Of each bin the entries of all blocks, and of those before ``block``."""
    BLOCK_B: tl.constexpr = 32
    bin = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    for above in range(0, num_blocks, BLOCK_B):
        other = above + tl.arange(0, BLOCK_B)
        mask = (other < num_blocks)[:, None] & (bin < num_bins)[None, :]
        counts = tl.load(histogram + other[:, None] * num_bins + bin[None, :], mask=mask, other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((other < block)[:, None], counts, 0), axis=0)
    return total, before


@triton.jit
def count_bins(bin, BLOCK_E: tl.constexpr):
    """How many of a tile's entries fall into each bin; -1 is none."""
    return tl.histogram(tl.where(bin >= 0, bin, 0), BLOCK_E, mask=bin >= 0)


@triton.jit
def sort_tile(bin, BLOCK_E: tl.constexpr):
    """A tile's entries in the order of their bins, -1 last: ``(entry, bin)``. Equal bins stay in their order."""
    TILE: tl.constexpr = bin.shape[0]
    packed = tl.sort(tl.where(bin >= 0, bin, BLOCK_E) * TILE + tl.arange(0, TILE))
    return packed % TILE, packed // TILE


@triton.jit
def store_ends(total, counts, offsets, num_bins, BLOCK_E: tl.constexpr):
    """Write the counts of the bins and their cumulative ends, either unless None."""
    bin = tl.arange(0, BLOCK_E)
    if counts is not None:
        tl.store(counts + bin, total, mask=bin < num_bins)
    if offsets is not None:
        tl.store(offsets + bin, tl.cumsum(total, axis=0), mask=bin < num_bins)


@triton.jit
def fill(target, first, end, value, block, num_blocks):
    """``target[first:end] = value``, shared out among the blocks."""
    BLOCK: tl.constexpr = 1024
    for above in range(first + block * BLOCK, end, num_blocks * BLOCK):
        place = above + tl.arange(0, BLOCK)
        tl.store(target + place, tl.zeros([BLOCK], tl.int32) + value, mask=place < end)
