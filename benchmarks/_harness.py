"""What the CPU benchmarks share: allocator modes, interleaved timing, worker processes, machine and verdicts.

Every job runs in a fresh process with one of two allocator modes, the same one for all contenders. ``default`` is plain
glibc: large outputs come from mmap and every call pays for their page faults. ``warm`` keeps freed memory in the
process (``moekit.keep_pages()``), so pages are there already. Users meet both.

The contenders of a case take turns, so that drift of the machine hits all alike, and the order rotates each round, so
that nobody always follows the same neighbour. A time includes freeing the result. Slow contenders take part in fewer
rounds, spread evenly.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

MODES = ("default", "warm")
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
_DEFAULT_PEERS = Path(__file__).parents[1] / ".venv" / "peers"
_NEMO = "nemo_automodel.components.moe.megatron.moe_utils"
_PEERS = {"nemo": "nemo-automodel", "megatron": "megatron-core"}
_SAMPLE_SECONDS = 5e-4  # shorter calls are repeated until a sample takes this long
_PATIENCE_SECONDS = 30  # a call that takes longer is not repeated
_ALIKE = 0.05  # largest difference between contenders, relative to the largest value


# --- shapes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One Mixture-of-Experts layer: T tokens, H hidden, I intermediate, E experts, K experts a token."""

    name: str
    tokens: int
    hidden: int
    inner: int
    experts: int
    topk: int

    @property
    def rows(self) -> int:
        """R."""
        return self.tokens * self.topk

    def __str__(self) -> str:
        return f"{self.name} (T={self.tokens} H={self.hidden} I={self.inner} E={self.experts} K={self.topk})"


def parse_shape(text: str, known: Mapping[str, Shape]) -> Shape:
    """A known name, ``T,H,I,E,K``, or ``NAME:T,H,I,E,K`` for a layer of that kind in another size."""
    name, _, sizes = text.rpartition(":")
    if not name and text in known:
        return known[text]
    try:
        numbers = [int(number) for number in sizes.split(",")]
        return Shape(name or "custom", *numbers)
    except (ValueError, TypeError):
        raise SystemExit(f"--shape: wanted {', '.join(known)} or T,H,I,E,K, got {text!r}") from None


# --- allocator ------------------------------------------------------------------------------------------------------


def set_allocator(mode: str) -> bool:
    """Put this process into an allocator mode; False where the C library has no such switch."""
    if mode == "default":
        return True
    import moekit

    return bool(moekit.keep_pages())


