"""Running the cases against a module, and what came of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moekit.checks import _activations, _golden, _router, _rows, _seams, _signatures
from moekit.checks._case import Case, OtherSignatureError


@dataclass(frozen=True)
class Outcome:
    """What came of one case.

    Attributes:
        function: the name in the module.
        case: the case's name.
        seam: the key in :data:`moekit.checks.SEAMS`, or None.
        status: ``"passed"``, ``"failed"``, ``"raises"`` or ``"other signature"``.
        error: largest difference over the largest expected value; inf where nothing could be compared.
        what: the output or gradient with that difference.
        note: the first element that is off, or the exception.
    """

    function: str
    case: str
    seam: str | None
    status: str
    error: float
    what: str
    note: str


@dataclass(frozen=True)
class Report:
    """What came of all cases.

    Attributes:
        outcomes: of each case of each function that is there.
        missing: published names that the module does not have.
        signatures: by name, parameters that differ from the published ones.
    """

    outcomes: tuple[Outcome, ...]
    missing: tuple[str, ...]
    signatures: dict[str, str]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The outcomes that are not passed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status != "passed")

    def of(self, function: str) -> tuple[Outcome, ...]:
        """Those of one function."""
        return tuple(outcome for outcome in self.outcomes if outcome.function == function)

    def of_seam(self, seam: str) -> tuple[Outcome, ...]:
        """Those of one seam."""
        return tuple(outcome for outcome in self.outcomes if outcome.seam == seam)

    def worst(self, function: str) -> Outcome | None:
        """The one with the largest error."""
        return max(self.of(function), key=lambda outcome: outcome.error, default=None)


def check(
    module: Any,
    device: str = "cpu",
    golden: Path | None = None,
    eager: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """Run every case against the functions that ``module`` has.

    Args:
        module: a module, or anything with these functions as attributes.
        device: where the tensors are.
        golden: the repository's ``tests/golden``; None: without its cases.
        eager: run what the module compiles by ``torch.compile`` as it stands.
        progress: called with the number of cases that are done, and of all.

    Returns:
        the report. A function that raises or exits, or a name whose reading raises, is reported and does not stop the run.

    Raises:
        ValueError: ``module`` has none of the names.
        FileNotFoundError, ModuleNotFoundError: the golden cases, or safetensors, are not there.
    """
    names = _signatures.names()
    missing = tuple(name for name in names if not _signatures.has(module, name))
    if len(missing) == len(names):
        title = getattr(module, "__name__", str(module))
        raise ValueError(f"moekit.check: module must have functions of moe_utils ({names[5]}, ...), got {title}")
    chosen = [case for case in _cases(golden) if case.function not in missing]
    outcomes: list[Outcome] = []
    with _as_published(eager), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for done, case in enumerate(chosen, 1):
            outcomes += _outcome(case, module, torch.device(device))
            progress(done, len(chosen))
    outcomes.sort(key=lambda outcome: names.index(outcome.function))
    return Report(tuple(outcomes), missing, _signatures.differences(module))


@contextmanager
def _as_published(eager: bool) -> Iterator[None]:
    """What the module compiles is compiled: by default PyTorch gives that up after eight shapes or dtypes."""
    from torch._dynamo import config

    with torch.compiler.set_stance("force_eager" if eager else "default"), config.patch(recompile_limit=256):
        yield


def _cases(golden: Path | None) -> Iterator[Case]:
    for source in (_activations, _rows, _router, _seams):
        yield from source.cases()
    if golden is not None:
        yield from _golden.cases(golden)


def _outcome(case: Case, module: Any, device: torch.device) -> Iterator[Outcome]:
    """What came of a case, if it holds for the device."""
    if case.devices and device.type not in case.devices:
        return
    known = case.function, case.name, case.seam
    try:
        differences = case.measure(getattr(module, case.function), device)
    except OtherSignatureError as error:
        yield Outcome(*known, "other signature", math.inf, "", str(error))
    except (Exception, SystemExit) as error:  # whatever the module does, the other cases are of interest
        words = str(error).strip().splitlines()
        yield Outcome(*known, "raises", math.inf, "", f"{type(error).__name__}: {words[0] if words else ''}")
    else:
        worst = max(differences, key=lambda difference: (not difference.passed, difference.error))
        yield Outcome(*known, "passed" if worst.passed else "failed", worst.error, worst.what, worst.note)
