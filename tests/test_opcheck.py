"""``opcheck`` of the operators whose own files do not have it, and for completeness: none is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from _reference import draw, transposed

import moekit
from moekit import Routing
from moekit.ops import experts, gemm, topk  # noqa: F401  (defines the operators)

pytestmark = pytest.mark.usefixtures("backend")
OPS = torch.ops.moekit
OFFSETS = torch.tensor([3, 3, 8], dtype=torch.int32)


@pytest.mark.parametrize("scoring", [("softmax", False), ("softmax", True), ("sigmoid", False), ("sqrtsoftplus", False)])
@pytest.mark.parametrize("tokens", [6, 0])
def test_topk_router(scoring, tokens):
    logits = transposed(draw(1, tokens, 8, dtype=torch.float32)).requires_grad_()
    mask = torch.arange(tokens) % 3 == 1
    torch.library.opcheck(OPS.topk_router.default, (logits, None, None, 2, *scoring, 1e-6, 2.5, False, 0, 0, 0))
    torch.library.opcheck(OPS.topk_router.default, (logits, torch.rand(8), mask, 2, *scoring, None, None, False, 4, 2, 1))
    indices = moekit.topk_router(logits, 2)[1]
    torch.library.opcheck(OPS.score_sums.default, (logits, torch.rand(8, requires_grad=True), scoring[0], mask))
    grad = draw(2, tokens, 2, dtype=torch.float32)
    torch.library.opcheck(OPS.weigh_experts.default, (logits, indices, mask, *scoring, 1e-6, 2.5))
    torch.library.opcheck(
        OPS.topk_router_backward.default, (grad, torch.rand(8), logits.detach(), indices, mask, *scoring, 1e-6, 2.5)
    )


def test_grouped_products():
    rows, right = draw(1, 8, 6, dtype=torch.float32).requires_grad_(), draw(3, 8, 5, dtype=torch.float32).requires_grad_()
    weight = draw(2, 3, 5, 6, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(OPS.grouped_linear.default, (rows, weight.mT, OFFSETS))
    torch.library.opcheck(OPS.grouped_outer.default, (rows, right, OFFSETS))


def test_experts_backward():
    x, weights = draw(1, 6, 4, dtype=torch.float32), draw(2, 6, 2, dtype=torch.float32)
    gate_up, down = draw(3, 3, 10, 4, dtype=torch.float32), draw(4, 3, 4, 5, dtype=torch.float32)
    routing = Routing.from_topk(torch.tensor([[0, 2]] * 6), num_experts=3)
    tables = (routing.order, routing.inverse, routing.offsets)
    constants = ("sigmoid", 1.0, 0.0, 0.0, None, True, "concatenated", False, False, "recompute")
    inputs = (weights, gate_up, down, None, None, *tables)
    _, *kept = OPS.experts(x, *inputs, *constants)
    wanted = [True, True, True, True, False, False]
    torch.library.opcheck(OPS.experts_backward.default, (torch.ones_like(x), x, *inputs, *kept, *constants, wanted))


def test_no_operator_is_left_out():
    here = Path(__file__).parent
    checked = "\n".join(path.read_text() for path in here.glob("test_*.py") if "opcheck" in path.read_text())
    sources = "\n".join(path.read_text() for path in (here.parent / "moekit" / "ops").glob("*.py"))
    defined = set(re.findall(r'^    f?"(\w+)\(', sources, re.MULTILINE))
    assert len(defined) >= 20
    assert not {name for name in defined if not re.search(rf"\b{name}\b", checked)}
