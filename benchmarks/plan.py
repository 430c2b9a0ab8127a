"""What one layer of experts allocates on a GPU, beside what ``moekit plan`` says of it.

    python benchmarks/plan.py --json FILE [--layers granite qwen3 ...]

Steps of small batches in every way (trained, frozen, packed, with adapters, with biases, each ``save``), and of large ones
with adapters: bytes kept for backward, the peak of a step and that of a forward without gradients, above what is there
before. Prints each with the planned bytes; a peak that is off by more than 1% makes the exit status 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _memory import kept, peak
from gpu_experts import SHAPES

import moekit
from moekit.plan.memory import SAVES, Load, step

FEW, MANY, RANK, NEAR = 4096, 16384, 16, 0.01
LAYERS = {"granite": (2048, 1024, 512, 32, 8)}  # tokens, hidden, intermediate, experts, experts a token
LAYERS |= {name: (FEW, *SHAPES[name][1:]) for name in ("qwen3", "olmoe", "gpt-oss", "mixtral")}


@dataclass(frozen=True)
class Way:
    """How a layer's step goes; fields as those of :class:`moekit.plan.memory.Load`."""

    save: str = "recompute"
    rank: int = 0
    packed: str = ""
    trained: bool = True
    biases: bool = False


def cases(layers: list[str]) -> Iterator[tuple[str, tuple[int, ...], Way]]:
    """Layers, their shapes and ways."""
    frozen = [(0, ""), (RANK, ""), (0, "nf4"), (RANK, "nf4"), (RANK, "mxfp4")]
    for layer in layers:
        shape = LAYERS[layer]
        for save in SAVES:
            yield layer, shape, Way(save)
            yield from ((layer, shape, Way(save, *way, trained=False)) for way in frozen)
        yield layer, shape, Way(biases=True)
    adapted = [layer for layer in ("qwen3", "gpt-oss") if layer in layers]
    for layer, packed in itertools.product(adapted, ("", "nf4", "mxfp4", "fp8", "int8")):
        yield layer, (MANY, *LAYERS[layer][1:]), Way("recompute", RANK, packed, trained=False)


class Problem:
    """The tensors of a layer, and calls on them."""

    def __init__(self, shape: tuple[int, ...], way: Way) -> None:
        tokens, hidden, inner, experts, topk = shape
        torch.manual_seed(0)
        self.x = self.leaf(tokens, hidden)
        weights, self.indices = torch.softmax(torch.randn(tokens, experts, device="cuda"), -1).topk(topk, -1)
        self.weights = (weights / weights.sum(-1, keepdim=True)).requires_grad_()
        self.leaves, self.options = [self.x, self.weights], {"save": way.save}
        shapes = (experts, 2 * inner, hidden), (experts, hidden, inner)
        self.experts: list[Any] = [self.leaf(*size).requires_grad_(way.trained) for size in shapes]
        self.leaves += self.experts if way.trained else []
        if way.packed:
            self.experts = [moekit.pack(weight, way.packed) for weight in self.experts]
        if way.biases:
            biases = {"gate_up_bias": self.leaf(experts, 2 * inner), "down_bias": self.leaf(experts, hidden)}
            self.options |= biases
            self.leaves += biases.values()
        if way.rank:
            factors = [(self.leaf(experts, way.rank, n), self.leaf(experts, out, way.rank)) for _, out, n in shapes]
            self.options["lora"] = {
                name: moekit.Lora(*pair, 2.0) for name, pair in zip(("gate_up", "down"), factors, strict=True)
            }
            self.leaves += itertools.chain(*factors)
        self.grad = torch.randn_like(self.x)

    def leaf(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(0.02).requires_grad_()

    def forward(self) -> torch.Tensor:
        return moekit.experts(self.x, (self.indices, self.weights), *self.experts, **self.options)

    def infer(self) -> None:
        with torch.no_grad():
            self.forward()

    def step(self) -> None:
        self.forward().backward(self.grad)

    def peak(self, call: Callable[[], None]) -> int:
        """Bytes, with kernels that are loaded already and without gradients of a step before."""
        call()
        for leaf in self.leaves:
            leaf.grad = None
        return peak(call)

    def kept(self) -> int:
        """Bytes that are not the caller's."""
        return kept(self.forward, [*self.leaves, *(weight for weight in self.experts if type(weight) is torch.Tensor)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=list(LAYERS))
    options = parser.parse_args()
    found, off = [], 0
    for layer, shape, way in cases(options.layers):
        problem = Problem(shape, way)
        row = {"kept": problem.kept(), "peak": problem.peak(problem.step), "forward": problem.peak(problem.infer)}
        del problem
        tokens, hidden, inner, experts, topk = shape
        planned = step(Load(tokens, tokens * topk, hidden, inner, experts, topk, **vars(way)))
        found.append({"layer": layer, "shape": shape, **vars(way), **row})
        wrong = row["kept"] != planned.kept or abs(row["peak"] / planned.peak - 1) > NEAR
        off += wrong
        both = (f"{name} {row[name] / 2**20:.2f} {getattr(planned, name) / 2**20:.2f}" for name in row)
        print(layer, tokens, *vars(way).values(), *both, planned.peak_at, "OFF" if wrong else "", flush=True)
    header = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16"}
    options.json.write_text(json.dumps({**header, "routing weights": "float32", "cases": found}, indent=1))
    return int(off > 0)


if __name__ == "__main__":
    raise SystemExit(main())
