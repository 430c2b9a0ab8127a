"""The formats: packing against the publishers' packers bit for bit, unpacking against the formulas and their unpackers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moekit
from moekit import PackedExperts
from moekit._codes import E2M1_TABLE, NF4_TABLE
from moekit.ops.grouped_linear import packed_linear
from moekit.ops.unpack import Stored, float_scales, unpack

bitsandbytes = pytest.importorskip("bitsandbytes.functional")
OPS = torch.ops.moekit
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = {
    "nf4": {"format": "nf4"},
    "nf4, doubly quantised": {"format": "nf4", "double_quant": True},
    "mxfp4": {"format": "mxfp4"},
    "fp8": {"format": "fp8"},
    "fp8, a scale a row": {"format": "fp8", "block": (1, 192)},
    "int8": {"format": "int8"},
}
every_format = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Weights with what packers find hard: blocks of zeros, negative zeros, outliers, subnormal numbers."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    flat = drawn.view(-1)
    flat[:192] = 0
    flat[192:200] = -0.0
    flat[320:448] *= 1e-38
    flat[500] = 3
    return drawn.to(dtype)


def by_hand(stored: Stored) -> Tensor:
    """The values in float64, from the table in ``moekit.ops.unpack``."""
    num_experts, height, width = stored.shape
    if stored.format in ("nf4", "mxfp4"):
        high, low = stored.codes >> 4, stored.codes & 15
        first, table = (high, NF4_TABLE) if stored.format == "nf4" else (low, E2M1_TABLE)
        second = low if stored.format == "nf4" else high
        codes = torch.stack([first, second], -1).flatten(2)
        values = torch.tensor(table, dtype=torch.float32).double()[codes.long()]
    else:
        values = stored.codes.double()
    scale = stored.scales[0].double()
    if stored.format == "nf4":
        if len(stored.scales) > 1:
            _, nested, offset = stored.scales
            dynamic = bitsandbytes.create_dynamic_map()[stored.scales[0].long()]
            scale = (dynamic * nested.repeat_interleave(256)[: dynamic.numel()].view(dynamic.shape) + offset).double()
        return (values.view(num_experts, -1, 64) * scale.unsqueeze(2)).view(stored.shape)
    if stored.format == "mxfp4":
        return values * torch.exp2(scale - 127).repeat_interleave(32, 2)
    if stored.format == "int8":
        return values * scale.unsqueeze(2) / 127
    rows, columns = (torch.arange(size) // of for size, of in zip((height, width), stored.block, strict=True))
    return values * scale[:, rows][:, :, columns]


# --- unpacking ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@every_format
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_values_are_those_of_the_formula(options, dtype):
    packed = moekit.pack(weights(3, 64, 192), **options)
    wanted = by_hand(packed.stored())
    got = packed.unpack(dtype=dtype)
    step = torch.finfo(dtype).eps if dtype is not torch.float64 else 2**-50  # twice that of one rounding
    small = torch.finfo(dtype).smallest_normal * step
    assert got.dtype == dtype and got.shape == wanted.shape
    assert ((got.double() - wanted).abs() <= step * wanted.abs() + small).all()


@pytest.mark.usefixtures("backend")
@every_format
def test_a_slice_of_experts_is_that_of_all(options):
    packed = moekit.pack(weights(5, 32, 192), **options)
    stored, whole = packed.stored(), packed.unpack()
    out = torch.full((2, 32, 192), 7.0)
    for part in (unpack(stored, 1, 3, torch.float32), unpack(stored, 1, 3, torch.float32, out), packed.unpack(slice(1, 3))):
        assert torch.equal(part, whole[1:3])
    assert unpack(stored, 1, 3, torch.float32, out) is out
    assert packed.unpack(slice(4, 2)).shape == (0, 32, 192)
    assert torch.equal(packed[1:4].unpack(), whole[1:4])  # doubly quantised: from within a block of scales
    assert torch.equal(packed[3:].unpack(), whole[3:])
    assert torch.equal(float_scales(stored, 1, 3), float_scales(packed[1:3].stored(), 0, 2))


@pytest.mark.usefixtures("backend")
@every_format
def test_opcheck_of_unpack(options):
    stored = moekit.pack(weights(3, 8, 192), **options).stored()
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # The other one multiplies what it is given, of which there is no such thing for float8.
    tests += [] if stored.format == "fp8" else ["test_schema"]
    torch.library.opcheck(OPS.unpack.default, (*stored, 1, 3, torch.bfloat16), test_utils=tests)


@pytest.mark.usefixtures("backend")
@every_format
def test_operators_are_given_parts_that_belong_together(options):
    """Kernels find scales by the place of the codes: with fewer of them they would read past their end."""
    codes, scales, format, block = moekit.pack(weights(3, 64, 192), **options).stored()
    rows, offsets, of_three = torch.ones(4, 192), torch.tensor([1, 3, 4]), [*scales, None, None][:3]
    linear = lambda *parts: packed_linear(rows, *parts, format, block, offsets, False)  # noqa: E731
    with pytest.raises(ValueError, match=r"experts must be a slice of the 3, got -1:2"):
        OPS.unpack(codes, scales, format, block, -1, 2, torch.float32)
    for place, name in enumerate(["scale", "nested", "offset"][: len(scales)]):
        fewer = [scale.reshape(-1)[:0] if at == place else scale for at, scale in enumerate(scales)]
        wanted = rf"{name} must be of shape as {format} has for codes of shape .*, got shape \[0\]"
        with pytest.raises(ValueError, match=wanted):
            OPS.unpack(codes, fewer, format, block, 0, 3, torch.float32)
        with pytest.raises(ValueError, match=wanted):
            linear(codes, *fewer, *of_three[len(scales) :])
    exact = rows.double() @ by_hand(Stored(codes, scales, format, block))[[0, 1, 1, 2]].mT  # of three experts, in this order
    exact = torch.stack([exact[row, row] for row in range(4)])
    assert (linear(codes, *of_three) - exact).abs().max() < 1e-5 * exact.abs().max()
    with pytest.raises(ValueError, match="scales must be one tensor, or three"):
        OPS.unpack(codes, [scales[0], scales[0]], format, block, 0, 3, torch.float32)
    with pytest.raises(ValueError, match="format must be one of"):
        OPS.unpack(codes, scales, "nf5", block, 0, 3, torch.float32)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nf4_unpacks_as_bitsandbytes_does(double_quant, dtype):
    w = weights(3, 64, 128, dtype=dtype)
    codes, state = bitsandbytes.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    wanted = bitsandbytes.dequantize_4bit(codes, state)
    with moekit.backend("torch"):
        got = moekit.pack(w, "nf4", double_quant=double_quant).unpack()
    normal = (got == 0) | (got.abs() >= torch.finfo(dtype).smallest_normal)  # with AVX512 it makes zeros of others
    assert torch.equal(got[normal], wanted[normal]) and normal.float().mean() > 0.9


def test_int8_unpacks_as_bitsandbytes_does():
    w = weights(3, 64, 128)
    codes, scales, _ = bitsandbytes.int8_vectorwise_quant(w.view(-1, 128))
    with moekit.backend("torch"):
        got = moekit.pack(w, "int8").unpack().view(-1, 128)
    assert torch.equal(got, bitsandbytes.int8_vectorwise_dequant(codes, scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_mxfp4_unpacks_as_transformers_does(dtype):
    """Every byte under every exponent, those of subnormal numbers included."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    exponents = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    packed = PackedExperts.from_state_dict({"w_blocks": codes, "w_scales": exponents}, "w", dtype=dtype)
    with moekit.backend("torch"):
        got = packed.unpack()
    assert torch.equal(got.mT, mxfp4.convert_moe_packed_tensors(codes, exponents, dtype=dtype))


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 64, 192), (5, 3, 64), (2, 32, 66)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_packs_as_bitsandbytes_does(shape, dtype, double_quant):
    w = weights(*shape, dtype=dtype)
    codes, state = bitsandbytes.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    stored = moekit.pack(w, "nf4", double_quant=double_quant).stored()
    assert torch.equal(stored.codes.view(-1, 1), codes) and torch.equal(stored.scales[0].view(-1), state.absmax)
    if double_quant:
        assert torch.equal(stored.scales[1], state.state2.absmax) and torch.equal(stored.scales[2], state.offset)


