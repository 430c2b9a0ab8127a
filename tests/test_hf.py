"""moekit.hf: every experts class of the installed Transformers, and whole models of several kinds."""

from __future__ import annotations

import importlib
import logging
import re
from pathlib import Path

import pytest
import torch
from _hf import E, K, Settings, T, chosen, make, run
from torch import Tensor

import moekit.hf

transformers = pytest.importorskip("transformers")
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402


def decorated_classes() -> list[tuple[str, str]]:
    """``(module, class)`` of everything that Transformers decorates, from its source."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for match in re.finditer(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE):
            found.append((f"transformers.models.{path.parent.name}.{path.stem}", match[1]))
    return found


@pytest.fixture(autouse=True)
def registered():
    moekit.hf.register()
    yield
    moekit.hf.unregister()


@pytest.mark.parametrize(("module_name", "class_name"), decorated_classes())
def test_every_experts_class(module_name, class_name):
    module = make(getattr(importlib.import_module(module_name), class_name))
    for sentinels in (False, True):
        module._is_expert_parallel = sentinels
        indices = chosen(sentinels)
        absent = indices >= E  # which eager code does not know: there they are of an expert, with no weight
        expected = run(module, "eager", indices.masked_fill(absent, 0), torch.float32, absent=absent)
        expected["weights"].masked_fill_(absent, 0.0)
        actual = run(module, "moekit", indices.clone(), torch.float32)
        for name, value in expected.items():
            error = (actual[name] - value).abs().max() / value.abs().max()
            assert error < 1e-5 and actual[name].isfinite().all(), (name, sentinels, float(error))
    exact = run(module.double(), "moekit", chosen(False), torch.float64)["out"]
    low = run(module.to(torch.bfloat16), "moekit", chosen(False), torch.bfloat16)["out"]
    peer = run(module, "grouped_mm", chosen(False), torch.bfloat16)["out"]
    ours, theirs = ((out.double() - exact).norm() for out in (low, peer))
    assert ours <= theirs + 2**-9 * exact.norm()


def test_at_least_the_known_classes_are_found():
    assert len(decorated_classes()) >= 40  # of 5.12; 5.24 has 69


def test_gates_of_their_own_say_so_once(caplog):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Tanh(MixtralExperts):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, -1)
            return torch.tanh(gate) * up

    moekit.hf._said.clear()
    module = Tanh(Settings(_experts_implementation="moekit"))
    with caplog.at_level(logging.INFO, logger="moekit.hf"):
        for _ in range(3):
            module(torch.randn(T, 16), chosen(False), torch.rand(T, K))
    assert [r.message for r in caplog.records] == [
        "Tanh has a gate, norm or hook of its own, or weights of two dtypes: its experts run unfused"
    ]


def test_a_users_subclass_with_another_gate_is_not_fused():
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Doubled(MixtralExperts):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, -1)
            return 2 * torch.tanh(gate) * up

    module = make(Doubled)
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
def test_logits_gradients_and_twenty_steps(kind):
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


def test_set_on_a_loaded_model_and_set_back():
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
