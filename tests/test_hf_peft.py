"""moekit.hf and PEFT: adapters of experts reach moekit.experts as factors, and everything one does with them stays right."""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from _hf import K, T, chosen, make
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

import moekit.hf

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402

PROJECTIONS = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# 16 experts, so that nothing but their weights has as many elements.
MODELS = {
    "Qwen3Moe": {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "Mixtral": {"num_local_experts": 16},
    "GptOss": {"num_local_experts": 16, "num_experts_per_tok": 2, "head_dim": 8},
    "DeepseekV3": {
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "NemotronH": {
        "layers_block_type": ["attention", "moe"],
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
}


@pytest.fixture(autouse=True)
def registered():
    moekit.hf.register()
    moekit.hf._said.clear()
    yield
    moekit.hf.unregister()


def config_of(**settings: object) -> peft.LoraConfig:
    defaults = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_parameters": PROJECTIONS, "target_modules": []}
    return peft.LoraConfig(**{**defaults, **settings})


def base(kind: str, implementation: str) -> nn.Module:
    settings = {**COMMON, **MODELS[kind]}
    if "layers_block_type" in settings:
        del settings["num_hidden_layers"]
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation)


def adapted(kind: str = "Qwen3Moe", implementation: str = "moekit", **settings: object) -> nn.Module:
    """A model with adapters of its experts, the same ones for every implementation."""
    model = base(kind, implementation)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config_of(**settings)).train()


def wrapper_of(model: nn.Module) -> nn.Module:
    """The outermost wrapper of the experts of the first layer that has some."""
    return next(module for module in model.modules() if isinstance(module, ParamWrapper))


def tokens() -> Tensor:
    return torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(5))


def step(model: nn.Module) -> dict[str, Tensor]:
    """Loss, logits and every gradient."""
    model.zero_grad()
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    grads = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items() if g is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **{name: g.clone() for name, g in whole.items()}}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = float((actual[name] - value).detach().abs().max() / value.detach().abs().max())
        assert error <= tolerance, (name, error)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters of which PEFT makes a sum with an adapter from now on."""
    names: list[str] = []
    activate = ParamWrapper._activate_lora

    def seen(layer, adapters):
        names.append(layer.parameter_name)
        return activate(layer, adapters)

    monkeypatch.setattr(ParamWrapper, "_activate_lora", seen)
    return names


# --- values and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_against_pefts_parametrisation(kind, monkeypatch):
    eager, ours = adapted(kind, "eager"), adapted(kind)
    summed = watched(monkeypatch)
    curves = []
    for model in (eager, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
        found = [step(model)]
        for _ in range(20):
            optimizer.step()
            found.append(step(model))
        curves.append(found)
        assert bool(summed) == (model is eager)
        summed.clear()
    assert len([name for name in curves[0][0] if "lora" in name]) == 4
    assert_same(curves[1][0], curves[0][0])
    losses = [[float(found["loss"]) for found in curve] for curve in curves]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def largest_allocation(run: Callable[[], object]) -> int:
    """The bytes of the largest tensor that anything allocates, inside operators as well."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize(("kind", "dtype"), [("Qwen3Moe", torch.float32), ("GptOss", torch.bfloat16)])
def test_no_tensor_as_large_as_the_weights_is_allocated(kind, dtype):
    for implementation in ("moekit", "eager"):
        model = adapted(kind, implementation).to(dtype)
        step(model)
        module = wrapper_of(model).get_base_layer()
        # Float32 is what the smaller weight would take in no precision above its own.
        smallest = module.down_proj.numel() * module.down_proj.element_size()
        assert (largest_allocation(lambda model=model: step(model)) < smallest) == (implementation == "moekit")


def test_autocast_takes_float32_factors_beside_bfloat16_weights():
    exact = step(adapted())
    errors = []
    for implementation in ("moekit", "grouped_mm"):
        model = adapted(implementation=implementation)
        model.get_base_model().to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.float()
        with torch.autocast("cpu", torch.bfloat16):
            found = step(model)
        assert all(found[name].dtype is torch.float32 for name in found if "lora" in name)
        errors.append({name: (found[name].float() - value).norm() / value.norm() for name, value in exact.items()})
    for name, ours in errors[0].items():
        assert ours <= 1.2 * errors[1][name] + 2**-9, name


# --- what one does with adapters --------------------------------------------------------------------------------------


def _disabled(model: nn.Module) -> Tensor:
    with model.disable_adapter():
        return model(tokens()).logits


