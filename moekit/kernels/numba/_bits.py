"""The intrinsics: what plain Numba cannot say. Addresses are 64-bit integers.

LLVM turns each into code for whatever CPU it runs on. The conversions that need an instruction some CPUs lack
(``HARDWARE_*``) have twins in integer arithmetic (:mod:`moekit.kernels.numba._elements`).

Measured on two cores, weighted SwiGLU of ``[32768, 2 * 768]``: :func:`prefetch` 1.7x (bfloat16 forward, 19.3 to
11.3 ms), :func:`stream` 1.4x (float32 backward, 40.6 to 28.3 ms), :func:`wide_vectors` 1.3x (bfloat16 backward, 26.2 to
19.6 ms of one core).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

CPU = llvm.get_host_cpu_features()
X86 = llvm.get_process_triple().startswith(("x86_64", "amd64"))
ZEN = llvm.get_host_cpu_name().startswith("znver")
HARDWARE_BF16 = bool(CPU.get("avx512bf16" if X86 else "bf16"))
HARDWARE_F16 = bool(CPU.get("f16c" if X86 else "neon"))

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_FLOAT, _HALF, _VOID = ir.FloatType(), ir.HalfType(), ir.VoidType()
LINE = 64  # bytes of a cache line


class BFloat16(ir.types.Type):
    """LLVM's ``bfloat``, which llvmlite has no name for."""

    null = "0.0"
    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16)

    def __hash__(self) -> int:
        return hash(BFloat16)


def _define(signature: Any, emit: Callable) -> Any:
    """An intrinsic from the LLVM instructions that ``emit(builder, *arguments)`` writes."""

    def lower(context: Any, builder: Any, _: Any, args: Any) -> Any:
        value = emit(builder, *args)
        return context.get_dummy_value() if signature.return_type is types.void else value

    # Numba reads the number of arguments off the function.
    if len(signature.args) == 1:
        return intrinsic(lambda typing, a: (signature, lower))
    if len(signature.args) == 2:
        return intrinsic(lambda typing, a, b: (signature, lower))
    return intrinsic(lambda typing, a, b, c: (signature, lower))


# --- conversions ----------------------------------------------------------------------------------------------------

bits_of = _define(types.uint32(types.float32), lambda b, x: b.bitcast(x, _I32))
float_of = _define(types.float32(types.uint32), lambda b, x: b.bitcast(x, _FLOAT))
narrow_bf16 = _define(types.uint16(types.float32), lambda b, x: b.bitcast(b.fptrunc(x, BFloat16()), _I16))
narrow_f16 = _define(types.uint16(types.float32), lambda b, x: b.bitcast(b.fptrunc(x, _HALF), _I16))
widen_f16 = _define(types.float32(types.uint16), lambda b, x: b.fpext(b.bitcast(x, _HALF), _FLOAT))

# x + y where the order of a long sum is free: LLVM cannot vectorise a dot product otherwise. Which order it takes
# depends on the code alone, never on the number of threads.
plus = _define(
    types.float32(types.float32, types.float32),
    lambda b, x, y: b.fadd(x, y, flags=("reassoc", "contract", "nsz")),
)
trailing_zeros = _define(types.int64(types.uint64), lambda b, x: b.cttz(x, ir.Constant(_I1, 1)))
count_ones = _define(types.int64(types.uint64), lambda b, x: b.ctpop(x))

# --- memory ---------------------------------------------------------------------------------------------------------


def scope(builder: Any) -> Any:
    """What every read is in and no write touches: LLVM then vectorises without checking at run time for overlap."""
    module = builder.module
    return module.add_metadata([module.add_metadata(["inputs", module.add_metadata(["moekit"])])])


def _reader(numba_type: Any, llvm_type: Any, size: int, *, input: bool = True) -> Any:
    def emit(builder: Any, base: Any, index: Any) -> Any:
        value = builder.load(builder.gep(builder.inttoptr(base, llvm_type.as_pointer()), [index]), align=size)
        if input:
            value.set_metadata("alias.scope", scope(builder))
        return value

    return _define(numba_type(types.int64, types.int64), emit)


def _writer(numba_type: Any, llvm_type: Any, size: int) -> Any:
    def emit(builder: Any, base: Any, index: Any, value: Any) -> None:
        target = builder.gep(builder.inttoptr(base, llvm_type.as_pointer()), [index])
        builder.store(value, target, align=size).set_metadata("noalias", scope(builder))

    return _define(types.void(types.int64, types.int64, numba_type), emit)


# Elements of an operator's inputs. What a kernel wrote itself must not be read back through these.
read_f32, write_f32 = (make(types.float32, _FLOAT, 4) for make in (_reader, _writer))
read_u8, write_u8 = (make(types.uint8, _I8, 1) for make in (_reader, _writer))
read_u16, write_u16 = (make(types.uint16, _I16, 2) for make in (_reader, _writer))
read_i32, write_i32 = (make(types.int32, _I32, 4) for make in (_reader, _writer))
read_i64, write_i64 = (make(types.int64, _I64, 8) for make in (_reader, _writer))
# What the kernel itself wrote, or another one is writing.
read_back_f32 = _reader(types.float32, _FLOAT, 4, input=False)
read_back_i32 = _reader(types.int32, _I32, 4, input=False)
read_back_i64 = _reader(types.int64, _I64, 8, input=False)


def _add_f32(builder: Any, base: Any, index: Any, value: Any) -> None:
    target = builder.gep(builder.inttoptr(base, _FLOAT.as_pointer()), [index])
    total = builder.fadd(builder.load(target, align=4), value)
    builder.store(total, target, align=4).set_metadata("noalias", scope(builder))


