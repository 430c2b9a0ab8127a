"""The forward of an experts module of Transformers: fused where that is provably the same, else around its own gate."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.jit._trace import TracerWarning, is_tracing
from torch.nn import functional

from moekit import _check
from moekit.hf.gates import fused_options
from moekit.hf.weights import Weights, weights_of
from moekit.ops._segments import expert_of_row
from moekit.ops.experts import experts
from moekit.ops.gemm import autocast
from moekit.ops.grouped_linear import grouped_linear
from moekit.ops.lora import Lora
from moekit.ops.rows import permute, unpermute
from moekit.routing import Routing

_log = logging.getLogger("moekit.hf")
_said: set[str] = set()  # names, not classes: a class that is made anew at every step must be free to go

Adapters = dict[str, list[Lora]]  # of "gate_up" and "down", as moekit.experts takes them


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor | Routing,
    top_k_weights: Tensor,
    *,
    save: str = "recompute",
    lora: Adapters | None = None,
) -> Tensor:
    """The forward of an experts module of Transformers.

    Args:
        module: an instance of a class decorated with ``use_experts_implementation``.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]`` integers; the number of experts marks a slot of another expert-parallel rank.
            Or a routing over the experts of ``module``, which has the weights, as :mod:`moekit.hf.ep` makes it.
        top_k_weights: ``[T, K]`` routing weights.
        save: as in :func:`moekit.experts`.
        lora: as there; what :mod:`moekit.hf.peft` hands on.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``.

    Raises:
        TypeError: weights (or hidden states) that are not what they seem: sharded, quantised, packed.
    """
    inputs, lora = (hidden_states, top_k_index, top_k_weights), lora or {}
    if exporting_to_onnx() and not lora and isinstance(top_k_index, Tensor):
        return _exportable(module, hidden_states, top_k_index, top_k_weights)
    if is_tracing():
        with warnings.catch_warnings():  # the sizes that are looked at are the weights', or only checked
            warnings.simplefilter("ignore", TracerWarning)
            return _forward(module, *inputs, save, lora)
    return _forward(module, *inputs, save, lora)


def exporting_to_onnx() -> bool:
    """Whether only operators that ONNX has will do."""
    return (is_tracing() or torch.compiler.is_exporting()) and torch.onnx.is_in_onnx_export()


def _forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor | Routing, top_k_weights: Tensor, save: str, lora: Adapters
) -> Tensor:
    _check.computable("hf", "hidden_states", hidden_states)
    x, weights = hidden_states, weights_of(module)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x, *cast = autocast(x, *weights)
        weights = Weights(*cast)
    return run(module, x, top_k_index, top_k_weights, weights, save, lora).to(hidden_states.dtype)


def run(
    module: Any, x: Tensor, top_k_index: Tensor | Routing, top_k_weights: Tensor, weights: Weights, save: str, lora: Adapters
) -> Tensor:
    """The experts of ``module`` with these weights and adapters, in the dtype of the weights."""
    gate_up, down, gate_up_bias, down_bias = weights
    x = x.to(gate_up.dtype)
    options = fused_options(module)
    if options is None or gate_up.dtype is not down.dtype:
        return _own_gate(module, x, top_k_index, top_k_weights, weights, lora)
    return experts(
        x,
        top_k_index if isinstance(top_k_index, Routing) else (top_k_index, top_k_weights),
        gate_up,
        down,
        gate_up_bias=None if gate_up_bias is None else _addable(gate_up_bias, x),
        down_bias=None if down_bias is None else _addable(down_bias, x),
        transposed=module.is_transposed,
        save=save,
        lora=lora or None,
        **options,
    )


def _addable(bias: Tensor, x: Tensor) -> Tensor:
    """A bias in a dtype that :func:`moekit.experts` takes beside ``x``, not rounded."""
    return bias if bias.dtype in (x.dtype, torch.float32) else bias.float()


def _exportable(module: Any, *inputs: Tensor) -> Tensor:
    """The same layer in operators that ONNX has."""
    from transformers.integrations.moe import batched_mm_experts_forward

    return batched_mm_experts_forward(module, *inputs)


def _own_gate(
    module: Any, x: Tensor, top_k_index: Tensor | Routing, top_k_weights: Tensor, weights: Weights, lora: Adapters
) -> Tensor:
    """The same layer around a gate, an activation or a norm that only the model knows."""
    say_once(type(module), "has a gate, norm or hook of its own, or weights of two dtypes: its experts run unfused")
    gate_up, down, gate_up_bias, down_bias = weights
    routing, num_experts = top_k_index, gate_up.shape[0]
    if not isinstance(routing, Routing):
        indices = torch.where(routing < num_experts, routing, -1)
        routing = Routing.from_topk(indices, top_k_weights, num_experts=num_experts)
    rows = permute(x, routing)
    projected = _linear(rows, gate_up, gate_up_bias, routing, module.is_transposed, lora.get("gate_up", []))
    act = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
    out = _linear(act.to(down.dtype), down, down_bias, routing, module.is_transposed, lora.get("down", []))
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    return unpermute(out, routing, weighted=True)


def say_once(kind: type, what: str) -> None:
    """Log at INFO that modules of the class ``kind`` are something, the first time that one is."""
    if torch.compiler.is_compiling():
        return
    name = f"{kind.__module__}.{kind.__qualname__} {what}"
    if name not in _said:
        _said.add(name)
        _log.info("%s %s", kind.__name__, what)


def _linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, transposed: bool, adapters: list[Lora]
) -> Tensor:
    out = grouped_linear(rows, weight, routing.offsets, transposed=transposed)
    for adapter in adapters:
        taken = functional.dropout(rows, adapter.dropout) if adapter.dropout else rows
        low = grouped_linear(taken, adapter.A.to(rows.dtype), routing.offsets)
        out = out + adapter.scale * grouped_linear(low, adapter.B.to(rows.dtype), routing.offsets)
    if bias is None:
        return out
    owner = expert_of_row(routing.offsets, rows.shape[0])
    return (out + bias[owner.clamp(max=weight.shape[0] - 1)]).to(out.dtype)
