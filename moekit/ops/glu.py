"""Gated activations: one formula, one forward and one backward for the whole family.

For a row ``y = [a | b]`` (gate first), a routing weight ``p``, a bias and the constants of a
:class:`~moekit.ops._activations.Glu`::

    out = p * act(a) * (b + linear_offset)
    da  = g * p * (b + linear_offset) * act'(a)        db = g * p * act(a)
    dp  = sum(g * act(a) * (b + linear_offset))

``silu``, ``quick_gelu`` and ``gelu_tanh`` are one function of two constants, ``act(x) = x * sigmoid(c1*x + c3*x**3)``:
the tanh approximation of GELU is a sigmoid because ``(1 + tanh(k)) / 2 = sigmoid(2*k)``. Without a gate
(``layout="ungated"``) the row is ``a`` alone and ``out = p * act(a)``.

Precision: everything is computed in float32 (float64 if any input is), rounded once at the store. Gates of any size
give finite gradients. Sums over rows are deterministic.

Sources: GLU variants, arXiv 2002.05202; GELU and its approximations, arXiv 1606.08415; the clamped form with an
offset, gpt-oss model card, arXiv 2508.10925.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops import _library
from moekit.ops._activations import LAYOUTS, Glu, activate, activate_grad, make_glu
from moekit.ops._segments import expert_of_row, sum_by_index

_E4M3_MAX = 448.0


def glu(
    y: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    activation: str = "silu",
    alpha: float | None = None,
    linear_offset: float = 0.0,
    clamp: float | None = None,
    clamp_after_bias: bool = False,
    layout: str = "concatenated",
    fp8_store: bool = False,
) -> Tensor:
    """Gated activation with optional routing weights: ``weights * act(gate) * (up + linear_offset)``.

    Args:
        y: gate and up projections ``[..., 2I]`` (``[..., I]`` for an ungated activation), any floating dtype.
        weights: routing weights, one a row: ``[...]`` or ``[..., 1]``; None means 1.
        bias: added to ``y``: ``[2I]``, one a row ``[N, 2I]`` (N rows), or with ``offsets`` one an expert ``[E, 2I]``.
        offsets: int32 or int64 ``[E]``, cumulative row ends of the experts. Rows at or past the last one belong to no
            expert: their output and gradients are zero, and their content is never read into a result.
        activation: ``silu``, ``quick_gelu``, ``gelu_tanh``, ``gelu`` (erf), ``relu`` or ``relu2`` (ReLU squared).
        alpha: the constant of ``quick_gelu``, ``x * sigmoid(alpha * x)``; None is 1.702. No other activation has one.
        linear_offset: added to the up half.
        clamp: limits the gate from above and the up half on both sides.
        clamp_after_bias: clamp ``y + bias`` (as gpt-oss does) instead of ``y``; needs a ``clamp``.
        layout: ``concatenated`` halves ``[gate | up]``, ``interleaved`` pairs, or ``ungated``.
        fp8_store: keep ``y`` for backward in float8 e4m3 with one power-of-two scale a row.

    Returns:
        ``[..., I]`` in the dtype of ``y``, whatever the dtypes of the others (under autocast too).

    Raises:
        ValueError: shapes, devices or parameters that do not fit together; an odd last dimension; a parameter that would
            have no effect.
        TypeError: a dtype that is not floating.

    Examples:
        >>> import torch, moekit
        >>> y = torch.tensor([[0.0, 1.0, 2.0, 4.0]])  # the gate, then up
        >>> moekit.glu(y)
        tensor([[0.0000, 2.9242]])
        >>> moekit.glu(y, torch.tensor([0.5]), activation="gelu_tanh", clamp=3.0)
        tensor([[0.0000, 1.2618]])
    """
    if clamp_after_bias and clamp is None:
        raise _check.unused("glu", "clamp_after_bias", clamp_after_bias, "without clamp")
    clamps = {"clamp": clamp, "clamp_after_bias": clamp_after_bias}
    spec = make_glu(activation, alpha=alpha, linear_offset=linear_offset, layout=layout, **clamps)
    return apply_glu("glu", y, weights, bias, offsets, spec, fp8_store=fp8_store)


def apply_glu(
    op: str,
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    spec: Glu,
    *,
    fp8_store: bool = False,
) -> Tensor:
    """:func:`glu` with its constants looked up already; ``op`` names the caller in errors."""
    rows, row_weights = as_rows(op, y, weights, spec)
    _check_bias(op, rows, bias, offsets)
    _check.same_device(op, y=y, weights=weights, bias=bias, offsets=offsets)
    args = (rows, row_weights, bias, offsets, *spec)
    out = forward_fp8(*args)[0] if fp8_store else forward(*args)
    return out.view(*y.shape[:-1], out.shape[-1])


def glu_and_store(op: str, y: Tensor, weights: Tensor, bias: Tensor | None, spec: Glu) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`apply_glu` and what its backward needs of ``y`` in float8: ``(out, q like y, scale [N])``."""
    rows, row_weights = as_rows(op, y, weights, spec)
    _check_bias(op, rows, bias, None)
    _check.same_device(op, y=y, weights=weights, bias=bias)
    out, stored, scale = forward_fp8(rows, row_weights, bias, None, *spec)
    return out.view(*y.shape[:-1], out.shape[-1]), stored.view(y.shape), scale


