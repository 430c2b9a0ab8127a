"""Losses, Sinkhorn, capacity, bias updates and padding of the map, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from moekit import moe_utils
from moekit.ops.losses import (
    apply_capacity,
    get_capacity,
    load_balancing_loss,
    pad_routing_map,
    routing_scores_for_aux_loss,
    sinkhorn,
    updated_expert_bias,
    z_loss,
)
from moekit.ops.topk import SCORE_FUNCTIONS, topk_router

NAN, INF = math.nan, math.inf


def normal(*shape, seed=0, dtype=torch.float64):
    """Normal numbers that bfloat16 holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def routed(tokens, experts, k, seed=0):
    """Dense probabilities of a top-k routing and its map."""
    weights, indices = topk_router(normal(tokens, experts, seed=seed), k, pre_softmax=True)
    probs = torch.zeros(tokens, experts, dtype=torch.float64).scatter(1, indices, weights)
    return probs, probs != 0


# --- load-balancing loss


def balance_by_hand(probs, counts, total, k, coeff, keep=None):
    loss = 0.0
    experts = len(counts)
    for e in range(experts):
        mass = sum(row[e] for t, row in enumerate(probs.tolist()) if keep is None or keep[t])
        loss += counts[e] / (k * total) * mass / total
    return coeff * experts * loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tensor_total", [False, True])
def test_load_balancing_loss_values(dtype, tensor_total):
    probs = normal(50, 8).softmax(1).bfloat16().double()
    counts = torch.tensor([3, 0, 20, 7, 30, 10, 25, 5])
    expected = balance_by_hand(probs, counts.tolist(), 50, 2, 0.01)
    loss = load_balancing_loss(probs.to(dtype), counts, torch.tensor(50) if tensor_total else 50, 2, 8, 0.01)
    wide = torch.promote_types(dtype, torch.float32)
    assert loss.dtype is wide and loss.shape == ()
    truth = probs.to(dtype).double()
    expected = balance_by_hand(truth, counts.tolist(), 50, 2, 0.01)
    assert float(loss) == pytest.approx(expected, rel=8 * torch.finfo(wide).eps)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_balanced_routing_costs_the_coefficient(k):
    tokens, experts = 24, 8
    probs = torch.full((tokens, experts), 1 / experts)
    counts = torch.full((experts,), tokens * k // experts)
    assert float(load_balancing_loss(probs, counts, tokens, k, experts, 0.25)) == pytest.approx(0.25, rel=1e-6)


def test_padding_is_excluded():
    probs = normal(10, 4).softmax(1).requires_grad_()
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[2, 7, 9]] = True
    counts = torch.tensor([2, 1, 3, 1])
    loss = load_balancing_loss(probs, counts, 7, 1, 4, 1.0, padding_mask=mask)
    assert float(loss.detach()) == pytest.approx(float(load_balancing_loss(probs[~mask].detach(), counts, 7, 1, 4, 1.0)))
    loss.backward()
    assert probs.grad is not None and probs.grad[mask].eq(0).all() and probs.grad[~mask].ne(0).all()
    poisoned = probs.detach().masked_fill(mask[:, None], NAN).requires_grad_()
    again = load_balancing_loss(poisoned, counts, 7, 1, 4, 1.0, padding_mask=mask)
    again.backward()
    assert torch.equal(again, loss) and torch.equal(poisoned.grad, probs.grad)


def test_invariant_to_micro_batches():
    probs = normal(30, 8).softmax(1)
    counts = (probs > 0.2).sum(0)
    whole = load_balancing_loss(probs, counts, 30, 2, 8, 0.1)
    parts = [load_balancing_loss(part, counts, 30, 2, 8, 0.1) for part in probs.split(7)]
    torch.testing.assert_close(sum(parts), whole)


def test_sequences_side_by_side_add_up():
    probs = normal(6, 3, 4).softmax(-1)  # sequence, batch, expert
    counts = torch.tensor([[1, 2, 3, 0], [3, 3, 0, 0], [2, 2, 1, 1]])
    joint = load_balancing_loss(probs.reshape(6, 12), counts.reshape(12), 6, 1, 4, 0.5)
    single = [load_balancing_loss(probs[:, b], counts[b], 6, 1, 4, 0.5) for b in range(3)]
    torch.testing.assert_close(joint, sum(single))


