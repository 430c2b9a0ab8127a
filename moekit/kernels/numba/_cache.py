"""Where compiled kernels are kept: a folder of the user's, outside the package, which uninstalling then removes in full.

It is ``moekit/kernels`` in the user's cache folder (``XDG_CACHE_HOME``, or where the system has it), or in the folder that
``NUMBA_CACHE_DIR`` names. In it, ``<place>-<processor>/<sources>-<Numba>-<Python>``: what is another's (another
environment's, another machine's in a shared home) has another folder. Places are paths, which containers may have in common,
and a clone changes its version with its branch: so the first process of a version clears other versions of its place only if
nothing has used them for a day, and places that nothing has used for a month.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numba
from numba.core import caching, config
from numba.core.registry import cpu_target
from numba.misc.appdirs import AppDirs

_HERE = Path(__file__).parent
_SUPERSEDED = 24 * 3600  # seconds without use, of another version in the same place
_UNUSED = 30 * 24 * 3600  # and of another place
# Names that are made here; nothing else is ever removed.
_PLACE = re.compile(r"[0-9a-f]{12}-[0-9a-f]{12}")
_VERSION = re.compile(rf"[0-9a-f]{{12}}-[\w.+]+-{re.escape(str(sys.implementation.cache_tag))}")
_ANY_VERSION = re.compile(r"[0-9a-f]{12}-[\w.+]+-[\w-]+")
_KERNEL = re.compile(r".+\.nb[ic](\.tmp\.\w+)?")


def root() -> Path:
    """The folder of all kernels of all versions, an absolute path. It need not exist.

    Raises:
        OSError: neither ``NUMBA_CACHE_DIR`` nor the user's cache or home folder is known.
    """
    chosen = getattr(config, "CACHE_DIR", "")  # made of the environment, where a type checker does not look
    if chosen:
        return Path(chosen, "moekit", "kernels").absolute()
    # The XDG specification has an XDG_CACHE_HOME that is empty or relative ignored. AppDirs takes it as it is.
    for found in (AppDirs("moekit", False).user_cache_dir, os.path.expanduser("~/.cache/moekit")):
        if os.path.isabs(found):
            return Path(found, "kernels")
    raise FileNotFoundError("moekit: no folder to keep compiled kernels in: the user has no home folder")


@functools.cache
def folder() -> Path:
    """The folder of this version's kernels, in this place, for this processor: made on first use.

    Raises:
        OSError: it cannot be made, or :func:`root` knows none.
    """
    found = root() / f"{_digest(str(_HERE), numba.__file__)}-{_digest(*map(str, _processor()))}" / _version()
    is_new = not found.is_dir()
    found.mkdir(parents=True, exist_ok=True)
    for used in (found, found.parent):
        os.utime(used)  # when it was last used
    if is_new:
        for stale in _superseded(found):
            _remove(stale)
    return found


class Locator(caching.UserProvidedCacheLocator):
    """Tells Numba of that folder, for the functions of this package."""

    def __init__(self, py_func: FunctionType, py_file: str) -> None:
        self._py_file = py_file
        self._lineno = py_func.__code__.co_firstlineno
        self._cache_path = str(folder())

    @classmethod
    def from_function(cls, py_func: FunctionType, py_file: str) -> Locator | None:
        """None for functions of others, whom Numba then asks in turn.

        Raises:
            OSError: the folder cannot be written.
        """
        if Path(py_file).parent != _HERE:
            return None
        found = cls(py_func, py_file)
        found.ensure_cache_path()
        return found


class Kept(NamedTuple):
    """Kernels on disk, counted with all their signatures."""

    folder: str | None  # of this version; None: nowhere to write, so each process compiles for itself
    wanted: str | None  # the folder that NUMBA_CACHE_DIR names, if it is set
    kernels: int
    kernels_bytes: int
    others: int  # of other versions and places
    others_bytes: int


def kept() -> Kept:
    """Look, as Numba does before it compiles: the folder is made where it can be, and a file is written for a moment."""
    register()
    wanted = getattr(config, "CACHE_DIR", "") or None
    try:
        found = Path(caching.FunctionCache(kept).cache_path)  # one folder for all functions of the package
    except OSError:  # it cannot be written
        return Kept(None, wanted, 0, 0, 0, 0)
    ours, others = [], []
    for path in found.parents[1].rglob("*.nbc"):
        with suppress(FileNotFoundError):  # another process tidies up
            (ours if path.parent == found else others).append(path.stat().st_size)
    return Kept(str(found), wanted, len(ours), sum(ours), len(others), sum(others))


def register() -> None:
    """Have Numba ask :class:`Locator` first, before it takes ``__pycache__``."""
    known: list[Any] = caching.CompileResultCacheImpl._locator_classes
    if Locator not in known:
        known.insert(0, Locator)


def _superseded(mine: Path) -> Iterator[Path]:
    """Folders to remove.

    In this place those of other versions, under the same Python, unused for a day; all those of places unused for a month.
    """
    with suppress(OSError):
        for version in [path for path in mine.parent.iterdir() if path != mine and _VERSION.fullmatch(path.name)]:
            if _unused(version, _SUPERSEDED):
                yield version
        for place in [path for path in mine.parents[1].iterdir() if path != mine.parent and _PLACE.fullmatch(path.name)]:
            if not place.is_symlink() and _unused(place, _UNUSED):
                yield from [path for path in place.iterdir() if _ANY_VERSION.fullmatch(path.name)]


def _unused(folder: Path, seconds: float) -> bool:
    """Whether the last use was longer ago. No, of a folder that another process has just removed."""
    try:
        return time.time() - folder.stat().st_mtime > seconds
    except OSError:
        return False


def _remove(version: Path) -> None:
    """Kernels, then the folders that are empty. Another process may do the same, or still write: what is gone is gone.

    A process that loses kernels it has yet to load compiles them again.
    """
    if version.is_symlink():
        return
    with suppress(OSError):
        for path in [path for path in version.iterdir() if _KERNEL.fullmatch(path.name)]:
            with suppress(OSError):
                path.unlink()
        version.rmdir()
        version.parent.rmdir()  # only if nothing else is in it


def _version() -> str:
    return f"{_fingerprint()}-{numba.__version__}-{sys.implementation.cache_tag}"


def _processor() -> tuple[str, ...]:
    """What Numba compiles for."""
    context: Any = cpu_target.target_context
    return context.codegen().magic_tuple()


def _fingerprint() -> str:
    """Of the sources here: Numba itself looks at a kernel's own file only, not at the helpers it inlines."""
    return _digest(*(path.read_bytes() for path in sorted(_HERE.glob("*.py"))))


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()[:12]
