"""DistributedDataParallel around packed experts: all ranks get the first one's bytes, and adapters are trained as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moekit
import moekit.ep
import moekit.hf

EXPERTS, HIDDEN, INNER, TOPK, RANKS = 2, 64, 32, 2, 2
FORMATS = {"nf4": {}, "nf4 nested": {"double_quant": True}, "mxfp4": {}, "fp8": {}, "int8": {}}


class Layer(nn.Module):
    """Packed experts, one weight of them a buffer, with an adapter on the other."""

    def __init__(self, form: str) -> None:
        super().__init__()
        pack = lambda *shape: moekit.pack(torch.randn(*shape), form.split()[0], **FORMATS[form])  # noqa: E731
        self.gate_up = nn.Parameter(pack(EXPERTS, 2 * INNER, HIDDEN), requires_grad=False)
        self.register_buffer("down", pack(EXPERTS, HIDDEN, INNER))
        self.A, self.B = nn.Parameter(torch.randn(EXPERTS, 4, HIDDEN)), nn.Parameter(torch.randn(EXPERTS, 2 * INNER, 4))

    def forward(self, x: Tensor) -> Tensor:
        adapters = {"gate_up": moekit.Lora(self.A, self.B, 0.5)}
        return moekit.experts(x, moekit.route(x[:, :EXPERTS], TOPK), self.gate_up, self.down, lora=adapters)


def model(form: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), Layer(form))


def stored(layer: Layer) -> list[Tensor]:
    parts = [part for weight in (layer.gate_up, layer.down) for part in (weight.stored().codes, *weight.stored().scales)]
    return [part.contiguous().reshape(-1).view(torch.uint8).clone() for part in parts]


def everybody(value: Tensor) -> list[Tensor]:
    found = [torch.empty_like(value) for _ in range(RANKS)]
    dist.all_gather(found, value)
    return found


def trained(form: str) -> dict[str, Any]:
    """A backward pass of a model that is another on each rank until DDP has it, and what it should have given."""
    torch.manual_seed(dist.get_rank())
    built = model(form)
    before = [everybody(part) for part in stored(built[1])]
    names = moekit.ep.hide_from_ddp(built)
    called = DistributedDataParallel(built)
    x = torch.randn(5, HIDDEN)
    alone = torch.autograd.grad(built(x).square().mean(), [p for p in built.parameters() if p.requires_grad])
    called(x).square().mean().backward()
    return {
        "names": names,
        "differed": [not torch.equal(*parts) for parts in before],
        "equal": [torch.equal(mine, first) for mine, (first, _) in zip(stored(built[1]), before, strict=True)],
        "expected": [torch.stack(everybody(grad)).mean(0) for grad in alone],
        "found": [p.grad for p in built.parameters() if p.requires_grad],
    }


def tiny_model() -> Qwen3MoeForCausalLM:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 1}
    config = Qwen3MoeConfig(**sizes, vocab_size=16, moe_intermediate_size=64, num_experts=2, num_experts_per_tok=1)
    built = Qwen3MoeForCausalLM(config)
    moekit.hf.pack(built, "nf4")
    return built


def adapted() -> dict[str, Any]:
    """PEFT's adapters on a model of Transformers, which change names; other weights are those of the first rank by DDP."""
    torch.manual_seed(dist.get_rank())
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    built = get_peft_model(tiny_model(), LoraConfig(r=2, target_parameters=targets, init_lora_weights=False))
    names, called = moekit.ep.hide_from_ddp(built), DistributedDataParallel(built)
    packed = [weight for weight in built.parameters() if isinstance(weight, moekit.PackedExperts)]
    ids = torch.arange(8).view(1, 8) + dist.get_rank()
    called(input_ids=ids, labels=ids).loss.backward()
    values = [p.grad for p in built.parameters() if p.requires_grad] + [weight.stored().codes for weight in packed]
    equal, filled = [torch.equal(*everybody(value)) for value in values], [value.any().item() for value in values]
    return {"names": names, "equal": equal, "filled": filled}


def message(call: Any, *args: Any) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        call(*args)
    return str(error.value)


