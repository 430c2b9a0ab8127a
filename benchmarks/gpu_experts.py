"""The expert MLP on one GPU: this state of moekit, an older one, and peers, in one process.

    python benchmarks/gpu_experts.py --out DIR [--old PACKAGE] [--shapes qwen3 small ...] [--peers ScatterMoE Liger ...]

Same inputs and routing for all, medians of interleaved timings by CUDA events around a few calls in a row (which includes
the host, where it is the slower one) and around a replayed graph (which does not); peak memory of a training step above its
parameters and inputs; small batches without gradients against reading the weights of the experts that have rows. Results
of all are compared first: who is off, or cannot run, is named with the reason in place of times.

``--old`` is a package of an older state under another name: ``moekit`` and all mentions of it renamed, so that both can be
imported. Writes ``gpu_experts.json``, and with an old
state ``gpu_experts.png``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _experts_peers import PEERS
from _memory import peak

SHAPES = {  # tokens, hidden, intermediate, experts, experts a token
    "qwen3": (16384, 2048, 768, 128, 8),
    "qwen3-8k": (8192, 2048, 768, 128, 8),
    "small": (24576, 1536, 256, 128, 8),
    "olmoe": (16384, 2048, 1024, 64, 8),
    "gpt-oss": (16384, 2880, 2880, 32, 4),
    "mixtral": (16384, 4096, 14336, 8, 2),
    "fine": (32768, 4096, 1024, 128, 8),
}
SMALL_BATCHES = (1, 2, 4, 8, 64, 256)  # of Qwen3's layer
ONE_TOKEN = ("olmoe", "gpt-oss", "mixtral", "fine")
ROUNDS, CALLS = 7, 4
MOST_OFF = 4  # roundings of a dtype, relative, by norm


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Leaves, indices and the output's gradient."""
    tokens, hidden, inner, experts, topk = shape
    torch.manual_seed(0)
    drawn = {"x": (tokens, hidden), "gate_up": (experts, 2 * inner, hidden), "down": (experts, hidden, inner)}
    leaves = {name: torch.randn(*size, device="cuda", dtype=dtype) for name, size in drawn.items()}
    for name in ("gate_up", "down"):
        leaves[name] *= 0.02
    weights, indices = torch.softmax(torch.randn(tokens, experts, device="cuda"), -1).topk(topk, -1)
    leaves["weights"] = (weights / weights.sum(-1, keepdim=True)).to(dtype)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return leaves | {"indices": indices, "grad": torch.randn_like(leaves["x"])}


def contenders(old: str | None) -> dict[str, Callable[..., torch.Tensor]]:
    """Functions of the inputs, by name."""

    def of(package: str, **options: Any) -> Callable[..., torch.Tensor]:
        experts = importlib.import_module(package).experts
        return lambda d: experts(d["x"], (d["indices"], d["weights"]), d["gate_up"], d["down"], **options)

    found = {"moekit": of("moekit"), "moekit fp8": of("moekit", save="fp8")}
    found["moekit batch-invariant"] = of("moekit", batch_invariant=True)
    return found | ({"old": of(old)} if old else {})


def forward(run: Callable, data: dict) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            run(data)

    return call


def drop_gradients(data: dict) -> None:
    for leaf in (*(data[name] for name in ("x", "gate_up", "down", "weights")), *data.get("scattermoe", ())):
        leaf.grad = None


