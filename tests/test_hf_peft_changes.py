"""Adapters of PEFT where something was changed meanwhile (weights, forwards), and on moekit's own layers."""

from __future__ import annotations

import pytest
import torch
from _hf import make
from torch import Tensor, nn

import moekit.hf
import moekit.nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402

SIZES = {"hidden_size": 64, "moe_intermediate_size": 64}
NAMES = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(autouse=True)
def registered():
    moekit.hf.register()
    yield
    moekit.hf.unregister()


def adapted(module: nn.Module, names: list[str] = NAMES) -> nn.Module:
    """Experts with the adapters ``default`` and ``other`` of two weights, which are not zero."""
    torch.manual_seed(3)
    parent = nn.ModuleDict({"experts": module})
    config = peft.LoraConfig(r=2, lora_alpha=4, target_parameters=names, init_lora_weights=False)
    model = peft.get_peft_model(parent, config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    return parent["experts"]


def layers(wrapped: nn.Module) -> dict[str, nn.Module]:
    """The two wrappers by the names of their parameters."""
    return {layer.parameter_name: layer for layer in (wrapped, wrapped.base_layer)}


def values(weight: Tensor) -> Tensor:
    return weight.unpack() if isinstance(weight, moekit.PackedExperts) else weight.detach()


def close(found: Tensor, expected: Tensor) -> bool:
    """But for what int8 loses."""
    return float((found - expected).norm() / expected.norm()) < 0.02


def pack(wrapped: nn.Module) -> None:
    moekit.hf.pack(nn.ModuleDict({"experts": wrapped}), "int8")


def changed(wrapped: nn.Module, how: str) -> None:
    """Other weights in the place of those that adapters are merged into."""
    module = wrapped.get_base_layer()
    if how == "loaded":
        other = make(Qwen3MoeExperts, **SIZES)
        for parameter in other.parameters():
            parameter.data.neg_()
        moekit.hf.pack(nn.ModuleDict({"experts": other}), "int8")
        module.load_state_dict(other.state_dict())
    else:
        moekit.hf.unpack(nn.ModuleDict({"experts": wrapped}))
        with torch.no_grad():
            module.gate_up_proj += 1
            module.down_proj += 1
        if how == "packed again":
            pack(wrapped)


@pytest.mark.parametrize("how", ["loaded", "packed again", "packed after the first"])
def test_an_adapter_is_added_to_what_is_there_and_no_other_twice(how):
    wrapped = adapted(make(Qwen3MoeExperts, **SIZES))
    if how == "packed after the first":
        for layer in layers(wrapped).values():
            layer.merge(adapter_names=["default"])
        pack(wrapped)
    else:
        pack(wrapped)
        for layer in layers(wrapped).values():
            layer.merge(adapter_names=["default"])
        changed(wrapped, how)
    module = wrapped.get_base_layer()
    expected = {
        name: values(getattr(module, name)) + layer.get_delta_weight("other").detach()
        for name, layer in layers(wrapped).items()
    }
    for layer in layers(wrapped).values():
        layer.merge(adapter_names=["other"])
    for name, layer in layers(wrapped).items():
        assert close(values(getattr(module, name)), expected[name])
        with pytest.raises(RuntimeError, match=f"{name} was packed with adapters merged into it, or changed"):
            layer.unmerge()
        assert layer.merged_adapters == ["default", "other"]


def test_weights_that_were_unpacked_and_trained_stay_when_adapters_are_taken_out():
    wrapped = adapted(make(Qwen3MoeExperts, **SIZES))
    pack(wrapped)
    module = wrapped.get_base_layer()
    before = {name: values(getattr(module, name)) for name in layers(wrapped)}
    for layer in layers(wrapped).values():
        layer.merge()
    changed(wrapped, "trained")
    for name, layer in layers(wrapped).items():
        layer.unmerge()
        assert not isinstance(getattr(module, name), moekit.PackedExperts)
        assert close(values(getattr(module, name)), before[name] + 1)


def test_merged_weights_may_be_moved_to_another_dtype():
    wrapped = adapted(make(Qwen3MoeExperts, **SIZES))
    pack(wrapped)
    module, codes = wrapped.get_base_layer(), {}
    for name, layer in layers(wrapped).items():
        codes[name] = getattr(module, name).stored().codes.clone()
        layer.merge(adapter_names=["default"])
    wrapped.to(torch.bfloat16)
    for name, layer in layers(wrapped).items():
        layer.merge(adapter_names=["other"])
        layer.unmerge()
        weight = getattr(module, name)
        assert weight.dtype is torch.bfloat16 and torch.equal(weight.stored().codes, codes[name])


def call(wrapped: nn.Module) -> list[Tensor]:
    """Output and gradients of the adapters."""
    wrapped.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x, weights = torch.randn(7, 64, generator=generator), torch.rand(7, 2, generator=generator)
    indices = torch.randint(4, (7, 2), generator=generator)
    out = wrapped(x, indices, weights)
    out.square().sum().backward()
    found = {name: p.grad for name, p in wrapped.named_parameters() if "lora_" in name}
    assert all(grad is not None and grad.any() for grad in found.values()) and len(found) == 8
    return [out.detach(), *found.values()]


@pytest.mark.parametrize("order", ["hooked", "hooked, patched", "patched, hooked", "patched"])
def test_forwards_that_others_put_in_place(order):
    """Accelerate's hook hands on what it is called with; a function of somebody's own may not take adapters at all."""

    def put(module: nn.Module) -> None:
        for step in order.split(", "):
            if step == "hooked":
                add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
            else:
                own = module.forward
                module.forward = lambda hidden, indices, weights, own=own: 2 * own(hidden, indices, weights)

    found = []
    for implementation in ("moekit", "eager"):
        module = make(Qwen3MoeExperts, num_experts=4, **SIZES)
        put(module)
        wrapped = adapted(module)
        wrapped.get_base_layer().config._experts_implementation = implementation
        found.append(call(wrapped))
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max()


class OwnForward(moekit.nn.Experts):
    def forward(self, x, routing, exchange=None):
        return 2 * super().forward(x, routing, exchange)


@pytest.mark.parametrize("kind", ["dense", "nf4", "own forward"])
def test_adapters_of_moekits_own_layers(kind):
    torch.manual_seed(0)
    layer = moekit.nn.MoE.build(64, 64, num_experts=4, k=2, null_experts=1, shared_intermediate=32)
    if kind == "own forward":
        layer.experts.__class__ = OwnForward
    twin = moekit.nn.MoE.build(64, 64, num_experts=4, k=2, null_experts=1, shared_intermediate=32)
    twin.load_state_dict(layer.state_dict())
    twin.experts.__class__ = type(layer.experts)
    if kind == "nf4":
        for name in ("gate_up", "down"):
            packed = moekit.pack(getattr(layer.experts, name).data, "nf4")
            setattr(layer.experts, name, nn.Parameter(packed, requires_grad=False))
            getattr(twin.experts, name).data.copy_(packed.unpack())
    layer.experts = adapted(layer.experts, ["experts.gate_up", "experts.down"])
    for name, wrapper in layers(layer.experts).items():
        for adapter in ("default", "other"):
            getattr(twin.experts, name).data += (
                wrapper.get_delta_weight(adapter).detach() if kind != "nf4" else by_hand(wrapper, adapter)
            )
    x = torch.randn(2, 9, 64)
    found, expected = layer(x), twin(x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in layer.experts.named_parameters() if "lora_" in n)
    assert isinstance(layer.experts.get_base_layer(), moekit.nn.Experts)


def by_hand(wrapper: nn.Module, adapter: str) -> Tensor:
    """``scale * B A`` of each expert, from PEFT's layout of the factors."""
    first, second = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    first = first.detach().reshape(4, -1, first.shape[1])
    second = second.detach().reshape(second.shape[0], -1, 4).permute(2, 0, 1)
    delta = wrapper.scaling[adapter] * torch.bmm(second, first)
    return delta if delta.shape == wrapper.get_param().shape else delta.mT


def test_adapters_of_a_layer_whose_experts_are_spread_are_refused():
    layer = moekit.nn.Experts(4, 64, 64)
    wrapped = adapted(layer, ["experts.gate_up", "experts.down"])
    layer.sharding = object()  # as of moekit.ep.parallelize
    layer.gate_up.placements = layer.down.placements = ()  # as DTensors have
    with pytest.raises(NotImplementedError, match="its experts are sharded over ranks"):
        wrapped(torch.randn(3, 64), (torch.zeros(3, 1).long(), torch.ones(3, 1)))
