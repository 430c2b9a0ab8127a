"""Mixture-of-Experts blocks of Transformers in the terms of :mod:`moekit.nn`: what they compute, and where weights stand.

A block is known by the digest of its ``forward``, as gates are (:mod:`moekit.hf.gates`), its router by
:mod:`moekit.hf.routers`, its experts by their gate, its shared expert by the digest of its ``forward``. Whatever is not
known, or has a hook, a patch or a parametrisation on it, is refused by name: nothing is guessed.
"""

from __future__ import annotations

import importlib
import sys
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekit import _check
from moekit.hf import gates
from moekit.hf.weights import plain
from moekit.packed import PackedExperts

_OP = "nn.MoE.from_transformers"


class Slot(NamedTuple):
    """A tensor of :class:`moekit.nn.MoE` by its name in the state dict, and the block's that it is made of."""

    name: str
    parts: tuple[Tensor, ...]  # one after the other along the first dimension, or the one there is
    transposed: bool = False

    def value(self) -> Tensor:
        """A copy, as moekit stores it."""
        found = [part.detach().mT if self.transposed else part.detach() for part in self.parts]
        return torch.cat(found) if len(found) > 1 else found[0].clone(memory_format=torch.contiguous_format)

    def write(self, value: Tensor) -> None:
        """Put ``value`` where it came from, in the dtypes that are there."""
        value = value.mT if self.transposed else value
        start = 0
        for part in self.parts:
            part.detach().copy_(value[start : start + len(part)])
            start += len(part)


class Block(NamedTuple):
    """What a block computes: keyword arguments of the parts of :class:`moekit.nn.MoE`, and its weights."""

    router: dict[str, Any]
    experts: dict[str, Any]
    shared: dict[str, Any] | None
    null_experts: int
    slots: list[Slot]

    def tensors(self) -> dict[str, Tensor]:
        """The state dict, in copies."""
        return {slot.name: slot.value() for slot in self.slots}


class _Form(NamedTuple):
    """How a block is put together: names of its attributes.

    ``bias`` is a tensor that the block hands to its router; ``scale`` multiplies what the routed experts give; ``off`` are
    attributes that have to be 0 or False, for what they switch on is not moekit's; ``identity`` modules that do nothing.
    """

    router: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None
    bias: str | None = None
    bias_switch: str | None = None
    scale: str | None = None
    off: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()
    flat: bool = True  # the router is given [T, H]; else [1, T, H]


# The blocks of Transformers by the digest of their ``forward``. Each was read and is compared with its class by the tests.
_BLOCKS: dict[str, _Form] = {
    "ba4506e35fd3b4b5": _Form(shared="shared_experts", flat=False),  # DeepseekV2, V3, Glm4Moe, KimiLinear and their kin
    "3b4f90a116d935df": _Form(flat=False),  # MiMoV2Flash
    "9c06cf1bbe0ecfe7": _Form(),  # Qwen3Moe and its kin
    "7d7471d425a161f1": _Form(),  # Olmoe, FlexOlmo
    "fdfaa9cd28131d90": _Form(shared="shared_expert", shared_gate="shared_expert_gate"),  # Qwen2Moe, Qwen3Next, Qwen3_5Moe
    "8081b2a51933f004": _Form(shared="shared_expert"),  # Flint, LaraMini
    "b1d67f4f2c51eb8d": _Form(router="router"),  # GraniteMoe and its kin
    "9c8d9862937b2ac8": _Form(router="router"),  # Jamba
    "1e628e1e3f7d8655": _Form(router="router"),  # GptOss
    "fb2ae07f6cd9cd92": _Form(router="router", scale="num_experts"),  # OpenAIPrivacyFilter
    "2b6c15c31d7da115": _Form(shared="shared_experts", scale="routed_scaling_factor"),  # Laguna, MiniMaxM3VL
    "b2df88689f07fbc1": _Form(scale="routed_scaling_factor"),  # Beam
    "d1031cb04b6f9b65": _Form(off=("jitter_noise",)),  # Mixtral, MiniMax
    "c9027520b2daf2f2": _Form(bias="e_score_correction_bias", off=("jitter_noise",)),  # MiniMaxM2
    "adc43b982a7df1c8": _Form(shared="shared_experts"),  # Ernie4_5_Moe
    "6e53c46f149082d0": _Form(shared="shared_mlp"),  # HunYuanMoEV1
    "d8b93cda4dc5889b": _Form(router="router", shared="shared_experts"),  # Aria
    "db09cb5927b1806d": _Form(shared="shared_experts", bias="e_score_correction_bias"),  # HYV3
    "27ef58b020eb0fd2": _Form(bias="e_score_correction_bias", flat=False),  # Dots3Note, vision
    "b50f580df1ba84cc": _Form(router="router", shared="shared_experts", bias="expert_bias", flat=False),  # Afmoe
    "6be1838b6d7e3dad": _Form(bias="expert_bias", bias_switch="use_expert_bias"),  # Lfm2Moe
    "09c3ab8307dc563b": _Form(shared="shared_experts", off=("is_hash",), flat=False),  # DeepseekV4
    "963823be6846ff26": _Form(
        shared="shared_experts", identity=("fc1_latent_proj", "fc2_latent_proj"), flat=False
    ),  # NemotronH
    "a9dc7a463617ca22": _Form(router="router", flat=False),  # LongcatFlash
}

