"""Launchers of the routing tables: ``route_indices``, ``route_map`` and their relatives.

What the reference refuses with an error is left to it: it then raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from moekit import _check
from moekit.kernels.numba import _table_kernels as kernels
from moekit.kernels.numba._launch import INDICES, Nonsense, address, dense
from moekit.kernels.numba._threads import run

# A piece below this many elements is not worth a table of its own.
_PIECE = 1 << 12
_ANY_BIT, _NOT_SIGN = -1, {1: 0x7F, 2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}
_ONE_BYTE_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def _pieces(length: int) -> int:
    return max(1, min(get_num_threads(), length // _PIECE))


def _sort(
    keys: Tensor, buckets: int, counts: Tensor | None, ends: Tensor, inverse: Tensor | None, first: int = 0
) -> Tensor | None:
    """Positions of the keys in sorted order, -1 after the last; fills ``counts``, ``ends[first:]`` and ``inverse``.

    None if there are keys out of range, or what no keys are.
    """
    if keys.dtype not in INDICES:
        return None
    keys = dense(keys)
    length, wide = keys.numel(), keys.dtype is torch.int64
    pieces = _pieces(length)
    starts, wrong = torch.empty((pieces, buckets), dtype=torch.int32), torch.empty(pieces, dtype=torch.int32)
    args = (keys.data_ptr(), length, pieces, buckets, starts.data_ptr())
    run(kernels.count_keys_kernel(wide), pieces, keys.nbytes, *args, wrong.data_ptr())
    total = kernels.total_kernel()
    placed = total(pieces, buckets, starts.data_ptr(), wrong.data_ptr(), address(counts), ends.data_ptr() + 4 * first)
    if placed < 0:
        return None
    order = torch.empty(length, dtype=torch.int32)
    run(kernels.place_keys_kernel(wide), pieces, keys.nbytes, *args, order.data_ptr(), address(inverse))
    if placed < length:
        order[placed:] = -1
    return order


def route_indices(indices: Tensor, num_experts: int) -> Any:
    """``indices [T, K]`` to counts ``[E]``, offsets ``[E]``, order ``[T*K]``, inverse ``[T, K]``."""
    counts = torch.empty(num_experts, dtype=torch.int64)
    offsets = torch.empty(num_experts, dtype=torch.int32)
    inverse = torch.empty(indices.shape, dtype=torch.int32)
    order = _sort(indices, num_experts, counts, offsets, inverse)
    return NotImplemented if order is None else (counts, offsets, order, inverse)


def rows_of_tokens(row_token: Tensor, num_tokens: int) -> Any:
    """The rows of each token, ascending: offsets ``[T + 1]`` into rows ``[S]``."""
    if row_token.dim() != 1:
        return NotImplemented
    offsets = torch.empty(num_tokens + 1, dtype=torch.int32)
    offsets[0] = 0
    order = _sort(row_token, num_tokens, None, offsets, None, first=1)
    return NotImplemented if order is None else (offsets, order)


def _map_arguments(routing_map: Tensor) -> tuple[Tensor, int, int] | None:
    """The map, the bytes of an element and its bits that say "routed"; None if the reference has to do it."""
    size, dtype = routing_map.element_size(), routing_map.dtype
    if routing_map.dim() != 2 or dtype.is_complex or size not in _NOT_SIGN:
        return None
    if dtype.is_floating_point and size == 1 and dtype not in _ONE_BYTE_FLOATS:
        return None
    return dense(routing_map), size, _NOT_SIGN[size] if dtype.is_floating_point else _ANY_BIT


def route_map(routing_map: Tensor, num_rows: int | None) -> Any:
    """``routing_map [T, E]`` to counts ``[E]``, the token and the slot of each row, and the rows of each token."""
    prepared = _map_arguments(routing_map)
    if prepared is None or routing_map.numel() == 0:
        return NotImplemented
    routing_map, size, mask = prepared
    tokens, experts = routing_map.shape
    pieces = _pieces(routing_map.numel())
    starts = torch.empty((pieces, experts), dtype=torch.int32)
    counts, ends = torch.empty(experts, dtype=torch.int64), torch.empty(experts, dtype=torch.int32)
    args = (routing_map.data_ptr(), mask, tokens, experts, pieces, starts.data_ptr())
    run(kernels.count_map_kernel(size), pieces, routing_map.nbytes, *args)
    routed = kernels.total_kernel()(pieces, experts, starts.data_ptr(), 0, counts.data_ptr(), ends.data_ptr())
    num_rows = routed if num_rows is None else num_rows
    if routed > num_rows:
        return NotImplemented
    tables = [torch.empty(num_rows, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.int32)]
    row_token, row_slot, token_rows = tables
    token_offsets = torch.empty(tokens + 1, dtype=torch.int32)
    outputs = (row_token, row_slot, token_offsets, token_rows)
    addresses = (ends.data_ptr(), *(t.data_ptr() for t in outputs))
    run(kernels.place_map_kernel(size), pieces, routing_map.nbytes, *args, *addresses)
    for table in tables if routed < num_rows else ():
        table[routed:] = -1
    return counts, *outputs


def map_to_indices(routing_map: Tensor, topk: int | None) -> Any:
    """``routing_map [T, E]`` to the experts of each token, ascending, ``[T, K]``, -1 after the last."""
    prepared = _map_arguments(routing_map)
    if prepared is None or routing_map.numel() == 0:
        return NotImplemented
    routing_map, size, mask = prepared
    tokens, experts = routing_map.shape
    widest = torch.empty(1, dtype=torch.int64)
    kernels.widest_kernel(size)(0, tokens, routing_map.data_ptr(), mask, experts, widest.data_ptr())
    slots = int(widest) if topk is None else topk
    if int(widest) > slots:
        return NotImplemented
    out = torch.empty((tokens, slots), dtype=torch.int64)
    args = (routing_map.data_ptr(), mask, experts, slots, out.data_ptr())
    run(kernels.list_map_kernel(size), tokens, routing_map.nbytes + out.nbytes, *args)
    return out


def route_capacity(routing_map: Tensor, capacity: int) -> Any:
    """``routing_map [T, E]`` to the token of each of ``E * capacity`` rows."""
    prepared = _map_arguments(routing_map)
    if prepared is None or routing_map.numel() == 0:
        return NotImplemented
    routing_map, size, mask = prepared
    tokens, experts = routing_map.shape
    pieces = _pieces(routing_map.numel())
    starts, counts = torch.empty((pieces, experts), dtype=torch.int32), torch.empty(experts, dtype=torch.int64)
    out = torch.empty(experts * capacity, dtype=torch.int64)
    if capacity > tokens:
        out.fill_(-1)
    args = (routing_map.data_ptr(), mask, tokens, experts, pieces, starts.data_ptr())
    run(kernels.count_map_kernel(size), pieces, routing_map.nbytes, *args)
    kernels.total_by_expert_kernel()(pieces, experts, starts.data_ptr(), counts.data_ptr())
    run(kernels.capacity_kernel(size), pieces, routing_map.nbytes, *args, counts.data_ptr(), capacity, out.data_ptr())
    return out


def sort_chunk_rows(split_sizes: Tensor, sorted_idxs: Tensor, num_in: int, num_out: int | None) -> Tensor:
    """The source row of each row after the chunks are put into the order ``sorted_idxs``."""
    _check.chunks(split_sizes, sorted_idxs, num_in, num_out)
    sizes, order = dense(split_sizes, torch.int64), dense(sorted_idxs, torch.int64)
    if num_out is None:
        num_out = int(sizes[order].sum())
    out = torch.empty(num_out, dtype=torch.int64)
    kernels.chunk_rows_kernel()(sizes.data_ptr(), len(sizes), order.data_ptr(), len(order), out.data_ptr())
    return out


def pad_rows(offsets: Tensor, order: Tensor, inverse: Tensor, multiple: int) -> Any:
    """The tables with each expert's rows padded to a multiple."""
    int32 = offsets.dtype is order.dtype is inverse.dtype is torch.int32
    if not (int32 and multiple >= 1 and inverse.is_contiguous()):  # the new inverse has the strides of the old
        return NotImplemented
    if (offsets.dim(), order.dim(), inverse.dim()) != (1, 1, 2):
        return NotImplemented
    offsets, order, experts = dense(offsets), dense(order), len(offsets)
    size = -(-(len(order) + experts * (multiple - 1)) // multiple) * multiple
    new_offsets, new_inverse = torch.empty_like(offsets), torch.full_like(inverse, -1)
    new_order = torch.full((size,), -1, dtype=torch.int32)
    try:
        kernels.pad_rows_kernel()(
            offsets.data_ptr(), experts, order.data_ptr(), len(order), inverse.data_ptr(), multiple, inverse.numel(),
            new_offsets.data_ptr(), new_order.data_ptr(), new_inverse.data_ptr(),
        )  # fmt: skip
    except Nonsense:
        return NotImplemented
    return new_offsets, new_order, new_inverse


def row_tables(order: Tensor, num_tokens: int, topk: int) -> Any:
    """The token of each row and where each token's slots begin."""
    if order.dtype is not torch.int32 or order.dim() != 1:
        return NotImplemented
    order = dense(order)
    row_token = torch.empty_like(order)
    args = (order.data_ptr(), num_tokens * topk, max(topk, 1), row_token.data_ptr())
    try:
        run(kernels.row_tables_kernel(), len(order), 2 * order.nbytes, *args)
    except Nonsense:
        return NotImplemented
    starts = torch.arange(0, num_tokens * topk + 1, topk or 1, dtype=torch.int32)
    return row_token, starts if topk else torch.zeros(num_tokens + 1, dtype=torch.int32)


def take(values: Tensor, index: Tensor, back: Tensor | None) -> Any:
    """``values.flatten()[index]``, zero where the index is out of range."""
    if values.dtype.is_complex or index.dtype not in INDICES:
        return NotImplemented
    values, index = dense(values), dense(index)
    out = torch.empty(index.shape, dtype=values.dtype)
    take_kernel = kernels.take_kernel(values.element_size(), index.dtype is torch.int64)
    args = (values.data_ptr(), values.numel(), index.data_ptr(), out.data_ptr())
    run(take_kernel, index.numel(), index.nbytes + 2 * out.nbytes, *args)
    return out


def put(values: Tensor, index: Tensor, size: int) -> Any:
    """``out[index] = values`` in zeros ``[size]``."""
    if values.dtype.is_complex or index.dtype not in INDICES or values.numel() != index.numel():
        return NotImplemented
    values, index = dense(values), dense(index)
    out = torch.zeros(size, dtype=values.dtype)
    put_kernel = kernels.put_kernel(values.element_size(), index.dtype is torch.int64)
    args = (values.data_ptr(), index.data_ptr(), size, out.data_ptr())
    run(put_kernel, index.numel(), index.nbytes + 2 * values.nbytes, *args)
    return out
