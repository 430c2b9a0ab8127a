"""``PackedExperts`` as a tensor: what PyTorch may do to it, what it refuses, and what it is in a checkpoint."""

from __future__ import annotations

import copy
import io
import json
import operator
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moekit
from moekit import PackedExperts
from moekit.ops.unpack import Stored

FORMATS = {
    "nf4": {"format": "nf4"},
    "nf4, doubly quantised": {"format": "nf4", "double_quant": True},
    "mxfp4": {"format": "mxfp4"},
    "fp8": {"format": "fp8"},
    "fp8, a scale a row": {"format": "fp8", "block": (1, 192)},
    "int8": {"format": "int8"},
}
BITS = {"nf4": 4 + 32 / 64, "mxfp4": 4 + 8 / 32, "int8": 8 + 32 / 192, "fp8": 8 + 32 / (64 * 128)}
every_format = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)


def weights(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


@pytest.fixture
def packed() -> PackedExperts:
    return moekit.pack(weights(4, 64, 192), "nf4")


class Holder(nn.Module):
    """A layer with a packed parameter, an adapter beside it, and a way to use both."""

    def __init__(self, packed: PackedExperts) -> None:
        super().__init__()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.adapter = nn.Parameter(torch.ones(packed.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        values = self.weight.unpack(slice(1, None), torch.float32).sum(0)
        return torch.nn.functional.linear(x + self.adapter, values)


def parts(packed: PackedExperts) -> list[Tensor]:
    stored = packed.stored()
    return [stored.codes, *stored.scales]


def same(first: PackedExperts, second: PackedExperts) -> bool:
    """Every byte, and everything else."""
    kinds = [(p.format, p.stored().block, p.turned, p.shape, p.dtype, p.device) for p in (first, second)]
    raw = lambda part: part.reshape(-1).view(torch.uint8)  # noqa: E731
    return kinds[0] == kinds[1] and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))
        for a, b in zip(parts(first), parts(second), strict=True)
    )


# --- what it is -----------------------------------------------------------------------------------------------------


@every_format
def test_what_it_says_of_itself(options):
    packed = moekit.pack(weights(4, 64, 192), **options)
    assert isinstance(packed, PackedExperts) and packed.format == options["format"]
    assert packed.shape == (4, 64, 192) and packed.dtype is torch.bfloat16 and packed.device.type == "cpu"
    assert not packed.requires_grad and packed.is_leaf and packed.is_contiguous() and len(packed) == 4
    assert packed.bytes == sum(part.nbytes for part in parts(packed))
    assert repr(packed) == f"PackedExperts({packed.format}, [4, 64, 192], bfloat16, cpu, {packed.bytes:,} bytes)"
    assert str(nn.Parameter(packed, requires_grad=False)) == repr(packed)


@pytest.mark.parametrize("format", BITS)
def test_bytes_are_what_the_format_says(format):
    packed = moekit.pack(weights(4, 128, 192 if format == "int8" else 128), format)
    bits = 8 + 32 / 128**2 if format == "fp8" else BITS[format]
    assert packed.bytes * 8 == packed.numel() * bits


@every_format
def test_turned(options):
    packed = moekit.pack(weights(4, 64, 192), **options)
    turned = packed.mT
    assert turned.turned and turned.shape == (4, 192, 64) and "turned" in repr(turned)
    assert torch.equal(turned.unpack(), packed.unpack().mT) and same(turned.transpose(1, 2), packed)
    assert turned.stored().shape == (4, 64, 192) and turned.stored().codes.data_ptr() == packed.stored().codes.data_ptr()
    assert same(packed.transpose(-1, -2), turned) and same(turned[1:3].mT, packed[1:3])
    with pytest.raises(ValueError, match="dims must be the last two"):
        packed.transpose(0, 1)


def test_another_dtype_is_stood_for_by_the_same_bytes(packed):
    half = packed.to(torch.float16)
    assert half.dtype is torch.float16 and half.unpack().dtype is torch.float16
    assert half.stored().codes.data_ptr() == packed.stored().codes.data_ptr()
    assert torch.equal(packed.float().unpack(), packed.unpack(dtype=torch.float32))
    with pytest.raises(TypeError, match=r"dtype must be float64, float32, bfloat16 or float16, got .*int8"):
        packed.to(torch.int8)


