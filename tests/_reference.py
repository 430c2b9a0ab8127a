"""What the tests compare with: formulas in float64 written with plain torch functions, and how far a result may be.

Nothing here uses moekit's arithmetic. Inputs are drawn so that bfloat16 and float16 hold them exactly: one float64
reference then serves every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekit import _backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.float32, torch.bfloat16, torch.float16)


# --- how far a result may be ----------------------------------------------------------------------------------------

# Work is done in float32 (float64 for float64). A gated activation there is a chain of about six operations of half
# an ulp each, plus an exponential of one or two: 6 ulp. What cancels (the slope of an activation near its minimum, a
# sum over features) is off by a few ulp of its largest terms instead, for which the largest element of the same row
# stands: 16 of them, as a sum of 256 terms in pairs makes 8 roundings and so do the terms themselves. Neither number
# is visible in bfloat16, where 16 ulp of float32 are 2**-12 of one.
_WORK_ULPS = 6
_WORK_ULPS_OF_LARGEST = 16
# exp overflows at 88 in float32 (709 in float64), so what a gate of -88 lets through, 88 * exp(-88), is lost.
_UNDERFLOW = 1024


def spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` at each float64 ``value``: one ulp."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.double().abs().clamp(min=info.smallest_normal, max=info.max))
    return torch.ldexp(torch.full_like(value, info.eps, dtype=torch.float64), exponent - 1)


def tolerance(
    expected: Tensor, dtype: torch.dtype, *, work: torch.dtype | None = None, scale: Tensor | float | None = None
) -> Tensor:
    """How far each element of a result in ``dtype`` may be from the float64 ``expected``.

    Below float32: twice the error of one correct rounding, which is one ulp, and what the float32 work before it
    loses. In float32 and float64 there is nothing but the work. ``scale`` is the size of the terms that were added;
    without it the largest element of the row stands in (of the whole tensor, if rows are short).
    """
    work = work or (torch.float64 if dtype is torch.float64 else torch.float32)
    magnitude = expected.abs().nan_to_num(0.0, 0.0, 0.0)
    if scale is None:
        one_row = magnitude.dim() > 1 and magnitude.shape[-1] >= 8 and magnitude.numel() > 0
        scale = magnitude.amax(-1, keepdim=True) if one_row else (magnitude.max() if magnitude.numel() else 0.0)
    lost = _WORK_ULPS * spacing(expected, work) + _WORK_ULPS_OF_LARGEST * torch.finfo(work).eps * scale
    lost += _UNDERFLOW * torch.finfo(work).smallest_normal
    return lost if torch.finfo(dtype).eps <= torch.finfo(work).eps else spacing(expected, dtype) + lost


def assert_accurate(
    actual: Tensor | None,
    expected: Tensor,
    *,
    work: torch.dtype | None = None,
    scale: Tensor | float | None = None,
    what: str = "",
) -> None:
    """``actual`` lies within :func:`tolerance` of ``expected`` (float64); Inf and NaN where the rounded value has."""
    assert actual is not None, f"{what}: no tensor"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual = actual.detach()
    rounded = expected.to(actual.dtype)
    error = (actual.double() - expected).abs()
    wrong = ~(error <= tolerance(expected, actual.dtype, work=work, scale=scale))
    wrong &= ~((actual == rounded) | (actual.isnan() & rounded.isnan()))
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        ulps = float((error / spacing(expected, actual.dtype))[at])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; the first at {at} is "
            f"{actual[at].item()!r}, expected {expected[at].item()!r} ({ulps:.3g} ulp of {actual.dtype})"
        )


def assert_same(actual: Tensor | None, expected: Tensor, what: str = "") -> None:
    """Bit for bit, in dtype and shape too (NaN equals NaN)."""
    assert actual is not None, f"{what}: no tensor"
    assert actual.dtype is expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num()), f"{what}: values differ"
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN differ"


# --- inputs ---------------------------------------------------------------------------------------------------------


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Normal numbers that bfloat16 and float16 hold exactly (multiples of 2**-17, for float16's sake)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return ((values * 2**17).round() / 2**17).bfloat16().to(dtype)


def embedded(x: Tensor) -> Tensor:
    """The same values inside a larger buffer: a storage offset, and a gap after every row."""
    room = torch.full([size + 3 for size in x.shape], 113, dtype=torch.int8).to(x.dtype)
    inside = room[tuple(slice(2, 2 + size) for size in x.shape)]
    return inside.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The same values with the dimensions laid out in reverse; every second element of a vector."""
    if x.dim() == 0:
        return x.clone()
    if x.dim() == 1:
        return x.repeat_interleave(2)[::2]
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "embedded": embedded,
    "transposed": transposed,
}


