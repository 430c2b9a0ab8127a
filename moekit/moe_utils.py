"""The drop-in: NeMo Automodel's ``moe_utils`` and the framework-free part of Megatron-core's, name for name.

Names, parameters, order and defaults are theirs, so an import line is all that changes. The work is done by moekit's
own operators (:mod:`moekit.ops`); here are only the signatures, the published conventions and their checks. ``fused``
is accepted everywhere and changes nothing: the fastest kernels that are installed always run, on every device.

Where the published code is wrong or lossy moekit decides otherwise; README.md lists each case. Letters in shapes: T
tokens, E experts, K experts per token, S rows after permutation, H hidden, I intermediate, N rows of an activation.

Precision: float32 inside (float64 for float64), one rounding at the store; sums are deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit._moe_utils_router import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    get_capacity,
    get_updated_expert_bias,
    group_limited_topk,
    pad_routing_map,
    sinkhorn,
    sort_chunks_by_idxs,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
    z_loss_func,
)
from moekit.ops import _library, rows, tables
from moekit.ops.aux_loss import MoEAuxLossAutoScaler
from moekit.ops.glu import Glu, apply_glu, apply_glu_backward, glu_and_store, make_glu

__all__ = [
    "MoEAuxLossAutoScaler",
    "WeightedBiasQuickGeGLUFunction",
    "WeightedGEGLUFunction",
    "WeightedQuickGeGLUFunction",
    "WeightedSwiGLUFunction",
    "apply_router_token_dropping",
    "compute_routing_scores_for_aux_loss",
    "geglu",
    "geglu_back",
    "get_capacity",
    "get_updated_expert_bias",
    "group_limited_topk",
    "pad_routing_map",
    "permute",
    "quick_geglu",
    "quick_geglu_back",
    "quick_gelu",
    "sinkhorn",
    "sort_chunks_by_idxs",
    "swiglu",
    "swiglu_back",
    "switch_load_balancing_loss_func",
    "topk_routing_with_score_function",
    "unpermute",
    "weighted_bias_geglu_impl",
    "weighted_bias_quick_geglu",
    "weighted_bias_quick_geglu_back",
    "weighted_bias_quick_geglu_impl",
    "weighted_bias_swiglu_impl",
    "weighted_geglu",
    "weighted_geglu_back",
    "weighted_quick_geglu",
    "weighted_quick_geglu_back",
    "weighted_swiglu",
    "weighted_swiglu_back",
    "z_loss_func",
]

_SWIGLU = make_glu("silu")
_GEGLU = make_glu("gelu_tanh")


# --- permutation ----------------------------------------------------------------------------------------------------


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Group the tokens by expert.

    Args:
        tokens: ``[T, H]``, any dtype.
        routing_map: ``[T, E]``, any dtype; what is not zero is routed.
        probs: ``[T, E]`` routing weights, or None.
        num_out_tokens: S. None counts the routed pairs, which is a device-to-host sync on a GPU; a larger value leaves
            zero rows at the tail.
        fused: accepted; changes nothing.
        drop_and_pad: with ``num_out_tokens``, give every expert ``num_out_tokens // E`` rows: its first routed tokens
            by position, then unrouted ones by position, then zero rows.

    Returns:
        ``(permuted_input [S, H], permuted_probs [S] or None, sorted_indices [S] int64)``: rows expert-major, ascending
        in token within an expert; ``sorted_indices`` is the token of each row, -1 for a zero row.

    Raises:
        ValueError: shapes or devices that do not fit; on a CPU (or under ``moekit.debug()``) a ``num_out_tokens`` below
            the number of routed pairs.
    """
    _check.tensor_dim("permute", "tokens", tokens, 2)
    _check.routing_map("permute", "routing_map", routing_map)
    num_tokens, num_experts = routing_map.shape
    if tokens.shape[0] != num_tokens:
        raise _check.fail(
            "permute", "routing_map", f"of {tokens.shape[0]} tokens, as tokens", f"shape {list(routing_map.shape)}"
        )
    if probs is not None:
        _check.shape("permute", "probs", probs, routing_map.shape, "[tokens, experts]")
    _check.same_device("permute", tokens=tokens, routing_map=routing_map, probs=probs)
    if num_out_tokens is not None:
        num_out_tokens = _check.positive("permute", "num_out_tokens", num_out_tokens, at_least=0)
    if drop_and_pad and num_out_tokens is not None:
        capacity = num_out_tokens // max(num_experts, 1)
        sorted_indices = tables.route_capacity(routing_map, capacity)
        found = tables.rows_of_tokens(sorted_indices, num_tokens)
        slots = _capacity_slots(sorted_indices, capacity, num_experts)
    else:
        _, sorted_indices, slots, *found = tables.route_map(routing_map, num_out_tokens)
    permuted_probs = None if probs is None else tables.take(probs, slots)
    return rows.move_rows(tokens, sorted_indices, *found), permuted_probs, sorted_indices


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: torch.Size | Sequence[int],
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> Tensor:
    """Sum each token's rows, times their routing weights if ``probs`` are given.

    Args:
        permuted_tokens: ``[S, H]`` floating rows.
        sorted_indices: ``[S]`` int32 or int64, the token of each row, -1 for none.
        restore_shape: ``(T, H)``.
        probs: ``[T, E]`` routing weights, or None; needs ``routing_map``.
        routing_map: ``[T, E]``, any dtype; what is not zero is routed.
        fused: accepted; changes nothing.
        drop_and_pad: the rows were made by :func:`permute` with ``drop_and_pad=True``.

    Returns:
        ``[T, H]`` in the dtype of ``permuted_tokens``: added in float32 in row order, rounded once.

    Raises:
        ValueError: shapes or devices that do not fit, ``probs`` without ``routing_map``; on a CPU an index out of
            range.
        TypeError: indices that are not integers.
    """
    check_unpermute(permuted_tokens, sorted_indices, restore_shape, probs, routing_map)
    weights = None
    if probs is not None and routing_map is not None:
        weights = _row_probs(sorted_indices, probs, routing_map, drop_and_pad)
    found = tables.rows_of_tokens(sorted_indices, restore_shape[0])
    return rows.sum_rows(permuted_tokens, weights, sorted_indices, *found)


