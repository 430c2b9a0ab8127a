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

WORKSPACE = 192 << 20  # bytes: the slices of a layer of 128 small experts are then large enough to fill a GPU


def packed_rows(
    rows: Tensor,
    stored: Stored,
    offsets: Tensor,
    out: Tensor | None = None,
    low: Tensor | None = None,
    factors: Tensor | None = None,
    *,
    back: bool = False,
    invariant: bool = False,
) -> Tensor:
    """Multiply each expert's rows by its packed weight ``W [out, in]``; with ``low``, add those of ``low`` by its factors.

    Args:
        rows: ``[R, in]``, expert by expert; ``[R, out]`` if ``back``.
        stored: the stack ``[E, out, in]``.
        offsets: ``[E]`` int32, cumulative row ends.
        out: to write into, or None.
        low: ``[R, r]`` of a small rank r, in the dtype of ``rows``, or None. Where a kernel can, both products are one sum.
        factors: ``[E, r, out]`` (``[E, r, in]`` if ``back``), with ``low``.
        back: multiply by ``W`` instead of by its transpose.
        invariant: as of :func:`moekit.ops.gemm.grouped_rows`.

    Returns:
        ``[R, out]`` (``[R, in]`` if ``back``) in the dtype of ``rows``; rows at or past ``offsets[-1]`` hold anything.
    """
    gemm.check_offsets(offsets, stored.shape[0])
    gemm.check_depth(rows, stored.shape[1 if back else 2])
    kernel = _backend.kernel("packed_rows", rows)
    product = NotImplemented if kernel is None else kernel(rows, stored, offsets, out, back, low, factors, invariant)
    if product is not NotImplemented:
        return product
    if out is None:
        out = rows.new_empty(rows.shape[0], stored.shape[2 if back else 1])
    if not gemm.looped(rows):
        _slice_by_slice(rows, stored, offsets, out, back, low, factors, invariant)
    elif low is not None and factors is not None:
        product = packed_rows(rows, stored, offsets, out, back=back, invariant=invariant)
        gemm.grouped_add(product, low, factors, offsets, invariant=invariant)
    else:
        _expert_by_expert(rows, stored, offsets, out, back, invariant)
    return out


def three(scales: list[Tensor]) -> list[Tensor | None]:
    """Scales as operators take them, which take no lists: the vmap of batched gradients knows none."""
    return [*scales, *[None] * (3 - len(scales))]


def _expert_by_expert(rows: Tensor, stored: Stored, offsets: Tensor, out: Tensor, back: bool, invariant: bool) -> None:
    workspace = rows.new_empty(1, *stored.shape[1:])
    for expert, block in gemm.blocks(offsets, rows.shape[0]):
        weight = unpack(stored, expert, expert + 1, rows.dtype, workspace)[0]
        matrix, end = weight if back else weight.T, offsets.new_tensor([block.stop - block.start])
        if invariant:
            gemm.row_by_row(rows[block], matrix.unsqueeze(0), end, out[block])
        else:
            torch.mm(rows[block], matrix, out=out[block])


def _slice_by_slice(
    rows: Tensor,
    stored: Stored,
    offsets: Tensor,
    out: Tensor,
    back: bool,
    low: Tensor | None,
    factors: Tensor | None,
    invariant: bool,
) -> None:
    num_experts, height, width = stored.shape
    parts = slices(num_experts, height * width * rows.element_size())
    kernel = _backend.kernel("packed_slices", rows)
    given = (rows, stored, offsets, out, back, parts, low, factors, invariant)
    if parts and kernel is not None and kernel(*given) is not NotImplemented:
        return
    workspace = rows.new_empty(max((stop - first for first, stop in parts), default=0), height, width)
    for first, stop in parts:
        weight = unpack(stored, first, stop, rows.dtype, workspace[: stop - first])
        mine = None if factors is None else factors[first:stop]
        gemm.grouped_slice(rows, weight if back else weight.mT, offsets, first, out, low, mine, invariant=invariant)


def slices(num_experts: int, size: int) -> list[tuple[int, int]]:
    """Slices of experts of ``size`` bytes each: as few as fit the workspace, and of one length, or nearly.

    A short one at the end would leave a GPU half empty.
    """
    count = -(-num_experts // max(1, WORKSPACE // max(1, size)))
    ends = [num_experts * place // count for place in range(1, count + 1)]
    return list(zip([0, *ends], ends, strict=False))
