"""moekit.nn from and to the Mixture-of-Experts blocks of the installed Transformers: same weights, same outputs."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import Tensor, nn

from moekit.nn import MoE

transformers = pytest.importorskip("transformers")
pytest.importorskip("moekit.hf.routers")

RELEASE = "5.24."  # whose code was read
H, I, E = 16, 24, 4
NAMED = {
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "moe_latent_size": None,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 0.5,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_routed_scaling_factor": 1.7,
    "router_scaling_factor": 1.3,
    "route_scale": 1.3,
    "topk_method": "group_limited_greedy",
    "router_jitter_noise": 0.0,
    "scoring_func": "sqrtsoftplus",
    "moe_norm_min": 1e-12,
    "use_expert_bias": True,
    "zero_expert_num": 3,
    "router_bias": False,
    "moe_router_logit_softcapping": 3.0,
    "enable_moe_fp32_combine": False,
    "mlp_layer_types": ["moe"],
    "mlp_bias": False,
    "_experts_implementation": "eager",
}


class Settings:
    """A configuration that has every field a block asks for, small and plausible."""

    def __init__(self, **settings: object):
        self.__dict__.update(settings)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in NAMED:
            return NAMED[name]
        if name == "per_layer_config":
            return [self]
        if name.endswith("shared_experts"):
            return 1
        if "intermediate" in name or name == "expert_ffn_hidden_size":
            return I
        return H if "hidden" in name else E if "expert" in name else 1.0


BLOCKS = [
    "afmoe.AfmoeSparseMoeBlock", "aria.AriaTextMoELayer", "bailing_hybrid.BailingHybridMoE", "beam.BeamMoE",
    "deepseek_ocr2.DeepseekOcr2TextMoe", "deepseek_v2.DeepseekV2Moe", "deepseek_v3.DeepseekV3MoE",
    "deepseek_v32.DeepseekV32MoE", "deepseek_v4.DeepseekV4SparseMoeBlock", "dots1.Dots1MoE",
    "dots3_note.Dots3NoteTextMoE", "dots3_note.Dots3NoteVisionMoE", "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock",
    "exaone_moe.ExaoneMoeSparseMoEBlock", "flex_olmo.FlexOlmoSparseMoeBlock", "flint.FlintSparseMoeBlock",
    "glm4_moe.Glm4MoeMoE", "glm4_moe_lite.Glm4MoeLiteMoE", "glm4v_moe.Glm4vMoeTextMoE", "glm5_next.Glm5NextTextMoE",
    "glm_moe_dsa.GlmMoeDsaMoE", "gpt_oss.GptOssMLP", "granitemoe.GraniteMoeMoE", "granitemoe_swa.GraniteMoeSWAMoE",
    "granitemoehybrid.GraniteMoeHybridMoE", "granitemoeshared.GraniteMoeSharedMoE", "hunyuan_v1_moe.HunYuanMoEV1Moe",
    "hy_v3.HYV3MoE", "hy_v4.HYV4MoE", "hy_v4_vl.HYV4VLMoE", "jamba.JambaSparseMoeBlock", "kimi_linear.KimiLinearMoE",
    "kolibri1.Kolibri1SparseMoeBlock", "laguna.LagunaSparseMoeBlock", "lara_mini.LaraMiniSparseMoeBlock",
    "lfm2_moe.Lfm2MoeSparseMoeBlock", "longcat_flash.LongcatFlashMoE", "mellum.MellumSparseMoeBlock",
    "mimo_v2_flash.MiMoV2FlashMoE", "minimax.MiniMaxSparseMoeBlock", "minimax_m2.MiniMaxM2SparseMoeBlock",
    "minimax_m3_vl.MiniMaxM3VLSparseMoeBlock", "mistral4.Mistral4MoE", "mistral_large4.MistralLarge4TextMoE",
    "mixtral.MixtralSparseMoeBlock", "nemotron_h.NemotronHMoE", "olmoe.OlmoeSparseMoeBlock",
    "openai_privacy_filter.OpenAIPrivacyFilterMLP", "qwen2_moe.Qwen2MoeSparseMoeBlock",
    "qwen3_5_moe.Qwen3_5MoeSparseMoeBlock", "qwen3_moe.Qwen3MoeSparseMoeBlock", "qwen3_next.Qwen3NextSparseMoeBlock",
    "qwen3_omni_moe.Qwen3OmniMoeTalkerTextSparseMoeBlock", "qwen3_omni_moe.Qwen3OmniMoeThinkerTextSparseMoeBlock",
    "qwen3_vl_moe.Qwen3VLMoeTextSparseMoeBlock", "qwen4_exp.Qwen4ExpTextSparseMoeBlock", "solar_open.SolarOpenMoE",
    "unlimited_ocr.UnlimitedOcrTextMoe",
]  # fmt: skip


def kind_of(name: str) -> type:
    model, _, kind = name.partition(".")
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ModuleNotFoundError:
        pytest.skip(f"this release of Transformers has no {model}")
    return getattr(module, kind)


def make(name: str, seed: int = 0, **settings: object) -> nn.Module:
    """A block of Transformers with weights that give outputs of about one."""
    kind = kind_of(name)
    where = {"layer_idx": 0} if "layer_idx" in inspect.signature(kind.__init__).parameters else {}
    block = kind(Settings(**settings), **where)
    torch.manual_seed(seed)
    for value in [*block.parameters(), *block.buffers()]:
        if value.dtype.is_floating_point:
            nn.init.normal_(value, std=0.5)
    return block.eval()


def converted(block: nn.Module) -> MoE:
    """What moekit makes of a block, which other releases may write otherwise."""
    try:
        return MoE.from_transformers(block)
    except TypeError:
        if transformers.__version__.startswith(RELEASE):
            raise
        pytest.skip(f"this release of Transformers writes {type(block).__name__} otherwise")


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 9, H, generator=torch.Generator().manual_seed(1)).to(dtype)


def output(block: nn.Module, x: Tensor) -> Tensor:
    out = block(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", BLOCKS)
def test_there_and_back(name):
    block, x = make(name), tokens()
    layer = converted(block)
    assert not layer.training
    with torch.no_grad():
        expected = output(block, x)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        other = make(name, seed=7)
        assert not torch.allclose(output(other, x), expected, atol=1e-2)
        layer.to_transformers(other)
        assert torch.equal(output(other, x), expected)
    for key, value in block.state_dict().items():
        written = other.state_dict()[key]
        count = E if name.startswith("longcat") and key == "experts.gate_up_proj" else None  # the rest is never computed
        assert torch.equal(written[:count], value[:count]), key


VARIANTS = {
    "weights as they are": ("qwen2_moe.Qwen2MoeSparseMoeBlock", {"norm_topk_prob": False}),
    "two groups of two": ("deepseek_v3.DeepseekV3MoE", {"topk_group": 2}),
    "no normalising": ("glm4_moe.Glm4MoeMoE", {"norm_topk_prob": False}),
    "greedy": ("deepseek_v2.DeepseekV2Moe", {"topk_method": "greedy"}),
    "no bias": ("lfm2_moe.Lfm2MoeSparseMoeBlock", {"use_expert_bias": False}),
    "no shared expert": ("ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock", {"moe_num_shared_experts": 0}),
    "no softcap": ("laguna.LagunaSparseMoeBlock", {"moe_router_logit_softcapping": 0.0}),
    "gelu": ("qwen3_moe.Qwen3MoeSparseMoeBlock", {"hidden_act": "gelu_pytorch_tanh"}),
    "biases": ("longcat_flash.LongcatFlashMoE", {"router_bias": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_settings(name):
    kind, settings = VARIANTS[name]
    block, x = make(kind, **settings), tokens()
    layer = converted(block)
    with torch.no_grad():
        expected, found = output(block, x), layer(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["qwen2_moe.Qwen2MoeSparseMoeBlock", "gpt_oss.GptOssMLP", "mixtral.MixtralSparseMoeBlock"])
def test_gradients_in_float64(name):
    block = make(name).double()
    layer = converted(block)
    assert {value.dtype for value in layer.parameters()} == {torch.float64}
    results = []
    for each in (block, layer):
        x = tokens(torch.float64).requires_grad_()
        output(each, x).square().sum().backward()
        results.append(x.grad)
    # Some routers take their softmax in float32 whatever the dtype.
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4 * results[0].abs().max().item())
    gate = block.experts.down_proj.grad
    expected = gate.mT if block.experts.is_transposed else gate
    torch.testing.assert_close(layer.experts.down.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_half_precision_and_what_becomes_of_dtypes():
    block = make("deepseek_v3.DeepseekV3MoE").bfloat16()
    layer, x = converted(block), tokens(torch.bfloat16)
    assert layer.router.weight.dtype is torch.float32 and layer.experts.down.dtype is torch.bfloat16
    with torch.no_grad():
        expected = output(block, x)
        torch.testing.assert_close(layer(x), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert layer.training is block.training is False


def test_weights_are_copies():
    block = make("qwen3_moe.Qwen3MoeSparseMoeBlock")
    layer, before = converted(block), block.gate.weight.detach().clone()
    with torch.no_grad():
        for value in layer.parameters():
            value.zero_()
    assert torch.equal(block.gate.weight, before) and block.experts.down_proj.abs().max() > 0


def test_a_model_with_its_blocks_replaced():
    config = transformers.Qwen3MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(5))
    expected = model(ids).logits
    for layer in model.model.layers:
        layer.mlp = MoE.from_transformers(layer.mlp)
    found = model(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    assert model.model.layers[0].mlp.router.weight.grad.abs().max() > 0


# --- refusals -------------------------------------------------------------------------------------------------------


def hook(*_: object) -> None:
    return None


def hooked_block(block: nn.Module) -> None:
    block.register_forward_hook(hook)


def hooked_router(block: nn.Module) -> None:
    block.gate.register_forward_hook(hook)


def hooked_experts(block: nn.Module) -> None:
    block.experts.register_forward_pre_hook(hook)


def hooked_shared(block: nn.Module) -> None:
    block.shared_expert.register_forward_hook(hook)


def hooked_linear(block: nn.Module) -> None:
    block.shared_expert.down_proj.register_forward_hook(hook)


def patched_gate(block: nn.Module) -> None:
    block.experts._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[0].tanh()


def patched_forward(block: nn.Module) -> None:
    block.forward = lambda x: x


def another_activation(block: nn.Module) -> None:
    block.shared_expert.act_fn = nn.Tanh()


def parametrised(block: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(block.shared_expert.up_proj)


def another_router(block: nn.Module) -> None:
    class Router(type(block.gate)):
        def forward(self, hidden_states):
            return super().forward(-hidden_states)

    block.gate.__class__ = Router


def on_meta(block: nn.Module) -> None:
    block.to("meta")


CHANGES = [hooked_block, hooked_router, hooked_experts, hooked_shared, hooked_linear, patched_gate, patched_forward,
           another_activation, parametrised, another_router, on_meta]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_changed_is_refused(change):
    block = make("qwen2_moe.Qwen2MoeSparseMoeBlock")
    MoE.from_transformers(block)
    change(block)
    with pytest.raises(TypeError, match=r"nn.MoE.from_transformers: .* must be"):
        MoE.from_transformers(block)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("mixtral.MixtralSparseMoeBlock", {"router_jitter_noise": 0.1}, "jitter_noise must be 0"),
        ("deepseek_v4.DeepseekV4SparseMoeBlock", {"mlp_layer_types": ["hash_moe"], "vocab_size": 8}, "is_hash must be 0"),
        ("nemotron_h.NemotronHMoE", {"moe_latent_size": 8}, "fc1_latent_proj must be an nn.Identity"),
        ("llama4.Llama4TextMoe", {}, "Llama4TextMoe, whose forward is not known"),
        ("phimoe.PhimoeSparseMoeBlock", {"input_jitter_noise": 0.0}, "PhimoeSparseMoeBlock, whose forward is not known"),
    ],
)
def test_what_moekit_does_not_express_is_refused(name, settings, text):
    with pytest.raises(TypeError, match=text if transformers.__version__.startswith(RELEASE) else None):
        MoE.from_transformers(make(name, **settings))
    with pytest.raises(TypeError, match=r"Linear, whose forward is not known"):
        MoE.from_transformers(nn.Linear(2, 2))


def test_a_block_that_computes_something_else_is_left_alone():
    layer = converted(make("deepseek_v3.DeepseekV3MoE"))
    others = {
        "router": make("deepseek_v3.DeepseekV3MoE", routed_scaling_factor=1.0),
        "shape": make("deepseek_v3.DeepseekV3MoE", moe_intermediate_size=8),
        "k": make("deepseek_v3.DeepseekV3MoE", num_experts_per_tok=1),
        "shared": make("mimo_v2_flash.MiMoV2FlashMoE"),
    }
    for text, block in others.items():
        before = {name: value.clone() for name, value in block.state_dict().items()}
        with pytest.raises(ValueError, match=rf"nn.MoE.to_transformers: block must be one whose .*{text}"):
            layer.to_transformers(block)
        assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
