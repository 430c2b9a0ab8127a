"""Time moekit's CPU operators against the published ones, plain PyTorch and ``copy_`` of the same bytes.

Peers are imported where they are installed (``make bench`` installs them into ``.venv/peers``) and skipped, with a
note, where not: NeMo Automodel's ``moe_utils`` as shipped, that is compiled after warm-up, and a second copy of it
loaded without ``torch.compile``; Megatron-core's where it has the operator. ``moekit torch`` is moekit on its PyTorch
reference. Routing weights are float32, as routers give them. Backward is timed alone, on a graph that is kept.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import _harness as harness
import torch
from _harness import Contender, Shape, copy_contender, measure, progress, verdict
from torch import Tensor
from torch.nn import functional as F

import moekit
from moekit import moe_utils
from moekit.ops import tables

SHAPES = {
    "qwen3": Shape("qwen3", 4096, 2048, 768, 128, 8),
    "mixtral": Shape("mixtral", 4096, 4096, 3584, 8, 2),
    "gpt-oss": Shape("gpt-oss", 4096, 2880, 2880, 32, 4),
}
_JUDGED = (SHAPES["qwen3"], SHAPES["mixtral"])
_FEW_TOKENS = (64, 1)
# float32 has to reach this part of what bf16 reaches against the published functions.
_FLOAT32_PART = 0.6
# Medians of repeated runs of the same code differ by this much at a few microseconds a call.
_NOISE = 0.03
_COLUMNS = ("moekit", "moekit torch", "nemo", "nemo eager", "megatron", "plain", "copy_")

Maker = Callable[[], Callable[[], Any]]


# --- cases ----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One operator: who runs it, the bytes it has to move, and what moekit should reach against whom.

    A maker prepares a call; those of moekit run once on each backend. ``targets`` maps a contender to the wanted ratio
    for bf16 and for float32.
    """

    name: str
    floor: int
    moekit: Maker
    peers: dict[str, Maker]
    targets: Mapping[str, tuple[float, float]]
    any_dtype: bool = False


class Inputs:
    """The tensors of one layer; all floating ones want a gradient."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
        T, E, K = shape.tokens, shape.experts, shape.topk
        self.logits = torch.randn(T, E)
        weights, self.indices = self.logits.softmax(1).topk(K)
        self.routing_map = torch.zeros(T, E, dtype=torch.bool).scatter(1, self.indices, True)
        self.probs = torch.zeros(T, E).scatter(1, self.indices, weights).requires_grad_()
        self.sorted_indices = self.routing_map.T.nonzero()[:, 1].contiguous()
        self.weights = weights.requires_grad_()
        self.routing = moekit.Routing.from_topk(self.indices, self.weights, num_experts=E)
        self.row_weights = torch.rand(shape.rows, 1).requires_grad_()
        self.tokens = torch.randn(T, shape.hidden).to(dtype).requires_grad_()
        self.rows = torch.randn(shape.rows, shape.hidden).to(dtype).requires_grad_()
        self.gate_up = torch.randn(shape.rows, 2 * shape.inner).to(dtype).requires_grad_()


def forward(function: Callable[[], Any]) -> Maker:
    """Time the forward; cases run without gradients, as inference does."""
    return lambda: function


def backward(function: Callable[[], Any], *inputs: Tensor) -> Maker:
    """Time the backward of one forward."""

    def prepare() -> Callable[[], Any]:
        with torch.enable_grad():
            output = function()
        output = output[0] if isinstance(output, tuple) else output
        grad = _grad_of(output)
        return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)

    return prepare


def both(function: Callable[[], Tensor], *inputs: Tensor) -> Maker:
    """Time forward and backward together."""

    def prepare() -> Callable[[], Any]:
        grad = _grad_of(function())

        def call() -> Any:
            with torch.enable_grad():
                output = function()
            return torch.autograd.grad(output, inputs, grad)

        return call

    return prepare


def _grad_of(output: Tensor) -> Tensor:
    """The same random gradient for every contender."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)


def _published(peers: Mapping[str, Any], name: str, make: Callable[[Any], Maker], *, eager: bool) -> dict[str, Maker]:
    """The peers that have the function ``name``; the eager copy only of what is shipped compiled."""
    return {
        peer: make(getattr(module, name))
        for peer, module in peers.items()
        if hasattr(module, name) and (eager or peer != "nemo eager")
    }


