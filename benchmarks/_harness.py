"""What the CPU benchmarks share: allocator modes, interleaved timing, worker processes, machine and verdicts.

Every job runs in a fresh process with one of two allocator modes, the same one for all contenders. ``default`` is plain
glibc: large outputs come from mmap and every call pays for their page faults. ``warm`` keeps freed memory in the
process (``moekit.keep_pages()``), so pages are there already. Users meet both.

Shapes, timing and peers are those of `moekit bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import moekit
from moekit.bench.cases import Shape
from moekit.bench.peers import load_peers
from moekit.bench.timing import Contender, Measured, copy_contender, measure, unlike
from moekit.doctor.system import cpu_model, memory_bytes, version_of

__all__ = ["Contender", "Shape", "copy_contender", "load_peers", "measure", "unlike"]  # used through this module

MODES = ("default", "warm")
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
_DEFAULT_PEERS = Path(__file__).parents[1] / ".venv" / "peers"


# --- shapes ---------------------------------------------------------------------------------------------------------


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
    return mode == "default" or bool(moekit.keep_pages())


def clean_environment() -> dict[str, str]:
    """The environment without settings that would change the allocator behind our back, and a silent profiler."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return {**kept, "KINETO_LOG_LEVEL": "99"}


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
        "cpu": cpu_model(),
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


def _huge_pages() -> str | None:
    setting = " ".join(_lines("/sys/kernel/mm/transparent_hugepage/enabled"))
    return setting[setting.find("[") + 1 : setting.find("]")] or None


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