@pytest.mark.parametrize("total", [0, torch.tensor(0), torch.tensor(0.0)])
def test_no_tokens_cost_nothing(total):
    probs = torch.zeros(0, 4, requires_grad=True)
    load_balancing_loss(probs, torch.zeros(4, dtype=torch.int64), total, 2, 4, 0.1).backward()
    assert probs.grad is not None and probs.grad.shape == (0, 4)
    probs = torch.full((3, 4), 0.25, requires_grad=True)
    padding = torch.ones(3, dtype=torch.bool)
    loss = load_balancing_loss(probs, torch.zeros(4), total, 2, 4, 0.1, padding_mask=padding)
    loss.backward()
    assert loss.item() == 0 and probs.grad is not None and probs.grad.eq(0).all()
    logits = torch.zeros(3, 4, requires_grad=True)
    for loss in (z_loss(logits, 0.1, padding), z_loss(logits[:0], 0.1), z_loss(logits[:0], 0.1, padding[:0])):
        loss.backward()
        assert loss.item() == 0
    assert logits.grad is not None and logits.grad.eq(0).all()


def test_gradient_reaches_the_router_and_is_linear_in_the_coefficient():
    hidden, weight = normal(20, 6), normal(6, 8, seed=1).requires_grad_()

    def gradient(coeff):
        routing_map, scores = routing_scores_for_aux_loss(hidden @ weight, 2, "softmax")
        loss = load_balancing_loss(scores, routing_map.sum(0), 20, 2, 8, coeff) + z_loss(hidden @ weight, coeff)
        return torch.autograd.grad(loss, weight)[0]

    assert gradient(0.1).abs().max() > 1e-4
    torch.testing.assert_close(gradient(0.4), 4 * gradient(0.1), rtol=1e-12, atol=0)
    assert gradient(0.0).eq(0).all()


# --- z-loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_z_loss_values(dtype):
    logits = 3 * normal(20, 8)
    truth = logits.to(dtype).tolist()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in truth) / 20 * 1e-3
    loss = z_loss(logits.to(dtype), 1e-3)
    wide = torch.promote_types(dtype, torch.float32)
    assert loss.dtype is wide and loss.shape == ()
    assert float(loss) == pytest.approx(expected, rel=8 * torch.finfo(wide).eps)


def test_z_loss_excludes_padding():
    logits = normal(4, 5, 8)
    mask = torch.arange(20).reshape(4, 5) % 3 == 0
    poisoned = logits.masked_fill(mask[..., None], NAN).requires_grad_()
    loss = z_loss(poisoned, 0.1, mask)
    torch.testing.assert_close(loss.detach(), z_loss(logits[~mask], 0.1))
    loss.backward()
    assert poisoned.grad is not None and poisoned.grad[mask].eq(0).all() and poisoned.grad[~mask].ne(0).all()


def test_z_loss_of_large_logits():
    assert float(z_loss(torch.full((2, 2), 1e4), 1.0)) == pytest.approx((1e4 + math.log(2)) ** 2)
    assert z_loss(torch.full((2, 2), 6e4, dtype=torch.float16), 1.0).isfinite()


def test_gradcheck_of_the_losses():
    logits = normal(5, 4).requires_grad_()
    mask = torch.tensor([False, True, False, False, True])
    counts = torch.tensor([2, 1, 0, 3])
    for op in (
        lambda x: load_balancing_loss(x.softmax(1), counts, 3, 2, 4, 0.7, mask),
        lambda x: z_loss(x, 0.7, mask),
        lambda x: routing_scores_for_aux_loss(x, 2, "softmax", mask)[1],
        lambda x: routing_scores_for_aux_loss(x, 2, "sigmoid", mask)[1],
        lambda x: routing_scores_for_aux_loss(x, 2, "sqrtsoftplus", mask)[1],
        lambda x: sinkhorn(x, tol=0.0, max_iterations=3),
    ):
        assert gradcheck(op, logits)
        assert gradgradcheck(op, logits)


