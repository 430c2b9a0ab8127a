"""Products of few rows an expert with its matrix: each matrix is read once, at the speed of memory.

A range of a kernel is a range of output features, of every expert: no sum is split between threads. Up to four rows of an
expert are multiplied with a part of the matrix at a time, as fast as it is read; further rows find that part in the cache.
There is a kernel for either way a matrix is stored, and for each format. Columns beyond whole blocks (of formats without
pairs) are copied to where zeros follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from moekit.kernels.numba._bits import ZEN, copy, read_back_f32, read_i32, scratch, wide_vectors, zero
from moekit.kernels.numba._elements import BF16, SIZES, store
from moekit.kernels.numba._jit import inline, kernel
from moekit.kernels.numba._launch import Nonsense
from moekit.kernels.numba._tiles import COLUMNS, PANEL, STEPS, TILE, axpys, dots
from moekit.kernels.numba._units import DENSE, HOST, PAIRS, UNIT

# By feature: outputs computed at a time. Ranges start at multiples of it.
FEATURES = STEPS
_TAKEN = 4  # rows that are multiplied at a time
_DOTS = 4 * _TAKEN * STEPS  # bytes of the sums of four rows
PAD = 4 * TILE  # bytes of a row's last columns, with zeros after them
_PADS = 4 * PAD
_ROWS = 8  # by input: rows whose sums are kept at a time, in the first-level cache
_SUMS = _ROWS * PANEL  # bytes
_AHEAD = 1 << 13  # bytes from what is read to what is prefetched


@inline
def ahead_of(read, step):
    """The prefetch distance, where ``read`` bytes in every ``step`` are read."""
    return -(-_AHEAD // max(1, read)) * step


@inline
def check(offsets, experts, total):
    """The offsets ascend within the ``total`` rows."""
    before = 0
    for expert in range(experts):
        end = read_i32(offsets, expert)
        if end < before or end > total:
            raise Nonsense
        before = end


@inline
def pad(target, source, step, rows, count):
    """Copy ``count`` bytes of each row to rows of zeros."""
    zero(target, rows * PAD)
    for row in range(rows):
        copy(source + row * step, target + row * PAD, count)


@inline
def lane_of(pairs, halves, column):
    """Where ``axpys`` keeps the sum of a column: with ``pairs`` units take elements in turn, with ``halves`` vectors do."""
    within = column % TILE
    unit, place = (within % 2, within // 2) if pairs else (within // UNIT, within % UNIT)
    place = place % 2 * (UNIT // 2) + place // 2 if halves else place
    return column // TILE * TILE + unit * UNIT + place


def bits_of_code(format: int, element: int) -> int:
    """Bits that an element takes in memory."""
    return 8 * SIZES[element] if format == DENSE else 4 if PAIRS[format] else 8


@functools.cache
def by_feature_kernel(element: int, format: int = DENSE, cpu: int = HOST) -> Callable:
    """``[rows, in]`` times matrices stored ``[experts, out, in]``: dot products, four output features at a time."""
    size, bits = SIZES[element], bits_of_code(format, element)
    some = 2 if element == BF16 else FEATURES  # with four rows: bfloat16 has two vectors for each sum
    # With fewer. A Zen reads a matrix fastest in one piece, and then by its own foresight (16 bits, one row: 1.8 times).
    few = 1 if ZEN and format == DENSE else FEATURES

    @kernel(element, format, cpu)
    def by_feature(
        start: int, stop: int, total: int, rows: int, rows_step: int, matrices: int, expert_step: int, feature_step: int,
        scales: int, height: int, offsets: int, experts: int, out: int, out_step: int, width: int,
    ):  # fmt: skip
        check(offsets, experts, total)
        sums, x_pad, y_pad, whole = scratch(_DOTS), scratch(_PADS), scratch(_PADS), width // TILE * TILE

        def multiply(taken, features, x, x_step, y, y_step, line, first, last, ahead):
            reach = ahead if few == FEATURES else 0
            if features < FEATURES:  # the last of an odd number
                for pair in range(taken * features):
                    row, n = pair // features, pair % features
                    source, matrix, place = x + row * x_step, y + n * y_step, sums + 4 * (row * STEPS + n)
                    dots(format, element, cpu, 1, 1, matrix, 0, scales, line + n, source, 0, first, last, 0, place)
            elif taken == 4:
                for n in range(0, FEATURES, some):
                    matrix, to = y + n * y_step, sums + 4 * n
                    dots(format, element, cpu, 4, some, matrix, y_step, scales, line + n, x, x_step, first, last, ahead, to)
            elif taken == 2:
                for n in range(0, FEATURES, few):
                    matrix, to = y + n * y_step, sums + 4 * n
                    dots(format, element, cpu, 2, few, matrix, y_step, scales, line + n, x, x_step, first, last, reach, to)
            else:
                for n in range(0, FEATURES, few):
                    matrix, to = y + n * y_step, sums + 4 * n
                    dots(format, element, cpu, 1, few, matrix, y_step, scales, line + n, x, x_step, first, last, reach, to)

        wide_vectors()
        ahead, begin = ahead_of(FEATURES * width * bits // 8, FEATURES * feature_step), 0
        for expert in range(experts):
            end = read_i32(offsets, expert)
            for feature in range(start, stop, FEATURES):
                matrix, line = matrices + expert * expert_step + feature * feature_step, expert * height + feature
                features, row = min(FEATURES, stop - feature), begin
                while row < end:
                    taken, source = 4 if end - row >= 4 else 2 if end - row >= 2 else 1, rows + row * rows_step
                    zero(sums, _DOTS)
                    for first in range(0, width, max(whole, TILE)):
                        x, x_step, y, y_step, last = source, rows_step, matrix, feature_step, whole
                        if first == whole:
                            pad(x_pad, x + first * size, x_step, taken, (width - first) * size)
                            pad(y_pad, y + first * bits // 8, y_step, features, (width - first) * bits // 8)
                            x, y, last = x_pad - first * size, y_pad - first * bits // 8, first + TILE
                            x_step = y_step = PAD
                        multiply(taken, features, x, x_step, y, y_step, line, first, last, ahead if row == begin else 0)
                    for i in range(taken):
                        for n in range(features):
                            store(element, out + (row + i) * out_step, feature + n, read_back_f32(sums, i * STEPS + n))
                    row += taken
            begin = max(begin, end)

    return by_feature


@functools.cache
def by_input_kernel(element: int, format: int = DENSE, cpu: int = HOST) -> Callable:
    """``[rows, in]`` times matrices stored ``[experts, in, out]``: four inputs at a time are added to a panel of sums."""
    size, bits, pairs, halves = SIZES[element], bits_of_code(format, element), PAIRS[format], element == BF16

    @kernel(element, format, cpu)
    def by_input(
        start: int, stop: int, total: int, rows: int, rows_step: int, matrices: int, expert_step: int, input_step: int,
        scales: int, height: int, offsets: int, experts: int, out: int, out_step: int, width: int,
    ):  # fmt: skip
        check(offsets, experts, total)
        sums, y_pad = scratch(_SUMS), scratch(_PADS)

        def add(taken, steps, x, y, y_step, line, first, last, ahead, target):
            row = 0
            while row < taken:
                source, place = x + row * rows_step, target + row * PANEL
                group = 1 if steps < 4 else 4 if taken - row >= 4 else 2 if taken - row >= 2 else 1
                if steps < 4:
                    axpys(format, element, cpu, 1, 1, y, 0, scales, line, source, 0, first, last, 0, place)
                elif group == 4:
                    axpys(format, element, cpu, 4, 4, y, y_step, scales, line, source, rows_step, first, last, ahead, place)
                elif group == 2:
                    axpys(format, element, cpu, 2, 4, y, y_step, scales, line, source, rows_step, first, last, ahead, place)
                else:
                    axpys(format, element, cpu, 1, 4, y, y_step, scales, line, source, 0, first, last, ahead, place)
                row += group

        wide_vectors()
        begin = 0
        for expert in range(experts):
            end, matrix = read_i32(offsets, expert), matrices + expert * expert_step
            for row in range(begin, end, _ROWS):
                for panel in range(start, stop, COLUMNS):
                    taken, columns = min(_ROWS, end - row), min(COLUMNS, stop - panel)
                    whole = columns // TILE * TILE
                    ahead = ahead_of(4 * whole * bits // 8, 4 * input_step)
                    zero(sums, taken * PANEL)
                    for part in range(0, columns, max(whole, TILE)):
                        first, place, k = panel + part, sums + 4 * part, 0
                        while k < width:
                            steps = 4 if width - k >= 4 else 1
                            x, line = rows + row * rows_step + k * size, expert * height + k
                            y, y_step, last = matrix + k * input_step, input_step, panel + whole
                            if part == whole:
                                pad(y_pad, y + first * bits // 8, y_step, steps, (columns - part) * bits // 8)
                                y, y_step, last = y_pad - first * bits // 8, PAD, first + TILE
                            add(taken, steps, x, y, y_step, line, first, last, ahead, place)
                            k += steps
                    for i in range(taken):
                        for j in range(columns):
                            value = read_back_f32(sums + i * PANEL, lane_of(pairs, halves, j))
                            store(element, out + (row + i) * out_step, panel + j, value)
            begin = max(begin, end)

    return by_input
