"""Routing tables: which row goes where.

Rows are expert-major and ascending in token within an expert. A table names rows or tokens by integers, with -1 for
"none", and its size never depends on the values unless the caller leaves it open: then it takes one device-to-host
sync on a GPU (documented at each function). Everything is a stable counting sort: no order is left to chance.

On a CPU (or under ``moekit.debug()``) values are checked; on a GPU, where a check would be a sync, an index out of
range routes nowhere and nothing is written past the end of a table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops import _library
from moekit.ops._segments import sum_by_index


def require_capacity(op: str, routed: int, num_rows: int) -> None:
    """Refuse an output that cannot hold every routed row (in unpermute: rows too few for the map)."""
    if routed > num_rows:
        argument = "num_out_tokens (in unpermute: the number of rows)"
        raise _check.fail(op, argument, f"at least the {routed} routed pairs of routing_map", num_rows)


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


# --- from top-k indices ---------------------------------------------------------------------------------------------


def _route_indices_reference(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``indices [T, K]`` to counts ``[E]``, offsets ``[E]``, order ``[T*K]``, inverse ``[T, K]``."""
    _check.integer("Routing.from_topk", "indices", indices)
    _check.route_indices(indices, num_experts)
    flat = indices.reshape(-1).long()
    expert = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = sum_by_index(torch.ones_like(expert), expert, num_experts)
    offsets = _ends(counts)
    sorted_expert, slot = expert.sort(stable=True)
    routed = sorted_expert < num_experts
    rows = torch.arange(flat.shape[0], device=flat.device)
    inverse = torch.empty_like(rows).scatter(0, slot, torch.where(routed, rows, -1))
    order = torch.where(routed, slot, -1)
    return counts, offsets, order.int(), inverse.int().view(indices.shape)


def _route_indices_fake(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        indices.new_empty(num_experts, dtype=torch.int64),
        indices.new_empty(num_experts, dtype=torch.int32),
        indices.new_empty(indices.numel(), dtype=torch.int32),
        torch.empty(indices.shape, dtype=torch.int32, device=indices.device),
    )


route_indices = _library.define(
    "route_indices(Tensor indices, SymInt num_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_route_indices_reference,
    fake=_route_indices_fake,
)


# --- from a map -----------------------------------------------------------------------------------------------------


