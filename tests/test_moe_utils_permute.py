"""The drop-in permute and unpermute, against loops over tokens and experts."""

from __future__ import annotations

import pytest
import torch
from _by_hand import (
    MAPS,
    capacity_pairs,
    every_map,
    leaf,
    only,
    pairs_of,
    permute_pairs,
    unpermute_pairs,
)
from _reference import DTYPES, LAYOUTS, LOW, assert_accurate, assert_same, draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moekit.moe_utils import permute, unpermute

pytestmark = pytest.mark.usefixtures("backend")

# Everything that is not zero is routed; an int8 cast would lose 0.5 and 256.
MARKS = {
    "bool": (torch.bool, True),
    "uint8": (torch.uint8, 128),
    "int8": (torch.int8, -3),
    "int16": (torch.int16, 256),
    "int32": (torch.int32, 256),
    "int64": (torch.int64, 256),
    "float32": (torch.float32, 0.5),
    "bfloat16": (torch.bfloat16, 0.5),
    "float16": (torch.float16, -0.25),
}
fused_or_not = pytest.mark.parametrize("fused", [False, True])


# --- permute --------------------------------------------------------------------------------------------------------


@every_map
@fused_or_not
@pytest.mark.parametrize("dtype", DTYPES)
def test_permute(poisoned, name, fused, dtype):
    routing_map, hidden = MAPS[name]
    tokens, probs = leaf(draw(0, len(routing_map), hidden, dtype=dtype)), leaf(draw(1, *routing_map.shape, dtype=dtype))
    pairs = pairs_of(routing_map)
    rows, row_probs, sorted_indices = permute(tokens, routing_map, probs, fused=fused)
    expected = permute_pairs(tokens.detach(), probs.detach(), pairs)
    for actual, wanted, what in zip((rows, row_probs, sorted_indices), expected, ("rows", "probs", "index"), strict=True):
        assert_same(actual.detach(), wanted, what)
    grad, probs_grad = draw(2, *rows.shape, dtype=dtype), draw(3, *row_probs.shape, dtype=dtype)
    torch.autograd.backward((rows, row_probs), (grad, probs_grad))
    dtokens, size = unpermute_pairs(grad, pairs, len(routing_map), None)
    assert tokens.grad.dtype is dtype
    assert_accurate(tokens.grad, dtokens, scale=size)
    dprobs = torch.zeros_like(probs)  # zero where a token is not routed
    for row, (t, e) in enumerate(pairs):
        dprobs[t, e] = probs_grad[row]
    assert_same(probs.grad, dprobs)


@pytest.mark.parametrize("kind", MARKS)
@fused_or_not
def test_a_map_of_any_dtype(kind, fused):
    dtype, mark = MARKS[kind]
    routed, hidden = MAPS["plain"]
    routing_map = torch.zeros(routed.shape, dtype=dtype).masked_fill(routed, mark)
    tokens, probs = draw(0, len(routed), hidden), draw(1, *routed.shape)
    expected = permute_pairs(tokens, probs, pairs_of(routed))
    for actual, wanted in zip(permute(tokens, routing_map, probs, fused=fused), expected, strict=True):
        assert_same(actual, wanted)
    out = unpermute(expected[0], expected[2], tokens.shape, probs, routing_map, fused=fused)
    assert_same(out, unpermute(expected[0], expected[2], tokens.shape, probs, routed))
    assert_accurate(out, unpermute_pairs(expected[0], pairs_of(routed), len(routed), probs)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn])