def _against(floor: tuple[float, float] | None = None, **ratios: float) -> dict[str, tuple[float, float]]:
    targets = {name.replace("_", " "): (ratio, ratio * _FLOAT32_PART) for name, ratio in ratios.items()}
    return targets | ({"copy_": floor} if floor else {})


def routing_cases(x: Inputs, peers: Mapping[str, Any]) -> Iterator[Case]:
    """Routing tables: the published permute builds its own with masked_select."""
    T, E, rows = x.shape.tokens, x.shape.experts, x.shape.rows

    def masked_select() -> Tensor:
        token = torch.arange(T).expand(E, T)
        return token.masked_select(x.routing_map.bool().T.contiguous())

    def from_indices() -> Any:
        return moekit.Routing.from_topk(x.indices, num_experts=E)

    def from_map() -> Any:
        return tables.route_map(x.routing_map, rows)

    plain = {"plain": forward(masked_select)}
    many = E >= 128
    yield Case("tables from indices", 16 * rows, forward(from_indices), plain, {"plain": (10, 10)}, True)
    targets = {"plain": (2.5, 2.5)} if many else {}
    yield Case("tables from a mask", T * E + 8 * rows, forward(from_map), plain, targets, True)


def topk_cases(x: Inputs, peers: Mapping[str, Any]) -> Iterator[Case]:
    """Router scores and top-k: moekit's own form, then the published form, which returns ``[T, E]`` tables."""
    T, E, K = x.shape.tokens, x.shape.experts, x.shape.topk
    floor, name = 4 * T * E + 8 * T * K, "topk_routing_with_score_function"
    targets = {"megatron": (2.5, 2.5)}

    def plain() -> Any:
        weights, indices = x.logits.topk(K)
        return weights.softmax(1), indices

    def run(function: Callable, **options: Any) -> Maker:
        return forward(lambda: function(x.logits, K, **options))

    published = _published(peers, name, run, eager=False)
    yield Case("top-k", floor, run(moekit.topk_router), {"plain": forward(plain), **published}, targets, True)
    floor += T * E * 5
    yield Case("top-k, as tables", floor, run(moe_utils.topk_routing_with_score_function), published, targets, True)
    if E % 8 == 0 and E >= 32 and K <= E // 2:
        make = functools.partial(run, score_function="sigmoid", num_groups=8, group_topk=4)
        published = _published(peers, name, make, eager=False)
        case = make(moe_utils.topk_routing_with_score_function)
        yield Case("top-k, sigmoid, groups", floor, case, published, targets, True)


def permute_cases(x: Inputs, peers: Mapping[str, Any]) -> Iterator[Case]:
    """Permute, from a mask as published and from moekit's Routing."""
    size = x.dtype.itemsize * x.shape.hidden
    floor, rows = (x.shape.tokens + x.shape.rows) * size, x.shape.rows
    grad_of, at_copy = x.tokens, (1.0, 0.9)

    def run(function: Callable) -> Callable[[], Any]:
        return lambda: function(x.tokens, x.routing_map, num_out_tokens=rows)

    def native() -> Tensor:
        return moekit.permute(x.tokens, x.routing)

    def plain() -> Tensor:
        return x.tokens.index_select(0, x.sorted_indices)

    published = _published(peers, "permute", lambda f: forward(run(f)), eager=False)
    yield Case("permute", floor, forward(run(moe_utils.permute)), published, _against(at_copy, nemo=2.0))
    yield Case("permute (Routing)", floor, forward(native), {"plain": forward(plain)}, _against(at_copy))
    published = _published(peers, "permute", lambda f: backward(run(f), grad_of), eager=False)
    yield Case("permute backward", floor, backward(run(moe_utils.permute), grad_of), published, _against(nemo=2.0))
    plainly = {"plain": backward(plain, grad_of)}
    yield Case("permute backward (Routing)", floor, backward(native, grad_of), plainly, {})


