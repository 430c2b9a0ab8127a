"""moekit.hf.pack, load and unpack: every experts class, what is left, memory, and what is saved."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import json
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from _hf import K, T, chosen, experts_class, make, run
from _packed import WEIGHTS, assert_same, causal, packed_names, parts
from test_hf import COMMON, build, decorated_classes, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moekit.hf
from moekit.hf import _packing
from moekit.packed import pack as packed

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def registered():
    transformers.logging.disable_progress_bar()
    moekit.hf.register()
    yield
    moekit.hf.unregister()


# --- every experts class --------------------------------------------------------------------------------------------


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name in ("out", "x", "weights"):
        assert (ours[name] - theirs[name]).abs().max() <= 1e-6 * theirs[name].abs().max(), name


@pytest.mark.parametrize(("module_name", "class_name"), decorated_classes())
def test_every_experts_class(module_name, class_name):
    """In nf4, with slots of no expert: what the same module gives with the values of the packed weights."""
    module = make(getattr(importlib.import_module(module_name), class_name))
    report = moekit.hf.pack(module)
    assert len(report.packed) == 2 and not report.left
    dense = moekit.hf.unpack(copy.deepcopy(module))
    assert not packed_names(dense) and len(packed_names(module)) == 2
    for each in (module, dense):
        each._is_expert_parallel = True
    close(run(module, "moekit", chosen(True), F32), run(dense, "moekit", chosen(True), F32))


@pytest.mark.parametrize(("module_name", "class_name"), decorated_classes())
def test_every_experts_class_trains_adapters(module_name, class_name):
    """Five steps of LoRA beside nf4 weights are those beside the values of these."""
    module = make(getattr(importlib.import_module(module_name), class_name))
    moekit.hf.pack(module)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    losses = []
    for experts in (module, moekit.hf.unpack(copy.deepcopy(module)).requires_grad_(False)):
        torch.manual_seed(2)
        lora, factors = {}, []
        for part, name in (("gate_up", first), ("down", "down_proj")):
            count, *sides = getattr(experts, name).shape
            outputs, inputs = reversed(sides) if experts.is_transposed else sides
            pair = [0.3 * torch.randn(count, 2, inputs), 0.3 * torch.randn(count, outputs, 2)]
            factors += [factor.requires_grad_() for factor in pair]
            lora[part] = [moekit.Lora(*factors[-2:], 0.5)]
        x = torch.randn(T, factors[0].shape[2])
        optimizer, seen = torch.optim.SGD(factors, lr=1e-3), []
        for _ in range(5):
            out = moekit.hf.experts_forward(experts, x, chosen(False), torch.full((T, K), 0.5), lora=lora)
            loss = out.square().mean()
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            seen.append(loss.item())
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]


CLASSES = [Qwen3MoeExperts, GptOssExperts]
CLASSES += experts_class("nemotron_h", "NemotronHExperts") + experts_class("muse_spark", "MuseSparkExperts")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("format", ["mxfp4", "fp8", "int8"])
def test_formats(kind, format):
    sizes = {name: 32 for name in ("hidden_size", "moe_hidden_size", "intermediate_size", "moe_intermediate_size")}
    module = make(kind, **sizes)
    values = {name: parameter.detach().clone() for name, parameter in module.named_parameters() if name in WEIGHTS}
    moekit.hf.pack(module, format, **({"block": (16, 32)} if format == "fp8" else {}))
    for name, value in values.items():
        weight = getattr(module, name)
        block = weight.stored().block if format == "fp8" else None
        turned = module.is_transposed
        wanted = packed(value.mT if turned else value, format, block=block)
        assert weight.turned == turned and weight.shape == value.shape and isinstance(weight, nn.Parameter)
        assert not weight.requires_grad and all(map(torch.equal, parts(weight), parts(wanted)))
    dense = moekit.hf.unpack(copy.deepcopy(module))
    for each in (module, dense):
        each.config._experts_implementation = "moekit"
    x, indices = torch.randn(T, 32, generator=torch.Generator().manual_seed(1)), chosen(False)
    ours, theirs = (each(x, indices, torch.full((T, K), 0.5)) for each in (module, dense))
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


# --- what is packed, and what is left -------------------------------------------------------------------------------


def test_the_report():
    model = build("Qwen3Moe", "eager").to(BF16)
    dense = sum(p.nbytes for name, p in model.named_parameters() if name.endswith(WEIGHTS))
    report = moekit.hf.pack(model, "int8", skip=["model.layers.1.*.down_proj"])
    assert model.config._experts_implementation == "moekit"
    names = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    assert report.packed == (*names, "model.layers.1.mlp.experts.gate_up_proj")
    assert report.modules == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert report.left == {"model.layers.1.mlp.experts.down_proj": "skipped, as asked for"}
    left = model.model.layers[1].mlp.experts.down_proj.nbytes
    assert report.bytes_before == dense - left
    assert report.bytes_after == sum(model.get_parameter(name).bytes for name in report.packed)
    assert str(report).splitlines() == [
        "3 weights of 2 experts modules in int8: 60.00 KiB -> 34.00 KiB (1.76x smaller)",
        "     2 x model.layers.*.mlp.experts.gate_up_proj",
        "     1 x model.layers.*.mlp.experts.down_proj",
        "1 left as they were:",
        "     1 x model.layers.*.mlp.experts.down_proj: skipped, as asked for",
    ]


class Elsewhere(Tensor):
    """A subclass that computes by a dispatch of its own."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


