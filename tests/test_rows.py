"""Native permute and unpermute, against loops over tokens and slots."""

from __future__ import annotations

import pytest
import torch
from _by_hand import CASES, case, every_case, gradients_by_hand, leaf, permute_by_hand, unpermute_by_hand
from _interpreter import RUNS
from _reference import DTYPES, LAYOUTS, LOW, assert_accurate, assert_same, draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moekit
from moekit import Routing
from moekit.ops import rows as rows_module
from moekit.ops import tables

pytestmark = pytest.mark.usefixtures("backend")
ops = torch.ops.moekit


# --- values ---------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_permute_copies_rows_exactly(name, dtype):
    indices, experts, hidden = CASES[name]
    tokens = (
        (1 + draw(1, indices.shape[0], hidden).abs()).to(dtype)
        if dtype is not torch.bool
        else (draw(1, indices.shape[0], hidden) > 0)
    )
    out = moekit.permute(tokens, Routing.from_topk(indices, num_experts=experts))
    assert out.dtype is dtype and out.shape == (indices.numel(), hidden)
    assert_same(out.double(), permute_by_hand(tokens.double(), indices, experts, indices.numel()))


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_permute_gradient(name, dtype):
    indices, experts, hidden = CASES[name]
    tokens = leaf(draw(1, indices.shape[0], hidden, dtype=dtype))
    out = moekit.permute(tokens, Routing.from_topk(indices, num_experts=experts))
    grad = draw(2, *out.shape, dtype=dtype)
    out.backward(grad)
    expected, size = unpermute_by_hand(grad, indices, None, experts)
    assert tokens.grad.dtype is dtype
    assert_accurate(tokens.grad, expected, scale=size)


@every_case
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpermute_and_its_gradients(name, weighted, dtype):
    indices, experts, hidden = CASES[name]
    rows = leaf(draw(1, indices.numel(), hidden, dtype=dtype))
    weights = leaf(draw(2, *indices.shape, dtype=dtype))
    routing = Routing.from_topk(indices, weights, num_experts=experts)
    out = moekit.unpermute(rows, routing, weighted=weighted)
    expected, size = unpermute_by_hand(rows, indices, weights if weighted else None, experts)
    assert out.dtype is dtype
    assert_accurate(out, expected, scale=size, what="output")
    grad = draw(3, *out.shape, dtype=dtype)
    out.backward(grad)
    ones = torch.ones_like(weights)
    drows, dweights, products = gradients_by_hand(grad, rows, indices, weights if weighted else ones, experts)
    assert rows.grad.dtype is dtype
    if weighted:
        assert_accurate(rows.grad, drows, what="drows")
        assert weights.grad.dtype is dtype
        assert_accurate(weights.grad, dweights, scale=products, what="dweights")
    else:
        assert_same(rows.grad, drows.to(dtype), "drows")
        assert weights.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_rounded_on_the_way(dtype):
    """2048 and 255 ones: rounding after each addition would never leave 2048."""
    experts = 256
    rows = torch.ones(experts, 3, dtype=dtype)
    rows[0] = 2048
    routing = Routing.from_topk(torch.arange(experts).view(1, -1), num_experts=experts)
    exact = torch.full((1, 3), 2048.0 + 255)
    assert_same(moekit.unpermute(rows, routing), exact.to(dtype))
    tokens = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    moekit.permute(tokens, routing).backward(rows)
    assert_same(tokens.grad, exact.to(dtype))
    # And of the products: each is 2048 * 2**-4 or 2**-4, the sum a hundred and some.
    routing = Routing.from_topk(routing.indices, torch.full((1, experts), 2.0**-4, dtype=dtype), num_experts=experts)
    assert_same(moekit.unpermute(rows, routing, weighted=True), (exact / 16).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradient_is_not_rounded_on_the_way(dtype):
    rows = torch.ones(1, 300, dtype=dtype, requires_grad=True)
    grad = torch.ones(1, 300, dtype=dtype)
    grad[0, 0] = 1024
    weights = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.int32), weights, num_experts=1)
    moekit.unpermute(rows, routing, weighted=True).backward(grad)
    assert_same(weights.grad, torch.full((1, 1), 1024.0 + 299).to(dtype))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_routing(data):
    experts = data.draw(st.integers(1, 9), "experts")
    topk = data.draw(st.integers(1, experts), "topk")
    tokens = data.draw(st.integers(0, 12), "tokens")
    hidden = data.draw(st.integers(1, 9), "hidden")
    flat = data.draw(st.lists(st.integers(-1, experts - 1), min_size=tokens * topk, max_size=tokens * topk), "indices")
    indices = torch.tensor(flat, dtype=torch.int64).view(tokens, topk)
    weights = draw(1, tokens, topk, dtype=torch.float32)
    routing = Routing.from_topk(indices, weights, num_experts=experts)
    x = draw(2, tokens, hidden, dtype=torch.float32)
    permuted = moekit.permute(x, routing)
    assert_same(permuted, permute_by_hand(x, indices, experts, indices.numel()))
    expected, size = unpermute_by_hand(permuted, indices, weights, experts)
    assert_accurate(moekit.unpermute(permuted, routing, weighted=True), expected, scale=size)


