"""Grouped products and unpacking in Triton against float64: on a GPU if there is one, else in the interpreter.

Without a GPU one test starts another pytest on this file, which interprets, as in ``test_triton_kernels.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _interpreter import INTERPRETED, run_interpreted
from _reference import draw

pytest.importorskip("triton")

import moekit
from moekit.kernels.triton import KERNELS, _launch, _policy, gemm
from moekit.kernels.triton._policy import Blocks
from moekit.ops import packed_products
from moekit.ops.unpack import unpack

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
LOW = [torch.float32, torch.bfloat16, torch.float16]
ENDS = [0, 5, 5, 24, 33, 33]  # the first, third and last have no rows; three rows follow that are nobody's
ROWS = 36


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_operators_pass_in_the_interpreter():
    run_interpreted(Path(__file__))


# --- dense matrices --------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(monkeypatch):
    """Small tiles, many to a program, whatever the shapes; on a GPU the policy's own."""

    def choose(arch="9"):
        if GPU:
            return
        monkeypatch.setattr(_launch, "arch", lambda device: _launch.Arch(arch, 32))
        monkeypatch.setattr(gemm, "processors", lambda device: 2)
        small = Blocks(16, 32, 32, 4, 2, 1)
        described = small._replace(flat=True) if arch == "9" else None
        monkeypatch.setattr(_policy, "described", lambda shape, dtype, *_, **__: described if dtype.itemsize == 2 else None)
        monkeypatch.setattr(_policy, "plain", lambda dtype: small)
        monkeypatch.setattr(_policy, "fetched", lambda *_, **__: small)
        monkeypatch.setattr(_policy, "low_rank", lambda dtype: small)

    return choose


def on(*tensors):
    """The same, on the device of the kernels, strides and all."""
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t) for t in tensors]


def case(dtype, depth, width, rank=0, layout="out, in", ends=ENDS, rows=ROWS):
    """Rows, matrices as views of either storage, offsets, and a low-rank update as adapters have it."""
    E = len(ends)
    matrices = draw(2, E, width, depth).to(dtype)
    matrices = matrices.mT if layout == "out, in" else matrices.mT.contiguous()
    update = (draw(3, rows, rank).to(dtype), draw(4, E, width, rank).to(dtype).mT) if rank else (None, None)
    return draw(1, rows, depth).to(dtype), matrices, torch.tensor(ends).int(), update


def assert_products(found, rows, matrices, ends, update, before, first=0):
    """One rounding to the dtype of a sum in float32, for the experts from ``first`` on; other rows are as before."""
    ends, out = [0, *ends][first : first + len(matrices) + 1], found.to(rows.device).double()
    terms = [(rows, matrices)] + ([] if update[0] is None else [update])
    for place, block in enumerate(map(slice, ends, ends[1:])):
        value = sum(x[block].double() @ m[place].double() for x, m in terms)
        size = sum(x[block].double().abs() @ m[place].double().abs() for x, m in terms)
        # Matrix units cut sums off where others round them.
        step = torch.finfo(found.dtype).eps / 2 * value.abs() + 8 * torch.finfo(torch.float32).eps * size
        error = (out[block] - value).abs() - step - torch.finfo(found.dtype).tiny
        assert (error <= 0).all(), f"expert {first + place}: {float(error.max())}"
    for others in (slice(ends[0]), slice(ends[-1], None)):
        assert torch.equal(found[others], before.to(found)[others]), "rows of others are left as they are"


@pytest.mark.parametrize("rank", [0, 4, 8, 40])
@pytest.mark.parametrize("layout", ["out, in", "in, out"])
@pytest.mark.parametrize(
    ("dtype", "depth", "width"), [(torch.bfloat16, 72, 40), (torch.float16, 32, 64), (torch.bfloat16, 8, 8)]
)
def test_products_by_the_copy_engine(dtype, depth, width, layout, rank, cut):
    cut()
    rows, matrices, offsets, update = case(dtype, depth, width, rank, layout)
    out = torch.full((ROWS, width), 7.0, dtype=dtype, device=DEVICE)
    update = on(*update) if rank else update
    assert KERNELS["grouped_rows"](*on(rows, matrices, offsets), out, *update) is out
    assert_products(out, rows, matrices, ENDS, [t if t is None else t.cpu() for t in update], torch.full_like(out, 7))


