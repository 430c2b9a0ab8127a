"""Routing tables by stable counting sort.

The input is cut into pieces, one a thread: each counts its own keys, a running total over keys and pieces says where
each piece's first of each key goes, and each piece then puts its own in place. Where the cuts are changes nothing.
``starts [pieces, buckets]`` holds first the counts, then the places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import types
from numba.extending import overload

from moekit.kernels.numba._bits import (
    count_ones,
    nonzero64,
    read_back_i32,
    read_back_i64,
    read_i32,
    read_i64,
    read_u8,
    read_u16,
    trailing_zeros,
    write_i32,
    write_i64,
    write_u8,
    write_u16,
    zero,
)
from moekit.kernels.numba._jit import INLINE, inline, kernel
from moekit.kernels.numba._launch import Nonsense

_READ = {1: read_u8, 2: read_u16, 4: read_i32, 8: read_i64}
_WRITE = {1: write_u8, 2: write_u16, 4: write_i32, 8: write_i64}
_ONE = np.uint64(1)


def marks(size: int, base: int, count: int, mask: int) -> int:
    """Which of the next ``count`` (at most 64) elements of a map are set. For kernels only."""
    raise NotImplementedError


@overload(marks, prefer_literal=True, jit_options=INLINE)
def _marks(size, base, count, mask):
    if isinstance(size, types.IntegerLiteral):
        read = _READ[size.literal_value]

        def find(size, base, count, mask):
            if count >= 64:
                return nonzero64(size, base, mask)
            found = np.uint64(0)
            for i in range(count):
                if np.int64(read(base, i)) & mask:
                    found |= _ONE << np.uint64(i)
            return found

        return find


@inline
def bump(table, index):
    """Add one to an entry and return what it was."""
    value = read_back_i32(table, index)
    write_i32(table, index, value + 1)
    return np.int64(value)


# --- keys -----------------------------------------------------------------------------------------------------------


@functools.cache
def count_keys_kernel(wide: bool) -> Callable:
    """How many of each key a piece has, and how many that are no key: neither -1 nor in ``[0, buckets)``.

    ``wide``: keys are int64.
    """

    @kernel(wide)
    def count_keys(start: int, stop: int, keys: int, length: int, pieces: int, buckets: int, starts: int, wrong: int):
        for piece in range(start, stop):
            table, bad = starts + piece * buckets * 4, 0
            zero(table, buckets * 4)
            for i in range(length * piece // pieces, length * (piece + 1) // pieces):
                key = read_i64(keys, i) if wide else np.int64(read_i32(keys, i))
                if 0 <= key < buckets:
                    bump(table, key)
                elif key != -1:
                    bad += 1
            write_i32(wrong, piece, bad)

    return count_keys


@functools.cache
def total_kernel() -> Callable:
    """Turn counts into places; also the counts themselves and their running total, if they have an address.

    Returns the last place, -1 where a piece was ``wrong`` (if that has an address).
    """

    @kernel()
    def total(pieces: int, buckets: int, starts: int, wrong: int, counts: int, ends: int) -> int:
        for piece in range(pieces if wrong else 0):
            if read_back_i32(wrong, piece):
                return -1
        place = 0
        for bucket in range(buckets):
            before = place
            for piece in range(pieces):
                count = read_back_i32(starts, piece * buckets + bucket)
                write_i32(starts, piece * buckets + bucket, place)
                place += count
            if counts:
                write_i64(counts, bucket, place - before)
            if ends:
                write_i32(ends, bucket, place)
        return place

    return total


@functools.cache
def place_keys_kernel(wide: bool) -> Callable:
    """Write each key's position to its place (``order``), and its place to its position (``inverse``, if wanted)."""

    @kernel(wide)
    def place_keys(
        start: int, stop: int, keys: int, length: int, pieces: int, buckets: int, starts: int, order: int, inverse: int
    ):
        for piece in range(start, stop):
            table = starts + piece * buckets * 4
            for i in range(length * piece // pieces, length * (piece + 1) // pieces):
                key = read_i64(keys, i) if wide else np.int64(read_i32(keys, i))
                place = -1
                if 0 <= key < buckets:
                    place = bump(table, key)
                    write_i32(order, place, i)
                if inverse:
                    write_i32(inverse, i, place)

    return place_keys


# --- maps -----------------------------------------------------------------------------------------------------------


@functools.cache
def count_map_kernel(size: int) -> Callable:
    """How many tokens of a piece each expert has."""

    @kernel(size)
    def count_map(start: int, stop: int, routing: int, mask: int, tokens: int, experts: int, pieces: int, starts: int):
        for piece in range(start, stop):
            table = starts + piece * experts * 4
            zero(table, experts * 4)
            for token in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
                for first in range(0, experts, 64):
                    found = marks(size, routing + (token * experts + first) * size, min(64, experts - first), mask)
                    while found:
                        bump(table, first + trailing_zeros(found))
                        found &= found - _ONE

    return count_map


@functools.cache
def place_map_kernel(size: int) -> Callable:
    """The token and the place in the map of each row; each token's rows, and where they begin."""

    @kernel(size)
    def place_map(
        start: int, stop: int, routing: int, mask: int, tokens: int, experts: int, pieces: int, starts: int,
        ends: int, row_token: int, row_slot: int, token_offsets: int, token_rows: int,
    ):  # fmt: skip
        for piece in range(start, stop):
            table = starts + piece * experts * 4
            behind = 0  # rows of the tokens before this piece
            for expert in range(experts):
                behind += read_back_i32(table, expert) - (read_i32(ends, expert - 1) if expert else 0)
            for token in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
                write_i32(token_offsets, token, behind)
                for first in range(0, experts, 64):
                    found = marks(size, routing + (token * experts + first) * size, min(64, experts - first), mask)
                    while found:
                        expert = first + trailing_zeros(found)
                        place = bump(table, expert)
                        write_i64(row_token, place, token)
                        write_i64(row_slot, place, token * experts + expert)
                        write_i32(token_rows, behind, place)
                        behind += 1
                        found &= found - _ONE
            if piece == pieces - 1:
                write_i32(token_offsets, tokens, behind)

    return place_map


@functools.cache
def widest_kernel(size: int) -> Callable:
    """The most experts that one token has."""

    @kernel(size)
    def widest(start: int, stop: int, routing: int, mask: int, experts: int, out: int):
        most = 0
        for token in range(start, stop):
            count = 0
            for first in range(0, experts, 64):
                found = marks(size, routing + (token * experts + first) * size, min(64, experts - first), mask)
                count += count_ones(found)
            most = max(most, count)
        write_i64(out, 0, most)

    return widest


@functools.cache
def list_map_kernel(size: int) -> Callable:
    """Each token's experts in ascending order, then -1. No token has more than ``slots``."""

    @kernel(size)
    def list_map(start: int, stop: int, routing: int, mask: int, experts: int, slots: int, out: int):
        for token in range(start, stop):
            place = token * slots
            for first in range(0, experts, 64):
                found = marks(size, routing + (token * experts + first) * size, min(64, experts - first), mask)
                while found:
                    write_i64(out, place, first + trailing_zeros(found))
                    place += 1
                    found &= found - _ONE
            for rest in range(place, (token + 1) * slots):
                write_i64(out, rest, -1)

    return list_map


@functools.cache
def capacity_kernel(size: int) -> Callable:
    """Each expert's first ``capacity`` tokens: routed ones by position, then the others by position.

    An unrouted token comes after all routed ones and after the unrouted ones before it, of which there are as many as
    tokens less routed tokens so far: one running count serves both.
    """

    @kernel(size)
    def place_capacity(
        start: int, stop: int, routing: int, mask: int, tokens: int, experts: int, pieces: int, starts: int,
        counts: int, capacity: int, out: int,
    ):  # fmt: skip
        for piece in range(start, stop):
            table = starts + piece * experts * 4
            for token in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
                for first in range(0, experts, 64):
                    width = min(64, experts - first)
                    found = marks(size, routing + (token * experts + first) * size, width, mask)
                    for i in range(width):
                        expert = first + i
                        if (found >> np.uint64(i)) & _ONE:
                            place = bump(table, expert)
                        else:
                            place = read_back_i64(counts, expert) + token - read_back_i32(table, expert)
                        if place < capacity:
                            write_i64(out, expert * capacity + place, token)

    return place_capacity


@functools.cache
def total_by_expert_kernel() -> Callable:
    """:func:`total_kernel` with places that start anew at each expert."""

    @kernel()
    def total_by_expert(pieces: int, experts: int, starts: int, counts: int):
        for expert in range(experts):
            place = 0
            for piece in range(pieces):
                count = read_back_i32(starts, piece * experts + expert)
                write_i32(starts, piece * experts + expert, place)
                place += count
            write_i64(counts, expert, place)

    return total_by_expert


# --- chunks and padding ---------------------------------------------------------------------------------------------


@functools.cache
def chunk_rows_kernel() -> Callable:
    """The source row of each row when chunks of given sizes are put into another order."""

    @kernel()
    def chunk_rows(sizes: int, chunks: int, order: int, length: int, out: int):
        starts = np.zeros(chunks + 1, np.int64)
        for chunk in range(chunks):
            starts[chunk + 1] = starts[chunk] + read_i64(sizes, chunk)
        place = 0
        for i in range(length):
            chunk = read_i64(order, i)
            for row in range(starts[chunk], starts[chunk + 1]):
                write_i64(out, place, row)
                place += 1

    return chunk_rows


@functools.cache
def pad_rows_kernel() -> Callable:
    """Tables in which each expert starts at a multiple of ``multiple`` rows. Their -1 entries are there already.

    Rows and slots have to name each other, and no row behind the last expert's any: as many slots name a row as rows have
    a slot that names them.
    """

    @kernel()
    def pad_rows(
        offsets: int, experts: int, order: int, rows: int, inverse: int, multiple: int, slots: int,
        new_offsets: int, new_order: int, new_inverse: int,
    ):  # fmt: skip
        begin, target, unnamed = 0, 0, 0
        for slot in range(slots):
            unnamed += read_i32(inverse, slot) != -1
        for expert in range(experts):
            end = read_i32(offsets, expert)
            if end < begin or end > rows:
                raise Nonsense
            for row in range(begin, end):
                slot = read_i32(order, row)
                if slot != -1:
                    if slot < 0 or slot >= slots or read_i32(inverse, slot) != row:
                        raise Nonsense
                    unnamed -= 1
                    write_i32(new_order, target + row - begin, slot)
                    write_i32(new_inverse, slot, target + row - begin)
            target += (end - begin + multiple - 1) // multiple * multiple
            begin = end
            write_i32(new_offsets, expert, target)
        for row in range(begin, rows):
            unnamed += read_i32(order, row) != -1
        if unnamed:
            raise Nonsense

    return pad_rows


# --- entries of a table ---------------------------------------------------------------------------------------------


@functools.cache
def row_tables_kernel() -> Callable:
    """The token of each row, from its slot."""

    @kernel()
    def row_tables(start: int, stop: int, order: int, slots: int, topk: int, row_token: int):
        for row in range(start, stop):
            slot = read_i32(order, row)
            if slot < -1 or slot >= slots:
                raise Nonsense
            write_i32(row_token, row, slot // topk if slot >= 0 else -1)

    return row_tables


@functools.cache
def take_kernel(size: int, wide: bool) -> Callable:
    """``out[i] = values[index[i]]`` for elements of ``size`` bytes, zero where the index is out of range."""
    read, write = _READ[size], _WRITE[size]

    @kernel(size, wide)
    def take(start: int, stop: int, values: int, length: int, index: int, out: int):
        for i in range(start, stop):
            place = read_i64(index, i) if wide else np.int64(read_i32(index, i))
            write(out, i, read(values, place) if 0 <= place < length else 0)

    return take


@functools.cache
def put_kernel(size: int, wide: bool) -> Callable:
    """``out[index[i]] = values[i]`` where the index is in range; what is not named is zero already."""
    read, write = _READ[size], _WRITE[size]

    @kernel(size, wide)
    def put(start: int, stop: int, values: int, index: int, length: int, out: int):
        for i in range(start, stop):
            place = read_i64(index, i) if wide else np.int64(read_i32(index, i))
            if 0 <= place < length:
                write(out, place, read(values, i))

    return put
