"""Models with packed experts: from checkpoints that others packed, trained, and beside other libraries' quantisation."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _hf import K, T, chosen, make
from _packed import assert_same, causal, packed_names
from test_hf import build, tokens
from torch import Tensor, nn

import moekit.hf
from moekit.packed import PackedExperts

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
BLOCK = 16


@pytest.fixture(autouse=True)
def registered():
    transformers.logging.disable_progress_bar()
    moekit.hf.register()
    yield
    moekit.hf.unregister()


# --- checkpoints that others packed ---------------------------------------------------------------------------------


def published(folder: Path, model: nn.Module, rewrite: Callable, **quantization: object) -> Path:
    """A checkpoint of ``model`` whose tensors went through ``rewrite``, that says how it is quantised."""
    model.save_pretrained(folder)
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(3)
    tensors = [pair for name, value in load_file(file).items() for pair in rewrite(name, value, generator)]
    save_file(dict(tensors), file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def in_mxfp4(name: str, value: Tensor, generator: torch.Generator) -> list[tuple[str, Tensor]]:
    """gpt-oss's layout: bytes and exponents of ``[E, out, in]`` in blocks of 32 along ``in``."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return [(name, value)]
    experts, inputs, outputs = value.shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 128, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
    return [(f"{name}_blocks", blocks), (f"{name}_scales", scales)]


