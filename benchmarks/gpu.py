"""Check and time the GPU kernels: one command, on a machine with a GPU.

    python benchmarks/gpu.py                    # everything, about 10 minutes; JSON and PNG into benchmarks/out
    python benchmarks/gpu.py --quick            # one layer shape, nothing compiled
    python benchmarks/gpu.py --shape DeepSeek-V3  # another one, with everything
    python benchmarks/gpu.py --tune             # time the launch configurations too
    python benchmarks/gpu.py --peers DIR        # also against the packages in DIR (NeMo Automodel, Megatron-core, ...)
    python benchmarks/gpu.py --interpret        # no GPU: tiny shapes in Triton's interpreter, to try the script itself

Every result is compared with the reference before it is timed. Times are medians of CUDA events around single calls,
which rotate among input sets that together outgrow the L2 cache and are queued behind other work, so that the GPU does not
wait for the host; short ones are replayed from a CUDA graph. What the host takes to issue a call stands beside it. The
fraction is of the measured copy bandwidth: bytes that must move, over the time, over what a copy of gigabytes moves.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_cases import (
    DEVICE,
    DTYPE,
    INTERPRET,
    SHAPES,
    TINY,
    Case,
    Shape,
    drop_in_cases,
    glu_cases,
    load,
    normal,
    route,
    row_cases,
    small_cases,
)
from torch import Tensor
from torch._functorch import config as functorch_config

REPEATS = 2 if INTERPRET else 30
SLEEP_HZ = 2e9  # cycles a second of torch.cuda._sleep, about
# Relative error in the norm: bfloat16 rounds with one near 0.17%; a wrong row or a swapped half is far above 1.
TOLERANCE = 5e-3


@dataclass
class Result:
    """One line of the table."""

    case: str
    who: str
    ms: float
    bytes: int = 0
    flops: float = 0.0
    note: str = ""
    host_ms: float = 0.0
    fraction: float = field(default=0.0)


# --- timing -----------------------------------------------------------------------------------------------------------


def synchronize() -> None:
    if not INTERPRET:
        torch.cuda.synchronize()


def median_ms(call: Callable[[int], Any], repeats: int = REPEATS) -> float:
    """Median time of ``call(i)``, i = 0, 1, ..., on the GPU: it is kept busy until the host has queued all of them."""
    for i in range(2):
        call(i)
    synchronize()
    if INTERPRET:
        return statistics.median(host_times(call, repeats))
    queueing = host_times(call, repeats)
    synchronize()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    torch.cuda._sleep(int(min(1.5e-3 * sum(queueing), 0.2) * SLEEP_HZ))
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        start.record()
        call(i)
        end.record()
    synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))


def host_times(call: Callable[[int], Any], repeats: int = REPEATS) -> list[float]:
    """Times in ms that the host takes to issue ``call(i)``; on a GPU the work itself goes on behind it."""
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        call(i)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def graph_ms(call: Callable[[int], Any], calls: int = 20) -> float:
    """Time of one of ``calls`` calls replayed from a CUDA graph."""
    if INTERPRET:
        return median_ms(call)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(3):
            call(i)
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return median_ms(lambda i: graph.replay(), 10) / calls


def ceilings() -> dict[str, float]:
    """Bandwidth in GB/s of a copy (bytes read and written) and of a fill, TFLOP/s of a bf16 product, a launch in us."""
    size, side = (1 << 12, 64) if INTERPRET else (1 << 31, 8192)
    source = torch.randint(0, 1 << 30, (size // 4,), dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    copy = median_ms(lambda i: target.copy_(source))
    fill = median_ms(lambda i: target.zero_())
    launch = graph_ms(lambda i: target[:8].add_(1))
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product = median_ms(lambda i: a @ b)
    return {
        "copy_GBps": 2 * size / copy / 1e6,
        "fill_GBps": size / fill / 1e6,
        "matmul_TFLOPs": 2 * side**3 / product / 1e9,
        "launch_us": 1e3 * launch,
    }


# --- running ----------------------------------------------------------------------------------------------------------


def run_case(case: Case, shape: Shape, *, compiled: bool) -> Iterator[Result]:
    sets = [case.draw() for _ in range(case.sets)]
    for x in (x for inputs in sets for i, x in enumerate(inputs) if i in case.gradients):
        x.requires_grad_()
    expected = with_gradients(case, case.reference, sets[0])
    for who, function in case.contenders.items():
        if who == "compile":
            if not compiled:
                continue
            torch._dynamo.reset()
            function = torch.compile(function, backend="eager" if INTERPRET else "inductor", dynamic=False)
        try:
            yield from run_contender(case, shape, who, function, sets, expected)
        except Exception as error:
            if who == "moekit":
                raise
            print(f"  {case.name}, {who}: {type(error).__name__}: {str(error)[:200]}")


def run_contender(
    case: Case, shape: Shape, who: str, function: Callable, sets: list[list[Tensor]], expected: list[Tensor]
) -> Iterator[Result]:
    label, timer = f"{shape.name}: {case.name}", graph_ms if case.short and who != "compile" else median_ms
    error = worst_error(with_gradients(case, function, sets[0]), expected)
    note = "" if error <= (0.1 if "float8" in case.name else TOLERANCE) else f"error {error:.2g}"
    if note and who == "moekit":
        raise AssertionError(f"{label}: relative {note}")
    with torch.no_grad():
        ms = timer(lambda i: function(*sets[i % len(sets)]))
        host = statistics.median(host_times(lambda i: function(*sets[i % len(sets)])))
    yield Result(label, who, ms, case.forward_bytes, note=note, host_ms=host)
    if case.backward_bytes:
        outputs = [function(*inputs) for inputs in sets]
        wrt = [[inputs[i] for i in case.gradients] for inputs in sets]
        upstream = [torch.randn_like(out) for out in outputs]

        def backward(i: int) -> Any:
            i %= len(sets)
            return torch.autograd.grad(outputs[i], wrt[i], upstream[i], retain_graph=True)

        ms = median_ms(backward)
        host = statistics.median(host_times(backward))
        yield Result(f"{label}, backward", who, ms, case.backward_bytes, note=note, host_ms=host)


def with_gradients(case: Case, function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of its sum with fixed random coefficients."""
    out = function(*inputs)
    if not case.gradients:
        return [out.detach()]
    generator = torch.Generator(DEVICE).manual_seed(0)
    upstream = torch.randn(out.shape, generator=generator, device=DEVICE).to(DTYPE).to(out.dtype)
    grads = torch.autograd.grad(out, [inputs[i] for i in case.gradients], upstream)
    return [out.detach(), *grads]


