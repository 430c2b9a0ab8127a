"""Time and weigh LoRA steps on frozen experts, dense and packed, against what users have; and decoding from packed weights.

::

    python benchmarks/packed.py [--device cuda] [--tokens 4096 16384] [--json FILE] [--peers DIR]

A step is forward and backward of one layer's experts with adapters of rank 16 on both weights: gradients of the factors,
the tokens and the routing weights. All take turns in one process; times are medians. On a GPU ``graph ms`` is the step
replayed as a CUDA graph, without its launches, and ``peak`` what a step allocates at most beyond weights, inputs and
gradients that exist before it; ``kept`` is what stays for backward.

Peers, where they can be imported (``--peers`` is a directory to look in): PEFT's ``target_parameters`` on Transformers'
experts with ``grouped_mm``, and the kernels of ``grouped-nf4-gemm`` (its sizes are read on the host, outside the clock).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _memory import kept, peak
from torch import Tensor

import moekit
from moekit import Lora

RANK, SCALE = 16, 2.0
FORMATS = ("nf4", "mxfp4", "fp8", "int8")


class Layer(NamedTuple):
    """The letters of the docs."""

    name: str
    hidden: int
    inner: int
    experts: int
    topk: int


LAYERS = {
    "qwen3": Layer("Qwen3-30B-A3B", 2048, 768, 128, 8),
    "gpt-oss": Layer("gpt-oss-20b", 2880, 2880, 32, 4),
    "tiny": Layer("tiny", 128, 64, 8, 2),
}


class Problem:
    """Weights, adapters, tokens and a routing."""

    def __init__(self, layer: Layer, tokens: int, device: str) -> None:
        torch.manual_seed(0)
        self.layer, self.device = layer, device
        e, h, i = layer.experts, layer.hidden, layer.inner
        self.dense = (self.draw(e, 2 * i, h, scale=h**-0.5), self.draw(e, h, i, scale=i**-0.5))
        shapes = ((e, RANK, h), (e, 2 * i, RANK), (e, RANK, i), (e, h, RANK))
        self.factors = [self.draw(*shape, scale=shape[2] ** -0.5).requires_grad_() for shape in shapes]
        self.x = self.draw(tokens, h).requires_grad_()
        scores = torch.rand(tokens, e, device=device)
        weights, self.indices = scores.topk(layer.topk)
        self.weights = (weights / weights.sum(1, keepdim=True)).to(self.x.dtype).requires_grad_()
        self.grad = self.draw(tokens, h)

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16) * scale

    def leaves(self) -> list[Tensor]:
        return [self.x, self.weights, *self.factors]


def ours(problem: Problem, gate_up: Any, down: Any) -> Callable[[], Tensor]:
    """One layer of moekit."""
    first, second = Lora(*problem.factors[:2], SCALE), Lora(*problem.factors[2:], SCALE)

    def run() -> Tensor:
        routing = (problem.indices, problem.weights)
        return moekit.experts(problem.x, routing, gate_up, down, lora={"gate_up": first, "down": second})

    return run


def transformers_experts(problem: Problem) -> torch.nn.Module:
    """Transformers' experts with ``grouped_mm``."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    layer = problem.layer
    sizes = {"hidden_size": layer.hidden, "moe_intermediate_size": layer.inner, "num_experts": layer.experts}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=layer.topk, hidden_act="silu")
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    for name, weight in zip(("gate_up_proj", "down_proj"), problem.dense, strict=True):
        setattr(experts, name, torch.nn.Parameter(weight, requires_grad=False))
    return experts


def peft_experts(problem: Problem) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """PEFT's adapters on those."""
    from peft import LoraConfig, inject_adapter_in_model

    experts = transformers_experts(problem)
    holder = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": experts})})
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_parameters=targets), holder)
    module = adapted["mlp"]["experts"].to(torch.bfloat16)
    factors = [parameter for name, parameter in module.named_parameters() if "lora" in name]
    return lambda: module(problem.x, problem.indices, problem.weights), factors


def nf4_gemm(problem: Problem, gate_up: Any, down: Any) -> Callable[[], Tensor]:
    """grouped-nf4-gemm's products between plain PyTorch."""
    from nf4_qlora import fused_grouped_lora

    layer, order = problem.layer, problem.indices.flatten().argsort(stable=True)
    counts = torch.bincount(problem.indices.flatten(), minlength=layer.experts)
    experts = counts.nonzero().flatten()
    sizes, token = counts[experts].tolist(), order // layer.topk
    packed = []
    for weight in (gate_up, down):
        codes, (absmax,), *_ = weight.stored()
        packed.append((codes, absmax.view(*codes.shape[:2], -1)))

    def run() -> Tensor:
        rows = problem.x.index_select(0, token)
        projected = fused_grouped_lora(rows, *packed[0], sizes, experts, *problem.factors[:2], scaling=SCALE)
        gate, up = projected.chunk(2, dim=1)
        act = torch.nn.functional.silu(gate) * up
        out = fused_grouped_lora(act, *packed[1], sizes, experts, *problem.factors[2:], scaling=SCALE)
        out = out * problem.weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(problem.x).index_add(0, token, out)

    return run


# --- measuring --------------------------------------------------------------------------------------------------------


