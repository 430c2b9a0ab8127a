"""Tiles of experts' weights, dense or packed: from codes and scales to values, in registers."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit import _codes
from moekit.kernels.triton import _launch
from moekit.kernels.triton._activation import decode_e4m3

HALVES = ("nf4", "mxfp4")  # two values a byte
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def load_tile(address, row_inside, column_inside, MASK_A: tl.constexpr, MASK_B: tl.constexpr):
    """A tile, 0 where it is masked: what cannot lie outside needs no mask, which narrows loads or costs instructions."""
    if MASK_A and MASK_B:
        x = tl.load(address, mask=row_inside[:, None] & column_inside[None, :], other=0.0)
    elif MASK_A:
        x = tl.load(address, mask=row_inside[:, None], other=0.0)
    elif MASK_B:
        x = tl.load(address, mask=column_inside[None, :], other=0.0)
    else:
        x = tl.load(address)
    return x


@triton.jit
def _powers_of_two(exponent):
    """``2 ** (exponent - 127)`` by the bits of float32: the subnormal number for 0, infinity for 255."""
    bits = exponent.to(tl.int32) << 23
    return tl.where(bits == 0, 1 << 22, bits).to(tl.float32, bitcast=True)


@triton.jit
def scale_tile(
    scales, dynamic, nested, shift, expert, row, start, height, stride_s, scale_columns,
    BLOCK_B: tl.constexpr, FORMAT: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The scales of a tile, in float32: ``[A, BLOCK_B / UNIT]``, 0 outside; of a dense one there are none.

    SHARE_A rows and SHARE_B columns of a matrix have one scale, and so have UNIT columns of a tile, wherever it starts.
    """
    if FORMAT == "dense":
        scale = tl.full([1, 1], 0.0, tl.float32)
    else:
        if UNIT == SHARE_B:
            block = start // SHARE_B + tl.arange(0, BLOCK_B // UNIT)  # seen to be adjacent
        else:
            block = (start + UNIT * tl.arange(0, BLOCK_B // UNIT)) // SHARE_B
        place = expert.to(tl.int64) * stride_s + (row // SHARE_A)[:, None] * scale_columns + block[None, :]
        mask = (row < height)[:, None] & (block < scale_columns)[None, :]
        scale = tl.load(scales + place, mask=mask, other=0.0)
        if FORMAT == "nf4" and scale.dtype == tl.uint8:
            outer = tl.load(nested + place // 256, mask=mask, other=0.0)
            scale = tl.load(dynamic + scale.to(tl.int32)) * outer + tl.load(shift)
        elif scale.dtype == tl.uint8:
            scale = _powers_of_two(scale)
        scale = scale.to(tl.float32)
    return scale


@triton.jit
def _nibbles(byte, BLOCK_B: tl.constexpr, FORMAT: tl.constexpr):
    """Both halves of bytes ``[A, B/2]`` side by side ``[A, B]``; the first of nf4 is the high one."""
    if FORMAT == "nf4":
        both = tl.join(byte >> 4, byte & 15)
    else:
        both = tl.join(byte & 15, byte >> 4)
    return tl.reshape(both, (byte.shape[0], BLOCK_B)).to(tl.int32)


@triton.jit
def _value(code, table, FORMAT: tl.constexpr):
    """What a code stands for before it is scaled, in float32."""
    if FORMAT == "nf4":
        # Not a load for each code: the compiler would take it for one of those to be issued iterations ahead.
        values = tl.load(table + tl.arange(0, 16))
        value = tl.reshape(tl.gather(values, tl.reshape(code, (code.shape[0] * code.shape[1],)), 0), code.shape)
    elif FORMAT == "mxfp4":
        # Exponent and mantissa where float32 has them, and the difference of biases: exact, of the subnormal number too.
        bits = ((code & 7) << 22) | ((code & 8) << 28)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    elif code.dtype == tl.uint8:
        value = decode_e4m3(code)
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def weight_tile(
    codes, table, scale, expert, row, start, height, width, stride_e, stride_a,
    BLOCK_B: tl.constexpr, MASK_A: tl.constexpr, MASK_B: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` and BLOCK_B columns from ``start`` of an expert's matrix ``[height, width]`` as it is stored, in DTYPE.

    ``scale`` is their :func:`scale_tile`. Without a mask all rows, or all columns, must exist.
    """
    address = codes + expert.to(tl.int64) * stride_e + row.to(tl.int64)[:, None] * stride_a
    inside, column = row < height, start + tl.arange(0, BLOCK_B)
    if FORMAT == "nf4" or FORMAT == "mxfp4":
        pair = start // 2 + tl.arange(0, BLOCK_B // 2)
        byte = load_tile(address + pair[None, :], inside, pair < width // 2, MASK_A, MASK_B)
        code = _nibbles(byte, BLOCK_B, FORMAT)
    else:
        code = load_tile(address + column[None, :], inside, column < width, MASK_A, MASK_B)
    if FORMAT == "dense":
        tile = code
    else:
        SCALES: tl.constexpr = scale.shape[1]
        value = tl.reshape(_value(code, table, FORMAT), (row.shape[0], SCALES, BLOCK_B // SCALES)) * scale[:, :, None]
        if FORMAT == "int8":
            value *= 0.007874015748031496  # 1 / 127: a product of its own, as the format has it
        tile = tl.reshape(value, (row.shape[0], BLOCK_B)).to(DTYPE)
    return tile


def reads(stored: Any) -> bool:
    """Whether :func:`weight_tile` reads this packed stack: blocks that lie in one row, contiguous parts."""
    width = stored.shape[2]
    first, *rest = stored.scales
    fits = {
        "nf4": width % 64 == 0 and ((first.dtype is torch.float32 and not rest) or first.dtype is torch.uint8),
        "mxfp4": width % 32 == 0 and first.dtype is torch.uint8,
        "fp8": stored.codes.dtype is torch.float8_e4m3fn and first.dtype in (*_SCALES, torch.float8_e8m0fnu),
        "int8": first.dtype in _SCALES,
    }
    return fits.get(stored.format, False) and all(part.is_contiguous() for part in (stored.codes, *stored.scales))


def parts(stored: Any) -> tuple[Tensor | None, ...]:
    """The tensors that a kernel takes of a packed stack: codes, scales, table, and what undoes double quantisation."""
    codes, (scales, *rest) = stored.codes, stored.scales
    if stored.format == "fp8":
        codes = _launch.float8(codes)
        scales = scales.view(torch.uint8) if scales.dtype is torch.float8_e8m0fnu else scales
    table = _codes.table("nf4", codes.device) if stored.format == "nf4" else None
    nested = (_codes.dynamic_table(codes.device), *rest) if rest else (None, None, None)
    return codes, scales, table, *nested


def sizes(stored: Any) -> tuple[int, ...]:
    """Strides of an expert and of a row of codes, and of an expert and of a row of scales."""
    scales = stored.scales[0]
    across = blocks_across(stored.shape[2], stored.block[1])
    return *stored.codes.stride()[:2], scales[0].numel() if scales.shape[0] else 0, across


def blocks_across(width: int, share: int) -> int:
    """How many scales a row of ``width`` values has."""
    return _launch.blocks(width, share)


def constants(stored: Any, block_b: int) -> dict[str, Any]:
    """The constants of :func:`scale_tile` for tiles of ``block_b`` columns that start at multiples of it."""
    down, across = stored.block
    across = _launch.power_of_two(across) if across >= stored.shape[2] else across
    return {"FORMAT": stored.format, "SHARE_A": down, "SHARE_B": across, "UNIT": math.gcd(block_b, across)}
