"""moekit.hf uses weights as they are: mixed, sharded, quantised, packed ones give the right result or an error."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from _hf import E, K, Settings, T, chosen, experts_class, make, run
from torch import Tensor, nn

import moekit
import moekit.hf
from moekit.ops import packed_products

transformers = pytest.importorskip("transformers")
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def registered():
    moekit.hf.register()
    yield
    moekit.hf.unregister()


def inputs(dtype: torch.dtype = BF16, hidden: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(T, hidden, generator=generator).to(dtype), chosen(False), torch.rand(T, K, generator=generator)


def replace(module: nn.Module, name: str, value: object) -> None:
    """Put ``value`` in the place of a parameter."""
    del module._parameters[name]
    if isinstance(value, Tensor):
        module._parameters[name] = value
    else:
        setattr(module, name, value)


# --- mixed dtypes ---------------------------------------------------------------------------------------------------

KEPT = {
    "biases": ("gate_up_proj_bias", "down_proj_bias"),
    "down": ("down_proj", "down_proj_bias"),
    "gate_up": ("gate_up_proj",),
    "everything": ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"),
    "nothing": (),
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_mixed_dtypes_run_as_in_grouped_mm(kept, dtype):
    """Parameters of float32 among those of bfloat16: values, dtypes and gradients are grouped_mm's."""
    module = make(GptOssExperts)
    for name, parameter in module.named_parameters():
        if name not in KEPT[kept]:
            parameter.data = parameter.data.to(BF16)
    expected, actual = (run(module, name, chosen(False), dtype) for name in ("grouped_mm", "moekit"))
    for name, parameter in module.named_parameters():
        assert actual[name].dtype is parameter.dtype, name
    assert actual["out"].dtype is dtype
    exact = run(module.double(), "moekit", chosen(False), torch.float64)
    for name, value in exact.items():
        ours, theirs = ((found[name].double() - value).norm() / value.norm() for found in (actual, expected))
        assert ours <= 1.5 * theirs + 2**-8, (name, float(ours), float(theirs))


# --- what is no plain weight ----------------------------------------------------------------------------------------


class Logged(Tensor):
    """A subclass with attributes, but the data of its own."""


