"""All facts, each from a probe of its own."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

from moekit.doctor import choices, system


def examine() -> dict[str, Any]:
    """Find out everything. What a probe raises becomes a line of ``errors``, and its fact is None.

    Returns:
        one object of plain values (``docs/cli.md`` lists its keys), not judged yet: see :func:`moekit.doctor.report.judged`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages: what matters here is a fact
        return _examined()


def _examined() -> dict[str, Any]:
    errors: dict[str, str] = {}

    def probe(name: str, find: Callable[[], Any]) -> Any:
        try:
            return find()
        except Exception as error:  # broken installations fail in every way there is
            errors[name] = f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
            return None

    found: dict[str, Any] = {"versions": probe("versions", system.versions), "cpu": probe("cpu", system.cpu)}
    found["requires"] = probe("requires", system.floors)
    build = probe("torch", system.torch_build)
    found["torch_build"], found["errors"] = build, errors
    found |= dict.fromkeys(("threads", "gpus", "backends", "auto", "environment", "cache", "parity", "rates", "pages"))
    if build is None:  # all else needs torch
        return found
    found["threads"] = probe("threads", system.threads)
    found["gpus"] = probe("gpus", system.gpus)
    found["environment"] = probe("environment", choices.environment)
    found["backends"] = probe("backends", choices.backends)
    if found["backends"] and found["backends"].get("numba") is None:
        found["cache"] = probe("cache", choices.cache)
    trials = probe("trials", lambda: importlib.import_module("moekit.doctor.trials"))
    if trials is None:
        return found
    devices = probe("devices", trials.devices) or ["cpu"]
    for name, find in (("auto", choices.automatic), ("rates", functools.partial(_rates, trials))):
        found[name] = {device: probe(f"{name} on {device}", functools.partial(find, device)) for device in devices}
    found["parity"] = probe("parity", lambda: list(trials.parity()))
    found["pages"] = probe("pages", trials.fresh_pages)
    if found["cache"]:  # again, as what was tried has been compiled and kept
        found["cache"] = probe("cache", functools.partial(choices.cache, found["cache"]["kernels"]))
    return found


def _rates(trials: Any, device: str) -> dict[str, Any]:
    """As ``auto`` runs them, whatever MOEKIT_BACKEND says."""
    from moekit import _backend

    with _backend.backend("auto"):
        return trials.rates(device)