LEFT = {
    "float64": lambda: case(torch.float64, 32, 32),
    "strides of no 16 bytes": lambda: case(torch.bfloat16, 36, 32),
    "another dtype": lambda: (draw(1, ROWS, 32).half(), *case(torch.bfloat16, 32, 32)[1:]),
    "no rows": lambda: case(torch.bfloat16, 32, 32, ends=[0, 0], rows=0),
    "no depth": lambda: case(torch.bfloat16, 0, 32),
    "strided matrices": lambda: (
        *case(torch.bfloat16, 32, 32)[:1],
        draw(2, 6, 64, 64).bfloat16(),  # of which every other number, where it is
        torch.tensor(ENDS),
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_the_copy_engine_cannot_fetch_is_left(name, cut):
    cut()
    rows, matrices, offsets, *_ = LEFT[name]()
    matrices = matrices.to(DEVICE)
    matrices = matrices[:, ::2, ::2] if name == "strided matrices" else matrices
    assert KERNELS["grouped_rows"](rows.to(DEVICE), matrices, offsets.to(DEVICE), None) is NotImplemented


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("layout", ["out, in", "in, out"])
@pytest.mark.parametrize(
    ("dtype", "depth", "width", "arch"),
    [(torch.float32, 37, 40, "9"), (torch.float16, 36, 35, "9"), (torch.bfloat16, 72, 40, "8")],
)
def test_products_that_pytorch_would_wait_with(dtype, depth, width, arch, layout, rank, cut):
    cut(arch)
    rows, matrices, offsets, update = case(dtype, depth, width, rank, layout)
    out = torch.full((ROWS, width), 7.0, dtype=dtype, device=DEVICE)
    rows[0, 0], rows[6, 1] = torch.inf, torch.nan
    found = KERNELS["grouped_rows"](*on(rows, matrices, offsets), out, *(on(*update) if rank else update))
    if found is NotImplemented:  # a GPU of another architecture than ``arch``, whose product of bfloat16 is PyTorch's
        assert GPU and dtype is torch.bfloat16
        return
    assert found is out
    assert torch.equal(out[0].cpu(), (rows[0] @ matrices[1]).sign() * torch.inf) and out[6].isnan().all()
    for row in (0, 6):  # which others' results are none of
        rows[row], out[row] = 0, 0 if update[0] is None else update[0][row].to(out) @ update[1][1 if row == 0 else 3].to(out)
    assert_products(out, rows, matrices, ENDS, update, torch.full_like(out, 7))


@pytest.mark.parametrize("arch", ["9", "8"])
@pytest.mark.parametrize(("first", "stop"), [(0, 6), (1, 4), (3, 4), (4, 6)])
@pytest.mark.parametrize(
    ("dtype", "depth", "width"), [(torch.bfloat16, 40, 72), (torch.float16, 37, 35), (torch.float32, 33, 64)]
)
def test_slices_of_experts(dtype, depth, width, first, stop, arch, cut):
    cut(arch)
    for layout, rank in (("out, in", 4), ("in, out", 0)):
        rows, matrices, offsets, update = case(dtype, depth, width, rank, layout)
        mine = [update[0], None if rank == 0 else update[1][first:stop]]
        out = torch.full((ROWS, width), 7.0, dtype=dtype, device=DEVICE)
        args = (*on(rows, matrices[first:stop], offsets), first, out, *(mine if rank == 0 else on(*mine)))
        assert KERNELS["grouped_slice"](*args) is not NotImplemented
        assert_products(out, rows, matrices[first:stop], ENDS, mine, torch.full_like(out, 7), first)


@pytest.mark.parametrize("rank", [1, 4, 8, 100])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 33), (torch.bfloat16, 64), (torch.float16, 35)])
def test_updates_alone(dtype, width, rank, cut):
    cut("8")
    low, factors, offsets, _ = case(dtype, rank, width)
    before = draw(5, ROWS, width).to(dtype)
    out = KERNELS["grouped_add"](*on(before, low, factors, offsets))
    one = torch.eye(width, dtype=dtype).expand(len(ENDS), width, width)
    assert_products(out, before, one, ENDS, (low, factors), before)


