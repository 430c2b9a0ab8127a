"""The weights of an experts module as they are: read once a call, and used only where they are what they seem.

Packed weights (:class:`moekit.PackedExperts`) are: products take them as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekit import _check
from moekit.packed import PackedExperts

_PLAIN = (nn.Parameter, Tensor)


class Weights(NamedTuple):
    """The weights of one call."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


def weights_of(module: Any) -> Weights:
    """Every weight of ``module`` as a plain floating-point tensor, or as a packed one.

    Raises:
        TypeError: a weight of another kind; the message names it, says what it is and what to do.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    if not module.has_bias:
        return Weights(plain(module, first), plain(module, "down_proj"), None, None)
    names = (first, "down_proj", f"{first}_bias", "down_proj_bias")
    return Weights(*(plain(module, name) for name in names))


def plain(module: Any, name: str, dtypes: tuple[torch.dtype, ...] = _check.FLOATS) -> Tensor:
    """The weight ``name`` of ``module`` as a plain tensor of one of ``dtypes``."""
    value = getattr(module, name)
    if type(value) not in _PLAIN:
        value = _unwrapped(module, name, value)
    if value.dtype not in dtypes:
        raise _refusal(module, name, value, "dequantise it when the model is loaded", dtypes=dtypes)
    return value


def _unwrapped(module: Any, name: str, value: Any) -> Tensor:
    """What a tensor subclass stands for."""
    kind = type(value)
    if kind is PackedExperts:
        return value
    if hasattr(value, "placements"):
        return _local(module, name, value)
    if getattr(kind, "dequantize", Tensor.dequantize) is not Tensor.dequantize:
        return _dequantised(module, name, value)
    if not isinstance(value, Tensor) or not _check.transparent(value):
        raise _refusal(module, name, value, "dequantise or unwrap it when the model is loaded")
    return value


def _local(module: Any, name: str, value: Any) -> Tensor:
    """A DTensor: the whole, or this rank's experts where the model says that a part is meant."""
    local = value.to_local()
    whole = all(placement.is_replicate() for placement in value.placements)
    mine = getattr(module, "_is_expert_parallel", False) and not any(p.is_partial() for p in value.placements)
    if not whole and not (mine and local.shape == (getattr(module, "num_experts", None), *value.shape[1:])):
        remedy = "call the model, whose hooks gather it, not its parts; or gather it with full_tensor()"
        raise _refusal(module, name, value, remedy, f" placed as {tuple(value.placements)}")
    return local


def _dequantised(module: Any, name: str, value: Any) -> Tensor:
    """A weight-only quantised tensor, as eager code dequantises it in each call."""
    if getattr(value, "act_quant_kwargs", None) is not None:
        raise _refusal(module, name, value, "use a weight-only format", " that quantises activations too")
    found = value.dequantize().to(value.dtype)
    if value.requires_grad and not found.requires_grad and torch.is_grad_enabled():
        raise _refusal(module, name, value, "freeze it with requires_grad_(False)", " whose gradient dequantize() drops")
    return found


def _refusal(
    module: Any, name: str, value: Any, remedy: str, what: str = "", *, dtypes: tuple[torch.dtype, ...] = _check.FLOATS
) -> TypeError:
    found = f"a {type(value).__name__}{what}"
    if isinstance(value, Tensor):
        found = f"{found} of dtype {value.dtype}"
    wanted = f"a plain tensor of {_check.names_of(dtypes)}"
    remedy = f"{remedy}, or use another experts_implementation"
    return _check.wrong_type("hf", f"{type(module).__name__}.{name}", wanted, f"{found}; {remedy}")