def step(run: Callable, data: dict) -> Callable[[], None]:
    def call() -> None:
        drop_gradients(data)
        run(data).backward(data["grad"])

    return call


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The same as a graph; who waits for the GPU is told so before a capture would break."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def graphs(calls: dict[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """All that a graph takes, and why it does not take others; moekit has to be among the first."""
    found, left = {}, {}
    for who, call in calls.items():
        try:
            found[who] = captured(call)
        except RuntimeError as error:
            if who.startswith("moekit"):
                raise
            left[who] = reason(error)
    return found, left


def milliseconds(calls: dict[str, Callable], count: int = CALLS) -> dict[str, float]:
    """Medians of interleaved runs of ``count`` calls."""
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(count):
                call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / count)
    return {name: round(statistics.median(found), 4) for name, found in times.items()}


def peak_of_step(call: Callable[[], None], data: dict) -> int:
    """MiB that a training step takes at most, above what is there before it."""
    call()
    drop_gradients(data)
    return round(peak(call) / 2**20)


def join(runs: dict[str, Callable], peers: dict[str, Callable], outcome: Callable, eps: float) -> dict[str, str]:
    """Add the peers, made here, whose outcome is moekit's to ``runs``; why the others are not."""
    wanted, left = [one.float() for one in outcome(runs["moekit"])], {}
    for peer, make in peers.items():
        try:
            run = make()
            off = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(outcome(run), wanted, strict=True))
        except Exception as error:  # whatever a peer raises is for the table
            left[peer] = reason(error)
            continue
        if off < MOST_OFF * eps:
            runs[peer] = run
        else:
            left[peer] = f"off by {off:.1e}"
    return left


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def outcome(run: Callable, data: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the gradient of the tokens."""
    data["x"].grad = None
    out = run(data)
    out.backward(data["grad"])
    return out.detach(), data["x"].grad


def training(name: str, dtype: torch.dtype, old: str | None, peers: list[str]) -> dict[str, Any]:
    """Times and peaks at one shape."""
    data = inputs(SHAPES[name], dtype)
    runs = contenders(old)
    made = {peer: partial(PEERS[peer], data) for peer in peers}
    left = join(runs, made, partial(outcome, data=data), torch.finfo(dtype).eps)
    calls = {who: step(run, data) for who, run in runs.items()}
    found: dict[str, Any] = {"peak MiB": {who: peak_of_step(call, data) for who, call in calls.items()}}
    quick = {who: forward(run, data) for who, run in runs.items() if who != "moekit fp8"}
    found["forward"], found["forward + backward"] = milliseconds(quick), milliseconds(calls)
    drop_gradients(data)
    for what, each in (("forward", quick), ("forward + backward", calls)):
        taken, waits = graphs({who: call for who, call in each.items() if who in ("moekit", "old", *peers)})
        found[f"{what}, graph"] = milliseconds(taken)
        left |= {f"{who}, {what}, graph": why for who, why in waits.items()}
    return found | ({"left out": left} if left else {})


def in_turn(runs: list[Callable], sets: list[dict]) -> Callable[[], list[torch.Tensor]]:
    """A layer with one set of weights after the other, without gradients."""

    def call() -> list[torch.Tensor]:
        with torch.no_grad():
            return [run(data) for run, data in zip(runs, sets, strict=True)]

    return call


def small_batches(name: str, numbers: tuple[int, ...], old: str | None, copy: float, peers: list[str]) -> dict[str, Any]:
    """Microseconds of a layer in a graph that goes through two sets of weights, and what reading these takes.

    Who waits for the GPU, so that no graph takes it, is called from the host, and moekit beside it.
    """
    _, hidden, inner, experts, topk = SHAPES[name]
    found = {}
    for tokens in numbers:
        sets = [inputs((tokens, hidden, inner, experts, topk)) for _ in range(2)]
        found[str(tokens)] = small_batch(sets, old, copy, peers)
        print(name, tokens, json.dumps(found[str(tokens)]), flush=True)
    return found


def small_batch(sets: list[dict], old: str | None, copy: float, peers: list[str]) -> dict[str, Any]:
    calls = {who: in_turn([run, run], sets) for who, run in contenders(old).items() if who != "moekit fp8"}
    made = {peer: lambda peer=peer: in_turn([PEERS[peer](data) for data in sets], sets) for peer in peers}
    left = join(calls, made, lambda call: call(), torch.finfo(torch.bfloat16).eps)
    taken, waits = graphs(calls)
    touched = sum(len(data["indices"].unique()) for data in sets) / 2
    read = touched * sum(sets[0][weights][0].nbytes for weights in ("gate_up", "down"))
    found: dict[str, Any] = {"experts": touched, "reading": round(read / copy / 1e3, 1)}
    found |= {who: round(time * 500, 1) for who, time in milliseconds(taken, 10).items()}
    if waits:
        called = milliseconds({who: calls[who] for who in ("moekit", *waits)}, 10)
        found["called"] = {who: round(time * 500, 1) for who, time in called.items()}
    return found | ({"left out": left | waits} if left or waits else {})


def ceilings() -> tuple[float, float]:
    """TFLOP/s of a dense bf16 product, and GB/s of a copy, read and written."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    found = milliseconds({"product": lambda: a @ a, "copy": lambda: target.copy_(source)})
    return 2 * 8192**3 / found["product"] / 1e9, 2 * source.numel() / found["copy"] / 1e6


def draw_chart(results: dict[str, Any], path: Path) -> None:
    """Bars: how many times as fast as the old state the graphs are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 3.8))
    for axes, what in zip(panels, ("forward", "forward + backward"), strict=True):
        times = {name: found[f"{what}, graph"] for name, found in results["shapes"].items()}
        ratios = {name: time["old"] / time["moekit"] for name, time in times.items()}
        bars = axes.bar(list(ratios), list(ratios.values()))
        axes.bar_label(bars, fmt="%.2f")
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_title(f"{what}: times as fast as the old state")
        axes.tick_params(axis="x", rotation=30)
        axes.margins(y=0.12)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--old", help="the package of an older state, under another name")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of training steps")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[], help="SonicMoE takes minutes to set up")
    options = parser.parse_args()
    product, copy = ceilings()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "dense TFLOP/s": round(product),
        "copy GB/s": round(copy),
        "sizes": {name: SHAPES[name] for name in options.shapes},
        "shapes": {},
    }
    print(results, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        (options.out / "gpu_experts.json").write_text(json.dumps(results, indent=1))

    if options.dtype == "bfloat16":
        results["small batches"] = small_batches("qwen3", SMALL_BATCHES, options.old, copy, options.peers)
        others = [name for name in ONE_TOKEN if name in options.shapes]
        one_token = {name: small_batches(name, (1,), options.old, copy, options.peers)["1"] for name in others}
        results["one token"] = one_token
        write()
    for name in options.shapes:
        results["shapes"][name] = training(name, getattr(torch, options.dtype), options.old, options.peers)
        print(name, json.dumps(results["shapes"][name]), flush=True)
        torch.cuda.empty_cache()
        write()
    if options.old and options.dtype == "bfloat16":
        draw_chart(results, options.out / "gpu_experts.png")


if __name__ == "__main__":
    main()