def _merged(model: nn.Module) -> Tensor:
    model.merge_adapter()
    return model(tokens()).logits


def _unmerged(model: nn.Module) -> Tensor:
    model.merge_adapter()
    model.unmerge_adapter()
    return model(tokens()).logits


def _unloaded(model: nn.Module) -> Tensor:
    return model.merge_and_unload()(tokens()).logits


def _switched(model: nn.Module) -> Tensor:
    model.set_adapter("other")
    return model(tokens()).logits


def _both(model: nn.Module) -> Tensor:
    model.base_model.set_adapter(["default", "other"])
    return model(tokens()).logits


def _rescaled(model: nn.Module) -> Tensor:
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module.scale_layer(3.0)
    return model(tokens()).logits


def _deleted(model: nn.Module) -> Tensor:
    model.delete_adapter("default")
    model.set_adapter("other")
    return model(tokens()).logits


ACTS = [_disabled, _merged, _unmerged, _unloaded, _switched, _both, _rescaled, _deleted]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_acts_on_adapters_are_pefts(act):
    outs = []
    for implementation in ("eager", "moekit"):
        model = adapted(implementation=implementation).eval()
        torch.manual_seed(2)
        model.add_adapter("other", config_of(r=3, use_rslora=True))
        with torch.no_grad():
            outs += [model(tokens()).logits, act(model)]
    before, expected, ours_before, actual = outs
    assert_same({"before": ours_before, "after": actual}, {"before": before, "after": expected})
    assert (before - expected).abs().max() > 1e-3 * before.abs().max() or act in (_merged, _unmerged, _unloaded)


def test_two_active_adapters_get_the_gradients_of_pefts():
    found = []
    for implementation in ("eager", "moekit"):
        model = adapted(implementation=implementation)
        torch.manual_seed(2)
        model.add_adapter("other", config_of(r=2))
        model.base_model.set_adapter(["default", "other"])
        found.append(step(model))
    assert sum("other" in name for name in found[0]) == 4
    assert_same(found[1], found[0])


def test_saved_and_loaded_again(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    expected = step(model)
    assert any("lm_head.modules_to_save" in name for name in expected)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base("Qwen3Moe", "moekit"), tmp_path, is_trainable=True).train()
    assert_same(step(loaded), expected, 0)


def test_an_adapter_of_the_layout_up_to_peft_0_18():
    """There the second dimension of a parameter was "in", though Qwen3Moe's is the output."""
    found = []
    for implementation in ("eager", "moekit"):
        model = adapted(implementation=implementation)
        for module in model.modules():
            if isinstance(module, ParamWrapper):
                module._did_swap_in_out_features = False
                ranks, columns = module.lora_A["default"].weight.shape
                rows = module.lora_B["default"].weight.shape[0]
                generator = torch.Generator().manual_seed(rows)
                for factor, shape in ((module.lora_A, (ranks, rows)), (module.lora_B, (columns, ranks))):
                    factor["default"].weight.data = torch.randn(shape, generator=generator) / 8
        found.append(step(model))
    assert_same(found[1], found[0])


# --- how a call is run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", ["layers", "experts"])
def test_checkpointed(what, reentrant):
    expected = step(adapted())
    model = adapted()
    model.enable_input_require_grads()
    if what == "layers":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    else:  # inside the wrappers of PEFT, whose call is over when the experts are run again
        kind = wrappers.CheckpointImpl.REENTRANT if reentrant else wrappers.CheckpointImpl.NO_REENTRANT
        wrap = functools.partial(wrappers.checkpoint_wrapper, checkpoint_impl=kind)
        wrappers.apply_activation_checkpointing(model, wrap, check_fn=lambda module: isinstance(module, Qwen3MoeExperts))
    assert_same(step(model), expected, 0)


