"""Time expert parallelism: one command, on all GPUs of a machine, or under torchrun on several.

    python benchmarks/ep.py --out ep.json                 # NCCL, one process a GPU
    python benchmarks/ep.py --backend gloo --ranks 2      # no GPU: tiny shapes, to try the script itself
    torchrun --nnodes 2 ... benchmarks/ep.py              # several machines
    python benchmarks/ep.py --table ep.json               # what was measured, as tables

Forward and backward of a layer's experts, split into stages by CUDA events on the stream of the products, where a stage
ends when the next one may begin. The contenders take turns, all ranks in the same order; a figure is the median of a rank,
then the largest of all ranks. Beside the exchanges stand the bytes that went to other ranks, and the rate that
``all_to_all_single`` reaches with as many. Results of all contenders are compared first.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moekit
import moekit.ep
from moekit.plan.exchange import DEEPSEEK, QWEN3, Layer, needed

TINY = [replace(layer, tokens=48, hidden=64, inner=32, experts=16, topk=4) for layer in (QWEN3, DEEPSEEK)]
SHARED_INNER = {"DeepSeek-V3": 2048}  # of the shared expert
ROUNDS = 12
BEHIND = 8_000_000  # cycles, some 4 ms
# Whether there is a Transformers that has expert parallelism: 5.24 or newer.
EXPERT_PARALLEL = bool(find_spec("transformers") and find_spec("transformers.distributed.expert_parallel"))
TOLERANCE = 2e-2  # bfloat16, whose products are summed in another order


# --- ranks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Here:
    """This rank."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def fall_behind(self) -> None:
        """The device has something to do first, as in a model, so that it does not wait for the host from the start."""
        if self.on_gpu:
            torch.cuda._sleep(BEHIND)

    def meet(self) -> None:
        """All ranks are here, and idle."""
        self.synchronize()
        dist.barrier()
        self.synchronize()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def start(backend: str) -> Here:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    return Here(rank, ranks, device)


# --- a layer's tokens and weights -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What a rank has."""

    layer: Layer
    x: Tensor
    indices: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    grad: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Tokens and routing weights of a step of its own; the experts' gradients are none."""
        self.gate_up.grad = self.down.grad = None
        return self.x.detach().requires_grad_(), self.weights.detach().requires_grad_()

    def experts(self, rows: Tensor, local: moekit.Routing) -> Tensor:
        return moekit.experts(rows, local, self.gate_up, self.down)