NONSENSE = {
    "negative": [-5, 3, -1, 9, 20, 36],
    "descending": [30, 20, 10, 5, 2, 0],
    "past the rows": [3, 4000, 5, 2**31 - 1, 7, 100],
    "past 32 bits": [2**40, -(2**40), 2**62, 5, -(2**63), 2**33 + 4],
}


@pytest.mark.parametrize("arch", ["9", "8"])
@pytest.mark.parametrize("name", NONSENSE)
def test_offsets_are_not_trusted(name, arch, cut):
    cut(arch)
    rows, matrices, _, (low, factors) = case(torch.bfloat16, 32, 32, 8)
    offsets = torch.tensor(NONSENSE[name])
    offsets = offsets if name == "past 32 bits" else offsets.int()
    room = torch.full((3 * ROWS, 32), 7.0, dtype=torch.bfloat16, device=DEVICE)
    out, guards = room[ROWS : 2 * ROWS], (room[:ROWS], room[2 * ROWS :])
    rows, matrices, offsets, low, factors = on(rows, matrices, offsets, low, factors)
    KERNELS["grouped_rows"](rows, matrices, offsets, out, low, factors)
    for first in range(len(ENDS) - 1):
        KERNELS["grouped_slice"](rows, matrices[:2], offsets, first, out)
    KERNELS["grouped_add"](out, low, factors, offsets)
    KERNELS["packed_rows"](rows, stored("int8", len(ENDS), 32, 32), offsets, out, False)
    assert all((guard == 7).all() for guard in guards) and not out.isnan().any()


# --- packed weights -------------------------------------------------------------------------------------------------

FORMATS = {
    "nf4": {},
    "nf4 nested": {"double_quant": True},
    "mxfp4": {},
    "fp8": {},
    "fp8 row": {"block": (1, 192)},
    "fp8 small": {"block": (32, 64)},
    "int8": {},
}


def packed_as(name, weight):
    """A stack in that format, on the device of the kernels."""
    options = dict(FORMATS[name])
    if "block" in options:
        options["block"] = (options["block"][0], min(options["block"][1], weight.shape[2]))
    packed = moekit.pack(weight, name.split()[0], **options).stored()
    return packed._replace(codes=packed.codes.to(DEVICE), scales=[scale.to(DEVICE) for scale in packed.scales])


def stored(name, num_experts, height, width, seed=6):
    """Drawn weights, packed."""
    return packed_as(name, draw(seed, num_experts, height, width).float() * 0.02)


