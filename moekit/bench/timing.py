"""Contenders that take turns, and medians.

The contenders of a case take turns, so that drift of the machine hits all alike, in an order drawn anew each round, so that
nobody always follows the same neighbour. A time includes freeing the result. Slow contenders take part in fewer rounds,
spread evenly.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SAMPLE_SECONDS = 5e-4  # shorter calls are repeated until a sample takes this long
_QUEUED_SECONDS = 1e-2  # the same where a sample ends with a wait, which takes a while itself
_PATIENCE_SECONDS = 30  # a call that takes longer is not repeated
_ALIKE = 0.05  # largest difference between contenders, relative to the largest value


@dataclass(frozen=True)
class Contender:
    """Something to time; ``context`` is entered around the calls, outside the clock."""

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager] = nullcontext
    wait: Callable[[], None] | None = None  # for what calls have left a GPU to do


@dataclass
class Measured:
    """Seconds of each contender: median, quartiles and number of samples; errors; how far results differ from the first's.

    A difference is relative to the largest value, and None where it is not finite.
    """

    times: dict[str, dict[str, float]]
    failed: dict[str, str]
    differences: dict[str, float | None]

    def ratio(self, against: str, ours: str = "moekit") -> float | None:
        """How many times faster ``ours`` is, or None where one of them did not run."""
        if against not in self.times or ours not in self.times:
            return None
        return self.times[against]["median"] / self.times[ours]["median"]


def measure(
    contenders: Sequence[Contender], budget: float, least: int = 5, most: int = 50, *, alike_only: bool = False
) -> Measured:
    """Time all contenders in turns.

    Args:
        contenders: the first is the one whose result the others are compared with. Where it fails, or its result is not
            finite, nobody is compared.
        budget: seconds to spend, in equal parts; more where ``least`` samples take longer.
        least: samples of each contender (one of a contender that takes longer than 30 s).
        most: samples of each contender.
        alike_only: whether a contender with another result than the first's has failed, and is not timed. Nor is anybody
            where the first fails.
    """
    result = Measured({}, {}, {})
    first: Tensor | None = None
    samples: dict[str, list[float]] = {}
    ready: list[tuple[Contender, int, int]] = []  # with calls in a sample and samples to take
    gc.collect()
    for place, contender in enumerate(contenders):
        try:
            seconds, probe = _warm_up(contender)
            if place == 0:
                first = _finite(probe)
        except Exception as error:  # a peer's compiler or memory may fail; the others go on
            result.failed[contender.name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            if alike_only and place == 0:
                break
            continue
        if place and probe is not None and first is not None and probe.shape == first.shape:
            result.differences[contender.name] = _difference(probe, first)
            if alike_only and (strange := unlike({contender.name: result.differences[contender.name]})):
                result.failed[contender.name] = f"another result than {contenders[0].name}'s: {strange[0]}"
                continue
        if seconds > _PATIENCE_SECONDS:
            samples[contender.name] = [seconds]
            continue
        calls = max(1, int((_QUEUED_SECONDS if contender.wait else _SAMPLE_SECONDS) / seconds))
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
        _wait(contender)
        seconds = time.perf_counter() - start
        probe = _probe(output)
        del output
        for _ in range(2 if seconds < _PATIENCE_SECONDS else 0):
            start = time.perf_counter()
            contender.call()
            _wait(contender)
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
        _wait(contender)
        return (time.perf_counter() - start) / calls


def _wait(contender: Contender) -> None:
    if contender.wait is not None:
        contender.wait()


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


def _finite(probe: Tensor | None) -> Tensor | None:
    if probe is not None and not bool(probe.isfinite().all()):
        raise ValueError("the result has NaN or infinity")
    return probe


def _difference(value: Tensor, wanted: Tensor) -> float | None:
    """The largest difference relative to the largest value; None, as JSON has it, if that is not finite."""
    difference = float((value - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    return difference if math.isfinite(difference) else None


def copy_contender(
    num_bytes: int, dtype: torch.dtype, device: str | torch.device = "cpu", wait: Callable[[], None] | None = None
) -> Contender:
    """The yardstick: ``copy_`` into an existing buffer that moves as many bytes, half read and half written."""
    source = torch.ones(max(num_bytes // 2 // dtype.itemsize, 1), dtype=dtype, device=device)
    target = torch.ones_like(source)

    def call() -> None:
        target.copy_(source)

    return Contender("copy_", call, wait=wait)


def unlike(differences: Mapping[str, float | None]) -> list[str]:
    """Contenders whose results differ from moekit's by more than rounding explains."""
    return [
        f"{name} ({'not finite' if value is None else f'{value:.2g}'})"
        for name, value in differences.items()
        if value is None or value > _ALIKE
    ]