def test_tokens_of_other_dtypes(dtype):
    """Integers, flags and float8 move as they are."""
    routing_map, _ = MAPS["plain"]
    tokens = (torch.arange(1, 13 * 3 + 1).view(13, 3) % 2 if dtype is torch.bool else torch.arange(39).view(13, 3)).to(dtype)
    rows, probs, sorted_indices = permute(tokens, routing_map)
    assert rows.dtype is dtype and probs is None
    assert_same(rows.double(), tokens.double()[[t for t, _ in pairs_of(routing_map)]])
    larger, _, _ = permute(tokens, routing_map, num_out_tokens=len(rows) + 2)
    assert larger.dtype is dtype and not larger[-2:].double().any()
    if dtype is torch.int64:
        expected = unpermute_pairs(rows, pairs_of(routing_map), 13, None)[0]
        assert_same(unpermute(rows, sorted_indices, (13, 3)), expected.long())


@pytest.mark.parametrize("probs_dtype", DTYPES)
def test_probs_keep_their_dtype(probs_dtype):
    routing_map, hidden = MAPS["plain"]
    probs = draw(1, *routing_map.shape, dtype=probs_dtype)
    tokens = draw(0, len(routing_map), hidden, dtype=torch.bfloat16)
    rows, row_probs, _ = permute(tokens, routing_map, probs)
    assert rows.dtype is torch.bfloat16 and row_probs.dtype is probs_dtype
    assert permute(tokens, routing_map)[1] is None


@pytest.mark.parametrize("extra", [None, 0, 1, 7])
@fused_or_not
def test_num_out_tokens(poisoned, extra, fused):
    """None and the routed count give S rows; more are zero rows of index -1, which unpermute ignores."""
    routing_map, hidden = MAPS["e7_odd_hidden"]
    tokens, probs = leaf(draw(0, len(routing_map), hidden)), leaf(draw(1, *routing_map.shape))
    pairs = pairs_of(routing_map)
    size = None if extra is None else len(pairs) + extra
    rows, row_probs, sorted_indices = permute(tokens, routing_map, probs, num_out_tokens=size, fused=fused)
    expected = permute_pairs(tokens.detach(), probs.detach(), pairs + [(-1, -1)] * (extra or 0))
    for actual, wanted in zip((rows, row_probs, sorted_indices), expected, strict=True):
        assert_same(actual.detach(), wanted)
    noise = rows.detach().clone()
    noise[len(pairs) :] = float("nan")  # what stands in the rows of no token does not matter
    noise.requires_grad_()
    for with_probs in ((probs, routing_map), (None, None)):
        out = unpermute(noise, sorted_indices, tokens.shape, *with_probs, fused=fused)
        assert_accurate(out, unpermute_pairs(noise, pairs, len(routing_map), with_probs[0])[0])
        grads = torch.autograd.grad(out.sum(), [noise, *([] if with_probs[0] is None else [probs])])
        assert not grads[0][len(pairs) :].any() and all(g.isfinite().all() for g in grads)
    torch.autograd.backward((rows, row_probs), (torch.ones_like(rows), torch.ones_like(row_probs)))
    assert_same(tokens.grad, (routing_map.sum(1, keepdim=True) * torch.ones_like(tokens)))
    assert_same(probs.grad, routing_map.double())


@pytest.mark.parametrize("size", [0, 3])
@fused_or_not
def test_num_out_tokens_below_the_routed_count(size, fused):
    routing_map = only(3, 2, (0, 0), (0, 1), (1, 1), (2, 0))
    tokens = draw(0, 3, 4)
    before = tokens.clone()
    message = rf"moekit\.permute: num_out_tokens .* at least the 4 routed pairs of routing_map, got {size}"
    with pytest.raises(ValueError, match=message):
        permute(tokens, routing_map, num_out_tokens=size, fused=fused)
    assert_same(tokens, before)
    with pytest.raises(ValueError, match=r"at least the 4 routed pairs of routing_map, got 3"):
        unpermute(draw(0, 3, 4), torch.tensor([0, 1, 2]), (3, 4), draw(1, 3, 2), routing_map, fused=fused)