def check_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: torch.Size | Sequence[int],
    probs: Tensor | None,
    routing_map: Tensor | None,
) -> None:
    """Refuse shapes, dtypes and devices that do not fit each other."""
    _check.tensor_dim("unpermute", "permuted_tokens", permuted_tokens, 2)
    _check.tensor_dim("unpermute", "sorted_indices", sorted_indices, 1)
    _check.integer("unpermute", "sorted_indices", sorted_indices)
    num_rows, hidden = permuted_tokens.shape
    if sorted_indices.shape[0] != num_rows:
        wanted = f"of {num_rows} entries, one a row of permuted_tokens"
        raise _check.fail("unpermute", "sorted_indices", wanted, f"shape {list(sorted_indices.shape)}")
    if not isinstance(restore_shape, Sequence) or isinstance(restore_shape, str):
        raise _check.wrong_type("unpermute", "restore_shape", f"(tokens, {hidden})", type(restore_shape).__name__)
    if len(restore_shape) != 2 or restore_shape[1] != hidden:
        raise _check.fail("unpermute", "restore_shape", f"(tokens, {hidden})", tuple(restore_shape))
    _check.positive("unpermute", "restore_shape[0]", restore_shape[0], at_least=0)
    if probs is not None:
        if routing_map is None:
            raise _check.fail("unpermute", "routing_map", "given together with probs", None)
        _check.floating("unpermute", "probs", probs)
        _check.routing_map("unpermute", "routing_map", routing_map)
        expected = (restore_shape[0], routing_map.shape[1])
        _check.shape("unpermute", "routing_map", routing_map, expected, "[tokens, experts]")
        _check.shape("unpermute", "probs", probs, routing_map.shape, "[tokens, experts]")
        _check.same_device("unpermute", sorted_indices=sorted_indices, routing_map=routing_map, probs=probs)
    _check.same_device("unpermute", permuted_tokens=permuted_tokens, sorted_indices=sorted_indices, probs=probs)


