"""Triton's interpreter, made to convert bfloat16 as GPUs do, and faster.

Where float32 becomes bfloat16 it truncates instead of rounding to nearest even, it gets subnormal numbers wrong in both
directions, and it multiplies matrices of bfloat16 as if their bits were integers; it also spends most of its time on
looking itself up. Importing this module puts both right for the process, if it interprets.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# How often what has to come out the same every time is computed: the interpreter takes milliseconds a kernel.
RUNS = 4 if INTERPRETED else 20


def run_interpreted(*files: Path) -> None:
    """Run test files in another process, with every operator on the Triton kernels, interpreted; they must pass."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "MOEKIT_BACKEND": "triton", "PYTHONPATH": os.pathsep.join(sys.path)}
    options = ["-q", "-p", "no:cacheprovider", "-p", "_interpreter", "-m", "not slow"]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, files)],
        env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, f"in the interpreter:\n{child.stdout[-6000:]}\n{child.stderr[-2000:]}"


def _widen(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint32) << np.uint32(16)


def _round(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values.view(np.float32)), np.uint32(0x7FC0), nearest).astype(np.uint16)


def _patch_language_once() -> None:
    """Triton looks through its whole language at each launch and each call of a device function: half of a test's time.

    Here the first time is the last, and stays. What it puts in place hands the arguments on as they are.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def attach(owner, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)

        def call(*args, **named):
            named["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **named)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = attach
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing = interpreter._LangPatchScope()
    interpreter._patch_lang = lambda fn: nothing


def _patch_types() -> None:
    """A block's type is made anew for each operation, and compared shape by shape: here each is made once, and found."""
    from triton.language import core
    from triton.runtime import interpreter

    complete, equal, numpys = core.block_type.__init__, core.dtype.__eq__, interpreter._get_np_dtype
    blocks, shapes, found = {}, {}, {}

    def block(kind, element_ty, shape):
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = (element_ty.name, sizes)
        if key not in blocks:
            made = object.__new__(kind)
            complete(made, element_ty, shape)
            made.sizes = sizes
            blocks[key] = made
        return blocks[key]

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if type.sizes not in shapes:
            shapes[type.sizes] = core.tuple(map(core.constexpr, type.sizes)), core.constexpr(math.prod(type.sizes))
        self.shape, self.numel = shapes[type.sizes]

    def numpy_type(type):
        if type.name not in found:
            found[type.name] = numpys(type)
        return found[type.name]

    unwrap, plain = core._unwrap_if_constexpr, {core.tensor, core.dtype, int, float, bool, str, type(None)}

    def unwrapped(o):
        kind = type(o)
        return o if kind in plain else o.value if kind is core.constexpr else unwrap(o)

    core._unwrap_if_constexpr = unwrapped
    core.block_type.__new__ = block
    core.block_type.__init__ = lambda self, element_ty, shape: None
    core.dtype.sizes = ()
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    core.tensor.__init__ = tensor
    interpreter._get_np_dtype = numpy_type


