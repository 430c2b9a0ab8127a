"""Routing: its tables, where they come from and what they turn into."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _by_hand import CASES, every_case, leaf, permute_by_hand, slots_by_hand
from _reference import LAYOUTS, assert_accurate, assert_same, draw
from torch.autograd import gradcheck, gradgradcheck

import moekit
from moekit import Routing, moe_utils

pytestmark = pytest.mark.usefixtures("backend")


def fields(routing: Routing) -> dict:
    """The tables and the weights."""
    names = [field.name for field in dataclasses.fields(routing) if field.name != "scored"]
    return {name: getattr(routing, name) for name in names}


def assert_routings_equal(a: Routing, b: Routing) -> None:
    for name, value in fields(a).items():
        other = getattr(b, name)
        assert (value is None) == (other is None), name
        if value is not None:
            assert_same(value, other, name)


def test_the_attributes_by_hand():
    indices = torch.tensor([[2, 0], [0, -1], [2, 2]])
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    routing = Routing.from_topk(indices, weights, num_experts=4)
    assert routing.indices is indices and routing.weights is weights
    assert_same(routing.tokens_per_expert, torch.tensor([2, 0, 3, 0]))
    assert_same(routing.offsets, torch.tensor([2, 2, 5, 5], dtype=torch.int32))
    assert_same(routing.order, torch.tensor([1, 2, 0, 4, 5, -1], dtype=torch.int32))
    assert_same(routing.inverse, torch.tensor([[2, 0], [1, -1], [3, 4]], dtype=torch.int32))
    assert (routing.num_tokens, routing.topk, routing.num_experts, routing.num_rows) == (3, 2, 4, 6)
    assert_same(routing.row_weights(), torch.tensor([0.2, 0.3, 0.1, 0.5, 0.6, 0.0]))
    row_token, token_offsets, token_rows = routing.row_tables()
    assert_same(row_token, torch.tensor([0, 1, 0, 2, 2, -1], dtype=torch.int32))
    assert_same(token_offsets, torch.tensor([0, 2, 4, 6], dtype=torch.int32))
    assert_same(token_rows, torch.tensor([2, 0, 1, -1, 3, 4], dtype=torch.int32))


def test_it_is_frozen():
    routing = Routing.from_topk(torch.tensor([[0]]), num_experts=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.weights = torch.ones(1, 1)


@every_case
def test_order_and_inverse(name):
    indices, experts, _ = CASES[name]
    routing = Routing.from_topk(indices, num_experts=experts)
    slots = slots_by_hand(indices, experts)
    flat = [t * indices.shape[1] + k for t, k in slots]
    assert routing.order.tolist() == flat + [-1] * (indices.numel() - len(flat))
    assert [int(routing.inverse[t, k]) for t, k in slots] == list(range(len(slots)))
    assert int((routing.inverse == -1).sum()) == indices.numel() - len(slots)
    assert routing.tokens_per_expert.tolist() == [int((indices == e).sum()) for e in range(experts)]
    assert_same(routing.offsets, routing.tokens_per_expert.cumsum(0).int())


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_int32_is_int64_in_every_layout(name, layout):
    indices, experts, _ = CASES[name]
    weights = draw(0, *indices.shape)
    plain = fields(Routing.from_topk(indices, weights, num_experts=experts))
    lay = LAYOUTS[layout]
    other = fields(Routing.from_topk(lay(indices.int()), lay(weights), num_experts=experts))
    assert other.pop("indices").dtype is torch.int32 and plain.pop("indices").dtype is torch.int64
    for key, value in plain.items():
        assert_same(other[key], value, key)


# --- maps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("nobody", "twice", "some_none")])
@pytest.mark.parametrize("topk", ["K", None])
def test_from_map_is_from_topk(name, topk):
    """Of the same experts in ascending order."""
    indices, experts, hidden = CASES[name]
    probs = draw(0, indices.shape[0], experts, dtype=torch.float32)
    routing_map = torch.zeros(probs.shape, dtype=torch.bool).scatter(1, indices, True)
    ascending = indices.sort(1).values
    expected = Routing.from_topk(ascending, probs.gather(1, ascending), num_experts=experts)
    found = Routing.from_map(routing_map, probs, topk=indices.shape[1] if topk else None)
    assert_routings_equal(found, expected)
    # And the drop-in's rows are these rows.
    tokens = draw(1, indices.shape[0], hidden, dtype=torch.float32)
    rows, row_probs, _ = moe_utils.permute(tokens, routing_map, probs)
    assert_same(moekit.permute(tokens, found), rows)
    assert_same(found.row_weights(), row_probs)


def test_from_map_with_tokens_of_fewer_experts(poisoned):
    routing_map = torch.tensor([[0.5, 0, 256], [0, 0, 0], [0, -1, 0]])
    probs = torch.tensor([[0.1, 0.2, 0.0], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]], requires_grad=True)
    routing = Routing.from_map(routing_map, probs, topk=3)
    assert_same(routing.indices, torch.tensor([[0, 2, -1], [-1, -1, -1], [1, -1, -1]]))
    assert_same(routing.weights.detach(), torch.tensor([[0.1, 0.0, 0], [0, 0, 0], [0.8, 0, 0]]))
    assert_same(routing.order, torch.tensor([0, 6, 1, -1, -1, -1, -1, -1, -1], dtype=torch.int32))  # prob 0.0: routed
    routing.weights.backward(torch.arange(1.0, 10).view(3, 3))
    assert_same(probs.grad, torch.tensor([[1.0, 0, 2], [0, 0, 0], [0, 7, 0]]))


def test_to_map_and_back():
    indices = torch.tensor([[2, 0], [-1, 1], [-1, -1]])
    weights = leaf(torch.tensor([[0.25, 0.5], [8.0, 1.0], [8, 8]]))
    routing_map, probs = Routing.from_topk(indices, weights, num_experts=3).to_map()
    assert_same(routing_map, torch.tensor([[True, False, True], [False, True, False], [False, False, False]]))
    assert_same(probs.detach(), torch.tensor([[0.5, 0, 0.25], [0, 1, 0], [0, 0, 0]]))
    probs.backward(torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]))
    assert_same(weights.grad, torch.tensor([[3.0, 1], [0, 5], [0, 0]]))
    again = Routing.from_map(routing_map, probs, topk=2)
    assert_same(again.indices, torch.tensor([[0, 2], [1, -1], [-1, -1]]))
    assert_same(again.weights.detach(), torch.tensor([[0.5, 0.25], [1, 0], [0, 0]]))
    assert Routing.from_topk(indices, num_experts=3).to_map()[1] is None


def test_to_map_of_the_same_expert_twice():
    routing_map, probs = Routing.from_topk(torch.tensor([[1, 1]]), torch.tensor([[0.25, 0.5]]), num_experts=2).to_map()
    assert_same(routing_map, torch.tensor([[False, True]]))
    assert_same(probs, torch.tensor([[0, 0.75]]))


@pytest.mark.parametrize("experts", [1, 4])
def test_no_tokens(poisoned, experts):
    indices, weights = torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1)
    routing = Routing.from_topk(indices, weights, num_experts=experts)
    assert_same(routing.tokens_per_expert, torch.zeros(experts, dtype=torch.int64))
    assert_same(routing.offsets, torch.zeros(experts, dtype=torch.int32))
    assert routing.order.shape == (0,) and routing.inverse.shape == (0, 1) and routing.row_weights().shape == (0,)
    assert [t.shape for t in routing.to_map()] == [(0, experts)] * 2
    for topk in (None, 1):
        routing = Routing.from_map(torch.zeros(0, experts), torch.zeros(0, experts), topk=topk)
        assert routing.indices.shape == (0, topk or 0) and routing.num_experts == experts


def test_nothing_routed(poisoned):
    weights = leaf(draw(0, 3, 2))
    routing = Routing.from_topk(torch.full((3, 2), -1), weights, num_experts=2)
    assert_same(routing.row_weights().detach(), torch.zeros(6, dtype=torch.float64))
    routing.row_weights().sum().backward()
    assert_same(weights.grad, torch.zeros(3, 2, dtype=torch.float64))
    assert_same(Routing.from_map(torch.zeros(3, 2)).tokens_per_expert, torch.tensor([0, 0]))


# --- rows -----------------------------------------------------------------------------------------------------------


@every_case
def test_row_weights_and_their_gradient(name):
    indices, experts, _ = CASES[name]
    weights = leaf(draw(0, *indices.shape, dtype=torch.bfloat16))
    row_weights = Routing.from_topk(indices, weights, num_experts=experts).row_weights()
    slots = slots_by_hand(indices, experts)
    expected = torch.zeros(indices.numel(), dtype=torch.bfloat16)
    for row, (t, k) in enumerate(slots):
        expected[row] = weights.detach()[t, k]
    assert_same(row_weights.detach(), expected)
    grad = draw(1, indices.numel(), dtype=torch.bfloat16)
    row_weights.backward(grad)
    expected = torch.zeros(indices.shape, dtype=torch.bfloat16)
    for row, (t, k) in enumerate(slots):
        expected[t, k] = grad[row]
    assert_same(weights.grad, expected)


@pytest.mark.not_interpreted
def test_gradcheck_of_the_weights():
    indices = torch.tensor([[1, -1], [0, 1], [2, 2]])
    weights, probs = leaf(draw(0, 3, 2)), leaf(draw(1, 3, 3))
    routing_map = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    for function, x in (
        (lambda w: Routing.from_topk(indices, w, num_experts=3).row_weights(), weights),
        (lambda w: Routing.from_topk(indices, w, num_experts=3).to_map()[1], weights),
        (lambda p: Routing.from_map(routing_map, p, topk=2).row_weights(), probs),
    ):
        assert gradcheck(function, x)
        assert gradgradcheck(function, x)


@every_case
@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_pad_to_multiple(poisoned, name, multiple):
    indices, experts, hidden = CASES[name]
    tokens = leaf(draw(0, indices.shape[0], hidden, dtype=torch.float32))
    weights = leaf(draw(1, *indices.shape, dtype=torch.float32))
    routing = Routing.from_topk(indices, weights, num_experts=experts)
    padded = routing.pad_to_multiple(multiple)
    assert padded.tokens_per_expert is routing.tokens_per_expert and padded.num_rows % multiple == 0
    slots = torch.arange(indices.numel(), dtype=torch.int32).view(indices.shape)
    assert_same(padded.order[padded.inverse.long()][indices >= 0], slots[indices >= 0])
    assert_same(padded.inverse >= 0, indices >= 0)
    starts = [0, *padded.offsets.tolist()]
    rows, plain = moekit.permute(tokens, padded), moekit.permute(tokens, routing)
    row = 0
    for expert, count in enumerate(routing.tokens_per_expert.tolist()):
        assert starts[expert] % multiple == 0 and starts[expert + 1] - starts[expert] == -(-count // multiple) * multiple
        assert_same(rows[starts[expert] : starts[expert] + count], plain[row : row + count])
        assert not rows[starts[expert] + count : starts[expert + 1]].any()
        row += count
    assert not rows[starts[-1] :].any()
    outs = [moekit.unpermute(r, table, weighted=True) for r, table in ((rows, padded), (plain, routing))]
    assert_same(*outs)
    grad = draw(2, *outs[0].shape, dtype=torch.float32)
    for a, b in zip(*(torch.autograd.grad(out, (tokens, weights), grad) for out in outs), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("multiple", [1, 8])
def test_offsets_are_what_grouped_mm_wants(multiple):
    indices, experts, hidden = CASES["plain"]
    routing = Routing.from_topk(indices, num_experts=experts).pad_to_multiple(multiple)
    tokens, matrices = draw(0, indices.shape[0], hidden), draw(1, experts, hidden, 8)
    rows = moekit.permute(tokens.bfloat16(), routing)
    out = F.grouped_mm(rows, matrices.bfloat16(), offs=routing.offsets)
    used = int(routing.offsets[-1])
    by_expert = permute_by_hand(tokens, indices, experts, indices.numel())
    numbers = torch.tensor([indices[t, k] for t, k in slots_by_hand(indices, experts)])
    expected = torch.einsum("rh,rhi->ri", by_expert, matrices[numbers])
    size = torch.einsum("rh,rhi->ri", by_expert.abs(), matrices[numbers].abs())
    assert_accurate(out[:used][routing.order[:used] >= 0], expected, scale=size)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [3, 1000, -2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_out_of_range(bad, dtype):
    indices = torch.tensor([[0, 1], [bad, 2]], dtype=dtype)
    with pytest.raises(ValueError, match=rf"Routing.from_topk: indices must be -1 .* below 3 .*, got index {bad}$"):
        Routing.from_topk(indices, num_experts=3)


def test_more_slots_than_experts():
    with pytest.raises(ValueError, match=r"at most num_experts \(3\) a token, got 4"):
        Routing.from_topk(torch.zeros(2, 4, dtype=torch.int64), num_experts=3)
    with pytest.raises(ValueError, match=r"from_map: k must be at most the number of experts \(3\), got 4"):
        Routing.from_map(torch.ones(2, 3), topk=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int16])
def test_indices_of_other_dtypes(dtype):
    with pytest.raises(TypeError, match=rf"indices must be an int32 or int64 tensor, got {dtype}"):
        Routing.from_topk(torch.zeros(2, 2, dtype=dtype), num_experts=3)


def test_a_token_of_more_experts_than_topk():
    with pytest.raises(ValueError, match=r"from_map: topk must be at least the 3 experts of a token, got 2"):
        Routing.from_map(torch.ones(2, 3), topk=2)


def test_mixed_devices():
    indices, weights = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"weights must be on the device of indices \(cpu\), got meta"):
        Routing.from_topk(indices, weights.to("meta"), num_experts=3)
    with pytest.raises(ValueError, match=r"probs must be on the device of routing_map \(meta\), got cpu"):
        Routing.from_map(weights.to("meta"), weights)


# --- one thing taken for another -------------------------------------------------------------------------------------

HOW_TO_BUILD = r"Routing\.from_topk\(indices, weights, num_experts=E\) or Routing\.from_map\(routing_map, probs\)"


def chosen(tokens: int, experts: int, topk: int) -> torch.Tensor:
    """A router's indices."""
    return draw(3, tokens, experts).topk(topk).indices


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(4, 8, 2), (6, 4, 2), (200, 64, 8), (16, 8, 1), (4, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_taken_for_a_map(tokens, experts, topk, dtype):
    indices, x = chosen(tokens, experts, topk).to(dtype), draw(4, tokens, 3)
    weights, rows = draw(5, tokens, topk), draw(4, tokens * topk, 3)
    order = torch.arange(tokens).repeat(topk)
    for op, call in {
        "Routing.from_map": lambda indices: Routing.from_map(indices, weights),
        "permute": lambda indices: moe_utils.permute(x, indices, weights),
        "unpermute": lambda indices: moe_utils.unpermute(rows, order, x.shape, weights, indices),
        "apply_capacity": lambda indices: moe_utils.apply_router_token_dropping(weights, indices, topk, 1.0),
        "pad_routing_map": lambda indices: moe_utils.pad_routing_map(indices, 2),
    }.items():
        message = rf"^moekit\.{op}: routing_map must be a map .* got {dtype} of shape .*indices .*Routing\.from_topk"
        with pytest.raises(ValueError, match=message):
            call(indices)
        padded = indices.clone()
        padded[0] = -1  # a token of no expert
        if tokens > 4:
            with pytest.raises(ValueError, match=message):
                call(padded)


@pytest.mark.parametrize("marks", [(1,), (256,), (1, 256), (1, 256, -1), (-1,), (3, 7)])
@pytest.mark.parametrize("experts", [1, 2, 3, 8])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_a_map_of_integers_is_a_map(marks, experts, density):
    """Whatever marks a routed pair, for every share of routed pairs."""
    generator = torch.Generator().manual_seed(0)
    routed = torch.rand(50, experts, generator=generator) < density
    routing_map = torch.tensor(marks)[torch.randint(len(marks), routed.shape, generator=generator)] * routed
    for dtype in (torch.int32, torch.int64):
        assert_routings_equal(Routing.from_map(routing_map.to(dtype)), Routing.from_map(routed))


def test_a_map_of_many_marks_is_a_map():
    """But for one whose tokens have every expert, or all but one, each with a mark of its own."""
    routing_map = torch.randint(0, 5, (200, 4), generator=torch.Generator().manual_seed(0))
    assert_routings_equal(Routing.from_map(routing_map), Routing.from_map(routing_map != 0))
    dense = torch.arange(12).view(4, 3)
    with pytest.raises(ValueError, match=r"if it is a map, pass `routing_map != 0`"):
        Routing.from_map(dense)
    assert Routing.from_map(dense != 0).tokens_per_expert.tolist() == [3, 4, 4]


def test_a_map_taken_for_indices():
    routed = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    with pytest.raises(TypeError, match=r"got torch.bool \(a map\? use Routing.from_map\)"):
        Routing.from_topk(routed, num_experts=4)
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(ValueError, match=r"indices must be .* got only 0 and 1 .*\(a map\? use Routing.from_map\)"):
            Routing.from_topk(routed.to(dtype), num_experts=4)
    # What a router may say is not refused: all to one expert, every expert of two.
    for indices, experts in (
        (torch.zeros(5, 4).long(), 4),
        (chosen(5, 2, 2), 2),
        (routed.long(), 5),
        (routed.long() - 1, 4),
    ):
        assert Routing.from_topk(indices, num_experts=experts).num_experts == experts


def test_weights_taken_for_indices():
    indices, weights = chosen(5, 4, 2), draw(0, 5, 2, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"indices must be .*, got torch.float32 \(weights\? the indices come first\)"):
        Routing.from_topk(weights, indices, num_experts=4)


@pytest.mark.parametrize("wrong", [chosen(5, 4, 2), chosen(5, 4, 2).numpy(), (1, 2), None])
def test_something_else_taken_for_a_routing(wrong):
    for op, call in {"permute": moekit.permute, "unpermute": moekit.unpermute}.items():
        message = rf"^moekit\.{op}: routing must be a moekit\.Routing \({HOW_TO_BUILD}\), got {type(wrong).__name__}$"
        with pytest.raises(TypeError, match=message):
            call(draw(0, 5, 3), wrong)


def test_a_routing_made_by_hand():
    indices, weights = chosen(5, 4, 2), draw(0, 5, 2)
    for wrong in ((indices,), (indices, weights), (indices, weights, 4), (indices.numpy(), weights, *[indices] * 4)):
        with pytest.raises(TypeError, match=rf"^moekit\.Routing: it must be made by {HOW_TO_BUILD}, got "):
            Routing(*wrong)
    routing = Routing.from_topk(indices, weights, num_experts=4)
    for name, value in {
        "offsets": routing.offsets.long(),
        "order": routing.order.view(5, 2),
        "inverse": routing.inverse[:, :1],
        "tokens_per_expert": routing.tokens_per_expert[:2],
    }.items():
        with pytest.raises(ValueError, match=r"^moekit\.Routing: indices and tables must be of the dtypes and shapes that"):
            dataclasses.replace(routing, **{name: value})


def test_a_routing_is_copied_and_sent():
    routing = Routing.from_topk(chosen(5, 4, 2), draw(0, 5, 2), num_experts=4)
    assert_routings_equal(dataclasses.replace(routing), routing)
    assert_routings_equal(copy.deepcopy(routing), routing)
    assert_routings_equal(pickle.loads(pickle.dumps(routing)), routing)
    assert dataclasses.replace(routing, weights=None).weights is None


@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor])
def test_any_integer_will_do(integer):
    indices = chosen(5, 4, 2)
    routing = Routing.from_topk(indices, num_experts=integer(4))
    assert_routings_equal(routing, Routing.from_topk(indices, num_experts=4))
    assert_routings_equal(routing.pad_to_multiple(integer(3)), routing.pad_to_multiple(3))
    routing_map = routing.to_map()[0]
    assert_routings_equal(Routing.from_map(routing_map, topk=integer(2)), Routing.from_map(routing_map, topk=2))
    x = draw(0, 5, 3)
    for one, other in zip(
        moe_utils.permute(x, routing_map, num_out_tokens=integer(12)),
        moe_utils.permute(x, routing_map, num_out_tokens=12),
        strict=True,
    ):
        assert one is other is None or torch.equal(one, other)
    assert moe_utils.get_capacity(integer(10), integer(4), np.float32(1.5)) == 4
    with pytest.raises(TypeError, match=r"^moekit\.permute: num_out_tokens must be an integer, got float"):
        moe_utils.permute(x, routing_map, num_out_tokens=10.0)


