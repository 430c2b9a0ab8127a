"""Products of few rows an expert with its matrix: each matrix is read once, at the speed of memory.

A range of a kernel is a range of output features, of every expert: no sum is split between threads. Up to four rows of an
expert are multiplied with a part of the matrix at a time, as fast as it is read; further rows find that part in the cache.
There is a kernel for either way a matrix is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from moekit.kernels.numba._bits import (
    PANEL,
    TILE,
    axpys,
    dots,
    read_back_f32,
    read_i32,
    scratch,
    wide_vectors,
    zero,
)
from moekit.kernels.numba._elements import BF16, SIZES, load, store
from moekit.kernels.numba._jit import inline, kernel
from moekit.kernels.numba._launch import Nonsense

# By feature: outputs computed at a time. Ranges start at multiples of it.
FEATURES = 4
_DOTS = 4 * FEATURES * 4  # bytes of the sums of four rows
# By input: outputs, and rows, whose sums are kept at a time, in the first-level cache.
_COLUMNS = PANEL // 4
_ROWS = 8
_SUMS = _ROWS * PANEL  # bytes
_AHEAD = 1 << 13  # bytes from what is read to what is prefetched
_ZERO = np.float32(0.0)


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
def lane_of(element, j):
    """Where the sum of column j is kept: bfloat16 is widened as even and odd elements."""
    return j // TILE * TILE + j % 2 * (TILE // 2) + j % TILE // 2 if element == BF16 else j


@functools.cache
def by_feature_kernel(element: int) -> Callable:
    """``[rows, in]`` times matrices stored ``[experts, out, in]``: dot products, four output features at a time."""
    size = SIZES[element]

    @kernel(element)
    def by_feature(
        start: int, stop: int, total: int, rows: int, rows_step: int, matrices: int, expert_step: int, feature_step: int,
        offsets: int, experts: int, out: int, out_step: int, width: int,
    ):  # fmt: skip
        check(offsets, experts, total)
        sums, whole = scratch(_DOTS), width // TILE * TILE

        def multiply(source, taken, matrix, features, ahead):
            if features < FEATURES:  # the last of an odd number
                for pair in range(taken * FEATURES):
                    x, y = source + pair // FEATURES * rows_step, matrix + min(pair % FEATURES, features - 1) * feature_step
                    dots(element, 1, 1, x, 0, y, 0, whole, 0, sums + 4 * pair)
            elif taken == 4:
                dots(element, 4, FEATURES, source, rows_step, matrix, feature_step, whole, ahead, sums)
            elif taken == 2:
                dots(element, 2, FEATURES, source, rows_step, matrix, feature_step, whole, ahead, sums)
            else:
                dots(element, 1, FEATURES, source, 0, matrix, feature_step, whole, ahead, sums)

        def finish(source, taken, matrix, features, target):
            for row in range(taken):
                for feature in range(features):
                    total = read_back_f32(sums, row * FEATURES + feature)
                    for j in range(whole, width):
                        x, y = source + row * rows_step, matrix + feature * feature_step
                        total += load(element, x, j) * load(element, y, j)
                    store(element, target + row * out_step, feature, total)

        wide_vectors()
        ahead, begin = ahead_of(FEATURES * width * size, FEATURES * feature_step), 0
        for expert in range(experts):
            end = read_i32(offsets, expert)
            for feature in range(start, stop, FEATURES):
                matrix, features = matrices + expert * expert_step + feature * feature_step, min(FEATURES, stop - feature)
                row = begin
                while row < end:
                    taken = 4 if end - row >= 4 else 2 if end - row >= 2 else 1
                    source = rows + row * rows_step
                    multiply(source, taken, matrix, features, ahead if row == begin else 0)
                    finish(source, taken, matrix, features, out + row * out_step + feature * size)
                    row += taken
            begin = max(begin, end)

    return by_feature


@functools.cache
def by_input_kernel(element: int) -> Callable:
    """``[rows, in]`` times matrices stored ``[experts, in, out]``: four inputs at a time are added to a panel of sums."""
    size = SIZES[element]

    @kernel(element)
    def by_input(
        start: int, stop: int, total: int, rows: int, rows_step: int, matrices: int, expert_step: int, input_step: int,
        offsets: int, experts: int, out: int, out_step: int, width: int,
    ):  # fmt: skip
        check(offsets, experts, total)
        sums = scratch(_SUMS)

        def add(source, taken, matrix, columns, k, ahead):
            row = 0
            while row < taken:
                x, y, target = source + row * rows_step + k * size, matrix + k * input_step, sums + row * PANEL
                if width - k < 4:
                    group = 1
                    axpys(element, 1, 1, x, 0, y, 0, columns, 0, target)
                elif taken - row >= 4:
                    group = 4
                    axpys(element, 4, 4, x, rows_step, y, input_step, columns, ahead, target)
                elif taken - row >= 2:
                    group = 2
                    axpys(element, 2, 4, x, rows_step, y, input_step, columns, ahead, target)
                else:
                    group = 1
                    axpys(element, 1, 4, x, 0, y, input_step, columns, ahead, target)
                row += group

        def finish(source, taken, matrix, whole, columns, target):
            for row in range(taken):
                for j in range(whole):
                    store(element, target + row * out_step, j, read_back_f32(sums + row * PANEL, lane_of(element, j)))
                for j in range(whole, columns):
                    total = _ZERO
                    for k in range(width):
                        total += load(element, source + row * rows_step, k) * load(element, matrix + k * input_step, j)
                    store(element, target + row * out_step, j, total)

        wide_vectors()
        begin = 0
        for expert in range(experts):
            end = read_i32(offsets, expert)
            for row in range(begin, end, _ROWS):
                for panel in range(start, stop, _COLUMNS):
                    source, matrix = rows + row * rows_step, matrices + expert * expert_step + panel * size
                    taken, columns = min(_ROWS, end - row), min(_COLUMNS, stop - panel)
                    whole = columns // TILE * TILE
                    ahead = ahead_of(4 * whole * size, 4 * input_step)
                    zero(sums, taken * PANEL)
                    for k in range(0, width - 3, 4):
                        add(source, taken, matrix, whole, k, ahead)
                    for k in range(width // 4 * 4, width):
                        add(source, taken, matrix, whole, k, ahead)
                    finish(source, taken, matrix, whole, columns, out + row * out_step + panel * size)
            begin = max(begin, end)

    return by_input
