"""LoRA of PEFT on the experts of Transformers, and of :mod:`moekit.nn`: ``target_parameters`` without a copy of the weights.

PEFT adapts a parameter through a parametrisation: while the experts run, ``W + B A`` of all experts stands in the place of
``W``, and the gradient that reaches ``A`` and ``B`` is as large as ``W`` first. Where the experts are moekit's, the wrapper
of the parameter hands ``A`` and ``B`` themselves to the experts, one more argument of their call, and
:func:`moekit.experts` multiplies by them beside the weight. Nothing is stored on a module: what checkpoints the call,
compiles it, or runs it in several threads sees a function of its arguments.

PEFT's classes, its state dicts and all that one does with adapters stay as they are; three methods of
``peft.tuners.lora.layer.ParamWrapper`` are replaced. They are known by their code, as gates are: in a release that writes
them otherwise, PEFT's own way is left alone, which is correct for dense weights. It is also what a bias takes, a weight
that is trained itself, and whatever else says so below.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import logging
import math
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moekit.hf.experts import exporting_to_onnx, say_once
from moekit.hf.gates import digest
from moekit.nn.experts import Experts
from moekit.ops.lora import Lora
from moekit.packed import PackedExperts
from moekit.packed.merging import fingerprint, merge

_log = logging.getLogger("moekit.hf")
_HOME = "peft.tuners.lora.layer"
_TRANSFORMERS = "transformers.integrations.moe"
_INSIDE = ("_checkpoint_wrapped_module", "_orig_mod")  # what PyTorch's wrappers of a module call it

# What ParamWrapper does with a parameter, by the digests of its methods in PEFT 0.18 to 0.21; None for one that an earlier
# release has not got. Each was read, and the tests compare what the installed one computes.
_KNOWN: dict[str, tuple[str | None, ...]] = {
    "forward": ("db46f7a5808e0cb1",),
    "_activate_lora": ("180e2308e7156993", "c16895f51c38d2b3", "a17efe47166692e0"),
    "get_delta_weight": ("3dd12aa9a4eda8b5", "1bc7242c5bd9cf54"),
    "get_delta_factors": (None, "6ed91405e180c210"),
    "merge": ("7edfd090f57ccbcd",),
    "unmerge": ("c6218d14db39fefd",),
}

_SUMS = ("get_delta_weight", "get_delta_factors")

_own: dict[str, Any] = {}  # PEFT's methods, while moekit's stand in the places of some


# --- a call -----------------------------------------------------------------------------------------------------------


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``ParamWrapper.forward``: the adapters' factors go to the experts, on top of what an outer wrapper hands on."""
    names = _active(layer)
    if names and hasattr(layer.get_param(), "placements") and _is_spread(_experts_of(layer)):
        raise NotImplementedError(
            f"moekit.hf: {layer.parameter_name} has adapters, and its experts are sharded over ranks, of which PEFT "
            "knows nothing: load the model without expert parallelism (ep_size=1), or adapt other parameters"
        )
    part = _part(layer) if names and "adapter_names" not in kwargs else None
    if part is None:
        return _own["forward"](layer, x, *args, **kwargs)
    lora, mine = kwargs.pop("lora", {}), [_factors(layer, name) for name in names]
    return layer.base_layer(x, *args, **kwargs, lora={**lora, part: [*lora.get(part, ()), *mine]})


def _is_spread(module: Any) -> bool:
    """Whether each rank has some of its experts, as the module knows."""
    return module.sharding is not None if isinstance(module, Experts) else getattr(module, "_is_expert_parallel", False)


def _active(layer: Any) -> list[str]:
    """The adapters that count in this call."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _factors(layer: Any, name: str) -> Lora:
    """An adapter of PEFT as moekit's: it has ``A`` with the experts as the slowest of ``r E``, ``B`` as the fastest."""
    first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
    first = first.reshape(layer.num_experts, -1, first.shape[1])  # [E, r, PEFT's in]
    second = second.reshape(second.shape[0], -1, layer.num_experts).permute(2, 0, 1)  # [E, PEFT's out, r]
    # Up to PEFT 0.18, the second dimension of a parameter was its "in" whatever the module says.
    if getattr(layer, "_did_swap_in_out_features", False) == _experts_of(layer).is_transposed:
        first, second = second.mT, first.mT
    return Lora(first, second, layer.scaling[name])