def test_num_out_tokens_of_other_types():
    tokens, routing_map = draw(0, 3, 4), only(3, 2, (0, 0), (2, 1))
    assert permute(tokens, routing_map, num_out_tokens=torch.tensor(3))[2].tolist() == [0, 2, -1]
    with pytest.raises(ValueError, match="num_out_tokens must be at least 0, got -1"):
        permute(tokens, routing_map, num_out_tokens=-1)
    with pytest.raises(TypeError):
        permute(tokens, routing_map, num_out_tokens=2.0)


# --- drop_and_pad ---------------------------------------------------------------------------------------------------


@every_map
@fused_or_not
def test_drop_and_pad(poisoned, name, fused):
    for kind in ("bool", "int64", "float32"):
        for capacity in (1, 3, len(MAPS[name][0]), len(MAPS[name][0]) + 2):
            check_drop_and_pad(name, fused, kind, capacity)


def check_drop_and_pad(name, fused, kind, capacity):
    routed, hidden = MAPS[name]
    (tokens_count, experts), (dtype, mark) = routed.shape, MARKS[kind]
    routing_map = torch.zeros(routed.shape, dtype=dtype).masked_fill(routed, mark)
    tokens, probs = leaf(draw(0, tokens_count, hidden)), leaf(draw(1, tokens_count, experts))
    pairs = capacity_pairs(routed, capacity)
    num_out = capacity * experts + experts - 1  # C = num_out_tokens // E
    rows, row_probs, sorted_indices = permute(
        tokens, routing_map, probs, num_out_tokens=num_out, fused=fused, drop_and_pad=True
    )
    expected = permute_pairs(tokens.detach(), probs.detach(), pairs)
    for actual, wanted in zip((rows, row_probs, sorted_indices), expected, strict=True):
        assert_same(actual.detach(), wanted)
    dprobs, dtokens = torch.zeros_like(probs), torch.zeros_like(tokens)
    probs_grad, grad = draw(2, len(pairs)), draw(3, *rows.shape)
    for row, (t, e) in enumerate(pairs):
        if t >= 0:
            dprobs[t, e] = probs_grad[row]
            dtokens[t] += grad[row]
    found = torch.autograd.grad((rows, row_probs), (tokens, probs), (grad, probs_grad))
    assert_accurate(found[0], dtokens)
    assert_same(found[1], dprobs)
    x = leaf(draw(4, *rows.shape))
    out = unpermute(x, sorted_indices, tokens.shape, probs, routing_map, fused=fused, drop_and_pad=True)
    assert_accurate(out, unpermute_pairs(x, pairs, tokens_count, probs)[0])
    upstream = draw(5, *out.shape)
    dx, dprobs = torch.zeros_like(x), torch.zeros_like(probs)
    for row, (t, e) in enumerate(pairs):
        if t >= 0:
            dx[row] = upstream[t] * probs.detach()[t, e]
            dprobs[t, e] = (upstream[t] * x.detach()[row]).sum()
    found = torch.autograd.grad(out, (x, probs), upstream)
    assert_accurate(found[0], dx)
    assert_accurate(found[1], dprobs, scale=(hidden + 1.0) * 8)


def test_drop_and_pad_without_a_size_is_plain():
    routing_map, hidden = MAPS["plain"]
    tokens = draw(0, len(routing_map), hidden)
    for a, b in zip(permute(tokens, routing_map, drop_and_pad=True)[::2], permute(tokens, routing_map)[::2], strict=True):
        assert_same(a, b)


def test_drop_and_pad_needs_rows_for_every_expert():
    with pytest.raises(ValueError, match="sorted_indices must be a multiple of 2 experts long, got 3"):
        unpermute(draw(0, 3, 4), torch.tensor([0, 1, 0]), (2, 4), draw(1, 2, 2), torch.ones(2, 2), drop_and_pad=True)


# --- unpermute ------------------------------------------------------------------------------------------------------


