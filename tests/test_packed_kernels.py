"""Packed weights on a CPU: elements bit for bit, products against float64, and never a byte outside."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from _guarded import Guard, guarded_results
from _reference import draw

pytest.importorskip("numba")

import moekit
from moekit.kernels.numba import _gemm_kernels, _packed_kernels, _units, packed
from moekit.ops.unpack import Stored, unpack

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CPUS = [_units.ANY, *([_units.BYTES] if _units.FINDS_BYTES else [])]
ENDS = [0, 2, 2, 3, 12, 12]  # the first, third and last have no rows; two rows follow that are nobody's
ROWS = 14
NUMBERS = {"nf4": _units.NF4, "nested": _units.NESTED, "mxfp4": _units.MXFP4, "fp8": _units.FP8, "int8": _units.INT8}
# Sizes of an expert: odd numbers of rows, one block, more than a panel of sums, edges that make up no whole tile.
SHAPES = {
    "nf4": [(5, 64), (7, 192), (2, 2112)],
    "nested": [(5, 64), (7, 192)],
    "mxfp4": [(5, 32), (6, 96), (3, 2080)],
    "fp8": [(5, 20), (130, 200), (3, 1100)],
    "int8": [(5, 20), (7, 45), (2, 2100)],
}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
# Kernels of products take a second to compile: each format in bfloat16, each other dtype with one.
PRODUCTS = [(torch.bfloat16, case) for case in CASES]
PRODUCTS += [(torch.float32, ("mxfp4", (6, 96))), (torch.float16, ("fp8", (130, 200)))]


@functools.cache
def stack(name, height, width, *, block=None):
    weight = draw(3, len(ENDS), height, width, dtype=torch.float32, scale=0.05)
    weight[-1].view(-1)[:64] = 0
    format = "nf4" if name == "nested" else name
    return moekit.pack(weight, format, double_quant=name == "nested", block=block).stored()


def reference(stored, dtype):
    with moekit.backend("torch"):
        return unpack(stored, 0, stored.shape[0], dtype)


def case(dtype, stored, back, *, rows=ROWS, ends=ENDS):
    _, height, width = stored.shape
    return draw(1, rows, height if back else width).to(dtype), torch.tensor(ends).int()


def assert_product(result, rows, stored, offsets, back):
    """One rounding to the dtype of a sum in float32, of the elements that unpacking has."""
    values = reference(stored, result.dtype).double()
    expert = torch.searchsorted(offsets, torch.arange(int(offsets[-1])), right=True)
    x, w = rows[: len(expert)].double().unsqueeze(1), values[expert]
    w = w if back else w.mT
    exact, size = (x @ w).squeeze(1), (x.abs() @ w.abs()).squeeze(1)
    allowed = torch.finfo(result.dtype).eps / 2 * exact.abs() + 2 * torch.finfo(torch.float32).eps * size
    smallest = torch.finfo(result.dtype).tiny
    assert bool(((result[: len(exact)].double() - exact).abs() <= allowed + smallest).all())


# --- elements ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_elements_are_the_reference_bit_for_bit(name, shape, dtype):
    stored = stack(name, *shape)
    result = packed.unpack(stored, 1, 5, dtype)
    assert torch.equal(result, reference(stored, dtype)[1:5])
    out = torch.full((2, *shape), 7.0, dtype=dtype)
    assert packed.unpack(stored, 2, 4, dtype, out) is out
    assert torch.equal(out, result[1:3])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["nf4", "nested"])
def test_blocks_of_nf4_may_lie_in_two_rows(name, dtype):
    stored = stack(name, 4, 48)
    assert torch.equal(packed.unpack(stored, 1, 6, dtype), reference(stored, dtype)[1:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_exponent_of_mxfp4(dtype):
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 1, 1)
    codes |= codes.flip(2) << 4
    stored = Stored(codes, [torch.arange(256, dtype=torch.uint8).view(256, 1, 1)], "mxfp4", (1, 32))
    result, exact = packed.unpack(stored, 0, 256, dtype), reference(stored, dtype)
    torch.testing.assert_close(result, exact, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(result.signbit(), exact.signbit()) and result.isnan().any() and (result == 0).any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("scales", "factors"),
    [
        (torch.float32, [0.0123, -1.3, 3.14, 0.0, 1.7 * 2**-115, 1.1 * 2**114]),
        (torch.float32, [float("inf"), float("nan"), 1.999, 2.0**-110, 2.0**112, 1.0]),
        (torch.bfloat16, [0.0123, -1.3, 3.14, 0.0, 2.0**-100, 2.0**100]),
        (torch.float8_e8m0fnu, [2.0**-20, 0.5, 1.0, 2.0, 2.0**-115, 2.0**114]),
    ],
)
def test_every_code_of_fp8_at_any_scale(scales, factors, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(2, 6, 1)
    factors = torch.tensor(factors).to(scales).repeat(2, 2).view(2, 3, 4)
    stored = Stored(codes, [factors], "fp8", (2, 64))
    result, exact = packed.unpack(stored, 0, 2, dtype), reference(stored, dtype)
    torch.testing.assert_close(result, exact, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(result.signbit()[~exact.isnan()], exact.signbit()[~exact.isnan()])


@pytest.mark.parametrize("name", NUMBERS)
def test_past_the_cache(name, monkeypatch):
    stored, kernel, pasts = stack(name, 6, 2176), _packed_kernels.unpack_kernel, []

    def watched(*key):
        return lambda *args: pasts.append(args[-1]) or kernel(*key)(*args)

    monkeypatch.setattr(packed, "_OUTGROWS_CACHE", 0)
    monkeypatch.setattr(_packed_kernels, "unpack_kernel", watched)
    out = torch.empty(6, *stored.shape[1:], dtype=torch.bfloat16)
    assert torch.equal(packed.unpack(stored, 0, 6, torch.bfloat16, out), reference(stored, torch.bfloat16))
    assert pasts == [int(out.data_ptr() % 64 == 0)]


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in NUMBERS), ("nf4", torch.float32)])
def test_elements_on_other_cpus(name, dtype, cpu, monkeypatch):
    kernel = _packed_kernels.unpack_kernel
    monkeypatch.setattr(_packed_kernels, "unpack_kernel", lambda element, format: kernel(element, format, cpu))
    stored = stack(name, *SHAPES[name][1])
    assert torch.equal(packed.unpack(stored, 0, 6, dtype), reference(stored, dtype))


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("dtype", "case_"), PRODUCTS)
def test_products_match_float64(dtype, case_, back):
    name, shape = case_
    stored = stack(name, *shape)
    rows, offsets = case(dtype, stored, back)
    out = torch.full((ROWS, shape[1 if back else 0]), 7.0, dtype=dtype)
    result = packed.packed_rows(rows, stored, offsets, out, back)
    assert result is out
    assert_product(result, rows, stored, offsets, back)
    assert (result[ENDS[-1] :] == 7).all(), "rows of no expert are left as they are"


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("block", [(1, 200), (4, 32), (131, 64), (130, 200)])
def test_blocks_of_fp8(block, back):
    stored = stack("fp8", 130, 200, block=block)
    rows, offsets = case(torch.bfloat16, stored, back)
    assert torch.equal(packed.unpack(stored, 0, 6, torch.bfloat16), reference(stored, torch.bfloat16))
    assert_product(packed.packed_rows(rows, stored, offsets, None, back), rows, stored, offsets, back)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize(("name", "back"), [("nf4", False), ("mxfp4", True)])
def test_products_on_other_cpus(name, back, cpu, monkeypatch):
    made = "by_input_kernel" if back else "by_feature_kernel"
    kernel = getattr(_gemm_kernels, made)
    monkeypatch.setattr(_gemm_kernels, made, lambda element, format: kernel(element, format, cpu))
    stored = stack(name, *SHAPES[name][1])
    rows, offsets = case(torch.bfloat16, stored, back)
    assert_product(packed.packed_rows(rows, stored, offsets, None, back), rows, stored, offsets, back)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_row_alone_gives_the_same_bits(name, back):
    stored = stack(name, *SHAPES[name][1])
    rows, _ = case(torch.bfloat16, stored, back)
    together = packed.packed_rows(rows, stored, torch.tensor([0, 9, 11, 12, 14, 14]).int(), None, back)
    for row in range(9):
        alone = packed.packed_rows(rows[row : row + 1], stored, torch.tensor([0, 1, 1, 1, 1, 1]).int(), None, back)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("name", NUMBERS)
def test_any_number_of_threads_gives_the_same_bits(name):
    stored, found = stack(name, 514, 1024 if name == "mxfp4" else 1088), []
    before = torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        rows, back = (case(torch.bfloat16, stored, back) for back in (False, True))
        results = [packed.packed_rows(rows[0], stored, rows[1]), packed.packed_rows(back[0], stored, back[1], None, True)]
        found.append([packed.unpack(stored, 0, 6, torch.bfloat16), *(result[: ENDS[-1]] for result in results)])
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


def test_rows_with_strides():
    stored = stack("int8", 7, 45)
    rows, offsets = case(torch.bfloat16, stored, False)
    plain = packed.packed_rows(rows, stored, offsets)[: ENDS[-1]]
    out = torch.zeros(ROWS, 20, dtype=torch.bfloat16)[:, 3:10]
    for other in (rows.T.contiguous().T, torch.cat([rows, rows], 1)[:, :45]):
        assert torch.equal(packed.packed_rows(other, stored, offsets, out)[: ENDS[-1]], plain)


@pytest.mark.parametrize("back", [False, True])
def test_no_rows(back):
    stored = stack("nf4", 7, 192)
    rows, offsets = case(torch.bfloat16, stored, back, rows=0, ends=[0] * 6)
    assert packed.packed_rows(rows, stored, offsets, None, back).shape == (0, 192 if back else 7)


# --- what is left to the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("ends", [[0, 3, 2, 3, 4, 5], [-1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2**31 - 1], [15] * 6])
def test_offsets_that_cannot_be(ends, back):
    stored = stack("nf4", 7, 192)
    rows, offsets = case(torch.bfloat16, stored, back, ends=ends)
    out = torch.full((ROWS, 192 if back else 7), 7.0, dtype=torch.bfloat16)
    assert packed.packed_rows(rows, stored, offsets, out, back) is NotImplemented
    assert (out == 7).all()


def test_products_that_are_left():
    stored = stack("nf4", 7, 192)
    rows, offsets = case(torch.bfloat16, stored, False)
    left = [
        (rows.double(), stored, offsets),
        (rows, stored, offsets.long()),
        (rows[:, :190], stored, offsets),
        (rows, stored, offsets[:5]),
        (rows, stored, offsets, torch.empty(7, ROWS, dtype=torch.bfloat16).T),
        (rows, stored, offsets, None, False, rows, rows),
        (rows.repeat(4, 1), stored, torch.tensor([0, 0, 40, 40, 40, 40]).int()),  # many rows an expert
        (rows[:, :48], stack("nf4", 4, 48), offsets),  # blocks in two rows
        (rows[:, :20], stack("fp8", 5, 20, block=(3, 20)), offsets),  # scales that change within a tile
    ]
    for arguments in left:
        assert packed.packed_rows(*arguments) is NotImplemented


def test_parts_that_do_not_fit_are_left():
    stored, nested, fp8 = stack("mxfp4", 6, 96), stack("nested", 7, 192), stack("fp8", 130, 200)
    left = [
        stored._replace(scales=[stored.scales[0][:, :, :2]]),
        stored._replace(scales=[stored.scales[0].float()]),
        stored._replace(codes=stored.codes.mT.contiguous().mT),
        stored._replace(codes=stored.codes.view(torch.int8)),
        nested._replace(scales=[nested.scales[0], nested.scales[1][:0], nested.scales[2]]),
        fp8._replace(block=(128, 100)),
        fp8._replace(scales=[fp8.scales[0][:, :1]]),
    ]
    for parts in left:
        assert packed.unpack(parts, 0, 6, torch.bfloat16) is NotImplemented
    assert packed.unpack(stored, 0, 6, torch.float64) is NotImplemented


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_nothing_outside_is_touched(name, shape, at_end):
    guard = Guard(0xFF, itertools.repeat(at_end))
    plain = stack(name, *shape)
    stored = plain._replace(codes=guard.copy(plain.codes), scales=[guard.copy(scale) for scale in plain.scales])
    with guarded_results(guard):
        result = packed.unpack(stored, 0, 6, torch.bfloat16)
        assert torch.equal(result, reference(plain, torch.bfloat16))
        for back in (False, True):
            rows, offsets = (guard.copy(tensor) for tensor in case(torch.bfloat16, plain, back, rows=ENDS[-1]))
            assert_product(packed.packed_rows(rows, stored, offsets, None, back), rows, plain, offsets, back)
