"""From counts to figures: pure functions of tensors on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from moekit.monitor._totals import EXTRA

# What each figure is, in the order in which tables have them.
FIGURES = {
    "tokens": "tokens, padding left out",
    "load_max_over_mean": "slots of the busiest expert, as a multiple of the mean; 1 is even",
    "load_cv": "standard deviation of the experts' slots over their mean; 0 is even",
    "load_entropy": "entropy of the experts' shares over its maximum; 1 is even, 0 all on one expert",
    "dead_experts": "experts without a slot",
    "dropped_share": "share of slots of no expert (capacity, -1 given) among those of tokens that are no padding",
    "router_entropy": "mean entropy of a token's scores, in nats",
    "router_z": "mean squared logsumexp of a token's logits",
}


def figures(counts: Tensor, sums: Tensor) -> dict[str, float]:
    """The figures of one router from ``counts [E + 2]`` and ``sums [2]``; NaN where there is nothing to tell from."""
    loads = counts[:-EXTRA].double()
    dropped, tokens = (float(value) for value in counts[-EXTRA:])
    total, experts = float(loads.sum()), loads.shape[0]
    mean = total / experts if total else math.nan
    entropy = float(torch.special.entr(loads / total).sum()) / math.log(experts) if total and experts > 1 else math.nan
    per_token = (sums.double() / tokens).tolist() if tokens else [math.nan] * len(sums)
    return {
        "tokens": tokens,
        "load_max_over_mean": float(loads.max()) / mean,
        "load_cv": float(loads.std(correction=0)) / mean,
        "load_entropy": 1.0 if total and experts == 1 else entropy,
        "dead_experts": float((loads == 0).sum()) if tokens else math.nan,
        "dropped_share": dropped / (total + dropped) if total + dropped else math.nan,
        "router_entropy": per_token[0],
        "router_z": per_token[1],
    }


def summary(layers: Iterable[dict[str, float]]) -> dict[str, float]:
    """Means over layers that had tokens; of tokens the most, of dead experts the sum, and the worst maximum besides."""
    layers = [layer for layer in layers if layer["tokens"]]
    if not layers:
        return {**dict.fromkeys(FIGURES, math.nan), "tokens": 0.0, "worst_load_max_over_mean": math.nan}
    found = {}
    for name in FIGURES:
        values = [layer[name] for layer in layers if not math.isnan(layer[name])]
        found[name] = sum(values) / len(values) if values else math.nan
    found["tokens"] = max(layer["tokens"] for layer in layers)
    found["dead_experts"] = sum(layer["dead_experts"] for layer in layers)
    worst = [layer["load_max_over_mean"] for layer in layers if not math.isnan(layer["load_max_over_mean"])]
    return {**found, "worst_load_max_over_mean": max(worst, default=math.nan)}
