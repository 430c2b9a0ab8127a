"""Products of few rows an expert by packed weights: on a GPU if there is one, else in Triton's interpreter.

The lookup in PTX, which no interpreter runs, is carried out here by hand.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch
from _interpreter import INTERPRETED, run_interpreted
from _reference import draw

pytest.importorskip("triton")

import moekit
from moekit import _codes
from moekit.kernels.triton import decode
from moekit.ops.unpack import Stored, float_scales, unpack
from moekit.packed import pack

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
HALVES = [torch.bfloat16, torch.float16]
kernels_run = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs in the interpreter, by the test below")
ENDS = [0, 1, 1, 3, 6, 10, 15, 15]  # 0, 1, 0, 2, 3, 4, 5 and 0 rows; two rows follow that are nobody's
ROWS = 17
FORMATS = {
    "nf4": ("nf4", {}),
    "nf4, doubly quantised": ("nf4", {"double_quant": True}),
    "mxfp4": ("mxfp4", {}),
    "fp8": ("fp8", {}),
    "fp8 by rows": ("fp8", {"block": (1, 192)}),
    "int8": ("int8", {}),
}


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_kernels_pass_in_the_interpreter():
    run_interpreted(Path(__file__))


# --- what needs no kernel -------------------------------------------------------------------------------------------


def carry_out(ptx: str, word: int, table: list[int]) -> list[float]:
    """What the instructions of a lookup leave in their eight outputs."""
    names = {"$8": word, **{f"${9 + i}": value & 0xFFFFFFFF for i, value in enumerate(table)}}
    out: dict[int, float] = {}

    def value(name: str) -> int:
        return names[name] if name in names else int(name, 0)

    def permuted(a: int, b: int, choice: int) -> int:
        data = struct.pack("<II", a, b)
        assert not choice & 0x8888, "the sign of a byte, eight times over"
        return int.from_bytes(bytes(data[choice >> 4 * i & 7] for i in range(4)), "little")

    for line in ptx.strip("{}\n").splitlines():
        name, target, *operands = re.findall(r"\{[$\w]+, [$\w]+\}|[$\w.]+", line)
        match name:
            case ".reg":
                pass
            case "and.b32":
                names[target] = value(operands[0]) & value(operands[1])
            case "or.b32":
                names[target] = value(operands[0]) | value(operands[1])
            case "shr.u32":
                names[target] = value(operands[0]) >> value(operands[1])
            case "prmt.b32":
                names[target] = permuted(*map(value, operands[:2]), value(operands[2]) & 0xFFFF)
            case "mov.b32" if target.startswith("{"):
                low, high = re.findall(r"[$\w]+", target)
                names[low], names[high] = value(operands[0]) & 0xFFFF, value(operands[0]) >> 16
            case "mov.b32":
                names[target] = value(operands[0])
            case "cvt.f32.f16":
                out[int(target[1:])] = struct.unpack("<e", struct.pack("<H", names[operands[0]]))[0]
            case _:
                raise AssertionError(line)
    return [out[i] if i in out else names[f"${i}"] for i in range(8)]


LOOKUPS = {
    ("nf4", "wide"): decode._NF4,
    ("mxfp4", "wide"): decode._MXFP4,
    ("nf4", "halves"): decode._NF4_HALVES,
    ("mxfp4", "halves"): decode._MXFP4_HALVES,
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("form", "width"), LOOKUPS)
def test_the_lookup_gives_every_value_in_its_place(form, width, dtype):
    if width == "wide":
        dtype = torch.float16
    ptx, cpu = LOOKUPS[form, width].value, torch.device("cpu")
    planes, values = decode._planes(form, cpu, dtype).tolist(), decode._values(form, cpu, dtype)
    if width == "halves":
        values = values.to(dtype).view(torch.int16).int() & 0xFFFF
    for shift in range(16):
        codes = [(3 * place + shift + place // 4) % 16 for place in range(8)]
        data = [high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True)]
        if form == "mxfp4":
            data = [low << 4 | high for high, low in zip(codes[::2], codes[1::2], strict=True)]
        word = int.from_bytes(bytes(data), "little")
        assert carry_out(ptx, word, planes) == values[codes].tolist()


def test_rounding_a_table_loses_no_more_than_rounding_weights_does():
    cpu = torch.device("cpu")
    exact = _codes.table("nf4", cpu)
    for dtype, loss in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        assert torch.equal(decode._values("mxfp4", cpu, dtype), _codes.table("mxfp4", cpu))
        assert bool(((decode._values("nf4", cpu, dtype) - exact).abs() <= loss * exact.abs()).all())


@pytest.mark.parametrize(("groups", "expected"), [(64, 32), (90, 32), (24, 8), (6, 4), (1, 1), (3, 4), (33, 4), (128, 32)])
def test_threads_side_by_side(groups, expected):
    assert decode.threads_along(groups, 32) == expected
    assert decode.threads_along(24, 32, used=3) == 32 and decode.threads_along(23, 32, used=3) == 8


# --- kernels --------------------------------------------------------------------------------------------------------


def on_device(stored: Stored) -> Stored:
    return stored._replace(codes=stored.codes.to(DEVICE), scales=[scale.to(DEVICE) for scale in stored.scales])


def case(name, dtype, *, width=37, depth=192, experts=8, rows=ROWS):
    form, options = FORMATS[name]
    stored = pack(draw(2, experts, width, depth, dtype=torch.float32), form, **options).stored()
    return draw(1, rows, depth).to(dtype), stored


def weights(stored: Stored, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The values of a stack as a kernel has them for rows of ``dtype``, in float64: a table of nf4 is rounded."""
    with moekit.backend("torch"):
        if stored.format == "mxfp4" and kind == "dots":
            return unpack(stored, 0, stored.shape[0], dtype).double()
        if stored.format != "nf4":
            return unpack(stored, 0, stored.shape[0], torch.float32).double()
    codes = torch.stack([stored.codes >> 4, stored.codes & 15], -1).long()
    scales = float_scales(stored, 0, stored.shape[0]).flatten()
    table = decode._values("nf4", torch.device("cpu"), torch.float16 if kind == "sums" else dtype)
    values = table[codes].view(len(scales), -1)
    return (values * scales[:, None]).double().view(stored.shape)


