"""Packed matrices to elements, row by row of codes."""

from __future__ import annotations

import functools
from collections.abc import Callable

from moekit.kernels.numba._bits import copy, fence, scratch, stream, wide_vectors
from moekit.kernels.numba._elements import SIZES
from moekit.kernels.numba._gemm_kernels import PAD, bytes_in, pad
from moekit.kernels.numba._jit import kernel
from moekit.kernels.numba._tiles import TILE, expand
from moekit.kernels.numba._units import LOOKUP

_BUFFER = 4096  # bytes, in the first-level cache
_AHEAD = 4096  # bytes from what is read to what is prefetched


@functools.cache
def unpack_kernel(element: int, format: int, lookup: int = LOOKUP) -> Callable:
    """Rows of codes to rows of elements: past the cache, or, as ``past`` says, into it."""
    size, code_bytes = SIZES[element], bytes_in(format, SIZES[element])
    columns = _BUFFER // size

    @kernel(element, format, lookup)
    def unpack(
        start: int, stop: int, codes: int, codes_step: int, scales: int, line: int, out: int, width: int, past: int
    ):  # fmt: skip
        wide_vectors()
        buffer, last_codes = scratch(_BUFFER), scratch(PAD)
        for row in range(start, stop):
            for panel in range(0, width, columns):
                count = min(columns, width - panel)
                whole, source, target = panel + count // TILE * TILE, codes + row * codes_step, out + (row * width + panel) * size
                into = buffer if past else target
                expand(format, element, lookup, source, 0, scales, line + row, panel, whole, _AHEAD, into)
                if past:
                    stream(buffer, target, count * size)
                elif whole < panel + count:
                    pad(last_codes, source + code_bytes(whole), 0, 1, code_bytes(panel + count - whole))
                    source = last_codes - code_bytes(whole)
                    expand(format, element, lookup, source, 0, scales, line + row, whole, whole + TILE, 0, buffer)
                    copy(buffer, target + (whole - panel) * size, (panel + count - whole) * size)
        if past:
            fence()

    return unpack
