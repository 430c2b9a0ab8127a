"""The intrinsics of matrix products, for matrices in any format: rows made, multiplied with, and added up.

A tile is a few rows and a few steps (inputs or outputs) of a product with a matrix, so that an element of the matrix is made
once for all its rows, and never leaves the registers. Every sum has its own accumulators: a result's bits do not depend on
what else is in the tile. What plain loops lack is the prefetch between the products, and sums of several rows that stay in
registers (4 rows of bfloat16: 2.1 instead of 3.8 ms). The products of bfloat16 by one instruction take subnormals for zero.

Constants come first: the format and the kind of elements of the matrix (see ``_units`` and ``_elements``), the instructions
to take, and the numbers of rows and of steps. Then what is known of the matrix: the address of its first row, the bytes from
a row to the next, the address of its scales' description, the number of the row in the stack. Columns from ``begin`` to
``end``, both whole blocks of the format, are taken; ``ahead`` bytes ahead of them is prefetched.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moekit.kernels.numba._bits import CPU, LINE, X86, scope
from moekit.kernels.numba._units import (
    BF16,
    BLOCK,
    F16,
    FLOAT,
    HALF,
    HOST,
    I32,
    I64,
    PAIRS,
    UNIT,
    Matrix,
    at,
    bits_of,
    broadcast,
    call,
    every,
    interleaved,
    load,
    matrix,
    shuffled,
    units,
    vector,
)

TILE = 2 * UNIT
_HALF = UNIT // 2  # lanes of a vector of sums: 256 bits, which stores and loads pass on to each other everywhere
STEPS = 4  # sums from those of a row to those of the next, for dots
# For axpys: the sums of a row, and the bytes from those to the next row's, which would get in each other's way a page apart.
COLUMNS = 1024
PANEL = 4 * COLUMNS + LINE
_HARDWARE_DOT = bool(X86 and CPU.get("avx512bf16") and CPU.get("avx512vl"))


def _intrinsic(emit: Callable, constants: int, arguments: int) -> Any:
    """From ``emit(builder, matrix, *constants, *arguments)``; those of the matrix are before either."""
    fixed, described = 3 + constants, 4

    def define(typing: Any, *given: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values, rest = [constant.literal_value for constant in given[:fixed]], args[fixed:]
            emit(builder, matrix(builder, *values[:3], *rest[:described]), *values[3:], *rest[described:])
            return context.get_dummy_value()

        return types.void(*given[:fixed], *[types.int64] * (described + arguments)), lower

    # Numba reads the number of arguments off the function.
    names = ["typing", *(f"argument_{number}" for number in range(fixed + described + arguments))]
    order = inspect.Parameter.POSITIONAL_OR_KEYWORD
    define.__signature__ = inspect.Signature([inspect.Parameter(name, order) for name in names])  # type: ignore
    return intrinsic(prefer_literal=True)(define)


def _columns(builder: Any, stored: Matrix, begin: Any, end: Any) -> Any:
    return cgutils.for_range_slice(builder, begin, end, I64(BLOCK[stored.format]), intp=I64)


def _pairs(found: list[Any]) -> Any:
    """Units two by two: 32 elements in a row."""
    return zip(found[::2], found[1::2], strict=True)


def _widened(builder: Any, kind: int, unit: Any, lanes: int) -> list[Any]:
    """The bits of a unit as float32 vectors. Of bfloat16 these are the even and the odd elements, which is cheaper."""
    if kind == BF16:
        bits = builder.bitcast(unit, vector(I32, _HALF))
        even = builder.shl(bits, every(bits.type, 16))
        odd = builder.and_(bits, every(bits.type, -0x10000))
        return [builder.bitcast(part, vector(FLOAT, _HALF)) for part in (even, odd)]
    parts = [shuffled(builder, unit, unit, range(first, first + lanes)) for first in range(0, UNIT, lanes)]
    if kind == F16:
        return [builder.fpext(builder.bitcast(part, vector(HALF, lanes)), vector(FLOAT, lanes)) for part in parts]
    return [builder.bitcast(part, vector(FLOAT, lanes)) for part in parts]


def _multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


# --- elements as they are -------------------------------------------------------------------------------------------


def _expand(builder: Any, stored: Matrix, begin: Any, end: Any, ahead: Any, target: Any) -> None:
    size = bits_of(stored.kind)[1]
    with _columns(builder, stored, begin, end) as (index, _):
        place = builder.add(target, builder.mul(builder.sub(index, begin), I64(size)))
        for first, second in _pairs(units(builder, stored, 0, index, ahead)):
            if PAIRS[stored.format]:
                row = interleaved(builder, first, second)
            else:
                row = shuffled(builder, first, second, range(TILE))
            builder.store(row, builder.inttoptr(place, row.type.as_pointer()), align=size)
            place = builder.add(place, I64(TILE * size))


# --- dot products ---------------------------------------------------------------------------------------------------


def _dots(builder: Any, stored: Matrix, rows: int, steps: int, x: Any, x_step: Any,
          begin: Any, end: Any, ahead: Any, sums: Any) -> None:  # fmt: skip
    """``sums[row, step] += dot(x[row], matrix[step])``."""
    lanes = _HALF if stored.kind == BF16 else UNIT
    totals = {
        tile: [cgutils.alloca_once_value(builder, every(vector(FLOAT, lanes), 0.0)) for _ in range(UNIT // lanes)]
        for tile in itertools.product(range(rows), range(steps))
    }
    with _columns(builder, stored, begin, end) as (index, _):
        lefts = [_in_order_of(builder, stored, at(builder, x, x_step, row), index) for row in range(rows)]
        for step in range(steps):
            rights = units(builder, stored, step, index, ahead)
            for row in range(rows):
                for left, right in zip(_pairs(lefts[row]), _pairs(rights), strict=True):
                    _multiply(builder, stored, left, right, totals[row, step])
    for (row, step), places in totals.items():
        place = builder.inttoptr(builder.add(sums, I64(4 * (row * STEPS + step))), FLOAT.as_pointer())
        total = _sum_of_lanes(builder, [builder.load(part) for part in places])
        builder.store(builder.fadd(builder.load(place, align=4), total), place, align=4)


def _in_order_of(builder: Any, stored: Matrix, row: Any, index: Any) -> list[Any]:
    """The bits of another factor's elements, in units like those of the matrix."""
    element, size = bits_of(stored.kind)
    place, found = builder.add(row, builder.mul(index, I64(size))), []
    lanes = [range(0, TILE, 2), range(1, TILE, 2)] if PAIRS[stored.format] else [range(UNIT), range(UNIT, TILE)]
    for number in range(BLOCK[stored.format] // TILE):
        both = load(builder, vector(element, TILE), builder.add(place, I64(number * TILE * size)), size)
        found += [shuffled(builder, both, both, part) for part in lanes]
    return found


def _multiply(builder: Any, stored: Matrix, left: Any, right: Any, totals: list[Any]) -> None:
    """Add the products of two pairs of units to two vectors of sums."""
    if stored.kind == BF16 and stored.cpu == HOST and _HARDWARE_DOT:
        words, sums = vector(I32, _HALF), vector(FLOAT, _HALF)
        for *factors, place in zip(left, right, totals, strict=True):
            bits = [builder.bitcast(factor, words) for factor in factors]
            total = call(builder, "llvm.x86.avx512bf16.dpbf16ps.256", sums, builder.load(place), *bits)
            builder.store(total, place)
        return
    for unit, other in zip(left, right, strict=True):
        lanes = UNIT // len(totals)
        factors = _widened(builder, stored.kind, unit, lanes), _widened(builder, stored.kind, other, lanes)
        for a, b, place in zip(*factors, totals, strict=True):
            builder.store(_multiply_add(builder, a, b, builder.load(place)), place)


def _sum_of_lanes(builder: Any, vectors: list[Any]) -> Any:
    total = functools.reduce(builder.fadd, vectors)
    while (half := total.type.count // 2) > 1:
        low, high = (shuffled(builder, total, total, range(first, first + half)) for first in (0, half))
        total = builder.fadd(low, high)
    return builder.fadd(builder.extract_element(total, I32(0)), builder.extract_element(total, I32(1)))


# --- their transpose ------------------------------------------------------------------------------------------------


def _axpys(builder: Any, stored: Matrix, rows: int, steps: int, x: Any, x_step: Any,
           begin: Any, end: Any, ahead: Any, sums: Any) -> None:  # fmt: skip
    """``sums[row] += x[row, step] * matrix[step]`` for each step; a row's sums are PANEL apart, and as ``lane_of`` says."""
    size = bits_of(stored.kind)[1]
    factors = {
        (row, step): _splat(builder, stored.kind, at(builder, builder.add(x, I64(size * step)), x_step, row))
        for row, step in itertools.product(range(rows), range(steps))
    }
    with _columns(builder, stored, begin, end) as (index, _):
        made = [units(builder, stored, step, index, ahead) for step in range(steps)]
        place = builder.add(sums, builder.mul(builder.sub(index, begin), I64(4)))
        for number in range(len(made[0])):
            parts = [_widened(builder, stored.kind, found[number], _HALF) for found in made]
            for part, row in itertools.product((0, 1), range(rows)):
                address = builder.add(place, I64(row * PANEL + 4 * (number * UNIT + part * _HALF)))
                pointer = builder.inttoptr(address, vector(FLOAT, _HALF).as_pointer())
                total = builder.load(pointer, align=4 * _HALF)
                for step in range(steps):
                    total = _multiply_add(builder, factors[row, step], parts[step][part], total)
                builder.store(total, pointer, align=4 * _HALF).set_metadata("noalias", scope(builder))


def _splat(builder: Any, kind: int, address: Any) -> Any:
    """One element in all lanes of a vector."""
    element, size = bits_of(kind)
    bits = load(builder, element, address, size)
    if kind == BF16:
        value = builder.bitcast(builder.shl(builder.zext(bits, I32), I32(16)), FLOAT)
    else:
        value = builder.fpext(builder.bitcast(bits, HALF), FLOAT) if kind == F16 else builder.bitcast(bits, FLOAT)
    return broadcast(builder, value, _HALF)


expand = _intrinsic(_expand, constants=0, arguments=4)
dots = _intrinsic(_dots, constants=2, arguments=6)
axpys = _intrinsic(_axpys, constants=2, arguments=6)
