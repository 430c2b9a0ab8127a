"""Native permute and unpermute under autograd: checks by differences, what is saved, recomputed and left out."""

from __future__ import annotations

import pytest
import torch
from _by_hand import CASES, leaf
from _reference import LAYOUTS, assert_accurate, assert_same, draw, opcheck
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import moekit
from moekit import Routing, _backend
from moekit.ops import rows as rows_module

pytestmark = pytest.mark.usefixtures("backend")
ops = torch.ops.moekit


@pytest.mark.not_interpreted
def test_gradcheck():
    indices = torch.tensor([[1, -1], [0, 1], [2, 2]])
    tokens, rows, weights = leaf(draw(0, 3, 2)), leaf(draw(1, 6, 2)), leaf(draw(2, 3, 2))

    def permute(x):
        return moekit.permute(x, Routing.from_topk(indices, num_experts=3))

    def unpermute(x):
        return moekit.unpermute(x, Routing.from_topk(indices, num_experts=3))

    def weighted(x, w):
        return moekit.unpermute(x, Routing.from_topk(indices, w, num_experts=3), weighted=True)

    def padded(x, w):
        routing = Routing.from_topk(indices, w, num_experts=3).pad_to_multiple(4)
        return moekit.unpermute(moekit.permute(x, routing), routing, weighted=True)

    for function, inputs in ((permute, (tokens,)), (unpermute, (rows,)), (weighted, (rows, weights))):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)
    assert gradcheck(padded, (tokens, weights))
    assert gradgradcheck(padded, (tokens, weights))


def test_double_backward_where_there_is_none(backend):
    rows, weights = leaf(draw(0, 4, 3, dtype=torch.float32)), leaf(draw(1, 2, 2, dtype=torch.float32))
    routing = Routing.from_topk(torch.tensor([[0, 1], [1, 0]]), weights, num_experts=2)
    out = moekit.unpermute(rows, routing, weighted=True)
    (drows,) = torch.autograd.grad(out.square().sum(), rows, create_graph=True)
    if _backend.kernel("unpermute", rows) is None:
        (second,) = torch.autograd.grad(drows.sum(), rows)
        by_row = weights.detach()[[0, 1, 0, 1], [0, 1, 1, 0]]  # the rows of (t0, k0), (t1, k1), (t0, k1), (t1, k0)
        partner = torch.tensor([2, 3, 0, 1])
        expected = 2 * by_row * (by_row + by_row[partner])
        assert_accurate(second, expected.double().unsqueeze(1).expand(4, 3))
    else:
        with pytest.raises(RuntimeError, match=r"moekit\.unpermute: double backward .* 'torch' backend"):
            torch.autograd.grad(drows.sum(), rows)


def test_two_backwards_nothing_is_written():
    indices, experts, hidden = CASES["e7_odd_hidden"]
    tokens = leaf(draw(1, indices.shape[0], hidden, dtype=torch.bfloat16))
    weights = leaf(draw(2, *indices.shape, dtype=torch.float32))
    routing = Routing.from_topk(indices, weights, num_experts=experts)
    rows = moekit.permute(tokens, routing)
    out = moekit.unpermute(rows, routing, weighted=True)
    grad = draw(3, *out.shape, dtype=torch.bfloat16)
    kept = [tokens, weights, rows, grad, routing.order, routing.inverse, routing.offsets, *routing.row_tables()]
    before = [x.detach().clone() for x in kept]
    first = torch.autograd.grad(out, (tokens, weights), grad, retain_graph=True)
    second = torch.autograd.grad(out, (tokens, weights), grad)
    for a, b in zip(first, second, strict=True):
        assert a.any()
        assert_same(b, a)
    for now, then in zip(kept, before, strict=True):
        assert_same(now.detach(), then)


def test_gradients_nobody_needs(monkeypatch):
    asked = []
    real = rows_module._unpermute_weighted_backward
    monkeypatch.setattr(rows_module, "_unpermute_weighted_backward", lambda *args: (asked.append(args[-1]), real(*args))[1])
    for wanted in ([True, True], [True, False], [False, True]):
        rows, weights = draw(0, 4, 3), draw(1, 2, 2)
        rows.requires_grad_(wanted[0])
        weights.requires_grad_(wanted[1])
        routing = Routing.from_topk(torch.tensor([[0, 1], [1, 0]]), weights, num_experts=2)
        moekit.unpermute(rows, routing, weighted=True).sum().backward()
        assert [x.grad is not None for x in (rows, weights)] == wanted
    assert asked == [[True, True], [True, False], [False, True]]
    tokens = draw(0, 2, 3)
    assert not moekit.permute(tokens, routing).requires_grad


