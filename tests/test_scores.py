"""The router's scores: each is computed by every backend, or refused by it, and indices are not trusted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _router import BY_HAND, VARIANTS, bf16_logits

from moekit import moe_utils
from moekit.ops import topk
from moekit.ops.topk import SCORE_FUNCTIONS, router_weights, selection_scores, topk_router

# --- every backend has every score


def published(logits, k, bias=None, scaling_factor=None):
    """``sqrtsoftplus`` as Megatron-core computes it, in the dtype of ``logits``."""
    scores = torch.sqrt(F.softplus(logits, threshold=50))
    indices = torch.topk(scores if bias is None else scores + bias, k).indices
    weights = scores.gather(1, indices)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if k > 1 else weights
    weights = weights * (scaling_factor or 1.0)
    empty = torch.zeros_like(logits)
    return empty.scatter(1, indices, weights), empty.bool().scatter(1, indices, True), scores


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("k", "scaling_factor", "biased"), [(1, None, False), (4, 2.5, False), (4, 1.5, True)])
def test_sqrtsoftplus_is_the_published_one(dtype, k, scaling_factor, biased):
    logits = bf16_logits(40, 8, seed=5)
    bias = torch.linspace(-1, 1, 8, dtype=torch.float64).flip(0) if biased else None
    theirs, ours = logits.clone().requires_grad_(), logits.to(dtype).requires_grad_()
    probs, routing_map, scores = published(theirs, k, bias, scaling_factor)
    named = {"score_function": "sqrtsoftplus", "scaling_factor": scaling_factor}
    named["expert_bias"] = bias if bias is None else bias.to(dtype)
    found, found_map = moe_utils.topk_routing_with_score_function(ours, k, **named)
    assert torch.equal(found_map, routing_map)
    tolerance = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found.double(), probs, **tolerance)
    upstream = bf16_logits(40, 8, seed=6)
    gradients = torch.autograd.grad(found, ours, upstream.to(dtype)), torch.autograd.grad(probs, theirs, upstream)
    torch.testing.assert_close(gradients[0][0].double(), gradients[1][0], **tolerance)
    aux_map, aux = moe_utils.compute_routing_scores_for_aux_loss(ours, k, "sqrtsoftplus")
    torch.testing.assert_close(aux.double(), scores / scores.sum(-1, keepdim=True), **tolerance)
    assert torch.equal(aux_map, published(theirs, k)[1])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sqrtsoftplus_and_its_gradient_at_any_size(dtype):
    """The published gradient is NaN from -104 down, where softplus is 0 in float32; its root is not."""
    x = torch.tensor([-160.0, -104, -103, -88, -41, -40, -39.5, -17, -1, -0.0, 0, 0.5, 3, 17, 40, 88, 104, 1e4, 1e30])
    logits = x.to(dtype).unsqueeze(1).requires_grad_()
    weights, _ = topk_router(logits, 1, score_function="sqrtsoftplus")
    (grad,) = torch.autograd.grad(weights, logits, torch.ones_like(weights))
    x = logits.detach().double()[:, 0]
    true = torch.tensor([BY_HAND["sqrtsoftplus"](value) for value in x.tolist()], dtype=torch.float64)
    bounds = {"rtol": 4 * torch.finfo(dtype).eps if dtype is not torch.float32 else 2e-6, "atol": 0}
    torch.testing.assert_close(weights.double()[:, 0], true, **bounds)
    torch.testing.assert_close(grad.double()[:, 0], x.sigmoid() / (2 * true), **bounds)
    lowest = torch.full((1, 4), -3e38, dtype=dtype, requires_grad=True)
    for k in (1, 2):
        weights, _ = topk_router(lowest, k, score_function="sqrtsoftplus")
        assert torch.autograd.grad(weights.sum(), lowest)[0].isfinite().all() and weights.isfinite().all()


@pytest.mark.parametrize("name", topk.ELEMENTWISE)
def test_scores_ascend(name):
    """What the selection by logits alone rests on."""
    x = torch.linspace(-100, 100, 4001, dtype=torch.float64)
    score = topk.ELEMENTWISE[name].value(x)
    assert (score.diff() >= 0).all() and (score > 0).all()


def test_a_score_that_a_backend_lacks_is_not_taken_for_another(backend, monkeypatch):
    monkeypatch.setattr(topk, "SCORE_FUNCTIONS", (*SCORE_FUNCTIONS, "made_up"))
    logits, indices = bf16_logits(4, 8, dtype=torch.float32), torch.tensor([[0, 3]] * 4)
    owner = {"torch": "the references"}.get(backend, f"the {backend} kernels")
    message = f"moekit: {owner} have no score 'made_up', only '"
    for options in ({}, {"num_groups": 4, "group_topk": 2}, {"expert_bias": torch.zeros(8)}):
        with pytest.raises(ValueError, match=message):
            topk_router(logits, 2, score_function="made_up", **options)
    with pytest.raises(ValueError, match=message):
        torch.ops.moekit.topk_router_backward(torch.ones(4, 2), None, logits, indices, None, "made_up", False, None, None)
    with pytest.raises(ValueError, match=message):
        torch.ops.moekit.weigh_experts(logits, indices, None, "made_up", False, None, None)
    for call in (
        lambda: router_weights(logits, indices, score_function="made_up"),
        lambda: selection_scores(logits, score_function="made_up"),
        lambda: moe_utils.topk_routing_with_score_function(logits, 2, score_function="made_up"),
    ):
        with pytest.raises(ValueError, match="no score 'made_up'"):
            call()
    monkeypatch.setattr("moekit.ops.losses.SCORE_FUNCTIONS", topk.SCORE_FUNCTIONS)
    with pytest.raises(ValueError, match="no score 'made_up'"):
        moe_utils.compute_routing_scores_for_aux_loss(logits, 2, "made_up")


# --- indices that a tensor holds


def epsilon_of(variant):
    return None if variant["score_function"] == "softmax" else topk.NORMALISER_EPS


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_passes_over_index_minus_one(variant):
    logits = bf16_logits(4, 8, dtype=torch.float32).requires_grad_()
    indices = torch.tensor([[1, 2, -1], [-1, -1, -1], [0, -1, 7], [3, 4, 5]])
    grad = bf16_logits(4, 3, seed=2, dtype=torch.float32)
    named = {"scaling_factor": 1.5, **variant}
    (expected,) = torch.autograd.grad(router_weights(logits.double(), indices, **named), logits, grad.double())
    args = (variant["score_function"], variant.get("pre_softmax", False), epsilon_of(variant), 1.5)
    found = torch.ops.moekit.topk_router_backward(grad, None, logits.detach(), indices, None, *args)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("index", [8, -2, 2**40, -(2**62)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_an_index_out_of_range(backend, variant, index):
    logits, indices = bf16_logits(3, 8, dtype=torch.float32), torch.tensor([[0, 1], [2, index], [index, index]])
    scoring = (variant["score_function"], variant.get("pre_softmax", False), epsilon_of(variant), None)
    args = (torch.ones(3, 2), None, logits, indices, None, *scoring)
    if backend != "triton":  # which does not look at values
        with pytest.raises(ValueError, match=rf"topk_router_backward: indices .*below 8 .*index {index}"):
            torch.ops.moekit.topk_router_backward(*args)
        return
    absent = torch.where(indices == index, -1, indices)
    expected = topk._backward_reference(args[0], None, logits, absent, *args[4:])
    torch.testing.assert_close(torch.ops.moekit.topk_router_backward(*args), expected, rtol=1e-5, atol=1e-7)


# --- the drop-in


def test_the_drop_in_takes_what_frameworks_pass_and_ignore():
    """Megatron-core hands its settings on whatever the score is."""
    logits = bf16_logits(6, 8)
    route = moe_utils.topk_routing_with_score_function
    for name in ("sigmoid", "sqrtsoftplus"):
        plain = route(logits, 4, score_function=name)
        for ignored in ({"use_pre_softmax": True}, {"num_groups": 4}, {"num_groups": 4, "group_topk": 0}):
            for one, other in zip(route(logits, 4, score_function=name, **ignored), plain, strict=True):
                assert torch.equal(one, other)
