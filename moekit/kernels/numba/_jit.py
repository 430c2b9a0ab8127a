"""How kernels are compiled: one signature each, without the GIL, kept on disk where a directory can be written.

Compilation happens when a kernel's factory first asks for it, so importing this package compiles nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numba import cfunc, njit, types

from moekit.kernels.numba import _cache

_cache.register()

# No flag lets NaN or infinity be assumed away, and only the additions made with _bits.plus may change their order:
# elsewhere "reassoc" would cancel the terms that make exp accurate, and let a product overflow on the way.
_OPTIONS: dict[str, Any] = {"fastmath": {"contract", "nsz"}, "error_model": "numpy"}

# The ways into a function from Python and from C take a tenth of the time to compile and more: only those that are used.
INLINE: Any = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_OPTIONS}
_KERNEL: dict[str, Any] = {"nogil": True, "no_cfunc_wrapper": True, **_OPTIONS}
inline = njit(**INLINE)
_NUMBA_TYPES = {"int": types.int64, "float": types.float32}


def kernel(*specialisation: Any) -> Callable[[Callable], Callable]:
    """Compile a function of ``int`` and ``float`` arguments (addresses are ints) to machine code. It may return an ``int``.

    Args:
        specialisation: the constants that the function closes over. They become part of its name on disk: two
            processes that fill an empty cache at once would otherwise mix up kernels of equal signatures.
    """

    def compile_(function: Callable) -> Callable:
        _name(function, specialisation)
        declared = inspect.signature(function)
        returns = _NUMBA_TYPES.get(declared.return_annotation, types.void)
        signature = returns(*(_NUMBA_TYPES[parameter.annotation] for parameter in declared.parameters.values()))
        try:
            return njit(signature, cache=True, **_KERNEL)(function)
        except (OSError, RuntimeError):  # nowhere to write: compile for this process alone
            return njit(signature, **_KERNEL)(function)

    return compile_


def worker(*specialisation: Any) -> Callable[[Callable], Any]:
    """Compile a function of one address to a C function, for threads that are not Python's."""

    def compile_(function: Callable) -> Any:
        _name(function, specialisation)
        try:
            return cfunc(types.void(types.int64), cache=True, **_OPTIONS)(function)
        except (OSError, RuntimeError):  # as above
            return cfunc(types.void(types.int64), **_OPTIONS)(function)

    return compile_


def _name(function: Callable, specialisation: tuple) -> None:
    parts = [function.__qualname__.replace(".<locals>", ""), *map(str, specialisation)]
    function.__qualname__ = "_".join(parts).replace("-", "m")
