"""Elements of stored matrices as vectors, in whatever format: LLVM instructions for the intrinsics in ``_tiles``.

A *unit* is 16 elements, and two units are 32 in a row: where a byte stands for two elements, those that come first in their
bytes and those that come second, otherwise the first half and the second. Values of four bits are looked up in a table of 16
that are multiplied by the scale and rounded already: with a scale for 32 or 64 of them that is less arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from moekit._codes import MXFP4_BLOCK, NESTED_BLOCK, NF4_BLOCK, NF4_TABLE
from moekit.kernels.numba._bits import CPU, HARDWARE_BF16, LINE, X86, BFloat16, emit_prefetch, scope

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT, HALF = ir.FloatType(), ir.HalfType()
UNIT = 16
F32, BF16, F16 = 1, 2, 3  # kinds of elements, as in _elements

# Formats. NESTED is nf4 whose scales are quantised themselves.
DENSE, NF4, NESTED, MXFP4, FP8, INT8 = range(6)
PAIRS = (False, True, True, True, False, False)  # whether a byte stands for two elements
BLOCK = (32, NF4_BLOCK, NF4_BLOCK, MXFP4_BLOCK, 32, 32)  # elements that are made at a time

# The instructions to take: all those of this CPU, no more of its vectors than what finds bytes in tables, those of any CPU.
HOST, BYTES, ANY = range(3)
_FINDS_WORDS = bool(X86 and CPU.get("avx512bw") and CPU.get("avx512vl"))
FINDS_BYTES = bool(CPU.get("avx2" if X86 else "neon"))
_FIND_BYTES = "llvm.x86.ssse3.pshuf.b.128" if X86 else "llvm.aarch64.neon.tbl1.v16i8"


class Scales(NamedTuple):
    """What is known of a packed stack beside its codes: as many 64-bit integers in memory, here as LLVM values."""

    scales: Any  # their address
    table: Any  # the address of mxfp4's tables, 16 elements for each exponent; of the values of nested scales
    groups: Any  # the address of the scales of nested scales
    offset: Any  # the address of what is added to them
    height: Any  # rows of an expert
    down: Any  # rows that share a scale
    tall: Any  # rows of scales of an expert
    across: Any  # scales of a row
    shift: Any  # the logarithm of the number of columns that share one


class Matrix(NamedTuple):
    """Some rows of a stack: constants, then LLVM values."""

    format: int
    kind: int
    cpu: int
    address: Any  # of the first row's first byte
    step: Any  # bytes from a row to the next
    scales: Scales | None  # None: dense
    first: Any  # the number of the first row's first scale
    scale_step: Any  # scales from a row to the next


def matrix(builder: Any, format: int, kind: int, cpu: int, address: Any, step: Any, scales: Any, line: Any) -> Matrix:
    """The rows from number ``line`` of the stack on, which ``scales`` is the address of :class:`Scales` of."""
    if format == DENSE:
        return Matrix(format, kind, cpu, address, step, None, I64(0), I64(0))
    words = Scales(*(load(builder, I64, builder.add(scales, I64(8 * n)), 8) for n in range(len(Scales._fields))))
    if format != FP8:
        return Matrix(format, kind, cpu, address, step, words, builder.mul(line, words.across), words.across)
    expert, row = builder.udiv(line, words.height), builder.urem(line, words.height)
    row_of_scales = builder.add(builder.mul(expert, words.tall), builder.udiv(row, words.down))
    each = builder.icmp_unsigned("==", words.down, I64(1))  # otherwise the rows taken together share their scales
    first = builder.mul(row_of_scales, words.across)
    return Matrix(format, kind, cpu, address, step, words, first, builder.select(each, words.across, I64(0)))


def units(builder: Any, matrix: Matrix, row: int, index: Any, ahead: Any) -> list[Any]:
    """The bits of a block of elements of a row, from number ``index`` on; what is ``ahead`` bytes further is prefetched."""
    block, size = BLOCK[matrix.format], bits_of(matrix.kind)[1]
    if matrix.format == DENSE:
        offset, count = builder.mul(index, I64(size)), block * size
    elif PAIRS[matrix.format]:
        offset, count = builder.lshr(index, I64(1)), block // 2
    else:
        offset, count = index, block
    address = builder.add(at(builder, matrix.address, matrix.step, row), offset)
    for line in range(0, count, LINE):
        emit_prefetch(builder, address, builder.add(ahead, I64(line)))
    words = matrix.scales
    if words is None:
        return [load(builder, bits, place, size) for bits, place in _places(builder, address, *bits_of(matrix.kind), 2)]
    shift = I64(block.bit_length() - 1) if PAIRS[matrix.format] else words.shift
    scale = builder.add(at(builder, matrix.first, matrix.scale_step, row), builder.lshr(index, shift))
    return (_four_bits if PAIRS[matrix.format] else _eight_bits)(builder, matrix, words, address, scale)


def _places(builder: Any, address: Any, element: Any, size: int, count: int) -> list[tuple[Any, Any]]:
    """The types and the addresses of units in a row in memory."""
    return [(vector(element), builder.add(address, I64(UNIT * size * number))) for number in range(count)]


# --- instructions ---------------------------------------------------------------------------------------------------


def bits_of(kind: int) -> tuple[Any, int]:
    """The type of an element's bits, and its size in bytes."""
    return (I32, 4) if kind == F32 else (I16, 2)