def step(problem: Problem, run: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(run(), leaves, problem.grad)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(calls: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    """Medians in milliseconds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            wait(device)
            start = time.perf_counter()
            calls[name]()
            wait(device)
            if number:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found) for name, found in samples.items()}


def graphs(calls: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], None]]:
    """The calls that can be captured, as replays: what the GPU takes, without the launching."""
    found = {}
    for name, call in calls.items():
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            found[name] = graph.replay
        except Exception as error:  # reads on the host cannot be captured
            print(f"{name}: no graph: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
    return found


def contenders(problem: Problem, formats: list[str]) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """What takes a step, and the leaves of its gradients."""
    packed = {name: tuple(moekit.pack(weight, name) for weight in problem.dense) for name in formats}
    leaves = problem.leaves()
    found = {"moekit, dense": (ours(problem, *problem.dense), leaves)}
    found |= {f"moekit, {name}": (ours(problem, *weights), leaves) for name, weights in packed.items()}
    try:
        run, factors = peft_experts(problem)
        found["PEFT + grouped_mm"] = (run, [problem.x, problem.weights, *factors])
    except ImportError as error:
        print(f"PEFT + grouped_mm: not there ({error})", file=sys.stderr)
    if problem.device == "cuda" and "nf4" in packed:
        try:
            found["grouped-nf4-gemm"] = (nf4_gemm(problem, *packed["nf4"]), leaves)
        except ImportError as error:
            print(f"grouped-nf4-gemm: not there ({error})", file=sys.stderr)
    return found


def steps(layer: Layer, tokens: int, device: str, formats: list[str], rounds: int) -> list[dict]:
    """A row for each contender."""
    problem = Problem(layer, tokens, device)
    found = contenders(problem, formats)
    calls = {}
    for name, (run, leaves) in list(found.items()):
        try:
            step(problem, run, leaves)
            calls[name] = lambda run=run, leaves=leaves: step(problem, run, leaves)
        except Exception as error:  # a peer that fails is a result, too
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            found.pop(name)
    times = in_turns(calls, device, rounds)
    replayed = in_turns(graphs(calls), device, rounds) if device == "cuda" else {}
    rows = []
    for name, (run, leaves) in found.items():
        row = {"what": "LoRA step", "layer": layer.name, "tokens": tokens, "name": name, "ms": times[name]}
        row |= {"graph ms": replayed[name]} if name in replayed else {}
        row["kept MiB"] = kept(run, [*leaves, *problem.dense, problem.indices]) / 2**20
        if device == "cuda":
            row["peak MiB"] = peak(calls[name]) / 2**20
        rows.append(row)
    return rows


def decoding(layer: Layer, tokens: int, device: str, formats: list[str], rounds: int) -> list[dict]:
    """Forward alone, of few tokens; the routing changes from call to call, so that weights come from memory."""
    problem = Problem(layer, 1, device)
    packed = {"dense": problem.dense} | {name: tuple(moekit.pack(w, name) for w in problem.dense) for name in formats}
    inputs = []
    for _ in range(16):
        x, scores = problem.draw(tokens, layer.hidden), torch.rand(tokens, layer.experts, device=device)
        weights, indices = scores.topk(layer.topk)
        inputs.append((x, indices, weights.to(x.dtype)))

    def through(gate_up: Any, down: Any) -> Callable[[], None]:
        return repeated(lambda x, indices, weights: moekit.experts(x, (indices, weights), gate_up, down))

    def repeated(layer_of: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            for given in inputs:
                layer_of(*given)

        run()
        if device == "cpu":
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    with torch.no_grad():
        calls = {f"moekit, {name}": through(*weights) for name, weights in packed.items()}
        try:
            calls["grouped_mm, dense"] = repeated(transformers_experts(problem))
        except ImportError as error:
            print(f"grouped_mm: not there ({error})", file=sys.stderr)
        times = in_turns(calls, device, rounds)
    base = {"what": "decode", "layer": layer.name, "tokens": tokens}
    return [{**base, "name": name, "ms": ms / len(inputs)} for name, ms in times.items()]


def show(rows: list[dict]) -> None:
    """A line a row, with the ratio to the dense one."""
    dense = {(row["what"], row["layer"], row["tokens"]): row["ms"] for row in rows if row["name"] == "moekit, dense"}
    for row in rows:
        ratio = row["ms"] / dense[row["what"], row["layer"], row["tokens"]]
        label = f"{row['what']:10} {row['layer']:14} T={row['tokens']:<6} {row['name']:18}"
        line = f"{label} {row['ms']:10.3f} ms {ratio:6.2f}x dense"
        print(line, *(f" {key} {row[key]:8.2f}" for key in ("graph ms", "peak MiB", "kept MiB") if key in row), flush=True)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", nargs="+", choices=LAYERS)
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--decode", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.peers:
        sys.path.insert(0, str(options.peers))
    gpu = options.device == "cuda"
    layers = options.layers or (["qwen3", "gpt-oss"] if gpu else ["qwen3"])
    rounds = options.rounds or (15 if gpu else 5)
    tokens = ([4096, 16384] if gpu else [512]) if options.tokens is None else options.tokens
    rows: list[dict] = []
    for name in layers:
        for count in tokens:
            found = steps(LAYERS[name], count, options.device, options.formats, rounds)
            rows += found
            show(found)
        for count in options.decode:
            found = decoding(LAYERS[name], count, options.device, options.formats, rounds)
            rows += found
            show(found)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