add_f32 = _define(types.void(types.int64, types.int64, types.float32), _add_f32)


def emit_prefetch(builder: Any, base: Any, offset: Any) -> None:
    """Ask for a cache line that will be read soon. Any address will do, mapped or not."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VOID, [_I8.as_pointer(), _I32, _I32, _I32]), "llvm.prefetch.p0"
    )
    address = builder.inttoptr(builder.add(base, offset), _I8.as_pointer())
    for_reading, everywhere, data = _I32(0), _I32(3), _I32(1)
    builder.call(function, [address, for_reading, everywhere, data])


prefetch = _define(types.void(types.int64, types.int64), emit_prefetch)


def _copy_lines(builder: Any, source: Any, target: Any, count: Any, *, streaming: bool) -> None:
    vector = ir.VectorType(_I32, 8)
    with cgutils.for_range_slice(builder, _I64(0), count, _I64(LINE), intp=_I64) as (offset, _):
        for part in (0, LINE // 2):
            place = builder.add(offset, _I64(part))
            value = builder.load(builder.inttoptr(builder.add(source, place), vector.as_pointer()), align=1)
            pointer = builder.inttoptr(builder.add(target, place), vector.as_pointer())
            store = builder.store(value, pointer, align=LINE // 2 if streaming else 1)
            if streaming:
                store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


# stream(source, target, count): copy whole lines past the cache to a target aligned to lines; without reading the
# target first, as an ordinary store would, and without driving out what is needed again. Kernels end with fence().
stream = _define(types.void(types.int64, types.int64, types.int64), lambda b, *args: _copy_lines(b, *args, streaming=True))


def _fence(typing: Any) -> Any:
    """Make streamed lines visible to other threads before anything that follows."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), lower


def _copy(builder: Any, source: Any, target: Any, count: Any) -> None:
    to, of = builder.inttoptr(target, _I8.as_pointer()), builder.inttoptr(source, _I8.as_pointer())
    cgutils.raw_memcpy(builder, to, of, count, 1)


def _zero(builder: Any, target: Any, count: Any) -> None:
    cgutils.memset(builder, builder.inttoptr(target, _I8.as_pointer()), count, 0)


copy = _define(types.void(types.int64, types.int64, types.int64), _copy)
zero = _define(types.void(types.int64, types.int64), _zero)


def _nonzero64(typing: Any, size: Any, base: Any, mask: Any) -> Any:
    """Which of 64 elements of ``size`` bytes (a constant) have a bit of ``mask`` set; the first is the lowest bit."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = ir.IntType(8 * size.literal_value)
        vector = ir.VectorType(element, 64)
        values = builder.load(builder.inttoptr(args[1], vector.as_pointer()), align=1)
        bits = args[2] if size.literal_value == 8 else builder.trunc(args[2], element)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), bits, _I32(0))
        everywhere = ir.Constant(ir.VectorType(_I32, 64), [0] * 64)
        masked = builder.and_(values, builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), everywhere))
        return builder.bitcast(builder.icmp_unsigned("!=", masked, ir.Constant(vector, [0] * 64)), _I64)

    return types.uint64(size, types.int64, types.int64), lower


def _scratch(typing: Any, size: Any) -> Any:
    """The address of ``size`` bytes (a constant) on the stack, aligned to lines."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            place = builder.alloca(ir.ArrayType(_I8, size.literal_value))
            place.align = LINE
        return builder.ptrtoint(place, _I64)

    return types.int64(size), lower


def _wide_vectors(typing: Any) -> Any:
    """Let LLVM take 512-bit vectors in this kernel where the CPU has them: on Intel's it prefers 256 by itself."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite's own add() knows attributes of one word only.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), lower


fence: Any = intrinsic(_fence)
nonzero64: Any = intrinsic(prefer_literal=True)(_nonzero64)
scratch: Any = intrinsic(prefer_literal=True)(_scratch)
wide_vectors: Any = intrinsic(_wide_vectors)

# --- calls by address -------------------------------------------------------------------------------------------------

fetch_add = _define(
    types.int64(types.int64, types.int64),
    lambda b, base, value: b.atomic_rmw("add", b.inttoptr(base, _I64.as_pointer()), value, "monotonic"),
)


def _call_kernel(typing: Any, kinds: Any, function: Any, start: Any, stop: Any, arguments: Any) -> Any:
    """Call a compiled kernel: ``start``, ``stop`` and words at ``arguments``, each an integer ("q") or a float ("f").

    Returns a status, 0 unless it failed. Numba's functions take two addresses first, for the result (a kernel has none)
    and for what went wrong.
    """

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, function, start, stop, arguments = args
        found = [start, stop]
        for number, kind in enumerate(kinds.literal_value):
            address = builder.add(arguments, _I64(8 * number))
            found.append(builder.load(builder.inttoptr(address, (_FLOAT if kind == "f" else _I64).as_pointer())))
        pointer = _I8.as_pointer()
        parameters = [pointer, pointer, *(value.type for value in found)]
        places = [builder.bitcast(cgutils.alloca_once(builder, pointer), pointer) for _ in range(2)]
        target = builder.inttoptr(function, ir.FunctionType(_I32, parameters).as_pointer())
        return builder.zext(builder.call(target, [*places, *found]), _I64)

    return types.int64(kinds, *[types.int64] * 4), lower


call_kernel: Any = intrinsic(prefer_literal=True)(_call_kernel)
