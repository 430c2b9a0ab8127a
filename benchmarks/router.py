"""Time a router with its balance loss, forward and backward: moekit, Megatron-core, Transformers.

::

    python benchmarks/router.py                            # on a CPU, T=16384
    python benchmarks/router.py --device cuda --peers DIR  # packages in DIR besides those that are installed

Contenders take turns in one process, in a new order each round; on a GPU as CUDA graphs, where they do not wait for it, so
that it is the GPU that is timed. Peak memory is what is allocated beyond the logits, at
most, during one forward and backward. moekit's time includes the tables of the routing, which the others do not build.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _memory
import torch
import torch.nn.functional as F
from torch import Tensor

import moekit

PEERS = Path(__file__).resolve().parent.parent / ".venv" / "peers"
COEFF, SCALE, GROUPS, GROUP_TOPK = 0.01, 2.5, 8, 4
SHAPES = {"Qwen3: softmax, E=128, K=8": (128, False), "DeepSeek-V3: sigmoid, bias, groups, E=256, K=8": (256, True)}
K = 8

# (logits, bias) to (weights, loss)
Router = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(grouped: bool) -> Router:
    """``moekit.route`` and ``moekit.balance_loss``."""

    def run(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {}
        if grouped:
            options = {"score": "sigmoid", "bias": bias, "num_groups": GROUPS, "group_topk": GROUP_TOPK, "scale": SCALE}
        routing = moekit.route(logits, K, **options)
        assert routing.weights is not None
        return routing.weights, moekit.balance_loss(routing, COEFF)

    return run


def transformers_router(grouped: bool) -> Router | None:
    """The lines of Qwen3-MoE's or DeepSeek-V3's router, and Transformers' loss."""
    try:
        module = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    except ImportError:
        return None

    def run(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        experts = logits.shape[1]
        if grouped:
            scores = logits.sigmoid()
            compared = scores + bias
            best = compared.view(-1, GROUPS, experts // GROUPS).topk(2, dim=-1)[0].sum(dim=-1)
            kept = torch.zeros_like(best).scatter(1, best.topk(GROUP_TOPK, dim=-1, sorted=False)[1], 1).bool()
            outside = ~kept.unsqueeze(-1).expand(-1, GROUPS, experts // GROUPS).reshape(-1, experts)
            weights = scores.gather(1, compared.masked_fill(outside, float("-inf")).topk(K, dim=-1, sorted=False)[1])
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * SCALE
        else:
            weights = F.softmax(logits, dim=-1, dtype=torch.float).topk(K, dim=-1)[0]
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, module.load_balancing_loss_func((logits,), experts, K) * COEFF

    return run


def megatron_router(grouped: bool) -> Router | None:
    """Megatron-core's functions, as its router calls them."""
    try:
        moe = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    except Exception:  # whatever keeps a peer from being imported, it is skipped
        return None

    def run(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        score = "sigmoid" if grouped else "softmax"
        options: dict[str, Any] = {"use_pre_softmax": False}
        if grouped:
            options = {"num_groups": GROUPS, "group_topk": GROUP_TOPK, "scaling_factor": SCALE, "expert_bias": bias}
        weights, _ = moe.topk_routing_with_score_function(logits, K, score_function=score, **options)
        chosen, scores = moe.compute_routing_scores_for_aux_loss(logits, K, score)
        loss = moe.switch_load_balancing_loss_func(scores, chosen.sum(0), len(logits), K, logits.shape[1], COEFF)
        return weights, loss

    return run


def step(router: Router, logits: Tensor, bias: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward; the gradient of the logits."""
    weights, loss = router(logits, bias)
    grad = grad if weights.shape == grad.shape else grad.new_ones(()).expand(weights.shape)
    return torch.autograd.grad((weights, loss), logits, (grad, torch.ones_like(loss)))[0]


def peak(call: Callable[[], Any], device: str) -> int:
    """Bytes that are allocated at most while ``call`` runs."""
    if device == "cuda":
        return _memory.peak(call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events: Any = profile.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of ``call``: what the GPU takes, however long launching takes; ``call`` if it waits for the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return call
    return graph.replay


def times(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """The median seconds of each."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        calls = {name: captured(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    generator = random.Random(0)
    for _ in range(rounds):
        for name in generator.sample(list(calls), len(calls)):
            wait()
            start = time.perf_counter()
            calls[name]()
            wait()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[2:]) for name, found in samples.items()}


def main() -> int:
    """Print a line a shape and contender, and write them to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", type=Path, default=PEERS, help="a folder of packages to compare with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.append(str(options.peers))
    found = []
    for shape, (experts, grouped) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(options.tokens, experts, generator=generator).to(options.device).requires_grad_()
        bias = torch.randn(experts, generator=generator).mul(0.1).to(options.device)
        grad = torch.randn(options.tokens, K, generator=generator).to(options.device)
        makers = {"moekit": ours, "Megatron-core": megatron_router, "Transformers": transformers_router}
        routers = {name: router for name, make in makers.items() if (router := make(grouped)) is not None}
        calls = {name: functools.partial(step, router, logits, bias, grad) for name, router in routers.items()}
        peaks = {name: peak(call, options.device) for name, call in calls.items()}
        seconds = times(calls, options.rounds, options.device)
        for name in calls:
            row = {"shape": shape, "name": name, "ms": seconds[name] * 1e3, "peak_mib": peaks[name] / 2**20}
            row |= {"slower": seconds[name] / seconds["moekit"], "logits_mib": logits.nbytes / 2**20}
            found.append(row)
            print("{shape:48s} {name:14s} {ms:9.3f} ms {slower:7.2f}x {peak_mib:9.1f} MiB at the peak".format(**row))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
