"""Tiles of gate and up: reading, writing, and which rows count."""

from __future__ import annotations

import triton
import triton.language as tl

from moekit.kernels.triton._activation import activate, decode_e4m3


@triton.jit
def block_and_part(parts):
    """The block of rows of a program and which part of their columns: parts of the same rows are neighbours in time."""
    program = tl.program_id(0)
    return program // parts, program % parts


@triton.jit
def rows_end(offsets, num_experts, num_rows):
    """The row at which the experts' rows end; what lies behind belongs to none and is never read."""
    end = num_rows
    if offsets is not None:
        # In range before it is cut to 32 bits, which could make any number of it.
        end = tl.minimum(tl.maximum(tl.load(offsets + num_experts - 1), 0), num_rows).to(tl.int32)
    return end


@triton.jit
def per_row(values, row, inside):
    """One float32 number a row, 0 outside. Not to be called with None: Triton 3.6 cannot return it."""
    return tl.load(values + row, mask=inside, other=0).to(tl.float32)


@triton.jit
def bias_rows(rows, offsets, num_experts, BIAS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The row of the bias for each row: one for all, its own, or its expert's (the number of ends at or before it).

    A row before the last end has one of the experts, whatever the others say.
    """
    if BIAS == "expert":
        expert = tl.arange(0, BLOCK_E)
        end = tl.load(offsets + expert, mask=expert < num_experts, other=0x7FFFFFFF)
        found = tl.sum((end[None, :] <= rows[:, None]).to(tl.int32), axis=1)
    elif BIAS == "row":
        found = rows
    else:
        found = rows * 0
    return found


@triton.jit
def load_pair(source, row, stride, start, width, inside, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr):
    """Gate and up of columns ``start`` onwards, in float32, zero outside; an ungated row is all gate.

    ``source`` may hold float8 e4m3, or its bits in uint8.
    """
    BLOCK_R: tl.constexpr = row.shape[0]
    address = source + row.to(tl.int64)[:, None] * stride
    if LAYOUT == "interleaved":
        column = 2 * start + tl.arange(0, 2 * BLOCK_C)
        mask = inside[:, None] & (column < 2 * width)[None, :]
        both = _as_float32(tl.load(address + column[None, :], mask=mask, other=0.0))
        gate, up = tl.split(tl.reshape(both, (BLOCK_R, BLOCK_C, 2)))
    else:
        column = start + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (column < width)[None, :]
        gate = _as_float32(tl.load(address + column[None, :], mask=mask, other=0.0))
        up = gate
        if LAYOUT == "concatenated":
            up = _as_float32(tl.load(address + width + column[None, :], mask=mask, other=0.0))
    return gate, up


@triton.jit
def _as_float32(x):
    if x.dtype == tl.uint8:
        value = decode_e4m3(x)
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def store_pair(target, gate, up, row, stride, start, width, inside, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write what :func:`load_pair` reads."""
    BLOCK_R: tl.constexpr = row.shape[0]
    address = target + row.to(tl.int64)[:, None] * stride
    if LAYOUT == "interleaved":
        column = 2 * start + tl.arange(0, 2 * BLOCK_C)
        mask = inside[:, None] & (column < 2 * width)[None, :]
        tl.store(address + column[None, :], tl.reshape(tl.join(gate, up), (BLOCK_R, 2 * BLOCK_C)), mask=mask)
    else:
        column = start + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (column < width)[None, :]
        tl.store(address + column[None, :], gate, mask=mask)
        if LAYOUT == "concatenated":
            tl.store(address + width + column[None, :], up, mask=mask)


@triton.jit
def finish_pair(
    gate, up, bias, row, stride, start, width, inside, clamp,
    LAYOUT: tl.constexpr, CLAMP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add the bias and clamp, in the order that ``CLAMP`` says; also where the clamp let gate and up through."""
    gate_bias, up_bias = 0.0, 0.0
    if bias is not None:
        gate_bias, up_bias = load_pair(bias, row, stride, start, width, inside, LAYOUT, BLOCK_C)
    return bounded_pair(gate, up, gate_bias, up_bias, clamp, bias is not None, CLAMP)


@triton.jit
def bounded_pair(gate, up, gate_bias, up_bias, clamp, BIASED: tl.constexpr, CLAMP: tl.constexpr):
    """:func:`finish_pair` with the bias at hand."""
    if BIASED:
        if CLAMP != "before_bias":
            gate += gate_bias
            up += up_bias
    gate_inside, up_inside = gate <= clamp, tl.abs(up) <= clamp
    if CLAMP != "none":
        # Comparisons let a NaN through, as torch.clamp does and tl.clamp does not.
        gate = tl.where(gate > clamp, clamp, gate)
        up = tl.where(up > clamp, clamp, tl.where(up < -clamp, -clamp, up))
    if CLAMP == "before_bias":
        if BIASED:
            gate += gate_bias
            up += up_bias
    return gate, up, gate_inside, up_inside


@triton.jit
def times(act, up, other, LAYOUT: tl.constexpr):
    """``act * up * other``, the gate last: it may be so large that its product with one of them is not finite.

    ``up`` does not count for an ungated row, nor ``other``, one number a row or a tile, if it is None.
    """
    product = act
    if LAYOUT != "ungated":
        if other is None:
            product = act * up
        elif len(other.shape) == 1:
            product = act * (up * other[:, None])
        else:
            product = act * (up * other)
    elif other is not None:
        if len(other.shape) == 1:
            product = act * other[:, None]
        else:
            product = act * other
    return product


@triton.jit
def through_gate(
    gate, up, weights, bias, expert, row, column, end, inner, stride_bias, c1, c3, linear_offset, clamp,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What comes through the gate of an expert's rows ``row`` up to ``end``, columns ``column``; gate and up are rounded."""
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    gate_bias, up_bias = 0.0, 0.0
    if bias is not None:
        of_expert = bias + expert.to(tl.int64) * stride_bias
        place = column * 2 if LAYOUT == "interleaved" else column
        gate_bias = tl.load(of_expert + place, mask=column < inner, other=0.0).to(tl.float32)[None, :]
        if LAYOUT != "ungated":
            next_half = 1 if LAYOUT == "interleaved" else inner
            up_bias = tl.load(of_expert + place + next_half, mask=column < inner, other=0.0).to(tl.float32)[None, :]
    gate, up, _, _ = bounded_pair(gate, up, gate_bias, up_bias, clamp, bias is not None, CLAMP)
    weight = weights
    if weights is not None:
        weight = tl.load(weights + row, mask=row < end, other=0.0).to(tl.float32)
    return times(activate(gate, c1, c3, ACT, FAST), up + linear_offset, weight, LAYOUT)
