"""The table of activations, and the activations themselves: the reference of every backend.

A row of :data:`ACTIVATIONS` names a kind and its constants. A new kind needs a row of ``_KINDS`` here, and one of the
table of each backend, which refuses what it does not know: ``kernels/numba/glu.py`` with ``_activations.py``, and
``kernels/triton/_activation.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moekit import _check

LAYOUTS = ("concatenated", "interleaved", "ungated")
# Past this size a gate is fully open or shut in float64 too; clamping it keeps x**3 and x**2 from overflowing.
_SATURATED = 1e4
_ALPHA = 1.702  # the usual one of quick_gelu

# name: (kind, c1, c3); "sigmoid" is the two-constant family, with alpha in the place of None
ACTIVATIONS: dict[str, tuple[str, float | None, float]] = {
    "silu": ("sigmoid", 1.0, 0.0),
    "quick_gelu": ("sigmoid", None, 0.0),
    "gelu_tanh": ("sigmoid", 2 * math.sqrt(2 / math.pi), 0.044715 * 2 * math.sqrt(2 / math.pi)),
    "gelu": ("gelu", 0.0, 0.0),
    "relu": ("relu", 0.0, 0.0),
    "relu2": ("relu2", 0.0, 0.0),
}


class Glu(NamedTuple):
    """The constants of one member of the family, in the order of the operators' schemas."""

    act: str = "sigmoid"
    c1: float = 1.0
    c3: float = 0.0
    linear_offset: float = 0.0
    clamp: float | None = None
    clamp_after_bias: bool = False
    layout: str = "concatenated"


def make_glu(
    activation: str = "silu",
    *,
    alpha: float | None = None,
    linear_offset: float = 0.0,
    clamp: float | None = None,
    clamp_after_bias: bool = False,
    layout: str = "concatenated",
    op: str = "glu",
) -> Glu:
    """Check the parameters of :func:`moekit.glu` and look the constants up; ``op`` names the caller in errors."""
    _check.one_of(op, "activation", activation, ACTIVATIONS)
    _check.one_of(op, "layout", layout, LAYOUTS)
    linear_offset = _check.real(op, "linear_offset", linear_offset)
    if clamp is not None:
        clamp = _check.real(op, "clamp", clamp)
        if not clamp >= 0:
            raise _check.fail(op, "clamp", "None or at least 0", clamp)
    if layout == "ungated" and (linear_offset != 0.0 or clamp is not None):
        raise _check.fail(op, "linear_offset and clamp", "left out for an ungated activation", (linear_offset, clamp))
    if alpha is not None:
        alpha = _check.real(op, "alpha", alpha)
    kind, c1, c3 = ACTIVATIONS[activation]
    if c1 is None:
        c1 = _ALPHA if alpha is None else alpha
    elif alpha is not None:
        raise _check.unused(op, "alpha", alpha, f"on activation={activation!r}")
    return Glu(kind, c1, c3, linear_offset, clamp, bool(clamp_after_bias), layout)


# --- the arithmetic -------------------------------------------------------------------------------------------------


def _gate(x: Tensor, spec: Glu) -> Tensor:
    return x * torch.sigmoid(x * (spec.c1 + spec.c3 * x.clamp(-_SATURATED, _SATURATED).square()))


def _gate_slope(x: Tensor, spec: Glu) -> Tensor:
    """``sigmoid(-u)`` stands for ``1 - sigmoid(u)``, which would cancel."""
    square = x.clamp(-_SATURATED, _SATURATED).square()
    u = x * (spec.c1 + spec.c3 * square)
    opening = torch.sigmoid(u)
    return opening + x * opening * torch.sigmoid(-u) * (spec.c1 + 3 * spec.c3 * square)


def _gelu(x: Tensor, spec: Glu) -> Tensor:
    return x * 0.5 * torch.erfc(x * -math.sqrt(0.5))


def _gelu_slope(x: Tensor, spec: Glu) -> Tensor:
    return 0.5 * torch.erfc(x * -math.sqrt(0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


# kind: (act(x), act'(x)), both of x and the constants
_KINDS: dict[str, tuple[Callable[[Tensor, Glu], Tensor], Callable[[Tensor, Glu], Tensor]]] = {
    "sigmoid": (_gate, _gate_slope),
    "gelu": (_gelu, _gelu_slope),
    "relu": (lambda x, spec: x.relu(), lambda x, spec: (x > 0).to(x.dtype)),
    "relu2": (lambda x, spec: x.relu().square(), lambda x, spec: 2 * x.clamp(min=0)),
}


def activate(x: Tensor, spec: Glu) -> Tensor:
    """``act(x)``."""
    return _check.known("the references", "activation", spec.act, _KINDS)[0](x, spec)


def activate_grad(x: Tensor, spec: Glu) -> Tensor:
    """``act'(x)``."""
    return _check.known("the references", "activation", spec.act, _KINDS)[1](x, spec)
