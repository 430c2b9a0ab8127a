"""The kernel of weight gradients in Triton: true values, zeros for experts without rows, nothing of another's rows.

Without a GPU one test starts another pytest on this file, which interprets, as in ``test_triton_kernels.py``.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from _interpreter import INTERPRETED, run_interpreted
from _reference import draw

pytest.importorskip("triton")

import moekit
from moekit.kernels.triton import KERNELS, _launch, _policy, gathered, gemm, outer
from moekit.kernels.triton._policy import Blocks, Shape
from moekit.ops import experts_backward, tables
from moekit.ops import gemm as ops_gemm
from moekit.ops.grouped_linear import outer_op

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
ENDS = [0, 5, 5, 24, 33, 33]  # the first, third and last have no rows; three rows follow that are nobody's
E, ROWS = len(ENDS), 36
ONE, MORE = (136, 264) if GPU else (40, 72)  # columns of more than one tile, the last not full

kernel_runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs in the interpreter's process")


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_kernel_passes_in_the_interpreter():
    run_interpreted(Path(__file__))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many to a program; on a GPU the policy's own."""
    if GPU or not INTERPRETED:
        return
    monkeypatch.setattr(_launch, "arch", lambda device: _launch.Arch("9", 32))
    for module in (gathered, gemm, outer):
        monkeypatch.setattr(module, "processors", lambda device: 2, raising=False)
    cut = Blocks(16, 32, 16, 4, 2, 1, flat=True)
    for name in ("gathered", "described"):
        monkeypatch.setattr(_policy, name, lambda *_, **__: cut)
    monkeypatch.setattr(_policy, "outer", lambda *_, gathered="none": cut if gathered == "none" else None)
    monkeypatch.setattr(_policy, "column_halves", lambda columns: [slice(0, 32), slice(32, columns)])  # of whole tiles


def factors(dtype, height, width):
    """Rows of whole eighths: their products are exact in float32, in any order."""
    drawn = (draw(seed, ROWS, size) for seed, size in ((1, height), (2, width)))
    return [(x * 8).round().div(8).to(dtype).to(DEVICE) for x in drawn]


def expected(left, right):
    begins = [0, *ENDS[:-1]]
    parts = [left[a:b].double().T @ right[a:b].double() for a, b in zip(begins, ENDS, strict=True)]
    return torch.stack(parts).to(left.dtype)


@kernel_runs
@pytest.mark.parametrize(("dtype", "height", "width"), [(torch.bfloat16, ONE, MORE), (torch.float16, MORE, ONE)])
def test_sums_over_the_rows_of_an_expert(dtype, height, width):
    left, right = factors(dtype, height, width)
    found = KERNELS["grouped_outer"](left, right, torch.tensor(ENDS, device=DEVICE).int())
    assert torch.equal(found, expected(left, right))
    assert found[[0, 2, 5]].count_nonzero() == 0


@kernel_runs
def test_what_others_rows_hold_stays_theirs():
    left, right = factors(torch.bfloat16, ONE, ONE)
    value = expected(left, right)
    for rows in (slice(33, 36), slice(5, 24)):  # nobody's, and those of one expert
        left[rows], right[rows] = torch.inf, torch.nan
    found = KERNELS["grouped_outer"](left, right, torch.tensor(ENDS, device=DEVICE).int())
    assert torch.equal(found[[0, 1, 2, 4, 5]], value[[0, 1, 2, 4, 5]])
    assert found[3].isnan().all()