def apply_glu_backward(
    op: str,
    grad: Tensor,
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    spec: Glu,
    *,
    scale: Tensor | None = None,
    need_input_grad: bool = True,
    need_weight_grad: bool = True,
    need_bias_grad: bool = True,
) -> tuple[Any, Tensor | None, Tensor | None]:
    """``(dy, dweights, dbias)`` of :func:`apply_glu`, in the shapes of its arguments; None for what is not needed.

    ``y`` is the forward's or, with ``scale``, its float8 rows. ``dy`` is in the dtype of ``y`` (``grad`` for float8).
    """
    rows, row_weights = as_rows(op, y, weights, spec)
    _check_bias(op, rows, bias, None)
    _check.floating(op, "g", grad)
    width = _width(rows, spec)
    if grad.numel() != rows.shape[0] * width or grad.shape[-1:] != (width,):
        raise _check.fail(op, "g", f"of shape {[*y.shape[:-1], width]}", f"shape {list(grad.shape)}")
    _check.same_device(op, g=grad, y=y, weights=weights, bias=bias)
    wanted = [need_input_grad, need_weight_grad and weights is not None, need_bias_grad and bias is not None, False]
    grad = grad.reshape(rows.shape[0], width)
    dy, dweights, dbias, _ = backward(grad, rows, scale, row_weights, bias, None, *spec, wanted)
    return (
        dy.view(y.shape) if need_input_grad else None,
        dweights.view(weights.shape) if weights is not None and wanted[1] else None,
        dbias if wanted[2] else None,
    )


def as_rows(op: str, y: Tensor, weights: Tensor | None, spec: Glu) -> tuple[Tensor, Tensor | None]:
    """Check ``y`` and ``weights`` and flatten them to ``[N, 2I]`` and ``[N]``."""
    _check.floating(op, "y", y)
    if y.dim() == 0:
        raise _check.fail(op, "y", "a tensor of at least one dimension", "a scalar")
    if spec.layout != "ungated" and y.shape[-1] % 2:
        raise _check.fail(op, "y", "of an even last dimension (gate and up halves)", f"shape {list(y.shape)}")
    lead = y.shape[:-1]
    rows = y if y.dim() == 2 else y.reshape(math.prod(lead), y.shape[-1])
    if weights is None:
        return rows, None
    _check.floating(op, "weights", weights)
    if weights.shape != lead and weights.shape != (*lead, 1):
        wanted = f"one a row of y {list(y.shape)}: shape {[*lead]} or {[*lead, 1]}"
        raise _check.fail(op, "weights", wanted, f"shape {list(weights.shape)}")
    return rows, weights.reshape(rows.shape[0])


def _check_bias(op: str, rows: Tensor, bias: Tensor | None, offsets: Tensor | None) -> None:
    if offsets is not None:  # their values are looked at where the rows are
        _check.tensor_dim(op, "offsets", offsets, 1)
        _check.integer(op, "offsets", offsets)
    if bias is None:
        return
    _check.floating(op, "bias", bias)
    width = rows.shape[1]
    if offsets is not None:
        _check.shape(op, "bias", bias, (offsets.shape[0], width), "[experts, features]")
    elif bias.shape != (width,) and bias.shape != rows.shape:
        wanted = f"of shape [{width}] or {list(rows.shape)} (one for each expert needs offsets)"
        raise _check.fail(op, "bias", wanted, f"shape {list(bias.shape)}")