@every_format
def test_copies(options):
    packed = moekit.pack(weights(4, 64, 192), **options).mT.half()
    buffer = io.BytesIO()
    torch.save({"w": packed}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)["w"]
    copies = [packed.clone(), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), loaded, packed.to("cpu", copy=True)]
    for other in copies:
        assert same(other, packed) and other.stored().codes.data_ptr() != packed.stored().codes.data_ptr()
    for view in (packed.detach(), packed.data, packed.cpu(), packed[:], copy.copy(packed)):
        assert same(view, packed) and view.stored().codes.data_ptr() == packed.stored().codes.data_ptr()


def test_copies_of_a_parameter_are_parameters(packed):
    layer = Holder(packed)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other.weight, nn.Parameter) and same(other.weight, packed)
        assert [*dict(other.named_parameters())] == ["weight", "adapter"]
    twice = copy.deepcopy([packed, packed])
    assert twice[0] is twice[1]


@every_format
def test_on_meta(options):
    packed = moekit.pack(weights(4, 64, 192), **options)
    meta = packed.to("meta")
    assert meta.is_meta and all(part.is_meta for part in parts(meta)) and meta.bytes == packed.bytes
    made = moekit.pack(weights(4, 64, 192).to("meta"), **options)
    assert [(part.shape, part.dtype) for part in parts(made)] == [(part.shape, part.dtype) for part in parts(packed)]
    assert meta.unpack().shape == (4, 64, 192) and meta[1:3].mT.unpack().shape == (2, 192, 64)


