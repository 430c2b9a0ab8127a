"""Differential test of ``moekit.hf``: drawn situations, each compared with Transformers' own eager code.

::

    python tests/differential.py --draws 20000 --seed 7
    python tests/differential.py --draws 500 --only mode=vmap_grad --only dtype=bfloat16
    python tests/differential.py --replay 7:1234

A draw is a class of experts, the dtypes and layouts of its parameters, what a user hooked or patched, a mode of
autograd, a way to execute the call and a routing (``_draw_situations.py``). moekit has to be right or to refuse: as close
to float64 as Transformers' own code is, or an exception that says why. Where Transformers' code runs, a refusal has to be
one of ``MAY_REFUSE``.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from _draw_classes import Situation, traits
from _draw_modes import CHECKPOINTS, Results, run
from _draw_modules import DTYPES, build, changed, inputs
from _draw_patches import Case
from _draw_situations import draw
from torch import Tensor

import moekit
import moekit.hf

UNDERSTANDABLE = (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError)
PEERS = ("eager", "grouped_mm", "batched_mm")
# Most classes' eager code writes the gate out and never calls ``_apply_gate``; the other two always do.
PEERS_WITH_GATE = ("batched_mm", "grouped_mm")
# The only situations in which moekit may refuse what Transformers' eager code does, with a part of the message.
MAY_REFUSE: list[tuple[str, Callable[[Situation], bool], str]] = [
    ("the fused operator has no double backward", lambda s: s["mode"] == "double", "double backward"),
    # Without slots of other ranks they repeat an expert; moekit.Routing takes that for another mistake.
    ("more slots than experts", lambda s: s["K"] > s["E"], "indices must be at most num_experts"),
    # As many slots as experts, and in every token only the first two: a map of 0 and 1 in the place of indices.
    ("what can only be a map", lambda s: s["routing"] == "duplicates" and s["K"] == s["E"], "a map? use"),
    # Eager code calls the activation only where an expert has tokens, and raises the same there.
    ("an in-place activation of a half", lambda s: s["act"].endswith("inplace"), "modified inplace"),
    ("an activation with a parameter of another dtype", lambda s: s["act"] == "prelu", "Type promoting not supported"),
]


@dataclass
class Outcome:
    """What came of a draw; ``kind`` is "equal", "refused", "refused by all", "unjudged" or a failure."""

    kind: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.kind not in ("equal", "refused", "refused by all", "unjudged")


# --- running ----------------------------------------------------------------------------------------------------------


def attempt(case: Case, arrays: dict[str, Tensor], implementation: str, execution: str = "eager") -> Results | Exception:
    """What the implementation computes, or what it raised."""
    try:
        return run(case, arrays, implementation, execution, vectorised=implementation == "moekit")
    except Exception as error:  # whatever it is: it is what is judged
        return error.with_traceback(None)


def first(case: Case, arrays: dict[str, Tensor], execution: str = "eager") -> Results | None:
    """The results of the first of Transformers' implementations that runs."""
    peers = PEERS_WITH_GATE if case.situation["patch"].startswith("gate_") else PEERS
    results = (attempt(case, arrays, peer, execution) for peer in peers)
    return next((found for found in results if not isinstance(found, Exception)), None)


def exactly(situation: Situation, noise: float = 0.0) -> Results | None:
    """The same in float64, from the same rounded values."""
    case = build(situation, exact=True, noise=noise)
    try:
        execution = situation["execution"]
        return first(case, inputs(case), execution if execution in CHECKPOINTS else "eager")
    finally:
        case.finish()


