"""Products of few rows an expert: the kernels that read each matrix once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from _reference import draw

pytest.importorskip("numba")

import moekit
from moekit.kernels.numba import _jit, _team
from moekit.kernels.numba import gemm as kernels
from moekit.kernels.numba._bits import read_i64, write_f32
from moekit.ops.gemm import grouped_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["out, in", "in, out"]
ENDS = [0, 2, 2, 3, 12, 12]  # the first, third and last have no rows; two rows follow that are nobody's
ROWS = 14


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def case(dtype, layout, width, features, *, ends=ENDS, rows=ROWS):
    """Rows, matrices ``[E, in, out]`` as views of either storage, and offsets."""
    shape = (len(ends), features, width) if layout == "out, in" else (len(ends), width, features)
    stored = draw(2, *shape).to(dtype)
    return draw(1, rows, width).to(dtype), stored.mT if layout == "out, in" else stored, torch.tensor(ends).int()


def exact(rows, matrices, offsets):
    """The products in float64 and the sums of their terms' sizes, of the rows that an expert has."""
    expert = torch.searchsorted(offsets, torch.arange(int(offsets[-1])), right=True)
    x, w = rows[: len(expert)].double(), matrices[expert].double()
    return torch.einsum("ri,rio->ro", x, w), torch.einsum("ri,rio->ro", x.abs(), w.abs())


def assert_product(result, rows, matrices, offsets):
    """One rounding to the dtype of a sum in float32."""
    value, size = exact(rows, matrices, offsets)
    allowed = torch.finfo(result.dtype).eps / 2 * value.abs() + 2 * torch.finfo(torch.float32).eps * size
    assert bool(((result[: len(value)].double() - value).abs() <= allowed + torch.finfo(result.dtype).tiny).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 7, 32, 33, 300])