def test_pinning_is_left_to_the_parts(packed, monkeypatch):
    """Without an accelerator PyTorch pins nothing: here is what it would be asked for."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part, *_: pinned.append(part) or part)
    assert not packed.is_pinned()
    torch.ops.aten._pin_memory(packed)
    assert [part.data_ptr() for part in pinned] == [part.data_ptr() for part in parts(packed)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_format
def test_on_a_gpu(options):
    w = weights(4, 128, 192)
    packed = moekit.pack(w, **options)
    there = packed.cuda()
    assert there.is_cuda and same(there.cpu(), packed) and torch.equal(there.unpack().cpu(), packed.unpack())
    assert packed.pin_memory().is_pinned() and same(packed.pin_memory().cuda(non_blocking=True), there)
    if "double_quant" not in options:  # there the order in which a mean is summed up shows
        assert same(moekit.pack(w.cuda(), **options), there)
    assert Holder(packed).cuda().weight.is_cuda


def test_a_module_that_holds_it_moves(packed):
    layer = Holder(packed).half()
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.dtype is torch.float16
    layer.to("meta")
    assert layer.weight.is_meta and layer.weight.format == "nf4"
    layer.to_empty(device="cpu").to(torch.bfloat16)
    layer.load_state_dict(Holder(packed).state_dict())
    assert same(layer.weight, packed) and isinstance(layer.weight, nn.Parameter)
    layer.load_state_dict({**layer.state_dict(), "weight": packed[:].float()}, assign=True)
    assert layer.weight.dtype is torch.float32


def test_only_the_same_kind_can_be_copied_into_it(packed):
    target = moekit.pack(weights(4, 64, 192, seed=1), "nf4")
    target.copy_(packed)
    assert same(target, packed)
    for other in (packed.unpack(), moekit.pack(weights(4, 64, 192), "int8"), packed.mT, packed[:2]):
        with pytest.raises(TypeError, match="only what is packed in the same way can be copied into PackedExperts"):
            target.copy_(other)
    with pytest.raises(TypeError, match=r"copy_.* use \.unpack\(\)"):
        torch.empty(4, 64, 192).copy_(packed)


# --- what it refuses ------------------------------------------------------------------------------------------------

DENSE, ROWS = torch.ones(4, 192, 64), torch.ones(8, 192).bfloat16()
REFUSED = {
    "aten.add.Tensor": lambda p: torch.add(p, 1),
    "__add__": lambda p: p + 1,
    "__radd__": lambda p: torch.ones(1) + p,
    "__matmul__": lambda p: p @ DENSE,
    "__rmatmul__": lambda p: DENSE @ p,
    "__eq__": lambda p: p == p,
    "__imul__": lambda p: operator.imul(p, 2),
    "aten.bmm": lambda p: torch.bmm(DENSE, p),
    "aten.t.default": lambda p: torch.nn.functional.linear(torch.ones(1, 192), p[:1]),
    "aten.sum": lambda p: p.sum(),
    "aten.abs": lambda p: p.abs(),
    "aten.view.dtype": lambda p: p.view(torch.uint8),
    "aten.select.int": lambda p: p[1],
    "aten.unbind.int": lambda p: list(p),
    "aten.stack": lambda p: torch.stack([p, p]),
    "aten.index.Tensor": lambda p: p[torch.tensor([0, 1])],
    "aten.permute": lambda p: p.permute(0, 2, 1),
    "aten.equal": lambda p: torch.equal(p, p),
    "aten._grouped_mm": lambda p: torch.nn.functional.grouped_mm(ROWS, p.mT, offs=torch.tensor([2, 2, 5, 8]).int()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_computes_with_codes(packed, name):
    with pytest.raises(TypeError, match=rf"^PackedExperts: {re.escape(name)}[\w.]* is not .*; use \.unpack\(\)"):
        REFUSED[name](packed)


@pytest.mark.parametrize("change", ["zero_", "exp_", "neg_", "random_"])
def test_it_is_immutable(packed, change):
    before = packed.clone()
    with pytest.raises(TypeError, match=rf"PackedExperts: aten\.{change}.* which are immutable"):
        getattr(packed, change)()
    with pytest.raises(TypeError, match="which are immutable"):
        packed.add_(1)
    with pytest.raises((TypeError, ValueError)):
        packed[0] = 1
    assert same(packed, before)


def test_it_has_no_gradient(packed):
    def attribute() -> None:
        packed.requires_grad = True

    asks = [lambda: nn.Parameter(packed), lambda: packed.requires_grad_(), attribute]
    for ask in [*asks, lambda: Holder(packed).requires_grad_(True)]:
        with pytest.raises(RuntimeError, match=r"packed weights are frozen .* requires_grad=False"):
            ask()
    assert packed.requires_grad_(False) is packed
    packed.requires_grad = False
    layer = Holder(packed)
    layer(torch.ones(2, 192)).sum().backward()
    wanted = packed.unpack(slice(1, None), torch.float32).sum((0, 1)) * 2
    assert torch.allclose(layer.adapter.grad, wanted, atol=1e-5) and layer.weight.grad is None


@pytest.mark.parametrize("index", [slice(0, 4, 2), (slice(None), slice(1, 3)), (slice(None), slice(None), slice(2))])
def test_only_experts_can_be_sliced(packed, index):
    with pytest.raises(ValueError, match=r"index must be a slice of experts \(dimension 0\) without a step"):
        packed[index]


def test_safetensors_do_not_take_it_for_memory(packed, tmp_path):
    with pytest.raises(RuntimeError), pytest.warns():
        save_file({"w": packed}, tmp_path / "x.safetensors")


# --- torch.compile --------------------------------------------------------------------------------------------------


def products(layer: Holder, x: Tensor) -> Tensor:
    """What an operator does: the parts by name."""
    codes, scales, format, block = layer.weight.stored()
    values = torch.ops.moekit.unpack(codes, scales, format, block, 0, 2, torch.float32)
    return x @ values.sum(0).mT + layer.adapter.sum()


def of_a_view(layer: Holder, x: Tensor) -> Tensor:
    turned = layer.weight.mT
    assert turned.turned and turned.format == layer.weight.format
    return x @ turned.to(torch.float32).unpack(slice(1, 3)).sum(0) + layer.adapter.sum() * turned.stored().codes[0, 0, 0]


def as_a_module(layer: Holder, x: Tensor) -> Tensor:
    return layer(x)


def of_some_experts(layer: Holder, x: Tensor) -> Tensor:
    return x @ layer.weight[1:3].unpack().float().sum(0).mT + layer.adapter.sum()


@pytest.mark.parametrize("run", [products, of_a_view, of_some_experts, as_a_module])
@pytest.mark.parametrize("double_quant", [False, True])
def test_compiled(run, double_quant):
    layer = Holder(moekit.pack(weights(4, 64, 192), "nf4", double_quant=double_quant))
    x = torch.rand(3, 192)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(layer, x), run(layer, x))
    other = moekit.pack(weights(4, 64, 192, seed=1), "nf4", double_quant=double_quant)
    layer.weight = nn.Parameter(other, requires_grad=False)
    assert torch.equal(compiled(layer, x), run(layer, x))
    compiled(layer, x).sum().backward()
    assert layer.adapter.grad is not None


# --- checkpoints ----------------------------------------------------------------------------------------------------


@every_format
def test_a_checkpoint_gives_it_back(options, tmp_path):
    packed = moekit.pack(weights(4, 64, 192).half(), **options)
    tensors = {"a.other": torch.ones(1), **packed.state_dict("a.w")}
    assert all(type(value) is Tensor and value.is_contiguous() for value in tensors.values())
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    again = PackedExperts.from_state_dict(loaded, "a.w", dtype=torch.float16)
    assert same(again, packed)
    known = torch.float16 if packed.format == "nf4" else torch.bfloat16
    assert PackedExperts.from_state_dict(loaded, "a.w").dtype is known
    assert same(packed, PackedExperts.from_state_dict(packed.mT.state_dict("w"), "w", dtype=torch.float16))


def test_names_are_those_of_published_checkpoints():
    w = weights(4, 64, 192)
    shapes = lambda tensors: {name: (list(t.shape), t.dtype) for name, t in tensors.items()}  # noqa: E731
    assert shapes(moekit.pack(w, "mxfp4").state_dict("experts.down_proj")) == {
        "experts.down_proj_blocks": ([4, 64, 6, 16], torch.uint8),
        "experts.down_proj_scales": ([4, 64, 6], torch.uint8),
    }
    assert shapes(moekit.pack(w, "fp8").state_dict("w")) == {
        "w": ([4, 64, 192], torch.float8_e4m3fn),
        "w_scale_inv": ([4, 1, 2], torch.float32),
    }
    assert shapes(moekit.pack(w, "int8").state_dict("w")) == {
        "w": ([4, 64, 192], torch.int8),
        "w.SCB": ([4, 64], torch.float32),
    }


@pytest.mark.parametrize("double_quant", [False, True])
def test_what_bitsandbytes_writes_and_reads(double_quant):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    replace_parameter = pytest.importorskip("bitsandbytes.nn.parametrize").replace_parameter_4bit
    w = weights(4, 64, 192)
    layer = nn.Module()
    layer.w = nn.Parameter(w.clone())
    replace_parameter(layer, "w", compress_statistics=double_quant, quant_type="nf4")
    theirs = layer.state_dict()
    packed = moekit.pack(w, "nf4", double_quant=double_quant)
    assert same(PackedExperts.from_state_dict(theirs, "w"), packed)
    mine = packed.state_dict("w")
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in mine)
    # Its storage in a floating-point type, as FSDP wants it.
    theirs["w"] = theirs["w"].view(-1).view(torch.bfloat16).unsqueeze(1)
    assert same(PackedExperts.from_state_dict(theirs, "w"), packed)
    names = {name.removeprefix("w."): value for name, value in mine.items() if name != "w"}
    state = bitsandbytes.functional.QuantState.from_dict(names, torch.device("cpu"))
    with moekit.backend("torch"):
        assert torch.equal(bitsandbytes.functional.dequantize_4bit(mine["w"], state), packed.unpack())


def test_blocks_of_fp8_are_told_by_the_shapes():
    w = weights(4, 130, 192)
    for block in ((128, 128), (1, 192), (130, 192), (65, 64)):
        packed = moekit.pack(w, "fp8", block=block)
        given = {} if block != (65, 64) else {"block": block}
        assert same(PackedExperts.from_state_dict(packed.state_dict("w"), "w", **given), packed)
    with pytest.raises(ValueError, match=r"scales\[0\] must be of shape \[4, 2, 2\], got shape \[4, 2, 3\]"):
        PackedExperts.from_state_dict(packed.state_dict("w"), "w")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_fp8_may_be_narrow(dtype):
    tensors = moekit.pack(weights(2, 128, 192), "fp8").state_dict("w")
    tensors["w_scale_inv"] = tensors["w_scale_inv"].to(dtype)
    packed = PackedExperts.from_state_dict(tensors, "w")
    wide = PackedExperts.from_state_dict({**tensors, "w_scale_inv": tensors["w_scale_inv"].float()}, "w")
    assert packed.bytes < wide.bytes and torch.equal(packed.unpack(), wide.unpack())


STATE = ".quant_state.bitsandbytes__nf4"
NESTED = FORMATS["nf4, doubly quantised"]


def state_with(**entries) -> Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64, 192], **entries}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def with_nan(scales: Tensor) -> Tensor:
    return torch.where(torch.arange(scales.numel()).view(scales.shape) == 3, torch.nan, scales)


# What of which format's checkpoint is changed to what (nothing: left out), and the error.
WRONG = {
    "no weight": ("nf4", "", None, ValueError, "tensors must be with 'w', got "),
    "no scales": ("nf4", ".absmax", None, ValueError, r"tensors must be with 'w.absmax', got \['w', 'w.quant_map'"),
    "no mark": ("fp8", "_scale_inv", None, ValueError, r"with one of 'w.quant_state.bitsandbytes__nf4', .* got \['w'\]"),
    "no exponents": ("mxfp4", "_scales", None, ValueError, r"tensors must be with 'w_scales', got \['w_blocks'\]"),
    "truncated codes": ("nf4", "", lambda t: t[:-1], ValueError, r"w must be of 24576 elements.* got 24575 \(truncated\?\)"),
    "truncated scales": ("nf4", ".absmax", lambda t: t[:-1], ValueError, "w.absmax must be of 768 elements"),
    "truncated nested": (NESTED, ".nested_absmax", lambda t: t[:-1], ValueError, r"scales\[1\] must be of shape \[3\]"),
    "other table": ("nf4", ".quant_map", lambda t: t * 1.01, ValueError, "w.quant_map must be the standard table of nf4"),
    "other nested table": (NESTED, ".nested_quant_map", lambda t: t.flip(0), ValueError, "w.nested_quant_map must be"),
    "other block": ("nf4", STATE, lambda t: state_with(blocksize=128), ValueError, "blocksize must be 64, got 128"),
    "other nested block": (NESTED, STATE, lambda t: state_with(nested_offset=0.0), ValueError, "must be 256, got None"),
    "a matrix": ("nf4", STATE, lambda t: state_with(shape=[256, 192]), ValueError, r"shape must be \[experts, out, in\]"),
    "a wrong shape": (
        "nf4",
        STATE,
        lambda t: state_with(shape=[4, 64, 193]),
        ValueError,
        "weight must be of a last dimension .* by 2",
    ),
    "no state": ("nf4", STATE, lambda t: t[:9], ValueError, "bitsandbytes__nf4 must be the bytes of a JSON object"),
    "a state of no bytes": ("nf4", STATE, lambda t: t.float(), ValueError, "must be the bytes of a JSON object"),
    "NaN in nf4": ("nf4", ".absmax", with_nan, ValueError, r"scales\[0\] must be finite, got infinities or NaN"),
    "NaN in int8": ("int8", ".SCB", with_nan, ValueError, r"scales\[0\] must be finite"),
    "NaN in fp8": ("fp8", "_scale_inv", with_nan, ValueError, r"scales\[0\] must be finite"),
    "NaN in mxfp4": ("mxfp4", "_scales", lambda t: t.clone().fill_(255), ValueError, r"must be finite, got 255"),
    "scales of int8": ("int8", ".SCB", lambda t: t.half(), TypeError, r"scales\[0\] must be a tensor of float32"),
    "shape of int8's": ("int8", ".SCB", lambda t: t.T, ValueError, r"scales\[0\] must be of shape \[4, 64\]"),
    "codes of int8": ("int8", "", lambda t: t.int(), TypeError, "codes must be a tensor of int8, got torch.int32"),
    "a matrix of int8": ("int8", "", lambda t: t[0], ValueError, "w must be a 3-D tensor"),
    "codes of fp8": ("fp8", "", lambda t: t.to(torch.float8_e5m2), TypeError, "codes must be a tensor of float8_e4m3fn"),
    "scales of fp8": ("fp8", "_scale_inv", lambda t: t.half(), TypeError, "float32, bfloat16 or float8_e8m0fnu, got"),
    "truncated blocks": ("mxfp4", "_blocks", lambda t: t[..., :8], ValueError, r"w_blocks must be of shape .*, 16\]"),
    "fewer blocks": ("mxfp4", "_blocks", lambda t: t[:, :, :5], ValueError, r"scales\[0\] must be of shape \[4, 64, 5\]"),
    "a list": ("int8", ".SCB", lambda t: t.tolist(), TypeError, "w.SCB must be a tensor, got list"),
}


@pytest.mark.parametrize(("options", "suffix", "change", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_loaded(options, suffix, change, error, message):
    options = {"format": options} if isinstance(options, str) else options
    tensors = moekit.pack(weights(4, 64, 192), **options).state_dict("w")
    found = tensors.pop("w" + suffix)
    if change is not None:
        tensors["w" + suffix] = change(found)
    with pytest.raises(error, match=message):
        PackedExperts.from_state_dict(tensors, "w")


def test_parts_have_to_fit():
    codes, scales = torch.zeros(2, 4, 32, dtype=torch.uint8), torch.ones(2, 4)
    assert PackedExperts.of(Stored(codes, [scales], "nf4", (1, 64))).dtype is torch.bfloat16
    wrong = {
        "format must be one of 'nf4'": Stored(codes, [scales], "nf5", (1, 64)),
        "block must be": Stored(codes, [scales], "nf4", (1, 32)),
        "codes must be a 3-D tensor": Stored(codes[0], [scales], "nf4", (1, 64)),
        "scales must be 3 for nf4, got 2": Stored(codes, [scales.byte(), scales[0, :1]], "nf4", (1, 64)),
        "scales must be 1 for int8, got 2": Stored(codes.char(), [scales, scales], "int8", (1, 32)),
        r"scales\[0\] must be of shape \[2, 4\]": Stored(codes, [scales[:, :3]], "nf4", (1, 64)),
        r"scales\[0\] must be on the device of codes": Stored(codes, [scales.to("meta")], "nf4", (1, 64)),
    }
    for message, stored in wrong.items():
        with pytest.raises(ValueError, match=message):
            PackedExperts.of(stored)
    with pytest.raises(TypeError, match=r"scales\[0\] must be a tensor of float32, got torch.float64"):
        PackedExperts.of(Stored(codes, [scales.double()], "nf4", (1, 64)))
    with pytest.raises(TypeError, match="dtype must be float64"):
        PackedExperts.of(Stored(codes, [scales], "nf4", (1, 64)), torch.int8)


# --- FSDP2 ----------------------------------------------------------------------------------------------------------

WORLD = 2


def sharded_cases() -> dict[str, PackedExperts]:
    """Each format, every other one turned."""
    packed = {name: moekit.pack(weights(4, 128, 192), **options) for name, options in FORMATS.items()}
    return {name: one.mT if number % 2 else one for number, (name, one) in enumerate(packed.items())}


def of_rank(rank: int, folder: str) -> None:
    """Two steps of layers whose packed experts are sharded, and what cannot be sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found: dict[str, list[Tensor]] = {}
    for name, packed in sharded_cases().items():
        layer = Holder(packed)
        fully_shard(layer, mesh=mesh)
        shard = layer.weight.to_local()
        assert isinstance(shard, PackedExperts) and same(shard, packed[2 * rank : 2 * rank + 2])
        layer.load_state_dict(layer.state_dict())
        outputs = [layer(torch.ones(2, shard.shape[-1])) for _ in range(2)]
        outputs[1].sum().backward()
        found[name] = [*(out.detach() for out in outputs), layer.adapter.grad.full_tensor()]
    for count, message in ((3, "experts must be divisible"), (1, "experts must be at least one for each rank")):
        with pytest.raises(ValueError, match=message):
            fully_shard(Holder(moekit.pack(weights(count, 64, 192), "nf4")), mesh=mesh)
    with pytest.raises(ValueError, match=r"doubly quantised scales must be in whole blocks .* \(ignored_params=\)"):
        fully_shard(Holder(moekit.pack(weights(2, 32, 192), "nf4", double_quant=True)), mesh=mesh)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_by_fsdp2(tmp_path: Path):
    torch.multiprocessing.spawn(of_rank, args=(str(tmp_path),), nprocs=WORLD)
    found = torch.load(tmp_path / "found.pt")
    for name, packed in sharded_cases().items():
        layer = Holder(packed)
        out = layer(torch.ones(2, packed.shape[-1]))
        out.sum().backward()
        first, second, grad = found[name]
        assert torch.equal(first, out.detach()) and torch.equal(second, first)
        assert torch.allclose(grad, layer.adapter.grad, rtol=1e-6)