# --- nothing there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(poisoned, dtype):
    indices = torch.zeros(0, 2, dtype=torch.int64)
    tokens = torch.zeros(0, 6, dtype=dtype, requires_grad=True)
    weights = torch.zeros(0, 2, dtype=torch.float32, requires_grad=True)
    routing = Routing.from_topk(indices, weights, num_experts=4)
    rows = moekit.permute(tokens, routing)
    assert rows.shape == (0, 6) and rows.dtype is dtype
    out = moekit.unpermute(rows, routing, weighted=True)
    assert out.shape == (0, 6) and out.dtype is dtype
    out.sum().backward()
    assert tokens.grad.shape == (0, 6) and tokens.grad.dtype is dtype
    assert weights.grad.shape == (0, 2) and weights.grad.dtype is torch.float32


def test_padding_alone(poisoned):
    """Rows without any token: zero, and still connected to the tokens."""
    routing = Routing.from_topk(torch.zeros(0, 2, dtype=torch.int64), num_experts=2).pad_to_multiple(4)
    tokens = torch.zeros(0, 3, requires_grad=True)
    rows = moekit.permute(tokens, routing)
    assert rows.shape == (8, 3) and not rows.any()
    rows.sum().backward()
    assert tokens.grad.shape == (0, 3)
    assert moekit.unpermute(torch.ones(8, 3), routing).shape == (0, 3)