def on_a_rank() -> dict[str, Any]:
    found: dict[str, Any] = {form: trained(form) for form in FORMATS}
    found["adapted"] = adapted()
    rank, group = dist.get_rank(), dist.group.WORLD
    built = model("nf4")
    found["untold"] = message(DistributedDataParallel, built)
    found["alone in a bucket"] = message(dist._broadcast_coalesced, group, [built[1].gate_up.detach()], 1, 0)
    # Around more than what was told, and around a part of it.
    wider = nn.Sequential(built)
    found["wider"] = moekit.ep.hide_from_ddp(wider)
    for module in (wider, built, built[1]):
        DistributedDataParallel(module)
    other = model(("nf4", "int8")[rank])
    before = stored(other[1])
    found["others"] = message(moekit.ep.hide_from_ddp, other)
    found["not sent"] = all(torch.equal(a, b) for a, b in zip(before, stored(other[1]), strict=True))
    pair = [Layer("nf4"), Layer("nf4")]
    found["fewer"] = message(moekit.ep.hide_from_ddp, nn.ModuleList(pair[: 2 - rank]))
    # Ranks that register in another order; and a rank on its own, whose model has nothing to send.
    ordered = nn.ModuleDict({name: Layer("nf4") for name in (("a", "b"), ("b", "a"))[rank]})
    moekit.ep.hide_from_ddp(ordered, init_device_mesh("cpu", (RANKS,)))
    found["ordered"] = [torch.equal(*everybody(part)) for name in ("a", "b") for part in stored(ordered[name])]
    found["nothing"] = moekit.ep.hide_from_ddp(nn.Linear(2, 2)) if rank else ()
    found["no group"] = message(moekit.ep.hide_from_ddp, built, "world")
    found["meta"] = message(moekit.ep.hide_from_ddp, nn.ModuleList([Layer("nf4")]).to("meta"))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with moekit.backend("torch"):
        return on_ranks(on_a_rank, RANKS, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("form", FORMATS)
def test_all_ranks_have_the_bytes_of_the_first_and_the_gradients_of_all(ranks, form):
    for found in (rank[form] for rank in ranks):
        assert found["names"] == ("1.gate_up", "1.down")
        assert any(found["differed"]) and all(found["equal"])
        assert len(found["found"]) == 4
        for grad, expected in zip(found["found"], found["expected"], strict=True):
            assert grad.abs().max() > 1e-3
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_adapters_on_a_model_of_transformers(ranks):
    for found in (rank["adapted"] for rank in ranks):
        assert len(found["names"]) == 2 and all("base_layer" in name for name in found["names"])
        assert len(found["equal"]) == 6 and all(found["equal"]) and all(found["filled"])


def test_ddp_around_more_and_around_a_part(ranks):
    assert all(found["wider"] == ("0.1.gate_up", "0.1.down") for found in ranks)


@pytest.mark.parametrize("how", ["untold", "alone in a bucket"])
def test_a_model_that_ddp_was_not_told_about_is_refused_with_what_to_do(ranks, how):
    assert all("call moekit.ep.hide_from_ddp on what it is given" in found[how] for found in ranks)


def test_other_weights_on_another_rank_are_refused_on_all_and_stay(ranks):
    for found in ranks:
        assert "weight 1.gate_up" in found["others"] and "'nf4'" in found["others"] and "'int8'" in found["others"]
        assert found["not sent"]
        assert "weights: 4 on rank 0; 2 on rank 1" in found["fewer"] and "weight 1.down: " in found["fewer"]
        assert "group must be" in found["no group"] and "got str" in found["no group"]
        assert "must be in memory" in found["meta"]


def test_the_order_of_weights_and_ranks_without_any(ranks):
    for found in ranks:
        assert all(found["ordered"]) and len(found["ordered"]) == 8 and found["nothing"] == ()


def test_in_a_process_on_its_own_nothing_is_sent():
    built = model("nf4")
    before = stored(built[1])
    assert moekit.ep.hide_from_ddp(built) == ("1.gate_up", "1.down")
    assert all(torch.equal(a, b) for a, b in zip(before, stored(built[1]), strict=True))
    assert set(built._ddp_params_and_buffers_to_ignore) == {"1.gate_up", "1.down"}
    assert set(built[1]._ddp_params_and_buffers_to_ignore) == {"gate_up", "down"}
    assert moekit.ep.hide_from_ddp(nn.Linear(2, 2)) == ()


def test_what_is_unpacked_again_is_trained_by_all():
    built = tiny_model()
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(built, ["others"])
    assert len(moekit.ep.hide_from_ddp(built)) == 2 and len(built._ddp_params_and_buffers_to_ignore) == 3
    moekit.hf.unpack(built)
    assert [*built._ddp_params_and_buffers_to_ignore] == ["others"] and moekit.ep.hide_from_ddp(built) == ()


def test_started_by_torchrun_without_a_group_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        moekit.ep.hide_from_ddp(model("nf4"))
    assert moekit.ep.hide_from_ddp(nn.Linear(2, 2)) == ()


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"moekit.ep.hide_from_ddp: model must be a torch.nn.Module, got list"):
        moekit.ep.hide_from_ddp([])