class Twice(nn.Module):
    def forward(self, value):
        return 2 * value


def replace(module: nn.Module, value: Callable[[Tensor], Tensor]) -> None:
    module.gate_up_proj = nn.Parameter(value(module.gate_up_proj.detach()), requires_grad=False)


LEFT = {
    "on meta: load the weights first": lambda m: replace(m, lambda w: w.to("meta")),
    "of dtype torch.float8_e4m3fn: quantised already": lambda m: replace(m, lambda w: w.to(torch.float8_e4m3fn)),
    "a Elsewhere: packed by another library": lambda m: m._parameters.update(gate_up_proj=Elsewhere(m.gate_up_proj)),
    "computed by a parametrisation": lambda m: nn.utils.parametrize.register_parametrization(m, "gate_up_proj", Twice()),
    "packed already, in fp8": lambda m: replace(m, lambda w: packed(w, "fp8")),
    "not a parameter of the module": lambda m: m._parameters.pop("gate_up_proj"),
    "weight must be of so many values an expert (out * in: nf4 has blocks of them) divisible by 64": lambda m: replace(
        m, lambda w: w[:, :30]
    ),
    "weight must be finite": lambda m: replace(m, lambda w: w * float("nan")),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_and_why(reason):
    layer = nn.ModuleDict({"experts": make(Qwen3MoeExperts)})
    LEFT[reason](layer["experts"])
    report = moekit.hf.pack(layer)
    assert report.packed == ("experts.down_proj",) and list(report.left) == ["experts.gate_up_proj"]
    assert reason in report.left["experts.gate_up_proj"]


def test_shared_weights_and_shared_modules():
    """A module that stands in two places is packed once; a parameter that does is nobody's to pack."""
    first, second = make(Qwen3MoeExperts), make(Qwen3MoeExperts)
    second.down_proj = first.down_proj
    report = moekit.hf.pack(nn.ModuleList([first, second, first]))
    assert report.packed == ("0.gate_up_proj", "1.gate_up_proj")
    assert report.left == {"0.down_proj": "shared with 1.down_proj", "1.down_proj": "shared with 0.down_proj"}


def test_experts_that_are_not_decorated_are_named():
    config = transformers.Llama4TextConfig(**COMMON, num_local_experts=2, intermediate_size_mlp=48, head_dim=8)
    model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"hf.pack: model must be one with experts .*Llama4TextExperts is not decorated with"
    ):
        moekit.hf.pack(model)
    with pytest.raises(ValueError, match=r"one with experts that can be packed, got it has no experts modules"):
        moekit.hf.pack(nn.Linear(2, 2))
    assert not hasattr(model, "hf_quantizer") and model.config._experts_implementation != "moekit"


def test_sharded_weights_are_left():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist = torch.distributed
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        module = make(Qwen3MoeExperts)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        sharded = dist.tensor.DTensor.from_local(module.down_proj.detach(), mesh, [dist.tensor.Shard(0)], run_check=False)
        module.down_proj = nn.Parameter(sharded)
        assert moekit.hf.pack(module).left == {"down_proj": "a DTensor: pack before the model is sharded"}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "nf3"}, r"pack: format must be one of 'nf4', 'mxfp4', 'fp8', 'int8', got 'nf3'"),
        ({"format": "int8", "double_quant": True}, r"double_quant=True has no effect on int8"),
        ({"block": (128, 128)}, r"block must be \(1, 64\)"),
        ({"skip": ["lm_head"]}, r"hf.pack: skip must be names of experts' weights or modules, got 'lm_head'"),
    ],
)
def test_pack_checks_its_arguments(arguments, message):
    module = make(Qwen3MoeExperts)
    with pytest.raises(ValueError, match=message):
        moekit.hf.pack(module, **arguments)
    assert not packed_names(module)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_each_weight_is_freed_before_the_next(monkeypatch):
    model, alive = build("Qwen3Moe", "eager"), []
    refs = [weakref.ref(p) for name, p in model.named_parameters() if name.endswith(WEIGHTS)]
    real = _packing.Options.pack

    def counting(self, weight, turned):
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        return real(self, weight, turned)

    monkeypatch.setattr(_packing.Options, "pack", counting)
    moekit.hf.pack(model)
    assert alive == [4, 3, 2, 1] and not any(ref() for ref in refs)


