"""Row movement: copies of rows, sums of rows, and the gradients of the weights.

Every kernel goes through tokens, not rows: a token's row is read once for all its copies, and a token's rows are added
in a register-sized order that no thread disturbs.

The tables say twice which row is which token's: row by row, and token by token. No entry is followed out of its table or
out of the rows, and each kernel compares the two: it adds up a number for each pair of row and token of either, and leaves
the difference of the sums at ``check``. It is 0 only if the two say the same (but for a chance of 2**-64).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from moekit.kernels.numba._bits import (
    add_f32,
    copy,
    fence,
    fetch_add,
    plus,
    prefetch,
    read_back_f32,
    read_f32,
    read_i32,
    read_i64,
    scratch,
    stream,
    wide_vectors,
    write_f32,
    zero,
)
from moekit.kernels.numba._elements import NONE, SIZES, load, store
from moekit.kernels.numba._jit import inline, kernel

_STRIP = 128  # elements
_TILE = 4 * _STRIP  # bytes
_AHEAD = 2048  # bytes from what a sum reads to what it prefetches; 512 to 4096 are about as fast
_LINE = 64
_MIX_ROW, _MIX_TOKEN, _MIX = np.int64(0x1E3779B97F4A7C15), np.int64(0x3F58476D1CE4E5B9), np.int64(0x14D049BB133111EB)
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
def entries_of(token, token_offsets, entries):
    """Where a token's part of ``token_rows`` begins and ends; empty where that is outside of its ``entries``."""
    first, last = read_i32(token_offsets, token), read_i32(token_offsets, token + 1)
    if 0 <= first <= last <= entries:
        return np.int64(first), np.int64(last)
    return np.int64(0), np.int64(0)


@inline
def pair(row, token):
    """The number that stands for a row being a token's."""
    mixed = np.int64(row) * _MIX_ROW + np.int64(token) * _MIX_TOKEN
    return (mixed ^ (mixed >> np.int64(29))) * _MIX