def problem(here: Here, layer: Layer, seed: int | None = None) -> Problem:
    g = torch.Generator(here.device).manual_seed(here.rank if seed is None else seed)
    draw = functools.partial(torch.randn, generator=g, device=here.device, dtype=torch.bfloat16)
    tokens, each = layer.tokens, layer.experts // here.ranks
    scores = torch.rand(tokens, layer.experts, generator=g, device=here.device)
    groups = torch.rand(tokens, layer.groups, generator=g, device=here.device).topk(layer.groups_chosen).indices
    reached = torch.zeros(tokens, layer.groups, device=here.device).scatter(1, groups, 1.0)
    weights, indices = (scores * reached.repeat_interleave(layer.experts // layer.groups, 1)).topk(layer.topk)
    return Problem(
        layer,
        draw(tokens, layer.hidden),
        indices,
        weights / weights.sum(1, keepdim=True),
        torch.nn.Parameter(draw(each, 2 * layer.inner, layer.hidden).mul_(layer.hidden**-0.5)),
        torch.nn.Parameter(draw(each, layer.hidden, layer.inner).mul_(layer.inner**-0.5)),
        draw(tokens, layer.hidden),
    )


# --- stages ---------------------------------------------------------------------------------------------------------


class Marks:
    """The ends of stages."""

    def __init__(self, here: Here) -> None:
        self.here = here
        self.seen: list[tuple[str, Any]] = []
        self.held = 0  # bytes in use when the forward ended

    def __call__(self, name: str) -> None:
        if self.here.on_gpu:
            self.held = self.held or (torch.cuda.memory_allocated() if name in ("combine", "forward") else 0)
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.seen.append((name, event))
        else:
            self.seen.append((name, time.perf_counter()))

    def at(self, name: str) -> Callable[[Tensor], None]:
        """As a hook of a gradient."""
        return lambda _: self(name)

    def stages(self) -> dict[str, float]:
        """Milliseconds of each stage, and of all."""
        self.here.synchronize()
        apart = (lambda a, b: a.elapsed_time(b)) if self.here.on_gpu else (lambda a, b: 1e3 * (b - a))
        pairs = zip(self.seen, self.seen[1:], strict=False)
        return {after[0]: apart(before[1], after[1]) for before, after in pairs} | {
            "all": apart(self.seen[0][1], self.seen[-1][1])
        }


Step = Callable[[Problem, Marks], tuple[Tensor, Tensor]]  # to the output and the gradient of the tokens


def exchanged(dispatcher: Any, given: Problem, marks: Marks) -> tuple[Tensor, Tensor]:
    """A step with a dispatcher of moekit's."""
    x, weights = given.leaves()
    marks("begin")
    routing = moekit.Routing.from_topk(given.indices, weights, num_experts=given.layer.experts)
    started = dispatcher.start(x, routing)
    marks("permute")
    rows, local, handle = started.finish()
    marks("exchange")
    out = given.experts(rows, local)
    marks("products")
    y = dispatcher.combine(out, handle)
    out.register_hook(marks.at("combine, backward"))
    rows.register_hook(marks.at("products, backward"))
    del started, rows, local, out, handle  # what is still there is kept for backward
    marks("combine")
    y.backward(given.grad)
    marks("exchange, backward")
    return y.detach(), x.grad


def as_a_whole(
    dispatcher: Any, beside: Callable | None, overlap: bool, given: Problem, marks: Marks
) -> tuple[Tensor, Tensor]:
    """A step whose stages nobody looks at, with a shared expert beside the exchange or after it."""
    x, weights = given.leaves()
    marks("begin")
    routing = moekit.Routing.from_topk(given.indices, weights, num_experts=given.layer.experts)
    shared = None if beside is None else functools.partial(beside, x)
    y = moekit.ep.run(dispatcher, x, routing, given.experts, shared if overlap else None)
    if shared is not None and not overlap:
        y = y + shared()
    marks("forward")
    y.backward(given.grad)
    marks("backward")
    return y.detach(), x.grad


def captured(here: Here, dispatcher: Any, given: Problem) -> Step:
    """A step as one CUDA graph: what it takes where nothing waits for the host."""
    x, weights = given.leaves()

    def once() -> tuple[Tensor, Tensor]:
        routing = moekit.Routing.from_topk(given.indices, weights, num_experts=given.layer.experts)
        y = moekit.ep.run(dispatcher, x, routing, given.experts)
        return y.detach(), torch.autograd.grad(y, [x, weights, given.gate_up, given.down], given.grad)[0]

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    here.meet()
    with torch.cuda.graph(graph):
        results = once()

    def step(given: Problem, marks: Marks) -> tuple[Tensor, Tensor]:
        marks("begin")
        graph.replay()
        marks("end")
        return results

    return step


def experts_of_transformers(here: Here, given: Problem, implementation: str) -> Any:
    """An experts module of Transformers with this rank's weights; None where that has no expert parallelism."""
    if not EXPERT_PARALLEL:
        return here.say("without Transformers, which needs 5.24")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    layer = given.layer
    config = Qwen3MoeConfig(
        hidden_size=layer.hidden,
        moe_intermediate_size=layer.inner,
        num_experts=layer.experts // here.ranks,
        num_experts_per_tok=layer.topk,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts._is_expert_parallel = True
    experts.gate_up_proj, experts.down_proj = given.gate_up, given.down
    return experts


def transformers_steps(here: Here, given: Problem) -> dict[str, Step]:
    """Transformers' own exchange over its grouped_mm experts, with the same weights; nothing where it is not there."""
    experts = experts_of_transformers(here, given, "grouped_mm")
    if experts is None:
        return {}
    from transformers.distributed.expert_parallel import AllToAllEP

    mesh = init_device_mesh(here.device.type, (here.ranks, 1), mesh_dim_names=("ep", "tp"))
    theirs = AllToAllEP(experts, mesh["ep"], mesh["tp"])

    def step(given: Problem, marks: Marks) -> tuple[Tensor, Tensor]:
        x, weights = given.leaves()
        marks("begin")
        rows, ids, ones, state = theirs._dispatch_tokens(x, given.indices, weights.to(x.dtype))
        marks("exchange")
        out = theirs.experts_forward(rows, ids, ones)
        marks("products")
        y = theirs._combine_tokens(out, state)
        out.register_hook(marks.at("combine, backward"))
        rows.register_hook(marks.at("products, backward"))
        del rows, ids, ones, out, state
        marks("combine")
        y.backward(given.grad)
        marks("exchange, backward")
        return y.detach(), x.grad

    return {"Transformers all_to_all": step}


def through(implementation: Any, given: Problem, marks: Marks) -> tuple[Tensor, Tensor]:
    """A step of an implementation registered with Transformers."""
    x, weights = given.leaves()
    marks("begin")
    y = implementation(x, given.indices, weights)
    marks("forward")
    y.backward(given.grad)
    marks("backward")
    return y.detach(), x.grad


# --- measuring ------------------------------------------------------------------------------------------------------


def compared(here: Here, steps: dict[str, Step], given: Problem) -> dict[str, dict[str, float]]:
    """Each contender once: how far it is from the first, what it sends, and what it holds."""
    found, first = {}, None
    for name, step in steps.items():
        gc.collect()
        given.leaves()  # no gradients are left
        before, marks = held(here, reset=True), Marks(here)
        with moekit.ep.traffic() as sent:
            y, grad = step(given, marks)
        here.synchronize()
        most = torch.cuda.max_memory_allocated() - before if here.on_gpu else 0
        kept = max(marks.held - before - y.numel() * y.element_size(), 0)
        found[name] = {"rows": sent.rows, **{f"bytes of {what}": n for what, n in sent.bytes.items()}}
        found[name] |= {"kept": kept, "peak": most}
        first = first or (y, grad)
        for what, value, wanted in zip(("error", "error of the gradient"), (y, grad), first, strict=True):
            found[name][what] = float((value - wanted).float().norm() / wanted.float().norm().clamp(min=1e-30))
    return found


def held(here: Here, reset: bool = False) -> int:
    """Bytes in use on the device."""
    if not here.on_gpu:
        return 0
    here.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def take_turns(here: Here, steps: dict[str, Step], given: Problem, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of the stages, the largest of all ranks."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    order = random.Random(0)
    for turn in range(rounds + 2):
        for name in order.sample(list(steps), len(steps)):
            here.meet()
            here.fall_behind()
            marks = Marks(here)
            steps[name](given, marks)
            if turn >= 2:  # what comes before is compiled, tuned or connected for the first time
                samples[name].append(marks.stages())
    mine = {name: {stage: statistics.median(s[stage] for s in seen) for stage in seen[0]} for name, seen in samples.items()}
    everybody: list[Any] = [None] * here.ranks
    dist.all_gather_object(everybody, mine)
    return {name: {stage: max(of[name][stage] for of in everybody) for stage in of_it} for name, of_it in mine.items()}


def link(here: Here, sizes: Sequence[float]) -> list[dict[str, float]]:
    """What ``all_to_all_single`` reaches: bytes of a rank to others, ms, bytes/s."""
    found = []
    for size in sizes:
        each = max(1, int(size / max(here.ranks - 1, 1) / 2))
        sent = torch.ones(each * here.ranks, dtype=torch.bfloat16, device=here.device)
        got, spent = torch.empty_like(sent), []
        for turn in range(8):
            here.meet()
            marks = Marks(here)
            marks("begin")
            dist.all_to_all_single(got, sent)
            marks("end")
            spent += [marks.stages()["all"]] if turn > 2 else []
        ms, count = statistics.median(spent), 2 * each * (here.ranks - 1)
        found.append({"bytes": count, "ms": ms, "rate": count / ms * 1e3})
        here.say(f"link: {count / 1e6:8.1f} MB to others in {ms:7.3f} ms, {count / ms / 1e6:6.1f} GB/s")
    return found


# --- cases ----------------------------------------------------------------------------------------------------------


def of_layer(here: Here, layer: Layer, rounds: int) -> dict[str, Any]:
    """The contenders."""
    given, group = problem(here, layer), dist.group.WORLD
    never_waits = moekit.ep.AllToAll(group, layer.experts, capacity=capacity(here, layer))
    steps: dict[str, Step] = {
        "all_to_all": functools.partial(exchanged, moekit.ep.AllToAll(group, layer.experts)),
        "all_to_all, capacity": functools.partial(exchanged, never_waits),
        "all_gather": functools.partial(exchanged, moekit.ep.AllGather(group, layer.experts)),
        **transformers_steps(here, given),
    }
    found = compared(here, steps, given)
    timed = take_turns(here, steps, given, rounds)
    for name, stages in timed.items():
        here.say(f"{layer.name}, {name}: " + ", ".join(f"{stage} {ms:.3f}" for stage, ms in stages.items()))
        here.say(f"    { ({k: float(f'{v:.4g}') for k, v in found[name].items()}) }")
        if max(found[name]["error"], found[name]["error of the gradient"]) > TOLERANCE:
            raise SystemExit(f"{name} computes something else")
    return {name: {"ms": timed[name], **found[name]} for name in steps}


def of_overlap(here: Here, layer: Layer, rounds: int) -> dict[str, Any]:
    """A shared expert beside the exchange, and after it."""
    given, inner = problem(here, layer), SHARED_INNER.get(layer.name, layer.inner)
    gate_up = torch.randn(2 * inner, layer.hidden, device=here.device).mul(layer.hidden**-0.5).to(torch.bfloat16)
    down = torch.randn(layer.hidden, inner, device=here.device).mul(inner**-0.5).to(torch.bfloat16)

    def shared(x: Tensor) -> Tensor:
        gate, up = (x @ gate_up.requires_grad_().T).chunk(2, 1)
        return (torch.nn.functional.silu(gate) * up) @ down.requires_grad_().T

    dispatcher = moekit.ep.AllToAll(dist.group.WORLD, layer.experts)
    steps = {
        "after": functools.partial(as_a_whole, dispatcher, shared, False),
        "beside": functools.partial(as_a_whole, dispatcher, shared, True),
        "without": functools.partial(as_a_whole, dispatcher, None, False),
    }
    timed = take_turns(here, steps, given, rounds)
    here.say(f"{layer.name}, shared expert: {timed}")
    return timed


def of_skew(here: Here, layer: Layer, rounds: int) -> dict[str, Any]:
    """A rank without tokens, and a router that sends everything to rank 0, with and without a bound on its rows."""
    given, group = problem(here, layer), dist.group.WORLD
    none = 0 if here.rank == here.ranks - 1 else layer.tokens
    starved = replace_tokens(given, slice(none))
    collapsed = replace_tokens(
        given, slice(None), indices=torch.arange(layer.topk).to(given.indices).expand_as(given.indices)
    )
    free = functools.partial(as_a_whole, moekit.ep.AllToAll(group, layer.experts), None, False)
    bound = functools.partial(as_a_whole, moekit.ep.AllToAll(group, layer.experts, max_rows=layer.tokens), None, False)
    found: dict[str, Any] = {"no tokens on the last rank": take_turns(here, {"free": free}, starved, rounds)["free"]}
    if layer.topk <= layer.experts // here.ranks:
        found["collapsed"] = take_turns(here, {"free": free, "bound": bound}, collapsed, max(rounds // 3, 1))
        found["peak"] = {k: v["peak"] for k, v in compared(here, {"free": free, "bound": bound}, collapsed).items()}
    here.say(f"{layer.name}, skew: {found}")
    return found


def of_one_batch(here: Here, layer: Layer, rounds: int) -> dict[str, Any]:
    """Through Transformers, where all ranks have the same tokens: moekit beside its own two."""
    given, steps = problem(here, layer, seed=0), {}
    mesh = init_device_mesh(here.device.type, (here.ranks,), mesh_dim_names=("ep",))
    for name, implementation in (("moekit", "moekit"), ("all_to_all", "grouped_mm"), ("all_reduce", "grouped_mm")):
        experts = experts_of_transformers(here, given, implementation)
        if experts is None:
            return {}
        from transformers.distributed.expert_parallel import EPImplementationInterface

        moekit.hf.register()
        steps[name] = functools.partial(through, EPImplementationInterface()[name](experts, mesh, mesh))
    found, timed = compared(here, steps, given), take_turns(here, steps, given, rounds)
    here.say(f"{layer.name}, one batch: { ({name: timed[name] | found[name] for name in steps}) }")
    return {name: {"ms": timed[name], **found[name]} for name in steps}


def of_graph(here: Here, layer: Layer, rounds: int) -> dict[str, Any]:
    """A capacity, with and without a CUDA graph."""
    if not here.on_gpu:
        return {}
    given, room = problem(here, layer), capacity(here, layer)
    dispatcher = moekit.ep.AllToAll(dist.group.WORLD, layer.experts, capacity=room)
    eager = functools.partial(as_a_whole, dispatcher, None, False)
    steps: dict[str, Step] = {"eager": eager, "graph": captured(here, dispatcher, given)}
    found, timed = compared(here, steps, given), take_turns(here, steps, given, rounds)
    here.say(f"{layer.name}, capacity {room}: { ({name: timed[name] | found[name] for name in steps}) }")
    return {name: {"ms": timed[name], **found[name]} for name in steps}


def capacity(here: Here, layer: Layer) -> int:
    """What is expected and six deviations: a uniform router stays below."""
    return min(layer.tokens, int(layer.tokens * needed(layer, here.ranks) + 6 * layer.tokens**0.5))


def replace_tokens(given: Problem, kept: slice, indices: Tensor | None = None) -> Problem:
    chosen = given.indices if indices is None else indices
    return replace(given, x=given.x[kept], indices=chosen[kept], weights=given.weights[kept], grad=given.grad[kept])


def run(args: argparse.Namespace) -> None:
    here = start(args.backend)
    layers = TINY if args.backend == "gloo" else [QWEN3, DEEPSEEK]
    sizes = (1e4, 1e5) if args.backend == "gloo" else (1e6, 1.6e7, 6.4e7, 2.56e8)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if here.on_gpu else platform.processor(),
        "ranks": here.ranks,
        "backend": args.backend,
        "torch": torch.__version__,
        "note": "a step began some 4 ms behind the host",
        "link": link(here, sizes),
        "layers": {},
    }
    parts = {
        "contenders": of_layer,
        "shared expert": of_overlap,
        "skew": of_skew,
        "one batch": of_one_batch,
        "graph": of_graph,
    }
    for name, part in parts.items():
        for layer in (layer for layer in layers if not args.only or args.only in layer.name):
            found["layers"].setdefault(layer.name, {})[name] = part(here, layer, args.rounds)
            gc.collect()
            if here.on_gpu:
                torch.cuda.empty_cache()
            if here.rank == 0 and args.out:  # what is there, in case the next does not end
                args.out.write_text(json.dumps([found], indent=1))
    dist.destroy_process_group()


def _spawned(rank: int, ranks: int, port: int, args: argparse.Namespace) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run(args)


FORWARD = ("permute", "exchange", "products", "combine")
BACKWARD = ("combine, backward", "products, backward", "exchange, backward")
STAGES = (*FORWARD, *BACKWARD, "all")


def tables(found: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    lines = [f"{found['ranks']} x {found['device']}, torch {found['torch']}: {found['note']}.", ""]
    lines += ["| to others, MB | ms | GB/s |", "|---|---|---|"]
    lines += [f"| {one['bytes'] / 1e6:.0f} | {one['ms']:.3f} | {one['rate'] / 1e9:.0f} |" for one in found["link"]]
    for name, layer in found["layers"].items():
        head = [f"{name}, ms", *STAGES, "MB sent", "MB kept", "MB at most"]
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for who, of in layer["contenders"].items():
            megabytes = [f"{of[what] / 1e6:.0f}" if of.get(what) else "" for what in ("bytes of rows", "kept", "peak")]
            lines.append(f"| {' | '.join([who, *times(of['ms'], STAGES), *megabytes])} |")
        lines += ["", f"| {name}, ms | forward | backward | all |", "|---|---|---|---|"]
        lines += [f"| {' | '.join([case, *times(ms, ('forward', 'backward', 'all'))])} |" for case, ms in wholes(layer)]
    return "\n".join(lines)


def times(ms: dict[str, float], stages: Sequence[str]) -> list[str]:
    return [f"{ms[stage]:.2f}" if stage in ms else "" for stage in stages]


def wholes(layer: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """The steps that were not split."""
    for case, ms in layer["shared expert"].items():
        yield f"shared expert: {case}", ms
    yield "no tokens on the last rank", layer["skew"]["no tokens on the last rank"]
    for case, ms in layer["skew"].get("collapsed", {}).items():
        yield f"collapsed router, {case}", ms
    for case, of in layer.get("one batch", {}).items():
        yield f"one batch on all ranks, through Transformers: {case}", of["ms"]
    for case, of in layer.get("graph", {}).items():
        yield f"capacity, {case}", of["ms"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl" if torch.cuda.is_available() else "gloo")
    parser.add_argument("--ranks", type=int, help="processes to start; default: one a GPU, or 2")
    parser.add_argument("--only", metavar="NAME", help="the layer with this in its name")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print what was measured, and measure nothing")
    args = parser.parse_args(argv)
    if args.table:
        print("\n\n".join(tables(found) for found in json.loads(args.table.read_text())))
    elif "RANK" in os.environ:
        run(args)
    else:
        ranks = args.ranks or (torch.cuda.device_count() if args.backend == "nccl" else 2)
        torch.multiprocessing.spawn(_spawned, args=(ranks, 29500 + os.getpid() % 1000, args), nprocs=ranks)


if __name__ == "__main__":
    main()
