"""Packed weights to dense ones, at the speed of memory: one program a tile."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.kernels.triton import _launch, _packed
from moekit.kernels.triton._packed import scale_tile, weight_tile


@triton.jit(do_not_specialize=["start"])
def _unpack_kernel(
    codes, scales, table, dynamic, nested, shift, out,
    start, height, width, stride_e, stride_a, stride_s, scale_columns, parts,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, FORMAT: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One program unpacks BLOCK_A rows and BLOCK_B columns of an expert."""
    program = tl.program_id(0)
    expert = tl.program_id(1)
    row, column = program // parts * BLOCK_A + tl.arange(0, BLOCK_A), program % parts * BLOCK_B
    scale = scale_tile(
        scales, dynamic, nested, shift, start + expert, row, column, height, stride_s, scale_columns,
        BLOCK_B, FORMAT, SHARE_A, SHARE_B, UNIT,
    )  # fmt: skip
    tile = weight_tile(
        codes, table, scale, start + expert, row, column, height, width, stride_e, stride_a,
        BLOCK_B, True, True, FORMAT, out.dtype.element_ty,
    )  # fmt: skip
    column += tl.arange(0, BLOCK_B)
    place = (expert.to(tl.int64) * height + row)[:, None] * width + column[None, :]
    tl.store(out + place, tile, mask=(row < height)[:, None] & (column < width)[None, :])


def unpack(stored: Any, start: int, stop: int, dtype: torch.dtype, out: Tensor | None) -> Any:
    """``moekit::unpack``: the experts ``start`` to ``stop`` of a packed stack, ``[stop - start, out, in]``."""
    height, width = stored.shape[1:]
    if not _packed.reads(stored) or (out is not None and not out.is_contiguous()):
        return NotImplemented
    out = torch.empty(stop - start, height, width, dtype=dtype, device=stored.codes.device) if out is None else out
    if not _launch.computes(out) or out.numel() == 0:
        return NotImplemented
    config = _launch.tile("unpack", out.device, dtype)
    block_a, block_b = _launch.shape_tile(out.device, width, config)
    parts = _launch.blocks(width, block_b)
    _launch.launch(
        _unpack_kernel, (_launch.blocks(height, block_a) * parts, stop - start),
        *_packed.parts(stored), out, start, height, width, *_packed.sizes(stored), parts,
        BLOCK_A=block_a, BLOCK_B=block_b, **_packed.constants(stored, block_b), enable_fp_fusion=False, config=config,
    )  # fmt: skip
    return out
