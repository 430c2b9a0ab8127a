"""What moekit takes on this machine: backends, the environment, the kernels kept on disk. Decided by ``moekit._backend``."""

from __future__ import annotations

import importlib
from typing import Any

OPERATORS = {
    "route": "topk_router",
    "route backward": "topk_router_backward",
    "routing tables": "route_indices",
    "permute": "permute",
    "unpermute": "unpermute",
    "unpermute backward": "unpermute_backward",
    "glu": "glu",
    "glu backward": "glu_backward",
    "grouped products": "grouped_rows",
    "unpacking": "unpack",
}
"""The main operators as a reader knows them, and as backends do."""


def backends() -> dict[str, str | None]:
    """Each backend, and why it cannot be had; None: it can."""
    from moekit import _backend

    found: dict[str, str | None] = {}
    for name in ("torch", *_backend.BACKENDS):
        try:
            found[name] = _backend.why_not(name)
        except Exception as error:  # a package that fails in its own way
            found[name] = f"cannot be imported: {type(error).__name__}: {error}"
    return found


def automatic(device: str) -> dict[str, dict[str, str]]:
    """What ``auto`` runs each main operator with on a type of device, and why."""
    from moekit import _backend

    found = {name: _backend.explain(op, device) for name, op in OPERATORS.items()}
    return {name: {"backend": backend, "why": why} for name, (backend, why) in found.items()}


def environment() -> list[dict[str, Any]]:
    """Every environment variable that moekit reads."""
    from moekit import _backend

    return [variable._asdict() for variable in _backend.variables()]


def cache(before: int | None = None) -> dict[str, Any]:
    """Where the compiled CPU kernels are kept. Without Numba there are none: an ImportError.

    Args:
        before: how many there were earlier; those that came since are ``compiled``.
    """
    kept = importlib.import_module("moekit.kernels.numba._cache").kept()
    problem = None
    if kept.folder is None:
        named = f"NUMBA_CACHE_DIR={kept.wanted}" if kept.wanted else "the user's cache folder"
        problem = f"{named} cannot be written: each process compiles its CPU kernels anew (0.3 to 2 s each); " \
                  "set NUMBA_CACHE_DIR to a folder that can"  # fmt: skip
    compiled = 0 if before is None else max(kept.kernels - before, 0)
    return {**kept._asdict(), "compiled": compiled, "problem": problem}
