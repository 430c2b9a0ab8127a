"""Packed weights to dense ones, at the speed of memory: one program a tile."""

from __future__ import annotations

from collections.abc import Callable
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
    if not _packed.reads(stored) or (out is not None and not out.is_contiguous()):
        return NotImplemented
    shape = (stop - start, *stored.shape[1:])
    out = torch.empty(shape, dtype=dtype, device=stored.codes.device) if out is None else out
    if not _launch.computes(out) or out.numel() == 0:
        return NotImplemented
    unpacking(stored, out)(start, stop, out)
    return out


def unpacking(stored: Any, like: Tensor) -> Callable[[int, int, Tensor], None]:
    """What writes the experts ``start`` to ``stop`` into a contiguous ``[>= stop - start, out, in]``, a tensor as ``like``.

    To be had once for many slices; whatever a launch needs of the weights is there before the first.
    """
    (height, width), device = stored.shape[1:], like.device
    config = _launch.tile("unpack", device, like.dtype)
    block_a, block_b = _launch.shape_tile(device, width, config)
    parts = _launch.blocks(width, block_b)
    programs, tensors, sizes = _launch.blocks(height, block_a) * parts, _packed.parts(stored), _packed.sizes(stored)
    constants = {"BLOCK_A": block_a, "BLOCK_B": block_b, **_packed.constants(stored, block_b), "enable_fp_fusion": False}

    def write(start: int, stop: int, out: Tensor) -> None:
        _launch.launch(
            _unpack_kernel, (programs, stop - start), *tensors, out, start, height, width, *sizes, parts,
            **constants, config=config,
        )  # fmt: skip

    return write