# --- the arithmetic: the reference of every backend -----------------------------------------------------------------


class _Halves(NamedTuple):
    """Gate and up after bias and clamp, and where the clamp let each through (None: everywhere)."""

    gate: Tensor
    up: Tensor | None
    gate_inside: Tensor | None
    up_inside: Tensor | None


def _halves(x: Tensor, bias: Tensor | None, spec: Glu) -> _Halves:
    _check.one_of("glu", "layout", spec.layout, LAYOUTS)
    if spec.layout == "ungated":
        return _Halves(x if bias is None else x + bias, None, None, None)
    inside: tuple[Tensor | None, Tensor | None] = (None, None)
    if bias is not None and (spec.clamp is None or spec.clamp_after_bias):
        x, bias = x + bias, None
    gate, up = _split(x, spec)
    if spec.clamp is not None:
        inside = (gate <= spec.clamp, up.abs() <= spec.clamp)
        # Not by ``torch.clamp``, whose derivative at the limit itself depends on the release of PyTorch.
        gate, up = torch.where(gate > spec.clamp, spec.clamp, gate), torch.where(up > spec.clamp, spec.clamp, up)
        up = torch.where(up < -spec.clamp, -spec.clamp, up)
    if bias is not None:
        gate_bias, up_bias = _split(bias, spec)
        gate, up = gate + gate_bias, up + up_bias
    return _Halves(gate, up, *inside)


def _split(x: Tensor, spec: Glu) -> tuple[Tensor, Tensor]:
    if spec.layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    return x.chunk(2, -1)[0], x.chunk(2, -1)[1]


def _join(gate: Tensor, up: Tensor, spec: Glu) -> Tensor:
    if spec.layout == "interleaved":
        return torch.stack((gate, up), -1).flatten(-2)
    return torch.cat((gate, up), -1)


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype is torch.float64 for t in tensors) else torch.float32