# --- inference mode, other processes ----------------------------------------------------------------------------------

SEEN = {
    "mT": lambda p: p.mT,
    "transpose": lambda p: p.transpose(1, 2),
    "slice": lambda p: p[1:3],
    "to a dtype": lambda p: p.to(torch.float16),
    "cpu": lambda p: p.cpu(),
    "float": lambda p: p.float(),
}


@pytest.mark.parametrize("name", SEEN)
def test_inference_mode_changes_nothing(name):
    parameter = torch.nn.Parameter(moekit.pack(weights(4, 64, 64), "nf4"), requires_grad=False)
    with torch.inference_mode():
        made = moekit.pack(weights(4, 64, 64), "nf4")
        found = [SEEN[name](each) for each in (parameter, made)]
        with pytest.raises(TypeError, match=r"use \.unpack\(\)"):
            parameter.sum()
    for each in found:
        assert same(each, SEEN[name](parameter))


def test_products_in_inference_mode():
    weight = torch.nn.Parameter(moekit.pack(weights(2, 64, 64), "nf4"), requires_grad=False)
    rows, offsets = weights(1, 5, 64)[0], torch.tensor([2, 5], dtype=torch.int32)
    expected = moekit.grouped_linear(rows, weight, offsets)
    with torch.inference_mode():
        assert torch.equal(moekit.grouped_linear(rows, weight, offsets), expected)