def worst_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error in the norm; integers must be equal."""
    errors = []
    for a, b in zip(found, expected, strict=True):
        # Piece by piece: gradients of weights may fill a quarter of the memory.
        pieces = list(zip(a.flatten().split(1 << 28), b.flatten().split(1 << 28), strict=True))
        difference = sum(float((x.float() - y.float()).norm()) ** 2 for x, y in pieces) ** 0.5
        norm = sum(float(y.float().norm()) ** 2 for _, y in pieces) ** 0.5
        errors.append(difference / max(norm, 1e-30))
    return max(float("inf") if error != error else error for error in errors)


def grouped_products(s: Shape) -> Iterator[Result]:
    """``grouped_mm`` alone: forward, input gradient, weight gradient of the gate/up projection."""
    offsets = route(s).offsets
    x, grad = normal(s.R, s.H), normal(s.R, 2 * s.I)
    w = normal(s.E, 2 * s.I, s.H)
    flops = 2 * s.R * s.H * 2 * s.I
    calls = {
        "forward": lambda i: F.grouped_mm(x, w.mT, offs=offsets),
        "input gradient": lambda i: F.grouped_mm(grad, w, offs=offsets),
        "weight gradient": lambda i: F.grouped_mm(grad.T, x, offs=offsets),
    }
    for name, call in calls.items():
        yield Result(f"{s.name}: grouped_mm, {name}", "torch", median_ms(call, 10 if not INTERPRET else 2), flops=flops)


def expert_mlps(s: Shape) -> Iterator[Result]:
    """The whole expert MLP, forward and backward, with its peak memory."""
    routing = route(s)
    x = normal(s.T, s.H).requires_grad_()
    gate_up, down = (w.mul_(0.02).requires_grad_() for w in (normal(s.E, 2 * s.I, s.H), normal(s.E, s.H, s.I)))
    p, indices = routing.weights.detach().requires_grad_(), routing.indices

    def eager(x: Tensor) -> Tensor:
        order = indices.flatten().sort(stable=True).indices
        h = F.grouped_mm(x[order // s.K], gate_up.mT, offs=routing.offsets)
        gate, up = h.chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, down.mT, offs=routing.offsets) * p.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // s.K, out.to(x.dtype))

    contenders = {f"moekit, save={save}": functools.partial(ours_mlp, indices, p, gate_up, down, save=save)
                  for save in ("recompute", "fp8", "all")} | {"eager": eager}  # fmt: skip
    contenders |= transformers_mlp(s, indices, p, gate_up, down)
    liger = load("liger_kernel.ops.fused_moe")
    if liger and not INTERPRET:
        contenders["liger"] = lambda x: liger.LigerFusedMoEFunction.apply(x, gate_up, down, indices.int(), p)
    flops, expected = 3 * 2 * s.R * s.H * 3 * s.I, []
    for who, function in contenders.items():

        def step(i: int, function: Callable = function) -> Any:
            out = function(x)
            return torch.autograd.grad(out, [x, p, gate_up, down], out)

        try:
            expected = expected or step(0)
            error = worst_error(step(0), expected)
        except Exception as problem:
            if who.startswith("moekit"):
                raise
            print(f"  expert MLP, {who}: {type(problem).__name__}: {str(problem)[:200]}")
            continue
        if not INTERPRET:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        ms = median_ms(step, 2 if INTERPRET else 10)
        peak = "" if INTERPRET else f"peak {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB"
        if who.startswith("moekit") and not INTERPRET:
            peak += f", {100 * outside_products(step):.1f}% outside matrix products"
        note = peak if error <= (0.1 if "fp8" in who else 0.02) else f"{peak} error {error:.2g}"
        yield Result(f"{s.name}: expert MLP, forward and backward", who, ms, flops=flops, note=note)


def outside_products(step: Callable[[int], Any]) -> float:
    """The share of a step's time on the GPU that is not in matrix products."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for i in range(3):
            step(i)
        synchronize()
    times = {event.key: event.self_device_time_total for event in found.key_averages()}
    products = sum(ms for name, ms in times.items() if any(part in name.lower() for part in ("gemm", "cutlass", "nvjet")))
    for name, us in sorted(times.items(), key=lambda item: -item[1])[:14]:
        print(f"    {us / 3e3:8.3f} ms  {name[:100]}")
    return 1 - products / sum(times.values())


