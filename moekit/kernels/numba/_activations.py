"""The activations and their slopes: exp and the rest in float32, written so that LLVM vectorises them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from moekit.kernels.numba._bits import bits_of, float_of
from moekit.kernels.numba._jit import INLINE, inline

SIGMOID, CUBIC, GELU, RELU, RELU2 = range(5)

_F = np.float32
_ONE, _HALF, _ZERO = _F(1.0), _F(0.5), _F(0.0)
# Between these exp(x) is neither subnormal nor infinite.
_LOWEST, _LARGEST = _F(-87.0), _F(88.0)
# Past this a gate is fully open or shut; clamping keeps x**2 from overflowing.
_SATURATED = _F(1e4)
# Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits.
_ROUND = _F(12582912.0)
_LOG2E = _F(math.log2(math.e))
# log(2) in two parts: the first has 9 bits, so that its product with an integer up to 128 is exact.
_LN2 = _F(round(math.log(2) * 2**9) / 2**9)
_LN2_REST = _F(math.log(2) - float(_LN2))
# exp(r) = 1 + r * (1 + r * (_P2 + ...)), fitted to the least relative error, 2e-9, for |r| <= log(2) / 2.
_P2, _P3, _P4 = _F(0.49999994), _F(0.16666430234909058), _F(0.04166800528764725)
_P5, _P6 = _F(0.008374195545911789), _F(0.0013843607157468796)
_ROOT_HALF = _F(math.sqrt(0.5))
_DENSITY = _F(1 / math.sqrt(2 * math.pi))


@inline
def clamp(x, low, high):
    """NaN stays NaN: a comparison with it is false."""
    x = low if x < low else x
    return high if x > high else x


@inline
def _power(x):
    """``e**x`` within 2 ulp for x in [-87, 88], outside nothing of use."""
    shifted = x * _LOG2E + _ROUND
    whole = shifted - _ROUND
    rest = (x - whole * _LN2) - whole * _LN2_REST
    power = _ONE + rest * (_ONE + rest * (_P2 + rest * (_P3 + rest * (_P4 + rest * (_P5 + rest * _P6)))))
    return float_of(bits_of(power) + (bits_of(shifted) << np.uint32(23)))


@inline
def exp(x):
    """``e**x`` for x in [-87, 88], outside the value at the end; within 2 ulp."""
    return _power(clamp(x, _LOWEST, _LARGEST))


@inline
def _opening(v):
    """``sigmoid(-v)``; exactly 0 where the gate is shut, or a huge x would leak through."""
    opening = _ONE / (_ONE + _power(_LOWEST if v < _LOWEST else v))
    return _ZERO if v > _LARGEST else opening


@inline
def _gates(v):
    """``(sigmoid(-v), sigmoid(v))``, the first with the bits of :func:`_opening`."""
    closing = exp(v)
    opening = _ONE / (_ONE + closing)
    return (_ZERO if v > _LARGEST else opening), closing * opening


@inline
def sigmoid(u):
    """``sigmoid(u)``, exactly 0 below -88."""
    return _opening(-u)


@inline
def _gate_act(x, c1, c3):
    return x * _opening(x * -c1)


@inline
def _gate_slope(x, c1, c3):
    opening, closing = _gates(x * -c1)
    act = x * opening
    return act, opening + clamp(x, -_SATURATED, _SATURATED) * opening * closing * c1


@inline
def _cubic_act(x, c1, c3):
    return x * _opening(x * (-c1 - c3 * (x * x)))  # a square that overflows leaves the gate where it is


@inline
def _cubic_slope(x, c1, c3):
    near = clamp(x, -_SATURATED, _SATURATED)
    square = near * near
    opening, closing = _gates(x * (-c1 - c3 * square))
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


def act(kind: int, x: Any, c1: Any, c3: Any) -> Any:
    """``act(x)``. For kernels only."""
    raise NotImplementedError


def act_and_slope(kind: int, x: Any, c1: Any, c3: Any) -> tuple[Any, Any]:
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
