"""Products whose warps have parts (sm_90): the bits of Triton's kernels, at every edge and every time; and how they are cut.

Gluon has no interpreter: what runs needs the GPU. Everywhere else the machine code is looked at.
"""

from __future__ import annotations

import pytest
import torch
from _interpreter import INTERPRETED
from _reference import draw, together

pytest.importorskip("triton")

from moekit.kernels.triton import KERNELS, _policy, gemm, outer
from moekit.kernels.triton._policy import Shape

GPU = torch.cuda.is_available() and not INTERPRETED and torch.cuda.get_device_capability()[0] == 9
gpu = pytest.mark.skipif(not GPU, reason="needs an sm_90 GPU")
# Experts without rows, with one, with rows for one group of warps alone, with several blocks; the last rows are nobody's.
ENDS = [0, 1, 1, 65, 193, 193, 500, 564, 820, 820]
E, ROWS, TOKENS = len(ENDS), 830, 57
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[2, 5], ids="programs={}".format)
def specialised(monkeypatch, request):
    """A function that switches between the kernels of this file, for any number of rows, and those of Triton.

    Both have few programs, each of which takes many tiles.
    """
    for module in (gemm, outer):
        monkeypatch.setattr(module, "processors", lambda device: request.param)

    def switch(on: bool) -> None:
        for name in ("described", "gathered", "outer"):
            monkeypatch.setattr(_policy, name, lambda *_, name=name, gathered="", **__: cut(on, name, gathered))

    def cut(on: bool, name: str, gathered: str) -> _policy.Blocks | None:
        if on:
            return _policy.APART_GATHERED if name == "gathered" or gathered in ("left", "right") else _policy.APART
        if gathered in ("left", "right"):
            return None
        return _policy.Blocks(128, 256, 64, 8, 3, 1, leaving=256 if name == "described" else 0)

    return switch


def cuda(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)


def index() -> torch.Tensor:
    """The token of each row; some have none, and two are out of range."""
    found = torch.randint(-1, TOKENS, (ROWS,), generator=torch.Generator().manual_seed(3)).int()
    found[7], found[300] = TOKENS + 5, 2**31 - 1
    return found.cuda()


def weights(dtype: torch.dtype, depth: int, width: int, stored: str) -> torch.Tensor:
    """``[E, depth, width]``, either of the two adjacent."""
    matrices = draw(2, E, width, depth, scale=0.3).to(dtype).mT
    return cuda(matrices if stored == "out, in" else matrices.contiguous())


def both(specialised, run):
    """What Triton's kernels find and, ten times, those of this file."""
    specialised(False)
    expected = run()
    specialised(True)
    for _ in range(10):
        found = run()
        assert found is not NotImplemented
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    return found


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["out, in", "in, out"])
@pytest.mark.parametrize(("depth", "width"), [(8, 8), (200, 264), (64, 256), (456, 1032)])
@pytest.mark.parametrize("kind", ["rows", "tokens", "slice"])
def test_rows_by_matrices(specialised, kind, depth, width, stored, dtype):
    matrices, offsets, end = weights(dtype, depth, width, stored), torch.tensor(ENDS).int().cuda(), ENDS[-1]
    tokens = cuda(draw(1, TOKENS, depth).to(dtype))
    rows, first = together(tokens, index()), 3

    def run():
        if kind == "tokens":
            return [KERNELS["gathered_rows"](tokens, index(), matrices, offsets)[:end]]
        if kind == "rows":
            return [KERNELS["grouped_rows"](rows, matrices, offsets)[:end]]
        out = torch.full((ROWS, width), 7, dtype=dtype, device="cuda")
        KERNELS["grouped_slice"](rows, matrices[first:-2], offsets, first, out)
        return [out]

    found = both(specialised, run)
    begins, result = [0, *ENDS[:-1]], found[0].double()
    for expert, (a, b) in enumerate(zip(begins, ENDS, strict=True)):
        if kind != "slice" or first <= expert < E - 2:
            true = rows[a:b].double() @ matrices[expert].double()
            assert (result[a:b] - true).norm() <= 3e-3 * true.norm()
    if kind == "slice":
        assert (result[: ENDS[first - 1]] == 7).all() and (result[ENDS[-3] :] == 7).all()