def test_shared_with_other_processes():
    packed = moekit.pack(weights(2, 64, 64), "nf4", double_quant=True)
    before = packed.unpack()
    assert not packed.is_shared()
    assert packed.share_memory_() is packed and packed.is_shared()
    assert torch.equal(packed.unpack(), before)


def test_data_is_the_parts_of_another_one():
    parameter = torch.nn.Parameter(moekit.pack(torch.randn(2, 64, 128), "int8"), requires_grad=False)
    other = moekit.pack(torch.randn(2, 64, 128), "nf4", double_quant=True)
    parameter.data = other
    assert isinstance(parameter, torch.nn.Parameter) and parameter.format == "nf4"
    assert torch.equal(parameter.unpack(), other.unpack()) and torch.equal(parameter.data.unpack(), other.unpack())
    parameter.data = parameter.data.to(torch.bfloat16)  # as prepare_model_for_kbit_training does, the other way round
    assert parameter.dtype is torch.bfloat16 and torch.equal(parameter.unpack(), other.unpack().bfloat16())
    turned = moekit.pack(torch.randn(3, 64, 64), "mxfp4").turn()
    parameter.data = turned
    assert parameter.shape == (3, 64, 64) and parameter.turned and torch.equal(parameter.unpack(), turned.unpack())
    assert torch.equal(parameter.stored().codes, turned.stored().codes)
    with pytest.raises(TypeError, match=r"PackedExperts: .data must be a PackedExperts, got Tensor"):
        parameter.data = torch.zeros(3, 64, 64)
    assert torch.equal(parameter.unpack(), turned.unpack())