_LONGCAT_EXPERTS = "cc805d379b8885a4"  # the digest of their ``forward``

# Shared experts by the digest of their ``forward``: the linear maps whose outputs the gate takes, one after the other.
_UNGATED_MLP, _MINIMAX_MLP = "059691156189bf53", "6ad79abee234a6ee"
_MLPS: dict[str, tuple[str, ...]] = {
    "2e0d5d5dabba46ab": ("gate_proj", "up_proj"),  # nearly all: down(act(gate) * up)
    "73cd9698c51a3162": ("gate_proj", "up_proj"),  # Glm5Next
    "0e531eacb2dea827": ("gate_proj", "up_proj"),  # DeepseekV4
    _MINIMAX_MLP: ("gate_up_proj",),  # MiniMaxM3VL
    _UNGATED_MLP: ("up_proj",),  # NemotronH
}
# Those that clamp, and the attribute with the limit.
_CLAMPS = {"73cd9698c51a3162": "swiglu_limit", "0e531eacb2dea827": "limit"}


def read(block: Any) -> Block:
    """What ``block`` computes, in the terms of :mod:`moekit.nn`.

    Raises:
        TypeError: a block that is not known; the message says what about it is not.
    """
    try:
        gates.learn_transformers(importlib.import_module("transformers.activations"))
    except ImportError as error:
        raise ImportError("moekit.nn.MoE.from_transformers needs Transformers: pip install 'moekit[hf]'") from error
    form = _BLOCKS.get(_digest(block))
    if form is None:
        raise _unknown(type(block), "forward")
    for name in form.off:
        if getattr(block, name):
            wanted = "0 (it changes what the experts see in training, or how they are chosen)"
            raise _check.wrong_type(_OP, f"{type(block).__name__}.{name}", wanted, getattr(block, name))
    for name in form.identity:
        if type(getattr(block, name)) is not nn.Identity:
            raise _check.wrong_type(_OP, f"{type(block).__name__}.{name}", "an nn.Identity", type(getattr(block, name)))
    experts, null_experts, slots = _experts(block.experts)
    router, found = _router(block, form)
    slots += found
    shared = None
    if form.shared is not None and getattr(block, form.shared) is not None:
        shared, found = _shared(getattr(block, form.shared))
        if form.shared_gate is not None:
            shared["gate"] = True
            found.append(Slot("shared.gate", (_linear(block, form.shared_gate).weight,)))
        slots += found
    return Block(router, experts, shared, null_experts, slots)


# --- what is known ----------------------------------------------------------------------------------------------------


def _digest(module: Any) -> str:
    """The digest of the ``forward`` of a module that nobody touched, or nothing."""
    kind = type(module)
    if not isinstance(module, nn.Module) or kind.__call__ is not nn.Module.__call__ or gates._attached(module):
        return ""
    return gates.digest(kind.forward) if type(kind.forward) is FunctionType else ""


def _unknown(kind: type, what: str) -> TypeError:
    got = f"{kind.__name__}, whose {what} is not known (or has hooks, a patch or a parametrisation on it)"
    return _check.wrong_type(_OP, "block", "one whose code moekit knows", got)


def _own(module: Any, name: str) -> Tensor:
    """A parameter or buffer of ``module`` that is stored as such, and is what it seems."""
    if name not in module._parameters and name not in module._buffers:
        raise _check.wrong_type(_OP, f"{type(module).__name__}.{name}", "a parameter or buffer of its own", "another thing")
    value = plain(module, name)
    if isinstance(value, PackedExperts):
        got = f"one packed in {value.format}; unpack it (moekit.hf.unpack)"
        raise _check.wrong_type(_OP, f"{type(module).__name__}.{name}", "a floating-point tensor", got)
    if value.is_meta:
        raise _check.wrong_type(_OP, f"{type(module).__name__}.{name}", "a tensor with numbers", 'one on "meta"')
    return value