GATES = {
    "silu": ("sigmoid", 1.0, 0.0, 0.0, None, False, "concatenated"),
    "gpt-oss": ("sigmoid", 1.702, 0.0, 1.0, 0.7, True, "interleaved"),
    "cubic, clamped before a bias": ("sigmoid", 1.6, 0.07, 0.0, 0.5, False, "interleaved"),
    "relu2": ("relu2", 0.0, 0.0, 0.0, None, False, "ungated"),
}


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["out, in", "in, out"])
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("width", [272, 1008])
def test_the_gate_behind_the_product(specialised, name, keep, stored, dtype, width):
    gate, depth = GATES[name], 136
    if gate[-1] == "concatenated" and stored == "in, out":
        pytest.skip("gate and up are in two places of a row: left to the steps")
    matrices, offsets, end = weights(dtype, depth, width, stored), torch.tensor(ENDS).int().cuda(), ENDS[-1]
    tokens, of_row = cuda(draw(1, TOKENS, depth).to(dtype)), draw(5, ROWS).abs().float().cuda()
    bias = None if name in ("silu", "relu2") else cuda(draw(6, E, width).to(dtype))

    def run():
        projected, act = KERNELS["gathered_glu"](tokens, index(), matrices, offsets, of_row, bias, keep, False, *gate)
        assert (projected is not None) == keep
        return [x[:end] for x in (projected, act) if x is not None]

    *_, act = both(specialised, run)
    constants, layout = (gate[0], *gate[1:4], *gate[4:6]), gate[-1]
    projected = KERNELS["grouped_rows"](together(tokens, index()), matrices, offsets)
    steps = KERNELS["glu"](projected, of_row, bias, offsets if bias is not None else None, *constants, layout)
    assert torch.equal(act, steps[:end])


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (136, 520), (392, 264)])
def test_gradients_of_weights(specialised, side, height, width, dtype):
    """Sums of whole eighths, exact in float32 in any order."""

    def eighths(seed, *shape):
        return cuda((draw(seed, *shape) * 8).round().div(8).to(dtype))

    tokens = {"left": eighths(1, TOKENS, height), "right": eighths(2, TOKENS, width)}
    left = together(tokens["left"], index()) if side == "left" else eighths(3, ROWS, height)
    right = together(tokens["right"], index()) if side == "right" else eighths(4, ROWS, width)
    left[ENDS[-1] :] = right[ENDS[-1] :] = torch.nan  # nobody's
    offsets = torch.tensor(ENDS).int().cuda()
    specialised(True)
    for _ in range(10):
        if side == "none":
            found = KERNELS["grouped_outer"](left, right, offsets)
        else:
            given = (tokens["left"], right) if side == "left" else (left, tokens["right"])
            found = KERNELS["gathered_outer"](*given, offsets, (index(),), side)
        for expert, (a, b) in enumerate(zip([0, *ENDS[:-1]], ENDS, strict=True)):
            assert torch.equal(found[expert], (left[a:b].double().T @ right[a:b].double()).to(dtype)), expert