def _row_bias(bias: Tensor | None, offsets: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor | None:
    """The bias as something that adds to the rows: itself, or each row's expert's."""
    if bias is None or bias.numel() == 0:  # without an expert no row has one
        return None
    owner = None if offsets is None else expert_of_row(offsets.contiguous(), num_rows).clamp(max=bias.shape[0] - 1)
    return bias.to(dtype) if owner is None else bias.to(dtype)[owner]


def _product(act: Tensor, up: Tensor | None, other: Tensor | None) -> Tensor:
    """``act * up * other``, the gate last: it may be so large that its product with one of them is not finite."""
    factor = other if up is None else up if other is None else up * other
    return act if factor is None else act * factor


def _in_range(offsets: Tensor | None, num_rows: int) -> Tensor | None:
    """``[N, 1]``: whether the row lies before the last offset (None: all do)."""
    if offsets is None:
        return None
    if offsets.shape[0] == 0:
        return torch.zeros(num_rows, 1, dtype=torch.bool, device=offsets.device)
    return (torch.arange(num_rows, device=offsets.device) < offsets[-1]).unsqueeze(1)


def glu_reference(y: Tensor, weights: Tensor | None, bias: Tensor | None, offsets: Tensor | None, *constants: Any) -> Tensor:
    """``y [N, 2I]``, ``weights [N]`` to ``[N, I]`` in y's dtype."""
    spec = Glu(*constants)
    if offsets is not None:
        _check.offsets("glu", offsets, y.shape[0])
    dtype = _compute_dtype(y, weights, bias)
    halves = _halves(y.to(dtype).contiguous(), _row_bias(bias, offsets, y.shape[0], dtype), spec)
    up = None if halves.up is None else halves.up + spec.linear_offset
    p = None if weights is None else weights.to(dtype).unsqueeze(1)
    out = _product(activate(halves.gate, spec), up, p)
    inside = _in_range(offsets, y.shape[0])
    return (out if inside is None else torch.where(inside, out, 0)).to(y.dtype, copy=True)


def glu_backward_reference(
    grad: Tensor,
    y: Tensor,
    scale: Tensor | None,
    weights: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dy, dweights, dbias, activation)``; those that ``wanted`` (the last argument) leaves out are empty.

    ``y`` is the forward's, or with ``scale [N]`` its float8 store. ``activation`` is the forward's output again, for
    callers that did not keep it.
    """
    spec, wanted = Glu(*constants[:-1]), constants[-1]
    if offsets is not None:
        _check.offsets("glu", offsets, y.shape[0])
    out_dtype = y.dtype if scale is None else grad.dtype
    dtype = _compute_dtype(grad, y, scale, weights, bias)
    x = y.to(dtype) if scale is None else load_fp8(y, scale).to(dtype)
    halves = _halves(x.contiguous(), _row_bias(bias, offsets, y.shape[0], dtype), spec)
    inside = _in_range(offsets, y.shape[0])
    g, act = grad.to(dtype).contiguous(), activate(halves.gate, spec)
    up = None if halves.up is None else halves.up + spec.linear_offset
    p = None if weights is None else weights.to(dtype).unsqueeze(1)
    slope = activate_grad(halves.gate, spec)
    if inside is not None:  # a row of no expert may hold anything: 0 * NaN must not come through
        g, act, slope = (torch.where(inside, t, 0) for t in (g, act, slope))
        up, p = (None if t is None else torch.where(inside, t, 0) for t in (up, p))
    dy, dbias = _input_gradients(g if p is None else g * p, act, slope, up, halves, spec)
    return (
        dy.to(out_dtype) if wanted[0] else grad.new_empty(0),
        _product(act, up, g).sum(1).to(weights.dtype) if wanted[1] and weights is not None else grad.new_empty(0),
        _reduce_bias(dbias, bias, offsets) if wanted[2] and bias is not None else grad.new_empty(0),
        _product(act, up, p).to(out_dtype) if wanted[3] else grad.new_empty(0),
    )


def _input_gradients(
    gp: Tensor, act: Tensor, slope: Tensor, up: Tensor | None, halves: _Halves, spec: Glu
) -> tuple[Tensor, Tensor]:
    """Gradients of ``y`` and of what is added to it: they differ where the clamp comes between."""
    if up is None:
        dgate = gp * slope
        return dgate, dgate
    dgate, dup = gp * up * slope, gp * act
    if halves.gate_inside is None or halves.up_inside is None:
        both = _join(dgate, dup, spec)
        return both, both
    dy = _join(torch.where(halves.gate_inside, dgate, 0), torch.where(halves.up_inside, dup, 0), spec)
    return dy, dy if spec.clamp_after_bias else _join(dgate, dup, spec)


def _reduce_bias(dbias: Tensor, bias: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is not None:
        owner = expert_of_row(offsets.contiguous(), dbias.shape[0])
        return sum_by_index(dbias, owner, bias.shape[0]).to(bias.dtype)
    if bias.dim() == 1:
        return dbias.sum(0).to(bias.dtype)
    return dbias.to(bias.dtype, copy=True)


def store_fp8(y: Tensor) -> tuple[Tensor, Tensor]:
    """``y [N, F]`` as float8 e4m3 with one power-of-two scale a row, so that the row's maximum lies in (224, 448].

    Returns:
        ``(q [N, F] float8_e4m3fn, scale [N] float32 (float64 for float64))`` with ``y ~ q * scale``. Finite for every
        finite input; a row with an Inf or NaN keeps scale 1, and what is past 448 in it becomes 448.
    """
    x = y.to(_compute_dtype(y)).contiguous()
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    mantissa, exponent = torch.frexp(largest)
    # largest = mantissa * 2**exponent with mantissa in [0.5, 1); 448 = 0.875 * 2**9
    exponent = exponent - 9 + (mantissa > _E4M3_MAX / 512).int()
    usable = torch.isfinite(largest) & (largest > 0)
    top = 127 if x.dtype is torch.float32 else 1023  # the largest exponent
    exponent = torch.where(usable, exponent, 0).clamp(min=1 - top)
    scale = torch.ldexp(torch.ones_like(largest), exponent.to(x.dtype))  # an integer one would be taken to float32
    limit = 1.875 * 2.0**top  # what is larger would come back as 2**(top + 1): Inf
    scaled = x.clamp(-limit, limit) / scale.unsqueeze(1)
    # PyTorch's own cast saturates or gives NaN, depending on its version.
    return scaled.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn), scale


def load_fp8(q: Tensor, scale: Tensor) -> Tensor:
    """The rows that :func:`store_fp8` kept, in the dtype of ``scale``."""
    return q.to(scale.dtype) * scale.unsqueeze(1)


# --- the operators --------------------------------------------------------------------------------------------------

_INPUTS = "Tensor? weights, Tensor? bias, Tensor? offsets"
CONSTANTS = "str act, float c1, float c3, float linear_offset, float? clamp, bool clamp_after_bias, str layout"


def _width(y: Tensor, constants: tuple) -> Any:
    return y.shape[1] if Glu(*constants).layout == "ungated" else y.shape[1] // 2


def _glu_fake(y: Tensor, weights: Any, bias: Any, offsets: Any, *constants: Any) -> Tensor:
    return y.new_empty(y.shape[0], _width(y, constants))


def _glu_fp8_reference(y: Tensor, weights: Any, bias: Any, offsets: Any, *constants: Any) -> tuple:
    return (glu_reference(y, weights, bias, offsets, *constants), *store_fp8(y))


def _glu_fp8_fake(y: Tensor, weights: Any, bias: Any, offsets: Any, *constants: Any) -> tuple:
    stored = torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=y.device)
    scale = y.new_empty(y.shape[0], dtype=_compute_dtype(y))
    return _glu_fake(y, weights, bias, offsets, *constants), stored, scale


def _backward_fake(
    grad: Tensor, y: Tensor, scale: Any, weights: Any, bias: Any, offsets: Any, *constants: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted, dtype = constants[-1], y.dtype if scale is None else grad.dtype
    return (
        torch.empty(y.shape, dtype=dtype, device=y.device) if wanted[0] else grad.new_empty(0),
        weights.new_empty(weights.shape) if wanted[1] and weights is not None else grad.new_empty(0),
        bias.new_empty(bias.shape) if wanted[2] and bias is not None else grad.new_empty(0),
        grad.new_empty(grad.shape, dtype=dtype) if wanted[3] else grad.new_empty(0),
    )


def _save(ctx: Any, args: tuple, outputs: Any) -> None:
    y, weights, bias, offsets, *ctx.constants = args
    ctx.save_for_backward(y, None, weights, bias, offsets)


def _save_fp8(ctx: Any, args: tuple, outputs: tuple) -> None:
    _, weights, bias, offsets, *ctx.constants = args
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)  # no zeros for gradients that nobody reads
    ctx.save_for_backward(*outputs[1:], weights, bias, offsets)


def _backward(ctx: Any, needs: tuple, grad: Tensor, *_: Any) -> tuple:
    wanted = [*needs[:3], False]
    grads = backward(grad, *ctx.saved_tensors, *ctx.constants, wanted)
    return (*(g if want else None for g, want in zip(grads[:3], wanted, strict=False)), *[None] * 8)


def _save_backward(ctx: Any, args: tuple, outputs: tuple) -> None:
    ctx.constants = args[6:]
    ctx.save_for_backward(*args[:6])


def _double_backward(ctx: Any, needs: tuple, *grads: Tensor) -> tuple:
    """Differentiate the reference of backward."""
    inputs = list(ctx.saved_tensors)
    _library.require_reference("glu", inputs[0])
    if inputs[2] is not None:
        raise RuntimeError("moekit.glu: double backward exists on the 'torch' backend only, with fp8_store=False")
    return _library.differentiate(glu_backward_reference, (*inputs, *ctx.constants), needs, grads)


backward = _library.define(
    f"glu_backward(Tensor grad, Tensor y, Tensor? scale, {_INPUTS}, {CONSTANTS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=glu_backward_reference,
    fake=_backward_fake,
    save=_save_backward,
    backward=_double_backward,
)


def backward_over(grad: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`backward` for those who are done with ``grad`` then: a kernel may write the activation over it."""
    kernel = _backend.kernel("glu_backward_over", grad)
    outputs = NotImplemented if kernel is None else kernel(grad, y, *args)
    return backward(grad, y, *args) if outputs is NotImplemented else outputs


forward = _library.define(
    f"glu(Tensor y, {_INPUTS}, {CONSTANTS}) -> Tensor",
    reference=glu_reference,
    fake=_glu_fake,
    save=_save,
    backward=_backward,
)
forward_fp8 = _library.define(
    f"glu_fp8(Tensor y, {_INPUTS}, {CONSTANTS}) -> (Tensor, Tensor, Tensor)",
    reference=_glu_fp8_reference,
    fake=_glu_fp8_fake,
    save=_save_fp8,
    backward=_backward,
)
