"""Nonsense in every integer tensor of every operator: an error or the right result, and no memory touched outside.

    python tests/fuzz_integers.py --draws 20000 --seed 7          # reference and CPU kernels, values checked
    python tests/fuzz_integers.py --backends triton --draws 2000  # GPU kernels, interpreted on the CPU, nothing checked
    python tests/fuzz_integers.py --backends torch unchecked      # the reference as it runs on a GPU
    python tests/fuzz_integers.py --device cuda --draws 5000      # on a GPU, under compute-sanitizer's memcheck

On a CPU each draw runs in a child between guard pages (``_guarded.py``): a read or a write outside a tensor, of inputs or
results, ends the child, which counts as a crash, and the next draw goes on in another. Where values are checked, a
draw either raises what moekit words or gives the same finite result on every backend, whatever fresh memory holds, and
its arguments are as before. Where they are not (on a GPU) it must only stay inside.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

FILLS = (0xFF, 0x41)  # as a float NaN and 12.08, as an integer -1 and 1094795585
CHILD = "MOEKIT_FUZZ_CHILD"


@dataclasses.dataclass
class Tally:
    """What came of the draws."""

    draws: int = 0
    raised: int = 0
    crashes: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"crash: {text}" for text in self.crashes] + [f"fault: {text}" for text in self.faults]
        summary = f"{self.draws} draws, {self.raised} refused, {len(self.crashes)} crashes, {len(self.faults)} faults"
        return "\n".join([*lines, summary])


# --- the parent: starts children until every draw has run ------------------------------------------------------------


def run_on_cpu(backends: list[str], draws: range, seed: int, *, most_crashes: int = 50) -> Tally:
    """Run draws in children, a new one after each crash."""
    tally, start = Tally(), draws.start
    environment = os.environ | {CHILD: "1", "MALLOC_PERTURB_": "165", "PYTHONFAULTHANDLER": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])
    if "triton" in backends:
        environment |= {"TRITON_INTERPRET": "1"}
    while start < draws.stop and len(tally.crashes) < most_crashes:
        options = ["--backends", *backends, "--start", start, "--stop", draws.stop, "--step", draws.step, "--seed", seed]
        command = [sys.executable, __file__, *map(str, options)]
        begun = None
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        for line in child.stdout.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "begin":
                begun = int(rest.split()[0])
                tally.draws += 1
            tally.raised += kind == "raised"
            if kind == "fault":
                tally.faults.append(json.loads(rest))
        if child.returncode == 0:
            return tally
        if begun is None:
            raise RuntimeError(f"the child did not start:\n{child.stderr[-4000:]}")
        if child.returncode > 0:
            raise RuntimeError(f"the child failed at draw {begun}:\n{child.stderr[-4000:]}")
        import _integer_cases

        tally.crashes.append(f"signal {-child.returncode} in {_integer_cases.case(begun, seed).title}")
        start = begun + draws.step
    return tally


# --- the child -------------------------------------------------------------------------------------------------------


def _say(kind: str, text: Any) -> None:
    os.write(1, f"{kind} {text}\n".encode())  # at once: what is said before a crash is not lost


def serve(backends: list[str], draws: range, seed: int) -> None:
    """Run draws and say what came of each."""
    import torch
    from _integer_cases import case

    torch.set_num_threads(2)
    checked = "triton" not in backends and "unchecked" not in backends
    names = [name for name in backends if name != "unchecked"]
    for index in draws:
        drawn = case(index, seed)
        if not checked and _sized_by_values(drawn):
            continue
        _say("begin", index)
        found = [outcome for name in names for outcome in _outcomes(drawn, name, checked)]
        for fault in _faults(found) if checked else _unchecked_faults(found):
            _say("fault", json.dumps(f"{drawn.title}: {fault}"))
        if any(isinstance(outcome, Exception) for outcome in found):
            _say("raised", index)


def _sized_by_values(drawn: Any) -> bool:
    """Whether the result is as large as unchecked numbers say, as on a GPU only a caller who asks for it has it."""
    return "sort_chunks" in drawn.target.name or drawn.arguments.get("num_out", 0) is None


def _outcomes(drawn: Any, name: str, checked: bool) -> list[Any]:
    """What the draw gives on a backend, whatever fresh memory holds: tensors or an exception."""
    import torch
    from _guarded import Guard, guarded_results
    from _integer_cases import map_tensors, tensors

    import moekit
    from moekit import _backend

    found = []
    for fill in FILLS if checked else FILLS[:1]:
        sides = random.Random(drawn.title)
        guard = Guard(fill, (sides.random() < 0.7 for _ in itertools.count()))
        arguments = map_tensors(guard.copy, drawn.arguments)
        looks = mock.patch.object(_backend, "checks_values", lambda tensor: checked)
        with moekit.backend(name), looks, torch.no_grad(), guarded_results(guard):
            try:
                outcome = [t.clone() for t in tensors(drawn.target.call(**arguments))]
            except Exception as error:  # judged by the caller
                outcome = error
        if not _same(list(tensors(arguments)), list(tensors(drawn.arguments))):
            outcome = RuntimeError("an argument was written to")
        found.append(outcome)
    return found


def _same(left: list[Any], right: list[Any], tolerance: float = 0.0) -> bool:
    import torch

    def close(a: Any, b: Any) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not tolerance or not a.dtype.is_floating_point:
            a, b = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (a, b))  # float8 has no equal
            return torch.equal(a, b)
        size = max(1.0, float(b.double().abs().max())) if b.numel() else 1.0
        return bool(((a.double() - b.double()).abs() <= tolerance * size).all())

    return len(left) == len(right) and all(close(a, b) for a, b in zip(left, right, strict=True))


def _faults(found: list[Any]) -> list[str]:
    """What is wrong with the outcomes of one draw, of which two follow each other for each backend."""
    import torch

    errors = [outcome for outcome in found if isinstance(outcome, Exception)]
    if errors:
        texts = {f"{type(error).__name__}: {error}" for error in errors}
        known = all(isinstance(e, (ValueError, TypeError)) and str(e).startswith("moekit.") for e in errors)
        if len(errors) < len(found):
            return [f"refused by some only: {texts}"]
        return [] if known and len(texts) == 1 else [f"no error of moekit's, or several: {texts}"]
    if any(not _same(*pair) for pair in zip(found[::2], found[1::2], strict=True)):
        return ["the result depends on what fresh memory holds"]
    floats = [t for t in found[0] if t.dtype.is_floating_point]
    if not all(torch.isfinite(t.float()).all() for t in floats):
        return ["the result is not finite"]
    coarse = 2e-2 if any(t.dtype is not torch.float32 for t in floats) else 1e-4
    return [] if all(_same(other, found[0], coarse) for other in found[2::2]) else ["backends differ"]


def _unchecked_faults(found: list[Any]) -> list[str]:
    """Without checks all that counts is staying inside: PyTorch, on a CPU, says where a GPU would go wrong."""
    wrong = [e for e in found if isinstance(e, Exception) and not isinstance(e, (ValueError, TypeError))]
    return [f"{type(error).__name__}: {error}" for error in wrong]


# --- on a GPU --------------------------------------------------------------------------------------------------------


def run_on_gpu(backends: list[str], draws: range, seed: int) -> Tally:
    """Run draws one after the other on the GPU, waiting for each; an error of CUDA's is a fault and ends the run."""
    import torch
    from _integer_cases import case, map_tensors

    import moekit

    tally = Tally()
    for index in draws:
        drawn = case(index, seed)
        arguments = map_tensors(lambda value: value.cuda(), drawn.arguments)
        for name in backends:
            tally.draws += 1
            try:
                with moekit.backend(name), torch.no_grad():
                    drawn.target.call(**arguments)
                torch.cuda.synchronize()
            except Exception as error:
                if "CUDA" in str(error) or "device-side" in str(error) or type(error).__name__ == "AcceleratorError":
                    tally.faults.append(f"{name} {drawn.title}: {type(error).__name__}: {error}")
                    return tally  # nothing runs after it
                tally.raised += 1
    return tally


def main() -> int:
    """Run the draws that the command line asks for; 1 if any went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=0, help="0: each kind of nonsense once for each argument")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backends", nargs="*", help="torch, numba, triton; 'unchecked' as well: check no values")
    parser.add_argument("--start", type=int, default=0, help="the first draw")
    parser.add_argument("--stop", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=1)
    options = parser.parse_args()
    if options.stop is None:
        from _integer_cases import PAIRS

        options.stop = options.start + (options.draws or len(PAIRS)) * options.step
    draws = range(options.start, options.stop, options.step)
    on_gpu = options.device == "cuda"
    backends = options.backends or (["triton", "torch"] if on_gpu else ["torch", "numba"])
    if os.environ.get(CHILD):
        serve(backends, draws, options.seed)
        return 0
    with contextlib.suppress(BrokenPipeError):
        tally = (run_on_gpu if on_gpu else run_on_cpu)(backends, draws, options.seed)
        print(tally)
    return bool(tally.crashes or tally.faults)


if __name__ == "__main__":
    sys.exit(main())