def clean_environment() -> dict[str, str]:
    """The environment without settings that would change the allocator behind our back, and a silent profiler."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return {**kept, "KINETO_LOG_LEVEL": "99"}


# --- timing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """Something to time; ``context`` is entered around the calls, outside the clock."""

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass
class Measured:
    """Seconds of each contender: median, quartiles and number of samples; errors; how far results differ."""

    times: dict[str, dict[str, float]]
    failed: dict[str, str]
    differences: dict[str, float]

    def ratio(self, against: str, ours: str = "moekit") -> float | None:
        """How many times faster ``ours`` is, or None where one of them did not run."""
        if against not in self.times or ours not in self.times:
            return None
        return self.times[against]["median"] / self.times[ours]["median"]


def measure(contenders: Sequence[Contender], budget: float, least: int = 5, most: int = 50) -> Measured:
    """Time all contenders in turns.

    Args:
        contenders: the first is the one whose result the others are compared with.
        budget: seconds to spend, in equal parts; more where ``least`` samples take longer.
        least: samples of each contender (one of a contender that takes longer than 30 s).
        most: samples of each contender.
    """
    result = Measured({}, {}, {})
    first: Tensor | None = None
    samples: dict[str, list[float]] = {}
    ready: list[tuple[Contender, int, int]] = []  # with calls in a sample and samples to take
    gc.collect()
    for contender in contenders:
        try:
            seconds, probe = _warm_up(contender)
        except Exception as error:  # a peer's compiler or memory may fail; the others go on
            result.failed[contender.name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            continue
        if first is None:
            first = probe
        elif probe is not None and first is not None and probe.shape == first.shape:
            result.differences[contender.name] = _difference(probe, first)
        if seconds > _PATIENCE_SECONDS:
            samples[contender.name] = [seconds]
            continue
        calls = max(1, int(_SAMPLE_SECONDS / seconds))
        wanted = min(max(int(budget / len(contenders) / (seconds * calls)), least), most)
        ready.append((contender, calls, wanted))
    samples |= _take_turns(ready)
    result.times = {name: _summary(values) for name, values in samples.items()}
    return result


def _warm_up(contender: Contender) -> tuple[float, Tensor | None]:
    """Call until compilers and caches have settled: seconds of a call, and a few values of its result."""
    with contender.context():
        start = time.perf_counter()
        output = contender.call()
        seconds = time.perf_counter() - start
        probe = _probe(output)
        del output
        for _ in range(2 if seconds < _PATIENCE_SECONDS else 0):
            start = time.perf_counter()
            contender.call()
            seconds = time.perf_counter() - start
            if seconds > 1:
                break
    return max(seconds, 1e-9), probe


def _take_turns(ready: Sequence[tuple[Contender, int, int]]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {contender.name: [] for contender, _, _ in ready}
    rounds, shuffle = max((wanted for _, _, wanted in ready), default=0), random.Random(0)
    gc.disable()
    try:
        for turn in range(rounds):
            # Whoever comes next pays for what the one before left behind, so neighbours change.
            for contender, calls, wanted in shuffle.sample(ready, len(ready)):
                if (turn + 1) * wanted // rounds > turn * wanted // rounds:
                    samples[contender.name].append(_sample(contender, calls))
    finally:
        gc.enable()
    return samples


def _sample(contender: Contender, calls: int) -> float:
    call = contender.call
    with contender.context():
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


def _summary(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {
        "median": statistics.median(ordered),
        "low": ordered[len(ordered) // 4],
        "high": ordered[-1 - len(ordered) // 4],
        "samples": len(ordered),
    }


def _probe(output: Any) -> Tensor | None:
    """Some values of the first floating tensor in ``output``, from all over it."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    value = next((part for part in parts if isinstance(part, Tensor)), None)
    if value is None or not value.is_floating_point() or value.numel() == 0:
        return None
    # An odd step visits every column.
    return value.detach().reshape(-1)[:: (value.numel() // 65536) | 1].float().clone()


def _difference(value: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest value; infinite if either has a NaN."""
    difference = float((value - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    return difference if difference == difference else float("inf")


def copy_contender(num_bytes: int, dtype: torch.dtype) -> Contender:
    """The yardstick: ``copy_`` into an existing buffer that moves as many bytes, half read and half written."""
    source = torch.ones(max(num_bytes // 2 // dtype.itemsize, 1), dtype=dtype)
    target = torch.ones_like(source)

    def call() -> None:
        target.copy_(source)

    return Contender("copy_", call)


# --- verdicts -------------------------------------------------------------------------------------------------------


def verdict(what: str, value: float | None, wanted: float, *, at_most: bool = False, slack: float = 0.0) -> dict:
    """A target with what was measured; ``met`` is None where there is nothing to compare with."""
    met = None
    if value is not None:
        met = value <= wanted + slack if at_most else value >= wanted - slack
    return {"what": what, "value": value, "wanted": wanted, "at_most": at_most, "met": met}


def verdict_text(target: Mapping[str, Any]) -> str:
    """One line for a table."""
    sign = "<=" if target["at_most"] else ">="
    if target["met"] is None:
        return f"{target['what']} {sign} {target['wanted']:.3g}: not measured"
    word = "[green]met[/]" if target["met"] else "[red]missed[/]"
    return f"{target['what']} {target['value']:.3g} {sign} {target['wanted']:.3g}: {word}"


def unlike(differences: Mapping[str, float]) -> list[str]:
    """Contenders whose results differ from moekit's by more than rounding explains."""
    return [f"{name} ({value:.2g})" for name, value in differences.items() if value > _ALIKE]


# --- peers ----------------------------------------------------------------------------------------------------------


def load_peers() -> tuple[dict[str, Any], list[str]]:
    """The peers that can be imported, and a note on each."""
    loaders = {"nemo": _load_nemo, "megatron": _load_megatron}
    found: dict[str, Any] = {}
    notes = []
    for name, load in loaders.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found |= load()
            notes.append(f"{name}: {_PEERS[name]} {version_of(_PEERS[name])}")
        except Exception as error:  # whatever keeps a peer from being imported, it is skipped
            notes.append(f"{name}: skipped, {_PEERS[name]} cannot be imported ({type(error).__name__}: {error})")
    return found, notes


def _load_nemo() -> dict[str, Any]:
    compiled = importlib.import_module(_NEMO)
    return {"nemo": compiled, "nemo eager": _without_compile(compiled)}


def _without_compile(module: ModuleType) -> ModuleType:
    """A second copy of ``module`` whose functions are not compiled."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_eager", str(module.__file__))
    if spec is None or spec.loader is None:
        raise ImportError(f"no source for {module.__name__}")
    copy = importlib.util.module_from_spec(spec)
    with mock.patch.object(torch, "compile", lambda function: function):
        spec.loader.exec_module(copy)
    return copy


def _load_megatron() -> dict[str, Any]:
    moe = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    swiglu = importlib.import_module("megatron.core.fusions.fused_bias_swiglu")
    geglu = importlib.import_module("megatron.core.fusions.fused_bias_geglu")
    found = SimpleNamespace(
        permute=moe.permute,
        unpermute=moe.unpermute,
        topk_routing_with_score_function=moe.topk_routing_with_score_function,
        weighted_bias_quick_geglu_impl=geglu.weighted_bias_quick_geglu_impl,
        # Theirs has a bias that must be None.
        weighted_bias_swiglu_impl=lambda y, w, fp8=False: swiglu.weighted_bias_swiglu_impl(y, None, w, fp8),
    )
    return {"megatron": found}


# --- jobs in fresh processes ----------------------------------------------------------------------------------------


def arguments(description: str, shapes: Mapping[str, Shape], argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line that the benchmarks share."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: shows that everything runs")
    parser.add_argument("--full", action="store_true", help="more rounds, larger shapes")
    parser.add_argument("--only", metavar="NAME", help="cases with this in their name")
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--shape", help=f"{', '.join(shapes)}; or T,H,I,E,K; or NAME:T,H,I,E,K")
    parser.add_argument("--mode", choices=MODES, help="allocator; default: both (warm with --quick)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON and PNG")
    parser.add_argument("--peers", type=Path, default=_DEFAULT_PEERS, help="folder that the peers were installed in")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def modes(args: argparse.Namespace) -> list[str]:
    """The allocator modes asked for: both, or with ``--quick`` one."""
    return [args.mode] if args.mode else list(MODES[-1:] if args.quick else MODES)


def serve(args: argparse.Namespace, work: Callable[[dict], tuple[list[dict], list[str]]]) -> int:
    """Do one job in this process and write its result: records and notes."""
    job = json.loads(args.worker)
    if args.peers.is_dir():
        sys.path.append(str(args.peers))
    if not set_allocator(job["mode"]):
        records, notes = [], [f"skipped allocator mode {job['mode']}: this C library has no mallopt"]
    else:
        torch.manual_seed(0)
        records, notes = work(job)
    args.result.write_text(json.dumps([records, notes]))
    return 0


def run_jobs(script: str, peers: Path, jobs: Sequence[dict]) -> tuple[list[dict], list[str]]:
    """Run each job in a fresh process, one at a time: all records, and notes on what did not run."""
    records: list[dict] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(jobs, 1):
            print(f"[{number}/{len(jobs)}] {job['label']}", file=sys.stderr, flush=True)
            path = Path(folder) / f"{number}.json"
            command = [sys.executable, script, "--worker", json.dumps(job), "--result", str(path)]
            done = subprocess.run([*command, "--peers", str(peers)], env=clean_environment(), check=False)
            if done.returncode or not path.is_file():
                notes.append(f"FAILED with status {done.returncode}: {job['label']}")
                continue
            found = json.loads(path.read_text())
            records += found[0]
            notes += found[1]
    if not records:
        notes.append("nothing ran: does --only name a case?")
    return records, list(dict.fromkeys(notes))


def progress(name: str, measured: Measured) -> None:
    """One line while a worker runs."""
    times = ", ".join(f"{who} {t['median'] * 1e3:.3g}" for who, t in measured.times.items())
    print(f"  {name}: {times} ms" if times else f"  {name}: nothing ran", file=sys.stderr, flush=True)


# --- the machine ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures were measured on; no host names, no paths."""
    import moekit

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(memory_bytes("MemTotal") / 2**30, 1),
        "huge_pages": _huge_pages(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}".strip(),
        "python": platform.python_version(),
        "moekit_backends": [name for name, there in moekit.available().items() if there],
        "versions": {name: version_of(name) for name in ("moekit", "torch", "numba", "transformers")},
    }


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(distribution), "__version__", None)


def _cpu_model() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _huge_pages() -> str | None:
    setting = " ".join(_lines("/sys/kernel/mm/transparent_hugepage/enabled"))
    return setting[setting.find("[") + 1 : setting.find("]")] or None


def memory_bytes(field: str) -> int:
    """A field of /proc/meminfo in bytes, 0 where there is none."""
    return _field("/proc/meminfo", field)


def process_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes (VmRSS, VmHWM), 0 where there is none."""
    return _field("/proc/self/status", field)


def _field(path: str, field: str) -> int:
    return next((int(line.split()[1]) * 1024 for line in _lines(path) if line.startswith(f"{field}:")), 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine in one line, with a warning if others were using it before we began."""
    busy = f"; BUSY, load {found['load']}: times mean little" if (found["load"] or 0) > found["cores"] / 2 else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {found['vectors']}, "
        f"{found['memory_gib']} GiB, huge pages {found['huge_pages']}; python {found['python']}, {versions}; "
        f"moekit backends: {', '.join(found['moekit_backends'])}{busy}"
    )


# --- output ---------------------------------------------------------------------------------------------------------


def console() -> Any:
    """A console that does not wrap tables when the output goes to a file."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=200)


def save_json(path: Path, **content: Any) -> None:
    """Write the results with the machine they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=asdict) + "\n")


def summary(targets: Sequence[Mapping[str, Any]]) -> str:
    """How many targets were met, and which were not."""
    judged = [target for target in targets if target["met"] is not None]
    missed = [target for target in judged if not target["met"]]
    lines = [f"{len(judged) - len(missed)} of {len(judged)} targets met, {len(targets) - len(judged)} not measured"]
    lines += [f"  missed: {target['where']}: {verdict_text(target)}" for target in missed]
    return "\n".join(lines)
