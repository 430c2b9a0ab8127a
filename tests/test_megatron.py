"""moekit.megatron: Megatron-core's forms since 0.17, against loops over tokens and experts in float64."""

from __future__ import annotations

import pytest
import torch
from _reference import assert_same, draw

from moekit import megatron, moe_utils

# Routed pairs [T, E]; an expert without tokens, a token without experts, everything and nothing.
MAPS = {
    "plain": [[1, 0, 1, 0], [0, 0, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]],
    "unrouted_token": [[0, 1, 0], [0, 0, 0], [1, 1, 0]],
    "aligned": [[1, 1], [1, 0], [1, 1], [1, 0]],
    "nobody": [[0, 0, 0], [0, 0, 0]],
    "one": [[1]],
}
every_map = pytest.mark.parametrize("name", MAPS)


def routing(name: str, dtype: torch.dtype = torch.float32):
    """Tokens, map, probs and counts."""
    routing_map = torch.tensor(MAPS[name]).bool()
    tokens = draw(1, routing_map.shape[0], 6, dtype=dtype)
    probs = draw(2, *routing_map.shape, dtype=dtype).abs() * routing_map
    return tokens, routing_map, probs, routing_map.sum(0)


def padded_by_hand(routing_map: torch.Tensor, align: int) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """The ``(token, expert)`` of each row, ``(-1, -1)`` for padding; the padding before each expert; padded counts."""
    found, offsets, counts = [], [], []
    for expert in range(routing_map.shape[1]):
        offsets.append(sum(row == (-1, -1) for row in found))
        routed = [(t, expert) for t in range(routing_map.shape[0]) if routing_map[t, expert]]
        missing = -len(routed) % align
        found += routed + [(-1, -1)] * missing
        counts.append(len(routed) + missing)
    return found, offsets, counts


# --- permute and unpermute ------------------------------------------------------------------------------------------


@every_map
@pytest.mark.parametrize("fused", [False, True])
def test_five_values_without_padding(backend, name, fused):
    tokens, routing_map, probs, counts = routing(name)
    expected = moe_utils.permute(tokens, routing_map, probs)
    found = megatron.permute(tokens, routing_map, probs, int(counts.sum()), fused, tokens_per_expert=counts)
    for actual, wanted in zip(found, expected, strict=False):
        assert_same(actual, wanted)
    assert len(found) == 5 and found[3] is None and found[4] is counts
    # Padding wants all of fused, probs, counts and a size above 0.
    for kwargs in (
        {"probs": probs, "tokens_per_expert": counts, "align_size": 4},
        {"tokens_per_expert": counts, "align_size": 4, "fused": True},
        {"probs": probs, "align_size": 4, "fused": True},
        {"probs": probs, "tokens_per_expert": counts, "align_size": -1, "fused": True},
    ):
        found = megatron.permute(tokens, routing_map, **kwargs)
        assert_same(found[0], expected[0])
        assert found[3] is None and found[4] is kwargs.get("tokens_per_expert")