def reference(packed, dtype):
    with moekit.backend("torch"):
        return unpack(packed, 0, packed.shape[0], dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_unpacking_gives_the_same_bits(name):
    for (height, width), dtype in zip(((10, 192), (7, 64), (18, 64)), LOW, strict=True):
        packed = stored(name, 3, height, width)
        expected = reference(packed, dtype)
        assert torch.equal(KERNELS["unpack"](packed, 0, 3, dtype, None), expected)
        room = torch.full((4, height, width), 7.0, dtype=dtype, device=DEVICE)
        assert KERNELS["unpack"](packed, 1, 3, dtype, room[1:3]) is not NotImplemented
        assert torch.equal(room[1:3], expected[1:]) and (room[::3] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_checkpoints(dtype):
    packed = stored("fp8", 2, 40, 192)
    packed = packed._replace(scales=[packed.scales[0].to(dtype)])
    assert torch.equal(KERNELS["unpack"](packed, 0, 2, torch.bfloat16, None), reference(packed, torch.bfloat16))


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_products_of_packed_weights(name, rank, back, cut):
    cut("8")
    many = [0, 5, 5, 80, 97, 97]
    for number, (height, width, ends) in enumerate(((40, 192, ENDS), (72, 64, many))):
        dtype = LOW[(number + rank + back) % 3]
        packed = stored(name, len(ENDS), height, width)
        weights = reference(packed, dtype).cpu()
        depth, outputs = (height, width) if back else (width, height)
        rows, _, offsets, update = case(dtype, depth, outputs, rank, ends=ends, rows=ends[-1] + 3)
        out = torch.full((len(rows), outputs), 7.0, dtype=dtype, device=DEVICE)
        given = on(*update) if rank else update
        assert KERNELS["packed_rows"](*on(rows), packed, *on(offsets), out, back, *given) is out
        assert_products(out, rows, weights if back else weights.mT, ends, update, torch.full_like(out, 7))


@pytest.mark.parametrize(("name", "rank", "back"), [("nf4", 4, False), ("mxfp4", 0, True), ("fp8", 4, True)])
def test_products_slice_by_slice(name, rank, back, cut):
    cut("9")
    packed = stored(name, len(ENDS), 40, 192)
    weights = reference(packed, torch.bfloat16).cpu()
    depth, outputs = (40, 192) if back else (192, 40)
    rows, _, offsets, update = case(torch.bfloat16, depth, outputs, rank)
    out = torch.full((ROWS, outputs), 7.0, dtype=torch.bfloat16, device=DEVICE)
    given = on(*update) if rank else update
    args = (*on(rows), packed, *on(offsets), out, back, [(0, 2), (2, 5), (5, 6)], *given)
    assert KERNELS["packed_slices"](*args) is out
    assert_products(out, rows, weights if back else weights.mT, ENDS, update, torch.full_like(out, 7))


@pytest.mark.parametrize("kernel", ["packed_slices", "grouped_slice", "grouped_rows"])
def test_tiles_for_bits_of_any_batch(kernel, cut, monkeypatch):
    """They are chosen alike whatever rows there are, and a row has the same bits among fewer."""
    cut("9")
    choose, asked = _policy.described, []

    def noted(shape, *args, **options):
        asked.append(shape.rows_an_expert)
        return choose(shape, *args, **options)

    monkeypatch.setattr(_policy, "described", noted)
    packed = stored("nf4", len(ENDS), 64, 192)
    weights = reference(packed, torch.bfloat16).mT
    rows, _, _offsets, _ = case(torch.bfloat16, 192, 64)
    found = []
    for first in (0, 24):  # the last expert with rows, among all and alone
        ends = [max(end - first, 0) for end in ENDS]
        out = torch.zeros(ROWS - first, 64, dtype=torch.bfloat16, device=DEVICE)
        x, o = on(rows[first:], torch.tensor(ends, dtype=torch.int32))
        given = {
            "packed_slices": (x, packed, o, out, False, [(0, 3), (3, 6)], None, None, True),
            "grouped_slice": (x, weights, o, 0, out, None, None, True),
            "grouped_rows": (x, weights, o, out, None, None, True),
        }[kernel]
        assert KERNELS[kernel](*given) is not NotImplemented
        found.append(out[24 - first : 33 - first])
    assert torch.equal(*found) and found[0].abs().max() > 0
    assert {*asked} == {1024}


def test_what_is_left_to_slices(cut):
    cut("8")
    packed, odd = stored("int8", 2, 32, 64), stored("nf4", 2, 64, 32)
    few, offsets = torch.zeros(4, 64, device=DEVICE), torch.tensor([1, 4], dtype=torch.int32, device=DEVICE)
    assert KERNELS["packed_rows"](few, packed, offsets, None, False) is not NotImplemented
    assert KERNELS["packed_rows"](few.double(), packed, offsets, None, False) is NotImplemented
    assert KERNELS["packed_rows"](few[:, :32], odd, offsets, None, False) is NotImplemented, "blocks across rows"
    assert KERNELS["packed_rows"](few.repeat(200, 1), packed, offsets, None, False) is NotImplemented, "many rows"
    assert KERNELS["unpack"](odd, 0, 2, torch.bfloat16, None) is NotImplemented
    assert KERNELS["unpack"](packed, 0, 2, torch.float64, None) is NotImplemented


large = pytest.mark.skipif(not GPU, reason="needs a GPU: whether threads race shows in large products alone")


@large
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("rows_an_expert", [8, 32, 100, 200])
@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "mxfp4", "fp8", "int8"])
def test_a_product_has_the_same_bits_every_time(name, rows_an_expert, back):
    """At every number of rows where kernels change, many times over, and one rounding from the true values.

    Decoding multiplies codes and scales the sums: weights that were not rounded have another value, two roundings away.
    """
    E, height, width = 32, 1536, 2048
    torch.manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, device=DEVICE)

    packed = packed_as(name, drawn(E, height, width) * 0.02)
    matrices = reference(packed, torch.bfloat16)
    matrices = matrices if back else matrices.mT
    ends = torch.randint(E, (rows_an_expert * E,)).bincount(minlength=E).cumsum(0).int()
    rows = drawn(len(matrices) * rows_an_expert, matrices.shape[1]).bfloat16()
    update = drawn(len(rows), 16).bfloat16(), drawn(E, matrices.shape[2], 16).bfloat16().mT
    (offsets,) = on(ends)

    def product(rank):
        low, factors = update if rank else (None, None)
        return packed_products.packed_rows(rows, packed, offsets, None, low, factors, back=back)

    for rank in (0, 16):
        first = product(rank)
        if rank or back or rows_an_expert > 16:
            assert_products(first, rows, matrices, ends.tolist(), update if rank else (None, None), first)
        else:
            blocks = zip([0, *ends.tolist()], ends.tolist(), matrices.double(), strict=False)
            value = torch.cat([rows[start:end].double() @ matrix for start, end, matrix in blocks])
            assert (first.double() - value).norm() <= torch.finfo(torch.bfloat16).eps * value.norm()
        assert all(torch.equal(product(rank), first) for _ in range(200))