# --- scores for the auxiliary loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_routing_scores_for_aux_loss_values(dtype, score_function):
    logits = normal(12, 8)
    formulas = {"softmax": torch.exp, "sigmoid": torch.sigmoid, "sqrtsoftplus": lambda x: x.exp().log1p().sqrt()}
    each = formulas[score_function](logits)
    truth = each / each.sum(1, keepdim=True)
    routing_map, scores = routing_scores_for_aux_loss(logits.to(dtype), 3, score_function)
    wide = torch.promote_types(dtype, torch.float32)
    assert routing_map.dtype is torch.bool and scores.dtype is wide
    torch.testing.assert_close(scores.double(), truth, rtol=8 * torch.finfo(wide).eps, atol=0)
    expected = torch.zeros(12, 8, dtype=torch.bool).scatter(1, topk_router(logits, 3)[1], True)
    assert torch.equal(routing_map, expected)


def test_aux_map_breaks_ties_to_the_lowest_expert():
    routing_map, _ = routing_scores_for_aux_loss(torch.zeros(2, 5), 2, "sigmoid")
    assert routing_map.int().tolist() == [[1, 1, 0, 0, 0]] * 2


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_aux_scores_exclude_padding(score_function):
    logits = normal(6, 4)
    mask = torch.tensor([True, False, False, True, False, True])
    poisoned = logits.masked_fill(mask[:, None], NAN).requires_grad_()
    routing_map, scores = routing_scores_for_aux_loss(poisoned, 2, score_function, mask)
    clean_map, clean_scores = routing_scores_for_aux_loss(logits, 2, score_function)
    assert torch.equal(routing_map, clean_map & ~mask[:, None])
    assert torch.equal(scores.detach(), clean_scores.masked_fill(mask[:, None], 0))
    scores.square().sum().backward()
    assert poisoned.grad is not None and poisoned.grad[mask].eq(0).all() and poisoned.grad.isfinite().all()


# --- Sinkhorn


def published_sinkhorn(cost, tol=1e-4):
    """The algorithm as published, on exp(cost) itself."""
    kernel = cost.exp()
    d1, error = torch.ones(cost.shape[1], dtype=cost.dtype), INF
    while error > tol:
        previous = d1
        d0 = 1 / cost.shape[0] / ((d1 * kernel).sum(1) + 1e-8)
        d1 = 1 / cost.shape[1] / ((d0[:, None] * kernel).sum(0) + 1e-8)
        error = float((previous - d1).abs().mean())
    return d1 * kernel * d0[:, None]


@pytest.mark.parametrize("scale", [0.1, 1, 3, 10])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 100.0])
def test_sinkhorn_equals_the_published_algorithm(scale, shift):
    cost = scale * normal(24, 8) + shift
    torch.testing.assert_close(sinkhorn(cost), published_sinkhorn(cost), rtol=1e-11, atol=0)


