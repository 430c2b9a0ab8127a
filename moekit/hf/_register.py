"""The name ``"moekit"`` in Transformers: an implementation of experts, one of expert parallelism, a quantisation method."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch

from moekit import _check
from moekit.hf import gates, peft
from moekit.hf.experts import experts_forward
from moekit.hf.fp8 import fp8_experts_forward
from moekit.ops.experts import SAVES

NAME = "moekit"
SUPPORTED = "5.12 to 5.x"


def register(save: str = "recompute", *, expert_parallel: Mapping[str, Any] | None = None) -> None:
    """Put the experts implementation ``"moekit"`` into Transformers' experts interfaces.

    From then on, ``from_pretrained`` reads what ``save_pretrained`` wrote of a model with packed experts, too, and with
    ``DistributedConfig(ep_size=..., ep_implementation="moekit")`` moekit exchanges the tokens (Transformers 5.24 or newer:
    older ones have no such registry), whatever ``experts_implementation`` the model has.

    Args:
        save: what the fused experts keep for backward, as in :func:`moekit.experts`.
        expert_parallel: options of :func:`moekit.ep.dispatcher`, for models that are loaded after this call.

    Raises:
        ImportError: Transformers is not installed, or a release without an experts interface.
        ValueError: an unknown ``save``.

    Examples:
        >>> import transformers, moekit.hf
        >>> moekit.hf.register()
        >>> sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=32)
        >>> config = transformers.Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
        >>> model = transformers.Qwen3MoeForCausalLM(config)
        >>> model.set_experts_implementation("moekit")
        >>> model.config._experts_implementation
        'moekit'
        >>> moekit.hf.unregister()
    """
    _check.one_of("hf.register", "save", save, SAVES)
    plain, fp8 = _interfaces()
    gates.learn_transformers(importlib.import_module("transformers.activations"))
    plain.register(NAME, functools.partial(experts_forward, save=save))
    if fp8 is not None:
        fp8.register(NAME, functools.partial(fp8_experts_forward, save=save))
    if (of_ranks := _expert_parallel()) is not None:
        kind = importlib.import_module("moekit.hf.ep").ExpertParallel
        of_ranks.register(NAME, functools.partial(kind, **(expert_parallel or {})))
    elif expert_parallel:
        raise _check.unused("hf.register", "expert_parallel", expert_parallel, "before Transformers 5.24")
    _loader().enter(NAME)
    peft.hook()


def unregister() -> None:
    """Take the implementation out again; models that use it must be set to another one first."""
    for interface in (*_interfaces(), _expert_parallel()):
        if interface is not None:
            interface._global_mapping.pop(NAME, None)
    _loader().leave(NAME)
    peft.unhook()


def ensure_registered() -> None:
    """Register where nobody did; whoever did may have chosen what is kept for backward."""
    if NAME not in _interfaces()[0]._global_mapping:
        register()


def _interfaces() -> tuple[Any, Any]:
    """The interface of experts, and the one of FP8 experts (None in a release that has none)."""
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            f"moekit.hf needs Transformers {SUPPORTED} (its experts interface): pip install 'moekit[hf]'"
        ) from error
    from transformers.integrations import finegrained_fp8

    return ExpertsInterface, getattr(finegrained_fp8, "FP8ExpertsInterface", None)


def _expert_parallel() -> Any:
    """The interface of expert parallelism; None in a release that has none, or without ``torch.distributed``."""
    if not torch.distributed.is_available():
        return None
    try:
        from transformers.distributed import expert_parallel
    except ImportError:
        return None
    return getattr(expert_parallel, "EPImplementationInterface", None)


def _loader() -> Any:
    """What knows Transformers' loader; it needs Transformers to be imported at all."""
    return importlib.import_module("moekit.hf._quantizer")
