"""The operator ``moekit::experts_backward``: the gradients of the expert MLP.

Rows of tokens and of their gradients are fetched by the products that need them, which bring them together only where they
cannot do otherwise, and the activation is computed again by the backward of the gate. The gradient of a routing weight is a
dot product over the activation (``g . (a W) = (g W^T) . a``), so the down projection's output is never needed. What is of
row size goes as soon as it has served, what the forward kept included, where it is nobody else's: beside the gradients of
the weights no more exists at a time than one ``[R, H]``, one ``[R, 2I]`` and one ``[R, I]``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import _library, glu, rows, tables
from moekit.ops.experts_parts import ARGUMENTS, CONSTANTS, NUM_ARGUMENTS, Arguments, Options, Rows, Wanted
from moekit.ops.gathered import Gathered
from moekit.ops.products import DIFFERENTIABLE, Products
from moekit.ops.projection import Projection

_KEPT = ("projected", "scale", "kept_rows", "kept_act", "low")


def _reference(grad: Tensor, *args: Any, products: Products | None = None) -> tuple:
    """Gradients as :class:`Wanted` has them (the last argument says which); those that it leaves out are empty."""
    given, kept = Arguments(*args[:NUM_ARGUMENTS]), list(args[NUM_ARGUMENTS : NUM_ARGUMENTS + len(_KEPT)])
    return gradients(grad, given, kept, args[NUM_ARGUMENTS + len(_KEPT) : -1], args[-1], products)


def gradients(
    grad: Tensor,
    given: Arguments,
    kept: list[Tensor],
    constants: tuple,
    wanted: list[bool],
    products: Products | None = None,
) -> tuple:
    """What the operator computes. ``kept`` is emptied: its tensors go when they have served, if nobody else has them."""
    options, want = Options.of(constants), Wanted(*wanted)
    projected, scale, kept_rows, act, low = kept
    kept.clear()
    if projected.numel() and projected.shape[0] != given.order.shape[0]:
        rows_wanted = f"of {projected.shape[0]} rows, as projected"
        raise _check.fail("experts_backward", "order", rows_wanted, list(given.order.shape))
    products = products or options.products()
    routed = Rows.of(given, products)
    if given.down_bias is not None and want.weights:  # whose gradient has two parts: only their sum is rounded
        routed = routed._replace(weights=routed.weights.to(torch.promote_types(grad.dtype, torch.float32)))
    offsets = routed.offsets
    gate_up, down = options.projections(given, products)
    result = Wanted(*(grad.new_empty(0) for _ in want))
    g = Gathered(grad, routed.tables)
    if down.A is not None:  # which need it three times
        g = g.together()
    high_down = down.raised(g, offsets) if want.before_gate else None
    d_projected, d_weights, d_bias, act = _through_gate(
        g, high_down, down, given, (projected, scale, act), routed, options, want
    )
    del projected, scale
    high = gate_up.raised(d_projected, offsets) if want.projected else None
    if want.x:
        moved = gate_up.backward(d_projected, offsets, high)
        result = result._replace(x=rows.sum_rows(moved, None, *routed.tables))
        del moved
    result = _of_gate_up(result, want, gate_up, options, given, routed, kept_rows, d_projected, low, high)
    del kept_rows, d_projected, low, high
    result = _of_down(result, want, down, options, g, act, high_down, offsets)
    if want.gate_up_bias:
        result = result._replace(gate_up_bias=d_bias)
    if want.weights:
        result = result._replace(weights=tables.take(d_weights, given.inverse))
    return tuple(_of_down_bias(result, want, grad, given, routed, products))


def _through_gate(
    g: Tensor | Gathered,
    high: Tensor | None,
    down: Projection,
    given: Arguments,
    kept: tuple[Tensor, Tensor, Tensor],
    routed: Rows,
    options: Options,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back through the gate: gradients of the projection, weights and bias, and the activation."""
    projected, scale, act = kept
    scale = scale if scale.numel() else None
    masks = [wanted.projected, wanted.weights, wanted.gate_up_bias, wanted.act and not act.numel()]
    if not any(masks):
        return act, act, act, act
    d_act = down.backward(g, routed.offsets, high)
    d_projected, d_weights, d_bias, again = glu.backward(
        d_act, projected, scale, routed.weights, given.gate_up_bias, routed.offsets, *options.spec, masks
    )
    return d_projected, d_weights, d_bias, again if masks[3] else act