def test_sinkhorn_is_even_for_every_dtype():
    cost = normal(24, 8)
    truth = sinkhorn(cost, tol=1e-12)
    torch.testing.assert_close(truth.sum(1), torch.full((24,), 1 / 24).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(truth.sum(0), torch.full((8,), 1 / 8).double(), rtol=1e-5, atol=0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plan = sinkhorn(cost.to(dtype), tol=1e-12)
        assert plan.dtype is dtype
        assert ((plan.double() - truth).abs() <= torch.finfo(dtype).eps * truth + 2**-24).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peak", [100.0, 1000.0, 1e4, 1e38])
def test_sinkhorn_of_large_logits_is_finite(dtype, peak):
    for cost in (torch.eye(4) * peak, -torch.eye(4) * peak, torch.full((6, 4), peak), torch.full((6, 4), -peak)):
        plan = sinkhorn(cost.to(dtype))
        assert plan.isfinite().all()
        assert (plan.double().sum(1) * len(plan) > 0.99).all()


def test_sinkhorn_is_blind_to_a_shift_of_a_token():
    cost = normal(24, 8)
    shifted = cost + torch.linspace(-200, 200, 24, dtype=torch.float64)[:, None]
    torch.testing.assert_close(sinkhorn(shifted), sinkhorn(cost), rtol=2e-3, atol=0)


def test_sinkhorn_ends_on_nan_and_on_what_does_not_converge():
    assert sinkhorn(torch.tensor([[NAN, 0.0], [0.0, 0.0]])).isnan().any()
    hard = 100 * normal(8, 16)
    assert sinkhorn(hard, tol=0.0, max_iterations=20).isfinite().all()
    cost = normal(8, 4)
    assert not torch.equal(sinkhorn(cost, tol=0.0, max_iterations=1), sinkhorn(cost, tol=0.0, max_iterations=2))


def test_sinkhorn_keeps_forbidden_experts_at_zero():
    cost = torch.tensor([[0.0, -INF, 1.0], [2.0, 0.0, -INF], [-INF, 1.0, 0.0], [-INF, -INF, -INF]])
    plan = sinkhorn(cost)
    assert torch.equal(plan == 0, cost.isneginf())


def test_sinkhorn_without_tokens():
    cost = torch.zeros(0, 4, requires_grad=True)
    plan = sinkhorn(cost)
    plan.sum().backward()
    assert plan.shape == (0, 4) and plan is not cost and cost.grad is not None


# --- bias updates


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16])
def test_updated_expert_bias(dtype):
    loads = torch.tensor([[1, 5, 3, 3], [2, 2, 2, 2]]).to(dtype)
    bias = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    before = loads.clone(), bias.detach().clone()
    updated = updated_expert_bias(loads, bias, 1e-3)
    step = torch.tensor([[1e-3, -1e-3, 0.0, 0.0], [0.0] * 4])
    assert updated.dtype is torch.float32 and not updated.requires_grad
    assert torch.equal(updated, bias.detach() + step)
    assert torch.equal(loads, before[0]) and torch.equal(bias, before[1])
    assert torch.equal(updated_expert_bias(loads[0], bias[0], 1e-3), updated[0])


def test_updated_expert_bias_sees_a_difference_of_one_token_in_large_loads():
    loads = torch.tensor([2**40 + 1, 2**40, 2**40 - 1])
    assert updated_expert_bias(loads, torch.zeros(3), 1.0).tolist() == [-1.0, 0.0, 1.0]


def test_updated_expert_bias_reduces_a_copy(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loads = torch.tensor([[1, 9], [4, 4]]).T  # not contiguous
        bias = torch.zeros(2, 2)
        before = loads.clone()
        assert torch.equal(
            updated_expert_bias(loads, bias, 0.5, group=dist.group.WORLD), updated_expert_bias(loads, bias, 0.5)
        )
        assert torch.equal(loads, before)
    finally:
        dist.destroy_process_group()


def test_expert_bias_balances_a_skewed_router():
    logits = normal(400, 8).float() + torch.linspace(0, 2, 8)
    bias = torch.zeros(8)
    for _ in range(200):
        indices = topk_router(logits, 2, score_function="sigmoid", expert_bias=bias)[1]
        bias = updated_expert_bias(indices.flatten().bincount(minlength=8), bias, 0.005)
    assert indices.flatten().bincount(minlength=8).max() < 1.2 * 100


# --- capacity


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((16, 4, 1.0), 4),
        ((17, 4, 1.0), 5),
        ((16, 4, 1.3), 6),
        ((0, 4, 1.0), 0),
        ((4, 8, 1.0, 4), 4),
        ((64, 8, 1.0, 4), 8),
    ],
)
def test_get_capacity(args, expected):
    assert get_capacity(*args) == expected


def capacity_by_hand(probs, routing_map, capacity, drop_policy, pad):
    """The kept map, one expert at a time."""
    tokens, experts = probs.shape
    kept = torch.zeros(tokens, experts, dtype=torch.bool)
    for e in range(experts):

        def rank(t, e=e):
            p = float(probs[t, e])
            by_prob = (math.isnan(p), -p) if drop_policy == "probs" else ()
            return (not routing_map[t, e], *by_prob, t)

        for t in sorted(range(tokens), key=rank)[:capacity]:
            kept[t, e] = pad or bool(routing_map[t, e])
    return kept


