"""Time and weigh moekit's expert MLP against Transformers' own experts implementations, in Transformers' own classes.

The classes are ``Qwen3MoeExperts``, ``MixtralExperts`` and ``GptOssExperts`` with random weights; an implementation is
chosen as a user does it. For each layer: bytes kept for backward (saved-tensor hooks; parameters and the layer's own
inputs excluded), forward without gradients, a training step (forward and backward to every parameter, the tokens and
the routing weights), the share of a step outside matrix products, decoding one token, and the peak resident memory of a
step (a process each, plain glibc, above what it held with the layer built; the gradients are in it).

``eager`` builds a gradient of all experts for each expert, so with many experts its step is measured at few tokens.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _harness as harness
import torch
from _harness import Contender, Shape, measure, progress, verdict
from torch import Tensor

SHAPES = {
    "qwen3": Shape("qwen3", 2048, 2048, 768, 128, 8),
    "mixtral": Shape("mixtral", 512, 4096, 3584, 8, 2),
    "gpt-oss": Shape("gpt-oss", 512, 2880, 2880, 32, 4),
}
_QUICK = {
    "qwen3": Shape("qwen3", 128, 512, 192, 32, 8),
    "mixtral": Shape("mixtral", 64, 512, 448, 8, 2),
    "gpt-oss": Shape("gpt-oss", 64, 384, 384, 16, 4),
}
_FULL_TOKENS = {"qwen3": 4096, "mixtral": 2048, "gpt-oss": 2048}
_OURS = ("moekit", "moekit fp8", "moekit all")
_PEERS = ("grouped_mm", "batched_mm", "eager")
FIGURES = ("saved", "forward", "step", "outside", "decode", "peak", "eager")
_EAGER_TOKENS = 256
_FEW_EXPERTS = 8  # up to here eager's step is like the others'
_MEMORY_LIMIT = 20 * 2**30
_BATCHED_LIMIT = 2 * 2**30  # batched_mm copies an expert's weights for every row, and keeps them for backward
_GEMMS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mv", "aten::addmv")
_NOISE = 0.03
_MIB = 2**20
_GROUPS = ("saved MiB", "peak MiB", "step ms", "outside GEMMs %", "forward ms", "decode ms")


# --- one layer ------------------------------------------------------------------------------------------------------


class Problem:
    """A layer of Transformers, its inputs and an upstream gradient."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        self.shape = shape
        self.layer = make_layer(shape, dtype)
        T, E, K = shape.tokens, shape.experts, shape.topk
        weights, self.indices = torch.randn(T, E).softmax(1).topk(K)
        self.weights = weights.to(dtype).requires_grad_()
        self.tokens = torch.randn(T, shape.hidden).to(dtype).requires_grad_()
        self.grad = torch.randn(T, shape.hidden).to(dtype)

    @contextlib.contextmanager
    def using(self, implementation: str) -> Iterator[None]:
        """Switch the layer to an implementation."""
        self.layer.config._experts_implementation = implementation
        yield

    def forward(self) -> Tensor:
        """The layer's output."""
        return self.layer(self.tokens, self.indices, self.weights)

    def step(self) -> None:
        """Forward and backward as in training: gradients are new each time."""
        self.forward().backward(self.grad)
        for tensor in (self.tokens, self.weights, *self.layer.parameters()):
            tensor.grad = None

    def contenders(self, names: Sequence[str], call: Callable[[], Any]) -> list[Contender]:
        """``call`` under each implementation."""
        return [Contender(name, call, functools.partial(self.using, name)) for name in names]


def make_layer(shape: Shape, dtype: torch.dtype) -> Any:
    """The experts module of the model that the shape is named after (Qwen3's for any other name)."""
    import transformers
    from transformers.models import gpt_oss, mixtral, qwen3_moe

    sizes: dict[str, Any] = {"hidden_size": shape.hidden}
    if shape.name == "gpt-oss":
        config = transformers.GptOssConfig(num_local_experts=shape.experts, intermediate_size=shape.inner, **sizes)
        cls = gpt_oss.modeling_gpt_oss.GptOssExperts
    elif shape.name == "mixtral":
        config = transformers.MixtralConfig(num_local_experts=shape.experts, intermediate_size=shape.inner, **sizes)
        cls = mixtral.modeling_mixtral.MixtralExperts
    else:
        config = transformers.Qwen3MoeConfig(num_experts=shape.experts, moe_intermediate_size=shape.inner, **sizes)
        cls = qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    layer = cls(config)
    torch.set_default_dtype(before)
    for parameter in layer.parameters():
        _fill(parameter.data.view(-1), 1 / shape.hidden**0.5)
    return layer


