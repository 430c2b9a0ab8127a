"""The gated activations forward, with or without a float8 copy of the input."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit import _check
from moekit.kernels.triton import _launch
from moekit.kernels.triton._activation import ACTIVATIONS, activate, e4m3_scale, encode_e4m3
from moekit.kernels.triton._halves import (
    bias_rows,
    block_and_part,
    finish_pair,
    load_pair,
    per_row,
    rows_end,
    store_pair,
    times,
)


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _glu_kernel(
    y, weights, bias, offsets, out, stored, scales,
    num_rows, width, num_experts, parts, y_stride, bias_stride, c1, c3, linear_offset, clamp,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, CLAMP: tl.constexpr, BIAS: tl.constexpr, MULTIPLE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One program takes STEPS blocks of columns of BLOCK_R rows.

    The steps are unrolled: in a loop ptxas lets the load of up wait for the gate to arrive.
    """
    if MULTIPLE > 1:
        width = tl.multiple_of(width, MULTIPLE)
        y_stride = tl.multiple_of(y_stride, MULTIPLE)
        bias_stride = tl.multiple_of(bias_stride, MULTIPLE)
    block, part = block_and_part(parts)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < num_rows
    inside = row < rows_end(offsets, num_experts, num_rows)
    bias_row = bias_rows(row, offsets, num_experts, BIAS, BLOCK_E)
    weight = weights
    if weights is not None:
        weight = per_row(weights, row, inside)
    largest = tl.zeros([BLOCK_R], tl.int32)
    for step in tl.static_range(STEPS):
        start = (part + step) * BLOCK_C
        gate, up = load_pair(y, row, y_stride, start, width, inside, LAYOUT, BLOCK_C)
        if stored is not None:
            largest = tl.maximum(largest, tl.maximum(_largest_bits(gate), _largest_bits(up)))
        opened, other, _, _ = finish_pair(
            gate, up, bias, bias_row, bias_stride, start, width, inside, clamp, LAYOUT, CLAMP, BLOCK_C
        )
        value = times(activate(opened, c1, c3, ACT, FAST), other + linear_offset, weight, LAYOUT)
        store_pair(out, value, value, row, width, start, width, exists, "ungated", BLOCK_C)
    if stored is not None:
        scale, inverse = e4m3_scale(largest)
        tl.store(scales + row, scale, mask=exists)
        rare = tl.max(largest, axis=0) > 0x7F700000  # 1.875 * 2**127, Inf and NaN included
        stride = width if LAYOUT == "ungated" else 2 * width
        for step in tl.static_range(STEPS):
            start = step * BLOCK_C
            if STEPS > 1:  # the row again, from the cache
                gate, up = load_pair(y, row, y_stride, start, width, inside, LAYOUT, BLOCK_C)
            gate *= inverse[:, None]
            up *= inverse[:, None]
            if rare:
                gate, up = _storable(gate, inverse), _storable(up, inverse)
            gate, up = encode_e4m3(gate, stored), encode_e4m3(up, stored)
            store_pair(stored, gate, up, row, stride, start, width, exists, LAYOUT, BLOCK_C)


@triton.jit
def _largest_bits(x):
    """The largest magnitude of each row as float32 bits: ordered as numbers are, with NaN above all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _storable(x, inverse):
    """``x``, a scaled number of a row that holds very large ones, below what would come back from float8 as 2**128: Inf."""
    LIMIT: tl.constexpr = 3.1901471898837980e38  # 1.875 * 2**127
    limit = (LIMIT * inverse)[:, None]
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


LAYOUTS = {"concatenated": "concatenated", "interleaved": "interleaved", "ungated": "ungated"}


def gate_constants(
    bias: Tensor | None, act: str, clamp: float | None, clamp_after_bias: bool, layout: str
) -> dict[str, Any]:
    """The constants that say what a gate is, for any kernel that has one."""
    return {
        "ACT": _check.known("the triton kernels", "activation", act, ACTIVATIONS),
        "LAYOUT": _check.known("the triton kernels", "layout", layout, LAYOUTS),
        "CLAMP": "none" if clamp is None else "after_bias" if clamp_after_bias or bias is None else "before_bias",
    }


def describe(
    y: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    act: str,
    clamp: float | None,
    clamp_after_bias: bool,
    layout: str,
) -> dict[str, Any]:
    """The constants of the kernels that follow from the operator's arguments."""
    kind = "none" if bias is None else "shared" if bias.dim() == 1 else "row" if offsets is None else "expert"
    width = y.shape[1] if layout == "ungated" else y.shape[1] // 2
    strides = (y.stride(0), 0 if bias is None else row_stride(bias))
    return {
        **gate_constants(bias, act, clamp, clamp_after_bias, layout),
        "BIAS": kind,
        "MULTIPLE": _launch.multiple(width, *strides),
        "BLOCK_E": _launch.power_of_two(1 + (0 if offsets is None else offsets.shape[0])),
    }


