"""Row movement: copies of rows, sums of rows, and the gradients of the weights.

Every kernel goes through tokens, not rows: a token's row is read once for all its copies, and a token's rows are added
in a register-sized order that no thread disturbs. Tables that name rows outside the output are not followed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from moekit.kernels.numba._bits import (
    add_f32,
    copy,
    fence,
    plus,
    prefetch,
    read_back_f32,
    read_f32,
    read_i32,
    read_i64,
    scratch,
    stream,
    write_f32,
    zero,
)
from moekit.kernels.numba._elements import NONE, SIZES, load, store
from moekit.kernels.numba._jit import inline, kernel

_STRIP = 128  # elements
_TILE = 4 * _STRIP  # bytes
# Columns that are summed at a time: their float32 sums stay in the first-level cache.
_PANEL = 2048
_PANEL_BYTES = 4 * _PANEL
_LINE = 64
_F = np.float32
_ONE, _ZERO = _F(1.0), _F(0.0)


@inline
def move(source, target, size, streaming):
    """Copy a row."""
    if streaming:
        stream(source, target, size)
    else:
        copy(source, target, size)


@inline
def fetch(address, size):
    """Prefetch what will be read at ``address``."""
    for line in range(0, size, _LINE):
        prefetch(address, line)


@inline
def rows_of(token, token_offsets, token_rows, num_rows, found):
    """Fill ``found`` with a token's rows in ascending order, and return how many there are."""
    count = 0
    for place in range(read_i32(token_offsets, token), read_i32(token_offsets, token + 1)):
        row = read_i32(token_rows, place)
        if 0 <= row < num_rows:
            at = count
            while at > 0 and found[at - 1] > row:
                found[at] = found[at - 1]
                at -= 1
            found[at] = row
            count += 1
    return count


@inline
def most_rows(token_offsets, start, stop):
    """The most rows that a token in ``[start, stop)`` has."""
    most = 0
    for token in range(start, stop):
        most = max(most, read_i32(token_offsets, token + 1) - read_i32(token_offsets, token))
    return most


