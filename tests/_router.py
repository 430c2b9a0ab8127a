"""The router by hand: scores, choice and weights of one token at a time, in float64."""

from __future__ import annotations

import math

import torch

from moekit.ops.topk import SCORE_FUNCTIONS

# Every row of the table: a score that a backend or this file does not know fails everywhere below.
VARIANTS = [{"score_function": name} for name in SCORE_FUNCTIONS] + [{"score_function": "softmax", "pre_softmax": True}]
BY_HAND = {
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "sqrtsoftplus": lambda x: math.sqrt(max(x, 0) + math.log1p(math.exp(-abs(x)))),
}


def by_hand(row, k, group=None):
    """Indices of the k largest of a list: ties to the lowest, NaN last; ``group`` is (num_groups, group_topk)."""

    def best(values, n):
        return sorted(range(len(values)), key=lambda e: (math.isnan(values[e]), -values[e], e))[:n]

    if group is None:
        return best(row, k)
    num_groups, group_topk = group
    size = len(row) // num_groups
    parts = [row[g * size : (g + 1) * size] for g in range(num_groups)]
    sums = [sum(part[e] for e in best(part, max(1, k // group_topk))) for part in parts]
    chosen = set(best(sums, group_topk))
    inside = [e for e in range(len(row)) if e // size in chosen]
    return [inside[i] for i in best([row[e] for e in inside], k)]


def router_by_hand(logits, k, score_function, pre_softmax=False, group=None, scaling_factor=1.0, bias=None):
    """Weights and indices in float64, one token at a time."""
    all_weights, all_indices = [], []
    for row in logits.double().tolist():
        exps = [math.exp(x - max(row)) for x in row]
        scores = row
        if score_function != "softmax":
            scores = [BY_HAND[score_function](x) for x in row]
        elif pre_softmax:
            scores = [x / sum(exps) for x in exps]
        compared = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        indices = by_hand(compared, k, group)
        if score_function == "softmax" and not pre_softmax:
            weights = [exps[e] / sum(exps[i] for i in indices) for e in indices]
        else:
            weights = [scores[e] for e in indices]
            if score_function != "softmax" and k > 1:
                weights = [w / sum(weights) for w in weights]
        all_weights.append([w * scaling_factor for w in weights])
        all_indices.append(indices)
    return torch.tensor(all_weights, dtype=torch.float64), torch.tensor(all_indices)


def bf16_logits(tokens, experts, seed=0, dtype=torch.float64):
    """Logits that bfloat16 holds exactly, so that every dtype sees the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, experts, generator=generator)).bfloat16().to(dtype)