@gpu
@pytest.mark.parametrize("num_experts", [1, 100, 128])
def test_as_many_experts_as_layers_have(num_experts):
    """Those of the layers that people train, of which most have few rows here, as the policy has it or not."""
    generator = torch.Generator().manual_seed(num_experts)
    counts = torch.randint(0, 2 * 700 // num_experts + 2, (num_experts,), generator=generator)
    ends, rows = counts.cumsum(0), int(counts.sum())
    matrices = cuda((draw(1, num_experts, 256, 128) * 8).round().div(8).bfloat16()).mT
    tokens = cuda((draw(2, TOKENS, 128) * 8).round().div(8).bfloat16())
    of = torch.randint(-1, TOKENS, (rows,), generator=generator).int().cuda()
    right, offsets = cuda((draw(3, rows, 256) * 8).round().div(8).bfloat16()), ends.int().cuda()
    cuts = {"gathered": _policy.APART_GATHERED, "described": _policy.APART}
    with pytest.MonkeyPatch.context() as patch:
        for name, cut in cuts.items():
            patch.setattr(_policy, name, lambda *_, cut=cut, **__: cut)
        patch.setattr(_policy, "outer", lambda *_, gathered="none": cuts["described" if gathered == "none" else "gathered"])
        found = KERNELS["gathered_rows"](tokens, of, matrices, offsets)
        again = KERNELS["grouped_rows"](together(tokens, of), matrices, offsets)
        gradient = KERNELS["gathered_outer"](tokens, right, offsets, (of,), "left")
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        x = together(tokens, of)[begin:end].double()
        assert torch.equal(found[begin:end], (x @ matrices[expert].double()).bfloat16()), expert
        assert torch.equal(again[begin:end], found[begin:end]), expert
        assert torch.equal(gradient[expert], (x.T @ right[begin:end].double()).bfloat16()), expert
        begin = end


@gpu
def test_offsets_out_of_order_and_range_are_put_right(specialised):
    specialised(True)
    matrices, rows = weights(torch.bfloat16, 64, 256, "out, in"), cuda(draw(1, ROWS, 64).bfloat16())
    right_ones = [0, 1, 1, 65, 193, 193, 500, ROWS, ROWS, ROWS]
    wrong = [-(2**40), 1, 0, 65, 193, -7, 500, 2**40, 3, 99]
    for kernel, operand in (("grouped_rows", matrices), ("grouped_outer", cuda(draw(2, ROWS, 128).bfloat16()))):
        given = rows if kernel == "grouped_rows" else cuda(draw(3, ROWS, 128).bfloat16())
        results = [KERNELS[kernel](given, operand, torch.tensor(ends).cuda()) for ends in (right_ones, wrong)]
        assert torch.equal(*results)


QWEN = Shape(131072, 128, 2048, 1536)


known = pytest.mark.skipif(not _policy._SPECIALISED, reason="this release of Triton is not among those tried")


@known
@pytest.mark.parametrize(
    ("shape", "arch", "options", "specialised"),
    [
        (QWEN._replace(depth=768), "9", {}, True),
        (QWEN._replace(depth=768), "10", {}, False),
        (QWEN._replace(depth=768), "9", {"updated": True}, False),
        (QWEN._replace(depth=768), "9", {"leaves": False}, False),
        (QWEN._replace(depth=768, num_rows=128 * 128), "9", {}, False),
        (QWEN._replace(depth=2880), "9", {}, False),
        (QWEN._replace(depth=768, num_experts=129), "9", {}, False),
    ],
)
def test_which_products_are_cut_so(shape, arch, options, specialised):
    cut = _policy.described(shape, torch.bfloat16, arch, **options)
    assert cut is not None and (cut == _policy.APART) == specialised and bool(cut.fetchers) == specialised


@known
def test_which_fetched_rows_and_gradients_are_cut_so():
    for gate in ("", "plain", "full"):
        assert _policy.gathered(QWEN, torch.float16, "9", gate=gate) == _policy.APART_GATHERED
    assert not _policy.gathered(QWEN, torch.bfloat16, "9", leaves=False).fetchers
    assert not _policy.gathered(QWEN, torch.bfloat16, "10").fetchers
    assert _policy.outer(QWEN, torch.bfloat16, "9") == _policy.APART
    assert not _policy.outer(QWEN, torch.bfloat16, "10").fetchers
    narrow = QWEN._replace(width=768)
    assert _policy.outer(narrow, torch.bfloat16, "9", gathered="left") == _policy.APART_GATHERED
    more = QWEN._replace(num_experts=129)
    assert not _policy.gathered(more, torch.bfloat16, "9").fetchers and not _policy.outer(more, torch.bfloat16, "9").fetchers
    others = ((QWEN, "9", "left"), (narrow, "10", "left"), (narrow, "9", "right"), (more._replace(width=768), "9", "left"))
    for shape, arch, side in others:
        assert _policy.outer(shape, torch.bfloat16, arch, gathered=side) is None


def test_a_tile_and_its_ring_fit_into_shared_memory():
    for cut in (_policy.APART, _policy.APART_GATHERED):
        ring = cut.stages * (cut.rows + cut.columns) * cut.depth * 2
        staging = 2 * 2 * (cut.rows // 2) * cut.leaving * 2
        assert ring + staging + 1024 <= 227 * 1024