def _patch_operands() -> None:
    """Most operands have one type, or one is a number, and are used as they are, without the general case's conversions.

    Those of another shape get the type of the common one and keep their data: what NumPy then computes has that shape.
    Numbers are made once. Integers were computed in int64 once more, to look for an overflow that debug mode alone would
    report: no longer.
    """
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    convert, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    numbers, shapes, types = {}, {}, {}
    kept = {"int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "fp32"}  # if divided, too
    ranges = {"int32": range(-(2**31), 2**31), "int64": range(-(2**63), 2**63)}

    def number(self, value, dtype):
        if type(value) is float and value == 0:  # of either sign
            return self.scalar_constant(value, dtype)
        key = value, dtype.name
        if key not in numbers:
            numbers[key] = self.scalar_constant(value, dtype)
        return numbers[key]

    def keeps(x, value):
        kind, name = type(value), x.dtype.name
        return (kind is int or kind is float) if name == "fp32" else kind is int and value in ranges.get(name, ())

    def common(ours, theirs):
        key = ours, theirs
        if key not in shapes:
            shapes[key] = np.broadcast_shapes(ours, theirs)
        return shapes[key]

    def block(dtype, sizes):
        key = dtype.name, sizes
        if key not in types:
            types[key] = core.block_type(dtype, list(sizes))
        return types[key]

    def of_size(self, x, sizes):
        return x if x.type.sizes == sizes else self.tensor(x.handle, block(x.dtype, sizes))

    def converted(self, lhs, rhs, allow_lhs_ptr=False, *rest, **named):
        if not isinstance(rhs, core.tensor):
            if not isinstance(lhs, core.tensor) or not keeps(lhs, rhs):
                return convert(self, lhs, rhs, allow_lhs_ptr, *rest, **named)
            rhs = number(self, rhs, lhs.dtype)
        elif not isinstance(lhs, core.tensor):
            if not keeps(rhs, lhs):
                return convert(self, lhs, rhs, allow_lhs_ptr, *rest, **named)
            lhs = number(self, lhs, rhs.dtype)
        else:
            left, right = lhs.dtype, rhs.dtype
            same = left.name == right.name and left.name in kept
            if not (same or (allow_lhs_ptr and right.name in ranges and isinstance(left, core.pointer_type))):
                return convert(self, lhs, rhs, allow_lhs_ptr, *rest, **named)
        ours, theirs = lhs.type.sizes, rhs.type.sizes
        if ours == theirs:
            return lhs, rhs
        if ours and theirs and len(ours) != len(theirs):
            return broadcast(self, lhs, rhs)
        sizes = common(ours, theirs)
        return of_size(self, lhs, sizes), of_size(self, rhs, sizes)

    def spread(self, x, sizes):
        if x.type.sizes == sizes:
            return x
        type = block(x.dtype, sizes)
        builder = self.builder
        alone = not x.type.sizes
        handle = builder.create_splat(type, x.handle) if alone else builder.create_broadcast(x.handle, sizes)
        return self.tensor(handle, type)

    def broadcasted(self, lhs, rhs):
        ours, theirs = lhs.type.sizes, rhs.type.sizes
        if ours == theirs:
            return lhs, rhs
        if ours and theirs and len(ours) != len(theirs):
            return broadcast(self, lhs, rhs)
        sizes = common(ours, theirs)
        return spread(self, lhs, sizes), spread(self, rhs, sizes)

    TritonSemantic.binary_op_type_checking_impl = converted
    TritonSemantic.broadcast_impl_value = broadcasted
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_sort() -> None:
    """Triton sorts by a network of exchanges, each of a dozen operations; NumPy at once, to the same integers."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    tl.sort = lambda x: tl.tensor(TensorHandle(np.sort(x.handle.data), x.dtype), x.type)


def _patch_conversions() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def exact(values, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return _widen(np.ascontiguousarray(values).view(np.uint16)).reshape(values.shape)
        if (source, target) == (tl.float32, tl.bfloat16):
            return _round(np.ascontiguousarray(values)).reshape(values.shape)
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = exact


def _patch_dot() -> None:
    """A product of bfloat16 multiplies its bits as integers; here they are numbers.

    And on some processors a row of NumPy's float32 products depends on its place among the others. Products are exact in
    float64, and sums of them all but exact, so that one rounding gives the same number wherever a row is.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    multiply, floats = interpreter.InterpreterBuilder.create_dot, (tl.bfloat16, tl.float16, tl.float32)

    def wide(x):
        data = x.data
        if x.dtype.scalar == tl.bfloat16:
            data = _widen(np.ascontiguousarray(data).view(np.uint16)).view(np.float32).reshape(data.shape)
        return data.astype(np.float64)

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar not in floats or b.dtype.scalar not in floats:
            return multiply(self, a, b, d, *rest)
        product = np.matmul(wide(a), wide(b)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    _patch_language_once()
    _patch_types()
    _patch_operands()
    _patch_dot()
    _patch_sort()
    _patch_conversions()