class Floats(TorchDispatchMode):
    """The most elements in floating point that were alive at once, of tensors of at least a size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.peak, self._alive = size, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if type(tensor) is Tensor and tensor.dtype in (F32, BF16) and not tensor.is_meta and tensor.numel() >= self.size:
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        self._alive[id(tensor)] = place, tensor.numel()
        weakref.finalize(tensor, self._alive.pop, id(tensor), None)
        self.peak = max(self.peak, sum(dict(self._alive.values()).values()))


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_no_layer_is_in_floating_point_while_loading(kind, tmp_path):
    """Expert by expert where the checkpoint has them so, else weight by weight; the model has 4 weights of 8 experts."""
    sizes = {"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 256, "intermediate_size": 256}
    model = causal(kind, **sizes).to(F32)
    model.save_pretrained(tmp_path)
    projection = 256 * 32
    with Floats(projection) as watched:
        loaded = moekit.hf.load(tmp_path, dtype=BF16)
    moekit.hf.pack(model.to(BF16))
    assert_same(loaded, model)
    one_expert, fused = 2 * projection, 2 * 8 * projection
    # What is read is cast to bfloat16; of one expert there are halves, the whole, and what packing makes of it in float32.
    assert one_expert < watched.peak <= (6 * one_expert if kind == "Qwen3Moe" else 2 * fused + 4 * one_expert)


@pytest.mark.parametrize(("named", "dtype"), [("auto", BF16), ("float16", torch.float16), (None, BF16)])
def test_dtypes_as_from_pretrained_takes_them(named, dtype, tmp_path):
    causal("Qwen3Moe").to(BF16).save_pretrained(tmp_path)
    loaded = moekit.hf.load(tmp_path, **({} if named is None else {"dtype": named}))
    assert loaded.dtype is dtype and loaded.model.layers[0].mlp.experts.down_proj.dtype is dtype


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ((128,), TypeError, "block must be two integers"),
        (128, TypeError, "block must be two integers"),
        ((128, "x"), TypeError, "block must be an integer, got str"),
        ((1, 0), ValueError, "block must be at least 1, got 0"),
    ],
)
def test_blocks_that_are_none(block, error, message):
    with pytest.raises(error, match=message):
        moekit.hf.pack(make(Qwen3MoeExperts), "fp8", block=block)


def test_models_in_one_wrapper_are_saved_each(tmp_path):
    models = nn.ModuleList([causal("Qwen3Moe"), causal("GptOss")])
    moekit.hf.pack(models)
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        assert_same(moekit.hf.load(tmp_path / str(number)), model)
    for model in moekit.hf.unpack(models):
        assert not packed_names(model) and getattr(model, "hf_quantizer", None) is None


@pytest.mark.parametrize("autocast", [False, True])
def test_in_inference_mode(autocast):
    model = causal("GptOss")
    moekit.hf.pack(model)
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
        expected = model(tokens()).logits
    with torch.inference_mode(), torch.autocast("cpu", BF16, enabled=autocast):
        assert torch.equal(model(tokens()).logits, expected)


# --- saved and loaded -----------------------------------------------------------------------------------------------

FORMATS = {
    "nf4": {"format": "nf4"},
    "double": {"format": "nf4", "double_quant": True},
    "mxfp4": {"format": "mxfp4"},
    "fp8": {"format": "fp8"},
    "fp8 in blocks of its own": {"format": "fp8", "block": (16, 8)},
    "fp8 in rows": {"format": "fp8", "block": (1, 32)},
    "int8": {"format": "int8"},
}


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "Qwen3Moe"])
@pytest.mark.parametrize("name", FORMATS)
def test_saved_and_loaded_bit_for_bit(kind, name, tmp_path):
    model = causal(kind)
    skip = [] if name == "double" else ["model.layers.1.mlp.experts.down_proj"]
    moekit.hf.pack(model, **FORMATS[name], skip=skip)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "moekit" and written["format"] == FORMATS[name]["format"]
    saved = load_file(tmp_path / "model.safetensors")
    assert all(type(tensor) is Tensor for tensor in saved.values())
    for loaded in (moekit.hf.load(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert loaded.config._experts_implementation == "moekit"
        assert_same(loaded, model)
        with torch.no_grad():
            assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key].view(-1).view(torch.uint8), again[key].view(-1).view(torch.uint8)) for key in saved)


def test_the_checkpoints_names():
    model = causal("GptOss")
    moekit.hf.pack(model, "mxfp4")
    names = {name.removeprefix("model.layers.0.mlp.experts.") for name in model.state_dict() if "layers.0.mlp.exp" in name}
    biases = {"gate_up_proj_bias", "down_proj_bias"}
    assert names == biases | {
        f"{weight}_{part}" for weight in ("gate_up_proj", "down_proj") for part in ("blocks", "scales")
    }


@pytest.mark.parametrize("name", ["nf4", "double", "mxfp4", "int8", "fp8"])
def test_copies_and_state_dicts(name, tmp_path):
    model = causal("GptOss")
    moekit.hf.pack(model, **FORMATS[name])
    copies = [copy.deepcopy(model)]
    if name != "fp8":  # PyTorch's own pickles of float8 are not read back
        copies.append(pickle.loads(pickle.dumps(model)))
    torch.save(model, tmp_path / "model.pt")
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    state = io.BytesIO()
    torch.save(model.state_dict(), state)
    state.seek(0)
    other = causal("GptOss")
    nn.init.normal_(other.model.layers[0].mlp.experts.down_proj)
    moekit.hf.pack(other, **FORMATS[name])
    assert str(other.load_state_dict(torch.load(state))) == "<All keys matched successfully>"
    for copied in (*copies, other):
        assert_same(copied, model)
        copied.save_pretrained(tmp_path / "copied")
        assert_same(moekit.hf.load(tmp_path / "copied"), model)
        assert copied.get_memory_footprint() == model.get_memory_footprint()


def test_a_state_dict_packed_otherwise_is_refused():
    model, other = causal("Qwen3Moe"), causal("Qwen3Moe")
    moekit.hf.pack(model, "nf4")
    moekit.hf.pack(other, "int8")
    with pytest.raises(RuntimeError, match="only what is packed in the same way"):
        model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("undo", [moekit.hf.unpack, lambda model: model.dequantize()], ids=["unpack", "dequantize"])
def test_unpacked_it_is_the_dense_model(undo, tmp_path):
    model = causal("Mixtral")
    model.save_pretrained(tmp_path / "dense")
    loaded = moekit.hf.load(tmp_path / "dense", "nf4")
    values = {name: loaded.get_parameter(name).unpack() for name in packed_names(loaded)}
    undo(loaded)
    assert len(values) == 4 and all(torch.equal(loaded.get_parameter(name), value) for name, value in values.items())
    assert all(parameter.requires_grad and type(parameter) is nn.Parameter for parameter in loaded.parameters())
    assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "unpacked")
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked"), loaded)
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("dense", "unpacked")]
    assert names[0] == names[1]
    with pytest.raises(ValueError, match=r"hf.unpack: model must be one with packed experts, got none"):
        moekit.hf.unpack(loaded)


def test_unpacked_in_another_dtype():
    module = make(Qwen3MoeExperts).to(BF16)
    moekit.hf.pack(module)
    wanted = module.down_proj.unpack(dtype=F32)
    assert torch.equal(moekit.hf.unpack(module, F32).down_proj, wanted) and wanted.dtype is F32


def test_a_model_that_converts_its_experts_when_loaded(tmp_path):
    """Qwen3-VL stores them the other way round: not those that are packed."""
    kind = getattr(transformers, "Qwen3VLMoeForConditionalGeneration", None)
    if kind is None:
        pytest.skip("not in this release")
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 32}
    vision = {**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    model = kind(transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)).to(BF16)
    model.save_pretrained(tmp_path / "dense")
    loaded = moekit.hf.load(tmp_path / "dense")
    assert type(loaded) is kind and len(packed_names(loaded)) == 4
    moekit.hf.pack(model)
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "packed")
    assert_same(moekit.hf.load(tmp_path / "packed"), model)
    assert_same(kind.from_pretrained(tmp_path / "packed"), model)


def test_experts_that_a_checkpoint_has_not_are_packed_too(tmp_path):
    model = causal("Qwen3Moe")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1.mlp.experts" not in k}, file, {"format": "pt"})
    assert len(packed_names(moekit.hf.load(tmp_path))) == 4