@kernel_runs
@pytest.mark.parametrize("cut", [None, Blocks(32, 16, 16, 4, 2, 1)], ids=["the policy's", "many tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_where_threads_fetch(dtype, cut, monkeypatch):
    """Any widths and distances of rows; what others' rows hold stays theirs, and sums are exact here in any order."""
    if cut is not None:
        monkeypatch.setattr(_policy, "fetched_outer", lambda dtype, even: cut)
    ends = torch.tensor(ENDS, device=DEVICE)
    for height, width in ((ONE - 3, MORE - 1), (MORE, 7)):
        left, right = factors(dtype, height, width)
        value, shape = expected(left, right), Shape(ROWS, E, height, width)
        assert torch.equal(outer._fetched(left, right, ends, shape), value)
        left[33:], right[5:24] = torch.nan, torch.inf
        apart = [torch.cat([part, torch.full_like(part, torch.nan)], 1)[:, : part.shape[1]] for part in (left, right)]
        spread = [torch.stack([part] * 2, -1)[..., 0] for part in (left, right)]
        for one, other in (apart, spread):
            found = outer._fetched(one, other, ends.int(), shape)
            assert torch.equal(found[[0, 1, 2, 4, 5]], value[[0, 1, 2, 4, 5]])
            assert not found[3].isfinite().any()
    none = outer._fetched(left[:0], right[:0], ends, shape._replace(num_rows=0))
    assert none.shape == (E, MORE, 7) and not none.any()


@kernel_runs
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)  # described, and fetched by threads
def test_rows_brought_together_half_of_their_columns_at_a_time(dtype, side, monkeypatch):
    height, width = (2056, 2312) if GPU else (ONE, MORE)
    if dtype is torch.float32 or GPU:
        cut = None if dtype is torch.float32 else _policy.APART
        monkeypatch.setattr(_policy, "outer", lambda *_, gathered="none": cut if gathered == "none" else None)
    factor = dict(zip(("left", "right"), factors(dtype, height, width), strict=True))
    index = torch.arange(ROWS).mul(7).remainder(ROWS + 1).sub(1).int().to(DEVICE)  # one of no token
    given = factor | {side: torch.stack([factor[side]] * 2, 1).flatten(1)[:, : factor[side].shape[1]]}  # strided
    moved = torch.where(index[:, None] < 0, 0, factor[side][index])
    moved_tables = (index, *tables.rows_of_tokens(index, ROWS))
    halves = []

    def noted(*args):
        gc.collect()  # what a compilation has left in cycles does not stay
        assert all(half() is None for half, _ in halves), "one half goes before the next is there"
        half = KERNELS["permute"](*args)
        halves.append((weakref.ref(half), half.shape[1]))
        return half

    monkeypatch.setattr(outer, "permute", noted)
    found = KERNELS["gathered_outer"](given["left"], given["right"], torch.tensor(ENDS, device=DEVICE), moved_tables, side)
    assert torch.equal(found, expected(**(factor | {side: moved})))
    assert len(halves) == 2 and sum(columns for _, columns in halves) == factor[side].shape[1]


@kernel_runs
def test_offsets_out_of_order_and_range_are_put_right():
    left, right = factors(torch.bfloat16, ONE, ONE)
    right_ones, wrong = [5, 5, 24, 36, 36, 36], [5, -7, 24, 2**31 - 1, 12, 99]
    results = [KERNELS["grouped_outer"](left, right, torch.tensor(ends, device=DEVICE)) for ends in (right_ones, wrong)]
    assert torch.equal(*results)


@kernel_runs
def test_what_is_left_to_pytorch(monkeypatch):
    left, right = factors(torch.bfloat16, ONE, ONE)
    offsets = torch.tensor(ENDS, device=DEVICE).int()
    for a, b, ends in (
        (left, right.half(), offsets),
        (left[:, :36], right[:, :36], offsets),  # strides of 16 bytes, but no output of them
        (left.T.contiguous().T, right, offsets),
        (left[:0], right[:0], offsets),
        (left, right, offsets.short()),
    ):
        assert KERNELS["grouped_outer"](a, b, ends) is NotImplemented
    monkeypatch.undo()
    assert KERNELS["grouped_outer"](left.double(), right.double(), offsets) is NotImplemented


@kernel_runs
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_experts_as_on_a_gpu(transposed, shared, monkeypatch):
    for module in (ops_gemm, experts_backward):
        monkeypatch.setattr(module, "looped", lambda rows: False)
    monkeypatch.setattr(experts_backward, "shares_rows", lambda *_: shared)
    tokens, hidden, inner = (24, 512, 128) if GPU else (12, 64, 32)
    shapes = {"x": (tokens, hidden), "gate_up": (E, 2 * inner, hidden), "down": (E, hidden, inner)}
    leaves = {name: draw(place, *shape, scale=0.3) for place, (name, shape) in enumerate(shapes.items())}
    if transposed:
        leaves |= {name: leaves[name].mT.contiguous() for name in ("gate_up", "down")}
    scores, indices = torch.rand(tokens, E, generator=torch.Generator().manual_seed(0)).topk(2, -1)

    def gradients(dtype, device):
        given = {name: leaf.to(device, dtype).requires_grad_() for name, leaf in leaves.items()}
        weights = scores.to(device, dtype).requires_grad_()
        out = moekit.experts(given["x"], (indices.to(device), weights), *list(given.values())[1:], transposed=transposed)
        return torch.autograd.grad(out, [*given.values(), weights], torch.ones_like(out))

    calls = []
    for name in ("grouped_outer", "gathered_outer"):

        def noted(*args, name=name, kernel=KERNELS[name]):
            result = kernel(*args)
            return result if result is NotImplemented else calls.append(name) or result

        monkeypatch.setitem(KERNELS, name, noted)
    found = gradients(torch.bfloat16, DEVICE)
    assert calls == (["grouped_outer", "gathered_outer"] if shared else ["gathered_outer"] * 2)
    monkeypatch.undo()
    with moekit.backend("torch"):
        exact = gradients(torch.float64, "cpu")
    for value, true in zip(found, exact, strict=True):
        assert (value.cpu().double() - true).norm() <= 0.01 * true.norm()


@pytest.mark.skipif(INTERPRETED, reason="the fixture cuts there")
def test_how_they_are_cut():
    qwen = Shape(131072, 128, 1536, 2048)
    assert _policy.outer(qwen, torch.bfloat16, "10")[:5] == (128, 256, 64, 8, 3)
    for shape, dtype, arch in (
        (qwen, torch.float32, "9"),
        (qwen, torch.bfloat16, "8"),
        (qwen, torch.bfloat16, "gfx942"),
        (qwen._replace(depth=16), torch.bfloat16, "9"),
        (qwen._replace(num_experts=32), torch.bfloat16, "9"),
        (qwen._replace(width=16), torch.float16, "10"),
    ):
        assert _policy.outer(shape, dtype, arch) is None


@pytest.mark.parametrize("backend", ["auto", "torch", pytest.param("triton", marks=kernel_runs)])
def test_factors_that_do_not_fit_together_are_refused(backend):
    left, offsets = torch.ones(8, 3, device=DEVICE), torch.tensor([8], device=DEVICE)
    for right, error, message in (
        (torch.ones(4, 5), ValueError, "right must be of 8 rows, as left, got 4 rows"),
        (torch.ones(8, 5).half(), TypeError, "right must be of torch.float32, as left, got torch.float16"),
        (torch.ones(8), ValueError, "right must be a 2-D tensor"),
    ):
        with moekit.backend(backend), pytest.raises(error, match=message):
            outer_op(left, right.to(DEVICE), offsets)