def transformers_mlp(s: Shape, indices: Tensor, p: Tensor, gate_up: Tensor, down: Tensor) -> dict[str, Callable]:
    """Transformers' own grouped_mm implementation, in one of its own classes."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(num_experts=s.E, hidden_size=s.H, moe_intermediate_size=s.I)
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
    except Exception as error:  # a peer may fail in any way
        print(f"  no Transformers: {type(error).__name__}: {str(error)[:120]}")
        return {}
    del experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj, experts.down_proj = gate_up, down
    return {"transformers grouped_mm": lambda x: experts(x, indices, p.to(x.dtype))}


def ours_mlp(indices: Tensor, p: Tensor, gate_up: Tensor, down: Tensor, x: Tensor, *, save: str) -> Tensor:
    from moekit.ops.experts import experts

    return experts(x, (indices, p), gate_up, down, save=save)


# elements a thread, warps, limit of registers
TUNED = [
    (4, 4, None), (4, 8, None), (8, 2, None), (8, 4, None), (8, 4, 80), (8, 4, 128), (8, 8, None), (8, 8, 80),
    (16, 2, None), (16, 4, None), (16, 4, 128), (16, 8, 128), (32, 4, None), (32, 4, 128), (32, 8, 128),
]  # fmt: skip


def tune(shapes: list[Shape]) -> Iterator[Result]:
    """moekit's kernels under every launch configuration; what wins belongs into the table of ``_launch.py``."""
    from moekit.kernels.triton import _launch

    glu = ("glu", "glu_fp8", "glu_backward", "glu_fp8_backward")
    families = {"glu": (glu_cases, *glu), "rows": (row_cases, "permute", "unpermute", "unpermute_backward")}
    standard = dict(_launch._TILES)
    for shape, (make, *names) in ((s, f) for s in shapes for f in families.values()):
        for config in TUNED:
            _launch._TILES.update({name: _launch.Tile(*config) for name in names})
            for case in make(shape):
                case.contenders = {"moekit": case.contenders["moekit"]}
                for result in run_case(case, shape, compiled=False):
                    result.who = "{} elements, {} warps, registers {}".format(*config)
                    yield result
        _launch._TILES.update(standard)