def unpermute_cases(x: Inputs, peers: Mapping[str, Any]) -> Iterator[Case]:
    """Unpermute, from sorted indices as published and from moekit's Routing, without and with routing weights."""
    T, H, R = x.shape.tokens, x.shape.hidden, x.shape.rows
    floor = (T + R) * H * x.dtype.itemsize

    def run(function: Callable, weighted: bool) -> Callable[[], Any]:
        extra = {"probs": x.probs, "routing_map": x.routing_map} if weighted else {}
        return lambda: function(x.rows, x.sorted_indices, torch.Size((T, H)), **extra)

    def native(weighted: bool) -> Callable[[], Any]:
        return lambda: moekit.unpermute(x.rows, x.routing, weighted=weighted)

    def plain() -> Tensor:
        return x.tokens.new_zeros(T, H).index_add(0, x.sorted_indices, x.rows)

    at_copy = (1.0, 0.65)
    ours = functools.partial(run, moe_utils.unpermute)
    theirs = functools.partial(_published, peers, "unpermute", eager=False)
    published = {"plain": forward(plain), **theirs(lambda f: forward(run(f, False)))}
    yield Case("unpermute", floor, forward(ours(False)), published, _against(at_copy, nemo=3.0))
    yield Case("unpermute (Routing)", floor, forward(native(False)), {"plain": forward(plain)}, _against(at_copy))
    published = theirs(lambda f: backward(run(f, False), x.rows))
    yield Case("unpermute backward", floor, backward(ours(False), x.rows), published, {})
    floor += 8 * R
    published = theirs(lambda f: forward(run(f, True)))
    yield Case("unpermute, probs", floor, forward(ours(True)), published, _against(nemo=9.0))
    yield Case("unpermute, weights (Routing)", floor, forward(native(True)), {}, {})
    floor = (T + 2 * R) * H * x.dtype.itemsize + 8 * R
    published = theirs(lambda f: backward(run(f, True), x.rows, x.probs))
    yield Case("unpermute backward, probs", floor, backward(ours(True), x.rows, x.probs), published, _against(nemo=8.0))
    native_backward = backward(native(True), x.rows, x.weights)
    yield Case("unpermute backward, weights (Routing)", floor, native_backward, {}, {})


def _quick_gelu(gate: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.702 * gate)


# Name, published function, the activation of its gate half, and whether a bias comes before the weights.
_GLUS: tuple[tuple[str, str, Callable[[Tensor], Tensor], bool], ...] = (
    ("SwiGLU", "weighted_bias_swiglu_impl", F.silu, False),
    ("GEGLU", "weighted_bias_geglu_impl", functools.partial(F.gelu, approximate="tanh"), False),
    ("Quick-GEGLU", "weighted_bias_quick_geglu_impl", _quick_gelu, True),
)


def glu_cases(x: Inputs, peers: Mapping[str, Any]) -> Iterator[Case]:
    """Weighted gated activations."""
    for glu in _GLUS:
        yield from _glu_pair(x, peers, *glu)


def _glu_pair(
    x: Inputs, peers: Mapping[str, Any], title: str, name: str, activation: Callable[[Tensor], Tensor], has_bias: bool
) -> Iterator[Case]:
    size = x.shape.rows * x.shape.inner * x.dtype.itemsize
    bias, leaves = (None,) if has_bias else (), (x.gate_up, x.row_weights)

    def run(function: Callable) -> Callable[[], Any]:
        return lambda: function(x.gate_up, *bias, x.row_weights)

    def plain() -> Tensor:
        gate, up = x.gate_up.chunk(2, -1)
        return (activation(gate) * up * x.row_weights).to(x.dtype)

    ours = run(getattr(moe_utils, name))
    published = _published(peers, name, lambda f: forward(run(f)), eager=True)
    floor, targets = 3 * size + 4 * x.shape.rows, _against((0.8, 0.65), nemo=1.8)
    yield Case(f"weighted {title}", floor, forward(ours), {"plain": forward(plain), **published}, targets)
    published = _published(peers, name, lambda f: backward(run(f), *leaves), eager=True)
    floor, targets = 5 * size + 8 * x.shape.rows, _against((0.9, 0.9), nemo=3.0, nemo_eager=12.0)
    others = {"plain": backward(plain, *leaves), **published}
    yield Case(f"weighted {title} backward", floor, backward(ours, *leaves), others, targets)


def fp8_cases(x: Inputs, peers: Mapping[str, Any]) -> Iterator[Case]:
    """The input kept for backward in fp8; the published functions keep it so (without scales) or as it is."""
    floor = 2 * x.shape.rows * x.shape.inner * (3 * x.dtype.itemsize + 2)
    leaves = (x.gate_up, x.row_weights)

    def run(function: Callable, fp8: bool) -> Maker:
        return both(lambda: function(x.gate_up, x.row_weights, fp8), *leaves)

    name = "weighted_bias_swiglu_impl"
    published = _published(peers, name, lambda f: run(f, True), eager=True)
    if "nemo" in peers:
        published["nemo, no fp8"] = run(getattr(peers["nemo"], name), False)
    targets = _against(nemo=4.5) | {"nemo, no fp8": (1.0, _FLOAT32_PART)}
    ours = run(moe_utils.weighted_bias_swiglu_impl, True)
    yield Case("SwiGLU fp8 store, both ways", floor, ours, published, targets)