def _row_probs(sorted_indices: Tensor, probs: Tensor, routing_map: Tensor, drop_and_pad: bool) -> Tensor:
    """The routing weight of each row: the map's entries in expert-major order, or by capacity."""
    num_rows, num_experts = sorted_indices.shape[0], routing_map.shape[1]
    if drop_and_pad:
        capacity = num_rows // max(num_experts, 1)
        if capacity * num_experts != num_rows:
            raise _check.fail("unpermute", "sorted_indices", f"a multiple of {num_experts} experts long", num_rows)
        slots = _capacity_slots(sorted_indices, capacity, num_experts)
    else:
        slots = tables.route_map(routing_map, num_rows)[2]
    return tables.take(probs, slots)


def _capacity_slots(sorted_indices: Tensor, capacity: int, num_experts: int) -> Tensor:
    """Where each row's entry stands in a flat ``[T, E]`` table, -1 for none, if each expert has ``capacity`` rows."""
    row = torch.arange(sorted_indices.shape[0], device=sorted_indices.device)
    return tables.row_slots(sorted_indices, torch.div(row, max(capacity, 1), rounding_mode="floor"), num_experts)


# --- activations ----------------------------------------------------------------------------------------------------


def swiglu(y: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``y = [gate | up]``: ``[..., 2I]`` to ``[..., I]`` in y's dtype.

    Raises:
        ValueError: an odd last dimension. TypeError: y is not floating.
    """
    return apply_glu("swiglu", y, None, None, None, _SWIGLU)


def swiglu_back(g: Tensor, y: Tensor) -> Tensor:
    """Gradient of :func:`swiglu`: ``g [..., I]``, ``y [..., 2I]`` to ``[..., 2I]`` in their promoted dtype."""
    return _plain_back("swiglu_back", g, y, None, _SWIGLU)


def weighted_swiglu(y: Tensor, weights: Tensor) -> Tensor:
    """``swiglu(y) * weights``: ``y [N, 2I]``, ``weights [N, 1]`` to ``[N, I]`` in y's dtype."""
    return _weighted("weighted_swiglu", y, weights, None, _SWIGLU)


def weighted_swiglu_back(
    g: Tensor, y: Tensor, weights: Tensor, *, need_weight_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`weighted_swiglu`.

    Returns:
        ``(dy [N, 2I] in y's dtype, dweights [N, 1] in weights' dtype)``; the second is None unless it is needed.
    """
    return _weighted_back("weighted_swiglu_back", g, y, weights, None, _SWIGLU, need_weight_grad)


def weighted_bias_swiglu_impl(input: Tensor, weights: Tensor, fp8_input_store: bool = False) -> Tensor:
    """Weighted SwiGLU: ``silu(gate) * up * weights``.

    Args:
        input: ``[..., 2I]``, any leading shape, contiguous or not, any floating dtype.
        weights: one a row, ``[N, 1]``; for a 1-D input ``[1]`` or ``[1, 1]``.
        fp8_input_store: keep the input for backward as float8 e4m3 with one power-of-two scale a row.

    Returns:
        ``[..., I]`` in the input's dtype (``[1, I]`` for a 1-D input with weights ``[1, 1]``).

    Raises:
        ValueError: an odd last dimension, weights of another shape, mixed devices. TypeError: not floating.
    """
    return _weighted("weighted_bias_swiglu_impl", input, weights, None, _SWIGLU, fp8_input_store)


def geglu(y: Tensor) -> Tensor:
    """``gelu_tanh(gate) * up`` of ``y = [gate | up]``: ``[..., 2I]`` to ``[..., I]`` in y's dtype."""
    return apply_glu("geglu", y, None, None, None, _GEGLU)


def geglu_back(g: Tensor, y: Tensor) -> Tensor:
    """Gradient of :func:`geglu` in the promoted dtype of g and y, finite for gates of any size."""
    return _plain_back("geglu_back", g, y, None, _GEGLU)


def weighted_geglu(y: Tensor, weights: Tensor) -> Tensor:
    """``geglu(y) * weights``: ``y [N, 2I]``, ``weights [N, 1]`` to ``[N, I]`` in y's dtype."""
    return _weighted("weighted_geglu", y, weights, None, _GEGLU)


def weighted_geglu_back(
    g: Tensor, y: Tensor, weights: Tensor, *, need_weight_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`weighted_geglu`, as :func:`weighted_swiglu_back`."""
    return _weighted_back("weighted_geglu_back", g, y, weights, None, _GEGLU, need_weight_grad)


def weighted_bias_geglu_impl(input: Tensor, weights: Tensor, fp8_input_store: bool = False) -> Tensor:
    """Weighted GEGLU: ``gelu_tanh(gate) * up * weights``; arguments as :func:`weighted_bias_swiglu_impl`."""
    return _weighted("weighted_bias_geglu_impl", input, weights, None, _GEGLU, fp8_input_store)


def quick_gelu(y: Tensor, alpha: float = 1.702) -> Tensor:
    """``y * sigmoid(alpha * y)``, any shape, in y's dtype."""
    op = "quick_gelu"
    return apply_glu(op, y, None, None, None, make_glu(op, alpha=alpha, layout="ungated", op=op))


def quick_geglu(y: Tensor, linear_offset: float | Tensor = 0.0) -> Tensor:
    """``quick_gelu(gate) * (up + linear_offset)``: ``[..., 2I]`` to ``[..., I]`` in y's dtype.

    A number as ``linear_offset`` is exact in every dtype; a tensor of one element is accepted and differentiated.
    """
    spec, bias = _quick("quick_geglu", y, None, linear_offset)
    return apply_glu("quick_geglu", y, None, bias, None, spec)


def quick_geglu_back(g: Tensor, y: Tensor, linear_offset: float | Tensor = 0.0) -> Tensor:
    """Gradient of :func:`quick_geglu` in the promoted dtype of g and y."""
    spec, bias = _quick("quick_geglu_back", y, None, linear_offset)
    return _plain_back("quick_geglu_back", g, y, bias, spec)


def weighted_quick_geglu(y: Tensor, weights: Tensor, linear_offset: float | Tensor = 0.0) -> Tensor:
    """``quick_geglu(y, linear_offset) * weights``: ``y [N, 2I]``, ``weights [N, 1]`` to ``[N, I]`` in y's dtype."""
    spec, bias = _quick("weighted_quick_geglu", y, None, linear_offset)
    return _weighted("weighted_quick_geglu", y, weights, bias, spec)


def weighted_quick_geglu_back(
    g: Tensor,
    y: Tensor,
    weights: Tensor,
    linear_offset: float | Tensor = 0.0,
    *,
    need_weight_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`weighted_quick_geglu`, as :func:`weighted_swiglu_back`."""
    spec, bias = _quick("weighted_quick_geglu_back", y, None, linear_offset)
    return _weighted_back("weighted_quick_geglu_back", g, y, weights, bias, spec, need_weight_grad)


def weighted_bias_quick_geglu(y: Tensor, bias: Tensor, weights: Tensor, linear_offset: float | Tensor = 0.0) -> Tensor:
    """``quick_geglu(y + bias, linear_offset) * weights``.

    Args:
        y: ``[N, 2I]``.
        bias: broadcastable to y; its gradient is reduced to its shape in float32 for ``[2I]``.
        weights: ``[N, 1]``.
        linear_offset: added to the up half after the bias.

    Returns:
        ``[N, I]`` in y's dtype.
    """
    spec, row_bias = _quick("weighted_bias_quick_geglu", y, bias, linear_offset)
    return _weighted("weighted_bias_quick_geglu", y, weights, row_bias, spec)


def weighted_bias_quick_geglu_back(
    g: Tensor, y: Tensor, bias: Tensor, weights: Tensor, linear_offset: float | Tensor = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`weighted_bias_quick_geglu`.

    Returns:
        ``(dy, dbias, dweights)``: ``dbias`` is full, ``[N, 2I]`` in y's dtype, and shares its memory with ``dy``.
    """
    spec, row_bias = _quick("weighted_bias_quick_geglu_back", y, bias, linear_offset)
    dy, dweights = _weighted_back("weighted_bias_quick_geglu_back", g, y, weights, row_bias, spec)
    return dy, dy, dweights


def weighted_bias_quick_geglu_impl(
    input: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    fp8_input_store: bool = False,
    linear_offset: float | Tensor = 0.0,
    clamp_value: float | None = None,
    alpha: float = 1.702,
) -> Tensor:
    """Weighted Quick-GEGLU with bias: ``quick_gelu(gate + bias) * (up + bias + linear_offset) * weights``.

    Args:
        input: ``[..., 2I]``, any leading shape.
        bias: broadcastable to ``[N, 2I]``, or None.
        weights: ``[N, 1]``.
        fp8_input_store: keep the input for backward as float8 e4m3 with one power-of-two scale a row.
        linear_offset: added to the up half.
        clamp_value: limits the gate from above and the up half on both sides, before the bias is added.
        alpha: the constant of ``x * sigmoid(alpha * x)``.

    Returns:
        ``[..., I]`` in the input's dtype.
    """
    spec, bias = _quick("weighted_bias_quick_geglu_impl", input, bias, linear_offset, clamp_value, alpha)
    return _weighted("weighted_bias_quick_geglu_impl", input, weights, bias, spec, fp8_input_store)


def _quick(
    op: str,
    y: Tensor,
    bias: Tensor | None,
    linear_offset: float | Tensor,
    clamp: float | None = None,
    alpha: float = 1.702,
) -> tuple[Glu, Tensor | None]:
    """The constants of Quick-GEGLU and the bias in a form the operator takes.

    An offset that is a tensor becomes part of the bias of the up half (the bias comes after the clamp, so this is
    exact): reading it would be a sync.
    """
    _check.floating(op, "y", y)
    if bias is not None:
        bias = _bias_rows(op, y, bias)
    if isinstance(linear_offset, Tensor):
        if linear_offset.numel() != 1:
            raise _check.fail(op, "linear_offset", "a number or a tensor of one element", list(linear_offset.shape))
        dtype = torch.float64 if torch.float64 in (y.dtype, linear_offset.dtype) else torch.float32
        half = y.shape[-1] // 2
        up = linear_offset.to(y.device, dtype, non_blocking=True).reshape(1).expand(half)
        offset_bias = torch.cat((up.new_zeros(half), up))
        bias, linear_offset = offset_bias if bias is None else bias + offset_bias, 0.0
    return make_glu("quick_gelu", alpha=alpha, linear_offset=linear_offset, clamp=clamp, op=op), bias


def _bias_rows(op: str, y: Tensor, bias: Any) -> Tensor:
    """``bias`` as ``[2I]`` or ``[N, 2I]``."""
    _check.floating(op, "bias", bias)
    width = y.shape[-1]
    full = (math.prod(y.shape[:-1]), width)
    if bias.shape == y.shape:
        return bias.reshape(full)
    if bias.shape[-1:] == (width,) and bias.numel() == width:
        return bias.reshape(width)
    try:
        return bias.expand(full)
    except RuntimeError:
        raise _check.fail(op, "bias", f"broadcastable to {list(full)}", f"shape {list(bias.shape)}") from None


def _row_weights(op: str, y: Tensor, weights: Tensor) -> Tensor:
    """Check the published shapes of ``weights`` (a bare ``[N]`` would broadcast over features) and drop the last 1."""
    _check.tensor(op, "y", y)
    _check.tensor(op, "weights", weights)
    lead = y.shape[:-1]
    allowed = [(math.prod(lead), 1), (*lead, 1)] if y.dim() > 1 else [(1,), (1, 1)]
    if tuple(weights.shape) not in allowed:
        wanted = f"of shape {list(allowed[0])} for an input of shape {list(y.shape)}"
        raise _check.fail(op, "weights", wanted, f"shape {list(weights.shape)}")
    return weights.reshape(lead)


def _weighted(op: str, y: Tensor, weights: Tensor, bias: Tensor | None, spec: Glu, fp8_store: bool = False) -> Tensor:
    out = apply_glu(op, y, _row_weights(op, y, weights), bias, None, spec, fp8_store=fp8_store)
    return out.unsqueeze(0) if y.dim() == 1 and weights.dim() == 2 else out


def _plain_back(op: str, g: Tensor, y: Tensor, bias: Tensor | None, spec: Glu) -> Tensor:
    _check.floating(op, "g", g)
    _check.floating(op, "y", y)
    y = y.to(torch.promote_types(g.dtype, y.dtype))
    return apply_glu_backward(op, g, y, None, bias, spec, need_bias_grad=False)[0]


def _weighted_back(
    op: str,
    g: Tensor,
    y: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    spec: Glu,
    need_weight_grad: bool = True,
) -> tuple[Tensor, Any]:
    dy, dweights, _ = apply_glu_backward(
        op,
        g,
        y,
        _row_weights(op, y, weights),
        bias,
        spec,
        need_weight_grad=need_weight_grad,
        need_bias_grad=False,
    )
    return dy, None if dweights is None else dweights.view(weights.shape)


# --- the autograd functions -----------------------------------------------------------------------------------------


class _WeightedFunction(torch.autograd.Function):
    """What the four published functions share: each names its constants and the order of its arguments."""

    as_operator: Callable[..., Tensor]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """``forward``; within ``torch.func`` and forward-mode AD as an operator, which these know."""
        return cls.as_operator(*args) if _library.transformed() else super().apply(*args)

    @staticmethod
    def run(ctx: Any, op: str, input: Tensor, bias: Tensor | None, weights: Tensor, fp8: bool, *offset: Any) -> Tensor:
        """Forward: SwiGLU and GEGLU have no ``offset``."""
        ctx.op, ctx.offset, stored, scale = op, offset, input, None
        spec, row_bias = _WeightedFunction.constants(op, input, bias, offset)
        if fp8:
            _, stored, scale = glu_and_store(op, input, _row_weights(op, input, weights), row_bias, spec)
        ctx.save_for_backward(stored, scale, bias, weights)
        return _weighted(op, input, weights, row_bias, spec)

    @staticmethod
    def constants(op: str, y: Tensor, bias: Tensor | None, offset: tuple) -> tuple[Glu, Tensor | None]:
        """The member of the family that ``op`` is."""
        if not offset:
            return (_GEGLU if op == "WeightedGEGLUFunction" else _SWIGLU), None
        return _quick(op, y, bias, *offset)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor, weights_at: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``(dinput, dbias, dweights)``, each in its argument's shape; None for what is not needed."""
        stored, scale, bias, weights = ctx.saved_tensors
        spec, row_bias = _WeightedFunction.constants(ctx.op, stored, bias, ctx.offset)
        dy, dweights, dbias = apply_glu_backward(
            ctx.op,
            grad,
            stored,
            _row_weights(ctx.op, stored, weights),
            row_bias,
            spec,
            scale=scale,
            need_input_grad=ctx.needs_input_grad[0],
            need_weight_grad=ctx.needs_input_grad[weights_at],
            need_bias_grad=bias is not None and ctx.needs_input_grad[1],
        )
        if bias is not None and dbias is not None:
            dbias = dbias.view_as(bias) if dbias.numel() == bias.numel() else dbias.sum_to_size(bias.shape)
        return dy, dbias, None if dweights is None else dweights.view(weights.shape)


class WeightedSwiGLUFunction(_WeightedFunction):
    """Autograd function of :func:`weighted_swiglu`."""

    as_operator = staticmethod(weighted_bias_swiglu_impl)

    @staticmethod
    def forward(ctx: Any, input: Tensor, weights: Tensor, fp8_input_store: bool) -> Tensor:
        """``input [N, 2I]``, ``weights [N, 1]`` to ``[N, I]``; ``fp8_input_store`` keeps the input in float8."""
        return _WeightedFunction.run(ctx, "WeightedSwiGLUFunction", input, None, weights, fp8_input_store)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        """Gradients of input and weights."""
        dinput, _, dweights = _WeightedFunction.gradients(ctx, grad_output, 1)
        return dinput, dweights, None


class WeightedGEGLUFunction(_WeightedFunction):
    """Autograd function of :func:`weighted_geglu`."""

    as_operator = staticmethod(weighted_bias_geglu_impl)

    @staticmethod
    def forward(ctx: Any, input: Tensor, weights: Tensor, fp8_input_store: bool) -> Tensor:
        """``input [N, 2I]``, ``weights [N, 1]`` to ``[N, I]``; ``fp8_input_store`` keeps the input in float8."""
        return _WeightedFunction.run(ctx, "WeightedGEGLUFunction", input, None, weights, fp8_input_store)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        """Gradients of input and weights."""
        dinput, _, dweights = _WeightedFunction.gradients(ctx, grad_output, 1)
        return dinput, dweights, None


class WeightedQuickGeGLUFunction(_WeightedFunction):
    """Autograd function of :func:`weighted_quick_geglu`."""

    @staticmethod
    def as_operator(input: Tensor, weights: Tensor, fp8_input_store: bool, linear_offset: float | Tensor) -> Tensor:
        """``forward`` without a context."""
        return weighted_bias_quick_geglu_impl(input, None, weights, fp8_input_store, linear_offset)

    @staticmethod
    def forward(ctx: Any, input: Tensor, weights: Tensor, fp8_input_store: bool, linear_offset: float | Tensor) -> Tensor:
        """``input [N, 2I]``, ``weights [N, 1]`` to ``[N, I]``; the offset is a number or a tensor of one element."""
        op = "WeightedQuickGeGLUFunction"
        return _WeightedFunction.run(ctx, op, input, None, weights, fp8_input_store, linear_offset)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        """Gradients of input and weights."""
        dinput, _, dweights = _WeightedFunction.gradients(ctx, grad_output, 1)
        return dinput, dweights, None, None


class WeightedBiasQuickGeGLUFunction(_WeightedFunction):
    """Autograd function of :func:`weighted_bias_quick_geglu`."""

    as_operator = staticmethod(weighted_bias_quick_geglu_impl)

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor, weights: Tensor, fp8_input_store: bool, linear_offset: float | Tensor
    ) -> Tensor:
        """As :class:`WeightedQuickGeGLUFunction`, with a ``bias`` broadcastable to the input."""
        op = "WeightedBiasQuickGeGLUFunction"
        return _WeightedFunction.run(ctx, op, input, bias, weights, fp8_input_store, linear_offset)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        """Gradients of input, bias (in its own shape) and weights."""
        return (*_WeightedFunction.gradients(ctx, grad_output, 2), None, None)
