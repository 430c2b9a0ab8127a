"""A benchmark of one layer: cases, contenders, times."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moekit
from moekit.bench import peers as published
from moekit.bench.cases import Call, Case, Inputs, Shape, experts_bytes, experts_case, operator_cases
from moekit.bench.timing import Contender, copy_contender, measure
from moekit.doctor import system

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WHAT = ("ops", "experts", "all")
_PASSES = 10  # forward and backward of four operators and of the experts


@dataclass(frozen=True)
class Settings:
    """What to run; ``seconds`` are those of the clock, and compilers take their time besides."""

    shape: Shape
    dtype: str
    device: str
    what: str
    seconds: float
    compiled: bool
    keep_pages: bool = False


def run(settings: Settings, progress: Callable[[str, int], None] = lambda name, total: None) -> dict[str, Any]:
    """Compare and time.

    Args:
        settings: of the benchmark.
        progress: called before each figure, with its name and the number of figures.

    Returns:
        ``machine``, ``settings``, ``records`` (a figure each: seconds by contender), ``notes`` (who did not run, and why),
        ``warnings`` (why the figures mean little, or are not all) and ``interrupted``: Ctrl-C ends it with what there is.
    """
    torch.manual_seed(0)
    peers, notes = published.load_peers()
    if settings.keep_pages:
        notes.append(str(moekit.keep_pages()))
    try:
        peers |= published.load_transformers()
    except Exception as error:  # whatever keeps a peer from being imported, it is skipped
        notes.append(f"transformers: skipped, cannot be imported ({type(error).__name__}: {error})")
    device = torch.device(settings.device)
    about = machine(device)  # now, as its load would be our own later
    warnings = []
    if (about["load"] or 0) > about["cores"] / 2:
        words = f"others were at work (load {about['load']:g} on {about['cores']} cores)"
        warnings.append(f"{words}: these figures mean little")
    inputs = Inputs(settings.shape, DTYPES[settings.dtype], device)
    records: list[dict[str, Any]] = []
    total = {"ops": _PASSES - 2, "experts": 2, "all": _PASSES}[settings.what]
    interrupted = False
    try:
        for case in _cases(settings, inputs, peers, notes):
            if settings.compiled:
                _add_compiled(case)
            for backward in (False, True):
                name = f"{case.name}{_SUFFIX[backward, case.whole_step]}"
                progress(name, total)
                records.append(_record(name, case, inputs, settings.seconds / total, backward))
    except KeyboardInterrupt:  # between figures or in one: that one is not whole
        interrupted = True
        warnings.append(f"interrupted: {len(records)} of {total} figures")
    failed = {who: f"{r['case']}: {who} skipped, {why}" for r in records[::-1] for who, why in r["failed"].items()}
    settings_ = {**asdict(settings), "shape": asdict(settings.shape)}
    found = {"records": records, "notes": [*notes, *failed.values()], "warnings": warnings, "interrupted": interrupted}
    return {"machine": about, "settings": settings_, **found}


def milliseconds(seconds: float) -> str:
    """Three significant digits, without an exponent."""
    rounded = float(f"{seconds * 1e3:.3g}")
    return f"{rounded:.{max(2 - math.floor(math.log10(rounded)), 0) if rounded > 0 else 0}f}"


_SUFFIX = {(False, False): "", (False, True): "", (True, False): ", backward", (True, True): ", both ways"}


def _cases(settings: Settings, inputs: Inputs, peers: dict[str, Any], notes: list[str]) -> Iterator[Case]:
    if settings.what != "experts":
        yield from operator_cases(inputs, peers)
    if settings.what != "ops":
        needed, free = experts_bytes(settings.shape, inputs.dtype), _free_bytes(inputs.device)
        if needed > free:
            notes.append(f"experts: skipped, they need about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")
        else:
            yield experts_case(inputs, peers)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return system.memory_bytes("MemAvailable") or 2**63


def _add_compiled(case: Case) -> None:
    """The plain form, compiled; a compiler that is missing shows when it is called."""
    torch.compiler.reset()
    function, leaves = case.calls["torch"]
    case.calls["torch compile"] = Call(torch.compile(function, dynamic=False), leaves)


def _wait(device: torch.device) -> Callable[[], None] | None:
    """For what calls have left the device to do, which need not be the current one."""
    return None if device.type == "cpu" else functools.partial(torch.accelerator.synchronize, device)


def _record(name: str, case: Case, inputs: Inputs, budget: float, backward: bool) -> dict[str, Any]:
    wait = _wait(inputs.device)
    contenders, failed = [], {}
    for who, call in case.calls.items():
        try:
            timed = _timed(call, backward, whole=case.whole_step)
        except Exception as error:  # its forward failed: the others go on
            failed[who] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            if who == "moekit":  # no result to compare theirs with
                break
            continue
        contenders.append(Contender(who, timed, wait=wait))
    moved = case.backward_bytes if backward else case.bytes
    if moved and contenders:
        contenders.append(copy_contender(moved, inputs.dtype, inputs.device, wait))
    found = measure(contenders, budget, least=3, alike_only=True)
    times = {contender.name: found.times[contender.name] for contender in contenders if contender.name in found.times}
    failed |= found.failed
    return {"case": name, "bytes": moved, "seconds": times, "differences": found.differences, "failed": failed}


def _timed(call: Call, backward: bool, *, whole: bool) -> Callable[[], Any]:
    """Forward without gradients; backward of a graph that is kept; or both, ``whole``."""
    if not backward:
        return torch.no_grad()(call.function)
    out = call.function()
    grad = torch.empty_like(out).normal_(generator=torch.Generator(out.device).manual_seed(1))

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call.function(), call.leaves, grad)

    return both if whole else functools.partial(torch.autograd.grad, out, call.leaves, grad, retain_graph=True)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on; no host names, no paths."""
    packages = ("moekit", "torch", "numba", "triton", "transformers", "nemo-automodel", "megatron-core", "liger-kernel")
    versions = {name: version for name in packages if (version := system.version_of(name))}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {**system.cpu(), **system.threads(), "gpu": gpu, "versions": versions}


def need_matplotlib() -> None:
    """What :func:`plot` would run into, before minutes of timing.

    Raises:
        ImportError: matplotlib is missing.
    """
    importlib.import_module("matplotlib.figure")


def plot(report: dict[str, Any], path: Path) -> None:
    """A row for each figure, a mark for each contender: its time over moekit's.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    rows = [record for record in report["records"] if "moekit" in record["seconds"]]
    marks: dict[str, list[tuple[float, int]]] = {}
    for place, record in enumerate(rows):
        ours = record["seconds"]["moekit"]["median"]
        for who, times in record["seconds"].items():
            if who != "moekit":
                marks.setdefault(who, []).append((times["median"] / ours, place))
    figure = Figure(figsize=(8, 1.5 + 0.35 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for (who, points), marker in zip(marks.items(), itertools.cycle("osD^v<>P"), strict=False):
        axis.scatter(*zip(*points, strict=True), label=who, marker=marker, s=30)
    labels = [f"{record['case']}: {milliseconds(record['seconds']['moekit']['median'])} ms" for record in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1, label="moekit")
    axis.set_xscale("log")
    axis.grid(axis="x", which="both", alpha=0.3)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("time over moekit's (right of the line: slower than moekit)")
    settings = report["settings"]
    title = f"{Shape(**settings['shape'])}, {settings['dtype']} on {settings['device']}"
    axis.set_title("\n".join([title, *report["warnings"]]), fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
