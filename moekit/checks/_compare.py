"""How far a result is from what was expected in float64, and whether that is near enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Difference(NamedTuple):
    """One output or gradient of one call, compared."""

    what: str  # "output", "gradient of weights", ...
    error: float  # largest difference over the largest expected value; inf where there is no number to compare
    passed: bool
    note: str = ""  # the first element that is off, or why there is nothing to compare


# What is compared: the result as it came, what was expected in float64, and the dtype that results are rounded to.
Bound = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, str]]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[Tensor, str]:
    """Within some roundings of ``dtype`` of the largest value: what work done step by step in ``dtype`` may lose."""
    steps = 4 if torch.finfo(dtype).bits == 16 else 64
    return (actual - expected).abs() <= steps * torch.finfo(dtype).eps * expected.abs().max(), ""


def rounded(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[Tensor, str]:
    """Within twice the error of one correct rounding, element by element, and what work in float32 loses before it.

    That is 6 of float32's steps for a chain of operations, and 16 of the largest value for terms that cancel.
    """
    work = torch.promote_types(dtype, torch.float32)
    lost = 6 * spacing(expected, work) + 16 * torch.finfo(work).eps * expected.abs().max()
    allowed = lost if dtype is work else lost + spacing(expected, dtype)
    return (actual - expected).abs() <= allowed, "more than one rounding"


def exact(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[Tensor, str]:
    """The same numbers: what is only moved."""
    return actual == expected.to(dtype).double(), "moved values must not change"


def within(share: float) -> Bound:
    """A distance of at most ``share`` of the whole tensor's length (the root of the sum of squares)."""

    def near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[Tensor, str]:
        distance = float((actual - expected).norm() / expected.norm())
        return torch.full_like(expected, distance <= share, dtype=torch.bool), f"{distance:.1%} off as a whole"

    return near


def spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` at each float64 ``value``."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal, max=info.max))
    return torch.ldexp(torch.full_like(value, info.eps), exponent - 1)


def compare(what: str, actual: object, expected: Tensor | None, dtype: torch.dtype | None, bound: Bound) -> Difference:
    """``actual`` against ``expected``: in shape, in dtype (of floats that have one to be in) and in value.

    Args:
        what: the name of the output or gradient.
        actual: what the function returned.
        expected: float64, or integers and booleans, which are compared exactly; None where None is expected.
        dtype: of the result; None: not looked at.
        bound: how near floating-point numbers have to be.
    """
    if expected is None:
        return Difference(what, 0.0, True) if actual is None else Difference(what, math.inf, False, "expected None")
    if not isinstance(actual, Tensor):
        return Difference(what, math.inf, False, f"expected a tensor, got {type(actual).__name__}")
    if actual.shape != expected.shape:
        note = f"shape {list(actual.shape)}, expected {list(expected.shape)}"
        return Difference(what, math.inf, False, note)
    floating = expected.is_floating_point()
    if floating and dtype is not None and actual.dtype is not dtype:
        return Difference(what, math.inf, False, f"{_name(actual.dtype)}, expected {_name(dtype)}")
    if expected.numel() == 0:
        return Difference(what, 0.0, True)
    found = actual.detach().cpu().double()
    wanted = expected.detach().double()
    if floating:
        good, why = bound(found, wanted, dtype or actual.dtype)
    else:
        good, why = found == wanted, ""
    return _measured(what, found, wanted, good, why)


def _measured(what: str, found: Tensor, wanted: Tensor, good: Tensor, why: str) -> Difference:
    largest = float(wanted.abs().max())
    error = float((found - wanted).abs().max()) / (largest or 1.0)
    error = error if math.isfinite(error) else math.inf
    if bool(good.all()):
        return Difference(what, error, True)
    at = [int(i) for i in (~good).nonzero()[0]]
    place = "".join(f"[{i}]" for i in at)
    note = f"{what}{place} is {float(found[tuple(at)]):.6g}, expected {float(wanted[tuple(at)]):.6g}"
    return Difference(what, error, False, f"{note} ({why})" if why else note)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
