"""moekit.hf: every experts class of the installed Transformers, and whole models of several kinds."""

from __future__ import annotations

import importlib
import logging
import re
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moekit.hf

transformers = pytest.importorskip("transformers")
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

T, K, E = 11, 2, 5


def decorated_classes() -> list[tuple[str, str]]:
    """``(module, class)`` of everything that Transformers decorates, from its source."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for match in re.finditer(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE):
            found.append((f"transformers.models.{path.parent.name}.{path.stem}", match[1]))
    return found


NAMED = {
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "mlp_hidden_act": "relu2",
    "moe_latent_size": None,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 0.5,
}


class Settings(types.SimpleNamespace):
    """A configuration that has every field an experts class asks for, small and plausible."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in NAMED:
            return NAMED[name]
        if "expert" in name and "size" not in name:
            return E
        return 24 if "intermediate" in name else 16 if "hidden" in name else 1.0


@pytest.fixture(autouse=True)
def registered():
    moekit.hf.register()
    yield
    moekit.hf.unregister()


def run(module: torch.nn.Module, implementation: str, indices: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and every gradient of one forward and backward."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, module.down_proj.shape[2 if module.is_transposed else 1], generator=generator).to(dtype)
    weights = torch.rand(T, K, generator=generator).masked_fill(indices >= E, 0.0)
    x.requires_grad_(), weights.requires_grad_()
    module.config._experts_implementation = implementation
    module.zero_grad()
    out = module(x, indices, weights.to(dtype))
    out.float().square().sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **grads}


def chosen(sentinels: bool) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    if sentinels:
        indices[2, 0], indices[3] = E, E
    return indices


@pytest.mark.parametrize(("module_name", "class_name"), decorated_classes())
def test_item53_every_experts_class(module_name, class_name):
    module = getattr(importlib.import_module(module_name), class_name)(Settings(_experts_implementation="eager"))
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for sentinels in (False, True):
        # Eager code does not know expert-parallel slots; Transformers' own grouped_mm does.
        module._is_expert_parallel = sentinels
        indices = chosen(sentinels)
        expected = run(module, "grouped_mm" if sentinels else "eager", indices, torch.float32)
        actual = run(module, "moekit", indices.clone(), torch.float32)
        for name, value in expected.items():
            error = (actual[name] - value).abs().max() / value.abs().max()
            assert error < 1e-5, (name, sentinels, float(error))
    exact = run(module.double(), "moekit", chosen(False), torch.float64)["out"]
    low = run(module.to(torch.bfloat16), "moekit", chosen(False), torch.bfloat16)["out"]
    peer = run(module, "grouped_mm", chosen(False), torch.bfloat16)["out"]
    ours, theirs = ((out.double() - exact).norm() for out in (low, peer))
    assert ours <= theirs + 2**-9 * exact.norm()


def test_at_least_the_known_classes_are_found():
    assert len(decorated_classes()) >= 60


def test_gates_of_their_own_say_so_once(caplog):
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    moekit.hf._said.clear()
    module = MuseSparkExperts(Settings(_experts_implementation="moekit"))
    with caplog.at_level(logging.INFO, logger="moekit.hf"):
        for _ in range(3):
            module(torch.randn(T, 16), chosen(False), torch.rand(T, K))
    assert [r.message for r in caplog.records] == [
        "MuseSparkExperts has a gate, norm or hook of its own, or weights of two dtypes: its experts run unfused"
    ]


def test_a_users_subclass_with_another_gate_is_not_fused():
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Doubled(MixtralExperts):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, -1)
            return 2 * torch.tanh(gate) * up

    module = Doubled(Settings(_experts_implementation="grouped_mm"))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    expected = run(module, "grouped_mm", chosen(False), torch.float32)
    actual = run(module, "moekit", chosen(False), torch.float32)
    assert all((actual[n] - v).abs().max() < 1e-5 * v.abs().max() for n, v in expected.items())


def test_register_checks_its_argument_and_unregister_restores():
    with pytest.raises(ValueError, match=r"hf.register: save must be one of"):
        moekit.hf.register(save="none")
    assert "moekit" in ALL_EXPERTS_FUNCTIONS
    before = dict(ALL_EXPERTS_FUNCTIONS.items())
    moekit.hf.unregister()
    assert dict(ALL_EXPERTS_FUNCTIONS.items()) == {n: f for n, f in before.items() if n != "moekit"}


# --- whole models ---------------------------------------------------------------------------------------------------

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
}


def build(kind: str, implementation: str) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(**COMMON, **MODELS[kind])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    return model.train()


def tokens() -> Tensor:
    return torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", MODELS)
def test_item53_logits_gradients_and_twenty_steps(kind):
    eager, ours = build(kind, "eager"), build(kind, "moekit")
    ours.load_state_dict(eager.state_dict())
    assert ours.config._experts_implementation == "moekit"
    curves = []
    for model in (eager, ours):
        out = model(tokens(), labels=tokens())
        out.loss.backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        curve = []
        for _ in range(20):
            optimizer.step()
            optimizer.zero_grad()
            loss = model(tokens(), labels=tokens()).loss
            loss.backward()
            curve.append(loss.item())
        curves.append((out.logits.detach(), curve))
    (logits, curve), (our_logits, our_curve) = curves
    assert (our_logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert our_curve == pytest.approx(curve, rel=1e-4)
    assert curve[-1] < curve[0]


def test_item53_set_on_a_loaded_model_and_set_back():
    model = build("Qwen3Moe", "eager").eval()
    other = build("Qwen3Moe", "eager").eval()
    expected = model(tokens()).logits
    keys = list(model.state_dict())
    model.set_experts_implementation("moekit")
    assert (model(tokens()).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert other.config._experts_implementation == "eager"
    model.set_experts_implementation("eager")
    assert torch.equal(model(tokens()).logits, expected)
    assert list(model.state_dict()) == keys
