"""Time a layer of ``moekit.nn`` against its operators called by hand: what the module adds.

::

    python benchmarks/layer.py [--device cuda]

Forward and backward in training, with a balance loss; the two take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import moekit
from moekit.megatron import router_gating_linear
from moekit.nn import MoE

SIZES = {"small": (256, 256, 128, 16, 2), "medium": (2048, 512, 256, 32, 4)}
COEFF = 0.01


def by_hand(layer: MoE) -> Callable[[Tensor], Tensor]:
    """The same operators on the same parameters."""

    def run(x: Tensor) -> Tensor:
        logits = router_gating_linear(x, layer.router.weight, None, torch.float32)
        routing = moekit.route(logits, layer.router.k)
        out = moekit.experts(x, routing, layer.experts.gate_up, layer.experts.down)
        return moekit.aux_loss(out, moekit.balance_loss(routing, COEFF))

    return run


def main() -> int:
    """Print a line for each size and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    for (name, (tokens, hidden, inner, experts, k)), dtype in (
        (size, dtype) for size in SIZES.items() for dtype in (torch.float32, torch.bfloat16)
    ):
        layer = MoE.build(
            hidden, inner, num_experts=experts, k=k, balance_coeff=COEFF, dtype=dtype, device=options.device
        ).train()
        x = torch.randn(tokens, hidden, dtype=dtype, device=options.device, requires_grad=True)
        samples: dict[str, list[float]] = {"moekit.nn": [], "by hand": []}
        for number in range(options.rounds):
            turns = (("moekit.nn", layer), ("by hand", by_hand(layer)))
            for label, call in turns if number % 2 else turns[::-1]:
                wait()
                start = time.perf_counter()
                call(x).sum().backward()
                wait()
                samples[label].append(time.perf_counter() - start)
        ours, hand = (statistics.median(found[5:]) * 1e3 for found in samples.values())
        print(f"{name:8s} {dtype!s:16s} moekit.nn {ours:8.3f} ms   by hand {hand:8.3f} ms   {ours / hand:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
