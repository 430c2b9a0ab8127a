"""Published packages that do the same, imported where they are installed: compared with, never depended on."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moekit.doctor.system import version_of

_NEMO = "nemo_automodel.components.moe.megatron.moe_utils"
_PEERS = {"nemo": "nemo-automodel", "megatron": "megatron-core", "liger": "liger-kernel"}


def load_peers() -> tuple[dict[str, Any], list[str]]:
    """The peers that can be imported, and a note on each."""
    loaders = {"nemo": _load_nemo, "megatron": _load_megatron, "liger": _load_liger}
    found: dict[str, Any] = {}
    notes = []
    for name, load in loaders.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found |= load()
            notes.append(f"{name}: {_PEERS[name]} {version_of(_PEERS[name])}")
        except Exception as error:  # whatever keeps a peer from being imported, it is skipped
            why = f"cannot be imported ({type(error).__name__}: {error})".split("\n")[0][:200]
            why = why if version_of(_PEERS[name]) else "is not installed"
            notes.append(f"{name}: skipped, {_PEERS[name]} {why}")
    return found, notes


def _load_nemo() -> dict[str, Any]:
    compiled = importlib.import_module(_NEMO)
    return {"nemo": compiled, "nemo eager": _without_compile(compiled)}


def _without_compile(module: ModuleType) -> ModuleType:
    """A second copy of ``module`` whose functions are not compiled."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_eager", str(module.__file__))
    if spec is None or spec.loader is None:
        raise ImportError(f"no source for {module.__name__}")
    copy = importlib.util.module_from_spec(spec)
    with mock.patch.object(torch, "compile", lambda function: function):
        spec.loader.exec_module(copy)
    return copy


def _load_megatron() -> dict[str, Any]:
    moe = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    swiglu = importlib.import_module("megatron.core.fusions.fused_bias_swiglu")
    geglu = importlib.import_module("megatron.core.fusions.fused_bias_geglu")
    found = SimpleNamespace(
        permute=moe.permute,
        unpermute=moe.unpermute,
        topk_routing_with_score_function=moe.topk_routing_with_score_function,
        weighted_bias_quick_geglu_impl=geglu.weighted_bias_quick_geglu_impl,
        # Theirs has a bias that must be None.
        weighted_bias_swiglu_impl=lambda y, w, fp8=False: swiglu.weighted_bias_swiglu_impl(y, None, w, fp8),
    )
    return {"megatron": found}


def _load_liger() -> dict[str, Any]:
    swiglu = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    experts = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    return {"liger": SimpleNamespace(silu_mul=swiglu.apply, experts=experts.apply)}


def load_transformers() -> dict[str, Any]:
    """Transformers' ``grouped_mm`` implementation, in one of its own classes around weights that are given.

    Raises:
        ImportError: there is no Transformers, or an older one without them.
    """
    config_class = importlib.import_module("transformers").Qwen3MoeConfig
    experts_class = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeExperts

    def grouped_mm_experts(gate_up: Tensor, down: Tensor) -> torch.nn.Module:
        experts, hidden, intermediate = down.shape
        config = config_class(num_experts=experts, hidden_size=hidden, moe_intermediate_size=intermediate)
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module = experts_class(config)
        del module.gate_up_proj, module.down_proj
        module.gate_up_proj, module.down_proj = gate_up, down
        return module

    return {"transformers": SimpleNamespace(grouped_mm_experts=grouped_mm_experts)}