def assert_product(result, rows, matrices, offsets):
    """One rounding to the dtype of a sum in float32."""
    count = int(offsets[-1])
    expert = torch.searchsorted(offsets, torch.arange(count), right=True)
    x, w = rows[:count].double(), matrices[expert]
    value, size = torch.einsum("ri,roi->ro", x, w), torch.einsum("ri,roi->ro", x.abs(), w.abs())
    allowed = torch.finfo(result.dtype).eps / 2 * value.abs() + 4 * torch.finfo(torch.float32).eps * size
    assert bool(((result[:count].double() - value).abs() <= allowed + torch.finfo(result.dtype).tiny).all())


def run(rows, stored, offsets, kind, fill=7.0):
    cut = decode._CUTS[kind]
    out = torch.full((rows.shape[0], stored.shape[1]), fill, dtype=rows.dtype, device=DEVICE)
    return decode.product(rows.to(DEVICE), on_device(stored), offsets.to(DEVICE), out, kind, cut).cpu()


@kernels_run
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["sums", "dots"])
def test_products_match_float64(name, kind):
    for dtype, width, depth in ((torch.bfloat16, 37, 192), (torch.float16, 65, 64)):
        if name == "fp8 by rows" and depth != 192:
            continue
        (rows, stored), offsets = case(name, dtype, width=width, depth=depth), torch.tensor(ENDS).int()
        result = run(rows, stored, offsets, kind)
        assert_product(result, rows, weights(stored, kind, dtype), offsets)
        assert (result[ENDS[-1] :] == 7).all(), "rows of no expert are left as they are"


@kernels_run
@pytest.mark.parametrize("kind", ["sums", "dots"])
def test_depths_of_one_group_and_past_a_tile(kind):
    for name, depth in (("mxfp4", 32), ("nf4", 1088), ("int8", 16), ("fp8", 144)):
        (rows, stored), offsets = case(name, torch.bfloat16, width=5, depth=depth), torch.tensor(ENDS).int()
        matrices = weights(stored, kind, torch.bfloat16)
        assert_product(run(rows, stored, offsets, kind), rows, matrices, offsets)