@inline
def disagreement(start, stop, row_token, wide, token_offsets, token_rows, entries, num_tokens, num_rows):
    """The pairs that the tokens from ``start`` to ``stop`` name, less those of as large a part of the rows."""
    total = np.int64(0)
    for token in range(start, stop):
        first, last = entries_of(token, token_offsets, entries)
        for place in range(first, last):
            row = read_i32(token_rows, place)
            if row != -1:
                total += pair(row, token)
    for row in range(num_rows * start // num_tokens, num_rows * stop // num_tokens):
        token = read_i64(row_token, row) if wide else np.int64(read_i32(row_token, row))
        if token != -1:
            total -= pair(row, token)
    return total


@inline
def rows_of(token, token_offsets, token_rows, entries, num_rows, found):
    """Fill ``found`` with a token's rows in ascending order, and return how many there are."""
    count = 0
    first, last = entries_of(token, token_offsets, entries)
    for place in range(first, last):
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
def most_rows(token_offsets, entries, start, stop):
    """The most rows that a token in ``[start, stop)`` has."""
    most = 0
    for token in range(start, stop):
        first, last = entries_of(token, token_offsets, entries)
        most = max(most, last - first)
    return most


@functools.cache
def permute_kernel() -> Callable:
    """Copy each token's row to its places; rows without a token become zero. ``wide``: ``row_token`` is int64."""

    @kernel()
    def permute(
        start: int, stop: int, tokens: int, tokens_step: int, row_token: int, wide: int, token_offsets: int,
        token_rows: int, entries: int, out: int, num_tokens: int, num_rows: int, size: int, streaming: int, check: int,
    ):  # fmt: skip
        for token in range(start, stop):
            first, last = entries_of(token, token_offsets, entries)
            for place in range(first, last):
                row = read_i32(token_rows, place)
                if 0 <= row < num_rows:
                    move(tokens + token * tokens_step, out + row * size, size, streaming)
        for row in range(num_rows * start // num_tokens, num_rows * stop // num_tokens):
            token = read_i64(row_token, row) if wide else read_i32(row_token, row)
            if token < 0:
                zero(out + row * size, size)
        fence()
        tables = (row_token, wide, token_offsets, token_rows, entries, num_tokens, num_rows)
        fetch_add(check, disagreement(start, stop, *tables))

    return permute


@functools.cache
def unpermute_kernel(element: int) -> Callable:
    """Add each token's rows in ascending order, times their weights if there are any."""
    size = SIZES[element]

    @kernel(element)
    def unpermute(
        start: int, stop: int, rows: int, rows_step: int, weights: int, row_token: int, wide: int, token_offsets: int,
        token_rows: int, entries: int, out: int, num_tokens: int, num_rows: int, width: int, streaming: int, check: int,
    ):  # fmt: skip
        wide_vectors()
        most = most_rows(token_offsets, entries, start, stop)
        found, coming, weight_of = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.float32)
        sums, tile = scratch(_TILE), scratch(_TILE)
        ahead = min(_AHEAD // size, width)

        def add(source, weight, count):
            for j in range(count):
                add_f32(sums, j, weight * load(element, source, j))

        def finish(target, count):
            for j in range(count):
                store(element, target, j, read_back_f32(sums, j))

        num_coming = rows_of(start, token_offsets, token_rows, entries, num_rows, coming) if start < stop else 0
        for token in range(start, stop):
            found, coming, num_found, num_coming = coming, found, num_coming, 0
            if token + 1 < stop:
                num_coming = rows_of(token + 1, token_offsets, token_rows, entries, num_rows, coming)
            for k in range(num_found):
                weight_of[k] = read_f32(weights, found[k]) if weights else _ONE
            for first in range(0, width, _STRIP):
                # The processor itself does not look past a row's end: its rows lie anywhere.
                if first + ahead < width:
                    for k in range(num_found):
                        fetch(rows + found[k] * rows_step + (first + ahead) * size, _STRIP * size)
                else:
                    for k in range(num_coming):
                        fetch(rows + coming[k] * rows_step + (first + ahead - width) * size, _STRIP * size)
                count = min(_STRIP, width - first)
                zero(sums, _TILE)
                for k in range(num_found):
                    source = rows + found[k] * rows_step + first * size
                    if count == _STRIP:  # a constant count makes better code
                        add(source, weight_of[k], _STRIP)
                    else:
                        add(source, weight_of[k], count)
                direct = out + (token * width + first) * size
                target = tile if streaming else direct
                if count == _STRIP:
                    finish(target, _STRIP)
                else:
                    finish(target, count)
                if streaming:
                    stream(tile, direct, count * size)
        fence()
        tables = (row_token, wide, token_offsets, token_rows, entries, num_tokens, num_rows)
        fetch_add(check, disagreement(start, stop, *tables))

    return unpermute


@functools.cache
def unpermute_backward_kernel(element: int, grad_element: int, want_rows: bool, want_weights: bool) -> Callable:
    """``drows[r] = grad[token] * weight``, ``dweights[r] = grad[token] . rows[r]``; zero for rows without a token."""
    size, grad_size = SIZES[element], SIZES[grad_element]
    row_element, drow_element = element if want_weights else NONE, element if want_rows else NONE

    @kernel(element, grad_element, want_rows, want_weights)
    def unpermute_backward(
        start: int, stop: int, grad: int, rows: int, weights: int, row_token: int, wide: int, token_offsets: int,
        token_rows: int, entries: int, drows: int, dweights: int, num_tokens: int, num_rows: int, width: int,
        streaming: int, check: int,
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
            begin, last = entries_of(token, token_offsets, entries)
            for place in range(begin, last):
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
        tables = (row_token, wide, token_offsets, token_rows, entries, num_tokens, num_rows)
        fetch_add(check, disagreement(start, stop, *tables))

    return unpermute_backward
