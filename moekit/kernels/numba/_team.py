"""PyTorch's own OpenMP threads as workers, where it has them.

After a parallel operator of PyTorch its threads spin for some milliseconds in wait of the next one, and threads of our own
would have to share the cores with them: two threads on two cores then do the work of one and a half. So kernels are handed
to those very threads, as ``#pragma omp parallel`` would: they take ranges from a block in memory, by a worker function that
reads the kernel's arguments from it. No Python runs there, as the threads would wait for each other's GIL.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numba.core.dispatcher import Dispatcher
from numba.core.types import float32

from moekit.kernels.numba._bits import call_kernel, fetch_add, read_back_i64, write_i64
from moekit.kernels.numba._jit import worker

# The words of a block: the next range, then these.
_COUNT, _STEP, _FUNCTION, _FAILED, _ARGUMENTS = range(1, 6)
# A forked child has none of its parent's threads, which OpenMP does not notice: it would wait for them. A child that
# imports this only after the fork is known by multiprocessing's parent, unless it was spawned.
_forked = multiprocessing.parent_process() is not None and "--multiprocessing-fork" not in sys.orig_argv


def share(kernel: Callable, count: int, step: int, args: tuple, threads: int) -> bool:
    """Call ``kernel(start, stop, *args)`` on ranges of ``step``; False, and nothing done, where that is impossible."""
    parallel = _entry_point()
    if parallel is None or _forked or not isinstance(kernel, Dispatcher):
        return False
    function, layout, work = native(kernel)
    block = (ctypes.c_int64 * (_ARGUMENTS + len(args)))()
    struct.pack_into(layout, block, 0, 0, count, step, function, 0, *args)
    parallel(work, ctypes.addressof(block), threads, 0)
    if block[_FAILED]:
        kernel(0, count, *args)  # once more by way of Python, which raises the exception
    return True


@functools.cache
def _entry_point() -> Any:
    """``GOMP_parallel`` of the OpenMP library that PyTorch is linked to (LLVM's and Intel's have it too on Linux)."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function


@functools.cache
def native(kernel: Dispatcher) -> tuple[int, str, int]:
    """The kernel's machine code, how ``struct`` packs its block, and its worker."""
    (compiled,) = kernel.overloads.values()
    kinds = "".join("f" if kind == float32 else "q" for kind in compiled.signature.args[2:])
    layout = "@5q" + "".join("f4x" if kind == "f" else "q" for kind in kinds)
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name), layout, _worker(kinds).address


@functools.cache
def _worker(kinds: str) -> Any:
    """What each thread of the team runs: ranges of a kernel with arguments of these kinds, until none is left."""

    @worker(kinds)
    def work(block):
        count, step = read_back_i64(block, _COUNT), read_back_i64(block, _STEP)
        function = read_back_i64(block, _FUNCTION)
        start = fetch_add(block, step)
        while start < count:
            if call_kernel(kinds, function, start, min(start + step, count), block + 8 * _ARGUMENTS):
                write_i64(block, _FAILED, 1)
            start = fetch_add(block, step)

    return work


def _leave() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)