# --- report -----------------------------------------------------------------------------------------------------------


def describe(result: Result, limits: dict[str, float]) -> str:
    rate = ""
    if result.bytes:
        result.fraction = result.bytes / result.ms / 1e6 / limits["copy_GBps"]
        rate = f"{result.bytes / result.ms / 1e6:7.0f} GB/s {100 * result.fraction:5.1f}%"
    if result.flops:
        rate = f"{result.flops / result.ms / 1e9:7.1f} TFLOP/s"
    host = f" host {1e3 * result.host_ms:5.0f} us" if result.host_ms else ""
    return f"{result.case:58} {result.who:22} {result.ms:9.4f} ms {rate}{host} {result.note}"


def draw_chart(results: list[Result], path: Path) -> None:
    """Bars: the fraction of copy bandwidth of each operation, moekit beside the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(r.case for r in results if r.bytes))
    names = list(dict.fromkeys(r.who for r in results if r.bytes and "warps" not in r.who))
    height = 0.8 / max(len(names), 1)
    _, axes = plt.subplots(figsize=(9, 1 + 0.45 * len(cases)))
    for j, name in enumerate(names):
        bars = [(cases.index(r.case) + j * height, r.fraction) for r in results if r.bytes and r.who == name]
        axes.barh(*zip(*bars, strict=True), height=height, label=name)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("bytes that must move / time / copy bandwidth")
    axes.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def environment() -> dict[str, str]:
    import triton

    name = platform.processor() if INTERPRET else torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape only, nothing compiled")
    parser.add_argument("--tune", action="store_true", help="time launch configurations instead")
    parser.add_argument("--shape", choices=[s.name for s in SHAPES], help="one layer shape alone")
    parser.add_argument("--match", default="", help="only cases with this in their name")
    parser.add_argument("--peers", type=Path, help="a folder of packages to compare with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="where JSON and PNG go")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes, without a GPU")
    options = parser.parse_args()
    if options.peers:
        sys.path.append(str(options.peers))
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    shapes = TINY if INTERPRET else SHAPES[:1] if options.quick else SHAPES
    if options.shape:
        shapes = [shape for shape in shapes if shape.name == options.shape]
    functorch_config.donated_buffer = False  # backward is timed on a graph that is kept
    limits, results = ceilings(), []
    print(environment(), {name: round(value, 1) for name, value in limits.items()}, flush=True)

    def note(found: Iterator[Result]) -> None:
        for result in found:
            results.append(result)
            print(describe(result, limits), flush=True)

    if options.tune:
        note(tune(shapes))
    else:
        for shape in shapes:
            if "grouped" in f"grouped_mm {options.match}":
                note(grouped_products(shape))
        for shape in shapes:
            for make in (glu_cases, row_cases, small_cases, drop_in_cases):
                for case in make(shape):
                    if options.match in case.name:
                        note(run_case(case, shape, compiled=not options.quick))
            if not options.match:
                note(expert_mlps(shape))
            write(results, limits, options.out)
    write(results, limits, options.out)
    if not options.tune:
        draw_chart(results, options.out / "gpu.png")
    print(f"written to {options.out}")


def write(results: list[Result], limits: dict[str, float], folder: Path) -> None:
    """What was measured so far, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(), "ceilings": limits, "results": [asdict(r) for r in results]}
    (folder / "gpu.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