def test_a_backward_knows_that_packed_weights_were_changed():
    """It refers to them, and would go back through those that came after."""
    packed, other = (moekit.pack(torch.randn(2, 128, 64), "int8") for _ in range(2))
    parameter = torch.nn.Parameter(packed, requires_grad=False)
    x, down = torch.randn(6, 64, requires_grad=True), torch.randn(2, 64, 64)
    choice = torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    calls = {
        "experts": lambda: moekit.experts(x, choice, parameter, down),
        "grouped_linear": lambda: moekit.grouped_linear(x, parameter, torch.tensor([3, 6]).int()),
    }
    for name, call in calls.items():
        out = call().sum()
        torch.autograd.grad(out, x, retain_graph=True)
        with torch.no_grad():
            parameter.copy_(other)
        with pytest.raises(RuntimeError, match=f"{name}: packed weights were changed after a forward"):
            torch.autograd.grad(out, x)


def test_who_makes_parameters_anew_hears_that_packed_experts_are_none():
    accelerate = pytest.importorskip("accelerate")
    module = torch.nn.Module()
    module.inner = torch.nn.Module()
    module.inner.weight = torch.nn.Parameter(moekit.pack(torch.randn(2, 64, 64), "nf4"), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"made by moekit.pack, .* as Accelerate's cpu_offload and disk_offload do, cannot hold"
    ):
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
