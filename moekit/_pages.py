"""Pages of freed tensors stay with the process: what glibc's ``malloc`` has to be told for that."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field

_SETTINGS = {  # glibc's malloc.h: the number of each parameter, and the value it gets
    "mmap_max": (-4, 0),  # no tensor in a mapping of its own, which goes when it is freed, whatever its size
    "trim_threshold": (-1, -1),  # the heap's end is never given back
    "arena_max": (-8, 1),  # threads share that heap: one of their own is too small for large tensors
}


@dataclass(frozen=True)
class KeptPages:
    """What :func:`moekit.keep_pages` did. True if anything was set; printed, it is one line.

    Attributes:
        settings: what ``mallopt`` accepted, by name.
        libc: the C library and its version, or ``""`` where it is not glibc.
        reason: why nothing was set, or ``""``.
    """

    settings: dict[str, int] = field(default_factory=dict)
    libc: str = ""
    reason: str = ""

    def __bool__(self) -> bool:
        return bool(self.settings)

    def __repr__(self) -> str:
        if not self.settings:
            return f"keep_pages: nothing to do: {self.reason}"
        return f"keep_pages: {', '.join(f'{name}={value}' for name, value in self.settings.items())} ({self.libc})"


def keep_pages() -> KeptPages:
    """Keep the memory of freed tensors in the process for the next ones: fresh results on a CPU then cost no page faults.

    glibc maps each large tensor anew and unmaps it when it is freed, and every page of it costs a fault when it is first
    written: together that takes longer than most operators, whoever's (``docs/performance/cpu.md`` has figures). This calls
    glibc's ``mallopt`` with ``M_MMAP_MAX=0``, ``M_TRIM_THRESHOLD=-1`` and ``M_ARENA_MAX=1``. Once at the start of a program
    will do; again, it does the same. (A threshold for mappings would not: it ends at 32 MiB by the manual, and below 2 GiB.)

    The price: what the process has once used it keeps, so resident memory stays at its peak. Tensors share a heap with all
    else, and gaps between them may raise the peak itself; the first few calls of a kind fill such gaps before pages are
    reused. Threads that start later share that heap and take turns while they allocate more than a kilobyte; those that
    run already keep their own, which still gives memory back. All this holds for the process and its forks, not for programs
    that it starts. The environment is not touched.

    Returns:
        KeptPages: what was set, on one line when printed. Where ``malloc`` is not glibc's (macOS, Windows, musl; jemalloc or
        tcmalloc preloaded) nothing is changed, and it says so.

    Example:
        >>> import moekit
        >>> print(moekit.keep_pages())  # doctest: +SKIP
        keep_pages: mmap_max=0, trim_threshold=-1, arena_max=1 (glibc 2.36)
    """
    libc = _glibc()
    if isinstance(libc, str):
        return KeptPages(reason=libc)
    libc.gnu_get_libc_version.restype = ctypes.c_char_p
    version = f"glibc {libc.gnu_get_libc_version().decode()}"
    accepted = {name: value for name, (number, value) in _SETTINGS.items() if libc.mallopt(number, value)}
    return KeptPages(accepted, version, "" if accepted else f"mallopt of {version} accepted no setting")


def _glibc() -> ctypes.CDLL | str:
    """The glibc whose allocator this process uses, or why there is none."""
    if sys.platform != "linux":
        return f"{sys.platform} has no glibc"
    try:
        libc = ctypes.CDLL("libc.so.6")
        process = ctypes.CDLL(None)
        names = ("malloc", "posix_memalign", "free")  # torch allocates with the second
        ours = [_address(process, name) == _address(libc, name) for name in names]
        present = all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt"))
    except (OSError, AttributeError):
        present, ours = False, []
    if not present:
        return "the C library is not glibc"
    if not all(ours):
        return "malloc is not glibc's: another allocator is preloaded or linked in"
    return libc


def _address(library: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