@every_map
@pytest.mark.parametrize("align", [1, 2, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows_and_back(backend, name, align, dtype):
    tokens, routing_map, probs, counts = routing(name, dtype)
    tokens.requires_grad_()
    probs.requires_grad_()
    rows, row_probs, index, offsets, padded = megatron.permute(tokens, routing_map, probs, None, True, False, counts, align)
    expected, before, wanted_counts = padded_by_hand(routing_map, align)
    assert index.tolist() == [token for token, _ in expected] and index.dtype is torch.int64
    assert padded.tolist() == wanted_counts and padded.dtype is torch.int64
    assert offsets is None if sum(wanted_counts) == int(counts.sum()) else offsets.tolist() == before
    zero = torch.zeros(tokens.shape[1], dtype=dtype)
    assert all(torch.equal(row, zero if t < 0 else tokens[t]) for row, (t, _) in zip(rows, expected, strict=True))
    assert row_probs.tolist() == [0.0 if t < 0 else probs[t, e].item() for t, e in expected]

    g = draw(3, *rows.shape, dtype=dtype)
    (rows * g).sum().backward()
    found = torch.zeros_like(tokens, dtype=torch.float64)
    for row, (t, _) in enumerate(expected):
        if t >= 0:
            found[t] += g[row].double()
    torch.testing.assert_close(tokens.grad, found.to(dtype))

    out_rows = draw(4, *rows.shape, dtype=dtype).requires_grad_()
    for kwargs in ({}, {"probs": probs, "routing_map": routing_map}):
        out_rows.grad = probs.grad = None
        out = megatron.unpermute(out_rows, index, tokens.shape, fused=True, pad_offsets=offsets, **kwargs)
        wide, wide_probs = out_rows.detach().double().requires_grad_(), probs.detach().double().requires_grad_()
        reference = torch.zeros(tokens.shape, dtype=torch.float64)
        for row, (t, e) in enumerate(expected):
            if t >= 0:
                one = torch.zeros_like(reference).index_fill(0, torch.tensor([t]), 1.0)
                reference = reference + one * wide[row] * (wide_probs[t, e] if kwargs else 1.0)
        torch.testing.assert_close(out, reference.to(dtype))
        if not reference.requires_grad:
            continue
        seed = draw(5, *out.shape, dtype=dtype)
        out.backward(seed)
        reference.backward(seed.double())
        torch.testing.assert_close(out_rows.grad, wide.grad.to(dtype))
        if kwargs:
            torch.testing.assert_close(probs.grad, wide_probs.grad.to(dtype))


@pytest.mark.parametrize("name", ["plain", "unrouted_token", "one"])
@pytest.mark.parametrize("spare", [0, 1])
def test_the_inverse_map(backend, name, spare):
    """Row and expert of each slot, experts ascending; a sum that uses it has the same bits as one that does not."""
    tokens, routing_map, probs, _ = routing(name)
    slots = int(routing_map.sum(1).max()) + spare
    total = slots * tokens.shape[0]
    rows, _, index, inverse, _ = megatron.permute(tokens, routing_map, probs, total, return_batch_invariant_inverse_map=True)
    assert inverse.shape == (2, tokens.shape[0], slots) and inverse.dtype is torch.int64
    order = [(t, e) for e in range(routing_map.shape[1]) for t in range(routing_map.shape[0]) if routing_map[t, e]]
    for token, experts in enumerate(routing_map):
        chosen = experts.nonzero().flatten().tolist()
        empty = [-1] * (slots - len(chosen))
        assert inverse[1, token].tolist() == chosen + empty
        assert inverse[0, token].tolist() == [order.index((token, e)) for e in chosen] + empty
    for kwargs in ({}, {"probs": probs, "routing_map": routing_map}):
        grads = []
        for extra in ({}, {"batch_invariant_inverse_map": inverse}):
            leaf, weights = rows.detach().clone().requires_grad_(), probs.clone().requires_grad_()
            given = {**kwargs, **extra, **({"probs": weights} if kwargs else {})}
            out = megatron.unpermute(leaf, index, tokens.shape, **given)
            out.backward(draw(7, *out.shape))
            grads.append((out, leaf.grad, weights.grad))
        for first, second in zip(*grads, strict=True):
            assert (first is None) == (second is None)
            if first is not None:
                assert_same(second, first)


def test_gradcheck():
    tokens, routing_map, probs, counts = routing("plain", torch.float64)
    tokens.requires_grad_()
    probs.requires_grad_()
    offsets, index = (megatron.permute(tokens, routing_map, probs, None, True, False, counts, 4)[i] for i in (3, 2))

    def padded(tokens, probs):
        rows, row_probs, *_ = megatron.permute(tokens, routing_map, probs, None, True, False, counts, 4)
        rows = rows * row_probs.unsqueeze(1)
        return megatron.unpermute(rows, index, tokens.shape, probs, routing_map, pad_offsets=offsets)

    def mapped(tokens, probs):
        rows, _, index, inverse, _ = megatron.permute(
            tokens, routing_map, probs, 10, return_batch_invariant_inverse_map=True
        )
        return megatron.unpermute(rows, index, tokens.shape, probs, routing_map, batch_invariant_inverse_map=inverse)

    for function in (padded, mapped):
        assert torch.autograd.gradcheck(function, (tokens, probs))


BAD = {
    "padded_dropping": ({"drop_and_pad": True, "fused": True, "align_size": 2}, "drop_and_pad must be False"),
    "mapped_dropping": ({"drop_and_pad": True, "return_batch_invariant_inverse_map": True}, "drop_and_pad must be False"),
    "both": ({"fused": True, "align_size": 2, "return_batch_invariant_inverse_map": True}, "align_size must be 0"),
    "counts_of_another_map": ({"fused": True, "align_size": 2, "tokens_per_expert": torch.ones(4).long()}, "the counts of"),
    "counts_shape": ({"fused": True, "align_size": 2, "tokens_per_expert": torch.ones(3).long()}, r"\[experts\]"),
    "counts_dtype": ({"fused": True, "align_size": 2, "tokens_per_expert": torch.ones(4)}, "int32 or int64"),
    "map_without_rows": ({"return_batch_invariant_inverse_map": True, "num_out_tokens": None}, "a multiple of the 5 tokens"),
    "map_of_odd_rows": ({"return_batch_invariant_inverse_map": True, "num_out_tokens": 9}, "a multiple of the 5 tokens"),
    "too_few_rows": ({"num_out_tokens": 4}, "at least the 8 routed pairs"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_permute_refuses(case):
    kwargs, message = BAD[case]
    tokens, routing_map, probs, counts = routing("plain")
    with pytest.raises((ValueError, TypeError), match=message):
        megatron.permute(tokens, routing_map, probs, **{"num_out_tokens": 10, "tokens_per_expert": counts, **kwargs})


def test_what_unpermute_refuses():
    tokens, routing_map, probs, counts = routing("plain")
    rows, _, index, offsets, _ = megatron.permute(tokens, routing_map, probs, None, True, False, counts, 4)
    *_, inverse, _ = megatron.permute(tokens, routing_map, probs, 10, return_batch_invariant_inverse_map=True)
    few = torch.cat([index[index >= 0], torch.tensor([-1, -1])])
    for kwargs, message in (
        ({"pad_offsets": offsets, "batch_invariant_inverse_map": inverse}, "pad_offsets must be None"),
        ({"pad_offsets": offsets, "drop_and_pad": True}, "drop_and_pad must be False"),
        ({"pad_offsets": offsets[:2]}, r"pad_offsets must be of shape \[experts\]"),
        ({"pad_offsets": offsets.float()}, "pad_offsets must be an int32 or int64"),
        ({"batch_invariant_inverse_map": inverse[:, :3]}, r"\[2, tokens, slots\]"),
        ({"batch_invariant_inverse_map": inverse.float()}, "must be an int32 or int64"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            megatron.unpermute(rows, index, tokens.shape, probs, routing_map, **kwargs)
    for bad, message in ((inverse + 7, "below 10"), (inverse.flip(1), "the inverse of sorted_indices")):
        with pytest.raises(ValueError, match=message):
            megatron.unpermute(rows[:10], few, tokens.shape, probs, routing_map, batch_invariant_inverse_map=bad)


# --- the router -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("pre_softmax", [False, True])
def test_dense_output_and_precomputed_indices(score_function, pre_softmax):
    logits, bias = draw(0, 7, 6, dtype=torch.float32), draw(1, 6, dtype=torch.float32)
    args = (logits, 2, pre_softmax, 3, 2, 2.5, score_function, bias)
    probs, routing_map = moe_utils.topk_routing_with_score_function(*args)
    for actual, wanted in zip(megatron.topk_routing_with_score_function(*args), (probs, routing_map), strict=True):
        assert_same(actual, wanted)
    weights, indices = megatron.topk_routing_with_score_function(*args, dense_output=True)
    assert weights.shape == indices.shape == (7, 2)
    assert_same(torch.zeros_like(logits).scatter(1, indices, weights), probs)
    # The same indices given: nothing is chosen, so groups and bias have no say.
    given = (logits, 2, pre_softmax, None, None, 2.5, score_function)
    for dtype in (torch.int64, torch.int32):
        kwargs = {"precomputed_indices": indices.to(dtype)}
        found = megatron.topk_routing_with_score_function(*given, **kwargs)
        torch.testing.assert_close(found[0], probs)
        assert_same(found[1], routing_map)
        dense = megatron.topk_routing_with_score_function(*given, dense_output=True, **kwargs)
        torch.testing.assert_close(dense[0], weights)
        assert dense[1] is kwargs["precomputed_indices"]


def test_precomputed_indices_may_name_nobody():
    logits = draw(0, 3, 4, dtype=torch.float32).requires_grad_()
    indices = torch.tensor([[1, -1], [-1, -1], [3, 0]])
    probs, routing_map = megatron.topk_routing_with_score_function(logits, 2, precomputed_indices=indices)
    assert routing_map.tolist() == [[False, True, False, False], [False] * 4, [True, False, False, True]]
    assert probs[0, 1] == 1.0 and probs[1].abs().sum() == 0
    torch.testing.assert_close(probs[2, [3, 0]], logits[2, [3, 0]].softmax(0))
    probs.square().sum().backward()
    assert logits.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"precomputed_indices must be of shape \[tokens, topk\]"):
        megatron.topk_routing_with_score_function(logits, 3, precomputed_indices=indices)
    with pytest.raises(ValueError, match="the number of experts"):
        megatron.topk_routing_with_score_function(logits, 2, precomputed_indices=indices + 4)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(6, 4, 2), (8, 8, 1), (10, 5, 4), (0, 4, 2)])
def test_quantile_balancing(tokens, experts, k):
    """By counting: the new beta has T*k/E of an expert's tokens above it, ties aside."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    beta = torch.rand(experts, generator=generator, dtype=torch.float64) * 0.3
    indices, new_beta = megatron.qb_dual_update(scores, k, beta)
    for token in range(tokens):
        ranked = sorted(range(experts), key=lambda e: -float(scores[token, e] - beta[e]))
        assert indices[token].tolist() == ranked[:k]
    if tokens:
        alpha = (scores - beta).sort(1, descending=True).values[:, k]
        above, target = scores - alpha[:, None], tokens * k // experts
        assert ((above > new_beta).sum(0) <= target).all() and ((above >= new_beta).sum(0) > target).all()
    same, old = megatron.qb_dual_update(scores, k, beta, update_beta=False)
    assert torch.equal(same, indices) and old is beta


def test_what_quantile_balancing_refuses():
    scores, beta = torch.rand(6, 4), torch.zeros(4)
    assert megatron.qb_dual_update(scores, 4, beta, update_beta=False)[0].shape == (6, 4)
    for args, message in (
        ((scores, 4, beta), "at most the number of experts"),
        ((scores, 1, beta), "divisible by 4 experts"),
        ((scores, 2, beta[:3]), r"\[experts\]"),
        ((scores.long(), 2, beta), "floating-point"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            megatron.qb_dual_update(*args)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8)])
def test_gating_computes_wide_and_keeps_narrow(bias, shape):
    x, weight = draw(0, *shape, dtype=torch.bfloat16), draw(1, 4, 8, dtype=torch.bfloat16)
    b = draw(2, 4, dtype=torch.float32) if bias else None
    leaves = [t.requires_grad_() for t in (x, weight, b) if t is not None]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        out = megatron.router_gating_linear(x, weight, b, torch.float32)
    assert set(kept) == {torch.bfloat16}
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.nn.functional.linear(*wide)
    torch.testing.assert_close(out, expected.float())
    seed = draw(3, *out.shape, dtype=torch.float32)
    out.backward(seed)
    expected.backward(seed.double())
    for leaf, reference in zip(leaves, wide, strict=True):
        torch.testing.assert_close(leaf.grad, reference.grad.to(leaf.dtype))
    with pytest.raises(ValueError, match=r"inp must be \[\.\.\., 8\]"):
        megatron.router_gating_linear(x[..., :7], weight, b, torch.float32)
    with pytest.raises(TypeError, match="router_dtype"):
        megatron.router_gating_linear(x, weight, b, torch.int64)


def test_gating_gradients():
    args = draw(0, 5, 8, dtype=torch.float64), draw(1, 4, 8, dtype=torch.float64), draw(2, 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in args]
    assert torch.autograd.gradcheck(lambda *a: megatron.router_gating_linear(*a, torch.float64), leaves)


class _Group:
    """Two processes of which the other one counts 10 more of everything."""

    def size(self) -> int:
        return 2


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, group: tensor.add_(10))
    return _Group()


def test_counts_of_a_group(two_processes):
    routing_map = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1]]).bool()
    count = megatron.get_tokens_per_expert_and_token_count
    assert [x.tolist() if torch.is_tensor(x) else x for x in count(routing_map)] == [[2, 0, 2], 3, 3]
    assert [x.tolist() if torch.is_tensor(x) else x for x in count(routing_map, two_processes)] == [[12, 10, 12], 3, 6]
    padded = count(routing_map, two_processes, topk=2, with_padding_mask=True)
    assert [x.tolist() for x in padded] == [[12, 10, 12], 2.0, 17.0]
    with pytest.raises(ValueError, match="topk must be given"):
        count(routing_map, with_padding_mask=True)


def test_the_bias_of_a_group(two_processes):
    counts, bias = torch.tensor([5, 1, 3]), torch.zeros(3)
    found = megatron.get_updated_expert_bias(counts, bias, 0.5, tp_dp_cp_group=two_processes)
    assert found.tolist() == [-0.5, 0.5, 0.0] and counts.tolist() == [5, 1, 3]


def test_a_map_is_padded_as_far_as_it_goes():
    """moe_utils raises here; a dispatcher does not ask first."""
    routing_map = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 1]])
    before = routing_map.clone()
    assert megatron.pad_routing_map(routing_map, 4).tolist() == [[1, 0, 1], [1, 0, 1], [1, 0, 1]]
    assert torch.equal(routing_map, before)
    with pytest.raises(ValueError, match="such that 3 tokens suffice"):
        moe_utils.pad_routing_map(routing_map, 4)
    assert_same(megatron.pad_routing_map(routing_map, 3), moe_utils.pad_routing_map(routing_map, 3))