class Recorder(TorchDispatchMode):
    """Every operator that runs below autograd, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((str(func), args, result))
        return result

    def results(self, operator: str) -> list[Any]:
        """What ``moekit::operator`` returned, call by call."""
        return [result for name, _, result in self.calls if name == f"moekit.{operator}.default"]


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(operator: Any, args: tuple, checks: tuple[str, ...] = OPCHECKS) -> None:
    """``torch.library.opcheck``, with the last check, the longest, on one backend: all are traced and derived alike.

    That what a backend returns is laid out as the trace has it is ``test_faketensor``'s to say, on each.
    """
    if _backend.current() not in ("torch", "auto"):
        checks = tuple(check for check in checks if check != OPCHECKS[-1])
    torch.library.opcheck(operator, args, test_utils=checks)


# --- gated activations ----------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda x, alpha: F.silu(x),
    "quick_gelu": lambda x, alpha: x * torch.sigmoid(alpha * x),
    "gelu_tanh": lambda x, alpha: F.gelu(x, approximate="tanh"),
    "gelu": lambda x, alpha: F.gelu(x),
    "relu": lambda x, alpha: F.relu(x),
    "relu2": lambda x, alpha: F.relu(x).pow(2),
}


def glu_formula(
    y: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    linear_offset: float | Tensor = 0.0,
    clamp: float | None = None,
    clamp_after_bias: bool = False,
    layout: str = "concatenated",
) -> Tensor:
    """What :func:`moekit.glu` computes, said with plain torch functions, for autograd to differentiate."""
    rows = y.reshape(math.prod(y.shape[:-1]), y.shape[-1])
    belongs = rows.shape[0]
    if offsets is not None:
        ends = [0, *offsets.tolist()]
        belongs = min(ends[-1], rows.shape[0])
        if bias is not None:
            bias = torch.cat([bias[e].expand(ends[e + 1] - ends[e], -1) for e in range(len(ends) - 1)])[:belongs]
    x, rest = rows[:belongs], rows.shape[0] - belongs
    if bias is not None and clamp_after_bias:
        x, bias = x + bias, None
    if layout != "ungated" and clamp is not None:
        gate, up = halves(x, layout)
        gate, up = torch.where(gate > clamp, clamp, gate), torch.where(up > clamp, clamp, up)  # a gradient at the limit, too
        x = joined(gate, torch.where(up < -clamp, -clamp, up), layout)
    x = x if bias is None else x + bias
    if layout == "ungated":
        out = ACTIVATIONS[activation](x, alpha)
    else:
        gate, up = halves(x, layout)
        out = ACTIVATIONS[activation](gate, alpha) * (up + linear_offset)
    if weights is not None:
        out = out * weights.reshape(-1, 1)[:belongs]
    return F.pad(out, (0, 0, 0, rest)).view(*y.shape[:-1], out.shape[-1])


def halves(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gate and up."""
    if layout == "interleaved":
        return x[..., ::2], x[..., 1::2]
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def joined(gate: Tensor, up: Tensor, layout: str) -> Tensor:
    """The inverse of :func:`halves`."""
    return torch.stack((gate, up), -1).flatten(-2) if layout == "interleaved" else torch.cat((gate, up), -1)


def interleaved(x: Tensor) -> Tensor:
    """``[gate | up]`` as pairs."""
    return joined(*halves(x, "concatenated"), "interleaved")


