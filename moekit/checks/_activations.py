"""Ordinary cases of the activations: every function and autograd class, each dtype, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekit.checks._case import Case, compared, draw, transposed
from moekit.checks._formulas import gated, gelu_tanh, quick_gelu, silu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
N, I = 12, 8
Activation = Callable[[Tensor, float], Tensor]
FAMILIES: dict[str, Activation] = {"swiglu": silu, "geglu": gelu_tanh, "quick_geglu": quick_gelu}
CLASSES = {"WeightedSwiGLUFunction": silu, "WeightedGEGLUFunction": gelu_tanh, "WeightedQuickGeGLUFunction": quick_gelu}


def inputs(*names: str) -> dict[str, Tensor]:
    """Tensors by parameter name."""
    made = {
        "g": draw(1, N, I),
        "y": draw(2, N, 2 * I),
        "input": draw(2, N, 2 * I),
        "bias": draw(3, 2 * I),
        "weights": draw(4, N, 1),
    }
    return {name: made[name] for name in names}


def forward(activation: Activation) -> Callable[..., Tensor]:
    """The formula with the published parameters' names."""

    def formula(y: Tensor | None = None, input: Tensor | None = None, fp8_input_store: bool = False, **rest: Any) -> Tensor:
        tensor = y if y is not None else input
        if tensor is None:
            raise ValueError("forward: y or input must be given")
        return gated(tensor, activation, **rest)

    return formula


def backward(activation: Activation, *sources: str) -> Callable[..., Any]:
    """The gradients of the formula for ``sources``, given ``g``; a bias counts as one a row."""

    def gradients(g: Tensor, need_weight_grad: bool = True, **args: Any) -> tuple[Tensor | None, ...]:
        if "bias" in args:
            args["bias"] = args["bias"].expand_as(args["y"])
        leaves = {name: args[name].detach().requires_grad_() for name in sources}
        found = torch.autograd.grad(gated(activation=activation, **{**args, **leaves}), list(leaves.values()), g)
        return found if need_weight_grad else (*found[:-1], None)

    return gradients


def cases() -> Iterator[Case]:
    """All of them."""
    for dtype_name, dtype in DTYPES.items():
        for name, activation in FAMILIES.items():
            yield from _of_family(name, activation, partial(_case, dtype_name, dtype))
        yield from _of_quick(partial(_case, dtype_name, dtype))
        yield from _of_classes(partial(_case, dtype_name, dtype))
    for name, activation in FAMILIES.items():
        args = inputs("y", "weights")
        yield compared(
            f"weighted_{name}",
            "float32, transposed",
            args,
            forward(activation),
            sources=("y", "weights"),
            layout=transposed,
        )


def _case(
    dtype_name: str, dtype: torch.dtype, function: str, args: dict, reference: Callable, *sources: str, special: str = ""
) -> Case:
    return compared(function, f"{dtype_name}{special}", args, reference, dtype=dtype, sources=sources)


def _of_family(name: str, activation: Activation, case: Callable[..., Case]) -> Iterator[Case]:
    yield case(name, inputs("y"), forward(activation), "y")
    yield case(f"{name}_back", inputs("g", "y"), backward(activation, "y"))
    yield case(f"weighted_{name}", inputs("y", "weights"), forward(activation), "y", "weights")
    weighted = inputs("g", "y", "weights"), backward(activation, "y", "weights")
    yield case(f"weighted_{name}_back", *weighted)
    if name != "quick_geglu":
        impl = inputs("input", "weights"), forward(activation)
        yield case(f"weighted_bias_{name}_impl", *impl, "input", "weights")


def _of_quick(case: Callable[..., Case]) -> Iterator[Case]:
    """What only Quick-GEGLU has: alpha, an offset (0.5, which every dtype holds), a bias, a clamp."""
    both = {"linear_offset": 0.5}
    quick = partial(case, special=", linear_offset")
    yield case("quick_gelu", inputs("y"), _quick_gelu, "y")
    yield case("quick_gelu", {**inputs("y"), "alpha": 0.75}, _quick_gelu, "y", special=", alpha")
    yield quick("quick_geglu", {**inputs("y"), **both}, forward(quick_gelu), "y")
    yield quick("quick_geglu_back", {**inputs("g", "y"), **both}, backward(quick_gelu, "y"))
    yield quick("weighted_quick_geglu", {**inputs("y", "weights"), **both}, forward(quick_gelu), "y", "weights")
    back = backward(quick_gelu, "y", "weights")
    yield quick("weighted_quick_geglu_back", {**inputs("g", "y", "weights"), **both}, back)
    biased = {**inputs("y", "bias", "weights"), **both}
    yield quick("weighted_bias_quick_geglu", biased, forward(quick_gelu), "y", "bias", "weights")
    back = backward(quick_gelu, "y", "bias", "weights")
    yield quick("weighted_bias_quick_geglu_back", {**inputs("g", "y", "bias", "weights"), **both}, back)
    impl = {**inputs("input", "bias", "weights"), **both}
    yield quick("weighted_bias_quick_geglu_impl", impl, forward(quick_gelu), "input", "bias", "weights")
    alone = {**inputs("input"), "bias": None, **inputs("weights")}
    yield case("weighted_bias_quick_geglu_impl", alone, forward(quick_gelu), "input", "weights", special=", no bias")


def _quick_gelu(y: Tensor, alpha: float = 1.702) -> Tensor:
    return quick_gelu(y, alpha)


def _of_classes(case: Callable[..., Case]) -> Iterator[Case]:
    """By ``apply``, in the order of the published ``forward``; an offset is a tensor there."""
    stored = {"fp8_input_store": False}
    offset = {"linear_offset": torch.tensor(0.5, dtype=torch.float64)}
    for name, activation in CLASSES.items():
        args = {**inputs("input", "weights"), **stored, **(offset if activation is quick_gelu else {})}
        yield case(name, args, forward(activation), "input", "weights")
    args = {**inputs("input", "bias", "weights"), **stored, **offset}
    yield case("WeightedBiasQuickGeGLUFunction", args, forward(quick_gelu), "input", "bias", "weights")