def _of_down(
    result: Wanted,
    wanted: Wanted,
    down: Projection,
    options: Options,
    g: Tensor | Gathered,
    act: Tensor,
    high: Tensor | None,
    offsets: Tensor,
) -> Wanted:
    """The gradients of the down projection's weight and factors."""
    outer = down.products.outer
    if wanted.down:
        result = result._replace(down=outer(*options.stored(act, g), offsets))
    if wanted.down_a and high is not None:
        result = result._replace(down_a=down.gradient_of_a(act, high, offsets))
    if wanted.down_b:
        low = down.lower(act, offsets)
        result = result._replace(down_b=outer(g, low, offsets))
    return result


def _of_gate_up(
    result: Wanted,
    wanted: Wanted,
    gate_up: Projection,
    options: Options,
    given: Arguments,
    routed: Rows,
    kept_rows: Tensor,
    d_projected: Tensor,
    low: Tensor,
    high: Tensor | None,
) -> Wanted:
    """The gradients of the gate/up projection's weight and factors."""
    outer, offsets = gate_up.products.outer, routed.offsets
    if wanted.gate_up_b:
        result = result._replace(gate_up_b=outer(d_projected, low, offsets))
    if not (wanted.gate_up or wanted.gate_up_a):
        return result
    gathered = kept_rows if kept_rows.numel() or given.x is None else Gathered(given.x, routed.tables)
    if wanted.gate_up:
        result = result._replace(gate_up=outer(*options.stored(gathered, d_projected), offsets))
    if wanted.gate_up_a and high is not None:
        result = result._replace(gate_up_a=gate_up.gradient_of_a(gathered, high, offsets))
    return result


def _of_down_bias(
    result: Wanted, wanted: Wanted, grad: Tensor, given: Arguments, routed: Rows, products: Products
) -> Wanted:
    """The gradient of the down bias, and what it adds to that of the routing weights."""
    bias = given.down_bias
    if bias is None:
        return result
    wide = torch.promote_types(grad.dtype, torch.float32)
    if wanted.down_bias:
        result = result._replace(down_bias=(routed.matrix(wide).mT @ grad.to(wide)).to(bias.dtype))
    if wanted.weights:
        along = products.dense(grad.to(wide), bias.to(wide).mT)  # [T, E]
        of_slot = tables.take(tables.take(along, routed.slots()), routed.inverse)
        result = result._replace(weights=(result.weights + of_slot).to(given.weights.dtype))
    return result


def _fake(grad: Tensor, *args: Any) -> tuple:
    wanted = args[-1]
    shapes = (grad, *args[1 : len(wanted)])
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if want else grad.new_empty(0)
        for t, want in zip(shapes, wanted, strict=True)
    )


def _save(ctx: Any, args: tuple, outputs: Any) -> None:
    """Nothing: there is no double backward."""


def _double_backward(ctx: Any, needs: tuple, *grads: Tensor) -> tuple:
    raise RuntimeError(
        "moekit.experts: double backward does not exist for this operator; compose moekit.permute, matrix products, "
        "moekit.glu and moekit.unpermute on the 'torch' backend, which has it"
    )


def _flops(grad: Any, *args: Any, **_: Any) -> int:
    """Of the products that the wanted gradients take."""
    given, wanted = Arguments(*args[:NUM_ARGUMENTS]), Wanted(*args[-1])
    options = Options.of(args[NUM_ARGUMENTS + len(_KEPT) : -1])
    gate_up, down = (math.prod(shape[1:]) for shape in options.shapes(given))
    a, b, down_a, down_b = (0 if shape is None else math.prod(shape[1:]) for shape in given.factors())
    through_down = wanted.before_gate
    total = (through_down + wanted.down) * down + (wanted.x + wanted.gate_up) * gate_up
    total += down_b * (1 + wanted.down_b) + down_a * (through_down + wanted.down_a + wanted.down_b)
    total += b * (wanted.projected + wanted.gate_up_b) + a * (wanted.x + wanted.gate_up_a)
    return 2 * given.order[0] * total


operator = _library.define(
    f"experts_backward(Tensor grad, {ARGUMENTS.replace('Tensor x', 'Tensor? x', 1)}, "
    f"{', '.join(f'Tensor {name}' for name in _KEPT)}, {CONSTANTS}, bool[] wanted)"
    f" -> ({', '.join(['Tensor'] * len(Wanted._fields))})",
    reference=_reference,
    fake=_fake,
    save=_save,
    backward=_double_backward,
    composed=functools.partial(_reference, products=DIFFERENTIABLE),
    flops=_flops,
)