def _part(layer: Any) -> str | None:
    """What of :func:`moekit.experts` the parameter of ``layer`` is, None where its adapters have to be added to it."""
    module, name = _experts_of(layer), layer.parameter_name
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation != "moekit" and not isinstance(module, Experts):
        return None
    obstacle = _obstacle(layer, module)
    if obstacle:
        say_once(type(module), f"has adapters that PEFT adds to the weights of all experts: {obstacle}")
        return None
    return "down" if name.startswith("down") else "gate_up"


def _obstacle(layer: Any, module: Any) -> str:
    """Why the factors cannot be given to ``module``; empty if they can."""
    if not _hands_on(module):
        return "its forward is not the one that Transformers gives it"
    if layer.parameter_name not in _projections(module):
        return f"{layer.parameter_name} is no projection"
    if any(getattr(type(layer), method, None) is not _own[method] for method in _SUMS):
        return f"{type(layer).__name__} has its own idea of what is added"
    if layer.get_param().requires_grad:
        return f"{layer.parameter_name} is trained itself"
    if _is_spread(module):  # older releases do not say
        return "its experts are spread over ranks"
    if exporting_to_onnx():
        return "ONNX has no grouped products"
    return ""


def _projections(module: Any) -> tuple[str, str]:
    """The names of its weights."""
    if isinstance(module, Experts):
        return "gate_up", "down"
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _experts_of(layer: Any) -> Any:
    """The module that has the parameter."""
    module = layer.get_base_layer()
    for name in _INSIDE:
        module = getattr(module, name, module)
    return module


def _hands_on(module: Any) -> bool:
    """Whether ``module`` gives all arguments of a call to its experts implementation."""
    if "forward" in module.__dict__ and not _is_of_accelerate(module):
        return False
    if isinstance(module, Experts):
        return type(module).forward is Experts.forward
    return hasattr(module, "has_gate") and _is_decorated(type(module))


def _is_of_accelerate(module: Any) -> bool:
    """Whether the forward of ``module`` alone is what Accelerate's hooks make of that of its class: it hands on, too."""
    forward, inner = module.__dict__["forward"], getattr(module, "_old_forward", None)
    made_there = getattr(getattr(forward, "func", None), "__module__", "") == "accelerate.hooks"
    return made_there and getattr(inner, "__func__", None) is type(module).forward


def _is_decorated(kind: type) -> bool:
    """Whether ``forward`` of the class ``kind`` is the one that Transformers' decorator makes."""
    forward = kind.forward
    return type(forward) is FunctionType and forward.__code__.co_filename == sys.modules[_TRANSFORMERS].__file__


# --- merging into a packed weight -------------------------------------------------------------------------------------


def _merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """``ParamWrapper.merge``: the place of a packed weight takes another, packed with all that is merged in it."""
    module, name = _experts_of(layer), layer.parameter_name
    weight = getattr(module, name)
    if not isinstance(weight, PackedExperts):
        return _own["merge"](layer, safe_merge=safe_merge, adapter_names=adapter_names)
    from peft.tuners.tuners_utils import check_adapters_to_merge

    adding = [adapter for adapter in check_adapters_to_merge(layer, adapter_names) or [] if adapter in layer.lora_A]
    if not adding:
        return None
    original = _original(layer, weight)
    # Where it is not known any more, what stands there has those merged before in it, or was loaded after them.
    base, names = (weight, adding) if original is None else (original, [*layer.merged_adapters, *adding])
    merged: Any
    merged, lost = merge(base, [_factors(layer, adapter) for adapter in names], transposed=module.is_transposed)
    if safe_merge and not math.isfinite(lost):
        raise ValueError(f"NaNs detected in the merged weights. The adapters {adding} seem to be broken")
    _log.info("%s.%s: merged and packed again, which loses %.2g of it", type(module).__name__, name, lost)
    setattr(module, name, nn.Parameter(merged, requires_grad=False))
    setattr(layer, _ORIGINAL, None if original is None else (original, fingerprint(merged)))
    layer.merged_adapters.extend(adding)