def _fill(flat: Tensor, scale: float) -> None:
    """Random values, a prime number of them repeated: drawing a billion takes too long."""
    block = (torch.randn(1_000_003) * scale).to(flat.dtype)
    for part in flat.split(block.numel()):
        part.copy_(block[: part.numel()])


def register() -> None:
    """Make moekit's implementation known under its name, and once more for each other ``save``."""
    from transformers.integrations.moe import ExpertsInterface

    from moekit import hf

    hf.register()
    for name in _OURS[1:]:
        ExpertsInterface.register(name, functools.partial(hf.experts_forward, save=name.split()[1]))


# --- the figures ----------------------------------------------------------------------------------------------------


def saved_bytes(problem: Problem, implementation: str) -> int:
    """What one forward keeps for backward, each storage once."""
    own = (problem.tokens, problem.indices, problem.weights, *problem.layer.parameters())
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with problem.using(implementation), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = problem.forward()
    del output  # kept alive until here, so that no address was used twice
    return sum(kept.values())


def outside_gemm(problem: Problem, implementation: str) -> float:
    """The share of a training step that is not spent in matrix products."""
    shares = []
    for _ in range(2):
        with problem.using(implementation), torch.profiler.profile() as profile:
            start = time.perf_counter()
            problem.step()
            seconds = time.perf_counter() - start
        inside = sum(event.cpu_time_total for event in profile.key_averages() if event.key in _GEMMS)
        shares.append(1 - inside / 1e6 / seconds)
    return sum(shares) / len(shares)