def row_stride(bias: Tensor | None) -> int:
    """How far apart the bias's rows lie; 0 for a single one."""
    return 0 if bias is None or bias.dim() == 1 else bias.stride(0)


def tidy_bias(bias: Tensor | None) -> Tensor | None:
    """The bias with adjacent features."""
    return bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()


def leaves(y: Tensor, bias: Tensor | None, offsets: Tensor | None, *tensors: Tensor | None) -> bool:
    """Whether the operator is left to the reference: another dtype, no expert at all, or rows past int32.

    So are wrong offsets, where values may be looked at: the reference refuses them.
    """
    if offsets is not None:
        if offsets.dim() != 1 or offsets.shape[0] == 0 or offsets.dtype not in (torch.int32, torch.int64):
            return True
        if bias is not None and bias.shape[0] != offsets.shape[0]:
            return True
        _check.offsets("glu", offsets, y.shape[0])
    return not _launch.computes(*tensors) or y.shape[0] >= 2**31


def glu(
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    act: str,
    c1: float,
    c3: float,
    linear_offset: float,
    clamp: float | None,
    clamp_after_bias: bool,
    layout: str,
) -> Any:
    """``moekit::glu``."""
    if leaves(y, bias, offsets, y, weights, bias):
        return NotImplemented
    constants = (act, c1, c3, linear_offset, clamp, clamp_after_bias, layout)
    return _run(y, weights, bias, offsets, None, None, *constants)


def glu_fp8(y: Tensor, weights: Tensor | None, bias: Tensor | None, offsets: Tensor | None, *constants: Any) -> Any:
    """``moekit::glu_fp8``: also the rows in float8 e4m3 and their scales."""
    if leaves(y, bias, offsets, y, weights, bias):
        return NotImplemented
    stored = torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=y.device)
    scales = torch.empty(y.shape[0], dtype=torch.float32, device=y.device)
    return _run(y, weights, bias, offsets, stored, scales, *constants), stored, scales


def _run(
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    stored: Tensor | None,
    scales: Tensor | None,
    act: str,
    c1: float,
    c3: float,
    linear_offset: float,
    clamp: float | None,
    clamp_after_bias: bool,
    layout: str,
) -> Tensor:
    y, bias = _launch.rows_of(y), tidy_bias(bias)
    num_rows, width = y.shape[0], y.shape[1] if layout == "ungated" else y.shape[1] // 2
    out = torch.empty(num_rows, width, dtype=y.dtype, device=y.device)
    if stored is None:
        config = _launch.tile("glu", y.device, y.dtype)
        block_r, block_c = _launch.shape_tile(y.device, width, config)
        parts, steps = _launch.blocks(width, block_c), 1
    else:  # a float8 row needs its maximum first, so one program must see all of it
        config = _launch.tile("glu_fp8", y.device, y.dtype)
        block_r, block_c, config = _launch.whole_rows(y.device, width, config)
        parts, steps = 1, _launch.blocks(width, block_c)
    _launch.launch(
        _glu_kernel,
        (_launch.blocks(num_rows, block_r) * parts,),
        y, _launch.dense(weights), bias, _launch.dense(offsets),
        out, stored if stored is None else _launch.float8(stored), scales,
        num_rows, width, 0 if offsets is None else offsets.shape[0], parts, y.stride(0), row_stride(bias),
        c1, c3 or None, linear_offset, 0.0 if clamp is None else clamp,
        STEPS=steps, BLOCK_R=block_r, BLOCK_C=block_c, FAST=_launch.approximates(y.device), config=config,
        **describe(y, bias, offsets, act, clamp, clamp_after_bias, layout),
    )  # fmt: skip
    return out
