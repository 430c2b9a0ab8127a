"""moekit.hf where a module is traced, exported, planned on the meta device, or rebuilt at every step."""

from __future__ import annotations

import gc
import io
import logging
import warnings

import pytest
import torch
from _hf import E, K, Settings, T, chosen, make, run
from torch import Tensor, nn

import moekit.hf

transformers = pytest.importorskip("transformers")
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402


class OwnGate(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return torch.tanh(gate) * up


class OwnGateWithBias(GptOssExperts):
    def _apply_gate(self, gate_up):
        return torch.tanh(gate_up[..., ::2]) * gate_up[..., 1::2]


KINDS = [Qwen3MoeExperts, GptOssExperts, OwnGate, OwnGateWithBias]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def registered():
    moekit.hf.register()
    yield
    moekit.hf.unregister()


def module_of(kind: type) -> nn.Module:
    module = make(kind)
    module.config._experts_implementation = "moekit"
    return module


def inputs(tokens: int = T, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, E + 1, (tokens, K), generator=generator)
    return torch.randn(tokens, 16, generator=generator), indices, torch.rand(tokens, K, generator=generator)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


@every_kind
def test_compiled_without_a_break(kind):
    torch.compiler.reset()
    module = module_of(kind)
    moekit.hf._said.clear()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (6, 9, 13):
        assert_same(compiled(*inputs(tokens)), module(*inputs(tokens)))
    module.zero_grad()
    compiled(*inputs()).square().sum().backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(*inputs()).square().sum().backward()
    for ours, parameter in zip(found, module.parameters(), strict=True):
        assert_same(ours, parameter.grad)


def test_a_hook_is_compiled_too():
    torch.compiler.reset()
    module = module_of(Qwen3MoeExperts)
    module.act_fn.register_forward_hook(lambda m, a, out: out * 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*inputs()), module(*inputs()))


@every_kind
@pytest.mark.parametrize("grad", [False, True])
def test_jit_trace_on_another_input(kind, grad):
    module = module_of(kind)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        traced = torch.jit.trace(module, inputs(5), check_trace=False)
        saved = io.BytesIO()
        torch.jit.save(traced, saved)
        saved.seek(0)
        for function in (traced, torch.jit.load(saved)):
            for tokens in (5, 9, 1):
                assert_same(function(*inputs(tokens, 2)), module(*inputs(tokens, 2)))


@every_kind
def test_torch_export_with_a_dynamic_number_of_tokens(kind):
    module = module_of(kind)
    exported = torch.export.export(module, inputs(5), dynamic_shapes=({0: torch.export.Dim("tokens")},) * 3).module()
    assert_same(exported(*inputs(9)), module(*inputs(9)))


@every_kind
def test_onnx_export(kind):
    reference = pytest.importorskip("onnx.reference")
    module = module_of(kind).eval()
    x, _, weights = inputs(5)
    indices = torch.randint(0, E, (5, K), generator=torch.Generator().manual_seed(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (x, indices, weights), dynamo=True, verbose=False)
    names = [entry.name for entry in program.model_proto.graph.input]
    feed = {name: value.numpy() for name, value in zip(names, (x, indices, weights), strict=True)}
    (out,) = reference.ReferenceEvaluator(program.model_proto).run(None, feed)
    expected = module(x, indices, weights).detach()
    assert (torch.from_numpy(out) - expected).abs().max() <= 1e-5 * expected.abs().max()


@every_kind
@pytest.mark.parametrize("autocast", [False, True])
def test_meta_device_forward_and_backward(kind, autocast):
    module = module_of(kind).to("meta")
    args = [value.to("meta") for value in inputs()]
    args[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = module(*args)
        assert out.shape == (T, 16) and out.dtype is torch.float32 and out.device.type == "meta"
        out.sum().backward()
    assert all(value.grad.shape == value.shape for value in (args[0], *module.parameters()))


@every_kind
def test_autocast_of_mixed_dtypes(kind):
    """Under autocast everything is bfloat16, whatever the parameters are."""
    module = module_of(kind)
    exact = module(*inputs())
    module.down_proj.data = module.down_proj.data.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(*inputs())
    out.square().sum().backward()
    assert out.dtype is torch.float32
    assert module.down_proj.grad.dtype is torch.bfloat16 and module.gate_up_proj.grad.dtype is torch.float32
    assert (out - exact).norm() <= 0.02 * exact.norm()


def test_classes_that_peft_makes_leave_nothing_behind(caplog):
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = OwnGate(Settings(_experts_implementation="moekit"))

        def forward(self, *args):
            return self.experts(*args)

    moekit.hf._said.clear()
    adapter = peft.LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net(), adapter)
    with caplog.at_level(logging.INFO, logger="moekit.hf"):
        for _ in range(100):
            model(*inputs(2)).sum().backward()
    gc.collect()
    said = [record for record in caplog.records if record.name.startswith("moekit")]  # others may speak, too
    assert len(said) == len(moekit.hf._said) == 1
    assert not OwnGate.__subclasses__()


def test_lora_through_peft_is_as_in_eager_code():
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = make(Qwen3MoeExperts)

        def forward(self, *args):
            return self.experts(*args)

    adapter = peft.LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net(), adapter)
    x, _, weights = inputs()
    found = {}
    for implementation in ("eager", "moekit"):
        next(m for m in model.modules() if isinstance(m, Qwen3MoeExperts)).config._experts_implementation = implementation
        model.zero_grad()
        out = model(x, chosen(False), weights)
        out.square().sum().backward()
        found[implementation] = [out, *(p.grad for p in model.parameters() if p.requires_grad)]
    for ours, theirs in zip(found["moekit"], found["eager"], strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_messages_once_a_class_and_none_while_compiling(caplog):
    torch.compiler.reset()
    moekit.hf._said.clear()
    module = module_of(OwnGate)
    with caplog.at_level(logging.INFO, logger="moekit.hf"):
        torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs())
        assert not caplog.records
        for _ in range(2):
            run(module, "moekit", chosen(False), torch.float32)
    assert len(caplog.records) == 1