def vector(element: Any, lanes: int = UNIT) -> Any:
    """The type of a vector."""
    return ir.VectorType(element, lanes)


def every(kind: Any, value: Any) -> Any:
    """A vector that has a constant in each lane."""
    return ir.Constant(kind, [value] * kind.count)


def shuffled(builder: Any, first: Any, second: Any, lanes: Iterable[int]) -> Any:
    """Lanes of two vectors, those of the second counted on."""
    numbers = list(lanes)
    return builder.shuffle_vector(first, second, ir.Constant(vector(I32, len(numbers)), numbers))


def interleaved(builder: Any, first: Any, second: Any) -> Any:
    """The lanes of two vectors in turn."""
    return shuffled(builder, first, second, (lane + which for lane in range(UNIT) for which in (0, UNIT)))


def broadcast(builder: Any, value: Any, lanes: int = UNIT) -> Any:
    """A value in each lane of a vector."""
    first = builder.insert_element(ir.Constant(vector(value.type, lanes), ir.Undefined), value, I32(0))
    return shuffled(builder, first, first, [0] * lanes)


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call an intrinsic of LLVM."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [arg.type for arg in args]), name)
    return builder.call(function, args)


def load(builder: Any, kind: Any, address: Any, align: int) -> Any:
    """Read an input."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)
    value.set_metadata("alias.scope", scope(builder))
    return value


def at(builder: Any, base: Any, step: Any, number: int) -> Any:
    """``base + number * step``."""
    return builder.add(base, builder.mul(step, I64(number)))


def _entry(builder: Any, kind: Any, table: Any, number: Any, size: int) -> Any:
    return load(builder, kind, builder.add(table, builder.mul(number, I64(size))), size)


# --- rounding -------------------------------------------------------------------------------------------------------


def narrowed(builder: Any, matrix: Matrix, values: Any) -> Any:
    """A unit of float32 as the bits of elements, rounded to nearest even."""
    if matrix.kind == F32:
        return builder.bitcast(values, vector(I32))
    if matrix.kind == F16:
        return builder.bitcast(builder.fptrunc(values, vector(HALF)), vector(I16))
    if HARDWARE_BF16 and matrix.cpu == HOST:
        return builder.bitcast(builder.fptrunc(values, vector(BFloat16())), vector(I16))
    bits = builder.bitcast(values, vector(I32))
    even = builder.and_(builder.lshr(bits, every(vector(I32), 16)), every(vector(I32), 1))
    rounded = builder.add(bits, builder.add(even, every(vector(I32), 0x7FFF)))
    number = builder.fcmp_ordered("ord", values, values)
    bits = builder.select(number, rounded, every(vector(I32), 0x7FC00000))
    return builder.trunc(builder.lshr(bits, every(vector(I32), 16)), vector(I16))


# --- four bits ------------------------------------------------------------------------------------------------------


def _four_bits(builder: Any, matrix: Matrix, words: Scales, address: Any, scale: Any) -> list[Any]:
    table, found = (_mxfp4_table if matrix.format == MXFP4 else _nf4_table)(builder, matrix, words, scale), []
    for _, place in _places(builder, address, I8, 1, BLOCK[matrix.format] // (2 * UNIT)):
        low, high = _entries(builder, matrix.cpu, table, load(builder, vector(I8), place, 1))
        found += [low, high] if matrix.format == MXFP4 else [high, low]
    return found


def _mxfp4_table(builder: Any, matrix: Matrix, words: Scales, scale: Any) -> Any:
    element, size = bits_of(matrix.kind)
    exponent = builder.zext(load(builder, I8, builder.add(words.scales, scale), 1), I64)
    return _entry(builder, vector(element), words.table, exponent, UNIT * size)


def _nf4_table(builder: Any, matrix: Matrix, words: Scales, scale: Any) -> Any:
    if matrix.format == NF4:
        absmax = _entry(builder, FLOAT, words.scales, scale, 4)
    else:
        code = builder.zext(load(builder, I8, builder.add(words.scales, scale), 1), I64)
        group = builder.lshr(scale, I64(NESTED_BLOCK.bit_length() - 1))
        product = builder.fmul(_entry(builder, FLOAT, words.table, code, 4), _entry(builder, FLOAT, words.groups, group, 4))
        product = call(builder, "llvm.arithmetic.fence.f32", FLOAT, product)  # rounded: no part of a multiply-add
        absmax = builder.fadd(product, load(builder, FLOAT, words.offset, 4))
    values = builder.fmul(ir.Constant(vector(FLOAT), list(NF4_TABLE)), broadcast(builder, absmax))
    return narrowed(builder, matrix, values)


def _entries(builder: Any, cpu: int, table: Any, codes: Any) -> list[Any]:
    """The entries, of 16 or 32 bits, of the codes' low nibbles and of their high ones."""
    if table.type.element == I16:
        return _look_up(cpu)(builder, table, codes)
    halves = [builder.trunc(builder.lshr(table, every(vector(I32), shift)), vector(I16)) for shift in (0, 16)]
    parts = zip(*(_look_up(cpu)(builder, half, codes) for half in halves), strict=True)
    return [builder.bitcast(interleaved(builder, *both), vector(I32)) for both in parts]


