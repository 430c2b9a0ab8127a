"""The routed expert MLP as one operator: permute, project, gate, project, unpermute.

Kept for backward under ``save="recompute"``: the gate/up projection's output and the routing tables; nothing else of
row size. The gathered rows are gathered again and the activation is computed again by the backward of the gate. The
gradient of a routing weight is a dot product over the activation (``g . (a W) = (g W^T) . a``), so the down
projection's output is never kept.

The routing weight multiplies the activation, before the down projection: the same number as after it, without a pass
over the rows. The down bias is added per token as ``P b``, with ``P [T, E]`` the routing weights as a matrix.

Sources: the saving of activations follows arXiv 2211.15841 (MegaBlocks) and the dot-product form of the weight gradient
arXiv 2403.08245 (ScatterMoE).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import _library, glu, rows, tables
from moekit.ops._segments import expert_of_row, sum_by_index
from moekit.ops.gemm import DIFFERENTIABLE, PLAIN, Products, autocast, within
from moekit.routing import Routing

SAVES = ("recompute", "fp8", "all")


def experts(
    hidden_states: Tensor,
    routing: Routing | tuple[Tensor, Tensor],
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    alpha: float | None = None,
    linear_offset: float = 0.0,
    clamp: float | None = None,
    layout: str = "concatenated",
    transposed: bool = False,
    weight_after_down: bool = False,
    save: str = "recompute",
) -> Tensor:
    """The expert MLP of a Mixture-of-Experts layer.

    Args:
        hidden_states: ``[T, H]``; float64, float32, bfloat16 or float16.
        routing: a :class:`moekit.Routing` with weights, or ``(indices [T, K], weights [T, K])``. In the latter an index
            of -1, or of E and above, is a slot of no expert here (of another expert-parallel rank, say).
        gate_up: ``[E, 2I, H]``, or ``[E, H, 2I]`` with ``transposed``; ``I`` in the place of ``2I`` without a gate.
        down: ``[E, H, I]``, or ``[E, I, H]`` with ``transposed``.
        gate_up_bias: ``[E, 2I]``, or None; the clamp comes after it. A bias may be float32 whatever the rest is.
        down_bias: ``[E, H]``, or None; multiplied by the routing weight as the rest.
        activation: as in :func:`moekit.glu`, like ``alpha``, ``linear_offset``, ``clamp`` and ``layout``.
        alpha: the constant of ``quick_gelu``; None is 1.702.
        linear_offset: added to the up half.
        clamp: limits the gate from above and the up half on both sides.
        layout: ``concatenated`` or ``interleaved`` gate and up, or ``ungated``.
        transposed: the weights are stored ``[E, in, out]``.
        weight_after_down: multiply by the routing weight after the down projection instead of before.
        save: what to keep for backward. ``recompute``: the projection's output; ``fp8``: that in float8 e4m3 with a
            scale a row; ``all``: the gathered rows and the activation as well, for speed.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states`` (of autocast, where it is on). A token with no expert gets zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        TypeError: what is no tensor, or a tensor of codes: float8, integers, a sharded or quantised subclass.
        RuntimeError: a double backward, which this operator does not have.

    Gradients are computed only for what needs one, and nothing is kept for the others.
    """
    op = "experts"
    _library.announce_flops()
    clamps = {"clamp": clamp, "clamp_after_bias": True}
    spec = glu.make_glu(activation, alpha=alpha, linear_offset=linear_offset, layout=layout, op=op, **clamps)
    _check.one_of(op, "save", save, SAVES)
    hidden_states, gate_up, down, gate_up_bias, down_bias = autocast(hidden_states, gate_up, down, gate_up_bias, down_bias)
    _check_shapes(hidden_states, gate_up, down, gate_up_bias, down_bias, spec, transposed)
    routing = _as_routing(routing, gate_up.shape[0])
    _check.same_device(
        op,
        hidden_states=hidden_states,
        gate_up=gate_up,
        down=down,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        routing=routing.order,
    )
    if routing.num_tokens != hidden_states.shape[0]:
        wanted = f"of {hidden_states.shape[0]} tokens, as hidden_states"
        raise _check.fail(op, "routing", wanted, f"{routing.num_tokens} tokens")
    inputs = (hidden_states, routing.weights, gate_up, down, gate_up_bias, down_bias)
    if not _library.needs_grad(*inputs):
        save = "nothing"
    found = (routing.order, routing.inverse, routing.offsets)
    return _experts(*inputs, *found, *spec, transposed, weight_after_down, save)[0]


def _as_routing(routing: Routing | tuple[Tensor, Tensor], num_experts: int) -> Routing:
    if not isinstance(routing, Routing):
        if not isinstance(routing, (tuple, list)) or len(routing) != 2 or not _is_integer(routing[0]):
            raise _no_routing(routing)
        indices, weights = routing
        routing = Routing.from_topk(indices.masked_fill(indices >= num_experts, -1), weights, num_experts=num_experts)
    if routing.weights is None:
        raise _check.fail("experts", "routing", "built with weights", "none")
    if routing.num_experts != num_experts:
        raise _check.fail("experts", "routing", f"of the {num_experts} experts of gate_up", routing.num_experts)
    return routing


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)


def _no_routing(routing: Any) -> TypeError:
    """The error that says what was given in the place of a routing."""
    wanted, found = "a Routing or (indices [tokens, topk], weights [tokens, topk])", type(routing).__name__
    if isinstance(routing, (tuple, list)):
        kinds = [str(part.dtype) if isinstance(part, Tensor) else type(part).__name__ for part in routing]
        swapped = len(routing) == 2 and _is_integer(routing[1])
        if len(routing) == 2 and isinstance(routing[0], Tensor) and not swapped:
            return _check.wrong_type("experts", "indices", "an int32 or int64 tensor", kinds[0])
        wanted, found = wanted + ", in this order" * swapped, f"({', '.join(kinds)})"
    return _check.wrong_type("experts", "routing", wanted, found)


def _check_shapes(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    spec: glu.Glu,
    transposed: bool,
) -> None:
    op = "experts"
    for name, value, ndim in (("hidden_states", hidden_states, 2), ("gate_up", gate_up, 3), ("down", down, 3)):
        _check.computable(op, name, value)
        _check.tensor_dim(op, name, value, ndim)
    (num_experts, *sides), hidden = gate_up.shape, hidden_states.shape[1]
    width, inputs = reversed(sides) if transposed else sides
    if inputs != hidden:
        raise _check.fail(op, "gate_up", *_storage(gate_up, hidden, transposed, turned=width == hidden))
    if spec.layout == "ungated":
        inner = width
    elif width % 2:
        raise _check.fail(op, "gate_up", "of an even width (gate and up halves)", f"shape {list(gate_up.shape)}")
    else:
        inner = width // 2
    shape, legend = ((inner, hidden), "[experts, in, out]") if transposed else ((hidden, inner), "[experts, out, in]")
    _check.shape(op, "down", down, (num_experts, *shape), legend)
    for name, value in (("gate_up", gate_up), ("down", down)):
        if value.dtype is not hidden_states.dtype:
            raise _check.fail(op, name, f"of the dtype of hidden_states ({hidden_states.dtype})", value.dtype)
    for name, value, size in (("gate_up_bias", gate_up_bias, width), ("down_bias", down_bias, hidden)):
        if value is not None:
            _check.computable(op, name, value)
            _check.shape(op, name, value, (num_experts, size), "[experts, out]")
            if value.dtype not in (hidden_states.dtype, torch.float32):
                wanted = f"of the dtype of hidden_states ({hidden_states.dtype}) or float32"
                raise _check.fail(op, name, wanted, value.dtype)


def _storage(gate_up: Tensor, hidden: int, transposed: bool, *, turned: bool) -> tuple[str, str]:
    """What was wanted of ``gate_up`` and what came; ``turned``: it would fit if it were stored the other way round."""
    order, other = ("in, out", "out, in") if transposed else ("out, in", "in, out")
    hint = f"; if it is stored [experts, {other}], pass transposed={not transposed}" if turned else ""
    return f"of shape [experts, {order}] with {hidden} inputs", f"shape {list(gate_up.shape)}{hint}"


# --- the operators ------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    """The last arguments of the operators."""

    spec: glu.Glu
    transposed: bool
    weight_after_down: bool
    save: str

    @staticmethod
    def of(constants: tuple) -> _Options:
        return _Options(glu.Glu(*constants[:7]), *constants[7:])

    def matrices(self, weight: Tensor) -> Tensor:
        """The stored weights as ``[E, in, out]``."""
        return weight if self.transposed else weight.mT

    def stored(self, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of a weight's gradient, in the order in which the weight is stored."""
        return (inputs, outputs) if self.transposed else (outputs, inputs)