def in_fp8(
    name: str, value: Tensor, generator: torch.Generator, *, block: int = BLOCK, four_bits: bool = False, scale: str = ""
) -> list[tuple[str, Tensor]]:
    """DeepSeek-V3's layout: codes and a scale for each block of a linear layer; with experts in 4 bits, DeepSeek-V4's."""
    if value.dim() != 2 or (not name.endswith("proj.weight") and "experts" not in name):
        return [(name, value)]
    (height, width), base = value.shape, name.removesuffix("weight")
    scale = base + (scale or "weight_scale_inv")
    if four_bits and ".experts." in name:
        codes = torch.randint(-128, 128, (height, width // 2), generator=generator, dtype=torch.int8)
        exponents = torch.randint(118, 130, (height, width // 32), generator=generator, dtype=torch.uint8)
        return [(name, codes), (scale, exponents.view(torch.float8_e8m0fnu))]
    codes = (10 * torch.randn(height, width, generator=generator)).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-height // block), -(-width // block), generator=generator) / 50
    if scale.endswith(".scale"):  # DeepSeek-V4's are powers of two
        scales = torch.exp2(scales.log2().round()).to(torch.float8_e8m0fnu)
    return [(name, codes), (scale, scales[0, 0] if block > max(height, width) else scales)]


def assert_stands_for(model: nn.Module, dense: nn.Module, format: str, count: int) -> None:
    """Packed weights of that format have the dense model's values; all else is equal."""
    for (name, ours), (_, theirs) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        if isinstance(ours, PackedExperts):
            assert ours.format == format and not ours.requires_grad and ours.dtype is theirs.dtype
            ours = ours.unpack()
        assert torch.equal(ours, theirs.to(ours.dtype)), name  # Transformers' own forgets what is kept in float32
    assert len(packed_names(model)) == count


def dequantised(folder: Path, config: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kwargs = {} if config is None else {"quantization_config": config}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def test_gpt_oss_stays_in_mxfp4(tmp_path):
    folder = published(tmp_path, causal("GptOss"), in_mxfp4, quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    dense = dequantised(folder, transformers.Mxfp4Config(dequantize=True))
    model = moekit.hf.load(folder)
    assert_stands_for(model, dense, "mxfp4", 4)
    with torch.no_grad():
        expected = dense(tokens()).logits.float()
        assert (model(tokens()).logits.float() - expected).norm() <= 2**-7 * expected.norm()
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert_same(moekit.hf.load(tmp_path / "again"), model)


def test_gpt_oss_in_another_format_and_in_part(tmp_path):
    folder = published(tmp_path, causal("GptOss"), in_mxfp4, quant_method="mxfp4")
    dense = dequantised(folder, transformers.Mxfp4Config(dequantize=True))
    left = "model.layers.1.mlp.experts"
    model = moekit.hf.load(folder, "nf4", double_quant=True, skip=[left])
    moekit.hf.pack(dense, "nf4", double_quant=True, skip=[left])
    assert_same(model, dense)
    assert packed_names(model) == [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]


DEEPSEEK_V3 = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
DEEPSEEK_V3 |= {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}


@pytest.mark.parametrize(("kind", "settings", "count"), [("Qwen3Moe", {}, 4), ("DeepseekV3", DEEPSEEK_V3, 2)])
def test_block_fp8_stays_as_it_is(kind, settings, count, tmp_path):
    folder = published(tmp_path, causal(kind, **settings), in_fp8, quant_method="fp8", weight_block_size=[BLOCK, BLOCK])
    model = moekit.hf.load(folder)
    assert_stands_for(model, dequantised(folder, None), "fp8", count)
    stored = model.get_parameter(packed_names(model)[0]).stored()
    assert stored.block == (BLOCK, BLOCK) and stored.scales[0].dtype is F32
    model.save_pretrained(tmp_path / "again")
    assert_same(moekit.hf.load(tmp_path / "again"), model)
    moekit.hf.unpack(model).save_pretrained(tmp_path / "dense")
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), model)


def test_fp8_with_a_scale_a_matrix(tmp_path):
    """Gate and up have one each; so each row of the stack gets its own."""
    rewrite = functools.partial(in_fp8, block=1000)
    folder = published(tmp_path, causal("Qwen3Moe"), rewrite, quant_method="fp8", weight_block_size=None)
    model = moekit.hf.load(folder)
    saved = load_file(folder / "model.safetensors")
    for expert in range(4):
        prefix = f"model.layers.0.mlp.experts.{expert}"
        names = [f"{prefix}.{half}_proj.weight" for half in ("gate", "up")]
        wanted = torch.cat([(saved[name].float() * saved[f"{name}_scale_inv"]).to(BF16) for name in names])
        assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj.unpack()[expert], wanted)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(name), (saved[name].float() * saved[f"{name}_scale_inv"]).to(BF16))
    model.save_pretrained(tmp_path / "again")
    assert_same(moekit.hf.load(tmp_path / "again"), model)


def test_deepseek_v4_has_experts_in_4_bits(tmp_path):
    if not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip("not in this release")
    rewrite = functools.partial(in_fp8, four_bits=True, scale="scale")
    settings = {"n_routed_experts": 4, "n_shared_experts": 1, "q_lora_rank": 32, "head_dim": 16, "qk_rope_head_dim": 8}
    model = causal("DeepseekV4", **settings, num_key_value_heads=1)
    how = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    folder = published(tmp_path, model, rewrite, **how)
    model = moekit.hf.load(folder)
    assert_stands_for(model, dequantised(folder, None), "mxfp4", 4)
    model.save_pretrained(tmp_path / "again")
    assert_same(moekit.hf.load(tmp_path / "again"), model)


def test_fp8_in_another_format(tmp_path):
    folder = published(tmp_path, causal("Mixtral"), in_fp8, quant_method="fp8", weight_block_size=[BLOCK, BLOCK])
    model, dense = moekit.hf.load(folder, "int8"), dequantised(folder, None)
    moekit.hf.pack(dense, "int8")
    assert_same(model, dense)


def test_codes_without_scales_are_refused(tmp_path):
    def rewrite(name, value, generator):
        made = in_fp8(name, value, generator)
        return made[:1] if "experts.2.up_proj" in name else made

    folder = published(tmp_path, causal("Qwen3Moe"), rewrite, quant_method="fp8", weight_block_size=[BLOCK, BLOCK])
    with pytest.raises(RuntimeError, match="conversion of the weights"), pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr("transformers.modeling_utils.logger.warning", shown.append)
        moekit.hf.load(folder)
    assert "gate_up_proj must be codes with a tensor of scales each, got 4 with 3" in "".join(shown)


# --- trained --------------------------------------------------------------------------------------------------------


def pair(kind: str = "Qwen3Moe") -> tuple[nn.Module, nn.Module]:
    """A packed model in float32, and the same with dense experts that are frozen."""
    model = build(kind, "eager")
    moekit.hf.pack(model)
    dense = moekit.hf.unpack(copy.deepcopy(model))
    for name in packed_names(model):
        dense.get_parameter(name).requires_grad_(False)
    return model, dense


def gradients(model: nn.Module, **settings: object) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", BF16, **{"enabled": False, **settings}):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_gradients_are_those_of_frozen_dense_experts(kind):
    model, dense = pair(kind)
    assert_close(gradients(model), gradients(dense), 1e-5)
    assert_close(gradients(model, enabled=True), gradients(dense, enabled=True), 2**-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, _ = pair()
    expected = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train().enable_input_require_grads()
    assert_close(gradients(model), expected, 1e-6)


def test_compiled_as_one_graph():
    experts = pair()[0].model.layers[0].mlp.experts
    x, indices = torch.randn(T, 32), chosen(False)
    weights = torch.rand(T, K)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, indices, weights), experts(x, indices, weights))


def test_moved_and_cast():
    model, _ = pair()
    expected, before = model(tokens()).logits, model.get_memory_footprint()
    assert model.num_parameters() == build("Qwen3Moe", "eager").num_parameters()
    stored = sum(p.bytes if isinstance(p, PackedExperts) else p.nbytes for p in model.parameters())
    assert model.get_memory_footprint(return_buffers=False) == stored < before
    low = copy.deepcopy(model).to(BF16)
    weight = low.model.layers[0].mlp.experts.down_proj
    assert weight.dtype is BF16 and weight.bytes == model.model.layers[0].mlp.experts.down_proj.bytes
    assert (low(tokens()).logits - expected).norm() < 2**-5 * expected.norm()
    assert copy.deepcopy(model).to("meta").model.layers[0].mlp.experts.down_proj.is_meta
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="is not supported for quantized model"):
            cast()
    with pytest.raises(RuntimeError, match="packed weights are frozen"):
        model.requires_grad_(True)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_other_implementations_say_what_takes_packed_weights(implementation):
    model, _ = pair()
    model.set_experts_implementation(implementation)
    with pytest.raises(TypeError, match=r"not defined for packed weights \(.* with experts_implementation='moekit'\)"):
        model(tokens())


