"""Where compiled kernels are kept on disk, and what is there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from numba import config
from numba.core.caching import FunctionCache

from moekit.kernels.numba._jit import _fingerprint


class Kept(NamedTuple):
    """The folder of this installation's kernels; kernels are counted with all their signatures."""

    folder: str | None  # None: nowhere to write, so each process compiles for itself
    wanted: str | None  # the folder that NUMBA_CACHE_DIR names, if it is set
    kernels: int  # of these sources
    kernels_bytes: int
    others: int  # of other versions of moekit: nothing reads them
    others_bytes: int


def kept() -> Kept:
    """Look, as Numba does before it compiles: the folder is made where it can be, and a file is written for a moment."""
    wanted = config.CACHE_DIR or None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        folder = Path(FunctionCache(kept).cache_path)  # one folder for all sources of a package
    except RuntimeError:  # no place will do
        return Kept(None, wanted, 0, 0, 0, 0)
    sizes = {True: [], False: []}
    for path in folder.glob("*.nbc"):
        try:
            sizes[_fingerprint() in path.name].append(path.stat().st_size)
        except FileNotFoundError:  # another process tidies up
            continue
    ours, others = sizes[True], sizes[False]
    return Kept(str(folder), wanted, len(ours), sum(ours), len(others), sum(others))
