"""The operator ``moekit::experts_topk``: the expert MLP from a router's choice, where nothing needs a gradient.

Few tokens, as in decoding, need no routing tables: a kernel goes from choice to choice. Otherwise the tables are made here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from moekit import _backend, _check
from moekit.ops import _library, glu
from moekit.ops.experts_forward import forward
from moekit.ops.experts_parts import SCALES, STORAGE, WEIGHTS, Arguments, Options, Rows, Wanted
from moekit.ops.lora import NONE

KERNEL = "experts_by_slot"


class _Choice(NamedTuple):
    """The tensors that the operator takes, of which those after the indices are as the experts have them."""

    x: Tensor
    indices: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate_up_scale: Tensor | None
    gate_up_nested: Tensor | None
    gate_up_offset: Tensor | None
    down_scale: Tensor | None
    down_nested: Tensor | None
    down_offset: Tensor | None

    def arguments(self) -> Arguments:
        """As those of the experts, without tables."""
        return Arguments._make((self.x, *self[2:7], *_NO_FACTORS, *_NO_TABLES, *self[7:], None))


_NUM = len(_Choice._fields)
_NO_FACTORS, _NO_TABLES = (None,) * 4, (None,) * 3


def _options(constants: tuple) -> Options:
    return Options.of((*constants[:-1], NONE.numbers, NONE.numbers, constants[-1], "nothing", False))


def _reference(*args: Any) -> Tensor:
    """``[T, H]``; the arguments are those of :func:`moekit.experts` that go without a gradient."""
    given, options = _Choice(*args[:_NUM]), _options(args[_NUM:])
    named, indices, num_experts = given.arguments(), given.indices, given.gate_up.shape[0]
    if _library.needs_grad(*named[: len(Wanted._fields)]):
        raise RuntimeError("moekit::experts_topk has no gradient: moekit.experts calls it where nothing needs one")
    _check.tensor_dim("experts", "indices", indices, 2)
    gate_up, down = options.projections(named, options.products())
    kernel = _backend.kernel(KERNEL, given.x)
    if kernel is not None and not any(options.turned):
        weights = (gate_up.weight, down.weight)
        out = kernel(*given[:3], *weights, *given[5:7], *options.spec, options.weight_after_down)
        if out is not NotImplemented:
            return out
    if indices.shape[0] != given.x.shape[0]:
        raise _check.fail("experts", "indices", f"of {given.x.shape[0]} tokens, as x", f"shape {list(indices.shape)}")
    _check.shape("experts", "weights", given.weights, indices.shape, "[tokens, topk]")
    if not indices.is_cuda or _backend.debugging():  # where values are looked at: no expert here is none to be refused
        indices = indices.masked_fill(indices >= num_experts, -1)
    routed = Rows.of_choice(named, indices, num_experts, down.products)
    return forward(named, options, routed, gate_up, down)[0]


def _fake(*args: Any) -> Tensor:
    return args[0].new_empty(args[0].shape)


def _flops(*args: Any, **_: Any) -> int:
    """Of the products; a slot of no expert counts as any other."""
    given, options = _Choice(*args[:_NUM]), _options(args[_NUM:])
    slots: Any = given.indices
    return 2 * math.prod(slots) * sum(math.prod(sides) for _, *sides in options.shapes(given))


operator = _library.define(
    f"experts_topk(Tensor x, Tensor indices, {WEIGHTS}, {SCALES}, {glu.CONSTANTS}, {STORAGE}, "
    "bool weight_after_down) -> Tensor",
    reference=_reference,
    fake=_fake,
    flops=_flops,
    kernels=False,
)