@pytest.mark.parametrize("wanted", [[True, True], [True, False], [False, True], [False, False]])
def test_the_operator_leaves_out_what_is_not_wanted(wanted):
    routing = Routing.from_topk(torch.tensor([[0, 1], [1, -1]]), num_experts=2)
    grad, rows, weights = draw(0, 2, 3).float(), draw(1, 4, 3).float(), draw(2, 4).float()
    outputs = ops.unpermute_backward(grad, rows, weights, *routing.row_tables(), wanted)
    full = ops.unpermute_backward(grad, rows, weights, *routing.row_tables(), [True, True])
    for output, everything, want in zip(outputs, full, wanted, strict=True):
        assert everything.any()
        assert_same(output, everything if want else torch.empty(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_operator_gives_rows_of_no_token_zero_gradients(dtype):
    """Whatever stands in them."""
    found = Routing.from_topk(torch.tensor([[0, -1], [1, -1]]), num_experts=2).row_tables()
    rows = torch.tensor([[1, 2], [3, 4], [float("nan"), 1], [float("inf"), 0]], dtype=dtype)
    weights = torch.tensor([2, 3, 4, 5], dtype=dtype)
    assert_same(ops.unpermute(rows, weights, *found), torch.tensor([[2, 4], [9, 12]], dtype=dtype))
    grad = torch.tensor([[1, 10], [100, 1000]], dtype=dtype)
    drows, dweights = ops.unpermute_backward(grad, rows, weights, *found, [True, True])
    assert_same(drows, torch.tensor([[2, 20], [300, 3000], [0, 0], [0, 0]], dtype=dtype))
    assert_same(dweights, torch.tensor([21, 4300, 0, 0], dtype=dtype))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("tokens", [5, 0])
def test_activation_checkpointing(use_reentrant, tokens):
    """With equal weights everywhere and one token of no expert."""
    indices = torch.tensor([[0, 1], [1, 0], [-1, -1], [2, 2], [0, 2]])[:tokens]

    def layer(x, w):
        routing = Routing.from_topk(indices, w, num_experts=3)
        return moekit.unpermute(moekit.permute(x, routing).square(), routing, weighted=True)

    results = []
    for checkpointed in (False, True):
        x = leaf(draw(0, tokens, 4, dtype=torch.float32))
        w = torch.full((tokens, 2), 0.5, requires_grad=True)
        out = checkpoint(layer, x, w, use_reentrant=use_reentrant) if checkpointed else layer(x, w)
        out.sum().backward()
        results.append((out, x.grad, w.grad))
    for plain, recomputed in zip(*results, strict=True):
        assert plain.any() or not tokens
        assert_same(recomputed, plain)


# --- the operators --------------------------------------------------------------------------------------------------


OPCHECK = {
    "some_none": (*CASES["some_none"], "contiguous"),
    "strided": (*CASES["e7_odd_hidden"], "transposed"),
    "empty": (torch.zeros(0, 2, dtype=torch.int64), 3, 4, "contiguous"),
}


@pytest.mark.parametrize("name", OPCHECK)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(name, dtype):
    indices, experts, hidden, layout = OPCHECK[name]
    lay = LAYOUTS[layout]
    found = Routing.from_topk(indices, num_experts=experts).row_tables()
    tokens = leaf(lay(draw(0, indices.shape[0], hidden, dtype=dtype)))
    rows = leaf(lay(draw(1, indices.numel(), hidden, dtype=dtype)))
    weights = leaf(lay(draw(2, indices.numel(), dtype=torch.promote_types(dtype, torch.float32))))
    grad = lay(draw(3, indices.shape[0], hidden, dtype=dtype))
    opcheck(ops.permute.default, (tokens, *found))
    opcheck(ops.unpermute.default, (rows, weights, *found))
    plain = (grad, rows.detach(), weights.detach())
    opcheck(ops.unpermute_backward.default, (*plain, *found, [True, True]))
    if dtype is torch.float64:
        opcheck(ops.unpermute.default, (rows, None, *found))
        for wanted in ([True, False], [False, True]):
            opcheck(ops.unpermute_backward.default, (*plain, *found, wanted))
        args = (leaf(grad), rows, weights, *found, [True, True])  # double backward
        opcheck(ops.unpermute_backward.default, args)
