"""The gated activations, forward and backward: one kernel each, specialised by constants.

Rows are worked through in strips. A strip's results go to memory directly, or (``streaming``) to a tile in the
first-level cache and from there past the caches to memory. What comes a thousand elements later is prefetched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from moekit.kernels.numba._activations import act, act_and_slope, clamp
from moekit.kernels.numba._bits import (
    add_f32,
    bits_of,
    fence,
    float_of,
    plus,
    prefetch,
    read_f32,
    read_i64,
    scratch,
    stream,
    wide_vectors,
    write_f32,
    zero,
)
from moekit.kernels.numba._elements import E4M3, F32, NONE, SIZES, load, store
from moekit.kernels.numba._jit import inline, kernel
from moekit.kernels.numba._launch import Nonsense

CONCATENATED, INTERLEAVED, UNGATED = range(3)
NO_CLAMP, CLAMP_BEFORE_BIAS, CLAMP_AFTER_BIAS = range(3)
NO_SUM, SUM_ROWS, KEEP_ROWS = range(3)  # what becomes of the bias gradient
# Bias gradients are summed within blocks of this many rows, then over blocks: the same bits for any number of threads.
BLOCK = 256

_STRIP = 128  # elements, at most
_STRIP_BYTES = 256
_TILE = 3 * 4 * _STRIP  # bytes: the results of a strip, both gradients and the output
_AHEAD = 1024  # elements; 512 come too late, and 2048 bfloat16 fall on the same set of the first-level cache
_LINE = 64
_F, _U = np.float32, np.uint32
_ONE, _ZERO, _INFINITY = _F(1.0), _F(0.0), _F(np.inf)
_F8_LIMIT = _F(1.875 * 2.0**127)  # what is larger would come back from float8 as 2**128: Inf


@inline
def fetch(address, count, size):
    """Prefetch ``count`` elements of ``size`` bytes ahead of their turn."""
    for line in range(0, count * size, _LINE):
        prefetch(address + _AHEAD * size, line)


@inline
def fetch_halves(gate, to_up, strip, step, size):
    """:func:`fetch` a strip of the gate, and of the up half where it lies elsewhere; ``to_up`` of 0: there is none."""
    fetch(gate, strip * step, size)
    if to_up > 0 and step == 1:
        fetch(gate + to_up * size, strip, size)


@inline
def turn_of(width, halves, step):
    """Where in a row what is ``_AHEAD`` elements on is no more of the same half, but of the other, whose turn is another.

    Rows narrower than that are left as they are: there all of a row comes soon.
    """
    apart = halves == 2 and step == 1
    return width - _AHEAD if apart and width > _AHEAD else width


@inline
def clear(address, first, stop, size):
    """Zero the rows ``[first, stop)`` of ``size`` bytes each, of what is not wanted (address 0) none."""
    if address and first < stop:
        zero(address + first * size, (stop - first) * size)


@inline
def expert_rows(offsets, experts, stop, rows):
    """Where the rows that belong to an expert end, if the offsets ascend within the ``rows`` there are."""
    if offsets == 0:
        return stop
    before = 0
    for expert in range(experts):
        end = read_i64(offsets, expert)
        if end < before or end > rows:
            raise Nonsense
        before = end
    return min(stop, before)


@inline
def owner(offsets, row, expert):
    """The expert of a row, looking onwards from the last row's."""
    while row >= read_i64(offsets, expert):
        expert += 1
    return expert


@inline
def admit(x, bias, low, high, order):
    """A half after bias and clamp, and whether the clamp let it through."""
    if order == NO_CLAMP:
        return x + bias, True
    if order == CLAMP_AFTER_BIAS:
        x += bias
        return clamp(x, low, high), low <= x <= high
    return clamp(x, low, high) + bias, low <= x <= high