def _linear(module: Any, name: str) -> nn.Linear:
    linear = getattr(module, name)
    if type(linear) is not nn.Linear or gates._attached(linear):
        raise _unknown(type(module), name)
    _own(linear, "weight")
    return linear


# --- the router ---------------------------------------------------------------------------------------------------------


def _router(block: Any, form: _Form) -> tuple[dict[str, Any], list[Slot]]:
    routers = importlib.import_module("moekit.hf.routers")
    router = getattr(block, form.router)
    spec = None if gates._attached(router) else routers.spec_of(router)
    if spec is None:
        raise _unknown(type(block), f"router ({type(router).__name__})")
    given = form.bias is not None and (form.bias_switch is None or bool(getattr(block, form.bias_switch)))
    handed = _own(block, form.bias) if form.bias is not None and given else None
    others = () if form.bias is None else (handed,)
    weight, bias = _map_of(spec, router, others, form.flat)
    row = weight.detach().new_zeros(1, weight.shape[1])
    options = dict(spec.options(router, (row if form.flat else row.unsqueeze(0), *others), {}))
    slots = [Slot("router.weight", (weight,))] + ([] if bias is None else [Slot("router.bias", (bias,))])
    for name, ours in (("bias", "expert_bias"), ("expert_scale", "expert_scale")):
        value = options.pop(name, None)
        options[ours] = value is not None
        if value is not None:
            slots.append(Slot(f"router.{ours}", (_tensor_of(router, value, handed),)))
    if form.scale is not None:
        options["scale"] = (1.0 if options.get("scale") is None else options["scale"]) * getattr(block, form.scale)
    options["logit_bias"] = bias is not None
    strange = [name for name, value in options.items() if isinstance(value, Tensor)]
    if strange:
        raise _unknown(type(block), f"router's {strange[0]} (a tensor)")
    wide = {"dtype": torch.float64} if weight.dtype is torch.float64 else {}
    return {"hidden": weight.shape[1], "num_experts": weight.shape[0], **options, **wide, "device": weight.device}, slots


