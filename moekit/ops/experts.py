"""The routed expert MLP as one operator: permute, project, gate, project, unpermute.

This file is the call and its checks; :mod:`moekit.ops.experts_forward` and :mod:`moekit.ops.experts_backward` compute.

Kept for backward under ``save="recompute"``: the gate/up projection's output, the routing tables and, with adapters of
``gate_up``, their ``[R, r]`` products; nothing else of row size.

Sources: the saving of activations follows arXiv 2211.15841 (MegaBlocks) and the dot-product form of the weight gradient
arXiv 2403.08245 (ScatterMoE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops import _library, glu
from moekit.ops.experts_forward import operator
from moekit.ops.experts_topk import KERNEL
from moekit.ops.experts_topk import operator as experts_topk
from moekit.ops.gemm import autocast
from moekit.ops.lora import NONE, WEIGHTS, Adapters, Lora, adapters, of_weights
from moekit.ops.packed_products import three
from moekit.packed import PackedExperts
from moekit.routing import Routing, check_choice

SAVES = ("recompute", "fp8", "all")


def experts(
    hidden_states: Tensor,
    routing: Routing | tuple[Tensor, Tensor],
    gate_up: Tensor | PackedExperts,
    down: Tensor | PackedExperts,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    alpha: float | None = None,
    linear_offset: float = 0.0,
    clamp: float | None = None,
    layout: str = "concatenated",
    transposed: bool = False,
    lora: Mapping[str, Lora | Sequence[Lora]] | None = None,
    weight_after_down: bool = False,
    save: str = "recompute",
    batch_invariant: bool = False,
) -> Tensor:
    """The expert MLP of a Mixture-of-Experts layer.

    Args:
        hidden_states: ``[T, H]``; float64, float32, bfloat16 or float16.
        routing: a :class:`moekit.Routing` with weights, or ``(indices [T, K], weights [T, K])``. In the latter an index
            of -1, or of E and above, is a slot of no expert here (of another expert-parallel rank, say).
        gate_up: ``[E, 2I, H]``, or ``[E, H, 2I]`` with ``transposed``; ``I`` in the place of ``2I`` without a gate.
            Either weight may be a :class:`moekit.PackedExperts`, whose values are unpacked as they are needed, in a
            workspace of :data:`moekit.ops.packed_products.WORKSPACE` bytes at most (or of one expert); it has no gradient.
        down: ``[E, H, I]``, or ``[E, I, H]`` with ``transposed``.
        gate_up_bias: ``[E, 2I]``, or None; the clamp comes after it. A bias may be float32 whatever the rest is.
        down_bias: ``[E, H]``, or None; multiplied by the routing weight as the rest.
        activation: as in :func:`moekit.glu`, like ``alpha``, ``linear_offset``, ``clamp`` and ``layout``.
        alpha: the constant of ``quick_gelu``; None is 1.702.
        linear_offset: added to the up half.
        clamp: limits the gate from above and the up half on both sides.
        layout: ``concatenated`` or ``interleaved`` gate and up, or ``ungated``.
        transposed: the weights are stored ``[E, in, out]``.
        lora: the adapters of frozen weights: ``{"gate_up": Lora(A, B, scale), "down": [Lora(...), ...]}``, each
            ``W x + scale * B (A dropout(x))``, with ``x`` the rows that the weight multiplies. See :class:`moekit.Lora`.
        weight_after_down: multiply by the routing weight after the down projection instead of before.
        save: what to keep for backward. ``recompute``: the projection's output; ``fp8``: that in float8 e4m3 with a
            scale a row; ``all``: the gathered rows and the activation as well, for speed.
        batch_invariant: give a token's output, and the gradients of it and of its routing weights, the same bits alone, in
            any batch and in any order of the tokens: products in fixed tiles, each sum in one order. Gradients of weights,
            which are sums over the batch, are as ever; forward-mode differentiation has nothing of it.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states`` (of autocast, where it is on). A token with no expert gets zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        TypeError: what is no tensor, or a tensor of codes: float8, integers, a sharded or quantised subclass.
            Or an adapter that is no :class:`moekit.Lora`.
        RuntimeError: a double backward, which this operator does not have.

    Gradients are computed only for what needs one, and nothing is kept for the others.

    Examples:
        >>> import torch, moekit
        >>> gate_up, down = torch.ones(4, 2 * 8, 16), torch.ones(4, 16, 8)  # E=4, I=8, H=16
        >>> x = torch.full((3, 16), 0.25, requires_grad=True)
        >>> y = moekit.experts(x, moekit.route(torch.zeros(3, 4), 2), gate_up, down)
        >>> y.shape, round(y[0, 0].item(), 3)  # 8 * silu(4) * 4
        (torch.Size([3, 16]), 125.698)
        >>> y.sum().backward()
    """
    op = "experts"
    _library.announce_flops()
    clamps = {"clamp": clamp, "clamp_after_bias": True}
    spec = glu.make_glu(activation, alpha=alpha, linear_offset=linear_offset, layout=layout, op=op, **clamps)
    _check.one_of(op, "save", save, SAVES)
    dense = (None if isinstance(weight, PackedExperts) else weight for weight in (gate_up, down))
    hidden_states, *dense, gate_up_bias, down_bias = autocast(hidden_states, *dense, gate_up_bias, down_bias)
    biases = (gate_up_bias, down_bias)
    gate_up, down = (given if cast is None else cast for given, cast in zip((gate_up, down), dense, strict=True))
    _check_shapes(hidden_states, gate_up, down, gate_up_bias, down_bias, spec, transposed)
    named = {"gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    weights = [_Weight.of(gate_up, transposed), _Weight.of(down, transposed)]
    scales = (*weights[0].scales, *weights[1].scales)
    stored = [*(weight.format for weight in weights), [*weights[0].block, *weights[1].block], *(w.turned for w in weights)]
    if lora is None and not batch_invariant and _goes_directly(hidden_states, routing, gate_up, down, *biases):
        choice = _as_choice(routing, gate_up.shape[0])
        _check_placed(hidden_states, choice[0], choice[0].shape[0], named)
        given = (hidden_states, *choice, weights[0].tensor, weights[1].tensor, *biases, *scales)
        return experts_topk(*given, *spec, transposed, *stored, weight_after_down)
    routing = _as_routing(routing, gate_up.shape[0])
    _check_placed(hidden_states, routing.order, routing.num_tokens, named)
    factors = [
        _adapters(name, given, weight, transposed, hidden_states)
        for name, given, weight in zip(WEIGHTS, of_weights(lora), (gate_up, down), strict=True)
    ]
    inputs = (
        *(hidden_states, routing.weights, weights[0].tensor, weights[1].tensor, gate_up_bias, down_bias),
        *(factors[0].A, factors[0].B, factors[1].A, factors[1].B),
    )
    if batch_invariant and any(found.drop for found in factors):
        raise _check.fail(op, "lora", "of adapters that drop nothing, if batch_invariant", "a dropout")
    if not _library.needs_grad(*inputs):
        save = "nothing"
    found = (routing.order, routing.inverse, routing.offsets, *scales, _seeds(*factors))
    stored += [factors[0].numbers, factors[1].numbers]
    return operator(*inputs, *found, *spec, transposed, *stored, weight_after_down, save, batch_invariant)[0]


class _Weight(NamedTuple):
    """A weight as the operator takes it."""

    tensor: Tensor
    scales: list[Tensor | None]  # three
    format: str  # empty: dense
    block: tuple[int, int]
    turned: bool

    @staticmethod
    def of(weight: Tensor, transposed: bool) -> _Weight:
        if isinstance(weight, PackedExperts):
            codes, scales, form, block = weight.stored()
            return _Weight(codes, three(scales), form, block, weight.turned != transposed)
        return _Weight(weight, three([]), "", (0, 0), False)


def _adapters(name: str, given: Any, weight: Tensor, transposed: bool, hidden_states: Tensor) -> Adapters:
    if given is None:
        return NONE
    if weight.requires_grad and torch.is_grad_enabled():
        wanted = "frozen (requires_grad_(False)) where it has an adapter"
        raise _check.fail("experts", name, wanted, "a tensor that requires a gradient")
    num_experts, *sides = weight.shape
    outputs, inputs = reversed(sides) if transposed else sides
    return adapters(name, given, (num_experts, outputs, inputs), hidden_states)


def _seeds(*factors: Adapters) -> Tensor | None:
    """A seed a weight for what its adapters drop, from PyTorch's generator: checkpoints restore it for the recomputation."""
    return torch.randint(2**62, (len(factors),), device="cpu") if any(found.drop for found in factors) else None


