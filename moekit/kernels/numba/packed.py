"""Launchers of ``unpack`` and ``packed_rows``: packed weights to elements, and products with few rows an expert.

A stack comes as :class:`moekit.ops.unpack.Stored`, whose module says what its parts are. What the kernels do not take is
left to the reference: products with nf4 whose blocks lie in two rows, blocks of fp8 that are not made of whole tiles.
Elements are the reference's, bit for bit, but for bfloat16 that is subnormal.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit._codes import NESTED_BLOCK, NF4_BLOCK, dynamic_table, powers_of_two, table
from moekit.kernels.numba import _packed_kernels as kernels
from moekit.kernels.numba._bits import HARDWARE_F16
from moekit.kernels.numba._elements import NONE, SIZES
from moekit.kernels.numba._gemm_kernels import FEATURES
from moekit.kernels.numba._launch import address, dense, streams
from moekit.kernels.numba._threads import run
from moekit.kernels.numba._tiles import TILE
from moekit.kernels.numba._units import FP8, INT8, MXFP4, NESTED, NF4, PAIRS, Scales
from moekit.kernels.numba.gemm import Stack, element_of, few, fits, multiply

# Up to here a product by PyTorch with what has been unpacked takes longer: its bfloat16 products are the fastest, and fp8's
# codes take the most instructions.
_FEW, _FEW_BF16, _FEW_BF16_FP8 = 16, 8, 4
# A matrix is multiplied with as soon as it is unpacked: up to this size from the cache, which makes that 1.6 times as fast.
_OUTGROWS_CACHE = 1 << 24
_ALL = 62  # the logarithm of more columns than there are: a scale a row
_NUMBERS = {"nf4": NF4, "mxfp4": MXFP4, "fp8": FP8, "int8": INT8}
_CODES = {NF4: torch.uint8, NESTED: torch.uint8, MXFP4: torch.uint8, FP8: torch.float8_e4m3fn, INT8: torch.int8}
_CPU = torch.device("cpu")
_Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class _Packed(NamedTuple):
    """A stack as kernels see it: ``height`` rows an expert, of ``width`` elements each."""

    format: int
    height: int
    width: int
    row_step: int  # bytes of the codes of a row
    scales: array  # of integers, in the order of Scales
    tensors: _Tensors  # what these are addresses of


def unpack(stored: Any, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Any:
    """See :func:`moekit.ops.unpack.unpack`."""
    element = element_of(dtype)
    packed = None if element == NONE else _seen(stored, dtype)
    if packed is None:
        return NotImplemented
    shape = (stop - start, *stored.shape[1:])
    out = torch.empty(shape, dtype=dtype) if out is None else out
    past = streams(out, packed.width * SIZES[element], _OUTGROWS_CACHE) if packed.width % TILE == 0 else 0
    run(
        kernels.unpack_kernel(element, packed.format), shape[0] * packed.height, out.nbytes,
        stored.codes.data_ptr() + start * packed.height * packed.row_step, packed.row_step,
        packed.scales.buffer_info()[0], start * packed.height, out.data_ptr(), packed.width, past,
    )  # fmt: skip
    return out


def packed_rows(
    rows: Tensor,
    stored: Any,
    offsets: Tensor,
    out: Tensor | None = None,
    back: bool = False,
    low: Tensor | None = None,
    factors: Tensor | None = None,
    invariant: bool = False,
) -> Any:
    """See :func:`moekit.ops.packed_products.packed_rows`, to which many rows an expert and updates are left.

    With ``invariant`` many rows are not, as in :func:`moekit.kernels.numba.gemm.grouped_rows`.
    """
    if low is not None or factors is not None:
        return NotImplemented
    num_experts, height, width = stored.shape
    if element_of(rows.dtype) == NONE or not fits(rows, offsets, out, num_experts, height if back else width):
        return NotImplemented
    limit = _FEW if rows.dtype is not torch.bfloat16 else _FEW_BF16_FP8 if stored.format == "fp8" else _FEW_BF16
    packed = _seen(stored, rows.dtype) if invariant or few(rows, offsets, limit) else None
    down = stored.block[0]
    together = down == 1 or down >= height or down % FEATURES == 0  # the rows of a tile have scales of their own, or one
    if packed is None or packed.width != width or not together:
        return NotImplemented
    expert_step, scales = height * packed.row_step, packed.scales.buffer_info()[0]
    stack = Stack(stored.codes.data_ptr(), expert_step, packed.row_step, packed.format, scales, height)
    return multiply(rows, stack, offsets, out, width if back else height, back)


def _seen(stored: Any, dtype: torch.dtype) -> _Packed | None:
    """None: a form that kernels do not take, or parts that do not fit together."""
    format = NESTED if len(stored.scales) == 3 else _NUMBERS[stored.format]
    (num_experts, height, width), (down, columns) = stored.shape, stored.block
    if format in (NF4, NESTED) and width % NF4_BLOCK:
        height, width = height * width // NF4_BLOCK, NF4_BLOCK  # the same bytes, a block a row
    whole = columns >= width
    if format == FP8 and not (HARDWARE_F16 and (whole or (columns >= TILE and columns.bit_count() == 1))):
        return None
    tall, across = -(-height // down), -(-width // max(1, columns))
    tensors = _tensors(stored, format, dtype)
    if tensors is None or tensors[0].numel() != num_experts * tall * across or not stored.codes.numel():
        return None
    shift = _ALL if whole else columns.bit_length() - 1
    words = Scales._make([*map(address, tensors), height, down, tall, across, shift])
    return _Packed(format, height, width, width // 2 if PAIRS[format] else width, array("q", words), tensors)


def _tensors(stored: Any, format: int, dtype: torch.dtype) -> _Tensors | None:
    """The scales, and what kernels find by them: see :class:`moekit.kernels.numba._units.Scales`."""
    codes, (first, *nested) = stored.codes, stored.scales
    if codes.dtype is not _CODES[format] or not codes.is_contiguous():
        return None
    if format not in (NESTED, MXFP4):
        return dense(first, torch.float32), None, None, None
    if first.dtype is not torch.uint8:
        return None
    if format == MXFP4:
        return dense(first), _exponents(dtype), None, None
    groups, offset = (dense(scale, torch.float32) for scale in nested)
    known = groups.numel() * NESTED_BLOCK >= first.numel() and offset.numel() == 1
    return (dense(first), dynamic_table(_CPU), groups, offset) if known else None


@functools.cache
def _exponents(dtype: torch.dtype) -> Tensor:
    """The values of mxfp4's 16 codes for each exponent: ``[256, 16]``."""
    return (table("mxfp4", _CPU) * powers_of_two(torch.arange(256, device=_CPU)).unsqueeze(1)).to(dtype)