def _look_up(cpu: int) -> Callable:
    """AVX-512 finds 16-bit entries by one instruction, others bytes of them; without either they are found one by one."""
    if cpu == HOST:
        return _by_words if _FINDS_WORDS else _by_bytes if FINDS_BYTES else _one_by_one
    return _by_bytes if cpu == BYTES else _one_by_one


def _by_words(builder: Any, table: Any, codes: Any) -> list[Any]:
    words = builder.zext(codes, vector(I16))
    nibbles = words, builder.lshr(words, every(vector(I16), 4))  # their low four bits count
    return [call(builder, "llvm.x86.avx512.permvar.hi.256", vector(I16), table, index) for index in nibbles]


def _by_bytes(builder: Any, table: Any, codes: Any) -> list[Any]:
    both, found = builder.bitcast(table, vector(I8, 2 * UNIT)), []
    tables = [shuffled(builder, both, both, range(part, 2 * UNIT, 2)) for part in (0, 1)]
    for index in _nibbles(builder, codes):
        parts = [call(builder, _FIND_BYTES, vector(I8), entries, index) for entries in tables]
        found.append(builder.bitcast(interleaved(builder, *parts), vector(I16)))
    return found


def _one_by_one(builder: Any, table: Any, codes: Any) -> list[Any]:
    place, found = cgutils.alloca_once(builder, table.type), []
    builder.store(table, place)
    entries = builder.bitcast(place, I16.as_pointer())
    for index in _nibbles(builder, codes):
        words = ir.Constant(vector(I16), ir.Undefined)
        for lane in map(I32, range(UNIT)):
            number = builder.zext(builder.extract_element(index, lane), I64)
            words = builder.insert_element(words, builder.load(builder.gep(entries, [number])), lane)
        found.append(words)
    return found


def _nibbles(builder: Any, codes: Any) -> tuple[Any, Any]:
    return builder.and_(codes, every(vector(I8), 15)), builder.lshr(codes, every(vector(I8), 4))


# --- eight bits -----------------------------------------------------------------------------------------------------


def _eight_bits(builder: Any, matrix: Matrix, words: Scales, address: Any, scale: Any) -> list[Any]:
    absmax = _entry(builder, FLOAT, words.scales, scale, 4)
    factor = broadcast(builder, builder.fmul(absmax, FLOAT(256.0)) if matrix.format == FP8 else absmax)
    values = _fp8 if matrix.format == FP8 else _int8
    codes = [load(builder, kind, place, 1) for kind, place in _places(builder, address, I8, 1, 2)]
    return [narrowed(builder, matrix, values(builder, part, factor)) for part in codes]


def _fp8(builder: Any, codes: Any, factor: Any) -> Any:
    """By way of float16, whose exponents are 8 more: that takes subnormal codes along."""
    words = builder.zext(codes, vector(I16))
    magnitude = builder.and_(words, every(vector(I16), 0x7F))
    sign = builder.shl(builder.and_(words, every(vector(I16), 0x80)), every(vector(I16), 8))
    number = builder.icmp_unsigned("!=", magnitude, every(vector(I16), 0x7F))
    bits = builder.select(number, builder.shl(magnitude, every(vector(I16), 7)), every(vector(I16), 0x7E00))
    half = builder.bitcast(builder.or_(bits, sign), vector(HALF))
    return builder.fmul(builder.fpext(half, vector(FLOAT)), factor)


def _int8(builder: Any, codes: Any, factor: Any) -> Any:
    value = builder.sitofp(builder.sext(codes, vector(I32)), vector(FLOAT))
    return builder.fmul(builder.fmul(value, factor), every(vector(FLOAT), 1 / 127))