def _goes_directly(hidden_states: Tensor, routing: Any, gate_up: Any, down: Any, *biases: Tensor | None) -> bool:
    """Whether the call can go without routing tables: where there is a kernel for that, and nothing needs a gradient."""
    if isinstance(routing, Routing) or not _backend.has_kernel(KERNEL, hidden_states):
        return False
    whole = isinstance(routing, (tuple, list)) and len(routing) == 2 and all(isinstance(part, Tensor) for part in routing)
    return whole and not _library.needs_grad(hidden_states, routing[1], gate_up, down, *biases)


def _as_choice(routing: Any, num_experts: int) -> tuple[Tensor, Tensor]:
    """A router's choice that will do as it is."""
    indices, weights = _choice(routing, num_experts)
    check_choice(indices, weights, num_experts)
    return indices, weights


def _choice(routing: Any, num_experts: int, *, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """A router's choice; what is no expert here is -1 where somebody looks, or may do so in code that is ``compiled``."""
    if not isinstance(routing, (tuple, list)) or len(routing) != 2 or not _is_integer(routing[0]):
        raise _no_routing(routing)
    indices, weights = routing
    if not indices.is_cuda or compiled or _backend.debugging():  # elsewhere what is out of range is left out
        indices = indices.masked_fill(indices >= num_experts, -1)
    return indices, weights


def _as_routing(routing: Any, num_experts: int) -> Routing:
    if not isinstance(routing, Routing):
        choice = _choice(routing, num_experts, compiled=torch.compiler.is_compiling())
        routing = Routing.from_topk(*choice, num_experts=num_experts)
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
        if not isinstance(value, PackedExperts) or name == "hidden_states":
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
        if value.dtype is not hidden_states.dtype and not isinstance(value, PackedExperts):
            raise _check.fail(op, name, f"of the dtype of hidden_states ({hidden_states.dtype})", value.dtype)
    for name, value, size in (("gate_up_bias", gate_up_bias, width), ("down_bias", down_bias, hidden)):
        if value is not None:
            _check.computable(op, name, value)
            _check.shape(op, name, value, (num_experts, size), "[experts, out]")
            if value.dtype not in (hidden_states.dtype, torch.float32):
                wanted = f"of the dtype of hidden_states ({hidden_states.dtype}) or float32"
                raise _check.fail(op, name, wanted, value.dtype)


def _check_placed(hidden_states: Tensor, routing: Tensor, num_tokens: int, named: Mapping[str, Any]) -> None:
    """All on one device, and the routing of as many tokens as there are."""
    _check.same_device("experts", hidden_states=hidden_states, **named, routing=routing)
    if num_tokens != hidden_states.shape[0]:
        wanted = f"of {hidden_states.shape[0]} tokens, as hidden_states"
        raise _check.fail("experts", "routing", wanted, f"{num_tokens} tokens")


def _storage(gate_up: Tensor, hidden: int, transposed: bool, *, turned: bool) -> tuple[str, str]:
    """What was wanted of ``gate_up`` and what came; ``turned``: it would fit if it were stored the other way round."""
    order, other = ("in, out", "out, in") if transposed else ("out, in", "in, out")
    hint = f"; if it is stored [experts, {other}], pass transposed={not transposed}" if turned else ""
    return f"of shape [experts, {order}] with {hidden} inputs", f"shape {list(gate_up.shape)}{hint}"
