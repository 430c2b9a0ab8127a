"""Grouped matrix products with packed weights.

Each expert's rows are multiplied by its weight (or by the transposed one), which is unpacked for it: expert by expert on
a CPU, where an unpacked expert stays in the cache; elsewhere in slices of experts, into one workspace of
:data:`WORKSPACE` bytes (or of one expert, where that is larger). So no floating-point copy of a whole stack exists. For
few rows an expert (decoding) kernels multiply by the packed bytes as they read them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import _backend
from moekit.ops import gemm
from moekit.ops.unpack import Stored, unpack

WORKSPACE = 1 << 27  # bytes


def packed_rows(rows: Tensor, stored: Stored, offsets: Tensor, out: Tensor | None = None, *, back: bool = False) -> Tensor:
    """Multiply each expert's rows by its packed weight ``W [out, in]``.

    Args:
        rows: ``[R, in]``, expert by expert; ``[R, out]`` if ``back``.
        stored: the stack ``[E, out, in]``.
        offsets: ``[E]`` int32, cumulative row ends.
        out: to write into, or None.
        back: multiply by ``W`` instead of by its transpose.

    Returns:
        ``[R, out]`` (``[R, in]`` if ``back``) in the dtype of ``rows``; rows at or past ``offsets[-1]`` hold anything.
    """
    gemm.check_offsets(offsets, stored.shape[0])
    kernel = _backend.kernel("packed_rows", rows)
    product = NotImplemented if kernel is None else kernel(rows, stored, offsets, out, back)
    if product is not NotImplemented:
        return product
    if out is None:
        out = rows.new_empty(rows.shape[0], stored.shape[2 if back else 1])
    if gemm.looped(rows):
        _expert_by_expert(rows, stored, offsets, out, back)
    else:
        _slice_by_slice(rows, stored, offsets, out, back)
    return out


def three(scales: list[Tensor]) -> list[Tensor | None]:
    """Scales as operators take them, which take no lists: the vmap of batched gradients knows none."""
    return [*scales, *[None] * (3 - len(scales))]


def _expert_by_expert(rows: Tensor, stored: Stored, offsets: Tensor, out: Tensor, back: bool) -> None:
    workspace = rows.new_empty(1, *stored.shape[1:])
    for expert, block in gemm.blocks(offsets, rows.shape[0]):
        weight = unpack(stored, expert, expert + 1, rows.dtype, workspace)[0]
        torch.mm(rows[block], weight if back else weight.T, out=out[block])


def _slice_by_slice(rows: Tensor, stored: Stored, offsets: Tensor, out: Tensor, back: bool) -> None:
    num_experts, height, width = stored.shape
    count = max(1, min(num_experts, WORKSPACE // max(1, height * width * rows.element_size())))
    workspace = rows.new_empty(count, height, width)
    for first in range(0, num_experts, count):
        stop = min(first + count, num_experts)
        weight = unpack(stored, first, stop, rows.dtype, workspace[: stop - first])
        gemm.grouped_slice(rows, weight if back else weight.mT, offsets, first, out)
