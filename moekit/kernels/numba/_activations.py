"""The activations and their slopes: exp and the rest in float32, written so that LLVM vectorises them."""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from moekit.kernels.numba._bits import bits_of, float_of
from moekit.kernels.numba._jit import INLINE, inline

SIGMOID, CUBIC, GELU, RELU, RELU2 = range(5)

_F = np.float32
# exp(-88) is the smallest that is not subnormal, so its inverse is finite too.
_LARGEST = _F(88.0)
# Past this a gate is fully open or shut; clamping keeps x**2 from overflowing.
_SATURATED = _F(1e4)
# Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits.
_ROUND = _F(12582912.0)
# log2(e) in two parts, because one float32 of it loses 5 bits at the ends of the range.
_LOG2E = _F(math.log2(math.e))
_LOG2E_REST = _F(math.log2(math.e) - float(_LOG2E))
# 2**f on [-1/2, 1/2]: the Taylor series, which at this length is as good as any other.
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (_F(math.log(2) ** n / math.factorial(n)) for n in range(7))
_ONE, _HALF, _ZERO = _F(1.0), _F(0.5), _F(0.0)
_ROOT_HALF = _F(math.sqrt(0.5))
_DENSITY = _F(1 / math.sqrt(2 * math.pi))


@inline
def clamp(x, low, high):
    """NaN stays NaN: a comparison with it is false."""
    x = low if x < low else x
    return high if x > high else x


@inline
def exp(x):
    """``e**x`` for x in [-88, 88] (outside, the value at the end), within 2 ulp."""
    x = clamp(x, -_LARGEST, _LARGEST)
    shifted = x * _LOG2E + _ROUND
    whole = shifted - _ROUND
    part = (x * _LOG2E - whole) + x * _LOG2E_REST
    power = _P0 + part * (_P1 + part * (_P2 + part * (_P3 + part * (_P4 + part * (_P5 + part * _P6)))))
    return float_of(bits_of(power) + (bits_of(shifted) << np.uint32(23)))


@inline
def _gates(u):
    """``(sigmoid(u), sigmoid(-u))``; exactly 0 where the gate is shut, or a huge x would leak through."""
    closing = exp(-u)
    opening = _ONE / (_ONE + closing)
    return (_ZERO if u < -_LARGEST else opening), closing * opening


@inline
def sigmoid(u):
    """``sigmoid(u)``, exactly 0 below -88."""
    return _gates(u)[0]


@inline
def _gate_act(x, c1, c3):
    return x * _gates(x * c1)[0]


@inline
def _gate_slope(x, c1, c3):
    opening, closing = _gates(x * c1)
    act = x * opening
    return act, opening + clamp(x, -_SATURATED, _SATURATED) * opening * closing * c1


@inline
def _cubic_act(x, c1, c3):
    near = clamp(x, -_SATURATED, _SATURATED)
    return x * _gates(x * (c1 + c3 * near * near))[0]


@inline
def _cubic_slope(x, c1, c3):
    near = clamp(x, -_SATURATED, _SATURATED)
    square = near * near
    opening, closing = _gates(x * (c1 + c3 * square))
    return x * opening, opening + near * opening * closing * (c1 + _F(3.0) * c3 * square)


@inline
def _gelu_act(x, c1, c3):
    return x * _HALF * _F(math.erfc(x * -_ROOT_HALF))


@inline
def _gelu_slope(x, c1, c3):
    below = _HALF * _F(math.erfc(x * -_ROOT_HALF))
    near = clamp(x, -_SATURATED, _SATURATED)
    return x * below, below + near * exp(-_HALF * near * near) * _DENSITY


@inline
def _relu_act(x, c1, c3):
    return _ZERO if x < _ZERO else x


@inline
def _relu_slope(x, c1, c3):
    return (_ZERO if x < _ZERO else x), (_ONE if x > _ZERO else _ZERO)


@inline
def _relu2_act(x, c1, c3):
    x = _ZERO if x < _ZERO else x
    return x * x


@inline
def _relu2_slope(x, c1, c3):
    x = _ZERO if x < _ZERO else x
    return x * x, x + x


_ACT = {SIGMOID: _gate_act, CUBIC: _cubic_act, GELU: _gelu_act, RELU: _relu_act, RELU2: _relu2_act}
_SLOPE = {SIGMOID: _gate_slope, CUBIC: _cubic_slope, GELU: _gelu_slope, RELU: _relu_slope, RELU2: _relu2_slope}


def act(kind: int, x: float, c1: float, c3: float) -> float:
    """``act(x)``. For kernels only."""
    raise NotImplementedError


def act_and_slope(kind: int, x: float, c1: float, c3: float) -> tuple[float, float]:
    """``(act(x), act'(x))``. For kernels only."""
    raise NotImplementedError


@overload(act, prefer_literal=True, jit_options=INLINE)
def _act(kind, x, c1, c3):
    if isinstance(kind, types.IntegerLiteral):
        function = _ACT[kind.literal_value]
        return lambda kind, x, c1, c3: function(x, c1, c3)


@overload(act_and_slope, prefer_literal=True, jit_options=INLINE)
def _act_and_slope(kind, x, c1, c3):
    if isinstance(kind, types.IntegerLiteral):
        function = _SLOPE[kind.literal_value]
        return lambda kind, x, c1, c3: function(x, c1, c3)