class Elsewhere(Tensor):
    """A subclass that computes by a dispatch of its own."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)

    def __init__(self, data):
        self.data_elsewhere = data

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class Codes(Elsewhere):
    """A weight-only format: codes and one scale, dequantised where they are used."""

    def dequantize(self):
        return self.data_elsewhere * 2


class Activated(Codes):
    act_quant_kwargs = "int8"


REFUSED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "float8": (
        lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), requires_grad=False),
        "Parameter of dtype torch.float8_e4m3fn",
    ),
    "uint8": (lambda w: nn.Parameter(w.to(torch.uint8), requires_grad=False), "Parameter of dtype torch.uint8"),
    "int8": (lambda w: w.to(torch.int8), "Tensor of dtype torch.int8"),
    "complex": (lambda w: w.to(torch.complex64), "Tensor of dtype torch.complex64"),
    "a wrapper": (Elsewhere, "Elsewhere of dtype torch.bfloat16; dequantise or unwrap it"),
    "a format that quantises activations": (Activated, "Activated that quantises activations too of dtype torch.bfloat16"),
    "no tensor": (lambda w: [w], "a list; dequantise or unwrap it"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("weight", ["gate_up_proj", "down_proj", "gate_up_proj_bias"])
def test_what_is_no_weight_is_named(name, weight):
    build, message = REFUSED[name]
    module = make(GptOssExperts).to(BF16)
    module.config._experts_implementation = "moekit"
    replace(module, weight, build(getattr(module, weight).detach()))
    with pytest.raises(TypeError, match=rf"moekit.hf: GptOssExperts.{weight} must be a plain tensor of .*, got a") as error:
        module(*inputs())
    assert message in str(error.value)
    assert "another experts_implementation" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool], ids=str)
def test_tokens_that_are_no_tokens_are_named(dtype):
    module = make(Qwen3MoeExperts)
    module.config._experts_implementation = "moekit"
    x, indices, weights = inputs()
    with pytest.raises(TypeError, match=r"moekit.hf: hidden_states must be a floating-point tensor \(float64, "):
        module(x.to(dtype), indices, weights)


def test_a_subclass_that_is_its_data_is_used():
    module = make(Qwen3MoeExperts)
    expected = run(module, "eager", chosen(False), F32)["out"]
    replace(module, "down_proj", module.down_proj.detach().as_subclass(Logged))
    module.config._experts_implementation = "moekit"
    x = torch.randn(T, 16, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(T, K, generator=torch.Generator().manual_seed(1))
    module.config._experts_implementation = "eager"
    expected = module(x, chosen(False), weights)
    module.config._experts_implementation = "moekit"
    assert (module(x, chosen(False), weights) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_weight_only_format_is_dequantised():
    module = make(Qwen3MoeExperts)
    x, indices, weights = inputs(F32)
    module.config._experts_implementation = "moekit"
    plain = {name: p.detach() for name, p in module.named_parameters()}
    for name, value in plain.items():
        replace(module, name, Codes(value / 2))
    out = module(x, indices, weights)
    expected = moekit.experts(x, (indices, weights), plain["gate_up_proj"], plain["down_proj"])
    assert torch.equal(out, expected)


def test_a_gradient_that_dequantising_would_drop_is_refused():
    module = make(Qwen3MoeExperts)
    module.config._experts_implementation = "moekit"
    replace(module, "down_proj", Codes(module.down_proj.detach()).requires_grad_())
    with pytest.raises(TypeError, match=r"down_proj .* whose gradient dequantize\(\) drops .* requires_grad_\(False\)"):
        module(*inputs(F32))


@pytest.mark.parametrize(
    "config", ["Float8WeightOnlyConfig", "Int8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"]
)
def test_torchao_is_as_eager_or_refused(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = make(Qwen3MoeExperts).to(BF16)

    layer = Layer()
    chosen_weights = quantization.FqnToConfig(
        {f"experts.{n}": getattr(quantization, config)() for n in ("gate_up_proj", "down_proj")}
    )
    try:
        quantization.quantize_(layer, chosen_weights, filter_fn=None)
    except (AssertionError, NotImplementedError, RuntimeError):
        assert "Dynamic" in config  # needs a GPU to be made at all
        return
    found = {}
    for implementation in ("eager", "moekit"):
        layer.experts.config._experts_implementation = implementation
        if implementation == "moekit" and "Dynamic" in config:
            with pytest.raises(TypeError, match=r"gate_up_proj .* that quantises activations too"):
                layer.experts(*inputs())
            return
        with torch.no_grad():
            found[implementation] = layer.experts(*inputs()).float()
    error = (found["moekit"] - found["eager"]).norm() / found["eager"].norm()
    assert error < 2**-7


# --- sharded weights: a world of two ranks that never meet -----------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def distributed(mesh: object, value: Tensor, placement: object) -> nn.Parameter:
    from torch.distributed.tensor import DTensor

    return nn.Parameter(DTensor.from_local(value, mesh, [placement], run_check=False))


def test_a_replicated_weight_is_the_weight(mesh):
    from torch.distributed.tensor import Replicate

    module = make(Qwen3MoeExperts)
    module.config._experts_implementation = "moekit"
    x, indices, weights = inputs(F32)
    expected = module(x, indices, weights)
    expected.square().sum().backward()
    wanted = {name: p.grad for name, p in module.named_parameters()}
    for name, parameter in list(module.named_parameters()):
        replace(module, name, distributed(mesh, parameter.detach().clone(), Replicate()))
    out = module(x, indices, weights)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad.to_local(), wanted[name]), name


@pytest.mark.parametrize("dim", [0, 1, 2, "partial"])
def test_a_part_is_never_taken_for_the_whole(mesh, dim):
    from torch.distributed.tensor import Partial, Shard

    module = make(Qwen3MoeExperts)
    module.config._experts_implementation = "moekit"
    placement = Partial() if dim == "partial" else Shard(dim)
    replace(module, "down_proj", distributed(mesh, module.down_proj.detach(), placement))
    for expert_parallel in (False, True):
        module._is_expert_parallel = expert_parallel
        module.num_experts = E if dim != 0 or not expert_parallel else 2 * E
        with pytest.raises(TypeError, match=r"Qwen3MoeExperts.down_proj .*, got a DTensor placed as \(.*full_tensor\(\)"):
            module(*inputs(F32))


def test_a_ranks_experts_are_used_where_the_model_says_that_they_are_meant(mesh):
    from torch.distributed.tensor import Shard

    module = make(Qwen3MoeExperts)
    module.config._experts_implementation = "moekit"
    x, indices, weights = inputs(F32)
    expected = module(x, indices, weights)
    for name, parameter in list(module.named_parameters()):
        replace(module, name, distributed(mesh, parameter.detach(), Shard(0)))
    assert module.down_proj.shape[0] == 2 * E
    module._is_expert_parallel = True
    assert torch.equal(module(x, indices, weights), expected)


def test_products_name_the_sharded_weight(mesh):
    from torch.distributed.tensor import Shard

    x, indices, weights = inputs(F32)
    gate_up, down = torch.randn(E, 12, 16), torch.randn(E, 16, 6)
    sharded = distributed(mesh, down, Shard(0))
    with pytest.raises(
        TypeError, match=r"moekit.experts: down must be a plain tensor .* got a DTensor .*ep\.part.*full_tensor"
    ):
        moekit.experts(x, (indices, weights), gate_up, sharded)
    offsets = torch.full((E,), T, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"moekit.grouped_linear: weight must be a plain tensor .* got a DTensor"):
        moekit.grouped_linear(x, sharded, offsets, transposed=True)
    for dtype, name in itertools.product((torch.float8_e4m3fn, torch.int8), ("gate_up", "down")):
        stored = {"gate_up": gate_up, "down": down}
        stored[name] = stored[name].to(dtype)
        with pytest.raises(TypeError, match=rf"moekit.experts: {name} must be a floating-point tensor .* got {dtype}"):
            moekit.experts(x, (indices, weights), **stored)
    with pytest.raises(TypeError, match=r"moekit.grouped_linear: weight must be a floating-point tensor"):
        moekit.grouped_linear(x, gate_up.to(torch.float8_e4m3fn), offsets)


# --- FP8 checkpoints ------------------------------------------------------------------------------------------------


GATES = {
    "silu": {},
    "clamped": {"swiglu_limit": 0.5},
    "as GptOss": {"swiglu_limit": 0.5, "swiglu_alpha": 1.3},
    "softcapped": {"mlp_gate_softcap": 1.5, "mlp_up_softcap": 2.0},
    "ungated": {"hidden_activation": "relu2"},
}


def fp8_experts(gate: str = "silu", *, block: tuple[int, int] | None = (16, 16), width: int = 32, scale_fmt: str = "float"):
    """FP8 experts with a gate of the table, with weights and scales drawn."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    settings = {"hidden_size": 40, "moe_intermediate_size": width, "swiglu_alpha": None, "swiglu_limit": None}
    settings |= {"mlp_gate_softcap": None, "mlp_up_softcap": None, "hidden_activation": "silu", "expert_dtype": "fp8"}
    settings |= GATES[gate]
    has_gate = gate != "ungated"
    built = use_experts_implementation(
        type("Fp8", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS, has_gate=has_gate
    )
    module = built(
        Settings(_experts_implementation="moekit", **settings), block_size=block, scale_fmt=scale_fmt, has_gate=has_gate
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        drawn = drawn.abs() / 8 + 2**-6 if name.endswith("_scale_inv") else drawn * 4
        if parameter.dtype is torch.float8_e8m0fnu:
            drawn = torch.exp2(drawn.log2().round())
        parameter.data = drawn.to(parameter.dtype)
    return module


def dequantised(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Element by element, in float64."""
    height, width = codes.shape[1:]
    down, across = block or (height // scales.shape[1], width)
    row = torch.arange(height) // down
    column = torch.arange(width) // across
    return codes.double() * scales.double()[:, row][:, :, column]


def exact(module: nn.Module, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The layer in float64, a loop over slots, with the module's own gate."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = (
        dequantised(getattr(module, n), getattr(module, f"{n}_scale_inv"), module.block_size) for n in (first, "down_proj")
    )
    gate = module._apply_gate if module.has_gate else module.act_fn
    rows = []
    for token, chosen_experts, given in zip(x.double(), indices.tolist(), weights.double(), strict=True):
        parts = [
            w * (down[e] @ gate((up[e] @ token)[None])[0].double())
            for e, w in zip(chosen_experts, given, strict=True)
            if 0 <= e < E
        ]
        rows.append(torch.stack([*parts, 0 * token]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("slice_bytes", [2**30, 1], ids=["at once", "an expert at a time"])
def test_fp8_experts_against_float64(gate, slice_bytes, monkeypatch):
    monkeypatch.setattr(packed_products, "WORKSPACE", slice_bytes)
    for dtype, block, scale_fmt in (
        (F32, (16, 16), "float"),
        (F32, None, "float"),
        (BF16, (16, 32), "float"),
        (F32, (16, 16), "ue8m0"),
    ):
        module = fp8_experts(gate, block=block, scale_fmt=scale_fmt)
        x, indices, weights = inputs(dtype, hidden=40)
        indices[2, 0], indices[3] = E, -1
        x.requires_grad_(), weights.requires_grad_()
        out = module(x, indices, weights)
        expected = exact(module, x, indices, weights)
        found = [out, *torch.autograd.grad(out.double().square().sum(), (x, weights))]
        wanted = [expected, *torch.autograd.grad(expected.square().sum(), (x, weights))]
        assert out.dtype is dtype
        # In bfloat16 a gate may be rounded to the other side of a clamp, where its gradient is another.
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).norm() <= (2e-5 if dtype is F32 else 2**-5) * theirs.norm()


def test_fp8_experts_refuse_what_they_do_not_have():
    module = fp8_experts()
    module.activation_scheme = "static"
    with pytest.raises(NotImplementedError, match=r"activation_scheme='static'.*experts_implementation='eager'"):
        module(*inputs(hidden=40))
    module = fp8_experts()
    replace(module, "gate_up_proj", nn.Parameter(module.gate_up_proj.detach().view(torch.int8), requires_grad=False))
    with pytest.raises(
        TypeError, match=r"Fp8.gate_up_proj must be a plain tensor of float8_e4m3fn, got a Parameter of dtype torch.int8"
    ):
        module(*inputs(hidden=40))
    module = fp8_experts(width=24)
    with pytest.raises(
        ValueError, match=r"Fp8.gate_up_proj_scale_inv must be one scale for each block \(16, 16\) of \[5, 48, 40\]"
    ):
        module(*inputs(hidden=40))


def test_fp8_experts_that_were_not_quantised():
    module = fp8_experts()
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(module, name)
        parameter.data = parameter.data.to(BF16)
    x, indices, weights = inputs(hidden=40)
    assert torch.equal(
        module(x, indices, weights), moekit.experts(x, (indices, weights), module.gate_up_proj, module.down_proj)
    )


def test_registering_covers_the_fp8_interface():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    assert "moekit" in ALL_FP8_EXPERTS_FUNCTIONS
    moekit.hf.unregister()
    assert "moekit" not in ALL_FP8_EXPERTS_FUNCTIONS


# --- expert parallel: K above the experts of a rank ------------------------------------------------------------------

RANKS = {"Mixtral on 8 ranks": (8, 2, 8), "Qwen3-30B on 32 ranks": (128, 8, 32), "one expert, top 4": (4, 4, 4)}


@pytest.mark.parametrize("layout", RANKS)
@pytest.mark.parametrize(
    "kind", [Qwen3MoeExperts, GptOssExperts, *experts_class("muse_spark", "MuseSparkExperts")], ids=lambda k: k.__name__
)
def test_more_slots_than_experts_of_this_rank(layout, kind):
    """A rank's part is eager code's, forward and backward; many tokens and one, and a rank that gets none."""
    total, topk, ranks = RANKS[layout]
    local = total // ranks
    module = make(kind, num_experts=local, num_local_experts=local, n_routed_experts=local)
    module._is_expert_parallel = True
    generator = torch.Generator().manual_seed(2)
    for tokens, first in ((7, 0), (1, 0), (1, total)):
        indices = torch.stack([torch.randperm(total, generator=generator)[:topk] for _ in range(tokens)])
        weights = torch.rand(tokens, topk, generator=generator)
        x = torch.randn(tokens, 16, generator=generator)
        if tokens == 1 and first == 0:  # one of this rank
            indices = torch.arange(topk).flip(0)[None]
        mine = (indices >= first) & (indices < first + local)
        here = torch.where(mine, indices - first, local)
        found = {}
        for implementation in ("eager", "moekit"):  # eager code knows no such slots: they are of an expert, with no weight
            module.config._experts_implementation = implementation
            leaf, given = x.clone().requires_grad_(), weights.masked_fill(~mine, 0).requires_grad_()
            out = module(leaf, here.clone() if implementation == "moekit" else here.masked_fill(~mine, 0), given)
            grads = torch.autograd.grad(out.square().sum(), (leaf, given, *module.parameters()))
            found[implementation] = [out.detach(), *grads]
        assert bool(found["moekit"][0].any()) == bool(mine.any())
        found["eager"][2].masked_fill_(~mine, 0)
        for ours, theirs in zip(found["moekit"], found["eager"], strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