def value_and_grads(
    function: Callable[..., Tensor], inputs: dict[str, Tensor | None], grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """``function(**inputs)`` and the gradient of each floating input, given that of the output.

    Inputs become leaves of their own; ``grad`` is cast to the output's dtype.
    """
    leaves = {
        name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    out = function(**leaves)
    sources = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}
    found = torch.autograd.grad(out, list(sources.values()), grad.to(out.dtype))
    return out.detach(), dict(zip(sources, found, strict=True))


def doubled(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same inputs in float64."""
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def assert_matches_formula(
    function: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: dict[str, Tensor | None],
    grad: Tensor,
    what: str = "",
) -> None:
    """Value and every gradient of ``function`` against ``formula`` in float64; each gradient in its input's dtype."""
    out, grads = value_and_grads(function, inputs, grad)
    expected, expected_grads = value_and_grads(formula, doubled(inputs), grad.double())
    work = torch.float64 if any(x is not None and x.dtype is torch.float64 for x in inputs.values()) else torch.float32
    assert_accurate(out, expected, work=work, what=f"{what} value")
    for name, gradient in grads.items():
        assert gradient.dtype is inputs[name].dtype, f"{what} gradient of {name} is {gradient.dtype}"
        scale = None
        if name == "weights":  # a sum over features, whose terms may cancel
            rows = (grad.double() * expected).abs().sum(-1).view(gradient.shape)
            scale = (rows / inputs[name].double().abs()).nan_to_num(0.0, 0.0).maximum(expected_grads[name].abs())
        assert_accurate(gradient, expected_grads[name], work=work, scale=scale, what=f"{what} gradient of {name}")


# --- cases of the gated activations ---------------------------------------------------------------------------------

# Every activation, every layout, every constant away from its default, and the combinations that models use.
VARIANTS: dict[str, dict[str, Any]] = {
    "silu": {},
    "silu-interleaved": {"layout": "interleaved"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu", "layout": "interleaved"},
    "relu2": {"activation": "relu2"},
    "quick_gelu": {"activation": "quick_gelu"},
    "quick_gelu-alpha-offset": {"activation": "quick_gelu", "alpha": 0.7, "linear_offset": 1.001},
    "clamp-before-bias": {"activation": "quick_gelu", "linear_offset": 1.0, "clamp": 0.75},
    "clamp-after-bias": {  # gpt-oss
        "activation": "quick_gelu",
        "linear_offset": 1.0,
        "clamp": 0.75,
        "clamp_after_bias": True,
        "layout": "interleaved",
    },
    "silu-clamp": {"clamp": 0.5, "clamp_after_bias": True},
    "ungated-silu": {"layout": "ungated"},
    "ungated-relu2": {"activation": "relu2", "layout": "ungated"},
    "ungated-quick_gelu": {"activation": "quick_gelu", "layout": "ungated", "alpha": -0.9},
}
BIASES = ("none", "vector", "rows", "experts")
# Two that differ in everything a compiled kernel is specialised for.
EVERY_DTYPE = ("silu", "clamp-after-bias")
ENDS = [0, 5, 5, 9]  # the first and the third expert are empty


def dtypes(variant: str, backend: str) -> tuple[torch.dtype, ...]:
    """What to test a variant in: everything, except where each dtype of each variant costs a compilation."""
    return DTYPES if backend == "torch" or variant in EVERY_DTYPE else (torch.float64, torch.bfloat16)


def glu_inputs(
    variant: str,
    bias: str = "none",
    dtype: torch.dtype = torch.float64,
    *,
    num_rows: int = 11,
    width: int = 6,
    weights: bool = True,
    seed: int = 0,
    scale: float = 1.0,
) -> tuple[dict[str, Tensor | None], dict[str, Any], Tensor]:
    """Inputs by name, the parameters and an upstream gradient. With experts, rows past ``ENDS`` belong to none."""
    parameters = dict(VARIANTS[variant])
    features = width if parameters.get("layout") == "ungated" else 2 * width
    inputs: dict[str, Tensor | None] = {"y": draw(seed, num_rows, features, dtype=dtype, scale=scale)}
    inputs["weights"] = draw(seed + 1, num_rows, dtype=dtype) if weights else None
    shapes = {"vector": (features,), "rows": (num_rows, features), "experts": (len(ENDS), features)}
    inputs["bias"] = None if bias == "none" else draw(seed + 2, *shapes[bias], dtype=dtype, scale=scale)
    if bias == "experts":
        parameters["offsets"] = torch.tensor(ENDS, dtype=torch.int32)
    return inputs, parameters, draw(seed + 3, num_rows, width, dtype=dtype)


def together(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The tokens that ``index`` names, zeros where it is out of range."""
    known = (index >= 0) & (index < len(tokens))
    return torch.where(known.unsqueeze(1), tokens[torch.where(known, index, 0).long()], 0)
