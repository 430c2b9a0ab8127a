"""Kernels on torch's own OpenMP threads, where torch runs on GNU's library (its Linux wheels do).

After an operator torch's threads spin for milliseconds, waiting for the next one. Threads of ours would have to share
the cores with them: two threads on two cores then do the work of one and a half. No Python runs in between, as the
threads would wait for each other's GIL.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

# A job in memory: next start, count, step, address of the kernel, status, and the arguments, 8 bytes each.
_HEADER, _STATUS = "5q", 4
_FORMATS = {types.int64: "q", types.float32: "f4x"}
_NAMES = {types.int64: "i64", types.float32: "float"}
# Numba's functions take two addresses first, for the result and for an exception, and return 0 if all went well.
_WORK = """
define void @{name}(ptr %job) {{
entry:
  %result = alloca ptr
  %exception = alloca ptr
  %count_at = getelementptr i64, ptr %job, i64 1
  %step_at = getelementptr i64, ptr %job, i64 2
  %kernel_at = getelementptr i64, ptr %job, i64 3
  %status_at = getelementptr i64, ptr %job, i64 4
  %count = load i64, ptr %count_at
  %step = load i64, ptr %step_at
  %kernel = load ptr, ptr %kernel_at
{loads}
  br label %take
take:
  %start = atomicrmw add ptr %job, i64 %step seq_cst
  %left = icmp slt i64 %start, %count
  br i1 %left, label %work, label %done
work:
  %end = add i64 %start, %step
  %within = icmp slt i64 %end, %count
  %stop = select i1 %within, i64 %end, i64 %count
  %status = call i32 %kernel(ptr %result, ptr %exception, i64 %start, i64 %stop{arguments})
  %well = icmp eq i32 %status, 0
  br i1 %well, label %take, label %failed
failed:
  store i64 1, ptr %status_at
  br label %take
done:
  ret void
}}
"""
_libraries = []  # machine code lives as long as these


def share(kernel: Callable, count: int, step: int, threads: int, args: tuple) -> bool:
    """Call ``kernel(start, stop, *args)`` on ranges of ``step`` that cover ``[0, count)``; False if it cannot be done."""
    if _parallel is None or not hasattr(kernel, "overloads"):
        return False
    work, address, layout = _compiled(kernel)
    job = bytearray(layout.size)
    layout.pack_into(job, 0, 0, count, step, address, 0, *args)
    _parallel(work, (ctypes.c_char * len(job)).from_buffer(job), threads, 0)
    if struct.unpack_from(_HEADER, job)[_STATUS]:
        kernel(0, count, *args)  # once more by way of Python, which raises the exception
    return True


@functools.cache
def _compiled(kernel: Any) -> tuple[int, int, struct.Struct]:
    """The addresses of the loop over ranges and of the kernel, and the layout of a job."""
    (parameters,) = kernel.signatures
    compiled = kernel.overloads[parameters]
    address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    extra = parameters[2:]
    return _work(extra), address, struct.Struct(_HEADER + "".join(_FORMATS[kind] for kind in extra))


@functools.cache
@global_compiler_lock
def _work(parameters: tuple) -> int:
    """Machine code that takes ranges of a job until none is left, for kernels of these parameters: its address."""
    name = f"moekit_work_{len(_libraries)}"
    loads, arguments = [], []
    for number, kind in enumerate(parameters):
        loads.append(f"  %at{number} = getelementptr i64, ptr %job, i64 {5 + number}")
        loads.append(f"  %arg{number} = load {_NAMES[kind]}, ptr %at{number}")
        arguments.append(f", {_NAMES[kind]} %arg{number}")
    context: Any = cpu_target.target_context
    library = context.codegen().create_library(name)
    text = _WORK.format(name=name, loads="\n".join(loads), arguments="".join(arguments))
    library.add_llvm_module(llvm.parse_assembly(text))
    library.finalize()
    _libraries.append(library)
    return library.get_pointer_to_function(name)


def _find_parallel() -> Callable | None:
    """GNU OpenMP's ``parallel(function, data, threads, flags)``, of the very library that torch runs on."""
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):  # another system, or another OpenMP
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


_parallel = _find_parallel()


def _leave() -> None:
    """A forked child has none of its parent's threads: OpenMP would wait for them forever."""
    global _parallel
    _parallel = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)