def judge(situation: Situation) -> Outcome:
    """Run a situation with Transformers' code and with moekit, and compare."""
    moekit.hf.register(save=situation["save"])
    execution = situation["execution"]
    case = build(situation)
    try:
        arrays = inputs(case)
        # Compiled and traced, Transformers' code is what it is without: it stands for itself, quickly.
        expected = first(case, arrays, "eager" if execution in ("compile", "trace", "meta") else execution)
        changed(case, execution)
        before = {name: array.nan_to_num() for name, array in arrays.items()}
        given = {name: array.to("meta") for name, array in arrays.items()} if execution == "meta" else arrays
        with moekit.backend(situation["backend"]):
            actual = attempt(case, given, "moekit", execution)
            again = attempt(case, given, "moekit", execution) if situation["again"] else actual
        if not all(torch.equal(array.nan_to_num(), before[name]) for name, array in arrays.items()):
            return Outcome("wrote into an input")
    finally:
        case.finish()
    if isinstance(actual, Exception):
        return refusal(situation, actual, expected)
    if execution == "meta":
        return Outcome("equal") if expected is None else shapes(expected, actual)
    if not same(actual, again):
        return Outcome("another result when repeated")
    truth = exactly(situation)
    if truth is None:
        return Outcome("unjudged", "no peer runs in float64")
    return compare(situation, expected, actual, truth)


# --- judging ----------------------------------------------------------------------------------------------------------


def same(one: Results, two: Results | Exception) -> bool:
    """Whether two runs agree to the bit."""
    return not isinstance(two, Exception) and all(
        torch.equal(value.nan_to_num(), two[name].nan_to_num()) if isinstance(value, Tensor) else value == two[name]
        for name, value in one.items()
    )


def refusal(situation: Situation, error: Exception, expected: Results | None) -> Outcome:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if expected is None:
        return Outcome("refused by all", said)
    if not isinstance(error, UNDERSTANDABLE) or not str(error):
        return Outcome("crashed", said)
    for reason, applies, part in MAY_REFUSE:
        if applies(situation) and part in str(error):
            return Outcome("refused", reason)
    return Outcome("raised", said)


def shapes(expected: Results, actual: Results) -> Outcome:
    """On the meta device there is nothing but shapes and dtypes."""
    for name, value in expected.items():
        found = actual.get(name)
        if isinstance(value, Tensor) and (found is None or (found.shape, found.dtype) != (value.shape, value.dtype)):
            return Outcome("another shape", f"{name}: {describe(found)}, expected {describe(value)}")
    return Outcome("equal")


def describe(value: Tensor | None) -> str:
    return "None" if value is None else f"{value.dtype} {list(value.shape)}"


def resolution(situation: Situation) -> float:
    """The spacing of the coarsest dtype that takes part."""
    dtype = situation["dtype"]
    names = ["bfloat16" if dtype.startswith("mixed") else dtype, situation["hidden_dtype"], situation["autocast"]]
    names += ["float32"] if "float32 inside" in traits(situation["class"]) else []
    return max(torch.finfo(DTYPES[name]).eps for name in names if name != "none")


class Noise:
    """How far inputs that differ in the last bit move a result: sums that cancel, kinks."""

    def __init__(self, situation: Situation):
        self.situation, self.runs = situation, {}

    def moves(self, name: str, truth: Tensor, finite: Tensor, last: float) -> float:
        """The furthest that a tensor moves when inputs change by about ``last`` of themselves."""
        if last not in self.runs:
            self.runs[last] = [exactly(self.situation, last * (1 + step / 64)) for step in range(8)]
        found = [run[name] for run in self.runs[last] if run is not None and run.get(name) is not None]
        return max((float(torch.where(finite, value - truth, 0).nan_to_num().norm()) for value in found), default=0.0)


def compare(situation: Situation, expected: Results | None, actual: Results, truth: Results) -> Outcome:
    """Each tensor of moekit's against float64, by the error of Transformers' own code."""
    noise = Noise(situation)
    for name, value in truth.items():
        if value is None or isinstance(value, Tensor):
            peer = value if expected is None else expected[name]
            outcome = compare_tensor(situation, name, actual.get(name), peer, value, expected is not None, noise)
            if outcome is not None:
                return outcome
    return attributes(situation, expected, actual)


def attributes(situation: Situation, expected: Results | None, actual: Results) -> Outcome:
    if expected is None:
        wanted = DTYPES[situation["hidden_dtype"]]
        return Outcome("equal") if actual.get("dtype", wanted) is wanted else Outcome("another dtype", str(actual["dtype"]))
    for name in ("dtype", "shape", "device", "inference"):
        if expected.get(name) != actual.get(name):
            return Outcome(f"another {name}", f"{actual.get(name)}, expected {expected.get(name)}")
    if expected.get("requires_grad") and not actual["requires_grad"]:
        return Outcome("no gradient", "the output is detached")
    if situation["mode"] in ("no_grad", "inference_mode") and actual["requires_grad"]:
        return Outcome("a gradient", "the output requires one")
    if expected["calls"] and not actual["calls"]:
        return Outcome("hook not called", f"{expected['calls']} calls expected")
    return Outcome("equal")