def test_nf4_at_the_middle_between_two_values():
    table = torch.tensor(NF4_TABLE)
    middles = (table[:-1] + table[1:]) / 2
    above, below = middles.nextafter(torch.ones(15)), middles.nextafter(-torch.ones(15))
    w = torch.cat([middles, above, below, table, torch.ones(3)]).view(1, 1, 64)
    codes, _ = bitsandbytes.quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(moekit.pack(w, "nf4").stored().codes.view(-1, 1), codes)


@pytest.mark.parametrize("spread", ["none", "wide", "tiny"])
def test_doubly_quantised_scales_of_any_spread(spread):
    """Scales that are all their mean; over many orders of magnitude; and with a last block that is not full."""
    absmax = torch.ones(900)
    if spread == "wide":
        absmax = torch.logspace(-6, 0, 900)
    if spread == "tiny":
        absmax[450:] += torch.arange(450) * 2e-7
    w = (torch.rand(900, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1).clamp(-0.99, 0.99)
    w[:, 5] = 1
    w = (w * absmax[:, None]).view(9, 100, 64)
    _, state = bitsandbytes.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    stored = moekit.pack(w, "nf4", double_quant=True).stored()
    for mine, theirs in zip(stored.scales, (state.absmax, state.state2.absmax, state.offset), strict=True):
        assert torch.equal(mine.reshape(-1), theirs.reshape(-1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_packs_as_bitsandbytes_does(dtype):
    w = weights(3, 64, 192, dtype=dtype)
    codes, scales, _ = bitsandbytes.int8_vectorwise_quant(w.view(-1, 192))
    stored = moekit.pack(w, "int8").stored()
    assert torch.equal(stored.codes.view(-1, 192), codes) and torch.equal(stored.scales[0].view(-1), scales)


@pytest.mark.parametrize("block", [(128, 128), (1, 384), (64, 128)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_packs_as_transformers_does(block, dtype):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    w = weights(2, 256, 384, dtype=dtype)
    config = SimpleNamespace(weight_block_size=block, scale_fmt="float")
    wanted = fp8.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"w": w})
    stored = moekit.pack(w, "fp8", block=block).stored()
    assert torch.equal(stored.scales[0], wanted["w_scale_inv"])
    assert torch.equal(stored.codes.view(torch.uint8), wanted["w"].view(torch.uint8))


def test_fp8_blocks_at_the_edges_are_smaller():
    w = weights(2, 130, 200)
    stored = moekit.pack(w, "fp8").stored()
    assert stored.scales[0].shape == (2, 2, 2)
    for rows, columns, place in ((slice(128), slice(128), 0), (slice(128, 130), slice(128, 200), 1)):
        alone = moekit.pack(w[:, rows, columns], "fp8", block=(128, 128)).stored()
        assert torch.equal(stored.scales[0][:, place, place], alone.scales[0][:, 0, 0])
        assert torch.equal(stored.codes[:, rows, columns].double(), alone.codes.double())


def test_mxfp4_takes_the_nearest_code_and_the_even_one_of_two():
    """Against the distances in float64, for values on, at and between all codes, under scales up and down the range."""
    table = torch.tensor(E2M1_TABLE[:8], dtype=torch.float64)
    middles = (table[:-1] + table[1:]) / 2
    near = torch.cat([middles * (1 + sign * 2.0**-20) for sign in (0, 1, -1)])
    magnitudes = torch.cat([table, near, torch.tensor([6.0, 5.9, 0.0])])  # 32 of them, the largest of which is 6
    for exponent in (-120, -9, 0, 100):
        w = torch.stack([magnitudes, -magnitudes]) * 2.0**exponent
        stored = moekit.pack(w.float()[None], "mxfp4").stored()
        assert (stored.scales[0] == exponent + 127).all()
        codes = torch.stack([stored.codes & 15, stored.codes >> 4], -1).flatten(2)[0]
        distance = (magnitudes[:, None] - table).abs()
        # Ties, which are exact in float64, go to the code with an even number.
        nearest = (distance + torch.arange(8) % 2 * 1e-12).argmin(1)
        assert torch.equal(codes[0].long(), nearest) and torch.equal(codes[1].long(), nearest + 8)


@pytest.mark.parametrize("largest", [6.0, 6.000001, 5.999999, 3.0, 3.0000002, 1e-38, 1e-44, 3e38])
def test_mxfp4_scale_is_the_smallest_power_of_two_that_holds_the_block(largest):
    w = torch.zeros(1, 1, 32)
    w[..., 3] = -largest
    exponent = int(moekit.pack(w, "mxfp4").stored().scales[0]) - 127
    least = -126  # that of the smallest normal number
    assert 6 * 2.0**exponent >= float(w.abs().max()) and (exponent == least or 6 * 2.0 ** (exponent - 1) < w.abs().max())


def test_zeros_unpack_to_zeros():
    for options in FORMATS.values():
        packed = moekit.pack(torch.zeros(2, 32, 192), **options)
        assert not packed.unpack().any()


@every_format
def test_strides_do_not_matter_and_experts_are_packed_alone(options):
    w = weights(3, 32, 192, dtype=torch.bfloat16)
    wanted = moekit.pack(w, **options).stored()
    got = moekit.pack(w.mT.contiguous().mT, **options).stored()
    for mine, other in zip((got.codes, *got.scales), (wanted.codes, *wanted.scales), strict=True):
        assert torch.equal(mine.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    assert torch.equal(moekit.pack(w[1:2], **options).stored().codes.view(torch.uint8), wanted.codes[1:2].view(torch.uint8))


class Largest(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that is made of another."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            made = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() > 1
            if made and all(value.data_ptr() != arg.data_ptr() for arg in args if isinstance(arg, Tensor)):
                self.seen = max(self.seen, value.numel())
        return out


@every_format
def test_one_expert_at_a_time_is_in_float(options):
    w = weights(40, 32, 192, dtype=torch.bfloat16)
    out = torch.empty_like(w)
    with Largest() as packing:
        packed = moekit.pack(w, **options)
    with Largest() as unpacking, moekit.backend("torch"):
        unpack(packed.stored(), 0, 40, torch.bfloat16, out)
    one = 128 * 256  # what fp8's blocks make of 32 x 192
    assert 0 < packing.seen <= one and 0 < unpacking.seen <= one < 40 * 32 * 192


# --- bad input ------------------------------------------------------------------------------------------------------

WRONG = {
    "format": (weights(2, 8, 64), {"format": "fp4"}, ValueError, "format must be one of 'nf4', 'mxfp4', 'fp8', 'int8'"),
    "ndim": (weights(16, 64), {"format": "nf4"}, ValueError, "weight must be a 3-D tensor"),
    "dtype": (torch.zeros(2, 8, 64).int(), {"format": "nf4"}, TypeError, "weight must be a floating-point tensor"),
    "no tensor": ([1.0], {"format": "nf4"}, TypeError, "weight must be a tensor"),
    "nf4 out * in": (
        weights(8, 5, 66),
        {"format": "nf4"},
        ValueError,
        r"weight must be of so many values .* by 64, got 330",
    ),
    "nf4 in": (weights(2, 64, 33), {"format": "nf4"}, ValueError, "weight must be of a last dimension .* by 2, got 33"),
    "mxfp4 in": (weights(2, 8, 80), {"format": "mxfp4"}, ValueError, "weight must be of a last dimension .* by 32, got 80"),
    "empty": (torch.zeros(2, 0, 64), {"format": "nf4"}, ValueError, "weight must be of at least one value"),
    "nf4 block": (weights(2, 8, 64), {"format": "nf4", "block": (1, 32)}, ValueError, r"block must be \(1, 64\)"),
    "int8 block": (weights(2, 8, 64), {"format": "int8", "block": (8, 64)}, ValueError, r"block must be \(1, 64\)"),
    "fp8 block": (weights(2, 8, 64), {"format": "fp8", "block": 128}, TypeError, "block must be two integers"),
    "fp8 block of 0": (weights(2, 8, 64), {"format": "fp8", "block": (0, 64)}, ValueError, "block must be at least 1"),
    "double_quant": (weights(2, 8, 64), {"format": "int8", "double_quant": True}, ValueError, "has no effect on int8"),
    "NaN": (weights(2, 8, 64).fill_(torch.nan), {"format": "fp8"}, ValueError, "weight must be finite.* in expert 0"),
    "inf": (torch.full((1, 8, 64), torch.inf).half(), {"format": "nf4"}, ValueError, "weight must be finite"),
}


@pytest.mark.parametrize(("weight", "options", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_packed(weight, options, error, message):
    with pytest.raises(error, match=message):
        moekit.pack(weight, **options)


def test_what_cannot_be_unpacked():
    packed = moekit.pack(weights(3, 8, 64), "nf4")
    stored = packed.stored()
    with pytest.raises(ValueError, match="experts must be a slice of the 3, got 1:4"):
        unpack(stored, 1, 4, torch.float32)
    with pytest.raises(TypeError, match="dtype must be"):
        unpack(stored, 0, 1, torch.int8)
    with pytest.raises(ValueError, match="out must be of shape"):
        unpack(stored, 0, 2, torch.float32, torch.empty(3, 8, 64))
    with pytest.raises(TypeError, match=r"out must be contiguous, of torch\.float32"):
        unpack(stored, 0, 2, torch.float32, torch.empty(2, 8, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="experts must be a slice without a step"):
        packed.unpack(slice(0, 3, 2))


def test_values_of_weights_are_looked_at_on_a_cpu_only():
    assert moekit.pack(torch.empty(2, 32, 192, device="meta"), "mxfp4").is_meta
    with moekit.debug():
        assert moekit.pack(torch.empty(2, 32, 192, device="meta"), "nf4", double_quant=True).is_meta