def test_empty_experts_leave_no_rows(poisoned):
    indices, experts, hidden = CASES["empty_expert"]
    routing = Routing.from_topk(indices, num_experts=experts)
    tokens = draw(0, indices.shape[0], hidden)
    parts = torch.tensor_split(moekit.permute(tokens, routing), routing.offsets[:-1].tolist())
    wanted = {0: [0, 1, 3], 3: [0, 1, 2], 4: [2, 3]}
    for expert, part in enumerate(parts):
        assert_same(part, tokens[wanted.get(expert, [])], f"expert {expert}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_routed(poisoned, dtype):
    indices = torch.full((4, 2), -1)
    tokens = leaf(draw(0, 4, 3, dtype=dtype))
    rows = leaf(draw(1, 8, 3, dtype=dtype))
    weights = leaf(draw(2, 4, 2, dtype=dtype))
    routing = Routing.from_topk(indices, weights, num_experts=3)
    permuted, out = moekit.permute(tokens, routing), moekit.unpermute(rows, routing, weighted=True)
    assert_same(permuted, torch.zeros(8, 3, dtype=dtype))
    assert_same(out, torch.zeros(4, 3, dtype=dtype))
    (permuted.sum() + out.sum()).backward()
    for x in (tokens, rows, weights):
        assert_same(x.grad, torch.zeros_like(x))


@every_case
@pytest.mark.parametrize("dtype", LOW)
def test_poisoned_memory(poisoned, name, dtype):
    indices, experts, hidden = CASES[name]
    tokens = leaf(draw(1, indices.shape[0], hidden, dtype=dtype))
    weights = leaf(draw(2, *indices.shape, dtype=torch.float32))
    routing = Routing.from_topk(indices, weights, num_experts=experts)
    for table in (routing.pad_to_multiple(4), routing):
        tokens.grad = weights.grad = None
        rows = moekit.permute(tokens, table)
        out = moekit.unpermute(rows, table, weighted=True)
        expected, size = unpermute_by_hand(
            permute_by_hand(tokens.detach(), indices, experts, indices.numel()), indices, weights.detach(), experts
        )
        assert_accurate(out, expected, scale=size)
        out.backward(torch.ones_like(out))
        assert tokens.grad.isfinite().all() and weights.grad.isfinite().all()
        sums = tokens.detach().double().sum(1, keepdim=True).expand(weights.shape)
        assert_accurate(
            weights.grad,
            torch.where(indices >= 0, sums, 0.0),
            scale=tokens.detach().double().abs().sum(1, keepdim=True),
        )


def test_the_same_expert_twice_counts_twice():
    tokens = draw(0, 2, 3)
    weights = leaf(torch.tensor([[0.25, 0.5], [1.0, 2.0]], dtype=torch.float64))
    routing = Routing.from_topk(torch.tensor([[1, 1], [0, 1]]), weights, num_experts=2)
    rows = moekit.permute(tokens, routing)
    assert_same(rows, tokens[[1, 0, 0, 1]])
    rows = draw(1, 4, 3)  # two experts' work on one token may differ
    out = moekit.unpermute(rows, routing, weighted=True)
    assert_accurate(out, torch.stack((rows[1] * 0.25 + rows[2] * 0.5, rows[0] + 2 * rows[3])))
    out[0].sum().backward()
    assert_accurate(weights.grad, torch.tensor([[rows[1].sum(), rows[2].sum()], [0, 0]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", LOW)
def test_minus_one_contributes_nothing(dtype):
    full = torch.tensor([[1, 0], [2, 0], [0, 1]])
    some = torch.tensor([[1, 0], [-1, -1], [0, -1]])
    weights = leaf(draw(0, 3, 2, dtype=torch.float32))
    tokens, grad = leaf(draw(1, 3, 4, dtype=dtype)), draw(2, 3, 4, dtype=dtype)
    routing = Routing.from_topk(some, weights, num_experts=3)
    rows = moekit.permute(tokens, routing)
    assert_same(rows[:3], tokens[[0, 2, 0]])
    assert not rows[3:].any()
    out = moekit.unpermute(rows, routing, weighted=True)
    out.backward(grad)
    assert not out[1].any() and not tokens.grad[1].any()
    assert_same(weights.grad == 0, some < 0)
    # The neighbour is as if the others had been routed.
    other_weights, other_tokens = leaf(weights), leaf(tokens)
    other = Routing.from_topk(full, other_weights, num_experts=3)
    other_out = moekit.unpermute(moekit.permute(other_tokens, other), other, weighted=True)
    other_out.backward(grad)
    assert_same(out[0], other_out[0])
    assert_same(tokens.grad[0], other_tokens.grad[0])
    assert_same(weights.grad[0], other_weights.grad[0])


def test_rows_of_no_expert_are_ignored():
    """Whatever stands there, NaN included."""
    routing = Routing.from_topk(torch.tensor([[1, -1], [0, -1]]), torch.ones(2, 2), num_experts=2).pad_to_multiple(3)
    rows = torch.full((routing.num_rows, 2), float("nan"))
    rows[0], rows[3] = 5, 7
    for weighted in (False, True):
        x = leaf(rows)
        out = moekit.unpermute(x, routing, weighted=weighted)
        assert_same(out, torch.tensor([[7.0, 7], [5, 5]]))
        out.backward(torch.tensor([[1.0, 2], [3, 4]]))
        expected = torch.zeros_like(rows)
        expected[0], expected[3] = torch.tensor([3.0, 4]), torch.tensor([1.0, 2])
        assert_same(x.grad, expected)


# --- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LOW)
def test_strided_inputs(layout, dtype):
    indices, experts, hidden = CASES["e7_odd_hidden"]
    lay = LAYOUTS[layout]
    results = []
    for arrange in (lambda x: x, lay):
        tokens = leaf(arrange(draw(1, indices.shape[0], hidden, dtype=dtype)))
        weights = leaf(arrange(draw(2, *indices.shape, dtype=torch.float32)))
        routing = Routing.from_topk(arrange(indices), weights, num_experts=experts)
        rows = moekit.permute(tokens, routing)
        out = moekit.unpermute(arrange(rows.detach()), routing, weighted=True)
        rows.backward(arrange(draw(3, *rows.shape, dtype=dtype)))
        out.backward(arrange(draw(4, *out.shape, dtype=dtype)))
        results.append((rows, out, tokens.grad, weights.grad))
    for plain, strided in zip(*results, strict=True):
        assert plain.any()
        assert_same(strided, plain)


def test_expanded_gradients():
    indices, experts, hidden = CASES["plain"]
    routing = Routing.from_topk(indices, draw(0, *indices.shape, dtype=torch.float32), num_experts=experts)
    for grad in (torch.tensor(3.0), torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])):  # of all elements, of a row
        tokens = leaf(draw(1, indices.shape[0], hidden, dtype=torch.float32))
        rows = moekit.permute(tokens, routing)
        rows.backward(grad.expand(rows.shape))
        assert_same(tokens.grad, 2 * grad.expand(tokens.shape))
        x = leaf(draw(2, *rows.shape, dtype=torch.float32))
        moekit.unpermute(x, routing, weighted=True).backward(grad.expand(tokens.shape))
        assert_accurate(x.grad, (routing.row_weights().unsqueeze(1) * grad).expand(x.shape).double())
    x = leaf(draw(2, *rows.shape, dtype=torch.float32))
    moekit.unpermute(x, routing).sum().backward()
    assert_same(x.grad, torch.ones_like(x))


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rows_with_float32_weights(dtype):
    indices, experts, hidden = CASES["plain"]
    rows = leaf(draw(1, indices.numel(), hidden, dtype=dtype))
    weights = leaf(draw(2, *indices.shape).float() / 3)  # not representable in the rows' dtype
    out = moekit.unpermute(rows, Routing.from_topk(indices, weights, num_experts=experts), weighted=True)
    assert out.dtype is dtype
    expected, size = unpermute_by_hand(rows.detach(), indices, weights.detach(), experts)
    assert_accurate(out, expected, scale=size)
    grad = draw(3, *out.shape, dtype=dtype)
    out.backward(grad)
    drows, dweights, products = gradients_by_hand(grad, rows.detach(), indices, weights.detach(), experts)
    assert weights.grad.dtype is torch.float32 and rows.grad.dtype is dtype
    assert_accurate(weights.grad, dweights, scale=products)  # in float32's precision
    assert_accurate(rows.grad, drows)


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(rows_dtype):
    indices, experts, hidden = CASES["plain"]
    results = []
    for enabled in (False, True):
        tokens = leaf(draw(1, indices.shape[0], hidden, dtype=rows_dtype))
        weights = leaf(draw(2, *indices.shape, dtype=torch.float32))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            routing = Routing.from_topk(indices, weights, num_experts=experts)
            rows = moekit.permute(tokens, routing)
            out = moekit.unpermute(rows, routing, weighted=True)
        out.sum().backward()
        results.append((rows, out, tokens.grad, weights.grad))
    for off, on in zip(*results, strict=True):
        assert_same(on, off)


@pytest.mark.parametrize("dtype", LOW)
def test_twenty_runs_are_bit_equal(dtype):
    indices, experts, hidden = case(7, 60, 6, 8, 33)
    tokens, grad = draw(1, 60, hidden, dtype=dtype), draw(2, 60, hidden, dtype=dtype)
    weights = draw(3, *indices.shape, dtype=torch.float32)

    def run():
        x, w = leaf(tokens), leaf(weights)
        routing = Routing.from_topk(indices, w, num_experts=experts)
        out = moekit.unpermute(moekit.permute(x, routing), routing, weighted=True)
        out.backward(grad)
        return out, x.grad, w.grad

    first = run()
    assert all(t.any() for t in first)
    for _ in range(RUNS - 1):
        for again, once in zip(run(), first, strict=True):
            assert_same(again, once)


@pytest.mark.parametrize("dtype", LOW)
def test_a_token_alone_or_in_a_batch(dtype):
    indices, experts, hidden = case(8, 40, 5, 8, 19)
    tokens, weights = draw(1, 40, hidden, dtype=dtype), draw(2, 40, 5, dtype=torch.float32)

    def run(some: slice):
        routing = Routing.from_topk(indices[some], weights[some], num_experts=experts)
        return moekit.unpermute(moekit.permute(tokens[some], routing), routing, weighted=True)

    together = run(slice(None))
    for t in (0, 17, 39):
        assert_same(run(slice(t, t + 1))[0], together[t])


# --- aliasing and refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_outputs_never_alias_inputs(dtype):
    """One expert and one slot: nothing moves."""
    routing = Routing.from_topk(torch.zeros(4, 1, dtype=torch.int64), num_experts=1)
    tokens = torch.arange(1, 9).view(4, 2).to(dtype)
    before = tokens.clone()
    for out in (moekit.permute(tokens, routing), moekit.unpermute(tokens, routing)):
        assert_same(out, before)
        out.zero_()
        assert_same(tokens, before)


def test_mixed_devices():
    routing = Routing.from_topk(torch.tensor([[0], [1]]), num_experts=2)
    with pytest.raises(ValueError, match=r"permute: routing must be on the device of tokens \(meta\), got cpu"):
        moekit.permute(torch.zeros(2, 3, device="meta"), routing)
    with pytest.raises(ValueError, match=r"unpermute: routing must be on the device of rows \(meta\), got cpu"):
        moekit.unpermute(torch.zeros(2, 3, device="meta"), routing)


def test_wrong_shapes_say_so():
    routing = Routing.from_topk(torch.tensor([[0], [1]]), num_experts=2)
    with pytest.raises(ValueError, match=r"permute: tokens must be the routing's 2 tokens, got shape \[3, 4\]"):
        moekit.permute(torch.zeros(3, 4), routing)
    with pytest.raises(ValueError, match=r"permute: tokens must be a 2-D tensor, got shape \[2\]"):
        moekit.permute(torch.zeros(2), routing)
    with pytest.raises(ValueError, match=r"unpermute: rows must be the routing's 2 rows, got shape \[3, 4\]"):
        moekit.unpermute(torch.zeros(3, 4), routing)
    with pytest.raises(ValueError, match=r"unpermute: routing must be built with weights"):
        moekit.unpermute(torch.zeros(2, 4), routing, weighted=True)


def test_integer_rows_are_summed_as_integers():
    big = 2**53 + 1  # lost in float64
    rows = torch.tensor([[big, 1], [big, 2], [5, 6]])
    found = tables.rows_of_tokens(torch.tensor([1, 1, 0]), 2)
    assert_same(rows_module.sum_rows(rows, None, torch.tensor([1, 1, 0]), *found), torch.tensor([[5, 6], [2 * big, 3]]))
    # With weights the sum is taken in float and then cut off, as a product of the two would be.
    weights = torch.tensor([0.5, 0.5, 0.25])
    rows = torch.tensor([[10, 20], [30, 41], [4, 9]])
    summed = rows_module.sum_rows(rows, weights, torch.tensor([1, 1, 0]), *found)
    assert_same(summed, torch.tensor([[1, 2], [20, 30]]))