def compare_tensor(
    situation: Situation,
    name: str,
    actual: Tensor | None,
    peer: Tensor | None,
    truth: Tensor | None,
    judged_by_peer: bool,
    noise: Noise,
) -> Outcome | None:
    """None where the tensor is right.

    A gradient that Transformers' code leaves None (no token came to any expert) may be None or zeros here.
    """
    if peer is None or truth is None:
        zero = actual is None or not actual.count_nonzero()
        return None if zero else Outcome("a gradient", f"{name} is None in eager, here up to {actual.abs().max():.3g}")
    if actual is None:
        return Outcome("no gradient", f"{name} is None")
    if actual.shape != truth.shape or (judged_by_peer and actual.dtype is not peer.dtype):
        return Outcome("another shape or dtype", f"{name}: {describe(actual)}, expected {describe(peer)}")
    # Where Transformers' code has no number, there is nothing to compare; elsewhere moekit has to have one.
    finite = peer.isfinite() & truth.isfinite()
    if situation["poison"] == "token" and name != "out":
        # The derivative at a NaN is whatever an implementation makes of it, and parameters sum over tokens.
        of_tokens = name == "tangent" or name.endswith((" of x", " of weights"))
        finite[(..., slice(1), slice(None)) if of_tokens else ...] = False
    actual, peer, truth = (torch.where(finite, t.double(), 0) for t in (actual, peer, truth))
    if not actual.isfinite().all():
        return Outcome("not finite", name)
    error, theirs, size = (float(t.detach().norm()) for t in (actual - truth, peer - truth, truth))
    fp8 = situation["save"] == "fp8" and name != "out"
    unit = resolution(situation)
    share = 0.06 if fp8 else unit * (1 if judged_by_peer and unit > 1e-15 else 8)
    bound = 2 * theirs + share * size
    if error > bound:
        bound += 2 * noise.moves(name, truth, finite, 2**-4 if fp8 else unit / 2)
    if error <= bound:
        return None
    return Outcome("different", f"{name}: off by {error:.3g} of {size:.3g} (Transformers {theirs:.3g}, bound {bound:.3g})")


# --- command line -------------------------------------------------------------------------------------------------------


def replay_command(seed: int, index: int, only: dict[str, str]) -> str:
    fixed = [f"--only '{key}={value}'" for key, value in only.items()]
    return " ".join(["python tests/differential.py", f"--replay {seed}:{index}", *fixed])


def judged(seed: int, indices: Iterable[int], only: dict[str, str]) -> Iterator[tuple[Situation, Outcome, str]]:
    """Draw and judge; yields each with the command that repeats it."""
    for index in indices:
        situation = draw(random.Random(f"{seed}:{index}"), only)
        yield situation, judge(situation), replay_command(seed, index, only)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], metavar="KEY=VALUE", help="fix a key of the situation")
    parser.add_argument("--replay", metavar="SEED:INDEX", help="one draw, with its situation")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    only = dict(item.split("=", 1) for item in options.only)
    seed, indices = options.seed, range(options.draws)
    if options.replay:
        seed, index = map(int, options.replay.split(":"))
        indices = range(index, index + 1)
    kinds, refused, start = collections.Counter(), collections.Counter(), time.perf_counter()
    failed = 0
    for situation, outcome, command in judged(seed, indices, only):
        kinds[outcome.kind] += 1
        refused[outcome.detail] += outcome.kind == "refused"
        failed += outcome.failed
        if outcome.failed or options.replay:
            print(f"{outcome.kind}: {outcome.detail}\n  {command}\n  {situation}", flush=True)
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    print(f"{len(indices)} draws in {time.perf_counter() - start:.0f} s: {counts}")
    for reason, number in (+refused).items():
        print(f"  refused: {number} ({reason})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