@large
@pytest.mark.parametrize("tokens", [4, 256, 1024, 2048, 4096, 16384])
@pytest.mark.parametrize("form", ["", "nf4", "mxfp4", "fp8", "int8"])
def test_a_step_has_the_same_bits_every_time(form, tokens):
    """The layer of Qwen3-30B-A3B with adapters, on either side of every number of rows at which the kernels change.

    What comes out is what the unpacked weights give, but for the order of sums.
    """
    experts_, hidden, inner, rank = 128, 2048, 768, 16
    torch.manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) * 0.1

    weights = drawn(experts_, 2 * inner, hidden), drawn(experts_, hidden, inner)
    weights = tuple(moekit.pack(weight, form) for weight in weights) if form else weights
    x, p = drawn(tokens, hidden).requires_grad_(), torch.rand(tokens, 8, device=DEVICE).requires_grad_()
    indices = torch.rand(tokens, experts_, device=DEVICE).topk(8).indices
    factors = drawn(experts_, rank, hidden), drawn(experts_, 2 * inner, rank), drawn(experts_, rank, inner)
    factors = [factor.requires_grad_() for factor in (*factors, drawn(experts_, hidden, rank))]
    lora = {"gate_up": moekit.Lora(*factors[:2]), "down": moekit.Lora(*factors[2:])}

    def step(*weights):
        out = moekit.experts(x, (indices, p), *weights, lora=lora)
        return [out, *torch.autograd.grad(out, [x, p, *factors], torch.ones_like(out))]

    first = step(*weights)
    assert all(value.abs().max() > 0 for value in first)
    for _ in range(4):
        assert all(map(torch.equal, step(*weights), first))
    if form:
        for found, value in zip(first, step(*(weight.unpack() for weight in weights)), strict=True):
            error = (found.double() - value.double()).norm() / value.double().norm()
            assert error <= torch.finfo(torch.bfloat16).eps, "two roundings"