_GROUPS = (routing_cases, topk_cases, permute_cases, unpermute_cases, glu_cases, fp8_cases)


# --- a job: one shape in one allocator mode -------------------------------------------------------------------------


def work(job: dict) -> tuple[list[dict], list[str]]:
    """Time every case of one shape: all tokens first, so that the compiled peers specialise to them."""
    peers, notes = harness.load_peers()
    shape = Shape(**job["shape"])
    records = []
    for number, dtype in enumerate(job["dtypes"]):
        torch.compiler.reset()
        for tokens in job["tokens"]:
            small = tokens < shape.tokens
            present = {} if tokens == 1 else peers
            inputs = Inputs(replace(shape, tokens=tokens), harness.DTYPES[dtype])
            for case in (case for group in _GROUPS for case in group(inputs, present)):
                if (number and case.any_dtype) or (job["only"] or "") not in case.name:
                    continue
                measured = _measure_case(case, inputs.dtype, job["budget"] / (4 if small else 1))
                progress(f"{dtype} T={tokens} {case.name}", measured)
                records.append(_record(job, case, tokens, dtype, measured))
    return records, notes


@torch.no_grad()
def _measure_case(case: Case, dtype: torch.dtype, budget: float) -> harness.Measured:
    torch_backend = functools.partial(moekit.backend, "torch")
    contenders = [Contender("moekit", case.moekit())]
    with torch_backend():
        contenders.append(Contender("moekit torch", case.moekit(), torch_backend))
    failed = {}
    for name, make in case.peers.items():
        try:
            contenders.append(Contender(name, make()))
        except Exception as error:  # its forward failed (no compiler, say): the others go on
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    measured = measure([*contenders, copy_contender(case.floor, dtype)], budget)
    measured.failed |= failed
    return measured


def _record(job: dict, case: Case, tokens: int, dtype: str, measured: harness.Measured) -> dict:
    where = f"{job['mode']}, {job['shape']['name']} T={tokens} {dtype}, {case.name}"
    targets = []
    if tokens == 1:
        ratio = measured.ratio("moekit torch")
        targets.append(verdict("moekit torch", ratio, 1.0, slack=_NOISE))
    elif job["judged"] and tokens == job["shape"]["tokens"]:
        for against, wanted in case.targets.items():
            at_least = wanted[dtype == "float32"]
            if case.name == "permute" and against == "nemo" and job["mode"] == "default":
                targets.append(verdict(against, measured.ratio(against), 2 * at_least))
            elif job["mode"] == "warm":
                targets.append(verdict(against, measured.ratio(against), at_least))
    return {
        "case": case.name,
        "mode": job["mode"],
        "shape": job["shape"],
        "tokens": tokens,
        "dtype": None if case.any_dtype else dtype,
        "floor_bytes": case.floor,
        "seconds": measured.times,
        "failed": measured.failed,
        "differences": measured.differences,
        "targets": [{**target, "where": where} for target in targets],
    }


# --- report ---------------------------------------------------------------------------------------------------------


def plan(args: Any) -> list[dict]:
    """The jobs that the command line asks for."""
    if args.shape:
        shapes = [harness.parse_shape(args.shape, SHAPES)]
    elif args.quick:
        shapes = [replace(SHAPES["qwen3"], tokens=256)]
    else:
        shapes = list(_JUDGED)
    dtypes = [args.dtype] if args.dtype else (["bf16"] if args.quick else list(harness.DTYPES))
    few = (1,) if args.quick else _FEW_TOKENS
    return [
        {
            "label": f"{mode}: {shape}",
            "mode": mode,
            "shape": asdict(shape),
            "tokens": [shape.tokens, *(tokens for tokens in few if tokens < shape.tokens)],
            "dtypes": dtypes,
            "only": args.only,
            "budget": 0.2 if args.quick else (4.0 if args.full else 1.0),
            "judged": shape in _JUDGED,
        }
        for shape in shapes
        for mode in harness.modes(args)
    ]


