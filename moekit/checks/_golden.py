"""The repository's golden cases (``tests/golden``), too large for the wheel, as cases of :mod:`moekit.checks`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.checks._case import Case, as_tuple, invoke
from moekit.checks._compare import Difference, close, compare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cases(folder: Path) -> Iterator[Case]:
    """Each of ``cases.json`` in float32 and bfloat16.

    Raises:
        FileNotFoundError: ``folder`` has no ``cases.json`` or ``cases.safetensors``.
        ModuleNotFoundError: safetensors is not installed.
    """
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the golden cases need safetensors: pip install safetensors") from error
    for name in ("cases.json", "cases.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is not there: the golden cases are in the repository's tests/golden")
    tensors = load_file(folder / "cases.safetensors")
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8")):
        own = {key.removeprefix(f"{case['id']}/"): x for key, x in tensors.items() if key.startswith(f"{case['id']}/")}
        for name, dtype in DTYPES.items():
            yield Case(case["function"], f"golden {case['id']}, {name}", _Recorded(case, own, dtype))


class _Recorded:
    """One recorded call in one dtype."""

    def __init__(self, case: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.case, self.tensors, self.dtype = case, tensors, dtype

    def __call__(self, call: Any, device: torch.device) -> list[Difference]:
        """Call it, and compare every output and gradient that was recorded."""
        grads = self.case.get("grads", {})
        args = {name: self._given(value, device) for name, value in self.case["args"].items()}
        for name in grads:
            args[name].requires_grad_()
        found = as_tuple(invoke(call, args))
        names = [reference.split(".")[1] if reference else "output" for reference in self.case["returns"]]
        if len(found) != len(names):
            return [Difference("output", math.inf, False, f"{len(found)} values, expected {len(names)}")]
        by_name = dict(zip(names, found, strict=True))
        recorded = zip(names, self.case["returns"], strict=True)
        differences = [compare(name, by_name[name], self._exact(reference), None, close) for name, reference in recorded]
        if grads and all(difference.passed for difference in differences):
            outputs = [by_name[name] for name in self.case["upstream"]]
            given = zip(self.case["upstream"].values(), outputs, strict=True)
            upstream = [self._exact(reference).to(output) for reference, output in given]
            found = torch.autograd.grad(outputs, [args[name] for name in grads], upstream)
            for (name, reference), gradient in zip(grads.items(), found, strict=True):
                differences.append(compare(f"gradient of {name}", gradient, self._exact(reference), None, close))
        return differences

    def _exact(self, reference: str | None) -> Any:
        return None if reference is None else self.tensors[reference.removeprefix("@")]

    def _given(self, value: Any, device: torch.device) -> Any:
        if not (isinstance(value, str) and value.startswith("@")):
            return value
        x = self._exact(value)
        return x.clone().to(device, self.dtype if x.is_floating_point() else x.dtype)