@pytest.mark.parametrize("drop_policy", ["probs", "position"])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("capacity_factor", [0.0, 0.3, 1.0, 1.5])
def test_apply_capacity_matches_a_loop(drop_policy, pad, capacity_factor):
    probs, routing_map = routed(30, 8, 2)
    probs = (probs * 8).round() / 8  # ties
    capacity = get_capacity(60, 8, capacity_factor)
    kept = capacity_by_hand(probs, routing_map, capacity, drop_policy, pad)
    for some_map in (routing_map, routing_map.int(), routing_map * 0.5):
        final_probs, final_map = apply_capacity(probs, some_map, 2, capacity_factor, drop_policy, pad)
        assert final_map.dtype is torch.bool and torch.equal(final_map, kept)
        assert torch.equal(final_probs, torch.where(kept, probs, 0.0))
    if pad:
        assert (kept.sum(0) == capacity).all()


@pytest.mark.parametrize("drop_policy", ["probs", "position"])
def test_capacity_ties_keep_the_earliest_tokens(drop_policy):
    probs, routing_map = torch.full((100, 2), 0.5), torch.ones(100, 2)
    _, final_map = apply_capacity(probs, routing_map, 2, 0.1, drop_policy)
    assert final_map.nonzero()[:, 0].unique().tolist() == list(range(10))


