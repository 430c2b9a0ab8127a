"""GPU kernels in Triton: raw tensors in and out, no autograd. They run on CPU tensors under ``TRITON_INTERPRET=1``."""

from __future__ import annotations

from collections.abc import Callable

from moekit.kernels.triton import (
    by_slot,
    decode,
    entries,
    gathered,
    gemm,
    glu,
    glu_backward,
    maps,
    outer,
    rows,
    tables,
    topk,
    unpack,
)

KERNELS: dict[str, Callable] = {
    "glu": glu.glu,
    "glu_fp8": glu.glu_fp8,
    "glu_backward": glu_backward.glu_backward,
    "glu_backward_over": glu_backward.glu_backward_over,
    "permute": rows.permute,
    "unpermute": rows.unpermute,
    "unpermute_backward": rows.unpermute_backward,
    "route_indices": tables.route_indices,
    "choice_rows": tables.choice_rows,
    "route_map": maps.route_map,
    "map_to_indices": maps.map_to_indices,
    "route_capacity": maps.route_capacity,
    "rows_of_tokens": tables.rows_of_tokens,
    "sort_chunk_rows": tables.sort_chunk_rows,
    "pad_rows": tables.pad_rows,
    "row_tables": entries.row_tables,
    "row_order": entries.row_order,
    "take": entries.take,
    "put": entries.put,
    "topk_router": topk.topk_router,
    "topk_router_backward": topk.topk_router_backward,
    "score_sums": topk.score_sums,
    "weigh_experts": topk.weigh_experts,
    "unpack": unpack.unpack,
    "grouped_rows": gemm.grouped_rows,
    "gathered_rows": gathered.gathered_rows,
    "gathered_glu": gathered.gathered_glu,
    "grouped_slice": gemm.grouped_slice,
    "grouped_outer": outer.grouped_outer,
    "gathered_outer": outer.gathered_outer,
    "grouped_add": gemm.grouped_add,
    "packed_rows": gemm.packed_rows,
    "packed_slices": gemm.packed_slices,
    "packed_rows_few": decode.packed_rows_few,
    "experts_by_slot": by_slot.experts_by_slot,
}
"""Operator name to the function that runs it, with the reference's arguments and results."""
