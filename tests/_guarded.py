"""Tensors that end, or begin, at pages that cannot be touched: the first read or write outside ends the process."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_PAGE = 4096
_NONE, _READ_WRITE, _PRIVATE_ANONYMOUS = 0, 3, 0x22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guard:
    """Allocations between two pages that cannot be touched, each of which lives as long as a tensor of it.

    Who keeps a tensor may use it: code under test that fills a cache keeps some. Its address is not safe by itself.

    Args:
        fill: the byte that fresh memory holds, so that what is never written shows.
        at_end: for each allocation in turn, whether it ends where its pages end (else it begins where they begin).
    """

    def __init__(self, fill: int, at_end: Iterator[bool] | None = None) -> None:
        self._fill, self._at_end = fill, at_end if at_end is not None else itertools.repeat(True)

    def tensor(self, shape: Any, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor; one without elements is an ordinary one."""
        count = torch.Size(shape).numel() * dtype.itemsize
        if count == 0:
            return _EMPTY(shape, dtype=dtype)
        inner = -(-count // _PAGE) * _PAGE
        base = _libc.mmap(None, inner + 2 * _PAGE, _NONE, _PRIVATE_ANONYMOUS, -1, 0)
        if base in (None, ctypes.c_void_p(-1).value) or _libc.mprotect(base + _PAGE, inner, _READ_WRITE):
            raise MemoryError(f"no {inner} bytes between guard pages")
        ctypes.memset(base + _PAGE, self._fill, inner)
        start = base + _PAGE + (inner - count if next(self._at_end) else 0)
        buffer = (ctypes.c_char * count).from_address(start)  # which the tensor holds on to
        weakref.finalize(buffer, _libc.munmap, base, inner + 2 * _PAGE).atexit = False
        return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape)

    def copy(self, value: Tensor) -> Tensor:
        """The same numbers between guard pages; of a strided tensor the memory from its first element to its last."""
        if value.numel() == 0:
            return value.clone()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        target = torch.as_strided(self.tensor((extent,), value.dtype), value.shape, value.stride())
        return target.copy_(value)


_EMPTY = torch.empty
# What launchers make results and copies with.
_FACTORIES = ("empty", "empty_like", "zeros", "zeros_like", "full", "full_like")
_METHODS = ("new_empty", "contiguous", "to", "int")


@contextmanager
def guarded_results(guard: Guard) -> Iterator[None]:
    """Inside the ``with`` block what Python code allocates through torch lies between guard pages, too."""

    def replaced(make: Callable) -> Callable:
        def run(*args: Any, **options: Any) -> Any:
            made = make(*args, **options)
            ordinary = not made.numel() or made.device.type != "cpu" or not made.is_contiguous() or made.requires_grad
            if ordinary or any(made is arg for arg in args):
                return made
            if make.__name__.startswith(("empty", "new_empty")):
                return guard.tensor(made.shape, made.dtype)
            return guard.tensor(made.shape, made.dtype).copy_(made)

        return run

    places = [(torch, name) for name in _FACTORIES] + [(torch.Tensor, name) for name in _METHODS]
    originals = [(place, name, getattr(place, name)) for place, name in places]
    try:
        for place, name, original in originals:
            setattr(place, name, replaced(original))
        yield
    finally:
        for place, name, original in originals:
            setattr(place, name, original)
