"""``opcheck`` of the operators whose own files do not have it, and for completeness: none is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from _reference import draw, opcheck, transposed

import moekit
from moekit import Routing
from moekit.ops import experts, grouped_linear, topk  # noqa: F401  (defines the operators)

pytestmark = pytest.mark.usefixtures("backend")
OPS = torch.ops.moekit
OFFSETS = torch.tensor([3, 3, 8], dtype=torch.int32)


@pytest.mark.parametrize("scoring", [("softmax", False), ("softmax", True), ("sigmoid", False), ("sqrtsoftplus", False)])
@pytest.mark.parametrize("tokens", [6, 0])
def test_topk_router(scoring, tokens):
    logits = transposed(draw(1, tokens, 8, dtype=torch.float32)).requires_grad_()
    mask = torch.arange(tokens) % 3 == 1
    opcheck(OPS.topk_router.default, (logits, None, None, 2, *scoring, 1e-6, 2.5, False, 0, 0, 0))
    opcheck(OPS.topk_router.default, (logits, torch.rand(8), mask, 2, *scoring, None, None, False, 4, 2, 1))
    indices = moekit.topk_router(logits, 2)[1]
    opcheck(OPS.score_sums.default, (logits, torch.rand(8, requires_grad=True), scoring[0], mask))
    grad = draw(2, tokens, 2, dtype=torch.float32)
    opcheck(OPS.weigh_experts.default, (logits, indices, mask, *scoring, 1e-6, 2.5))
    opcheck(OPS.topk_router_backward.default, (grad, torch.rand(8), logits.detach(), indices, mask, *scoring, 1e-6, 2.5))


def test_grouped_products():
    rows, right = draw(1, 8, 6, dtype=torch.float32).requires_grad_(), draw(3, 8, 5, dtype=torch.float32).requires_grad_()
    weight = draw(2, 3, 5, 6, dtype=torch.float32).requires_grad_()
    opcheck(OPS.grouped_linear.default, (rows, weight.mT, OFFSETS))
    opcheck(OPS.grouped_outer.default, (rows, right, OFFSETS))


def test_packed_weights():
    rows, weight = draw(1, 8, 64, dtype=torch.float32).requires_grad_(), draw(2, 3, 5, 64, dtype=torch.float32)
    for format in ("nf4", "mxfp4", "int8"):  # opcheck itself multiplies what it is given, which float8 does not have
        stored = grouped_linear.flat(moekit.pack(weight, format).stored())
        opcheck(OPS.packed_linear.default, (rows, *stored, OFFSETS, False))
        opcheck(OPS.unpack.default, (*moekit.pack(weight, format).stored(), 1, 3, torch.float32))


@pytest.mark.parametrize("format", ["", "nf4"])
@pytest.mark.parametrize("rank", [0, 2])
def test_experts_backward(format, rank):
    x, weights = draw(1, 6, 4, dtype=torch.float32), draw(2, 6, 2, dtype=torch.float32)
    gate_up, down = draw(3, 3, 32, 4, dtype=torch.float32), draw(4, 3, 4, 16, dtype=torch.float32)
    shapes = [(3, rank, 4), (3, 32, rank), (3, rank, 16), (3, 4, rank)]
    factors = [draw(5 + i, *shape, dtype=torch.float32) if rank else None for i, shape in enumerate(shapes)]
    scales = [None, None]
    if format:
        (gate_up, [scales[0]], *_), (down, [scales[1]], *_) = (moekit.pack(w, format).stored() for w in (gate_up, down))
    routing = Routing.from_topk(torch.tensor([[0, 2]] * 6), num_experts=3)
    tables = (routing.order, routing.inverse, routing.offsets)
    gate = ("sigmoid", 1.0, 0.0, 0.0, None, True, "concatenated")
    lora = [float(rank), 0.5, 0.25] if rank else []
    constants = (*gate, False, format, format, [1, 64] * 2, False, False, lora, lora, False, "recompute", False)
    inputs = (
        weights,
        gate_up,
        down,
        None,
        None,
        *factors,
        *tables,
        scales[0],
        None,
        None,
        scales[1],
        None,
        None,
        torch.tensor([1, 2]),
    )
    _, *kept = OPS.experts(x, *inputs, *constants)
    wanted = [True, True, not format, not format, False, False, *[rank > 0] * 4]
    opcheck(OPS.experts_backward.default, (torch.ones_like(x), x, *inputs, *kept, *constants, wanted))


def test_no_operator_is_left_out():
    here = Path(__file__).parent
    checked = "\n".join(path.read_text() for path in here.glob("test_*.py") if "opcheck" in path.read_text())
    sources = "\n".join(path.read_text() for path in (here.parent / "moekit" / "ops").glob("*.py"))
    defined = set(re.findall(r'^    f?"(\w+)\(', sources, re.MULTILINE))
    assert len(defined) >= 20
    assert not {name for name in defined if not re.search(rf"\b{name}\b", checked)}
