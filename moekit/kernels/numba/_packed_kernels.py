"""Packed matrices to elements, row by row of codes."""

from __future__ import annotations

import functools
from collections.abc import Callable

from moekit.kernels.numba._bits import copy, fence, scratch, stream, wide_vectors
from moekit.kernels.numba._elements import SIZES
from moekit.kernels.numba._gemm_kernels import PAD, bits_of_code, pad
from moekit.kernels.numba._jit import kernel
from moekit.kernels.numba._tiles import TILE, expand
from moekit.kernels.numba._units import HOST

_BUFFER = 4096  # bytes, in the first-level cache
_AHEAD = 4096  # bytes from what is read to what is prefetched


@functools.cache
def unpack_kernel(element: int, format: int, cpu: int = HOST) -> Callable:
    """Rows of codes to rows of elements, the first being number ``line`` of the stack; ``past`` the cache or not."""
    size, bits = SIZES[element], bits_of_code(format, element)
    columns = _BUFFER // size

    @kernel(element, format, cpu)
    def unpack(
        start: int, stop: int, codes: int, codes_step: int, scales: int, line: int, out: int, width: int, past: int
    ):  # fmt: skip
        wide_vectors()
        buffer, codes_pad = scratch(_BUFFER), scratch(PAD)
        for row in range(start, stop):
            source, target = codes + row * codes_step, out + row * width * size
            for panel in range(0, width, columns):
                last = min(panel + columns, width)
                whole = panel + (last - panel) // TILE * TILE
                place = target + panel * size
                expand(format, element, cpu, source, 0, scales, line + row, panel, whole, _AHEAD, buffer if past else place)
                if past:
                    stream(buffer, place, (last - panel) * size)
                elif whole < last:
                    pad(codes_pad, source + whole * bits // 8, 0, 1, (last - whole) * bits // 8)
                    padded = codes_pad - whole * bits // 8
                    expand(format, element, cpu, padded, 0, scales, line + row, whole, whole + TILE, 0, buffer)
                    copy(buffer, target + whole * size, (last - whole) * size)
        if past:
            fence()

    return unpack