@functools.cache
def permute_kernel(wide: bool) -> Callable:
    """Copy each token's row to its places; rows without a token become zero. ``wide``: ``row_token`` is int64."""

    @kernel(wide)
    def permute(
        start: int, stop: int, tokens: int, tokens_step: int, row_token: int, token_offsets: int, token_rows: int,
        out: int, num_tokens: int, num_rows: int, size: int, streaming: int,
    ):  # fmt: skip
        for token in range(start, stop):
            for place in range(read_i32(token_offsets, token), read_i32(token_offsets, token + 1)):
                row = read_i32(token_rows, place)
                if 0 <= row < num_rows:
                    move(tokens + token * tokens_step, out + row * size, size, streaming)
        for row in range(num_rows * start // num_tokens, num_rows * stop // num_tokens):
            token = read_i64(row_token, row) if wide else read_i32(row_token, row)
            if token < 0:
                zero(out + row * size, size)
        fence()

    return permute


@functools.cache
def unpermute_kernel(element: int) -> Callable:
    """Add each token's rows in ascending order, times their weights if there are any."""
    size = SIZES[element]

    @kernel(element)
    def unpermute(
        start: int, stop: int, rows: int, rows_step: int, weights: int, token_offsets: int, token_rows: int,
        out: int, num_rows: int, width: int, streaming: int,
    ):  # fmt: skip
        most = most_rows(token_offsets, start, stop)
        found, weight_of = np.empty(most, np.int64), np.empty(most, np.float32)
        sums, tile = scratch(_PANEL_BYTES), scratch(_TILE)

        def add(source, target, weight, count):
            for j in range(count):
                add_f32(target, j, weight * load(element, source, j))

        def add_four(a, b, c, d, target, weight_a, weight_b, weight_c, weight_d, count):
            for j in range(count):
                total = read_back_f32(target, j) + weight_a * load(element, a, j)
                total += weight_b * load(element, b, j)
                total += weight_c * load(element, c, j)
                write_f32(target, j, total + weight_d * load(element, d, j))

        def finish(source, target, count):
            for j in range(count):
                store(element, target, j, read_back_f32(source, j))

        for token in range(start, stop):
            num_found = rows_of(token, token_offsets, token_rows, num_rows, found)
            for k in range(num_found):
                weight_of[k] = read_f32(weights, found[k]) if weights else _ONE
            for panel in range(0, width, _PANEL):
                columns = min(_PANEL, width - panel)
                zero(sums, columns * 4)
                from_panel = rows + panel * size
                # Four rows at a time, so that the sums are not read and written for each.
                for k in range(0, num_found - 3, 4):
                    a, b = from_panel + found[k] * rows_step, from_panel + found[k + 1] * rows_step
                    c, d = from_panel + found[k + 2] * rows_step, from_panel + found[k + 3] * rows_step
                    for first in range(0, columns, _STRIP):
                        at, to = first * size, sums + first * 4
                        w_a, w_b, w_c, w_d = weight_of[k], weight_of[k + 1], weight_of[k + 2], weight_of[k + 3]
                        if columns - first >= _STRIP:
                            add_four(a + at, b + at, c + at, d + at, to, w_a, w_b, w_c, w_d, _STRIP)
                        else:
                            add_four(a + at, b + at, c + at, d + at, to, w_a, w_b, w_c, w_d, columns - first)
                for k in range(num_found // 4 * 4, num_found):
                    a = from_panel + found[k] * rows_step
                    for first in range(0, columns, _STRIP):
                        if columns - first >= _STRIP:
                            add(a + first * size, sums + first * 4, weight_of[k], _STRIP)
                        else:
                            add(a + first * size, sums + first * 4, weight_of[k], columns - first)
                out_panel = out + (token * width + panel) * size
                for first in range(0, columns, _STRIP):
                    count = min(_STRIP, columns - first)
                    finish(sums + first * 4, tile if streaming else out_panel + first * size, count)
                    if streaming:
                        stream(tile, out_panel + first * size, count * size)
        fence()

    return unpermute


@functools.cache
def unpermute_backward_kernel(element: int, grad_element: int, wide: bool, want_rows: bool, want_weights: bool) -> Callable:
    """``drows[r] = grad[token] * weight``, ``dweights[r] = grad[token] . rows[r]``; zero for rows without a token."""
    size, grad_size = SIZES[element], SIZES[grad_element]
    row_element, drow_element = element if want_weights else NONE, element if want_rows else NONE

    @kernel(element, grad_element, wide, want_rows, want_weights)
    def unpermute_backward(
        start: int, stop: int, grad: int, rows: int, weights: int, row_token: int, token_offsets: int, token_rows: int,
        drows: int, dweights: int, num_tokens: int, num_rows: int, width: int, streaming: int,
    ):  # fmt: skip
        tile = scratch(_TILE)

        def work(grads, source, target, weight, count):
            dot = _ZERO
            for j in range(count):
                g = load(grad_element, grads, j)
                dot = plus(dot, g * load(row_element, source, j))
                store(drow_element, target, j, g * weight)
            return dot

        for token in range(start, stop):
            last = read_i32(token_offsets, token + 1)
            for place in range(read_i32(token_offsets, token), last):
                row = read_i32(token_rows, place)
                if row < 0 or row >= num_rows:
                    continue
                onwards = rows + read_i32(token_rows, min(place + 1, last - 1)) * width * size
                weight, dot = read_f32(weights, row), _ZERO
                for first in range(0, width, _STRIP):
                    if want_weights:
                        fetch(onwards + first * size, _STRIP * size)
                    grads, source = grad + (token * width + first) * grad_size, rows + (row * width + first) * size
                    direct = drows + (row * width + first) * size
                    target = tile if streaming else direct
                    count = min(_STRIP, width - first)
                    if count == _STRIP:
                        dot += work(grads, source, target, weight, _STRIP)
                    else:
                        dot += work(grads, source, target, weight, count)
                    if streaming:
                        stream(tile, direct, count * size)
                if want_weights:
                    write_f32(dweights, row, dot)
        for row in range(num_rows * start // num_tokens, num_rows * stop // num_tokens):
            token = read_i64(row_token, row) if wide else read_i32(row_token, row)
            if token < 0:
                if want_weights:
                    write_f32(dweights, row, _ZERO)
                if want_rows:
                    zero(drows + row * width * size, width * size)
        fence()

    return unpermute_backward
