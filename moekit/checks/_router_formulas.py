"""What a router chooses and what it is charged for, in float64: as :mod:`moekit.checks._formulas`."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best(scores: list[float], k: int) -> list[int]:
    """The ``k`` highest, the lowest index first among equals; NaN is below everything."""
    rank = [-math.inf if math.isnan(score) else score for score in scores]
    return sorted(range(len(rank)), key=lambda e: (math.isnan(scores[e]), -rank[e], e))[:k]


def best_in_groups(scores: list[float], k: int, num_groups: int, group_topk: int) -> list[int]:
    """The ``k`` highest within the best groups: those with the largest sums of their ``k // group_topk`` highest."""
    size = len(scores) // num_groups
    groups = [scores[g * size : (g + 1) * size] for g in range(num_groups)]
    sums = [sum(sorted(group, reverse=True)[: max(1, k // group_topk)]) for group in groups]
    chosen = best(sums, group_topk)
    return best([score if e // size in chosen else -math.inf for e, score in enumerate(scores)], k)


def topk_routing(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(probs [T, E], map [T, E])``: softmax before or after the choice, or sigmoids that sum to one."""
    scores = logits.sigmoid() if score_function == "sigmoid" else logits.softmax(1) if use_pre_softmax else logits
    compared = (scores if expert_bias is None else scores + expert_bias).tolist()
    if group_topk and num_groups:
        chosen = [best_in_groups(row, topk, num_groups, group_topk) for row in compared]
    else:
        chosen = [best(row, topk) for row in compared]
    indices = torch.tensor(chosen)
    weights = scores.gather(1, indices)
    if score_function == "sigmoid" and topk > 1:
        weights = weights / weights.sum(1, keepdim=True)
    elif score_function == "softmax" and not use_pre_softmax:
        weights = weights.softmax(1)
    weights = weights if scaling_factor is None else weights * scaling_factor
    routing_map = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, indices, True)
    return torch.zeros_like(logits).scatter(1, indices, weights), routing_map


def group_limited_topk(
    scores: Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """``(scores [T, K], indices [T, K])``."""
    indices = torch.tensor([best_in_groups(row, topk, num_groups, group_topk) for row in scores.tolist()])
    return scores.gather(1, indices), indices


def scores_for_aux_loss(
    logits: Tensor, topk: int, score_function: str, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(map [T, E], scores [T, E])``, scores summing to one; nothing for padding, which is True."""
    scores = logits.softmax(1)
    if score_function == "sigmoid":
        scores = logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    kept = torch.ones(logits.shape[0], 1, dtype=torch.bool) if padding_mask is None else ~padding_mask[:, None]
    indices = torch.tensor([best(row, topk) for row in logits.tolist()])
    routing_map = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, indices, True)
    return routing_map & kept, scores * kept


def balance_loss(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int,
    topk: int,
    num_experts: int,
    moe_aux_loss_coeff: float,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """``coeff * E * sum_e (counts_e / (K * N)) * (sum_t probs_te / N)`` over what is not padding (True)."""
    kept = probs if padding_mask is None else probs[~padding_mask]
    load = tokens_per_expert.double() / (topk * total_num_tokens)
    return moe_aux_loss_coeff * num_experts * (load * kept.sum(0) / total_num_tokens).sum()


def z_loss(logits: Tensor, z_loss_coeff: float, padding_mask: Tensor | None = None) -> Tensor:
    """The mean of ``logsumexp ** 2`` over what is not padding (True), times the coefficient."""
    kept = logits if padding_mask is None else logits[~padding_mask]
    return kept.logsumexp(1).square().mean() * z_loss_coeff


def sinkhorn(cost: Tensor, tol: float = 1e-4) -> Tensor:
    """Sinkhorn's iteration until the columns' factors change by at most ``tol`` in the mean. exp(700) is a float64."""
    plan = cost.exp()
    columns, change = torch.ones_like(plan[0]), math.inf
    while change > tol:
        before = columns
        rows = 1 / (plan.shape[0] * ((plan * before).sum(1) + 1e-8))
        columns = 1 / (plan.shape[1] * ((plan * rows[:, None]).sum(0) + 1e-8))
        change = float((columns - before).abs().mean())
    return plan * columns * rows[:, None]


def capacity(num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int | None = None) -> int:
    """An expert's even share times the factor, rounded up."""
    return max(math.ceil(num_tokens / num_experts * capacity_factor), min_capacity or 0)


def token_dropping(
    routing_probs: Tensor,
    routing_map: Tensor,
    router_topk: int,
    capacity_factor: float,
    drop_policy: str = "probs",
    pad_to_capacity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each expert keeps ``ceil(T * K / E * factor)`` tokens: its most probable, or its first."""
    tokens, experts = routing_probs.shape
    limit = capacity(tokens * router_topk, experts, capacity_factor)
    kept = torch.zeros(tokens, experts, dtype=torch.bool)
    for e in range(experts):
        value = (routing_probs if drop_policy == "probs" else routing_map.double())[:, e].tolist()
        for t in best(value, limit):
            kept[t, e] = pad_to_capacity or bool(routing_map[t, e])
    return routing_probs * kept, kept


def pad_routing_map(routing_map: Tensor, pad_multiple: int) -> Tensor:
    """Each expert's first unrouted tokens are routed too, until its count is a multiple."""
    padded = routing_map.clone()
    for e in range(routing_map.shape[1]):
        missing = -int((routing_map[:, e] != 0).sum()) % pad_multiple
        for t in [t for t in range(routing_map.shape[0]) if routing_map[t, e] == 0][:missing]:
            padded[t, e] = 1
    return padded


def updated_bias(tokens_per_expert: Tensor, expert_bias: Tensor, expert_bias_update_rate: float) -> Tensor:
    """Up by the rate where an expert has fewer tokens than the mean, down where more (arXiv 2408.15664)."""
    load = tokens_per_expert.double()
    return expert_bias + torch.sign(load.mean() - load) * expert_bias_update_rate