def test_routed_tokens_of_probability_zero_come_before_unrouted_ones():
    probs = torch.tensor([[0.9], [0.0], [-0.1], [NAN], [0.3]])
    routing_map = torch.tensor([[0], [1], [1], [1], [1]])
    keep = [apply_capacity(probs, routing_map, 1, c / 5, "probs", True)[1][:, 0].tolist() for c in (1, 2, 4, 5)]
    assert [[t for t in range(5) if kept[t]] for kept in keep] == [[4], [1, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_capacity_above_the_number_of_tokens_keeps_everything():
    probs, routing_map = routed(6, 4, 2)
    final_probs, final_map = apply_capacity(probs, routing_map, 2, 10.0)
    assert torch.equal(final_probs, probs) and torch.equal(final_map, routing_map)
    assert apply_capacity(probs, routing_map, 2, 10.0, pad_to_capacity=True)[1].all()


def test_capacity_gradient_dtype_and_arguments():
    probs, routing_map = routed(10, 4, 2)
    leaf = probs.bfloat16().requires_grad_()
    before = leaf.detach().clone(), routing_map.clone()
    final_probs, final_map = apply_capacity(leaf, routing_map, 2, 0.5)
    assert final_probs.dtype is torch.bfloat16
    final_probs.sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad != 0, final_map)
    assert torch.equal(leaf, before[0]) and torch.equal(routing_map, before[1])
    empty_probs, empty_map = apply_capacity(probs[:0], routing_map[:0], 2, 1.0, pad_to_capacity=True)
    assert empty_probs.shape == empty_map.shape == (0, 4)
    poisoned = torch.tensor([[0.5], [NAN]])
    assert apply_capacity(poisoned, torch.ones(2, 1), 1, 0.5)[0].tolist() == [[0.5], [0.0]]


# --- padding of the map


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_pad_routing_map_matches_a_loop(dtype, multiple):
    routing_map = routed(30, 8, 2)[1]
    routing_map[:, 5] = False
    expected = routing_map.clone()
    for e in range(8):
        for t in range(30):
            if expected[:, e].sum() % multiple == 0:
                break
            expected[t, e] = True
    for x in (routing_map.to(dtype), routing_map.to(dtype).T.contiguous().T):
        before = x.clone()
        padded = pad_routing_map(x, multiple)
        assert padded.dtype is dtype and torch.equal(padded, expected.to(dtype))
        assert torch.equal(x, before) and padded.data_ptr() != x.data_ptr()


def test_pad_routing_map_keeps_the_values_it_finds():
    padded = pad_routing_map(torch.tensor([[0.0, 0.5], [0.25, 0.0], [0.0, -3.0], [0.0, 0.0]]), 2)
    assert padded.tolist() == [[1.0, 0.5], [0.25, 0.0], [0.0, -3.0], [0.0, 0.0]]


def test_pad_routing_map_refuses_what_it_cannot_fill():
    routing_map = torch.ones(5, 3, dtype=torch.bool)
    routing_map[:, 0] = False
    routing_map[1:, 1] = False
    with pytest.raises(ValueError, match=r"pad_multiple.*5 tokens.*expert 2 needs 8 rows.*got 4"):
        pad_routing_map(routing_map, 4)
    assert pad_routing_map(routing_map, 5).sum(0).tolist() == [0, 5, 5]
    assert pad_routing_map(routing_map[:0], 4).shape == (0, 3)


# --- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, m: load_balancing_loss(x, torch.zeros(5), 1, 2, 8, 0.1), ValueError, "tokens_per_expert"),
        (lambda x, m: load_balancing_loss(x, torch.zeros(8), 1, 2, 3, 0.1), ValueError, "num_experts=3"),
        (lambda x, m: load_balancing_loss(x, torch.zeros(8), 1, 0, 8, 0.1), ValueError, "topk"),
        (lambda x, m: load_balancing_loss(x, torch.zeros(8), 1, 2, 8, 0.1, m[:2]), ValueError, "padding_mask"),
        (lambda x, m: load_balancing_loss(x.int(), torch.zeros(8), 1, 2, 8, 0.1), TypeError, "probs"),
        (lambda x, m: load_balancing_loss(-x - 1, torch.zeros(8), 1, 2, 8, 0.1), ValueError, "logits.*a value of -"),
        (lambda x, m: z_loss(x, 0.1, m[:2]), ValueError, "padding_mask"),
        (lambda x, m: z_loss(x, 0.1, m.int()), TypeError, "padding_mask.*True for padding"),
        (lambda x, m: z_loss(x.int(), 0.1), TypeError, "logits"),
        (lambda x, m: routing_scores_for_aux_loss(x, 9, "softmax"), ValueError, r"\(8\), got 9"),
        (lambda x, m: routing_scores_for_aux_loss(x, 2, "tanh"), ValueError, "score_function"),
        (lambda x, m: sinkhorn(x[0]), ValueError, "cost"),
        (lambda x, m: sinkhorn(x.int()), TypeError, "cost"),
        (lambda x, m: sinkhorn(x, max_iterations=0), ValueError, "max_iterations"),
        (lambda x, m: updated_expert_bias(x[0], x[0, :5], 0.1), ValueError, "tokens_per_expert"),
        (lambda x, m: updated_expert_bias(x[0], x[0].int(), 0.1), TypeError, "expert_bias"),
        (lambda x, m: get_capacity(8, 0, 1.0), ValueError, "num_experts"),
        (lambda x, m: get_capacity(8, 2, -1.0), ValueError, "capacity_factor"),
        (lambda x, m: get_capacity(8, 2, NAN), ValueError, "capacity_factor"),
        (lambda x, m: apply_capacity(x, x[:2], 2, 1.0), ValueError, "routing_map"),
        (lambda x, m: apply_capacity(x, x, 2, 1.0, "random"), ValueError, "'probs', 'position', got 'random'"),
        (lambda x, m: apply_capacity(x, x.to("meta"), 2, 1.0), ValueError, "meta"),
        (lambda x, m: pad_routing_map(x, 0), ValueError, "pad_multiple"),
        (lambda x, m: pad_routing_map(x[0], 2), ValueError, "routing_map"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(3, 8), torch.zeros(3, dtype=torch.bool))


def test_losses_compile_whole():
    def step(logits, mask):
        routing_map, scores = routing_scores_for_aux_loss(logits, 2, "sigmoid", mask)
        loss = load_balancing_loss(scores, routing_map.sum(0), (~mask).sum(), 2, 4, 0.1, mask)
        probs, kept = apply_capacity(scores, routing_map, 2, 1.0, "probs", True)
        return loss + z_loss(logits, 0.1, mask) + probs.sum() + pad_routing_map(kept, 2).sum()

    logits, mask = normal(8, 4).float(), torch.arange(8) > 5
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, mask), step(logits, mask))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu_without_a_sync():
    probs, routing_map = routed(64, 8, 2)
    mask = torch.arange(64) > 50

    def run(probs, routing_map, mask):
        final_probs, final_map = apply_capacity(probs, routing_map, 2, 0.8, "probs", True)
        loss = load_balancing_loss(probs, routing_map.sum(0), (~mask).sum(), 2, 8, 0.1, mask)
        bias = updated_expert_bias(routing_map.sum(0), probs[0], 0.1)
        return final_probs, final_map, pad_routing_map(routing_map, 4), loss, z_loss(probs, 0.1, mask), bias

    on_gpu = [x.cuda() for x in (probs, routing_map, mask)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, expected in zip(results, run(probs, routing_map, mask), strict=True):
        torch.testing.assert_close(result.cpu(), expected)
    torch.testing.assert_close(sinkhorn(on_gpu[0]).cpu(), sinkhorn(probs))


PROBS, COUNTS = torch.rand(12, 4), torch.full((4,), 6.0)
UNFIT = {
    "tokens below 0": (lambda: moe_utils.switch_load_balancing_loss_func(PROBS, COUNTS, -1, 2, 4, 0.1), "total_num_tokens"),
    "no number of tokens": (
        lambda: moe_utils.switch_load_balancing_loss_func(PROBS, COUNTS, math.nan, 2, 4, 0.1),
        "total_num_tokens must be a number of tokens, at least 0, got nan",
    ),
    "tokens of a bool": (lambda: moe_utils.switch_load_balancing_loss_func(PROBS, COUNTS, True, 2, 4, 0.1), "got bool"),
    "tokens of several": (
        lambda: moe_utils.switch_load_balancing_loss_func(PROBS, COUNTS, COUNTS, 2, 4, 0.1),
        "a number or a tensor of one element, got shape",
    ),
    "coefficient": (
        lambda: moe_utils.switch_load_balancing_loss_func(PROBS, COUNTS, 12, 2, 4, None),
        "coeff must be a number",
    ),
    "z-loss": (lambda: moe_utils.z_loss_func(PROBS, "x"), "coeff must be a number, got str"),
    "sinkhorn": (lambda: moe_utils.sinkhorn(PROBS, tol=None), "tol must be a number"),
    "bias": (lambda: moe_utils.get_updated_expert_bias(COUNTS, COUNTS, [1]), "update_rate must be a number, got list"),
    "least capacity": (lambda: moe_utils.get_capacity(12, 4, 1.0, min_capacity=7.5), "min_capacity must be an integer"),
    "capacity below 0": (lambda: moe_utils.get_capacity(12, 4, 1.0, min_capacity=-3), "min_capacity must be at least 0"),
    "no capacity": (
        lambda: moe_utils.get_capacity(12, 4, math.inf),
        "capacity_factor must be finite and at least 0, got inf",
    ),
    "scale": (lambda: moe_utils.MoEAuxLossAutoScaler.set_loss_scale("x"), "set_loss_scale: scale must be a number, got str"),
    "scales": (lambda: moe_utils.MoEAuxLossAutoScaler.set_loss_scale(COUNTS), "scale must be a number or a tensor of one"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_numbers_that_are_none(name):
    call, said = UNFIT[name]
    with pytest.raises((TypeError, ValueError), match=said):
        call()


def test_numbers_of_any_kind():
    expected = moe_utils.switch_load_balancing_loss_func(PROBS, COUNTS, 12, 2, 4, 0.1)
    for tokens in (12.0, torch.tensor(12), torch.tensor([12.0])):
        found = moe_utils.switch_load_balancing_loss_func(PROBS, COUNTS, tokens, 2, 4, torch.tensor(0.1))
        assert found > 0 and torch.allclose(found, expected)
    assert moe_utils.switch_load_balancing_loss_func(PROBS, COUNTS, 0, 2, 4, 0.1) == 0
    assert moe_utils.get_capacity(12, 4, 1.0, min_capacity=9) == 9
