"""The drop-in permutation under autograd, its chunks, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from _by_hand import MAPS, chunks_by_hand, leaf, map_case, only
from _interpreter import RUNS
from _reference import DTYPES, LOW, assert_same, draw
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from moekit.moe_utils import permute, sort_chunks_by_idxs, unpermute

pytestmark = pytest.mark.usefixtures("backend")

fused_or_not = pytest.mark.parametrize("fused", [False, True])


# --- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.not_interpreted
def test_gradcheck():
    routing_map = only(3, 3, (0, 0), (0, 2), (2, 0), (2, 1))
    tokens, probs, rows = leaf(draw(0, 3, 2)), leaf(draw(1, 3, 3)), leaf(draw(2, 4, 2))
    index = permute(tokens, routing_map)[2]

    def there(x, p):
        return permute(x, routing_map, p, num_out_tokens=5)[:2]

    def dropped(x, p):
        return permute(x, routing_map, p, num_out_tokens=6, drop_and_pad=True)[:2]

    def back(x, p):
        return unpermute(x, index, (3, 2), p, routing_map)

    for function, inputs in ((there, (tokens, probs)), (dropped, (tokens, probs)), (back, (rows, probs))):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)
    sizes, order = torch.tensor([1, 3]), torch.tensor([1, 0])
    assert gradcheck(lambda x, p: sort_chunks_by_idxs(x, sizes, order, p), (rows, leaf(draw(3, 4))))
    assert gradgradcheck(lambda x, p: sort_chunks_by_idxs(x, sizes, order, p), (rows, leaf(draw(3, 4))))


def test_backward_twice_writes_nothing_and_does_no_more():
    routing_map, hidden = MAPS["plain"]
    probs = leaf(draw(1, 13, 5, dtype=torch.float32))
    rows, _, index = permute(draw(0, 13, hidden, dtype=torch.bfloat16), routing_map)
    rows = leaf(rows)
    grad = draw(2, 13, hidden, dtype=torch.bfloat16)
    kept = (rows, probs, index, routing_map, grad)
    before = [x.detach().clone() for x in kept]
    out = unpermute(rows, index, (13, hidden), probs, routing_map)
    first = torch.autograd.grad(out, (rows, probs), grad, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, (rows, probs), grad), strict=True):
        assert a.any()
        assert_same(b, a)
    for now, then in zip(kept, before, strict=True):
        assert_same(now.detach(), then)
    unpermute(rows, index, (13, hidden), probs.detach(), routing_map).backward(grad)
    assert probs.grad is None
    assert_same(rows.grad, first[0])
    assert not permute(rows.detach()[:13], routing_map)[0].requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("count", [4, 0])
def test_activation_checkpointing(use_reentrant, count):
    routing_map = only(4, 3, (0, 0), (0, 2), (2, 1), (3, 1))[:count]

    def layer(x, p):
        rows, row_probs, index = permute(x, routing_map, p)
        return unpermute(rows.square() * row_probs.unsqueeze(1), index, x.shape, p, routing_map)

    results = []
    for checkpointed in (False, True):
        x, p = leaf(draw(0, count, 2, dtype=torch.float32)), torch.full((count, 3), 0.5, requires_grad=True)
        out = checkpoint(layer, x, p, use_reentrant=use_reentrant) if checkpointed else layer(x, p)
        out.sum().backward()
        results.append((out, x.grad, p.grad))
    for plain, recomputed in zip(*results, strict=True):
        assert plain.any() or not count
        assert_same(recomputed, plain)


@pytest.mark.parametrize("dtype", LOW)
def test_twenty_runs_are_bit_equal(dtype):
    routing_map = map_case(6, 60, 8)
    tokens, probs, grad = (draw(i, 60, n, dtype=dtype) for i, n in enumerate((17, 8, 17)))

    def run():
        x, p = leaf(tokens), leaf(probs)
        rows, _, index = permute(x, routing_map)
        out = unpermute(rows, index, x.shape, p, routing_map)
        out.backward(grad)
        return out, x.grad, p.grad

    first = run()
    assert all(t.any() for t in first)
    for _ in range(RUNS - 1):
        for again, once in zip(run(), first, strict=True):
            assert_same(again, once)


def test_outputs_never_alias_inputs():
    """One expert that takes every token: nothing moves."""
    everything = torch.ones(3, 1, dtype=torch.bool)
    tokens, probs, index = draw(0, 3, 2), draw(1, 3, 1), torch.arange(3)
    sizes, order = torch.tensor([1, 2]), torch.tensor([0, 1])
    kept = (tokens, probs, index, everything)
    before = [x.clone() for x in kept]
    outputs = [*permute(tokens, everything, probs), *permute(tokens, everything, probs, 3, False, True)]
    outputs += [unpermute(tokens, index, (3, 2)), *sort_chunks_by_idxs(tokens, sizes, order, probs)]
    for out in outputs:
        out.fill_(77)
    for now, then in zip(kept, before, strict=True):
        assert_same(now, then)


# --- chunks ---------------------------------------------------------------------------------------------------------


@fused_or_not
@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sort_chunks_by_idxs(fused, with_probs, dtype):
    """Two ranks' chunks for three experts, put together by expert."""
    sizes, order = [2, 0, 3, 1, 2, 1], [0, 3, 1, 4, 2, 5]
    x = leaf(draw(0, 9, 5, dtype=dtype))
    probs = leaf(draw(1, 9, dtype=torch.float32)) if with_probs else None
    moved, moved_probs = sort_chunks_by_idxs(x, torch.tensor(sizes), torch.tensor(order), probs=probs, fused=fused)
    assert_same(moved.detach(), chunks_by_hand(x.detach(), sizes, order))
    grad = draw(2, 9, 5, dtype=dtype)
    moved.backward(grad)
    assert_same(chunks_by_hand(x.grad, sizes, order), grad)
    if probs is None:
        assert moved_probs is None
    else:
        assert_same(moved_probs.detach(), chunks_by_hand(probs.detach(), sizes, order))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [3, 99, -2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_out_of_range(bad, dtype):
    index = torch.tensor([0, bad, 1], dtype=dtype)
    for probs, routing_map in ((None, None), (draw(1, 3, 1), torch.ones(3, 1))):
        with pytest.raises(ValueError, match=rf"unpermute: sorted_indices must be .* below 3 .*, got index {bad}$"):
            unpermute(draw(0, 3, 2), index, (3, 2), probs, routing_map)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_indices_of_other_dtypes(dtype):
    with pytest.raises(TypeError, match=rf"sorted_indices must be an int32 or int64 tensor, got {dtype}"):
        unpermute(draw(0, 3, 2), torch.zeros(3, dtype=dtype), (3, 2))


def test_mixed_devices():
    tokens, routing_map, probs = draw(0, 3, 2), torch.ones(3, 1), draw(1, 3, 1)
    index = torch.arange(3)
    with pytest.raises(ValueError, match=r"routing_map must be on the device of tokens \(cpu\), got meta"):
        permute(tokens, routing_map.to("meta"))
    with pytest.raises(ValueError, match=r"probs must be on the device of tokens \(cpu\), got meta"):
        permute(tokens, routing_map, probs.to("meta"))
    with pytest.raises(ValueError, match=r"sorted_indices must be on the device of permuted_tokens \(cpu\), got meta"):
        unpermute(tokens, index.to("meta"), (3, 2))
    with pytest.raises(ValueError, match=r"routing_map must be on the device of sorted_indices \(cpu\), got meta"):
        unpermute(tokens, index, (3, 2), probs, routing_map.to("meta"))
    with pytest.raises(ValueError, match=r"probs must be on the device of sorted_indices \(cpu\), got meta"):
        unpermute(tokens, index, (3, 2), probs.to("meta"), routing_map)


@pytest.mark.parametrize("shape", [(3, 1), (3, 3), (3,), (3, 2, 1)])
def test_restore_shape_of_another_width(shape):
    with pytest.raises(ValueError, match=r"unpermute: restore_shape must be \(tokens, 2\), got \(3"):
        unpermute(draw(0, 3, 2), torch.arange(3), shape)


def test_probs_need_the_map_and_shapes_must_fit():
    tokens, index = draw(0, 3, 2), torch.arange(3)
    with pytest.raises(ValueError, match="unpermute: routing_map must be given together with probs, got None"):
        unpermute(tokens, index, (3, 2), draw(1, 3, 1))
    with pytest.raises(ValueError, match=r"probs must be of shape \[tokens, experts\] = \[3, 2\], got shape \[3, 1\]"):
        unpermute(tokens, index, (3, 2), draw(1, 3, 1), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"routing_map must be of shape .* = \[3, 2\], got shape \[4, 2\]"):
        unpermute(tokens, index, (3, 2), draw(1, 4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"sorted_indices must be of 3 entries, .*, got shape \[2\]"):
        unpermute(tokens, index[:2], (3, 2))
    with pytest.raises(TypeError, match=r"probs must be a floating-point tensor, got torch\.int64"):
        unpermute(tokens, index, (3, 2), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"permute: routing_map must be of 3 tokens, as tokens, got shape \[2, 4\]"):
        permute(tokens, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"permute: probs must be of shape .* = \[3, 4\], got shape \[3, 2\]"):
        permute(tokens, torch.zeros(3, 4), draw(1, 3, 2))
    with pytest.raises(ValueError, match=r"permute: tokens must be a 2-D tensor, got shape \[3\]"):
        permute(tokens[:, 0], torch.zeros(3, 4))
