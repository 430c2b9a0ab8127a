"""The activations, the router's scores and the float8 code, on tiles in float32."""

from __future__ import annotations

import triton
import triton.language as tl

# What the kernels below have; a launcher looks its argument up before it compiles anything.
ACTIVATIONS = {"sigmoid": "sigmoid", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}
# Scores of a logit alone; the softmaxes, which look at other experts, are in ``topk``.
OWN_SCORES = {"sigmoid": "sigmoid", "sqrtsoftplus": "sqrtsoftplus"}


@triton.jit
def sigmoids(u):
    """``sigmoid(u)`` and ``sigmoid(-u)``. The second is not taken as ``1 - sigmoid(u)``, which would cancel."""
    shut = tl.exp(-tl.abs(u))
    large = 1.0 / (1.0 + shut)
    small = shut * large
    return tl.where(u < 0, small, large), tl.where(u < 0, large, small)


@triton.jit
def _normal_cdf(x):
    """``erfc(-x / sqrt(2)) / 2``, relatively exact in the tail, where ``1 + erf`` would cancel.

    ``erfc(z) = t * exp(-z**2 + p(t))`` with ``t = 1 / (1 + 0.4*z)``: p is a Chebyshev fit for z in [0, 10], good to 1.1e-7.
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.4 * z)
    p = 0.950186971 - t * 0.212721808
    p = -1.53893885 + t * p
    p = 1.05971852 + t * p
    p = -0.48511968 + t * p
    p = 0.31797804 + t * p
    p = 0.395332936 + t * p
    p = 1.00231005 + t * p
    p = -1.48874628 + t * p
    tail = 0.5 * t * tl.exp(p - z * z)
    return tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def _opened(x, steepness):
    """``x * sigmoid(steepness*x)`` by NVIDIA's approximations, as exact as a division by one and ``exp`` would be.

    The quotient is taken of a sixteenth of both, so that where ``exp`` is large no reciprocal is too small to be one.
    """
    power = x * (steepness * -1.4426950408889634)
    shut = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, is_pure=True, pack=1)
    below = shut * 0.0625 + 0.0625
    by = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], tl.float32, is_pure=True, pack=1)
    return (x * 0.0625) * by


@triton.jit
def activate(x, c1, c3, ACT: tl.constexpr, FAST: tl.constexpr):
    """``act(x)``; "sigmoid" is ``x * sigmoid(c1*x + c3*x**3)``, where None for ``c3`` is 0.

    FAST, for NVIDIA, takes half the instructions, and these kernels do not wait for memory alone.
    """
    if ACT == "sigmoid":
        steepness = c1
        if c3 is not None:
            # Past 1e4 a gate is fully open or shut; its square must not overflow.
            bounded = tl.minimum(tl.abs(x), 1e4)
            steepness = c1 + c3 * bounded * bounded
        if FAST:
            value = _opened(x, steepness)
        else:
            value = x / (1.0 + tl.exp(-x * steepness))
    elif ACT == "gelu":
        value = x * _normal_cdf(x)
    elif ACT == "relu":
        value = tl.where(x < 0, 0.0, x)
    elif ACT == "relu2":
        value = tl.where(x < 0, 0.0, x)
        value = value * value
    else:
        tl.static_assert(False, "no activation of this name")
    return value


@triton.jit
def activate_with_slope(x, c1, c3, ACT: tl.constexpr):
    """``act(x)`` and ``act'(x)``."""
    if ACT == "sigmoid":
        steepness, slope = c1, c1
        if c3 is not None:
            bounded = tl.minimum(tl.abs(x), 1e4)
            square = bounded * bounded
            steepness, slope = c1 + c3 * square, c1 + 3.0 * c3 * square
        opening, closing = sigmoids(x * steepness)
        value = x * opening
        slope = opening + value * closing * slope
    elif ACT == "gelu":
        cdf = _normal_cdf(x)
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "relu":
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACT == "relu2":
        value = tl.where(x < 0, 0.0, x)
        slope = 2.0 * value
        value = value * value
    else:
        tl.static_assert(False, "no activation of this name")
    return value, slope


@triton.jit
def _log_of_one_plus(t):
    """``log(1 + t)`` for t in [0, 1]: ``2 * artanh(z)``, ``z = t / (2 + t)``, by its series up to z**15, good to 2e-9."""
    z = t / (2.0 + t)
    w = z * z
    series = 2.0 / 13 + w * (2.0 / 15)
    series = 2.0 / 11 + w * series
    series = 2.0 / 9 + w * series
    series = 2.0 / 7 + w * series
    series = 2.0 / 5 + w * series
    series = 2.0 / 3 + w * series
    return z * (2.0 + w * series)


@triton.jit
def own_score(x, SCORE: tl.constexpr):
    """The score of a logit alone."""
    if SCORE == "sigmoid":
        score, _ = sigmoids(x)
    elif SCORE == "sqrtsoftplus":
        near = tl.sqrt(tl.where(x > 0, x, 0.0) + _log_of_one_plus(tl.exp(-tl.abs(x))))
        # Below this softplus(x) is exp(x), whose root underflows much later than itself.
        score = tl.where(x < -40.0, tl.exp(0.5 * x), near)
    else:
        tl.static_assert(False, "no score of this name")
    return score


@triton.jit
def own_score_slope(x, score, SCORE: tl.constexpr):
    """The derivative of :func:`own_score`."""
    opening, closing = sigmoids(x)
    if SCORE == "sigmoid":
        slope = score * closing
    elif SCORE == "sqrtsoftplus":
        slope = tl.where(x < -40.0, 0.5 * score, opening / (2.0 * score))
    else:
        tl.static_assert(False, "no score of this name")
    return slope


@triton.jit
def encode_e4m3(x, target):
    """float32 to float8 e4m3, or its bits in uint8, as ``target`` points to; to nearest even, at most 448."""
    if target.dtype.element_ty == tl.uint8:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        # Below 2**-6 the step is 2**-9: adding 2**14 leaves the multiple of it in the lowest bits, rounded by the adder.
        subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        rounded = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
        rounded = tl.where(magnitude > 0x7F800000, 0x7F, rounded)
        code = (rounded | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        code = x.to(target.dtype.element_ty)
    return code


@triton.jit
def decode_e4m3(bits):
    """The bits of float8 e4m3 to float32, exactly, in integer arithmetic."""
    bits = bits.to(tl.int32)
    magnitude = bits & 0x7F
    value = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120: the difference of biases
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(bits > 0x7F, -value, value)


@triton.jit
def e4m3_scale(largest_bits):
    """The power of two that brings a row's largest magnitude (float32 bits) into (224, 448], and its inverse."""
    exponent = (largest_bits >> 23) - 135 + ((largest_bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    usable = (largest_bits > 0) & (largest_bits < 0x7F800000)
    exponent = tl.where(usable, tl.maximum(exponent, -126), 0)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, inverse