def decode(problem: Problem, budget: float) -> harness.Measured:
    """One token, other experts at each call, and reading those experts' weights once for comparison."""
    shape, layer = problem.shape, problem.layer
    sets = torch.arange(shape.experts // shape.topk * shape.topk).view(-1, 1, shape.topk).unbind()
    token, weights = problem.tokens[:1].detach(), problem.weights[:1].detach()
    large = [p.data for p in layer.parameters() if p.dim() == 3]
    words = [[p[e].view(-1).view(torch.int64) for p in large] for e in range(shape.experts)]

    def one_token(turns: Iterator[Tensor]) -> Tensor:
        return layer(token, next(turns), weights)

    def read(turns: Iterator[Tensor]) -> None:
        for expert in next(turns)[0].tolist():
            for part in words[expert]:
                part.sum()

    contenders = [
        Contender(name, functools.partial(one_token, itertools.cycle(sets)), functools.partial(problem.using, name))
        for name in ("moekit", *_PEERS)
    ]
    with torch.no_grad():
        return measure([*contenders, Contender("read weights", functools.partial(read, itertools.cycle(sets)))], budget)


def peak_bytes(shape: Shape, dtype: torch.dtype, implementation: str) -> int:
    """Peak resident memory of a first training step above what the process held before it."""
    small = Problem(replace(shape, tokens=64, hidden=64, inner=64, experts=8, topk=2), dtype)
    with small.using(implementation):
        small.step()  # compiles and loads everything
    problem = Problem(shape, dtype)
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = harness.process_bytes("VmRSS")
    with problem.using(implementation):
        problem.step()
    return harness.process_bytes("VmHWM") - before


# --- jobs -----------------------------------------------------------------------------------------------------------


def work(job: dict) -> tuple[list[dict], list[str]]:
    """The figures of one job."""
    register()
    shape, dtype = Shape(**job["shape"]), harness.DTYPES[job["dtype"]]
    record = {key: job[key] for key in ("kind", "mode", "shape", "dtype", "judged")}
    needed = memory_needed(shape, dtype)
    available = min(_MEMORY_LIMIT, harness.memory_bytes("MemAvailable") or _MEMORY_LIMIT)
    if needed > available:
        gib = [round(n / 2**30, 1) for n in (needed, available)]
        return [], [f"skipped {job['label']}: needs about {gib[0]} GiB, {gib[1]} GiB to use"]
    if job["kind"] == "peak":
        peak = peak_bytes(shape, dtype, job["implementation"])
        _say("peak MiB", {job["implementation"]: peak / _MIB})
        return [{**record, "implementation": job["implementation"], "bytes": peak}], []
    if job["kind"] == "eager":
        problem = Problem(shape, dtype)
        step = measure(problem.contenders(("moekit", "grouped_mm", "eager"), problem.step), job["budget"], least=3)
        progress("step", step)
        return [{**record, "step": asdict(step)}], []
    notes = []
    if not _batched_fits(shape, dtype):
        size = _batched_bytes(shape, dtype) / 2**30
        notes.append(f"batched_mm: decode only; it would copy {size:.0f} GiB of weights for {shape} {job['dtype']}")
    return [{**record, **_figures(Problem(shape, dtype), job)}], notes


def _figures(problem: Problem, job: dict) -> dict[str, Any]:
    found: dict[str, Any] = {}
    wanted, budget = job["figures"], job["budget"]
    batched = ["batched_mm"] if _batched_fits(problem.shape, problem.tokens.dtype) else []
    every = [*_OURS, "grouped_mm", *batched, "eager"]
    if "saved" in wanted:
        found["saved"] = {name: saved_bytes(problem, name) for name in every}
        _say("saved MiB", {name: value / _MIB for name, value in found["saved"].items()})
    if "forward" in wanted:
        names = ["moekit", *every[len(_OURS) :]]
        with torch.no_grad():
            found["forward"] = measure(problem.contenders(names, problem.forward), budget, least=3)
        progress("forward", found["forward"])
    if "step" in wanted:
        names = every if problem.shape.experts <= _FEW_EXPERTS else every[:-1]
        # Gigabytes of fresh gradients: the slowest to settle.
        found["step"] = measure(problem.contenders(names, problem.step), 3 * budget, least=7)
        progress("step", found["step"])
    if "outside" in wanted:
        found["outside"] = {name: outside_gemm(problem, name) for name in ("moekit", "grouped_mm")}
        _say("outside GEMMs %", {name: share * 100 for name, share in found["outside"].items()})
    if "decode" in wanted:
        found["decode"] = decode(problem, budget / 2)
        progress("decode", found["decode"])
    return {key: asdict(value) if isinstance(value, harness.Measured) else value for key, value in found.items()}


def _say(what: str, values: Mapping[str, float]) -> None:
    print(f"  {what}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()), file=sys.stderr, flush=True)


def memory_needed(shape: Shape, dtype: torch.dtype) -> int:
    """A generous estimate for a step: parameters, their gradients, freed blocks that cannot be reused, row buffers."""
    parameters = 3 * shape.experts * shape.hidden * shape.inner
    rows = shape.rows * (4 * shape.hidden + 8 * shape.inner)
    return (3 * parameters + 2 * rows) * dtype.itemsize


def _batched_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return 3 * shape.rows * shape.hidden * shape.inner * dtype.itemsize


def _batched_fits(shape: Shape, dtype: torch.dtype) -> bool:
    return _batched_bytes(shape, dtype) <= _BATCHED_LIMIT


def plan(args: Any) -> list[dict]:
    """The jobs that the command line asks for."""
    known = _QUICK if args.quick else SHAPES
    shapes = [harness.parse_shape(args.shape, known)] if args.shape else list(known.values())
    if args.full:
        shapes = [replace(shape, tokens=_FULL_TOKENS.get(shape.name, shape.tokens)) for shape in shapes]
    figures = [figure for figure in FIGURES if (args.only or "") in figure]
    dtypes = [args.dtype] if args.dtype else (["bf16"] if args.quick else list(harness.DTYPES))
    jobs = []
    for shape, dtype in itertools.product(shapes, dtypes):
        # float32 is slow: fewer tokens, and one mode, unless asked for.
        short = dtype == "float32" and not (args.full or args.dtype or args.shape)
        if short:
            shape = replace(shape, tokens=shape.tokens // 4)
        modes = harness.modes(args)[-1:] if short else harness.modes(args)
        common = {
            "shape": asdict(shape),
            "dtype": dtype,
            "figures": figures,
            "budget": 0.5 if args.quick else (30.0 if args.full else 8.0),
            "judged": shape.name in SHAPES and not (args.quick or ":" in (args.shape or "")),
        }
        jobs += _jobs_of(shape, common, modes, args.quick)
    return jobs


def _jobs_of(shape: Shape, common: dict, modes: Sequence[str], quick: bool) -> list[dict]:
    figures, title = common["figures"], f"{shape} {common['dtype']}"
    jobs = []
    if set(figures) - {"peak", "eager"}:
        jobs += [{**common, "kind": "time", "mode": mode, "label": f"{mode}: {title}"} for mode in modes]
    if "eager" in figures and shape.experts > 32 and common["dtype"] == "bf16":
        few = replace(shape, tokens=min(shape.tokens, _EAGER_TOKENS))
        label = f"{modes[-1]}: step against eager, {few}"
        jobs.append({**common, "kind": "eager", "mode": modes[-1], "shape": asdict(few), "label": label})
    if "peak" in figures:
        names = ["moekit", "grouped_mm"] if quick else ["moekit", "moekit fp8", "grouped_mm"]
        names += ["eager"] if shape.experts <= _FEW_EXPERTS else []
        for name in names:
            label = f"peak memory of {name}: {title}"
            jobs.append({**common, "kind": "peak", "mode": "default", "implementation": name, "label": label})
    return jobs


# --- verdicts and report --------------------------------------------------------------------------------------------


def _ratio(times: Mapping[str, Mapping], peers: Sequence[str], ours: str = "moekit") -> float | None:
    """The best peer's median over ours."""
    best = min((times[peer]["median"] for peer in peers if peer in times), default=None)
    return None if best is None or ours not in times else best / times[ours]["median"]


def judge(records: Sequence[dict]) -> list[dict]:
    """Every target with what was measured."""
    found: list[tuple[str, dict]] = []
    for record in records:
        if not record["judged"] or record["kind"] == "peak":
            continue
        where = f"{record['mode']}, {record['shape']['name']} T={record['shape']['tokens']} {record['dtype']}"
        if record["kind"] == "eager":
            ratio = _ratio(record["step"]["times"], ["eager"])
            found.append((where, verdict("step: times faster than eager", ratio, 30)))
            continue
        found += [(where, target) for target in _time_targets(record)]
    for key, peaks in _peaks(records).items():
        if peaks.pop("judged"):
            best = min((value for name, value in peaks.items() if name in _PEERS), default=None)
            ratio = best / peaks["moekit"] if best and "moekit" in peaks else None
            found.append((key, verdict("peak memory: the best peer's over ours", ratio, 1.0)))
    return [{**target, "where": where} for where, target in found]


def _time_targets(record: dict) -> Iterator[dict]:
    name, dtype, mode = record["shape"]["name"], record["dtype"], record["mode"]
    if "saved" in record and name == "qwen3" and dtype == "bf16":
        saved = record["saved"]
        for peer, ours, wanted in (
            ("grouped_mm", "moekit", 4.5),
            ("eager", "moekit", 5.5),
            ("grouped_mm", "moekit fp8", 8.0),
        ):
            yield verdict(f"saved bytes: {peer}'s over {ours}'s", saved[peer] / saved[ours], wanted)
    if "step" in record and name in ("qwen3", "mixtral") and dtype == "bf16":
        wanted = 1.25 if (name, mode) == ("qwen3", "default") else 1.15
        yield verdict("step: times faster than grouped_mm", _ratio(record["step"]["times"], ["grouped_mm"]), wanted)
    if "outside" in record and dtype == "bf16":
        yield verdict("step: share outside GEMM calls", record["outside"]["moekit"], 0.12, at_most=True)
    if "forward" in record:
        best = _ratio(record["forward"]["times"], _PEERS)
        yield verdict("forward: times faster than the best peer", best, 1.0, slack=_NOISE)
    if "decode" in record:
        yield verdict("decode: times faster than the best peer", _ratio(record["decode"]["times"], _PEERS), 1.5)


def _peaks(records: Sequence[dict]) -> dict[str, dict[str, Any]]:
    """Peak bytes by implementation, for each layer."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["kind"] == "peak":
            key = f"{Shape(**record['shape'])} {record['dtype']}"
            found.setdefault(key, {"judged": record["judged"]})[record["implementation"]] = record["bytes"]
    return found


def columns(records: Sequence[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Layer -> column -> implementation -> figure (MiB, ms or percent)."""
    layers: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        layer = layers.setdefault(f"{Shape(**record['shape'])} {record['dtype']}", {})
        if record["kind"] == "peak":
            layer.setdefault("peak MiB", {})[record["implementation"]] = record["bytes"] / _MIB
            continue
        if "saved" in record:
            layer["saved MiB"] = {name: value / _MIB for name, value in record["saved"].items()}
        for figure in ("forward", "step", "decode"):
            if figure in record:
                times = record[figure]["times"].items()
                layer[f"{figure} ms, {record['mode']}"] = {name: t["median"] * 1e3 for name, t in times}
        if "outside" in record:
            shares = record["outside"].items()
            layer[f"outside GEMMs %, {record['mode']}"] = {name: share * 100 for name, share in shares}
    order = {name: _GROUPS.index(name.partition(",")[0]) for found in layers.values() for name in found}
    return {layer: {name: found[name] for name in sorted(found, key=order.__getitem__)} for layer, found in layers.items()}


def print_tables(records: Sequence[dict], console: Any) -> None:
    """A table for each layer: the figure, and how many times moekit's that is."""
    from rich.table import Table

    for layer, found in columns(records).items():
        table = Table("implementation", title=f"{layer} (times moekit's)", title_justify="left")
        for column in found:
            table.add_column(column, justify="right")
        for name in (*_OURS, *_PEERS, "read weights"):
            cells = [_cell(values, name) for values in found.values()]
            if any(cells):
                table.add_row(name, *cells)
        console.print(table)


def _cell(values: Mapping[str, float], name: str) -> str:
    if name not in values:
        return ""
    ratio = f" ({values[name] / values['moekit']:.2f}x)" if values.get("moekit") and name != "moekit" else ""
    return f"{values[name]:.4g}{ratio}"


def plot(records: Sequence[dict], path: Path) -> None:
    """A row of bar charts for each layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = columns(records)
    groups = [group for group in _GROUPS if any(name.startswith(group) for found in layers.values() for name in found)]
    if not layers:
        return
    figure = Figure(figsize=(3.6 * len(groups), 3.2 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(layers), len(groups), squeeze=False)
    for row, (layer, found) in zip(axes, layers.items(), strict=True):
        for axis, group in zip(row, groups, strict=True):
            _bars(axis, {name: values for name, values in found.items() if name.startswith(group)})
            axis.set_title(group, fontsize=9)
        row[0].set_ylabel(layer.replace(" (", "\n(", 1), fontsize=8)
    figure.suptitle("The expert MLP: less is better")
    figure.savefig(path, dpi=80)


def _bars(axis: Any, found: Mapping[str, Mapping[str, float]]) -> None:
    names = [name for name in (*_OURS, *_PEERS, "read weights") if any(name in values for values in found.values())]
    if not names:
        axis.set_axis_off()
        return
    height = 0.8 / len(found)
    for number, (column, values) in enumerate(found.items()):
        there = [(place, values[name]) for place, name in enumerate(names) if name in values]
        places = [place + (number - (len(found) - 1) / 2) * height for place, _ in there]
        bars = axis.barh(places, [value for _, value in there], height, label=column.partition(", ")[2])
        axis.bar_label(bars, fmt="{:.4g}", fontsize=6, padding=2)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    every = [value for values in found.values() for value in values.values() if value > 0]
    axis.set_xscale("log" if max(every, default=1) > 100 * min(every, default=1) else "linear")
    if len(found) > 1:
        axis.legend(fontsize=6)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; status 1 if something failed to run."""
    args = harness.arguments(__doc__ or "", SHAPES, argv)
    if args.worker:
        return harness.serve(args, work)
    console = harness.console()
    found = harness.machine()
    records, notes = harness.run_jobs(__file__, args.peers, plan(args))
    console.print(harness.machine_line(found), markup=False)
    print_tables(records, console)
    for record in records:
        where = f"{record['mode']}, {record['shape']['name']} {record['dtype']}"
        for figure in ("forward", "step", "decode"):
            measured = record.get(figure, {})
            notes += [f"{where} {figure}: {name} failed: {why}" for name, why in measured.get("failed", {}).items()]
            if strange := harness.unlike(measured.get("differences", {})):
                notes.append(f"{where} {figure}: result differs from moekit's: {', '.join(strange)}")
    for note in dict.fromkeys(notes):
        console.print(f"note: {note}", markup=False)
    targets = judge(records)
    for target in targets:
        console.print(f"{target['where']}: {harness.verdict_text(target)}")
    console.print(harness.summary(targets))
    harness.save_json(args.out / "experts.json", machine=found, notes=notes, records=records, targets=targets)
    with contextlib.suppress(ImportError):
        plot(records, args.out / "experts.png")
    return int(any("FAILED" in note for note in notes))


if __name__ == "__main__":
    sys.exit(main())
