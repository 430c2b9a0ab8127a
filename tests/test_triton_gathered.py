"""Products with rows fetched one by one in Triton: the bits of the same steps one after the other.

Without a GPU one test starts another pytest on this file, which interprets, as in ``test_triton_kernels.py``.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from _interpreter import INTERPRETED, run_interpreted
from _reference import draw, together

pytest.importorskip("triton")

import moekit
from moekit.kernels.triton import KERNELS, _launch, _policy, gathered, gemm
from moekit.kernels.triton._policy import Blocks, Shape

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
ENDS = [0, 5, 5, 24, 33, 33]  # the first, third and last have no rows; three rows follow that are nobody's
E, ROWS, TOKENS = len(ENDS), 36, 11


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_products_pass_in_the_interpreter():
    run_interpreted(Path(__file__))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many to a program; on a GPU the policy's own."""
    if GPU or not INTERPRETED:
        return
    monkeypatch.setattr(_launch, "arch", lambda device: _launch.Arch("9", 32))
    for module in (gemm, gathered):
        monkeypatch.setattr(module, "processors", lambda device: 2, raising=False)
    small = Blocks(16, 32, 16, 4, 2, 1, flat=True)
    monkeypatch.setattr(_policy, "gathered", lambda *_, **__: small)
    monkeypatch.setattr(_policy, "described", lambda *_, **__: small._replace(leaving=small.columns // 2))


def case(dtype, depth, width, layout):
    """Tokens, the token of each row (some have none), matrices ``[E, in, out]`` as stored in ``layout``, and offsets."""
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(-1, TOKENS, (ROWS,), generator=generator).int()
    index[7] = TOKENS + 5  # out of range: no token
    matrices = draw(2, E, width, depth).to(dtype)
    matrices = matrices.mT if layout == "out, in" else matrices.mT.contiguous()
    tokens = draw(1, TOKENS, depth).to(dtype)
    tensors = (tokens, index, matrices, torch.tensor(ENDS).int())
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t) for t in tensors]


kernel_runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs in the interpreter's process")


@kernel_runs
@pytest.mark.parametrize("layout", ["out, in", "in, out"])
@pytest.mark.parametrize(("dtype", "depth", "width"), [(torch.bfloat16, 72, 136), (torch.float16, 32, 72)])
def test_rows_by_matrices(dtype, depth, width, layout):
    tokens, index, matrices, offsets = case(dtype, depth, width, layout)
    found = KERNELS["gathered_rows"](tokens, index, matrices, offsets)
    expected = KERNELS["grouped_rows"](together(tokens, index), matrices, offsets)
    assert torch.equal(found[: ENDS[-1]], expected[: ENDS[-1]])


GATES = {
    "silu": ("sigmoid", 1.0, 0.0, 0.0, None, True, "concatenated"),
    "gpt-oss": ("sigmoid", 1.702, 0.0, 1.0, 0.7, True, "interleaved"),
    "clamp before the bias": ("sigmoid", 1.0, 0.1, 0.0, 0.5, False, "concatenated"),
    "nemotron": ("relu2", 0.0, 0.0, 0.0, None, False, "ungated"),
}


@kernel_runs
@pytest.mark.parametrize("layout", ["out, in", "in, out"])
@pytest.mark.parametrize("name", GATES)
def test_the_gate_behind_the_product(name, layout):
    spec = GATES[name]
    tokens, index, matrices, offsets = case(torch.bfloat16, 48, 144, layout)
    for biased, weighted in itertools.product((False, True), (False, True)):
        bias = draw(4, E, 144).float().to(DEVICE) if biased else None
        weights = torch.rand(ROWS).to(DEVICE) if weighted else None
        kept = KERNELS["gathered_glu"](tokens, index, matrices, offsets, weights, bias, True, False, *spec)
        if spec[-1] == "concatenated" and layout == "in, out":
            assert kept is NotImplemented
            return
        projected = KERNELS["grouped_rows"](together(tokens, index), matrices, offsets)
        expected = KERNELS["glu"](projected, weights, bias, offsets, *spec)
        mine = slice(ENDS[-1])
        assert torch.equal(kept[0][mine], projected[mine])
        assert torch.equal(kept[1][mine], expected[mine])
        nothing, act = KERNELS["gathered_glu"](tokens, index, matrices, offsets, weights, bias, False, True, *spec)
        assert nothing is None and torch.equal(act[mine], expected[mine])