def _map_of(spec: Any, router: Any, others: tuple, flat: bool) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a router's linear map: its own, or those of the one ``nn.Linear`` that it has.

    That its logits are this map of its tokens is tried, with other numbers in the place of its own.
    """
    linears = [name for name, child in router._modules.items() if type(child) is nn.Linear]
    own = "weight" in router._parameters
    if not own and len(linears) != 1:
        raise _unknown(type(router), "linear map")
    holder = router if own else _linear(router, linears[0])
    weight = _own(holder, "weight")
    bias = None if holder._parameters.get("bias") is None else _own(holder, "bias")
    trial = _with_other_numbers(router, torch.Generator().manual_seed(0))
    tried: Any = trial if own else getattr(trial, linears[0])
    probe = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    with torch.no_grad():
        logits = spec.logits(trial, (probe if flat else probe.unsqueeze(0), *others), {}).double()
    product = probe.double() @ tried.weight.double().T
    for found, used in ((bias, 0 if bias is None else tried.bias.double()), (None, 0)):
        if logits.shape == product.shape and torch.allclose(logits, product + used, rtol=1e-4, atol=1e-4):
            return weight, found
    raise _unknown(type(router), "map from tokens to logits")


def _with_other_numbers(module: Any, generator: torch.Generator) -> Any:
    """A module like this one with float32 parameters drawn on the CPU; the module itself is left alone."""
    drawn = {
        name: None if value is None else torch.randn(value.shape, generator=generator, dtype=torch.float32)
        for name, value in module._parameters.items()
    }
    children = {name: child and _with_other_numbers(child, generator) for name, child in module._modules.items()}
    trial = object.__new__(type(module))
    trial.__dict__.update(module.__dict__, _parameters=drawn, _modules=children)
    return trial


def _tensor_of(router: Any, value: Tensor, handed: Tensor | None) -> Tensor:
    """The tensor of the block or its router of which ``value`` is a view, to be written to."""
    stored = [tensor for owner in router.modules() for tensor in (*owner._parameters.values(), *owner._buffers.values())]
    for tensor in [handed, *stored]:
        if tensor is not None and tensor.data_ptr() == value.data_ptr() and tensor.numel() == value.numel():
            return tensor.detach().view(-1)
    raise _unknown(type(router), "vector of experts")


# --- experts ------------------------------------------------------------------------------------------------------------


def _experts(module: Any) -> tuple[dict[str, Any], int, list[Slot]]:
    """Keyword arguments of :class:`moekit.nn.Experts`, how many experts are null, and the weights."""
    if _digest(module) == _LONGCAT_EXPERTS:
        return _longcat_experts(module)
    options = gates.fused_options(module) if _decorated(module) else None
    if options is None:
        raise _unknown(type(module), "gate, or the way its experts are called,")
    first = "gate_up_proj" if module.has_gate else "up_proj"
    turned = module.is_transposed
    slots = [
        Slot("experts.gate_up", (_own(module, first),), turned),
        Slot("experts.down", (_own(module, "down_proj"),), turned),
    ]
    if module.has_bias:
        slots += [Slot(f"experts.{ours}_bias", (_own(module, f"{theirs}_bias"),)) for ours, theirs in
                  (("gate_up", first), ("down", "down_proj"))]  # fmt: skip
    return {**_sizes(slots), **options, "bias": bool(module.has_bias)}, 0, slots


def _decorated(module: Any) -> bool:
    """Whether the experts' ``forward`` is the one that Transformers' decorator makes, and nobody touched it."""
    home = importlib.import_module("transformers.integrations.moe")
    forward = type(module).forward
    if type(forward) is not FunctionType or gates._attached(module) or type(module).__call__ is not nn.Module.__call__:
        return False
    return forward.__code__.co_filename == home.__file__ and hasattr(module, "has_gate")


def _longcat_experts(module: Any) -> tuple[dict[str, Any], int, list[Slot]]:
    """LongcatFlash: the first ``num_routed_experts`` compute, the others give the token back."""
    real, activation = module.num_routed_experts, gates._activation(module)
    if activation is None or not real or type(module.identity_expert) is not nn.Identity:
        raise _unknown(type(module), "activation, or what its null experts do,")
    slots = [
        Slot("experts.gate_up", (_own(module, "gate_up_proj").detach()[:real],)),
        Slot("experts.down", (_own(module, "down_proj"),)),
    ]
    return {**_sizes(slots), "activation": activation, "bias": False}, module.zero_expert_num, slots


def _sizes(slots: list[Slot]) -> dict[str, Any]:
    weight = slots[1].parts[0]
    num_experts, hidden, intermediate = (weight.mT if slots[1].transposed else weight).shape
    sizes = {"num_experts": num_experts, "hidden": hidden, "intermediate": intermediate}
    return {**sizes, "dtype": weight.dtype, "device": weight.device}


# --- the shared expert ----------------------------------------------------------------------------------------------------


def _shared(module: Any) -> tuple[dict[str, Any], list[Slot]]:
    """Keyword arguments of :class:`moekit.nn.SharedExpert`, and the weights."""
    options, slots = mlp(module)
    weight = slots[1].parts[0]
    sizes = {"hidden": weight.shape[0], "intermediate": weight.shape[1], "dtype": weight.dtype, "device": weight.device}
    return {**sizes, **options}, slots


def mlp(module: Any) -> tuple[dict[str, Any], list[Slot]]:
    """The options of a dense MLP, and its weights under the names of a shared expert.

    Raises:
        TypeError: one whose code is not known.
    """
    if "transformers.activations" in sys.modules:
        gates.learn_transformers(sys.modules["transformers.activations"])
    digest = _digest(module)
    names = _MLPS.get(digest)
    options = None if names is None else _mlp_options(module, digest)
    if names is None or options is None:
        raise _unknown(type(module), "forward or activation")
    firsts, down = [_linear(module, name) for name in names], _linear(module, "down_proj")
    slots = [Slot("shared.gate_up", tuple(linear.weight for linear in firsts)), Slot("shared.down", (down.weight,))]
    biases = [linear.bias for linear in (*firsts, down)]
    if any((bias is None) != (down.bias is None) for bias in biases):
        raise _unknown(type(module), "choice of biases")
    if down.bias is not None:
        slots += [Slot("shared.gate_up_bias", tuple(biases[:-1])), Slot("shared.down_bias", (down.bias,))]
    return {**options, "bias": down.bias is not None}, slots


def _mlp_options(module: Any, digest: str) -> dict[str, Any] | None:
    """The gate of an MLP as arguments of :func:`moekit.glu`, None where its activation or its limit is not known."""
    if digest == _MINIMAX_MLP:
        return gates._minimax(module)
    activation, clamp = gates._activation(module), _CLAMPS.get(digest)
    if activation is None:
        return None
    if digest == _UNGATED_MLP:
        return {"activation": activation, "layout": "ungated"}
    if clamp is None:
        return {"activation": activation}
    limit = getattr(module, clamp)
    return {"activation": activation, "clamp": limit} if gates._is_limit(limit) else None