def test_the_trainer_trains_saves_and_takes_up_again(tmp_path):
    pytest.importorskip("accelerate")
    model, _ = pair()
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if name not in packed_names(model)}
    stored = copy.deepcopy(model)
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    settings = {"max_steps": 2, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    settings |= {"learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(tmp_path, per_device_train_batch_size=2, **settings)
    transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data).train()
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert all(torch.equal(model.get_parameter(n).unpack(), stored.get_parameter(n).unpack()) for n in packed_names(model))
    assert_same(moekit.hf.load(tmp_path / "checkpoint-2"), model)


def test_prepared_for_kbit_training():
    peft = pytest.importorskip("peft")
    model = causal("Qwen3Moe")
    moekit.hf.pack(model)
    expected = model(tokens()).logits.float()
    prepared = peft.prepare_model_for_kbit_training(model)
    weight = prepared.get_parameter(packed_names(prepared)[0])
    assert weight.dtype is F32 and prepared.lm_head.weight.dtype is F32
    logits = prepared(tokens()).logits
    assert logits.dtype is F32 and (logits - expected).norm() < 2**-6 * expected.norm()
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


def test_a_model_in_a_wrapper_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("Qwen3Moe", "eager"), peft.LoraConfig(target_modules=["q_proj"]))
    report = moekit.hf.pack(model)
    assert len(report.packed) == 4 and model.base_model.model.is_quantized
    assert model.base_model.model.config._experts_implementation == "moekit"
    model(tokens(), labels=tokens()).loss.backward()
    moekit.hf.unpack(model)
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "lora" not in name)


# --- beside other libraries -----------------------------------------------------------------------------------------


def test_bitsandbytes_leaves_experts_to_be_packed(tmp_path):
    """load_in_4bit packs linear layers; experts stay in bfloat16 until they are packed, and run either way."""
    pytest.importorskip("bitsandbytes")
    causal("Qwen3Moe").save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=BF16)
    kwargs = {"quantization_config": config, "experts_implementation": "moekit"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
    assert type(model.model.layers[0].mlp.experts.down_proj) is nn.Parameter and model(tokens()).logits.isfinite().all()
    quantizer = model.hf_quantizer
    assert len(moekit.hf.pack(model).packed) == 4 and model.quantization_method == "bitsandbytes"
    assert model(tokens()).logits.isfinite().all() and model.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="quantized with bitsandbytes and is not serializable"):
        model.save_pretrained(tmp_path / "packed")
    assert moekit.hf.unpack(model).hf_quantizer is quantizer