@every_map
@fused_or_not
@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpermute(poisoned, name, fused, with_probs, dtype):
    routing_map, hidden = MAPS[name]
    pairs = pairs_of(routing_map)
    probs = leaf(draw(1, *routing_map.shape, dtype=dtype)) if with_probs else None
    rows = leaf(draw(0, len(pairs), hidden, dtype=dtype))
    sorted_indices = torch.tensor([t for t, _ in pairs], dtype=torch.int64)
    shape = torch.Size((len(routing_map), hidden))
    out = unpermute(rows, sorted_indices, shape, probs, routing_map, fused=fused)
    expected, size = unpermute_pairs(rows, pairs, len(routing_map), probs)
    assert out.dtype is dtype
    assert_accurate(out, expected, scale=size, what="output")
    grad = draw(2, *shape, dtype=dtype)
    out.backward(grad)
    drows = torch.zeros(rows.shape, dtype=torch.float64)
    dprobs = torch.zeros(routing_map.shape, dtype=torch.float64)
    size = torch.zeros_like(dprobs)
    for row, (t, e) in enumerate(pairs):
        drows[row] = grad[t].double() * (probs.detach()[t, e].double() if with_probs else 1.0)
        terms = grad[t].double() * rows.detach()[row].double()
        dprobs[t, e], size[t, e] = terms.sum(), terms.abs().sum()
    assert rows.grad.dtype is dtype
    assert_accurate(rows.grad, drows, what="drows")
    if with_probs:
        assert probs.grad.dtype is dtype
        assert_accurate(probs.grad, dprobs, scale=size, what="dprobs")


@pytest.mark.parametrize("probs_dtype", [None, torch.bfloat16, torch.float32])
def test_rows_are_added_in_float32(probs_dtype):
    """2048 and 255 ones in bfloat16: added one by one in bfloat16 they stay 2048."""
    experts = 256
    rows = torch.ones(experts, 2, dtype=torch.bfloat16)
    rows[0] = 2048
    routing_map = torch.ones(1, experts, dtype=torch.bool)
    probs = None if probs_dtype is None else torch.ones(1, experts, dtype=probs_dtype)
    out = unpermute(rows, torch.zeros(experts, dtype=torch.int64), (1, 2), probs, routing_map)
    assert_same(out, torch.full((1, 2), 2048.0 + 255).bfloat16())
    tokens = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    permute(tokens, routing_map)[0].backward(rows)
    assert_same(tokens.grad, torch.full((1, 2), 2048.0 + 255).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@fused_or_not
def test_low_precision_tokens_with_float32_probs(dtype, fused):
    routing_map, hidden = MAPS["plain"]
    pairs = pairs_of(routing_map)
    rows = leaf(draw(0, len(pairs), hidden, dtype=dtype))
    probs = leaf(draw(1, *routing_map.shape).float() / 3)
    sorted_indices = torch.tensor([t for t, _ in pairs])
    out = unpermute(rows, sorted_indices, (13, hidden), probs, routing_map, fused=fused)
    expected, size = unpermute_pairs(rows, pairs, 13, probs)
    assert out.dtype is dtype
    assert_accurate(out, expected, scale=size)
    grad = draw(2, 13, hidden, dtype=dtype)
    out.backward(grad)
    assert probs.grad.dtype is torch.float32 and rows.grad.dtype is dtype
    dprobs = torch.zeros(routing_map.shape, dtype=torch.float64)
    for row, (t, e) in enumerate(pairs):
        dprobs[t, e] = (grad[t].double() * rows.detach()[row].double()).sum()
    assert_accurate(probs.grad, dprobs, scale=hidden * 8.0)  # in float32's precision


def test_autocast():
    routing_map, hidden = MAPS["plain"]
    tokens, probs = leaf(draw(0, 13, hidden, dtype=torch.float32)), leaf(draw(1, 13, 5, dtype=torch.float32))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            rows, row_probs, sorted_indices = permute(tokens, routing_map, probs)
            out = unpermute(rows, sorted_indices, tokens.shape, probs, routing_map)
        results.append((rows, row_probs, out, *torch.autograd.grad(out.sum(), (tokens, probs))))
    for off, on in zip(*results, strict=True):
        assert_same(on, off)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LOW)