@inline
def sums_of_block(sums, row, expert, size, last):
    """The sums of the block that a row is in, ``size`` bytes: zeroed if they are not those of the ``last`` row."""
    found = sums + (row // BLOCK + expert) * size
    if found != last:
        zero(found, size)
    return found


@inline
def stream_halves(gate, up, target, to_up, step, size):
    """:func:`stream` the ``size`` bytes of a strip's gate, or with ``step`` 2 both halves in turns, and else the up half."""
    stream(gate, target, size * step)
    if to_up > 0 and step == 1:
        stream(up, target + to_up, size)


@functools.cache
def forward_kernel(element: int, bias_element: int, kind: int, order: int, layout: int) -> Callable:
    """``out = weight * act(gate) * (up + shift)``."""
    size, bias_size = SIZES[element], SIZES[bias_element]
    strip = min(_STRIP, _STRIP_BYTES // size)
    gated, step = layout != UNGATED, 2 if layout == INTERLEAVED else 1
    halves = 2 if gated else 1
    has_bias = bias_element != NONE

    @kernel(element, bias_element, kind, order, layout)
    def forward(
        start: int, stop: int, rows: int, y: int, weights: int, bias: int, bias_step: int, offsets: int, experts: int,
        out: int, width: int, c1: float, c3: float, shift: float, limit: float, streaming: int,
    ):  # fmt: skip
        features, to_up = width * halves, 1 if step == 2 else width
        turn = turn_of(width, halves, step)
        expert, end = 0, expert_rows(offsets, experts, stop, rows)
        tile = scratch(_TILE)
        if element == F32:  # LLVM takes them by itself where elements are half as wide
            wide_vectors()

        def work(gate, gate_bias, target, weight, count):
            up, up_bias = gate + to_up * size, gate_bias + to_up * bias_size
            for j in range(count):
                at = j * step
                a, _ = admit(load(element, gate, at), load(bias_element, gate_bias, at), -_INFINITY, limit, order)
                factor = weight
                if gated:
                    b, _ = admit(load(element, up, at), load(bias_element, up_bias, at), -limit, limit, order)
                    factor *= b + shift
                # The gate last: its product with one of the factors may not be finite where that with both is.
                store(element, target, j, act(kind, a, c1, c3) * factor)

        for row in range(start, end):
            weight = read_f32(weights, row) if weights else _ONE
            if has_bias and offsets:
                expert = owner(offsets, row, expert)
            y_row, out_row = y + row * features * size, out + row * width * size
            bias_row = bias + (expert if offsets else row) * bias_step
            for first in range(0, width, strip):
                gate, gate_bias = y_row + first * step * size, bias_row + first * step * bias_size
                fetch_halves(gate + (width * size if first >= turn else 0), to_up if gated else 0, strip, step, size)
                direct = out_row + first * size
                target = tile if streaming else direct
                count = min(strip, width - first)
                if count == strip:  # a constant count makes better code
                    work(gate, gate_bias, target, weight, strip)
                else:
                    work(gate, gate_bias, target, weight, count)
                if streaming:
                    stream(tile, direct, count * size)
        clear(out, max(start, end), stop, width * size)
        fence()

    return forward


@functools.cache
def backward_kernel(
    element: int, grad_element: int, bias_element: int, kind: int, order: int, layout: int, bias_sum: int, emit: bool
) -> Callable:
    """Gradients of y, weights and bias, and the forward's output again (``emit``).

    An address of 0 is not written to. ``SUM_ROWS`` leaves float32 sums of blocks, see :func:`sum_blocks_kernel`.
    """
    size, bias_size, grad_size = SIZES[element], SIZES[bias_element], SIZES[grad_element]
    out_element = grad_element if element == E4M3 else element
    out_size = SIZES[out_element]
    strip = min(_STRIP, _STRIP_BYTES // size)
    again_element = out_element if emit else NONE
    kept_element = bias_element if bias_sum == KEEP_ROWS else NONE
    sum_size = 4 if bias_sum == SUM_ROWS else SIZES[kept_element]
    gated, step = layout != UNGATED, 2 if layout == INTERLEAVED else 1
    halves = 2 if gated else 1
    has_bias = bias_element != NONE

    @kernel(element, grad_element, bias_element, kind, order, layout, bias_sum, emit)
    def backward(
        start: int, stop: int, rows: int, grad: int, y: int, scales: int, weights: int, bias: int, bias_step: int,
        offsets: int, experts: int, dy: int, dweights: int, dbias: int, again: int, width: int,
        c1: float, c3: float, shift: float, limit: float, streaming: int,
    ):  # fmt: skip
        features, to_up = width * halves, 1 if step == 2 else width
        turn = turn_of(width, halves, step)
        expert, sum_row, end = 0, 0, expert_rows(offsets, experts, stop, rows)
        tile = scratch(_TILE)
        wide_vectors()
        in_tile = 1 if step == 2 else strip  # elements from the gate's gradient to the up half's
        buffered = streaming or dy == 0

        def work(grads, gate, gate_bias, dgate, dup, repeated, gate_sum, weight, scale, count):
            up, up_bias, up_sum = gate + to_up * size, gate_bias + to_up * bias_size, gate_sum + to_up * sum_size
            dweight = _ZERO
            for j in range(count):
                at = j * step
                g = load(grad_element, grads, j)
                gate_j = load(element, gate, at) * scale
                a, a_in = admit(gate_j, load(bias_element, gate_bias, at), -_INFINITY, limit, order)
                value, slope = act_and_slope(kind, a, c1, c3)
                lifted, b_in = _ONE, True
                if gated:
                    up_j = load(element, up, at) * scale
                    b, b_in = admit(up_j, load(bias_element, up_bias, at), -limit, limit, order)
                    lifted = b + shift
                da, db = g * weight * lifted * slope, g * weight * value
                dweight = plus(dweight, value * (lifted * g))
                past_a, past_b = da if a_in else _ZERO, db if b_in else _ZERO
                if order == CLAMP_AFTER_BIAS:
                    da, db = past_a, past_b
                store(out_element, dgate, at, past_a)
                store(kept_element, gate_sum, at, da)
                store(again_element, repeated, j, value * (lifted * weight))
                if bias_sum == SUM_ROWS:
                    add_f32(gate_sum, at, da)
                if gated:
                    store(out_element, dup, at, past_b)
                    store(kept_element, up_sum, at, db)
                    if bias_sum == SUM_ROWS:
                        add_f32(up_sum, at, db)
            return dweight

        for row in range(start, end):
            weight = read_f32(weights, row) if weights else _ONE
            scale = read_f32(scales, row) if element == E4M3 else _ONE
            if has_bias and offsets:
                expert = owner(offsets, row, expert)
            y_row, grad_row = y + row * features * size, grad + row * width * grad_size
            dy_row, again_row = dy + row * features * out_size, again + row * width * out_size
            bias_row = bias + (expert if offsets else row) * bias_step
            if bias_sum == SUM_ROWS:
                sum_row = sums_of_block(dbias, row, expert, features * sum_size, sum_row)
            else:
                sum_row = dbias + row * features * sum_size
            dweight = _ZERO
            for first in range(0, width, strip):
                grads = grad_row + first * grad_size
                gate, gate_bias = y_row + first * step * size, bias_row + first * step * bias_size
                fetch(grads, strip, grad_size)
                fetch_halves(gate + (width * size if first >= turn else 0), to_up if gated else 0, strip, step, size)
                dgate = tile if buffered else dy_row + first * step * out_size
                dup = dgate + (in_tile if buffered else to_up) * out_size
                repeated = tile + 2 * strip * out_size if streaming else again_row + first * out_size
                gate_sum = sum_row + first * step * sum_size
                count = min(strip, width - first)
                if count == strip:
                    dweight += work(grads, gate, gate_bias, dgate, dup, repeated, gate_sum, weight, scale, strip)
                else:
                    dweight += work(grads, gate, gate_bias, dgate, dup, repeated, gate_sum, weight, scale, count)
                if streaming:
                    to_up_gradient = width * out_size if gated else 0
                    stream_halves(dgate, dup, dy_row + first * step * out_size, to_up_gradient, step, count * out_size)
                    if emit:
                        stream(repeated, again_row + first * out_size, count * out_size)
            if dweights:
                write_f32(dweights, row, dweight)
        first = max(start, end)
        clear(dy, first, stop, features * out_size)
        clear(dweights, first, stop, 4)
        if bias_sum == KEEP_ROWS:
            clear(dbias, first, stop, features * sum_size)
        if emit:
            clear(again, first, stop, width * out_size)
        fence()

    return backward


@functools.cache
def sum_blocks_kernel() -> Callable:
    """The bias gradient ``[experts, features]`` from the sums of blocks, added in order.

    A block that several experts share has a sum for each: ``block + expert`` numbers them, as either one grows with the
    rows. Without offsets there is one expert with ``rows`` rows.
    """

    @kernel()
    def sum_blocks(start: int, stop: int, sums: int, offsets: int, rows: int, features: int, out: int):
        for expert in range(start, stop):
            begin = read_i64(offsets, expert - 1) if offsets and expert > 0 else 0
            end = min(rows, read_i64(offsets, expert)) if offsets else rows
            target = out + expert * features * 4
            zero(target, features * 4)
            if begin < end:
                for block in range(begin // BLOCK, (end - 1) // BLOCK + 1):
                    source = sums + (block + expert) * features * 4
                    for j in range(features):
                        add_f32(target, j, read_f32(source, j))

    return sum_blocks


@functools.cache
def store_fp8_kernel(element: int) -> Callable:
    """Rows as float8 e4m3 with a power-of-two scale each, so that the largest magnitude lies in (224, 448]."""
    size = SIZES[element]

    @kernel(element)
    def store_fp8(start: int, stop: int, y: int, kept: int, scales: int, features: int):
        for row in range(start, stop):
            y_row, kept_row = y + row * features * size, kept + row * features
            largest = np.int32(0)  # as bits, whose order is that of the magnitudes; NaN is above all
            for j in range(features):
                magnitude = np.int32(bits_of(load(element, y_row, j)) & _U(0x7FFFFFFF))
                largest = magnitude if magnitude > largest else largest
            exponent = np.int64(largest >> 23) - 8  # biased, as in the bits of a float32
            if (largest & 0x7FFFFF) > 0x600000:  # 448 is 1.75 * 2**8
                exponent += 1
            exponent = max(exponent, 1)
            if largest == 0 or largest >= 0x7F800000:
                exponent = 127
            write_f32(scales, row, float_of(_U(exponent << 23)))
            inverse = float_of(_U((254 - exponent) << 23))
            for j in range(features):
                x = load(element, y_row, j)
                x = _F8_LIMIT if x > _F8_LIMIT else x
                x = -_F8_LIMIT if x < -_F8_LIMIT else x
                store(E4M3, kept_row, j, x * inverse)

    return store_fp8