def test_bitsandbytes_parametrised_experts_run_dequantised():
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    module = make(Qwen3MoeExperts, hidden_size=64, moe_intermediate_size=64)  # bitsandbytes is wrong on a CPU for less
    module.config._experts_implementation = "moekit"
    wanted = copy.deepcopy(module)
    moekit.hf.pack(wanted)
    for name in ("gate_up_proj", "down_proj"):
        parametrize.replace_parameter_4bit(module, name)
    inputs = torch.randn(T, 64), chosen(False), torch.rand(T, K)
    expected = wanted(*inputs)
    assert (module(*inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="gate_up_proj: computed by a parametrisation"):
        moekit.hf.pack(module)


def test_transformers_own_mxfp4_experts_are_named():
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    config = transformers.GptOssConfig(num_local_experts=2, intermediate_size=32, hidden_size=32)
    layer = nn.ModuleDict({"experts": Mxfp4GptOssExperts(config)})
    with pytest.raises(ValueError, match=r"experts: .*load the checkpoint with moekit.hf.load"):
        moekit.hf.pack(layer)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A dense one and a packed one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = causal("Qwen3Moe")
    model.save_pretrained(folder / "dense")
    moekit.hf.pack(model)
    model.save_pretrained(folder / "packed")
    moekit.hf.unregister()
    return {"dense": folder / "dense", "packed": folder / "packed"}


BAD = {
    "format": ("dense", {"format": "int4"}, ValueError, "pack: format must be one of"),
    "nothing to pack": ("dense", {"skip": ["model"]}, ValueError, "hf.load: model must be one with experts .* as asked for"),
    "an implementation": (
        "dense",
        {"experts_implementation": "eager"},
        ValueError,
        "experts_implementation must be 'moekit'",
    ),
    "a quantiser": (
        "dense",
        {"quantization_config": {}},
        NotImplementedError,
        r"then pack the experts: moekit.hf.pack\(model",
    ),
    "a plan": ("dense", {"tp_plan": "auto"}, NotImplementedError, "tp_plan: packed experts are not sharded"),
    "offloading": ("dense", {"device_map": {"lm_head": "disk", "": "cpu"}}, ValueError, "packed experts are not offloaded"),
    "another format": ("packed", {"format": "int8"}, ValueError, r"format must be 'nf4', as the checkpoint has it"),
    "options": ("packed", {"double_quant": True}, ValueError, "double_quant=True has no effect on a checkpoint"),
    "skip": ("packed", {"skip": ["model.layers.0"]}, ValueError, "has no effect on a checkpoint whose experts are packed"),
}


@pytest.mark.parametrize("name", BAD)
def test_load_checks_its_arguments(name, checkpoints):
    which, kwargs, error, message = BAD[name]
    if name == "a quantiser":
        kwargs = {"quantization_config": transformers.BitsAndBytesConfig()}
    with pytest.raises(error, match=message):
        moekit.hf.load(checkpoints[which], **kwargs)


def test_a_checkpoint_of_another_quantiser_is_refused(tmp_path):
    folder = published(tmp_path, causal("Qwen3Moe"), lambda *pair: [pair[:2]], quant_method="gptq", bits=4)
    with pytest.raises(NotImplementedError, match=r"quantised by 'gptq', .* moekit.hf.pack\(model\)"):
        moekit.hf.load(folder)


def test_a_truncated_checkpoint_is_refused(checkpoints, tmp_path):
    tensors = load_file(checkpoints["packed"] / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj.absmax"
    save_file({**tensors, name: tensors[name][:-1]}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoints["packed"] / "config.json").read_text())
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        moekit.hf.load(tmp_path)


def test_a_model_of_nn_says_what_to_do_with_packed_experts():
    import moekit.nn

    with pytest.raises(TypeError, match=r"Qwen3MoeExperts.gate_up_proj must be .* one packed in nf4; unpack it"):
        moekit.nn.MoE.from_transformers(pair()[0].model.layers[0].mlp)