def test_any_index_dtype_and_layout(layout, dtype):
    routing_map, hidden = MAPS["e7_odd_hidden"]
    lay = LAYOUTS[layout]
    probs, tokens = draw(1, *routing_map.shape, dtype=dtype), draw(0, len(routing_map), hidden, dtype=dtype)
    plain_rows, plain_probs, index = permute(tokens, routing_map, probs)
    rows, row_probs, found = permute(lay(tokens), lay(routing_map), lay(probs))
    for a, b in ((rows, plain_rows), (row_probs, plain_probs), (found, index)):
        assert_same(a, b)
    results = []
    for arrange, indices in ((lambda x: x, index), (lay, lay(index)), (lay, lay(index.int()))):
        x, p = leaf(arrange(plain_rows)), leaf(arrange(probs))
        out = unpermute(x, indices, tokens.shape, p, arrange(routing_map))
        out.backward(arrange(draw(2, *tokens.shape, dtype=dtype)))
        results.append((out, x.grad, p.grad))
    for a, b, c in zip(*results, strict=True):
        assert a.any()
        assert_same(b, a)
        assert_same(c, a)


def test_expanded_gradients():
    routing_map, hidden = MAPS["plain"]
    tokens, probs = leaf(draw(0, 13, hidden)), leaf(draw(1, 13, 5))
    rows, row_probs, index = permute(tokens, routing_map, probs)
    (rows.sum() + row_probs.sum()).backward()
    assert_same(tokens.grad, routing_map.sum(1, keepdim=True).double().expand(13, hidden))
    assert_same(probs.grad, routing_map.double())
    x, p = leaf(rows), leaf(probs)
    unpermute(x, index, tokens.shape, p, routing_map).sum().backward()
    expected = torch.zeros(13, 5, dtype=torch.float64)
    for row, (t, e) in enumerate(pairs_of(routing_map)):
        assert_same(x.grad[row], probs.detach()[t, e].expand(hidden))
        expected[t, e] = x.detach()[row].sum()
    assert_accurate(p.grad, expected, scale=hidden * 4.0)


def test_rows_of_no_token_are_ignored():
    rows = leaf(torch.tensor([[1.0, 2], [float("nan"), 3], [5, 7], [float("inf"), 0]]))
    out = unpermute(rows, torch.tensor([1, -1, 1, -1]), (3, 2))
    assert_same(out.detach(), torch.tensor([[0.0, 0], [6, 9], [0, 0]]))
    out.backward(torch.tensor([[1.0, 1], [2, 3], [4, 4]]))
    assert_same(rows.grad, torch.tensor([[2.0, 3], [0, 0], [2, 3], [0, 0]]))


def test_a_token_with_no_expert_gives_a_zero_row_connected_to_autograd(poisoned):
    routing_map = only(3, 2, (0, 1), (2, 0))
    tokens, probs = leaf(draw(0, 3, 2)), leaf(draw(1, 3, 2))
    rows, _, index = permute(tokens, routing_map, probs)
    out = unpermute(rows, index, tokens.shape, probs, routing_map)
    assert not out[1].any() and out[0].all() and out[2].all()
    out[1].sum().backward()
    assert_same(tokens.grad, torch.zeros_like(tokens))
    assert_same(probs.grad, torch.zeros_like(probs))