def test_compiled_without_a_break():
    torch.compiler.reset()
    model = adapted()
    expected = step(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = step(compiled)
    assert_same({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected)


def test_exported():
    model = adapted().eval()
    exported = torch.export.export(model, (tokens(),), {"use_cache": False}).module()
    assert_same({"logits": exported(tokens(), use_cache=False).logits}, {"logits": model(tokens()).logits})


def test_several_threads():
    model = adapted().eval()
    expected = model(tokens()).logits
    found: list[Tensor] = []

    def run() -> None:
        for _ in range(3):
            found.append(model(tokens()).logits)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12 and all(torch.equal(logits, expected) for logits in found)


def test_after_an_error_everything_is_as_before():
    model = adapted()
    expected = step(model)
    experts = wrapper_of(model).get_base_layer()
    handle = experts.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens())
    handle.remove()
    assert_same(step(model), expected, 0)
    assert not hasattr(experts, "parametrizations")


def test_a_copy_has_adapters_of_its_own():
    model = adapted()
    expected = step(model)
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "lora" in name:
            parameter.data.zero_()
    assert_same(step(model), expected, 0)
    with model.disable_adapter():
        assert torch.equal(other(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("shard", ["layer", "wrapper", "experts"])
def test_fsdp2(shard, tmp_path):
    from torch.distributed.fsdp import fully_shard

    expected = step(adapted())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = adapted()
        (layer,) = model.get_base_model().model.layers
        fully_shard({"layer": layer, "wrapper": layer.mlp.experts, "experts": layer.mlp.experts.get_base_layer()}[shard])
        fully_shard(model)
        assert_same(step(model), expected)
    finally:
        dist.destroy_process_group()


def test_a_few_steps_of_the_trainer(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            row = torch.randint(1, 97, (12,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": row, "labels": row}

    curves = []
    for implementation in ("eager", "moekit"):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=0.02,
            logging_steps=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = transformers.Trainer(adapted(implementation=implementation), arguments, train_dataset=Rows())
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 4 and curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


# --- one experts module -----------------------------------------------------------------------------------------------


class OwnGate(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return torch.tanh(gate) * up


class OwnForward(Qwen3MoeExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 2 * super().forward(hidden_states, top_k_index, top_k_weights)


class OwnGateWithBias(GptOssExperts):
    def _apply_gate(self, gate_up):
        return torch.tanh(gate_up[..., ::2]) * gate_up[..., 1::2]


def experts(module: nn.Module, *targets: str) -> nn.Module:
    """Experts with adapters of all weights, or of ``targets``."""
    torch.manual_seed(3)
    parent = nn.ModuleDict({"experts": module})
    names = [f"experts.{name}" for name in targets] or PROJECTIONS
    peft.get_peft_model(parent, config_of(target_parameters=names))
    return parent["experts"]


def call(wrapped: nn.Module, implementation: str) -> dict[str, Tensor]:
    """Output and gradients of one call."""
    module = wrapped.get_base_layer()
    module.config._experts_implementation = implementation
    wrapped.zero_grad()
    generator = torch.Generator().manual_seed(1)
    hidden = module.down_proj.shape[2 if module.is_transposed else 1]
    x = torch.randn(T, hidden, generator=generator).requires_grad_()
    weights = torch.rand(T, K, generator=generator).requires_grad_()
    out = wrapped(x, chosen(False), weights)
    out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **grads}


@pytest.mark.parametrize("kind", [OwnGate, OwnGateWithBias])
def test_experts_with_a_gate_of_their_own(kind, monkeypatch):
    wrapped = experts(make(kind))
    expected = call(wrapped, "grouped_mm")  # Mixtral's eager forward has a gate in it
    summed = watched(monkeypatch)
    assert_same(call(wrapped, "moekit"), expected)
    assert not summed


OBSTACLES = {
    "a bias": (GptOssExperts, ["gate_up_proj", "down_proj_bias"], lambda module: None, "down_proj_bias is no projection"),
    "a trained weight": (
        Qwen3MoeExperts,
        ["gate_up_proj", "down_proj"],
        lambda module: module.down_proj.requires_grad_(),
        "down_proj is trained itself",
    ),
    "a forward of its class": (OwnForward, ["down_proj"], lambda module: None, "its forward is not the one"),
    "a forward of its own": (
        Qwen3MoeExperts,
        ["down_proj"],
        lambda module: setattr(module, "forward", functools.partial(type(module).forward, module)),
        "its forward is not the one",
    ),
    "expert parallelism": (
        Qwen3MoeExperts,
        ["down_proj"],
        lambda module: setattr(module, "_is_expert_parallel", True),
        "its experts are spread over ranks",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_cannot_be_given_factors_goes_pefts_way_and_says_so_once(obstacle, monkeypatch, caplog):
    kind, targets, change, reason = OBSTACLES[obstacle]
    wrapped = experts(make(kind), *targets)
    change(wrapped.get_base_layer())
    expected = call(wrapped, "eager")
    summed = watched(monkeypatch)
    with caplog.at_level(logging.INFO, logger="moekit.hf"):
        for _ in range(2):
            assert_same(call(wrapped, "moekit"), expected)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"{kind.__name__} has adapters that PEFT adds to the weights of all experts: {reason}")
    assert set(summed) == {targets[-1]}


def test_a_parametrisation_of_the_users_stays_below_the_adapters():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = make(Qwen3MoeExperts)
    wrapped = experts(module, "gate_up_proj", "down_proj")
    nn.utils.parametrize.register_parametrization(module, "down_proj", Twice())
    module.parametrizations.requires_grad_(False)
    found = call(wrapped, "moekit")
    nn.utils.parametrize.remove_parametrizations(module, "down_proj")
    module.down_proj.requires_grad_(False)
    assert_same(found, call(wrapped, "eager"))


class Doubled(ParamWrapper):
    def get_delta_factors(self, adapter_name):
        left, right, scale = super().get_delta_factors(adapter_name)
        return left, right, 2 * scale


def test_a_wrapper_of_the_users_adds_what_it_wants(caplog):
    wrapped = experts(make(Qwen3MoeExperts), "down_proj")
    wrapped.__class__ = Doubled
    expected = call(wrapped, "eager")
    with caplog.at_level(logging.INFO, logger="moekit.hf"):
        assert_same(call(wrapped, "moekit"), expected)
    assert caplog.messages[0].endswith("Doubled has its own idea of what is added")


def test_two_wrappers_of_one_weight_add_up():
    """PEFT makes none such by itself."""
    module = make(Qwen3MoeExperts)
    inner = experts(module, "down_proj")
    outer = ParamWrapper(inner, "other", parameter_name="down_proj", config=config_of(), r=2, lora_alpha=3)
    deltas = [inner.get_delta_weight("default"), outer.get_delta_weight("other")]
    found = call(outer, "moekit")["out"]
    module.down_proj.data += sum(deltas)
    for layer in (inner, outer):
        layer.enable_adapters(False)
    assert_same({"out": call(outer, "eager")["out"]}, {"out": found})


def test_adapters_by_row_are_refused_as_by_peft():
    wrapped = experts(make(Qwen3MoeExperts))
    wrapped.get_base_layer().config._experts_implementation = "moekit"
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        wrapped(torch.randn(T, 16), chosen(False), torch.rand(T, K), adapter_names=["default"] * T)


def test_compiled_inside_the_wrappers():
    torch.compiler.reset()
    wrapped = experts(make(Qwen3MoeExperts))
    expected = call(wrapped, "moekit")
    wrapped.base_layer.base_layer = torch.compile(wrapped.get_base_layer(), backend="aot_eager", fullgraph=True)
    found = call(wrapped, "moekit")
    assert_same({name: found[name] for name in expected}, expected)


def test_onnx_gets_pefts_sum():
    reference = pytest.importorskip("onnx.reference")
    wrapped = experts(make(Qwen3MoeExperts)).eval()
    wrapped.get_base_layer().config._experts_implementation = "moekit"
    given = torch.randn(T, 16), chosen(False), torch.rand(T, K)
    program = torch.onnx.export(wrapped, given, dynamo=True, verbose=False)
    names = [entry.name for entry in program.model_proto.graph.input]
    feed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
    (out,) = reference.ReferenceEvaluator(program.model_proto).run(None, feed)
    assert_same({"out": torch.from_numpy(out)}, {"out": wrapped(*given)})

    class Given(nn.Module):
        """Who gives factors oneself is not left without them."""

        def forward(self, *inputs):
            lora = {"down": [moekit.hf.peft._factors(wrapped, "default")]}
            return moekit.hf.experts_forward(wrapped.get_base_layer(), *inputs, lora=lora)

    with pytest.raises(torch.onnx.errors.OnnxExporterError):
        torch.onnx.export(Given().eval(), given, dynamo=True, verbose=False)


def test_fp8_experts_take_adapters_beside_their_codes():
    """PEFT's own sum would be one with the codes, whatever their scales."""
    from test_hf_weights import dequantised, fp8_experts

    module = fp8_experts()
    dense = make(Qwen3MoeExperts, hidden_size=40, moe_intermediate_size=32)
    for name in ("gate_up_proj", "down_proj"):
        scales = getattr(module, f"{name}_scale_inv").data.div_(64)
        getattr(dense, name).data = dequantised(getattr(module, name), scales, module.block_size).float()
    ours, expected = experts(module), experts(dense)
    # PEFT draws the factors in the dtype of the weights.
    expected.load_state_dict({name: value for name, value in ours.state_dict().items() if "lora" in name}, strict=False)
    wanted = call(expected, "eager")
    assert_same(call(ours, "moekit"), wanted)
    for name in ("gate_up_proj", "down_proj"):  # a checkpoint of which these were not quantised after all
        setattr(module, name, nn.Parameter(getattr(dense, name).detach(), requires_grad=False))
    assert_same(call(ours, "moekit"), wanted)


# --- packed weights ---------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
PACKED = [(Qwen3MoeExperts, format) for format in ("nf4", "mxfp4", "fp8", "int8")] + [(GptOssExperts, "mxfp4")]
every_packed = pytest.mark.parametrize(("kind", "format"), PACKED, ids=lambda value: getattr(value, "__name__", value))


def packed_experts(kind: type, format: str) -> nn.Module:
    """Packed experts with adapters."""
    module = make(kind, **SIZES)
    moekit.hf.pack(nn.ModuleDict({"experts": module}), format)
    return experts(module)


def bits(wrapped: nn.Module) -> list[Tensor]:
    module = wrapped.get_base_layer()
    stored = [weight.stored() for weight in (module.gate_up_proj, module.down_proj)]
    return [part.clone() for weight in stored for part in (weight.codes, *weight.scales)]


def merged_by_hand(wrapped: nn.Module, adapters: list[str]) -> list[Tensor]:
    """The values of the packed weights with what PEFT would have added to dense ones."""
    found = []
    for layer in (wrapped.base_layer, wrapped):
        weight = layer.get_param()
        summed = weight.unpack() + sum(layer.get_delta_weight(name).detach() for name in adapters)
        stored = summed.mT if weight.turned else summed
        values = moekit.pack(stored.contiguous(), weight.format).unpack()
        found.append(values.mT if weight.turned else values)
    return found


def values_of(wrapped: nn.Module) -> list[Tensor]:
    module = wrapped.get_base_layer()
    return [module.gate_up_proj.unpack(), module.down_proj.unpack()]


@every_packed
def test_packed_experts_are_as_their_values_with_adapters(kind, format, monkeypatch):
    wrapped = packed_experts(kind, format)
    summed = watched(monkeypatch)
    found = call(wrapped, "moekit")
    assert not summed
    moekit.hf.unpack(nn.ModuleDict({"experts": wrapped}))
    wrapped.get_base_layer().requires_grad_(False)
    assert_same(found, call(wrapped, "eager"))


@every_packed
def test_merged_into_packed_experts_and_out_again(kind, format, caplog):
    wrapped = packed_experts(kind, format)
    before, out, expected = bits(wrapped), call(wrapped, "moekit"), merged_by_hand(wrapped, ["default"])
    with caplog.at_level(logging.INFO, logger="moekit.hf"):
        for layer in (wrapped.base_layer, wrapped):
            layer.merge()
    first = "gate_up_proj"
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        f"{kind.__name__}.{name}" for name in (first, "down_proj")
    ]
    for ours, theirs in zip(values_of(wrapped), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not any(value is not None and "lora" in name for name, value in call(wrapped, "moekit").items())
    assert len(list(wrapped.parameters())) == len(list(packed_experts(kind, format).parameters()))
    for layer in (wrapped.base_layer, wrapped):
        layer.unmerge()
    assert all(torch.equal(*pair) for pair in zip(bits(wrapped), before, strict=True))
    assert_same(call(wrapped, "moekit"), out, 0)


def test_adapters_merged_one_after_the_other_are_packed_once():
    wrapped = packed_experts(Qwen3MoeExperts, "nf4")
    for layer in (wrapped.base_layer, wrapped):
        layer.update_layer("other", 2, lora_alpha=3, config=config_of())
    before, expected = bits(wrapped), merged_by_hand(wrapped, ["default", "other"])
    for layer in (wrapped.base_layer, wrapped):
        layer.merge(adapter_names=["default"])
        layer.merge(adapter_names=["default", "other"], safe_merge=True)
    for ours, theirs in zip(values_of(wrapped), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    twin = copy.deepcopy(wrapped)
    for layer in (twin.base_layer, twin):
        assert layer.merged_adapters == ["default", "other"]
        layer.enable_adapters(False)
    with torch.no_grad():  # PEFT undoes the merge of adapters that are disabled when it calls them
        twin(torch.randn(T, 64), chosen(False), torch.rand(T, K))
    assert all(torch.equal(*pair) for pair in zip(bits(twin), before, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(bits(wrapped), before, strict=True))


def test_what_was_packed_after_merging_is_not_unmerged():
    wrapped = experts(make(Qwen3MoeExperts, **SIZES))
    for layer in (wrapped.base_layer, wrapped):
        layer.merge()
    moekit.hf.pack(nn.ModuleDict({"experts": wrapped}), "nf4")
    before = bits(wrapped)
    with pytest.raises(RuntimeError, match="_proj was packed with adapters merged into it"):
        wrapped.unmerge()
    assert wrapped.merged and all(torch.equal(*pair) for pair in zip(bits(wrapped), before, strict=True))


def test_a_broken_adapter_is_not_merged():
    wrapped = packed_experts(Qwen3MoeExperts, "nf4")
    before = bits(wrapped)
    wrapped.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN"):
        wrapped.merge(safe_merge=True)
    assert not wrapped.merged and all(torch.equal(*pair) for pair in zip(bits(wrapped), before, strict=True))


def test_a_packed_model_is_trained_saved_loaded_and_merged(tmp_path):
    def packed() -> nn.Module:
        model = base("Mixtral", "moekit")
        moekit.hf.pack(model, "int8")
        return model

    torch.manual_seed(1)
    model = peft.get_peft_model(packed(), config_of(init_lora_weights=True)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        losses.append(float(step(model)["loss"]))
        optimizer.step()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(packed(), tmp_path).eval()
    logits = model.eval()(tokens()).logits.detach()
    assert torch.equal(loaded(tokens()).logits, logits)
    merged = loaded.merge_and_unload()
    experts = merged.model.layers[0].mlp.experts
    assert isinstance(experts.down_proj, moekit.PackedExperts) and not experts.down_proj.requires_grad
    assert (merged(tokens()).logits - logits).norm() <= 0.05 * logits.norm()


# --- in PEFT's place --------------------------------------------------------------------------------------------------

REPLACED = ("forward", "merge", "unmerge")


def test_unregister_gives_peft_its_methods_back():
    ours = {name: vars(ParamWrapper)[name] for name in REPLACED}
    moekit.hf.register()
    assert {name: vars(ParamWrapper)[name] for name in REPLACED} == ours
    moekit.hf.unregister()
    own = {name: vars(ParamWrapper)[name] for name in REPLACED}
    assert all(method.__module__ == ParamWrapper.__module__ for method in own.values())
    moekit.hf.register()
    assert {name: vars(ParamWrapper)[name] for name in REPLACED} == ours


def test_what_somebody_put_around_ours_is_left_there(monkeypatch):
    ours = ParamWrapper.forward
    monkeypatch.setattr(ParamWrapper, "forward", lambda *args, **kwargs: ours(*args, **kwargs))
    theirs = ParamWrapper.forward
    moekit.hf.unregister()
    assert ParamWrapper.forward is theirs
    model = adapted(implementation="eager")
    assert step(model)["loss"].isfinite()


def test_an_unknown_release_keeps_its_own_way_and_says_so(monkeypatch, caplog):
    moekit.hf.unregister()
    expected = step(adapted(implementation="eager"))

    def get_delta_weight(self, adapter_name, *args, **kwargs):
        return 0 * self.get_param()

    with monkeypatch.context() as patched, caplog.at_level(logging.INFO, logger="moekit.hf"):
        patched.setattr(ParamWrapper, "get_delta_weight", get_delta_weight)
        moekit.hf.register()
    assert [record.message for record in caplog.records] == [
        "this release of PEFT wraps parameters in a way unknown to moekit: adapters of experts run as PEFT's"
    ]
    assert ParamWrapper.forward.__module__ == ParamWrapper.__module__
    assert_same(step(adapted()), expected)


def test_peft_that_is_imported_later(monkeypatch):
    moekit.hf.unregister()
    with monkeypatch.context() as patched:
        patched.delitem(sys.modules, ParamWrapper.__module__)
        for _ in range(2):
            moekit.hf.register()
        assert ParamWrapper.__module__ not in sys.modules
        later = importlib.import_module(ParamWrapper.__module__).ParamWrapper
        assert later is not ParamWrapper and later.forward.__module__ == "moekit.hf.peft"
        moekit.hf.unregister()
        assert later.forward.__module__ == ParamWrapper.__module__
        del sys.modules[ParamWrapper.__module__]
        moekit.hf.register()
        found = importlib.util.find_spec(ParamWrapper.__module__)
        moekit.hf.unregister()
        for spec in (found, importlib.util.find_spec(ParamWrapper.__module__)):
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            assert module.ParamWrapper.forward.__module__ == ParamWrapper.__module__
    importlib.import_module("peft.tuners.lora").layer = sys.modules[ParamWrapper.__module__]
