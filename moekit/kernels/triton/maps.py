"""Routing tables from a map ``[T, E]``, whatever its dtype: what is not zero is routed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit import _backend
from moekit.kernels.triton import _launch
from moekit.kernels.triton._counting import chunking, counts_before, fill, map_tile, store_ends

_LOADED = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float64)


@triton.jit
def _load_routed(routing_map, token, end, num_experts, stride, BLOCK_E: tl.constexpr):
    """``[tokens, BLOCK_E]``: 1 where the token is routed to the expert."""
    expert = tl.arange(0, BLOCK_E)
    mask = (token < end)[:, None] & (expert < num_experts)[None, :]
    entry = tl.load(routing_map + token.to(tl.int64)[:, None] * stride + expert[None, :], mask=mask, other=0)
    if entry.dtype.primitive_bitwidth < 32:
        entry = entry.to(tl.float32)
    return (entry != 0).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens", "chunk", "num_experts"])
def _count_map_kernel(
    routing_map, histogram, num_tokens, chunk, num_experts, stride, TILE: tl.constexpr, BLOCK_E: tl.constexpr
):
    """One program counts each expert's tokens in one chunk of tokens."""
    block = tl.program_id(0)
    end = tl.minimum(block * chunk + chunk, num_tokens)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(block * chunk, end, TILE):
        counts += tl.sum(_load_routed(routing_map, start + tl.arange(0, TILE), end, num_experts, stride, BLOCK_E), axis=0)
    expert = tl.arange(0, BLOCK_E)
    tl.store(histogram + block * num_experts + expert, counts, mask=expert < num_experts)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "chunk", "num_blocks", "num_experts"])
def _place_map_kernel(
    routing_map, histogram, counts, row_token, row_slot, token_offsets, token_rows,
    num_tokens, num_rows, chunk, num_blocks, num_experts, stride,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program gives the tokens of one chunk their rows; those behind ``num_rows`` are left out of every table."""
    block = tl.program_id(0)
    total, before = counts_before(histogram, block, num_blocks, num_experts, BLOCK_E)
    if block == 0:
        store_ends(total, counts, None, num_experts, BLOCK_E)
    base = tl.cumsum(total, axis=0) - total
    behind = tl.sum(tl.minimum(tl.maximum(num_rows - base, 0), before), axis=0)  # rows of the tokens before
    base += before
    expert = tl.arange(0, BLOCK_E)[None, :]
    end = tl.minimum(block * chunk + chunk, num_tokens)
    for start in range(block * chunk, end, TILE):
        token = start + tl.arange(0, TILE)
        routed = _load_routed(routing_map, token, end, num_experts, stride, BLOCK_E)
        row = base[None, :] + tl.cumsum(routed, axis=0) - 1
        mask = (routed > 0) & (row < num_rows)
        wide = tl.zeros([TILE, BLOCK_E], tl.int64) + token[:, None]
        tl.store(row_token + row, wide, mask=mask)
        tl.store(row_slot + row, wide * num_experts + expert, mask=mask)
        kept = mask.to(tl.int32)
        of_token = tl.sum(kept, axis=1)
        first = behind + tl.cumsum(of_token, axis=0) - of_token
        tl.store(token_offsets + token, first, mask=token < end)
        tl.store(token_rows + first[:, None] + tl.cumsum(kept, axis=1) - 1, row, mask=mask)
        base += tl.sum(routed, axis=0)
        behind += tl.sum(of_token, axis=0)
    placed = tl.minimum(tl.sum(total, axis=0), num_rows)
    if block == 0:
        tl.store(token_offsets + num_tokens, placed)
    fill(row_token, placed, num_rows, -1, block, num_blocks)
    fill(row_slot, placed, num_rows, -1, block, num_blocks)
    fill(token_rows, placed, num_rows, -1, block, num_blocks)


@triton.jit(do_not_specialize=["num_tokens", "capacity", "chunk", "num_blocks", "num_experts"])
def _place_capacity_kernel(
    routing_map, histogram, row_token, num_tokens, capacity, chunk, num_blocks, num_experts, stride,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program gives the tokens of one chunk their places with each expert: routed ones first, then the others."""
    block = tl.program_id(0)
    total, before = counts_before(histogram, block, num_blocks, num_experts, BLOCK_E)
    expert = tl.arange(0, BLOCK_E)
    rows = row_token + expert.to(tl.int64)[None, :] * capacity
    end = tl.minimum(block * chunk + chunk, num_tokens)
    for start in range(block * chunk, end, TILE):
        token = start + tl.arange(0, TILE)
        routed = _load_routed(routing_map, token, end, num_experts, stride, BLOCK_E)
        ahead = before[None, :] + tl.cumsum(routed, axis=0) - routed  # routed tokens before this one
        place = tl.where(routed > 0, ahead, total[None, :] + token[:, None] - ahead)
        mask = (place < capacity) & (token < end)[:, None] & (expert < num_experts)[None, :]
        tl.store(rows + place, tl.zeros([TILE, BLOCK_E], tl.int64) + token[:, None], mask=mask)
        before += tl.sum(routed, axis=0)
    for spare in range(num_tokens + block, capacity, num_blocks):
        tl.store(rows + spare, tl.zeros([1, BLOCK_E], tl.int64) - 1, mask=(expert < num_experts)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "topk"])
