"""An experts implementation for Transformers, one line to switch on.

::

    moekit.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moekit")
    # or, on a model that is loaded already: model.set_experts_implementation("moekit")

Every class that Transformers decorates with ``use_experts_implementation`` works. Experts whose gate moekit's one
formula covers run fused, as :func:`moekit.experts`; any other gate runs through the model's own ``_apply_gate`` between
moekit's permutation and grouped products, and says so once at INFO. What is kept for backward is set with
``moekit.hf.register(save="fp8")``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moekit import _check
from moekit.ops._segments import expert_of_row
from moekit.ops.experts import SAVES, experts
from moekit.ops.gemm import grouped_linear
from moekit.ops.rows import permute, unpermute
from moekit.routing import Routing

NAME = "moekit"
SUPPORTED = "5.12 to 5.x"
_log = logging.getLogger(__name__)
_said: set[type] = set()

# Activation modules and functions by class or function name: several frameworks spell the same function.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "relu": "relu",
    "ReLUSquaredActivation": "relu2",
}


def _gpt_oss(module: Any) -> dict[str, Any]:
    return {"activation": "quick_gelu", "alpha": module.alpha, "clamp": module.limit, "linear_offset": 1.0}


def _minimax_m3(module: Any) -> dict[str, Any]:
    return {
        "activation": "quick_gelu",
        "alpha": module.swiglu_alpha,
        "clamp": module.swiglu_limit,
        "linear_offset": 1.0,
    }


def _clamped_silu(module: Any) -> dict[str, Any]:
    return {"activation": "silu", "clamp": module.swiglu_limit}


def _clamped_act(module: Any) -> dict[str, Any] | None:
    activation = _activation(module)
    return activation and {**activation, "clamp": module.limit}


def _activation(module: Any) -> dict[str, Any] | None:
    """The activation of ``module.act_fn``, or None if moekit does not have it."""
    act = getattr(module, "act_fn", None)
    if isinstance(act, nn.GELU):
        return {"activation": "gelu_tanh" if act.approximate == "tanh" else "gelu"}
    name = getattr(act, "__name__", type(act).__name__)
    return {"activation": _ACTIVATIONS[name]} if name in _ACTIVATIONS else None


# The classes with a gate of their own that the formula covers. Beam's takes float32, which moekit does anyway.
_OWN_GATES: dict[str, Callable[[Any], dict[str, Any] | None]] = {
    "GptOssExperts": _gpt_oss,
    "OpenAIPrivacyFilterExperts": _gpt_oss,
    "MiniMaxM3VLExperts": _minimax_m3,
    "DeepseekV4Experts": _clamped_act,
    "Glm5NextTextExperts": _clamped_silu,
    "HYV4Experts": _clamped_silu,
    "BeamExperts": _activation,
}


def register(save: str = "recompute") -> None:
    """Put the experts implementation ``"moekit"`` into Transformers' experts interface.

    Args:
        save: what the fused experts keep for backward, as in :func:`moekit.experts`.

    Raises:
        ImportError: Transformers is not installed, or a release without an experts interface.
        ValueError: an unknown ``save``.
    """
    _check.one_of("hf.register", "save", save, SAVES)
    _interface().register(NAME, functools.partial(experts_forward, save=save))


def unregister() -> None:
    """Take the implementation out again; models that use it must be set to another one first."""
    _interface()._global_mapping.pop(NAME, None)


def _interface() -> Any:
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            f"moekit.hf needs Transformers {SUPPORTED} (its experts interface): pip install 'moekit[hf]'"
        ) from error
    return ExpertsInterface


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, save: str = "recompute"
) -> Tensor:
    """The forward of an experts module of Transformers.

    Args:
        module: an instance of a class decorated with ``use_experts_implementation``.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]`` integers; the number of experts marks a slot of another expert-parallel rank.
        top_k_weights: ``[T, K]`` routing weights.
        save: as in :func:`moekit.experts`.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``.
    """
    gated = module.has_gate
    gate_up, down = _local(module.gate_up_proj if gated else module.up_proj), _local(module.down_proj)
    gate_up_bias = down_bias = None
    if module.has_bias:
        gate_up_bias = _local(module.gate_up_proj_bias if gated else module.up_proj_bias)
        down_bias = _local(module.down_proj_bias)
    dtype, x = hidden_states.dtype, hidden_states
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(gate_up.dtype)
    weights = (gate_up, down, gate_up_bias, down_bias)
    options = _fused_options(module)
    if options is None:
        return _own_gate(module, x, top_k_index, top_k_weights, *weights).to(dtype)
    out = experts(
        x,
        (top_k_index, top_k_weights),
        gate_up,
        down,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        layout=_layout(module),
        transposed=module.is_transposed,
        save=save,
        **options,
    )
    return out.to(dtype)


def _local(weight: Any) -> Tensor:
    """This rank's part of a sharded parameter."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _layout(module: Any) -> str:
    if not module.has_gate:
        return "ungated"
    return "concatenated" if module.is_concatenated else "interleaved"


def _fused_options(module: Any) -> dict[str, Any] | None:
    """The gate of ``module`` as arguments of :func:`moekit.experts`, or None where it has to run itself."""
    if getattr(module, "has_post_expert_norm", False):
        return None
    if not module.has_gate:
        return _activation(module)
    gate = type(module)._apply_gate
    owner = next(cls for cls in type(module).__mro__ if "_apply_gate" in vars(cls))
    if gate.__module__ == "transformers.integrations.moe":
        return _activation(module)
    known = _OWN_GATES.get(owner.__name__) if owner.__module__.startswith("transformers.models.") else None
    return known(module) if known else None


def _own_gate(
    module: Any,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """The same layer around a gate (or a norm) that only the model knows."""
    if type(module) not in _said:
        _said.add(type(module))
        _log.info("%s has a gate or norm of its own: its experts run unfused", type(module).__name__)
    num_experts = gate_up.shape[0]
    if torch.is_autocast_enabled(x.device.type):
        x, gate_up, down = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, gate_up, down))
    indices = torch.where(top_k_index < num_experts, top_k_index, -1)
    routing = Routing.from_topk(indices, top_k_weights, num_experts=num_experts)
    rows = permute(x, routing)
    projected = _linear(rows, gate_up, gate_up_bias, routing, module.is_transposed)
    act = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
    out = _linear(act.to(down.dtype), down, down_bias, routing, module.is_transposed)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    return unpermute(out, routing, weighted=True)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, transposed: bool) -> Tensor:
    out = grouped_linear(rows, weight, routing.offsets, transposed=transposed)
    if bias is None:
        return out
    owner = expert_of_row(routing.offsets, rows.shape[0])
    return out + bias[owner.clamp(max=weight.shape[0] - 1)].to(out.dtype)