class _Rows(NamedTuple):
    """The routing of one call in row order."""

    tables: tuple[Tensor, Tensor, Tensor]
    weights: Tensor
    offsets: Tensor
    inverse: Tensor

    @staticmethod
    def of(weights: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor) -> _Rows:
        _check.tensor_dim("experts", "inverse", inverse, 2)
        _check.rows_end("experts", order, offsets)
        found = (*tables.row_tables(order, *inverse.shape), inverse.reshape(-1))
        return _Rows(found, tables.take(weights, order), within(offsets, len(order)), inverse)

    def slots(self) -> Tensor:
        """Where each row's weight stands in a flat ``[T, E]`` matrix, -1 for none."""
        token = self.tables[0]
        return tables.row_slots(token, expert_of_row(self.offsets, token.shape[0]), self.offsets.shape[0])

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The routing weights as a matrix ``[T, E]``, added in ``dtype``."""
        num_tokens, num_experts = self.inverse.shape[0], self.offsets.shape[0]
        return sum_by_index(self.weights.to(dtype), self.slots(), num_tokens * num_experts).view(num_tokens, num_experts)


def _experts_reference(
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    *constants: Any,
    products: Products = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(out, projected, scale, gathered, activation)``: the output and what is kept, empty where it is not."""
    options = _Options.of(constants)
    routed = _Rows.of(weights, order, inverse, offsets)
    offsets = routed.offsets
    gathered = rows.move_rows(x, *routed.tables)
    projected = products.rows(gathered, options.matrices(gate_up), offsets)
    before = None if options.weight_after_down else routed.weights
    scale = x.new_empty(0)
    if options.save == "fp8":
        act, projected, scale = glu.forward_fp8(projected, before, gate_up_bias, offsets, *options.spec)
    else:
        act = glu.forward(projected, before, gate_up_bias, offsets, *options.spec)
    keep_all = options.save == "all"
    result = products.rows(act, options.matrices(down), offsets, out=None if keep_all else gathered)
    after = routed.weights if options.weight_after_down else None
    out = rows.sum_rows(result, after, *routed.tables)
    if down_bias is not None:
        wide = torch.promote_types(torch.promote_types(weights.dtype, down_bias.dtype), torch.float32)
        bias = routed.matrix(wide) @ down_bias.to(wide)
        out = (out + bias).to(x.dtype)
    return (
        out,
        x.new_empty(0) if options.save == "nothing" else projected,
        scale,
        gathered if keep_all else x.new_empty(0),
        act if keep_all and not options.weight_after_down else x.new_empty(0),
    )


