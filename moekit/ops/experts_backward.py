"""The operator ``moekit::experts_backward``: the gradients of the expert MLP.

Rows of tokens and of their gradients are fetched by the products that need them, which bring them together only where they
cannot do otherwise; two products may share a copy of the gradients'. The activation is computed again by the backward of the
gate, and the gradient of a routing weight is a dot product over it, which never needs the output of the down projection:
``g . (a W) = (g W^T) . a``. What is of row size goes as soon as it has served, what the forward kept included, where it is
nobody else's.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import _library, glu, tables
from moekit.ops.experts_parts import ARGUMENTS, CONSTANTS, NUM_ARGUMENTS, Arguments, Options, Rows, Wanted
from moekit.ops.gathered import Gathered
from moekit.ops.gemm import looped
from moekit.ops.products import DIFFERENTIABLE, Products
from moekit.ops.projection import Projection

_SHORT = 512  # features of the activation, which products fetch the gradient's rows for in less time than copying them takes
_WIDE, _MANY = 2048, 2048  # columns and rows an expert from and up to which kernels bring rows together in halves
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
    g = _rows_of(grad, given, routed, down, want, alone=not (kept_rows.numel() or act.numel()))
    high_down = down.raised(g, offsets) if want.before_gate else None
    d_projected, d_weights, d_bias, act = _through_gate(
        g, high_down, down, given, (projected, scale, act), routed, options, want
    )
    del projected, scale
    factors, together = [g, act, high_down], isinstance(g, Tensor)
    del g, act, high_down  # so that they go with the list
    if together:  # rows that go before as many are needed again
        result = _of_down(result, want, down, options, factors, offsets)
    high = gate_up.raised(d_projected, offsets) if want.projected else None
    if want.x:
        moved = gate_up.backward(d_projected, offsets, high)
        result = result._replace(x=products.unpermute(moved, None, *routed.tables))
        del moved
    result = _of_gate_up(result, want, gate_up, options, given, routed, kept_rows, d_projected, low, high)
    del kept_rows, d_projected, low, high
    if not together:
        result = _of_down(result, want, down, options, factors, offsets)
    if want.gate_up_bias:
        result = result._replace(gate_up_bias=d_bias)
    if want.weights:
        result = result._replace(weights=tables.take(d_weights, given.inverse))
    return tuple(_of_down_bias(result, want, grad, given, routed, products))


def _rows_of(grad: Tensor, given: Arguments, routed: Rows, down: Projection, wanted: Wanted, *, alone: bool) -> Any:
    """The rows of the output's gradient, brought together where several products share them.

    ``alone``: nothing but the projection is kept from the forward.
    """
    g = Gathered(grad, routed.tables)
    if down.A is not None:  # three products
        return g.together()
    if looped(grad) or not (alone and wanted.down and wanted.before_gate):
        return g
    num_rows, (num_tokens, hidden), (num_experts, *_) = len(g.index), grad.shape, given.down.shape
    inner = given.down.numel() // max(num_experts * hidden, 1)
    return g.together() if shares_rows(num_tokens, num_rows, num_experts, hidden, inner) else g


def shares_rows(num_tokens: int, num_rows: int, num_experts: int, hidden: int, inner: int) -> bool:
    """Whether one copy of the gradient's rows serves both products that need it, which is faster if rows are not short.

    A copy lies beside what the gate's backward takes and makes, ``[R, 5I]``; and as it goes before rows of x are brought
    together, the gradient of down is there beside gate_up's, and the activation is not. That may take what has been won by
    bringing half of those rows together at a time, and no more: a peak without either is where gate_up's gradient, that of
    x, ``[R, 3I]`` and all rows of x are.
    """
    of_down, halved = num_experts * inner * hidden, hidden >= _WIDE and num_rows <= _MANY * num_experts
    beside_gate = 2 * num_rows * inner <= 2 * of_down + num_tokens * hidden
    beside_gate_up = of_down <= num_rows * (inner + (hidden // 2 if halved else 0))
    return inner > _SHORT and beside_gate and beside_gate_up


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
    backward = glu.backward if down.products is DIFFERENTIABLE else glu.backward_over
    d_projected, d_weights, d_bias, again = backward(
        d_act, projected, scale, routed.weights, given.gate_up_bias, routed.offsets, *options.spec, masks
    )
    return d_projected, d_weights, d_bias, again if masks[3] else act


def _of_down(
    result: Wanted,
    wanted: Wanted,
    down: Projection,
    options: Options,
    factors: list[Any],
    offsets: Tensor,
) -> Wanted:
    """The gradients of the down projection's weight and factors, from rows which go with the list that is emptied."""
    outer, (g, act, high) = down.products.outer, factors
    factors.clear()
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
