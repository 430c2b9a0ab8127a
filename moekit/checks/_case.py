"""A case: a call with given arguments, and how its results and gradients are compared with what is true."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekit.checks._compare import Bound, Difference, close, compare


class OtherSignatureError(Exception):
    """The function does not take the published arguments."""


@dataclass(frozen=True)
class Case:
    """One check of one function of the module.

    Attributes:
        function: its name in the module, or an autograd function's.
        name: of the case: the dtype and what is special, or of a seam what goes wrong there.
        measure: calls what it is given, with tensors on a device, and compares.
        seam: the key in :data:`moekit.checks.SEAMS`; None for an ordinary case.
        devices: types of device that it holds for; empty for all.
    """

    function: str
    name: str
    measure: Callable[[Any, torch.device], list[Difference]] = field(repr=False)
    seam: str | None = None
    devices: tuple[str, ...] = ()


def compared(
    function: str,
    name: str,
    args: Mapping[str, Any],
    reference: Callable[..., Any],
    *,
    dtype: torch.dtype = torch.float32,
    dtypes: Mapping[str, torch.dtype] | None = None,
    sources: tuple[str, ...] = (),
    bound: Bound = close,
    grad_bound: Bound | None = None,
    results: Sequence[torch.dtype | None] = (),
    layout: Callable[[Tensor], Tensor] = torch.clone,
    seam: str | None = None,
) -> Case:
    """A call whose outputs, and gradients of ``sources``, are compared with those of a formula in float64.

    Args:
        function: as :class:`Case` has it.
        name: likewise.
        args: by parameter name: float64 tensors, which become ``dtype``, other tensors and constants.
        reference: takes the same arguments, floats in float64; autograd differentiates it.
        dtype: of floating-point arguments and results.
        dtypes: of arguments that have another.
        sources: arguments whose gradient is wanted.
        bound: how near outputs have to be.
        grad_bound: how near gradients have to be; as ``bound`` if not given.
        results: dtypes of floating-point outputs that are not all in ``dtype``.
        layout: how argument tensors lie in memory.
        seam: as :class:`Case` has it.
    """
    cast = {n: x.to((dtypes or {}).get(n, dtype)) if _is_float(x) else x for n, x in args.items()}

    def measure(call: Any, device: torch.device) -> list[Difference]:
        given = {n: layout(x).to(device) if isinstance(x, Tensor) else x for n, x in cast.items()}
        exact = {n: x.double() if _is_float(x) else x for n, x in cast.items()}
        for n in sources:
            given[n].requires_grad_()
            exact[n].requires_grad_()
        wanted, found = as_tuple(reference(**exact)), as_tuple(invoke(call, given))
        if len(found) != len(wanted):
            return [Difference("output", math.inf, False, f"{len(found)} values, expected {len(wanted)}")]
        names = ["output"] if len(wanted) == 1 else [f"output {i}" for i in range(len(wanted))]
        four = zip(names, found, wanted, results or [dtype] * len(wanted), strict=True)
        differences = [compare(n, f, w, d, bound) for n, f, w, d in four]
        if not sources or not all(difference.passed for difference in differences):
            return differences  # gradients of something else would say nothing
        grads = (
            _gradients(found, wanted, [given[n] for n in sources]),
            _gradients(wanted, wanted, [exact[n] for n in sources]),
        )
        for n, f, w in zip(sources, *grads, strict=True):
            differences.append(compare(f"gradient of {n}", f, w, cast[n].dtype, grad_bound or bound))
        return differences

    return Case(function, name, measure, seam)


def refused(function: str, name: str, args: Mapping[str, Any], seam: str, devices: tuple[str, ...] = ()) -> Case:
    """A call that has to end in an error, whichever."""

    def measure(call: Any, device: torch.device) -> list[Difference]:
        given = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in args.items()}
        check_signature(call, given)
        try:
            invoke(call, given)
        except Exception:
            return [Difference("error", 0.0, True)]
        return [Difference("error", math.inf, False, "accepted without an error")]

    return Case(function, name, measure, seam, devices)


def invoke(call: Any, given: Mapping[str, Any]) -> Any:
    """Call a function by parameter names, or an autograd function in their order."""
    check_signature(call, given)
    return call.apply(*given.values()) if isinstance(call, type) else call(**given)


def check_signature(call: Any, given: Mapping[str, Any]) -> None:
    """Raise :class:`OtherSignatureError` if ``call`` does not take ``given``."""
    try:
        if isinstance(call, type):
            inspect.signature(call.forward).bind(None, *given.values())
        else:
            inspect.signature(call).bind(**given)
    except TypeError as error:
        raise OtherSignatureError(str(error)) from error


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in float64 that bfloat16 and float16 hold exactly: one expected value serves every dtype."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return ((values * 2**17).round() / 2**17).bfloat16().double()


def transposed(x: Tensor) -> Tensor:
    """The same values with the dimensions laid out in reverse."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def as_tuple(values: Any) -> tuple[Any, ...]:
    """One value or several as a tuple, numbers as tensors."""
    values = values if isinstance(values, tuple | list) else (values,)
    return tuple(torch.tensor(value) if isinstance(value, int | float) else value for value in values)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _gradients(outputs: tuple, wanted: tuple, sources: list[Tensor]) -> list[Tensor | None]:
    """Of the outputs that have one by the formula, given the same upstream gradient."""
    differentiable = [i for i, w in enumerate(wanted) if isinstance(w, Tensor) and w.requires_grad]
    upstream = [draw(90 + i, *wanted[i].shape).to(outputs[i]) for i in differentiable]
    if not all(outputs[i].requires_grad for i in differentiable):
        return [None] * len(sources)
    return list(torch.autograd.grad([outputs[i] for i in differentiable], sources, upstream, allow_unused=True))
