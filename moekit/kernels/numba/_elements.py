"""Elements of every dtype as float32: loads, stores, and the conversions in integer arithmetic.

A *kind* is a dtype as a compile-time constant. Each conversion rounds to nearest even; the instruction of the CPU is
taken where it has one. (The bfloat16 instruction flushes subnormals, below 1.2e-38, to zero.) Elements of kind ``NONE``
read as 0 and are not written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload

from moekit.kernels.numba import _bits
from moekit.kernels.numba._bits import bits_of, float_of
from moekit.kernels.numba._jit import INLINE, inline

NONE, F32, BF16, F16, E4M3 = range(5)
KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16, torch.float8_e4m3fn: E4M3}
SIZES = (0, 4, 2, 2, 1)

# Numba widens integers to 64 bits at each operation: the conversions in between keep vectors of 32 bits.
_U = np.uint32
_MAGNITUDE, _INFINITY = _U(0x7FFFFFFF), _U(0x7F800000)


@inline
def widen_bf16(half):
    return float_of(_U(half) << _U(16))


@inline
def narrow_bf16(value):
    bits = bits_of(value)
    even = _U(_U(bits >> _U(16)) & _U(1))
    rounded = _U(_U(bits + _U(0x7FFF) + even) >> _U(16))
    return np.uint16(rounded if value == value else _U(0x7FC0))


@inline
def widen_f16(half):
    field = _U(_U(half) & _U(0x7FFF))
    bits = _U(_U(field << _U(13)) + _U((127 - 15) << 23))
    if field >= _U(0x7C00):
        bits = _U(bits + _U((128 - 16) << 23))
    if field < _U(0x0400):
        bits = bits_of(np.float32(np.int32(field)) * np.float32(2.0**-24))
    return float_of(bits | _U(_U(_U(half) & _U(0x8000)) << _U(16)))


@inline
def narrow_f16(value):
    sign = _U(_U(bits_of(value) >> _U(16)) & _U(0x8000))
    bits = _U(bits_of(value) & _MAGNITUDE)
    even = _U(_U(bits >> _U(13)) & _U(1))
    field = _U(_U(bits - _U((127 - 15) << 23) + _U(0xFFF) + even) >> _U(13))
    if bits < _U((127 - 14) << 23):  # subnormal: the sum's mantissa ends where the result's does
        field = _U(bits_of(float_of(bits) + np.float32(0.5)) - _U(126 << 23))
    if bits >= _U((127 + 16) << 23):
        field = _U(0x7E00) if bits > _INFINITY else _U(0x7C00)
    return np.uint16(field | sign)


@inline
def widen_e4m3(byte):
    field = _U(_U(byte) & _U(0x7F))
    bits = _U(_U(field << _U(20)) + _U((127 - 7) << 23))
    if field < _U(8):
        bits = bits_of(np.float32(np.int32(field)) * np.float32(2.0**-9))
    if field == _U(0x7F):
        bits = _U(0x7FC00000)
    return float_of(bits | _U(_U(_U(byte) & _U(0x80)) << _U(24)))


@inline
def narrow_e4m3(value):
    """Saturates at 448: the format has no infinity."""
    sign = _U(_U(bits_of(value) >> _U(24)) & _U(0x80))
    bits = _U(bits_of(value) & _MAGNITUDE)
    even = _U(_U(bits >> _U(20)) & _U(1))
    field = _U(_U(bits - _U((127 - 7) << 23) + _U(0x7FFFF) + even) >> _U(20))
    if bits < _U((127 - 6) << 23):
        field = _U(bits_of(float_of(bits) + np.float32(16384.0)) - _U(141 << 23))
    if bits > _U(0x43E00000):
        field = _U(0x7F) if bits > _INFINITY else _U(0x7E)
    return np.uint8(field | sign)


@inline
def _same(value):
    return value


@inline
def _read_nothing(base, index):
    return np.float32(0.0)


@inline
def _write_nothing(base, index, value):
    pass


_READ: dict[int, tuple[Callable, Callable]] = {
    NONE: (_read_nothing, _same),
    F32: (_bits.read_f32, _same),
    BF16: (_bits.read_u16, widen_bf16),
    F16: (_bits.read_u16, _bits.widen_f16 if _bits.HARDWARE_F16 else widen_f16),
    E4M3: (_bits.read_u8, widen_e4m3),
}
_WRITE: dict[int, tuple[Callable, Callable]] = {
    NONE: (_write_nothing, _same),
    F32: (_bits.write_f32, _same),
    BF16: (_bits.write_u16, _bits.narrow_bf16 if _bits.HARDWARE_BF16 else narrow_bf16),
    F16: (_bits.write_u16, _bits.narrow_f16 if _bits.HARDWARE_F16 else narrow_f16),
    E4M3: (_bits.write_u8, narrow_e4m3),
}


def load(kind: int, base: int, index: int) -> Any:
    """Element ``index`` at address ``base`` as float32. For kernels only."""
    raise NotImplementedError


def store(kind: int, base: int, index: int, value: Any) -> None:
    """Round ``value`` to element ``index`` at address ``base``. For kernels only."""
    raise NotImplementedError


@overload(load, prefer_literal=True, jit_options=INLINE)
def _load(kind, base, index):
    if isinstance(kind, types.IntegerLiteral):
        read, widen = _READ[kind.literal_value]
        return lambda kind, base, index: widen(read(base, index))


@overload(store, prefer_literal=True, jit_options=INLINE)
def _store(kind, base, index, value):
    if isinstance(kind, types.IntegerLiteral):
        write, narrow = _WRITE[kind.literal_value]
        return lambda kind, base, index, value: write(base, index, narrow(value))
