"""Router scores and top-k selection, against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _router import BY_HAND, VARIANTS, bf16_logits, by_hand, router_by_hand
from torch.autograd import gradcheck, gradgradcheck

from moekit import _backend
from moekit.ops.topk import (
    group_limited_select,
    router_weights,
    select_topk,
    selection_scores,
    topk_router,
)

NAN, INF = math.nan, math.inf


def assert_close_to_rounded(value, truth):
    """At most twice the error of one correctly rounded result."""
    info = torch.finfo(value.dtype)
    # eps is the spacing of normal numbers; below them (float16) the spacing is constant.
    spacing = info.eps * truth.abs().clamp(min=info.smallest_normal)
    assert ((value.double() - truth).abs() <= spacing).all()


# --- selection


def test_select_topk_orders_by_score_then_index():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, -0.0, 0.0, -1.0], [-INF, 0.0, INF, -INF]])
    assert select_topk(scores, 4).tolist() == [[1, 3, 2, 0], [0, 1, 2, 3], [2, 1, 0, 3]]
    assert select_topk(scores, 2).dtype is torch.int64
    assert select_topk(scores, 2).is_contiguous()


@pytest.mark.parametrize("experts", [1, 7, 64, 300])
def test_ties_go_to_the_lowest_expert(experts):
    assert select_topk(torch.zeros(3, experts), experts).tolist() == [list(range(experts))] * 3
    scores = torch.randint(0, 3, (20, experts), generator=torch.Generator().manual_seed(1)).float()
    k = min(5, experts)
    expected = [by_hand(row, k) for row in scores.tolist()]
    assert select_topk(scores, k).tolist() == expected
    assert select_topk(scores.T.contiguous().T, k).tolist() == expected


def test_nan_ranks_below_minus_infinity():
    scores = torch.tensor([[NAN, -INF, 1.0, NAN], [NAN] * 4, [INF, NAN, INF, -INF], [3.0, 2.0, 1.0, 0.0]])
    negative_nan = torch.where(scores.isnan(), -scores, scores)
    for x in (scores, negative_nan, scores.double(), scores.bfloat16()):
        assert select_topk(x, 4).tolist() == [[2, 1, 0, 3], [0, 1, 2, 3], [0, 2, 3, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [None, (4, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_bad_logits_touch_only_their_token(variant, group, biased):
    logits = bf16_logits(6, 8)
    bad = logits.clone()
    bad[1, 3], bad[2], bad[3, 0], bad[4] = NAN, NAN, INF, -INF
    num_groups, group_topk = group or (None, None)
    options = {"num_groups": num_groups, "group_topk": group_topk, **variant}
    options["expert_bias"] = torch.linspace(-1, 1, 8, dtype=torch.float64) if biased else None
    bad.requires_grad_()
    weights, indices = topk_router(bad, 4, **options)
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 8 for row in indices.tolist())
    clean = [0, 5]
    good_weights, good_indices = topk_router(logits, 4, **options)
    assert torch.equal(indices[clean], good_indices[clean])
    assert torch.equal(weights[clean], good_weights[clean])
    weights.square().sum().backward()
    assert bad.grad is not None and bad.grad[clean].isfinite().all()


@pytest.mark.parametrize(("k", "num_groups", "group_topk"), [(4, 4, 2), (2, 4, 3), (3, 2, 1), (5, 8, 3), (6, 1, 1)])
def test_group_limited_select_matches_a_loop(k, num_groups, group_topk):
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(-4, 4, (40, 16), generator=generator).double()
    expected = [by_hand(row, k, (num_groups, group_topk)) for row in scores.tolist()]
    assert group_limited_select(scores, k, num_groups, group_topk).tolist() == expected


def test_group_limited_select_stays_inside_the_chosen_groups():
    scores = torch.tensor([[5.0, NAN, -INF, 4.0, 4.0, 4.0]])
    # By its best expert the first group wins; its -inf and NaN still come before any other group's experts.
    assert group_limited_select(scores, 3, 2, 1).tolist() == [[3, 4, 5]]
    assert group_limited_select(torch.tensor([[5.0, NAN, 4.0, 4.5]]), 2, 2, 2).tolist() == [[0, 3]]
    assert group_limited_select(torch.tensor([[1.0, -INF, -9.0, -9.0]]), 2, 2, 1).tolist() == [[2, 3]]


def test_more_groups_than_experts_to_choose_still_rank_by_their_best():
    scores = torch.tensor([[0.0, 1.0, 9.0, 0.0, 0.0, 8.0, 2.0, 0.0]])
    assert group_limited_select(scores, 1, 4, 2).tolist() == [[2]]


# --- the router


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 2, 8])
def test_router_values(dtype, variant, k):
    logits = bf16_logits(50, 8)
    truth, indices_truth = router_by_hand(logits, k, **variant)
    weights, indices = topk_router(logits.to(dtype), k, **variant)
    assert weights.dtype is dtype and indices.dtype is torch.int64
    assert torch.equal(indices, indices_truth)
    if dtype in (torch.float64, torch.float32):
        torch.testing.assert_close(weights.double(), truth, rtol=8 * torch.finfo(dtype).eps, atol=0)
    else:
        assert_close_to_rounded(weights, truth)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [(4, 2), (2, 1), (8, 5)])
def test_router_with_groups_bias_and_scaling(variant, group):
    logits = bf16_logits(50, 16, seed=3)
    bias = torch.linspace(-0.5, 0.5, 16, dtype=torch.float64).flip(0)
    for b in (None, bias):
        truth, indices_truth = router_by_hand(logits, 4, group=group, scaling_factor=2.5, bias=b, **variant)
        weights, indices = topk_router(
            logits, 4, num_groups=group[0], group_topk=group[1], scaling_factor=2.5, expert_bias=b, **variant
        )
        assert torch.equal(indices, indices_truth)
        torch.testing.assert_close(weights, truth, rtol=1e-14, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bias_steers_the_selection_and_not_the_weights(variant):
    logits = bf16_logits(30, 8).bfloat16()
    bias = torch.zeros(8)
    bias[5] = 100.0
    weights, indices = topk_router(logits, 2, expert_bias=bias, **variant)
    assert (indices[:, 0] == 5).all()
    assert weights.dtype is torch.bfloat16
    assert torch.equal(weights, router_weights(logits, indices, **variant))
    assert not torch.equal(indices, topk_router(logits, 2, **variant)[1])


def test_bias_below_the_resolution_of_the_logits_dtype_counts():
    logits = torch.zeros(1, 4, dtype=torch.bfloat16)
    bias = torch.tensor([0.0, 0.0, 1e-5, 0.0])  # lost if added to 0.5 in bfloat16
    assert topk_router(logits, 1, score_function="sigmoid", expert_bias=bias)[1].tolist() == [[2]]


def test_selection_sees_scores_before_rounding():
    logits = torch.tensor([[9.0, 9.0625, 3.0]], dtype=torch.bfloat16)  # both sigmoids round to 1
    assert logits.sigmoid()[0, 0] == logits.sigmoid()[0, 1]
    for bias in (None, torch.zeros(3)):
        assert topk_router(logits, 1, score_function="sigmoid", expert_bias=bias)[1].tolist() == [[1]]
    saturated = torch.tensor([[50.0, 60.0]])  # equal sigmoids in float32: the logits still tell them apart
    assert topk_router(saturated, 1, score_function="sigmoid")[1].tolist() == [[1]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaling_factor_zero_is_honoured(variant):
    logits = bf16_logits(4, 8)
    assert topk_router(logits, 2, scaling_factor=0.0, **variant)[0].eq(0).all()
    assert torch.equal(topk_router(logits, 2, scaling_factor=2.0, **variant)[0], 2 * topk_router(logits, 2, **variant)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_logits_stay_finite(variant):
    logits = torch.tensor([[3e38, -3e38, 0.0, 3e38], [-3e38] * 4], requires_grad=True)
    weights, _ = topk_router(logits, 2, **variant)
    weights.sum().backward()
    assert weights.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens(variant):
    logits = torch.zeros(0, 8, requires_grad=True)
    for groups in ({}, {"num_groups": 4, "group_topk": 2}):
        weights, indices = topk_router(logits, 2, expert_bias=torch.zeros(8), **groups, **variant)
        assert weights.shape == indices.shape == (0, 2)
        (grad,) = torch.autograd.grad(weights.sum(), logits)
        assert grad.shape == (0, 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_expert(variant):
    weights, indices = topk_router(torch.tensor([[0.5], [-2.0]]), 1, **variant)
    assert indices.tolist() == [[0], [0]]
    if variant["score_function"] == "softmax":
        assert weights.tolist() == [[1.0], [1.0]]
    else:
        by_hand = BY_HAND[variant["score_function"]]
        torch.testing.assert_close(weights, torch.tensor([[by_hand(0.5)], [by_hand(-2.0)]]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("groups", [{}, {"num_groups": 2, "group_topk": 1}])
def test_gradcheck(variant, groups):
    logits = bf16_logits(5, 6).requires_grad_()

    def weigh(x):
        return topk_router(x, 2, scaling_factor=1.5, **groups, **variant)[0]

    assert gradcheck(weigh, logits)
    assert gradgradcheck(weigh, logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_in_bfloat16(variant):
    logits = bf16_logits(20, 8)
    upstream = bf16_logits(20, 2, seed=7)
    grads = {}
    for dtype in (torch.float64, torch.bfloat16):
        leaf = logits.clone().to(dtype).requires_grad_()
        topk_router(leaf, 2, **variant)[0].backward(upstream.to(dtype))
        assert leaf.grad is not None and leaf.grad.dtype is dtype
        grads[dtype] = leaf.grad.double()
    error = (grads[torch.bfloat16] - grads[torch.float64]).abs()
    assert (error <= 2**-8 * grads[torch.float64].abs() + 1e-6).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_logits_arguments_unchanged(variant):
    logits = bf16_logits(6, 8, dtype=torch.float32)
    bias = torch.linspace(0, 1, 8)
    for x in (logits.T.contiguous().T, torch.cat([logits, logits], 1)[:, 8:]):
        before, bias_before = x.clone(), bias.clone()
        weights, indices = topk_router(x, 3, num_groups=4, group_topk=2, expert_bias=bias, **variant)
        assert torch.equal(x, before) and torch.equal(bias, bias_before)
        expected = topk_router(logits, 3, num_groups=4, group_topk=2, expert_bias=bias, **variant)
        assert torch.equal(weights, expected[0]) and torch.equal(indices, expected[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_is_the_same_alone_and_in_a_batch(variant):
    logits = bf16_logits(64, 16, dtype=torch.float32)
    weights, indices = topk_router(logits, 4, **variant)
    for t in (0, 13, 63):
        alone = topk_router(logits[t : t + 1], 4, **variant)
        assert torch.equal(alone[0][0], weights[t]) and torch.equal(alone[1][0], indices[t])


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_whole(variant):
    def step(x):
        weights, indices = topk_router(x, 2, num_groups=4, group_topk=2, expert_bias=torch.ones(8), **variant)
        return weights.sum() + indices.sum()

    logits = bf16_logits(6, 8, dtype=torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), step(logits))


# --- weights of given indices


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_follow_indices_from_outside(variant):
    logits = bf16_logits(6, 8)
    weights, indices = topk_router(logits, 3, **variant)
    flipped = router_weights(logits, indices.flip(1).int(), **variant)
    torch.testing.assert_close(flipped, weights.flip(1), rtol=1e-15, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_index_minus_one_has_no_weight(variant):
    logits = bf16_logits(4, 8).requires_grad_()
    indices = torch.tensor([[1, 2, -1], [-1, -1, -1], [0, -1, 7], [3, 4, 5]])
    weights = router_weights(logits, indices, **variant)
    assert weights[indices == -1].eq(0).all() and weights.isfinite().all()
    if not variant.get("pre_softmax"):
        torch.testing.assert_close(weights.detach()[[0, 2, 3]].sum(1), torch.ones(3, dtype=torch.float64))
    pair = router_weights(logits, indices[:1, :2].expand(4, 2), **variant)
    torch.testing.assert_close(weights[0, :2], pair[0], rtol=1e-14, atol=0)
    weights.square().sum().backward()
    assert logits.grad is not None and logits.grad[1].eq(0).all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("index", [8, -2])
def test_index_out_of_range(index):
    with pytest.raises(ValueError, match=rf"indices.*8.*index {index}"):
        router_weights(torch.zeros(2, 8), torch.tensor([[0, 1], [2, index]]))


def test_selection_scores_are_what_the_selection_compares():
    logits = bf16_logits(10, 8, dtype=torch.float32)
    bias = torch.linspace(0, 0.3, 8)
    for variant in VARIANTS:
        scores = selection_scores(logits, expert_bias=bias, **variant)
        assert scores.dtype is torch.float32 and not scores.requires_grad
        assert torch.equal(select_topk(scores, 3), topk_router(logits, 3, expert_bias=bias, **variant)[1])


# --- errors


def test_more_experts_asked_than_there_are():
    logits = torch.zeros(3, 4)
    for call in (lambda: select_topk(logits, 5), lambda: topk_router(logits, 5)):
        with pytest.raises(ValueError, match=r"k must be .*\(4\), got 5"):
            call()
    with pytest.raises(ValueError, match=r"2 experts of the 1 chosen groups, got 3"):
        topk_router(logits, 3, num_groups=2, group_topk=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"num_groups": 3, "group_topk": 1}, r"num_groups must be a divisor .*\(8\), got 3"),
        ({"num_groups": 2, "group_topk": 3}, r"group_topk must be .*\(2\), got 3"),
        ({"num_groups": 0, "group_topk": 1}, "num_groups must be at least 1"),
        ({"num_groups": 2, "group_topk": -1}, "group_topk must be at least 1"),
        ({"group_topk": 1}, "num_groups must be given with group_topk=1"),
        ({"score_function": "relu"}, "score_function must be one of 'softmax', 'sigmoid', 'sqrtsoftplus', got 'relu'"),
        ({"score_function": "sigmoid", "pre_softmax": True}, "pre_softmax=True has no effect on .*'sigmoid'"),
        ({"score_function": "sqrtsoftplus", "pre_softmax": True}, "pre_softmax=True has no effect on .*'sqrtsoftplus'"),
        ({"num_groups": 4}, "num_groups=4 has no effect without group_topk"),
        ({"num_groups": 4, "group_topk": 0}, "num_groups=4 has no effect without group_topk"),
        ({"expert_bias": torch.zeros(7)}, r"expert_bias must be of shape \[E\] = \[8\]"),
        ({"expert_bias": torch.zeros(8, device="meta")}, "expert_bias must be on the device"),
        ({"logits": torch.zeros(8)}, "logits must be a 2-D tensor"),
    ],
)
def test_wrong_values_name_the_argument(options, message):
    options = {"logits": torch.zeros(2, 8), "k": 2, **options}
    with pytest.raises(ValueError, match=message):
        topk_router(**options)


def test_wrong_dtypes():
    with pytest.raises(TypeError, match="logits"):
        topk_router(torch.zeros(2, 8, dtype=torch.int64), 2)
    with pytest.raises(TypeError, match="expert_bias"):
        topk_router(torch.zeros(2, 8), 2, expert_bias=torch.zeros(8, dtype=torch.int64))
    with pytest.raises(TypeError, match="indices"):
        router_weights(torch.zeros(2, 8), torch.zeros(2, 2))


def test_what_the_other_halves_would_ignore():
    logits, indices = torch.zeros(2, 8), torch.zeros(2, 2, dtype=torch.int64)
    for call in (selection_scores, lambda x, **options: router_weights(x, indices, **options)):
        with pytest.raises(ValueError, match=r"pre_softmax=True has no effect on score_function='sigmoid'; leave it out"):
            call(logits, score_function="sigmoid", pre_softmax=True)


@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor])
def test_any_integer_will_do(integer):
    logits = bf16_logits(6, 8)
    options = {"num_groups": 4, "group_topk": 2}
    found = topk_router(logits, integer(2), **{name: integer(value) for name, value in options.items()})
    for one, other in zip(found, topk_router(logits, 2, **options), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(select_topk(logits, integer(2)), select_topk(logits, 2))
    for k in (True, 2.0, np.float64(2), torch.tensor(2.0), torch.tensor(True), torch.tensor([2, 2]), "2", None):
        with pytest.raises(TypeError, match=r"moekit\.topk_router: k must be an integer, got"):
            topk_router(logits, k)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("experts", [8, 64, 300, 5000])
def test_gpu_selects_as_the_cpu(experts):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (64, experts), generator=generator).float()
    scores[scores == 2] = NAN
    scores = torch.where(torch.rand(scores.shape, generator=generator) < 0.5, -scores, scores)
    scores[3] = -INF
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = scores.to(dtype)
        assert torch.equal(select_topk(x.cuda(), 8).cpu(), select_topk(x, 8))
        assert torch.equal(group_limited_select(x.cuda(), 4, 4, 2).cpu(), group_limited_select(x, 4, 4, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_index_out_of_range_has_no_weight():
    logits = torch.zeros(1, 8, device="cuda")
    indices = torch.tensor([[0, 8, -5]], device="cuda")
    assert router_weights(logits, indices).tolist() == [[1.0, 0.0, 0.0]]
    with _backend.debug(), pytest.raises(ValueError, match="indices"):
        router_weights(logits, indices)