def _unmerge(layer: Any) -> None:
    """``ParamWrapper.unmerge``: the packed weight as it was, not one that was packed twice."""
    module, name = _experts_of(layer), layer.parameter_name
    weight = getattr(module, name)
    if not layer.merged or not isinstance(weight, PackedExperts):
        layer.__dict__.pop(_ORIGINAL, None)
        return _own["unmerge"](layer)
    original = _original(layer, weight)
    if original is None:
        raise RuntimeError(
            f"moekit.hf: {name} was packed with adapters merged into it, or changed after they were: "
            "they cannot be taken out of it"
        )
    setattr(module, name, nn.Parameter(original, requires_grad=False))
    delattr(layer, _ORIGINAL)
    layer.merged_adapters.clear()


def _original(layer: Any, weight: PackedExperts) -> PackedExperts | None:
    """``weight`` without what is merged into it; None where nobody has that: it was packed or loaded afterwards."""
    if not layer.merged_adapters:
        return weight
    kept = getattr(layer, _ORIGINAL, None)
    if kept is None or kept[1] != fingerprint(weight):
        return None
    return kept[0].to(weight.device, weight.dtype)


# Of a layer: its weight before it was merged, and what tells the merged one from others. In a tuple, as a weight by itself
# would be one more of its parameters.
_ORIGINAL = "_moekit_original"


# --- in PEFT's place --------------------------------------------------------------------------------------------------

_OURS: dict[str, Callable[..., Any]] = {"forward": _forward, "merge": _merge, "unmerge": _unmerge}


def hook() -> None:
    """Put moekit's methods in the places of PEFT's: now, or when PEFT is imported."""
    if _HOME in sys.modules:
        _replace(sys.modules[_HOME])
    elif not any(isinstance(finder, _Awaited) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaited())


def unhook() -> None:
    """Give PEFT its own methods back, where nobody has wrapped ours meanwhile."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Awaited)]
    kind = getattr(sys.modules.get(_HOME), "ParamWrapper", None)
    for name, ours in _OURS.items():
        if kind is not None and vars(kind)[name] is ours:
            setattr(kind, name, _own.pop(name))


def _replace(layers: ModuleType) -> None:
    """Replace the methods of PEFT's wrapper, if they are what was read."""
    kind = getattr(layers, "ParamWrapper", None)
    if kind is None or vars(kind)["forward"] is _forward:  # before PEFT 0.17; or done already
        return
    found = {name: vars(kind).get(name) for name in _KNOWN}
    if any(_digest(found[name]) not in known for name, known in _KNOWN.items()):
        _log.info("this release of PEFT wraps parameters in a way unknown to moekit: adapters of experts run as PEFT's")
        return
    _own.update(found)
    torch.compiler.assume_constant_result(_is_decorated)
    for name, ours in _OURS.items():
        setattr(kind, name, ours)


def _digest(method: Any) -> str | None:
    """The digest of a method, of what a context manager is made of for one of those; None for None."""
    if method is None:
        return None
    inner = getattr(method, "__wrapped__", None)
    if inner is not None and method.__code__ is _MANAGER:
        return digest(inner, decorators=("contextmanager",))
    return digest(method) if type(method) is FunctionType else ""


_MANAGER = contextlib.contextmanager(lambda: iter(())).__code__


class _Awaited(importlib.abc.MetaPathFinder):
    """Finds no module by itself: waits for PEFT's layers, which nobody may ever import, to see them loaded.

    The first call of a model would be too late: its layers are checkpointed in one way and would run again in the other.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _HOME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # not unregistered meanwhile
                sys.meta_path.remove(self)
                _replace(module)

        spec.loader.exec_module = execute_and_replace
        return spec