def test_a_prob_of_zero_is_still_routed():
    routing_map = only(2, 2, (0, 0), (0, 1), (1, 1))
    probs = leaf(torch.tensor([[0.0, 0.5], [0.25, 0.0]]))
    tokens = torch.tensor([[1.0, 2], [3, 4]])
    rows, row_probs, index = permute(tokens, routing_map, probs)
    assert_same(index, torch.tensor([0, 0, 1]))
    assert_same(rows, tokens[[0, 0, 1]])
    assert_same(row_probs.detach(), torch.tensor([0.0, 0.5, 0.0]))
    out = unpermute(rows, index, tokens.shape, probs, routing_map)
    assert_same(out.detach(), torch.tensor([[0.5, 1], [0, 0]]))
    out.sum().backward()
    assert_same(probs.grad, torch.tensor([[3.0, 3], [0, 7]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_out_tokens", [None, 0, 3])
def test_no_tokens(poisoned, dtype, num_out_tokens):
    tokens, probs = leaf(torch.zeros(0, 4, dtype=dtype)), leaf(torch.zeros(0, 3))
    for drop_and_pad in (False, True):
        rows, row_probs, index = permute(
            tokens, torch.zeros(0, 3), probs, num_out_tokens=num_out_tokens, drop_and_pad=drop_and_pad
        )
        size = num_out_tokens or 0
        assert_same(rows.detach(), torch.zeros(size, 4, dtype=dtype))
        assert_same(row_probs.detach(), torch.zeros(size))
        assert_same(index, torch.full((size,), -1))
        out = unpermute(rows, index, (0, 4), probs, torch.zeros(0, 3), drop_and_pad=drop_and_pad)
        assert out.shape == (0, 4) and out.dtype is dtype
        tokens.grad = probs.grad = None
        (out.sum() + rows.sum() + row_probs.sum()).backward()
        assert tokens.grad.shape == (0, 4) and tokens.grad.dtype is dtype
        assert probs.grad.shape == (0, 3) and probs.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", LOW)
def test_no_token_routed(poisoned, dtype):
    tokens, probs = leaf(draw(0, 4, 3, dtype=dtype)), leaf(draw(1, 4, 2, dtype=dtype))
    rows, row_probs, index = permute(tokens, torch.zeros(4, 2), probs)
    assert rows.shape == (0, 3) and row_probs.shape == (0,) and index.shape == (0,)
    out = unpermute(rows, index, tokens.shape, probs, torch.zeros(4, 2))
    assert_same(out.detach(), torch.zeros(4, 3, dtype=dtype))
    out.sum().backward()
    assert_same(tokens.grad, torch.zeros_like(tokens))
    assert_same(probs.grad, torch.zeros_like(probs))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_map(data):
    tokens, experts = data.draw(st.integers(0, 12), "tokens"), data.draw(st.integers(1, 9), "experts")
    hidden, extra = data.draw(st.integers(1, 9), "hidden"), data.draw(st.integers(0, 4), "extra")
    marks = data.draw(st.lists(st.sampled_from([0, 0, 1, 256, -1]), min_size=tokens * experts, max_size=tokens * experts))
    routing_map = torch.tensor(marks, dtype=torch.int32).view(tokens, experts)
    pairs = pairs_of(routing_map)
    x, probs = draw(0, tokens, hidden, dtype=torch.float32), draw(1, tokens, experts, dtype=torch.float32)
    result = permute(x, routing_map, probs, num_out_tokens=len(pairs) + extra)
    for actual, wanted in zip(result, permute_pairs(x, probs, pairs + [(-1, -1)] * extra), strict=True):
        assert_same(actual, wanted)
    expected, size = unpermute_pairs(result[0], pairs, tokens, probs)
    assert_accurate(unpermute(result[0], result[2], x.shape, probs, routing_map), expected, scale=size)


@pytest.mark.parametrize("shape", [(-1, 4), (3.0, 4), None, 3, "ab", (3, 5), ()])
def test_shapes_that_nothing_is_restored_to(shape):
    with pytest.raises((TypeError, ValueError), match=r"moekit\.unpermute: restore_shape(\[0\])? must be "):
        unpermute(draw(0, 3, 4), torch.tensor([0, 1, 2]), shape)
