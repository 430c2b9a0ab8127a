"""Triton's interpreter, made to convert bfloat16 as GPUs do.

Where float32 becomes bfloat16 it truncates instead of rounding to nearest even, and it gets subnormal numbers wrong in
both directions. Importing this module puts that right for the process, if it interprets.
"""

from __future__ import annotations

import os

import numpy as np

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _widen(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint32) << np.uint32(16)


def _round(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values.view(np.float32)), np.uint32(0x7FC0), nearest).astype(np.uint16)


def _patch() -> None:
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


if INTERPRETED:
    _patch()
