"""How grouped products are cut, how experts are sliced, and what is multiplied in one sum: pure functions."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from moekit.kernels.triton import _launch, _policy
from moekit.kernels.triton._policy import Shape
from moekit.ops import packed_products
from moekit.ops.projection import Projection
from moekit.ops.unpack import Stored

LOW = [torch.float32, torch.bfloat16, torch.float16]
QWEN = Shape(131072, 128, 2048, 1536)
CUTS = {
    "many rows": ((QWEN._replace(depth=2880), "9", False), (128, 256, 3, True)),
    "many rows, sm_100": ((QWEN, "10", False), (128, 256, 3, True)),
    "many rows, updated": ((QWEN, "9", True), (128, 256, 4, False)),
    "many rows, short sums": ((QWEN._replace(depth=768), "10", False), (128, 128, 3, True)),
    "many rows, short sums, updated": ((QWEN._replace(depth=768), "9", True), (128, 256, 4, False)),
    "few rows": ((QWEN._replace(num_rows=128 * 128), "9", False), (64, 128, 4, True)),
    "few rows, updated": ((QWEN._replace(num_rows=8), "9", True), (64, 128, 4, False)),
    "narrow": ((QWEN._replace(width=8), "9", False), (128, 16, 3, True)),
    "less narrow": ((QWEN._replace(width=48), "9", False), (128, 64, 3, True)),
    "one block of columns": ((QWEN._replace(width=100), "9", False), (128, 128, 3, False)),
    "without a copy engine": ((QWEN, "8", False), None),
    "too little shared memory": ((QWEN, "12", False), None),
    "gfx942": ((QWEN, "gfx942", False), None),
}


@pytest.mark.parametrize("name", CUTS)
def test_how_products_are_cut(name):
    (shape, arch, updated), expected = CUTS[name]
    for dtype in LOW:
        cut = _policy.described(shape, dtype, arch, updated=updated)
        found = None if cut is None else (cut.rows, cut.columns, cut.stages, cut.flat)
        assert found == (None if dtype is torch.float32 else expected), dtype


@pytest.mark.parametrize(
    ("rows_an_expert", "form", "back", "arch", "expected"),
    [
        (12, "nf4", False, "9", (16, 128, 128)),
        (12, "fp8", True, "9", (64, 128, 64)),
        (12, "nf4", True, "9", (16, 128, 128)),
        (48, "mxfp4", True, "9", (64, 128, 128)),
        (13, "int8", False, "9", (64, 128, 128)),
        (48, "nf4", True, "9", (64, 64, 64)),
        (49, "nf4", False, "9", (128, 128, 128)),
        (49, "mxfp4", True, "9", (128, 256, 64)),
        (112, "int8", False, "9", (128, 256, 64)),
        (113, "int8", False, "9", None),
        (224, "fp8", False, "9", (128, 256, 64)),
        (225, "fp8", False, "9", None),
        (224, "fp8", False, "8", (128, 128, 64)),
        (12, "mxfp4", True, "gfx942", (32, 64, 64)),
        (113, "nf4", False, "gfx942", None),
    ],
)
def test_where_weights_are_unpacked_in_registers(rows_an_expert, form, back, arch, expected):
    shape = Shape(rows_an_expert * 32, 32, 512, 512)
    cut = _policy.packed(shape, form, torch.bfloat16, arch, back=back)
    assert (None if cut is None else cut[:3]) == expected
    exact = _policy.packed(shape, form, torch.float32, arch, back=back)
    assert (exact is None) == (expected is None)


@pytest.mark.parametrize(
    ("num_experts", "size", "expected"),
    [
        (128, 6 << 20, [32, 32, 32, 32]),
        (32, 5760 * 2880 * 2, [5, 5, 6, 5, 5, 6]),
        (7, 64 << 20, [2, 2, 3]),
        (2, 1 << 30, [1, 1]),
        (3, 10, [3]),
        (3, 0, [3]),
        (0, 10, []),
    ],
)
def test_slices_are_of_one_length_or_nearly(num_experts, size, expected):
    found = packed_products.slices(num_experts, size)
    assert [stop - first for first, stop in found] == expected
    assert [0, *(stop for _, stop in found)] == [*(first for first, _ in found), num_experts]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("weight", ["dense", "packed"])
def test_an_adapter_is_part_of_the_product(weight, dropout):
    """One product, not a product and an addition, which would round twice; what drops elements of it cannot be."""
    calls = []

    def product(rows, weight, offsets, out=None, low=None, factors=None, *, back=False):
        calls.append("plain" if low is None else "updated")
        return rows.new_zeros(len(rows), 4)

    products = SimpleNamespace(rows=product, packed=product, add=lambda out, *_: calls.append("add") or out, outer=None)
    stored = Stored(torch.zeros(2, 4, 4, dtype=torch.int8), [torch.ones(2, 4)], "int8", (1, 4))
    A, B = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    matrices = torch.zeros(2, 4, 4) if weight == "dense" else stored
    lora = Projection(matrices, False, A, B, [4, 1.0, dropout], torch.tensor(1), products)
    rows, offsets = torch.zeros(3, 4), torch.tensor([1, 3]).int()
    lora.forward(rows, offsets)
    assert calls == ["plain", "updated"]  # the rows by A, then all
    calls.clear()
    lora.backward(rows, offsets, lora.raised(rows, offsets))
    assert calls == (["plain", "plain", "plain"] if dropout else ["plain", "updated"])


def test_where_pytorch_waits_for_the_offsets():
    assert not any(_policy.waits(torch.bfloat16, arch) for arch in ("7", "9", "10", "gfx942", ""))
    assert all(_policy.waits(torch.bfloat16, arch) for arch in ("8", "12"))
    assert all(_policy.waits(dtype, arch) for dtype in (torch.float32, torch.float16) for arch in ("8", "9", "10", "12"))
    many = Shape(3000 * 8, 8, 512, 512)
    assert _policy.outer(many, torch.float16, "9") is not None and _policy.outer(many, torch.bfloat16, "9") is None


@pytest.mark.parametrize(("columns", "expected"), [(1536, [1536]), (2048, [1024, 1024]), (2880, [1536, 1344]), (0, [0])])
def test_halves_of_columns(columns, expected):
    parts = _policy.column_halves(columns)
    assert [part.stop - part.start for part in parts] == expected
    assert parts[0].start == 0 and parts[-1].stop == columns and all(part.start % 256 == 0 for part in parts)


def test_products_that_threads_fetch_for():
    for dtype, along in itertools.product(LOW, (True, False)):
        shapes = [Shape(count * 8, 8, 512, 512) for count in (1, 12, 40, 100, 4000)]
        cuts = [_policy.fetched(shape, dtype, "8", along=along, updated=False, even=True) for shape in shapes]
        updated = _policy.fetched(shapes[0], torch.float32, "9", along=along, updated=True, even=True)
        odd = _policy.fetched(shapes[0], dtype, "9", along=along, updated=True, even=False)
        assert updated == _policy.plain(torch.float32) and odd == _policy.fetched_outer(dtype, even=False)
        assert [cut.rows for cut in cuts] == ([16, 16, 32, 64, 64] if dtype is torch.float32 else [32, 32, 64, 128, 128])


def test_float32_is_rounded_as_by_torch_matmul(monkeypatch):
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    x = torch.zeros(1, device="meta")
    try:
        for allowed, precise in (("ieee", "tf32x3"), ("tf32", "tf32")):
            settings.fp32_precision = allowed
            monkeypatch.setattr(_launch, "arch", lambda device: _launch.Arch("9", 32))
            assert _launch.precision(x) == allowed and _launch.precision(x, along=True) == precise
            assert _launch.precision(x.bfloat16(), along=True) == "ieee"
            monkeypatch.setattr(_launch, "arch", lambda device: _launch.Arch("gfx942", 64))
            assert _launch.precision(x, along=True) == "ieee"
    finally:
        settings.fp32_precision = before