@pytest.mark.parametrize("features", [1, 5, 64, 97])
def test_products_match_float64(dtype, layout, width, features):
    rows, matrices, offsets = case(dtype, layout, width, features)
    out = torch.full((ROWS, features), 7.0, dtype=dtype)
    result = kernels.grouped_rows(rows, matrices, offsets, out)
    assert result is out
    assert_product(result, rows, matrices, offsets)
    assert (result[ENDS[-1] :] == 7).all(), "rows of no expert are left as they are"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_panels(layout):
    rows, matrices, offsets = case(torch.bfloat16, layout, 40, 2100)
    assert_product(kernels.grouped_rows(rows, matrices, offsets), rows, matrices, offsets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_threads_gives_the_same_bits(dtype, layout, threads):
    rows, matrices, offsets = case(dtype, layout, 515, 1030)
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(kernels.grouped_rows(rows, matrices, offsets)[: ENDS[-1]])
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_alone_gives_the_same_bits(dtype, layout):
    rows, matrices, _ = case(dtype, layout, 77, 70, ends=[0, 0, 0, 0])
    together = kernels.grouped_rows(rows, matrices, torch.tensor([9, 11, 12, 14]).int())
    for row in range(9):
        alone = kernels.grouped_rows(rows[row : row + 1], matrices, torch.tensor([1, 1, 1, 1]).int())
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_and_unaligned_inputs(dtype, layout):
    rows, matrices, offsets = case(dtype, layout, 45, 37)
    plain = kernels.grouped_rows(rows, matrices, offsets)[: ENDS[-1]]
    stored = matrices.mT if layout == "out, in" else matrices
    apart = torch.zeros(stored.shape[0], stored.shape[1] + 2, stored.shape[2] + 3).to(dtype)[:, 1:-1, 1:-2]
    apart.copy_(stored)
    apart = apart.mT if layout == "out, in" else apart
    for other in (rows.T.contiguous().T, torch.cat([rows, rows], 1)[:, :45]):
        assert torch.equal(kernels.grouped_rows(other, apart, offsets)[: ENDS[-1]], plain)
    one = matrices[1:2].expand(len(ENDS), -1, -1)
    assert_product(kernels.grouped_rows(rows, one, offsets), rows, one, offsets)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_reach_their_products_only(layout, dtype):
    rows, matrices, offsets = case(dtype, layout, 70, 66)
    plain = kernels.grouped_rows(rows, matrices, offsets)
    rows[0, 69], rows[2, 1] = float("nan"), float("inf")
    result = kernels.grouped_rows(rows, matrices, offsets)
    assert result[0].isnan().all() and result[2].isinf().all()
    assert torch.equal(result[3:12], plain[3:12]) and torch.equal(result[1], plain[1])


def test_what_is_left_to_pytorch():
    rows, matrices, offsets = case(torch.float32, "out, in", 8, 6)
    assert kernels.grouped_rows(rows.double(), matrices.double(), offsets) is NotImplemented
    assert kernels.grouped_rows(rows, matrices.bfloat16(), offsets) is NotImplemented
    assert kernels.grouped_rows(rows, torch.randn(6, 16, 12)[:, ::2, ::2], offsets) is NotImplemented
    many = torch.randn(20, rows.shape[1])
    assert kernels.grouped_rows(many, matrices, torch.tensor([0, 0, 0, 0, 0, 20]).int()) is NotImplemented
    assert kernels.grouped_rows(rows, matrices, offsets, torch.empty(6, ROWS).T) is NotImplemented


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rows_no_experts_no_features(layout):
    for experts, rows, width, features in ((3, 0, 8, 6), (0, 0, 8, 6), (3, 2, 0, 6), (3, 2, 8, 0)):
        ends = [rows] * experts
        result = grouped_rows(*case(torch.float32, layout, width, features, ends=ends, rows=rows))
        assert result.shape == (rows, features) and (width or not result.any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_decoding_equals_the_products_of_pytorch(dtype, transposed, tokens):
    E, K, H, I = 8, 2, 96, 40
    sizes = {"gate_up": (E, 2 * I, H), "down": (E, H, I)}
    gate_up, down = (draw(n, *size, scale=0.3).to(dtype) for n, size in enumerate(sizes.values(), start=3))
    if transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    x, weights = draw(1, tokens, H).to(dtype), draw(2, tokens, K).abs().to(dtype)
    indices = torch.rand(tokens, E, generator=torch.Generator().manual_seed(0)).topk(K).indices

    def run(name, *arguments):
        with moekit.backend(name):
            x, weights, gate_up, down = arguments
            return moekit.experts(x, (indices, weights), gate_up, down, transposed=transposed)

    inputs = (x, weights, gate_up, down)
    with torch.no_grad():
        result = run("numba", *inputs)
    value = run("torch", *(tensor.double() for tensor in inputs))
    assert (result.double() - value).abs().max() <= 4 * torch.finfo(dtype).eps * value.abs().max()
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    trained = run("numba", *leaves)
    assert torch.equal(trained.detach(), result)
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    trained.sum().backward()
    run("torch", *wide).sum().backward()
    for leaf, other in zip(leaves, wide, strict=True):
        assert (leaf.grad.double() - other.grad).abs().max() <= 8 * torch.finfo(dtype).eps * other.grad.abs().max()


# --- PyTorch's threads ------------------------------------------------------------------------------------------------


@_jit.kernel("test", "team")
def fill(start: int, stop: int, target: int, value: float, other: int, half: float):
    for i in range(start, stop):
        write_f32(target, i, value + read_i64(other, 0) + half)


@pytest.mark.skipif(_team._entry_point() is None, reason="this PyTorch has no such threads")
def test_a_team_covers_every_range_with_all_kinds_of_arguments():
    out, other = torch.zeros(1001), torch.tensor([3])
    assert _team.share(fill, 1001, 8, (out.data_ptr(), 2.25, other.data_ptr(), 0.5), 3)
    assert (out == 5.75).all()


def test_without_a_team_the_pool_works(monkeypatch, threads):
    threads(2)
    rows, matrices, offsets = case(torch.bfloat16, "out, in", 515, 1030)
    expected = kernels.grouped_rows(rows, matrices, offsets)[: ENDS[-1]]
    monkeypatch.setattr(_team, "_entry_point", lambda: None)
    assert torch.equal(kernels.grouped_rows(rows, matrices, offsets)[: ENDS[-1]], expected)
    assert not _team.share(fill, 1, 1, (), 2)
    monkeypatch.undo()
    assert not _team.share(lambda start, stop: None, 1, 1, (), 2), "a Python function needs a Python thread"


FORK = """
    import os, sys, torch
    from moekit.kernels.numba import _threads, gemm
    torch.set_num_threads(2)
    rows, matrices, offsets = torch.randn(2, 700), torch.randn(2, 700, 700).mT, torch.tensor([1, 2]).int()
    before = gemm.grouped_rows(rows, matrices, offsets)  # OpenMP has threads now
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        _threads.get_num_threads = lambda: 2
        os._exit(0 if torch.equal(gemm.grouped_rows(rows, matrices, offsets), before) else 1)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork():
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK)]
    assert subprocess.run(command, timeout=120).returncode == 0