def _map_to_indices_kernel(
    routing_map, indices, num_tokens, num_experts, topk, stride,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program lists the experts of TILE tokens, ascending."""
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    routed = _load_routed(routing_map, token, num_tokens, num_experts, stride, BLOCK_E)
    rows = indices + token.to(tl.int64)[:, None] * topk
    slot = tl.cumsum(routed, axis=1) - 1
    expert = tl.zeros([TILE, BLOCK_E], tl.int64) + tl.arange(0, BLOCK_E)[None, :]
    tl.store(rows + slot, expert, mask=(routed > 0) & (slot < topk))
    spare = tl.arange(0, BLOCK_K)[None, :]
    mask = (spare >= tl.sum(routed, axis=1)[:, None]) & (spare < topk) & (token < num_tokens)[:, None]
    tl.store(rows + spare, tl.zeros([TILE, BLOCK_K], tl.int64) - 1, mask=mask)


def _tidy(routing_map: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The map in a dtype that kernels load, with adjacent experts; and the shape of tiles."""
    if routing_map.dtype not in _LOADED and not _launch.computes(routing_map):
        routing_map = routing_map != 0
    if routing_map.dtype is torch.bool:
        routing_map = routing_map.view(torch.uint8)
    return _launch.rows_of(routing_map), map_tile(routing_map.shape[1])


def _count(routing_map: Tensor, tiles: dict[str, Any]) -> tuple[Tensor, int, int]:
    num_tokens, num_experts = routing_map.shape
    chunk, num_blocks = chunking(num_tokens, tiles["TILE"])
    histogram = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=routing_map.device)
    stride = routing_map.stride(0)
    _launch.launch(_count_map_kernel, (num_blocks,), routing_map, histogram, num_tokens, chunk, num_experts, stride, **tiles)
    return histogram, chunk, num_blocks


def route_map(routing_map: Tensor, num_rows: int | None) -> Any:
    """``moekit::route_map``: counts, token and slot of each row, rows of each token; ``num_rows=None`` takes one sync."""
    if routing_map.dim() != 2:
        return NotImplemented
    looks = num_rows is None or _backend.checks_values(routing_map)
    routing_map, tiles = _tidy(routing_map)
    num_tokens, num_experts = routing_map.shape
    histogram, chunk, num_blocks = _count(routing_map, tiles)
    if looks:
        routed = int(histogram.sum())
        if num_rows is not None and num_rows < routed:
            return NotImplemented  # the reference says what is wrong
        num_rows = routed if num_rows is None else num_rows
    counts = torch.empty(num_experts, dtype=torch.int64, device=routing_map.device)
    row_token, row_slot = (torch.empty(num_rows, dtype=torch.int64, device=routing_map.device) for _ in range(2))
    token_offsets = torch.empty(num_tokens + 1, dtype=torch.int32, device=routing_map.device)
    token_rows = torch.empty(num_rows, dtype=torch.int32, device=routing_map.device)
    _launch.launch(
        _place_map_kernel, (num_blocks,), routing_map, histogram, counts, row_token, row_slot, token_offsets, token_rows,
        num_tokens, num_rows, chunk, num_blocks, num_experts, routing_map.stride(0), **tiles,
    )  # fmt: skip
    return counts, row_token, row_slot, token_offsets, token_rows


def route_capacity(routing_map: Tensor, capacity: int) -> Any:
    """``moekit::route_capacity``: the token of each of ``E * capacity`` rows."""
    if routing_map.dim() != 2:
        return NotImplemented
    routing_map, tiles = _tidy(routing_map)
    num_tokens, num_experts = routing_map.shape
    histogram, chunk, num_blocks = _count(routing_map, tiles)
    tiles["config"] = _launch.Tile(0, 16)  # with fewer warps its threads run out of registers
    row_token = torch.empty(num_experts * capacity, dtype=torch.int64, device=routing_map.device)
    _launch.launch(
        _place_capacity_kernel, (num_blocks,), routing_map, histogram, row_token,
        num_tokens, capacity, chunk, num_blocks, num_experts, routing_map.stride(0), **tiles,
    )  # fmt: skip
    return row_token


def map_to_indices(routing_map: Tensor, topk: int | None) -> Any:
    """``moekit::map_to_indices``; ``topk=None`` takes one device-to-host sync."""
    if routing_map.dim() != 2:
        return NotImplemented
    if topk is None or _backend.checks_values(routing_map):
        widest = int((routing_map != 0).sum(1).max()) if routing_map.numel() else 0
        if topk is not None and topk < widest:
            return NotImplemented  # the reference says what is wrong
        topk = widest if topk is None else topk
    routing_map, tiles = _tidy(routing_map)
    num_tokens, num_experts = routing_map.shape
    indices = torch.empty(num_tokens, topk, dtype=torch.int64, device=routing_map.device)
    _launch.launch(
        _map_to_indices_kernel, (_launch.blocks(num_tokens, tiles["TILE"]),), routing_map, indices,
        num_tokens, num_experts, topk, routing_map.stride(0), BLOCK_K=_launch.power_of_two(topk), **tiles,
    )  # fmt: skip
    return indices
