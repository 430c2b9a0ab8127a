"""Time a call of each function on tiny and on real inputs, here and in other checkouts, in turns.

::

    git worktree add ../before REVISION
    python benchmarks/calls.py --against ../before

Checkouts take turns in processes of their own, so that a change of the machine's speed meets all of them; of each the
least of a round counts, and of the rounds the median. ``--large`` times a layer of Qwen3-30B-A3B's shape instead, where the
kernels are all that matters.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt
HERE = Path(__file__).resolve().parent.parent


def functions(large: bool, device: str) -> dict[str, Callable[[], Any]]:
    """What is timed: forward, and forward with backward, of every public function that has one."""
    import torch

    import moekit
    from moekit import moe_utils

    torch.manual_seed(0)
    torch.set_default_device(device)
    tokens, hidden, inner, num_experts, topk = (2048, 2048, 768, 128, 8) if large else (6, 16, 24, 4, 2)
    dtype = torch.bfloat16 if large else torch.float32

    def leaf(*shape: int) -> Any:
        return torch.randn(shape).to(dtype).requires_grad_()

    logits = torch.randn(tokens, num_experts, requires_grad=True)
    weights, indices = (t.detach() for t in moekit.topk_router(logits, topk))
    routing = moekit.Routing.from_topk(indices, weights, num_experts=num_experts)
    routing_map, probs = routing.to_map()
    x, rows, projected = leaf(tokens, hidden), leaf(tokens * topk, hidden), leaf(tokens * topk, 2 * inner)
    gate_up, down = leaf(num_experts, 2 * inner, hidden), leaf(num_experts, hidden, inner)
    sizes, chunks = routing.tokens_per_expert, torch.arange(num_experts).flip(0)
    forward = {
        "glu": lambda: moekit.glu(projected, routing.row_weights()),
        "glu with offsets": lambda: moekit.glu(projected, offsets=routing.offsets),
        "permute": lambda: moekit.permute(x, routing),
        "unpermute, weighted": lambda: moekit.unpermute(rows, routing, weighted=True),
        "topk_router": lambda: moekit.topk_router(logits, topk)[0],
        "z_loss": lambda: moekit.z_loss(logits, 1.0),
        "aux_loss": lambda: moekit.aux_loss(x, logits.sum()),
        "permute by map": lambda: moe_utils.permute(x, routing_map, probs, tokens * topk)[0],
        "weighted_bias_swiglu_impl": lambda: moe_utils.weighted_bias_swiglu_impl(projected, routing.row_weights()[:, None]),
    }
    products = {
        "grouped_linear": lambda: moekit.grouped_linear(rows, gate_up, routing.offsets),
        "experts": lambda: moekit.experts(x, (indices, weights), gate_up, down),
    }
    if not large or device != "cpu":  # or the products would be all that is timed
        forward |= products
    timed: dict[str, Callable[[], Any]] = {
        "Routing.from_topk": lambda: moekit.Routing.from_topk(indices, weights, num_experts=num_experts),
        "sort_chunks": lambda: moekit.sort_chunks(rows, sizes, chunks)[0],
    }
    for name, call in forward.items():
        timed[name] = torch.no_grad()(call)
        timed[f"{name}, with backward"] = lambda call=call: call().sum().backward()
    return timed


def times(large: bool, device: str) -> dict[str, float]:
    """Seconds a call."""
    import torch

    torch.set_num_threads(2 if large else 1)
    if large and device == "cpu":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    calls, found = (1 if large and device == "cpu" else 20), {}
    for name, call in functions(large, device).items():
        for _ in range(3 if large else 100):
            call()
        samples = []
        for _ in range(15 if large else 30):
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            wait()
            samples.append((time.perf_counter() - start) / calls)
        found[name] = min(samples)
    return found


def measure(checkout: Path, large: bool, device: str) -> dict[str, float]:
    """:func:`times` in a process that imports moekit from ``checkout``."""
    command = [sys.executable, __file__, "--worker", "--device", device, *(["--large"] if large else [])]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> int:
    """Print a table: microseconds here, and each other checkout's time over it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, nargs="*", default=[], metavar="DIR", help="other checkouts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="a whole layer's sizes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(times(options.large, options.device)))
        return 0
    checkouts = [HERE, *(path.resolve() for path in options.against)]
    rounds: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    for number in range(options.rounds):
        for checkout in checkouts if number % 2 == 0 else checkouts[::-1]:
            rounds[checkout].append(measure(checkout, options.large, options.device))
    for name in rounds[HERE][0]:
        medians = [statistics.median(found[name] for found in rounds[checkout]) for checkout in checkouts]
        others = "".join(f"{median / medians[0]:8.3f}" for median in medians[1:])
        print(f"{name:42s} {medians[0] * 1e6:10.2f} us{others}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