def _experts_fake(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    order, options = others[2], _Options.of(others[5:])
    num_rows, width = order.shape[0], gate_up.shape[2 if options.transposed else 1]
    inner = width if options.spec.layout == "ungated" else width // 2
    keep_all, fp8 = options.save == "all", options.save == "fp8"
    projected = x.new_empty(num_rows, width, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if options.save == "nothing" else projected,
        x.new_empty(num_rows, dtype=torch.promote_types(x.dtype, torch.float32)) if fp8 else x.new_empty(0),
        x.new_empty(num_rows, x.shape[1]) if keep_all else x.new_empty(0),
        x.new_empty(num_rows, inner) if keep_all and not options.weight_after_down else x.new_empty(0),
    )


def _backward_reference(
    grad: Tensor,
    x: Tensor | None,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    projected: Tensor,
    scale: Tensor,
    kept_rows: Tensor,
    kept_act: Tensor,
    *constants: Any,
    products: Products = PLAIN,
) -> tuple:
    """Gradients of x, weights, gate_up, down and the biases; those that ``wanted`` (the last) leaves out are empty."""
    options, wanted = _Options.of(constants[:-1]), _Wanted(*constants[-1])
    if projected.numel() and projected.shape[0] != order.shape[0]:
        raise _check.fail("experts_backward", "order", f"of {projected.shape[0]} rows, as projected", list(order.shape))
    routed = _Rows.of(weights, order, inverse, offsets)
    offsets = routed.offsets
    result = _Wanted(*(grad.new_empty(0) for _ in range(6)))
    g = rows.move_rows(grad, *routed.tables)
    d_projected, d_weights, d_bias, act = _gate_backward(
        g, down, gate_up_bias, (projected, scale, kept_act), routed, options, wanted, products
    )
    # What is of row size goes as soon as it has served: one [R, H] and one [R, 2I] at a time.
    if wanted.down:
        result = result._replace(down=products.outer(*options.stored(act, g), offsets))
    del act
    if wanted.x:
        moved = products.rows(d_projected, options.matrices(gate_up).mT, offsets, out=g)
        result = result._replace(x=rows.sum_rows(moved, None, *routed.tables))
        del moved
    del g
    if wanted.gate_up:
        gathered = kept_rows if kept_rows.numel() or x is None else rows.move_rows(x, *routed.tables)
        result = result._replace(gate_up=products.outer(*options.stored(gathered, d_projected), offsets))
    if wanted.gate_up_bias:
        result = result._replace(gate_up_bias=d_bias)
    if wanted.weights:
        result = result._replace(weights=tables.take(d_weights, inverse))
    return tuple(_down_bias_backward(result, grad, weights, down_bias, routed, wanted))


class _Wanted(NamedTuple):
    """One entry for each input with a gradient: whether it is wanted, or the gradient itself."""

    x: Any
    weights: Any
    gate_up: Any
    down: Any
    gate_up_bias: Any
    down_bias: Any


def _gate_backward(
    g: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    kept: tuple[Tensor, Tensor, Tensor],
    routed: _Rows,
    options: _Options,
    wanted: _Wanted,
    products: Products,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back through the gate: gradients of the projection, weights and bias, and the activation."""
    projected, scale, act = kept
    scale = scale if scale.numel() else None
    masks = [bool(wanted.x or wanted.gate_up), wanted.weights, wanted.gate_up_bias, wanted.down and not act.numel()]
    if not any(masks):
        return act, act, act, act
    d_act = products.rows(g, options.matrices(down).mT, routed.offsets)
    d_projected, d_weights, d_bias, again = glu.backward(
        d_act, projected, scale, routed.weights, gate_up_bias, routed.offsets, *options.spec, masks
    )
    return d_projected, d_weights, d_bias, again if masks[3] else act


def _down_bias_backward(
    result: _Wanted, grad: Tensor, weights: Tensor, down_bias: Tensor | None, routed: _Rows, wanted: _Wanted
) -> _Wanted:
    if down_bias is None:
        return result
    wide = torch.promote_types(grad.dtype, torch.float32)
    if wanted.down_bias:
        result = result._replace(down_bias=(routed.matrix(wide).mT @ grad.to(wide)).to(down_bias.dtype))
    if wanted.weights:
        along = grad.to(wide) @ down_bias.to(wide).mT  # [T, E]
        of_slot = tables.take(tables.take(along, routed.slots()), routed.inverse)
        result = result._replace(weights=(result.weights + of_slot).to(weights.dtype))
    return result


def _backward_fake(grad: Tensor, x: Any, *args: Any) -> tuple:
    wanted = args[-1]
    shapes = (grad, *args[:5])
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if want else grad.new_empty(0)
        for t, want in zip(shapes, wanted, strict=True)
    )


def _save(ctx: Any, args: tuple, outputs: tuple) -> None:
    x, weights, gate_up, down, gate_up_bias, down_bias, *found = args[:9]
    _, need_weights, need_gate_up, need_down, need_gate_up_bias, _ = needs = ctx.needs_input_grad[1:7]
    inner = needs[0] or need_weights or need_gate_up or need_down or need_gate_up_bias
    gathered = outputs[3].numel() > 0
    kept = outputs[1:] if inner else [t.new_empty(0) for t in outputs[1:]]
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)  # or autograd fills zeros of the size of what is kept, for gradients that nobody reads
    ctx.constants = args[9:]
    # x serves the gradient of gate_up; where its own is wanted, a gradient of that gradient is noticed by it, and refused.
    ctx.save_for_backward(
        x if needs[0] or (need_gate_up and not gathered) else None,
        weights,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        *found,
        *kept,
    )


def _backward(ctx: Any, needs: tuple, grad: Tensor, *_: Any) -> tuple:
    saved = ctx.saved_tensors
    wanted = list(needs[:6])
    grads = _experts_backward(grad, *saved, *ctx.constants, wanted)
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *[None] * (len(needs) - 6))


def _save_backward(ctx: Any, args: tuple, outputs: Any) -> None:
    """Nothing: there is no double backward."""


def _double_backward(ctx: Any, needs: tuple, *grads: Tensor) -> tuple:
    raise RuntimeError(
        "moekit.experts: double backward does not exist for this operator; compose moekit.permute, matrix products, "
        "moekit.glu and moekit.unpermute on the 'torch' backend, which has it"
    )


def _experts_composed(*args: Any) -> tuple:
    """The reference on operators that forward mode knows. What it keeps it keeps exactly: float8 has no tangent."""
    *others, save = args
    return _experts_reference(*others, "recompute" if save == "fp8" else save, products=DIFFERENTIABLE)


def _flops(*args: Any, **_: Any) -> int:
    """Of the two products; a row of no expert counts as any other."""
    gate_up, down, order = args[2], args[3], args[6]
    return 2 * order[0] * (math.prod(gate_up[1:]) + math.prod(down[1:]))


def _backward_flops(*args: Any, **_: Any) -> int:
    """Of the products that the wanted gradients take."""
    gate_up, down, order, wanted = args[3], args[4], args[7], args[-1]
    through_down = any(wanted[:3]) or wanted[4]
    into_gate_up = wanted[0] + wanted[2]
    return 2 * order[0] * (into_gate_up * math.prod(gate_up[1:]) + (through_down + wanted[3]) * math.prod(down[1:]))


_INPUTS = "Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias"
_TABLES = "Tensor order, Tensor inverse, Tensor offsets"
_KEPT = "Tensor projected, Tensor scale, Tensor kept_rows, Tensor kept_act"
_CONSTANTS = f"{glu.CONSTANTS}, bool transposed, bool weight_after_down, str save"

_experts = _library.define(
    f"experts(Tensor x, {_INPUTS}, {_TABLES}, {_CONSTANTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_experts_reference,
    fake=_experts_fake,
    save=_save,
    backward=_backward,
    composed=_experts_composed,
    flops=_flops,
)
_experts_backward = _library.define(
    f"experts_backward(Tensor grad, Tensor? x, {_INPUTS}, {_TABLES}, {_KEPT}, {_CONSTANTS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    save=_save_backward,
    backward=_double_backward,
    composed=functools.partial(_backward_reference, products=DIFFERENTIABLE),
    flops=_backward_flops,
)