def test_wrong_shapes_and_types_say_so():
    indices = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weights must be of shape \[tokens, topk\] = \[2, 2\], got shape \[2\]"):
        Routing.from_topk(indices, torch.zeros(2), num_experts=3)
    with pytest.raises(TypeError, match=r"weights must be a floating-point tensor, got torch\.int64"):
        Routing.from_topk(indices, indices, num_experts=3)
    with pytest.raises(TypeError, match="indices must be a tensor, got list"):
        Routing.from_topk([[0, 1]], num_experts=3)
    with pytest.raises(ValueError, match=r"indices must be a 2-D tensor, got shape \[4\]"):
        Routing.from_topk(indices.view(-1), num_experts=3)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        Routing.from_topk(indices, num_experts=0)
    with pytest.raises(TypeError, match="num_experts must be an integer, got float"):
        Routing.from_topk(indices, num_experts=3.0)
    with pytest.raises(ValueError, match=r"probs must be of shape \[tokens, experts\] = \[2, 3\], got shape \[2, 2\]"):
        Routing.from_map(torch.zeros(2, 3), torch.zeros(2, 2))
    routing = Routing.from_topk(indices, num_experts=3)
    with pytest.raises(ValueError, match="pad_to_multiple: multiple must be at least 1, got 0"):
        routing.pad_to_multiple(0)
    with pytest.raises(ValueError, match=r"row_weights: weights must be given when the routing is built, got None"):
        routing.row_weights()
