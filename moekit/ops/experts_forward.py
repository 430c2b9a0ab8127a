"""The operator ``moekit::experts``: the forward of the expert MLP.

The routing weight multiplies the activation, before the down projection: the same number as after it, without a pass
over the rows. The down bias is added per token as ``P b``, with ``P [T, E]`` the routing weights as a matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moekit import _backend
from moekit.ops import _library, glu, rows
from moekit.ops.experts_backward import gradients
from moekit.ops.experts_backward import operator as experts_backward
from moekit.ops.experts_parts import ARGUMENTS, CONSTANTS, NUM_ARGUMENTS, Arguments, Options, Rows, Wanted
from moekit.ops.products import DIFFERENTIABLE, Products
from moekit.ops.projection import Projection

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _reference(*args: Any, products: Products | None = None) -> Outputs:
    """``(out, projected, scale, gathered, activation, low)``: the output and what is kept, empty where it is not."""
    given, options = Arguments(*args[:NUM_ARGUMENTS]), Options.of(args[NUM_ARGUMENTS:])
    products = products or options.products()
    out, *kept = forward(given, options, Rows.of(given, products), *options.projections(given, products))
    none = (given.x.new_empty(0) if one is None else one for one in kept)
    return (out, *none)  # type: ignore[return-value]


def forward(given: Arguments, options: Options, routed: Rows, gate_up: Projection, down: Projection) -> tuple[Any, ...]:
    """The same with None for what is not kept; of the tables among the arguments none is looked at."""
    x, offsets, products = given.x, routed.offsets, down.products
    before = None if options.weight_after_down else routed.weights
    keep_all, scale, low, gathered = options.save == "all", None, None, None
    fused = None if products is DIFFERENTIABLE else _in_one(x, routed, before, given.gate_up_bias, gate_up, options)
    if fused is not None:
        projected, act = fused
    else:
        gathered = rows.move_rows(x, *routed.tables)
        projected, low = gate_up.forward(gathered, offsets)
        gathered = gathered if keep_all else None
        gate = (before, given.gate_up_bias, offsets, *options.spec)
        if options.save == "fp8":
            act, projected, scale = glu.forward_fp8(projected, *gate)
        else:
            act = glu.forward(projected, *gate)
    if options.save == "nothing":  # what is of row size goes as soon as it has served
        projected = low = None
    result = down.forward(act, offsets)[0]
    act = act if keep_all and not options.weight_after_down else None
    out = products.unpermute(result, routed.weights if options.weight_after_down else None, *routed.tables)
    del result
    if given.down_bias is not None:
        out = _with_down_bias(out, given, routed, products)
    return out, projected, scale, gathered, act, low


def _in_one(
    x: Tensor, routed: Rows, weights: Tensor | None, bias: Tensor | None, gate_up: Projection, options: Options
) -> tuple[Tensor, Tensor] | None:
    """The projection, if it is kept, and the activation, where a kernel fetches rows, multiplies and applies the gate."""
    kernel = _backend.kernel("gathered_glu", x)
    plain = options.save in ("nothing", "recompute") and not options.gate_up_format and gate_up.A is None
    if kernel is None or not plain:
        return None
    choices = (options.save == "recompute", options.batch_invariant, *options.spec)
    found = kernel(x, routed.tables[0], gate_up.weight, routed.offsets, weights, bias, *choices)
    return None if found is NotImplemented else found


def _with_down_bias(out: Tensor, given: Arguments, routed: Rows, products: Products) -> Tensor:
    bias: Any = given.down_bias
    wide = torch.promote_types(torch.promote_types(given.weights.dtype, bias.dtype), torch.float32)
    return (out + products.dense(routed.matrix(wide), bias.to(wide))).to(out.dtype)


def _fake(*args: Any) -> Outputs:
    given, options = Arguments(*args[:NUM_ARGUMENTS]), Options.of(args[NUM_ARGUMENTS:])
    x, num_rows, width = given.x, given.order.shape[0], options.width(given)
    inner = width if options.spec.layout == "ungated" else width // 2
    keep_all, fp8, kept = options.save == "all", options.save == "fp8", options.save != "nothing"
    projected = x.new_empty(num_rows, width, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    return (
        x.new_empty(x.shape),
        projected if kept else x.new_empty(0),
        x.new_empty(num_rows, dtype=torch.promote_types(x.dtype, torch.float32)) if fp8 else x.new_empty(0),
        x.new_empty(num_rows, x.shape[1]) if keep_all else x.new_empty(0),
        x.new_empty(num_rows, inner) if keep_all and not options.weight_after_down else x.new_empty(0),
        x.new_empty(num_rows, given.gate_up_a.shape[1]) if kept and given.gate_up_a is not None else x.new_empty(0),
    )


def _save(ctx: Any, args: tuple, outputs: tuple) -> None:
    given, constants = Arguments(*args[:NUM_ARGUMENTS]), args[NUM_ARGUMENTS:]
    wanted = Wanted(*ctx.needs_input_grad[1 : 1 + len(Wanted._fields)])
    kept = outputs[1:] if wanted.before_gate else [t.new_empty(0) for t in outputs[1:]]
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)  # or autograd fills zeros of the size of what is kept, for gradients that nobody reads
    # x serves the gradients of gate_up; where its own is wanted, a gradient of that gradient is noticed by it, and refused.
    gathers = (wanted.gate_up or wanted.gate_up_a) and not outputs[3].numel()
    # What is packed is the module's own: it is not kept, but referred to.
    ctx.packed, ctx.constants = Options.of(constants).packed(given), constants
    ctx.versions = _library.versions(ctx.packed.values())
    saved = given._replace(x=given.x if wanted.x or gathers else None, **dict.fromkeys(ctx.packed))
    # What is kept is nobody else's, so the backward may let go of it before its end: unless hooks take care of it.
    ctx.kept = list(kept) if _library.owns_what_it_saves() else []
    ctx.save_for_backward(*saved, *([] if ctx.kept else kept))


def _backward(ctx: Any, needs: tuple, grad: Tensor, *_: Any) -> tuple:
    saved = list(ctx.saved_tensors)
    if _library.versions(ctx.packed.values()) != ctx.versions:
        raise RuntimeError("moekit.experts: packed weights were changed after a forward, whose backward needs them")
    given, kept = Arguments(*saved[:NUM_ARGUMENTS])._replace(**ctx.packed), ctx.kept or saved[NUM_ARGUMENTS:]
    del saved
    wanted = list(needs[: len(Wanted._fields)])
    plainly = _library.runs_plainly(grad) and not _library.negated(grad, *given)
    if not plainly or torch.is_grad_enabled():  # the latter for a backward of the backward
        grads = experts_backward(grad, *given, *kept, *ctx.constants, wanted)
    else:
        grads = gradients(grad, given, list(kept) if _library.goes_again() else kept, ctx.constants, wanted)
    found = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return (*found, *[None] * (len(needs) - len(wanted)))


def _composed(*args: Any) -> Outputs:
    """The reference on operators that forward mode knows. What it keeps it keeps exactly: float8 has no tangent."""
    options = Options.of(args[NUM_ARGUMENTS:])
    options = options._replace(save="recompute" if options.save == "fp8" else options.save)
    return _reference(*args[:NUM_ARGUMENTS], *options.constants(), products=DIFFERENTIABLE)


def _flops(*args: Any, **_: Any) -> int:
    """Of the products; a row of no expert counts as any other."""
    given, options = Arguments(*args[:NUM_ARGUMENTS]), Options.of(args[NUM_ARGUMENTS:])
    matrices = [*options.shapes(given), *filter(None, given.factors())]
    num_rows: Any = given.order[0]
    return 2 * num_rows * sum(math.prod(shape[1:]) for shape in matrices)


operator = _library.define(
    f"experts({ARGUMENTS}, {CONSTANTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    save=_save,
    backward=_backward,
    composed=_composed,
    flops=_flops,
)