def print_tables(records: Sequence[dict], console: Any) -> None:
    """One table for each mode, shape and dtype: milliseconds, and how many times moekit's time that is."""
    from rich.table import Table

    groups: dict[str, list[dict]] = {}
    for record in records:
        shape = Shape(**{**record["shape"], "tokens": record["tokens"]})
        groups.setdefault(f"{record['mode']} allocator, {shape}, {record['dtype'] or 'any dtype'}", []).append(record)
    for title, group in groups.items():
        present = [name for name in _COLUMNS if any(name in record["seconds"] for record in group)]
        table = Table("case", title=f"{title}: ms (times moekit's)", title_justify="left")
        for name in present:
            table.add_column(name, justify="right")
        table.add_column("target: moekit is at least this many times as fast")
        for record in group:
            targets = "; ".join(harness.verdict_text(target) for target in record["targets"])
            table.add_row(record["case"], *(_cell(record, name) for name in present), targets)
        console.print(table)


def _cell(record: dict, name: str) -> str:
    if name in record["failed"]:
        return "failed"
    if name not in record["seconds"]:
        return ""
    seconds, ours = record["seconds"][name]["median"], record["seconds"].get("moekit", {}).get("median")
    return f"{seconds * 1e3:.3g}" + ("" if ours is None or name == "moekit" else f" ({seconds / ours:.2f}x)")


def plot(records: Sequence[dict], path: Path) -> None:
    """A panel for each shape and dtype (rows) in each allocator mode (columns): time over moekit's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    large = [r for r in records if r["tokens"] == r["shape"]["tokens"] and "moekit" in r["seconds"]]
    modes = list(dict.fromkeys(r["mode"] for r in large))
    # Cases of any dtype stand with the first dtype of their shape.
    first = next((r["dtype"] for r in large if r["dtype"]), None)
    panels: dict[tuple, list[dict]] = {}
    for record in large:
        key = (record["shape"]["name"], record["tokens"], record["dtype"] or first)
        panels.setdefault(key, []).append(record)
    if not panels:
        return
    figure = Figure(figsize=(7.5 * len(modes), 7 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), len(modes), squeeze=False)
    for row, ((name, tokens, dtype), group) in zip(axes, panels.items(), strict=True):
        for axis, mode in zip(row, modes, strict=True):
            _panel(axis, [record for record in group if record["mode"] == mode])
            axis.set_title(f"{name}, T={tokens}, {dtype or 'any dtype'}, {mode} allocator")
    figure.suptitle("Time relative to moekit's (right of the line: slower than moekit)")
    figure.savefig(path, dpi=80)


def _panel(axis: Any, group: Sequence[dict]) -> None:
    others = [name for name in _COLUMNS if name != "moekit"]
    for number, name in enumerate(others):
        points = [
            (record["seconds"][name]["median"] / record["seconds"]["moekit"]["median"], place)
            for place, record in enumerate(group)
            if name in record["seconds"]
        ]
        if points:
            marker = "osD^vP|"[number]
            axis.scatter(*zip(*points, strict=True), label=name, marker=marker, s=60 if marker == "|" else 36)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    labels = [f"{r['case']}\n{r['seconds']['moekit']['median'] * 1e3:.3g} ms" for r in group]
    axis.set_yticks(range(len(group)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.grid(axis="x", which="both", alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; status 1 if something of moekit failed to run."""
    args = harness.arguments(__doc__ or "", SHAPES, argv)
    if args.worker:
        return harness.serve(args, work)
    console = harness.console()
    found = harness.machine()
    records, notes = harness.run_jobs(__file__, args.peers, plan(args))
    console.print(harness.machine_line(found), markup=False)
    print_tables(records, console)
    for record in records:
        where = f"{record['mode']} T={record['tokens']} {record['dtype']} {record['case']}"
        notes += [f"{where}: {name} failed: {error}" for name, error in record["failed"].items()]
        if strange := harness.unlike(record["differences"]):
            notes.append(f"{where}: result differs from moekit's: {', '.join(strange)}")
    for note in notes:
        console.print(f"note: {note}", markup=False)
    targets = [target for record in records for target in record["targets"]]
    console.print(harness.summary(targets))
    harness.save_json(args.out / "ops.json", machine=found, notes=notes, records=records)
    with contextlib.suppress(ImportError):
        plot(records, args.out / "ops.png")
    return int(any("moekit" in record["failed"] for record in records) or any("FAILED" in note for note in notes))


if __name__ == "__main__":
    sys.exit(main())