@kernel_runs
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_experts_take_them(trained, adapted, monkeypatch):
    """Where nothing stands between the product and the gate; an adapter of gate_up does."""
    taken, kernel = [], KERNELS["gathered_glu"]
    monkeypatch.setitem(KERNELS, "gathered_glu", lambda *args: (taken.append(kernel(*args)), taken[-1])[1])
    hidden, inner = 64, 72
    shapes = {"x": (TOKENS, hidden), "gate_up": (E, 2 * inner, hidden), "down": (E, hidden, inner)}
    shapes |= {"A": (E, 4, hidden), "B": (E, 2 * inner, 4)} if adapted else {}
    indices = torch.rand(TOKENS, E, generator=torch.Generator().manual_seed(0)).topk(4).indices.to(DEVICE)
    given = {name: draw(place, *shape, scale=0.4).bfloat16() for place, (name, shape) in enumerate(shapes.items())}
    given["weights"], grad = draw(8, TOKENS, 4).abs().bfloat16(), draw(9, TOKENS, hidden).bfloat16()
    leaves = [name for name in given if not adapted or name in ("x", "A", "B", "weights")] if trained else []

    def computed(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        of = {name: t.to(DEVICE, dtype, copy=True).requires_grad_(name in leaves) for name, t in given.items()}
        lora = {"gate_up": moekit.Lora(of["A"], of["B"], 2.0)} if adapted else None
        with moekit.backend(backend):
            out = moekit.experts(of["x"], (indices, of["weights"]), of["gate_up"], of["down"], lora=lora)
            if trained:
                out.backward(grad.to(DEVICE, dtype))
        return [out.detach().double(), *(of[name].grad.double() for name in leaves)]

    found, expected = computed("triton", torch.bfloat16), computed("torch", torch.float64)
    assert len(taken) == (not adapted) and not any(result is NotImplemented for result in taken)
    for mine, exact in zip(found, expected, strict=True):
        assert exact.any() and (mine - exact).norm() < 2**-6 * exact.norm()


LEFT = {
    "float32": lambda: case(torch.float32, 32, 128, "out, in"),
    "strides of no 16 bytes": lambda: case(torch.bfloat16, 36, 128, "out, in"),
    "another dtype": lambda: (case(torch.float16, 32, 128, "out, in")[0], *case(torch.bfloat16, 32, 128, "out, in")[1:]),
}


@kernel_runs
@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_fetched_is_left(name, monkeypatch):
    args = LEFT[name]()
    if name == "float32":
        monkeypatch.undo()
    assert KERNELS["gathered_rows"](*args) is NotImplemented
    assert KERNELS["gathered_glu"](*args, None, None, True, False, *GATES["silu"]) is NotImplemented


@pytest.mark.skipif(INTERPRETED, reason="the fixture cuts there")
def test_how_they_are_cut():
    qwen = Shape(131072, 128, 2048, 1536)
    cuts = [_policy.gathered(qwen, torch.bfloat16, "9", gate=gate, leaves=False) for gate in ("", "plain", "full")]
    assert [(cut.rows, cut.columns, cut.flat) for cut in cuts] == [(128, 256, True), (128, 256, True), (128, 256, False)]
    assert [_policy.gathered(qwen, torch.bfloat16, "10", gate=gate) for gate in ("", "plain", "full")] == [*cuts[:2], None]
    few = qwen._replace(num_rows=128)
    assert _policy.gathered(few, torch.bfloat16, "10", gate="plain") is None
    assert _policy.gathered(qwen._replace(depth=2040), torch.bfloat16, "10") is None
    assert _policy.gathered(qwen, torch.bfloat16, "9", gate="gelu") is None
    assert _policy.gathered(qwen._replace(num_rows=128), torch.bfloat16, "10").rows == 64
    for shape, dtype, arch in (
        (qwen, torch.float32, "9"),
        (qwen, torch.bfloat16, "8"),
        (qwen._replace(width=64), torch.bfloat16, "9"),
        (Shape(32768, 8, 4096, 28672), torch.bfloat16, "9"),  # Mixtral
    ):
        assert _policy.gathered(shape, dtype, arch) is None
