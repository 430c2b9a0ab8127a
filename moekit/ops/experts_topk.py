"""The operator ``moekit::experts_topk``: the expert MLP from a router's choice, where nothing needs a gradient.

Few tokens, as in decoding, need no routing tables: a kernel goes from choice to choice. Otherwise the tables are made here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from moekit import _backend, _check
from moekit.ops import _library, glu, tables
from moekit.ops.experts_forward import operator as experts
from moekit.ops.experts_parts import Options
from moekit.ops.lora import NONE

KERNEL = "experts_by_slot"
_DENSE = ("", "", [0, 0, 0, 0], False, False)


class _Arguments(NamedTuple):
    x: Tensor
    indices: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


_NUM = len(_Arguments._fields)


def _reference(*args: Any) -> Tensor:
    """``[T, H]``; the arguments are those of :func:`moekit.experts` that go without a gradient, weights dense."""
    given, spec, (transposed, weight_after_down) = _Arguments(*args[:_NUM]), args[_NUM:-2], args[-2:]
    _check.tensor_dim("experts", "indices", given.indices, 2)
    kernel = _backend.kernel(KERNEL, given.x)
    if kernel is not None:
        weights = (weight if transposed else weight.mT for weight in (given.gate_up, given.down))
        out = kernel(*given[:3], *weights, *given[5:], *spec, weight_after_down)
        if out is not NotImplemented:
            return out
    indices, num_experts = given.indices, given.gate_up.shape[0]
    if indices.shape[0] != given.x.shape[0]:
        raise _check.fail("experts", "indices", f"of {given.x.shape[0]} tokens, as x", f"shape {list(indices.shape)}")
    _check.shape("experts", "weights", given.weights, indices.shape, "[tokens, topk]")
    if not indices.is_cuda or _backend.debugging():  # where values are looked at: no expert here is none to be refused
        indices = indices.masked_fill(indices >= num_experts, -1)
    _, offsets, order, inverse = tables.route_indices(indices, num_experts)
    factors, scales, seeds = (None,) * 4, (None,) * 6, None
    inputs = (given.x, *given[2:], *factors, order, inverse, offsets, *scales, seeds)
    options = Options(
        glu.Glu(*spec), transposed, *_DENSE, NONE.numbers, NONE.numbers, weight_after_down, "nothing", batch_invariant=False
    )
    return experts(*inputs, *options.constants())[0]


def _fake(*args: Any) -> Tensor:
    return args[0].new_empty(args[0].shape)


def _flops(*args: Any, **_: Any) -> int:
    """Of the products; a slot of no expert counts as any other."""
    given = _Arguments(*args[:_NUM])
    shapes: Any = given.indices, given.gate_up[1:], given.down[1:]
    return 2 * math.prod(shapes[0]) * sum(map(math.prod, shapes[1:]))


operator = _library.define(
    "experts_topk(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    f"Tensor? down_bias, {glu.CONSTANTS}, bool transposed, bool weight_after_down) -> Tensor",
    reference=_reference,
    fake=_fake,
    flops=_flops,
    kernels=False,
)