@kernels_run
@pytest.mark.parametrize("kind", ["sums", "dots"])
def test_a_row_alone_gives_the_same_bits(kind):
    rows, stored = case("nf4", torch.bfloat16, experts=2, width=20)
    together = run(rows, stored, torch.tensor([2, ROWS]).int(), kind)
    for row in (2, 9):
        alone = run(rows[row : row + 1], stored, torch.tensor([0, 1]).int(), kind)
        assert torch.equal(together[row : row + 1], alone)


@kernels_run
@pytest.mark.parametrize("kind", ["sums", "dots"])
@pytest.mark.parametrize("ends", [[-4, 2**40, -(2**40), 3], [9, 3, 12, 1], [99, 99, 99, 99], [-1, -1, 2, 2]])
def test_whatever_the_offsets_are_nothing_outside_is_written(ends, kind):
    rows, stored = case("mxfp4", torch.bfloat16, experts=4, width=9, depth=32, rows=12)
    memory = torch.full((16, 13), 7.0, dtype=torch.bfloat16, device=DEVICE)
    out, offsets = memory[2:14, 2:11], torch.tensor(ends, device=DEVICE)
    decode.product(rows.to(DEVICE), on_device(stored), offsets, out, kind, decode._CUTS[kind])
    assert (out[max(0, *ends) :] == 7).all()
    out.fill_(7.0)
    assert (memory == 7).all()


@kernels_run
def test_strided_rows():
    (rows, stored), offsets = case("nf4", torch.bfloat16, width=12), torch.tensor(ENDS).int()
    plain = run(rows, stored, offsets, "sums")
    for other in (rows.T.contiguous().T, torch.cat([rows, rows], 1)[:, 192:]):
        assert torch.equal(run(other, stored, offsets, "sums"), plain)


@kernels_run
@pytest.mark.parametrize("rows_an_expert", [1, 3])
def test_the_launcher_chooses(rows_an_expert):
    count = 4 * rows_an_expert
    rows, stored = case("mxfp4", torch.bfloat16, experts=4, width=9, rows=count)
    offsets = torch.tensor([1, 2, 2, count]).int()
    found = decode.packed_rows_few(rows.to(DEVICE), on_device(stored), offsets.to(DEVICE)).cpu()
    assert torch.equal(found, run(rows, stored, offsets, "sums" if rows_an_expert == 1 else "dots"))


def test_what_is_left_to_others():
    rows, stored = case("mxfp4", torch.bfloat16, experts=2, width=6, depth=64)
    offsets = torch.tensor([1, 2]).int()

    def left(rows=rows, stored=stored, offsets=offsets, out=None):
        return decode.packed_rows_few(rows, stored, offsets, out) is NotImplemented

    assert left(rows=rows.float()) and left(offsets=offsets.float())
    assert left(rows=rows[:1].expand(33, -1)), "too many"
    assert left(stored=stored._replace(codes=stored.codes.transpose(1, 2).contiguous().transpose(1, 2)))
    assert left(out=torch.empty(6, ROWS, dtype=rows.dtype).T) and left(out=torch.empty(ROWS, 6))
    apart = torch.empty(2 * 6 * 32 + 1, dtype=torch.uint8)[1:].view(2, 6, 32)
    assert left(stored=stored._replace(codes=apart)), "not aligned"
    rows, stored = case("int8", torch.bfloat16, experts=2, width=6, depth=40)
    assert left(rows, stored), "no whole groups"


@kernels_run
def test_nothing_to_do():
    for experts, count, width in ((2, 0, 6), (2, 3, 0)):
        codes = torch.zeros(experts, width, 32, dtype=torch.uint8)
        stored = Stored(codes, [torch.zeros(experts, width, 2, dtype=torch.uint8)], "mxfp4", (1, 32))
        rows, offsets = torch.ones(count, 64).bfloat16(), torch.full((experts,), count).int()
        found = decode.packed_rows_few(rows.to(DEVICE), on_device(stored), offsets.to(DEVICE))
        assert found.shape == (count, width)