def _route_map_reference(routing_map: Tensor, num_rows: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``routing_map [T, E]`` to counts ``[E] int64`` and, of each row, token and place in the map ``[S] int64``.

    Also the inverse of the tokens' table, as :data:`rows_of_tokens` has it: offsets ``[T + 1]`` and rows ``[S]``.
    """
    _check.tensor_dim("permute", "routing_map", routing_map, 2)
    num_tokens, num_experts = routing_map.shape
    routed = (routing_map != 0).T.reshape(-1)  # expert-major
    counts = routed.view(num_experts, num_tokens).sum(1)
    if num_rows is None:
        num_rows = int(counts.sum())
    elif _backend.checks_values(routing_map):
        require_capacity("permute", int(counts.sum()), num_rows)
    row = routed.cumsum(0) - 1
    target = torch.where(routed & (row < num_rows), row, num_rows)  # the spare last entry takes what is not routed
    place = torch.arange(routed.shape[0], device=routed.device)
    found = place.new_full((num_rows + 1,), -1).scatter(0, target, place)[:num_rows]
    none = found < 0
    token = torch.where(none, -1, found % max(num_tokens, 1))
    slot = torch.where(none, -1, token * num_experts + found // max(num_tokens, 1))
    return counts, token, slot, *_rows_of_tokens_reference(token, num_tokens)


def _route_map_fake(routing_map: Tensor, num_rows: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size() if num_rows is None else num_rows
    num_tokens, num_experts = routing_map.shape
    return (
        routing_map.new_empty(num_experts, dtype=torch.int64),
        routing_map.new_empty(size, dtype=torch.int64),
        routing_map.new_empty(size, dtype=torch.int64),
        routing_map.new_empty(num_tokens + 1, dtype=torch.int32),
        routing_map.new_empty(size, dtype=torch.int32),
    )


route_map = _library.define(
    "route_map(Tensor routing_map, SymInt? num_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_route_map_reference,
    fake=_route_map_fake,
)


def _map_to_indices_reference(routing_map: Tensor, topk: int | None) -> Tensor:
    """``routing_map [T, E]`` to the experts of each token, ascending, ``[T, K] int64``, -1 after the last."""
    _check.tensor_dim("Routing.from_map", "routing_map", routing_map, 2)
    routed = routing_map != 0
    num_tokens, num_experts = routed.shape
    widest = int(routed.sum(1).max()) if routed.numel() and (topk is None or _backend.checks_values(routed)) else 0
    if topk is None:
        topk = widest
    elif widest > topk:
        raise _check.fail("Routing.from_map", "topk", f"at least the {widest} experts of a token", topk)
    slot = routed.cumsum(1) - 1
    target = torch.where(routed & (slot < topk), slot, topk)
    expert = torch.arange(num_experts, device=routed.device).expand(num_tokens, num_experts)
    return expert.new_full((num_tokens, topk + 1), -1).scatter(1, target, expert)[:, :topk].contiguous()


def _map_to_indices_fake(routing_map: Tensor, topk: int | None) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size() if topk is None else topk
    return routing_map.new_empty(routing_map.shape[0], size, dtype=torch.int64)


map_to_indices = _library.define(
    "map_to_indices(Tensor routing_map, SymInt? topk) -> Tensor",
    reference=_map_to_indices_reference,
    fake=_map_to_indices_fake,
)


def _route_capacity_reference(routing_map: Tensor, capacity: int) -> Tensor:
    """``routing_map [T, E]`` to the token of each of ``E * capacity`` rows, int64.

    Each expert takes its first ``capacity`` routed tokens by position, then unrouted ones by position, then -1.
    """
    _check.tensor_dim("permute", "routing_map", routing_map, 2)
    num_tokens = routing_map.shape[0]
    unrouted = (routing_map == 0).T.to(torch.uint8)
    first = unrouted.sort(dim=1, stable=True).indices[:, :capacity]
    return torch.nn.functional.pad(first, (0, max(capacity - num_tokens, 0)), value=-1).reshape(-1)


def _route_capacity_fake(routing_map: Tensor, capacity: int) -> Tensor:
    return routing_map.new_empty(routing_map.shape[1] * capacity, dtype=torch.int64)


route_capacity = _library.define(
    "route_capacity(Tensor routing_map, SymInt capacity) -> Tensor",
    reference=_route_capacity_reference,
    fake=_route_capacity_fake,
)


# --- the inverse of a table -----------------------------------------------------------------------------------------


def _rows_of_tokens_reference(row_token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The rows of each token, ascending: offsets ``[T + 1] int32`` into rows ``[S] int32`` (-1 past the end)."""
    _check.row_tokens(row_token, num_tokens)
    token = torch.where((row_token >= 0) & (row_token < num_tokens), row_token, num_tokens).long()
    counts = sum_by_index(torch.ones_like(token), token, num_tokens)
    sorted_token, rows = token.sort(stable=True)
    offsets = torch.nn.functional.pad(_ends(counts), (1, 0))
    return offsets, torch.where(sorted_token < num_tokens, rows, -1).int()


def _rows_of_tokens_fake(row_token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    return (
        row_token.new_empty(num_tokens + 1, dtype=torch.int32),
        torch.empty(row_token.shape, dtype=torch.int32, device=row_token.device),
    )


rows_of_tokens = _library.define(
    "rows_of_tokens(Tensor row_token, SymInt num_tokens) -> (Tensor, Tensor)",
    reference=_rows_of_tokens_reference,
    fake=_rows_of_tokens_fake,
)


# --- chunks and padding ---------------------------------------------------------------------------------------------


def _sort_chunks_reference(split_sizes: Tensor, sorted_idxs: Tensor, num_in: int, num_out: int | None) -> Tensor:
    """The source row of each row after the chunks are put into the order ``sorted_idxs``, int64."""
    _check.chunks(split_sizes, sorted_idxs, num_in, num_out)
    sizes = split_sizes.long().clamp(0, num_in)  # on a GPU nobody has looked at them
    if 0 in (sizes.shape[0], sorted_idxs.shape[0]):
        return sizes.new_zeros(num_out or 0)
    chosen = sorted_idxs.long().clamp(0, sizes.shape[0] - 1)
    starts = (sizes.cumsum(0) - sizes)[chosen]
    ends = sizes[chosen].cumsum(0)
    if num_out is None:
        num_out = int(ends[-1])
    rows = torch.arange(num_out, device=sizes.device)
    chunk = torch.searchsorted(ends, rows, right=True).clamp(max=ends.numel() - 1)
    return rows - (ends - sizes[chosen])[chunk] + starts[chunk]


def _sort_chunks_fake(split_sizes: Tensor, sorted_idxs: Tensor, num_in: int, num_out: int | None) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size() if num_out is None else num_out
    return split_sizes.new_empty(size, dtype=torch.int64)


sort_chunk_rows = _library.define(
    "sort_chunk_rows(Tensor split_sizes, Tensor sorted_idxs, SymInt num_in, SymInt? num_out) -> Tensor",
    reference=_sort_chunks_reference,
    fake=_sort_chunks_fake,
)


def padded_size(num_rows: int, num_experts: int, multiple: int) -> int:
    """Rows that always suffice when each expert's count is rounded up to ``multiple``."""
    return -(-(num_rows + num_experts * (multiple - 1)) // multiple) * multiple


def _pad_rows_reference(offsets: Tensor, order: Tensor, inverse: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tables in which each expert starts at a multiple of ``multiple`` rows; the rows in between are -1."""
    _check.positive("Routing.pad_to_multiple", "multiple", multiple)
    _check.routing_tables("Routing.pad_to_multiple", order, inverse, offsets)
    num_experts, num_rows = offsets.shape[0], order.shape[0]
    size = padded_size(num_rows, num_experts, multiple)
    starts = torch.nn.functional.pad(offsets, (1, 0))[:-1]
    padded = -(-(offsets - starts) // multiple) * multiple
    new_offsets = _ends(padded)
    shift = torch.nn.functional.pad(new_offsets - padded - starts, (0, 1))  # how far each expert's rows move
    rows = torch.arange(num_rows, device=offsets.device, dtype=torch.int32)
    moved = rows + shift[torch.searchsorted(offsets.contiguous(), rows, right=True)]
    target = torch.where((order >= 0) & (moved >= 0) & (moved < size), moved, size).long()
    new_order = order.new_full((size + 1,), -1).scatter(0, target, order)[:size]
    if num_rows == 0:
        return new_offsets.to(offsets.dtype), new_order, inverse.clone()
    new_inverse = torch.where(inverse >= 0, moved[inverse.clamp(min=0, max=num_rows - 1).long()], -1)
    return new_offsets.to(offsets.dtype), new_order, new_inverse.to(inverse.dtype)


def _pad_rows_fake(offsets: Tensor, order: Tensor, inverse: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    size = padded_size(order.shape[0], offsets.shape[0], multiple)
    return torch.empty_like(offsets), order.new_empty(size), torch.empty_like(inverse)


pad_rows = _library.define(
    "pad_rows(Tensor offsets, Tensor order, Tensor inverse, SymInt multiple) -> (Tensor, Tensor, Tensor)",
    reference=_pad_rows_reference,
    fake=_pad_rows_fake,
)


# --- entries of a table ---------------------------------------------------------------------------------------------


def _row_tables_reference(order: Tensor, num_tokens: int, topk: int) -> tuple[Tensor, Tensor]:
    """The token of each row ``[R]`` and where each token's slots begin ``[T + 1]``, both int32.

    ``order [R]`` holds the slot ``token * topk + k`` of each row, -1 for none.
    """
    _check.tensor_dim("Routing", "order", order, 1)
    _check.integer("Routing", "order", order)
    _check.in_range("Routing", "order", order, num_tokens * topk, "the number of slots")
    starts = torch.arange(num_tokens + 1, dtype=torch.int32, device=order.device) * topk
    return torch.div(order, max(topk, 1), rounding_mode="floor"), starts


def _row_tables_fake(order: Tensor, num_tokens: int, topk: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(order), order.new_empty(num_tokens + 1)


row_tables = _library.define(
    "row_tables(Tensor order, SymInt num_tokens, SymInt topk) -> (Tensor, Tensor)",
    reference=_row_tables_reference,
    fake=_row_tables_fake,
)


def row_slots(row_token: Tensor, row_expert: Tensor, num_experts: int) -> Tensor:
    """Where each row's entry stands in a flattened ``[T, E]`` table, -1 for none."""
    return torch.where((row_token >= 0) & (row_expert >= 0), row_token * num_experts + row_expert, -1)


def _take_reference(values: Tensor, index: Tensor, back: Tensor | None) -> Tensor:
    """``values.flatten()[index]``, zero where the index is out of range.

    No entry is taken twice. ``back``, if given, says for each entry of ``values`` where it went (-1: nowhere): the
    gradient is then gathered, too.
    """
    _check.integer("take", "index", index)
    flat = values.reshape(-1)
    if flat.shape[0] == 0:  # nothing to take from, so no index is in range
        return flat.new_zeros(index.shape)
    inside = (index >= 0) & (index < flat.shape[0])
    found = flat.index_select(0, torch.where(inside, index, 0).reshape(-1)).view(index.shape)
    return torch.where(inside, found, flat.new_zeros(()))  # a plain 0 would turn bool into int64


def _take_fake(values: Tensor, index: Tensor, back: Tensor | None) -> Tensor:
    return values.new_empty(index.shape)


def _take_save(ctx: Any, args: tuple, outputs: Any) -> None:
    values, index, back = args
    ctx.shape = values.shape
    ctx.save_for_backward(index, back)


def _take_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    index, back = ctx.saved_tensors
    # torch.Size.numel() would fix symbolic sizes.
    found = put(grad, index, math.prod(ctx.shape)) if back is None else _take(grad, back, index)
    return found.view(ctx.shape), None, None


_take = _library.define(
    "take(Tensor values, Tensor index, Tensor? back) -> Tensor",
    reference=_take_reference,
    fake=_take_fake,
    save=_take_save,
    backward=_take_backward,
)


def take(values: Tensor, index: Tensor, back: Tensor | None = None) -> Tensor:
    """``values.flatten()[index]``, zero where the index is -1; each entry is taken at most once. Differentiable.

    ``back`` is the inverse of ``index``, if known: the place that took each entry of ``values``, -1 for none.
    """
    return _take(values, index, back)


def _put_reference(values: Tensor, index: Tensor, size: int) -> Tensor:
    """``out[index] = values`` in zeros ``[size]``, for an index that names no place twice; -1 goes nowhere."""
    _check.integer("put", "index", index)
    if index.numel() != values.numel():
        raise _check.fail("put", "index", f"one entry a value ({values.numel()})", f"shape {list(index.shape)}")
    inside = (index >= 0) & (index < size)
    target = torch.where(inside, index, size).reshape(-1).long()
    return values.new_zeros(size + 1).scatter(0, target, values.reshape(-1))[:size].clone()


def _put_fake(values: Tensor, index: Tensor, size: int) -> Tensor:
    return values.new_empty(size)


def _put_save(ctx: Any, args: tuple, outputs: Any) -> None:
    ctx.shape = args[0].shape
    ctx.save_for_backward(args[1])


def _put_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    (index,) = ctx.saved_tensors
    return _take(grad, index, None).view(ctx.shape), None, None


put = _library.define(
    "put(Tensor values, Tensor index, SymInt size) -> Tensor",
    reference=_put_reference,
    fake=_put_fake,
    save=_put_save,
    backward=_put_backward,
)
