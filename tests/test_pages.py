"""moekit.keep_pages: fresh results without page faults where malloc is glibc's, and nothing at all elsewhere."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

import moekit
from moekit import _pages

# A process of its own, whose allocator is set half-way. A result of 40 MiB has 10240 pages of 4 KiB.
FAULTS = """
import resource, statistics, threading
import torch, moekit

torch.manual_seed(0)
torch.set_num_threads(1)
routing = moekit.Routing.from_topk(torch.rand(1024, 64).topk(8).indices, torch.rand(1024, 8), num_experts=64)
tokens = torch.randn(1024, 1280)

def settled():
    # The middle one of nine calls after twelve: in one the heap may still grow, as small objects cut its gaps up.
    faults = []
    for _ in range(21):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        rows = moekit.permute(tokens, routing)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return statistics.median(faults[12:]), rows

fresh, wanted = settled()
first, again = moekit.keep_pages(), moekit.keep_pages()
kept, found = settled()
elsewhere = []
thread = threading.Thread(target=lambda: elsewhere.append(settled()[0]))
thread.start(), thread.join()
print(fresh, kept, *elsewhere, torch.equal(wanted, found), first == again, bool(first), first, sep="|")
"""


@pytest.mark.skipif(isinstance(_pages._glibc(), str), reason="malloc is not glibc's")
def test_fresh_results_cost_no_page_faults_any_more():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    fresh, kept, elsewhere, *same, line = done.stdout.strip().split("|")
    assert int(fresh) >= 10240, "the default allocator was expected to map each result anew"
    assert int(kept) * 10 < int(fresh) and int(elsewhere) * 10 < int(fresh), done.stdout
    assert same == ["True", "True", "True"]
    assert line.startswith("keep_pages: mmap_max=0, trim_threshold=-1, arena_max=1 (glibc ") and "\n" not in line


def function(value: int = 1) -> object:
    """A C function of its own address."""
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int)(lambda *arguments: value)


ALLOCATOR = {name: function() for name in ("malloc", "posix_memalign", "free")}


def library(**functions: object) -> SimpleNamespace:
    """Stands for a loaded C library."""
    version = ctypes.CFUNCTYPE(ctypes.c_char_p)(lambda: ctypes.cast(ctypes.c_char_p(b"2.99"), ctypes.c_void_p).value)
    return SimpleNamespace(**{**ALLOCATOR, "gnu_get_libc_version": version, "mallopt": function(), **functions})


def without(name: str) -> SimpleNamespace:
    found = library()
    delattr(found, name)
    return found


def faked(monkeypatch, process: object, libc: object = None, platform: str = "linux"):
    """What keep_pages says where the process and ``libc.so.6`` have other functions; None: there is no such library."""

    def load(name: str | None) -> object:
        if (found := process if name is None else libc) is None:
            raise OSError(name)
        return found

    monkeypatch.setattr(_pages, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(_pages.ctypes, "CDLL", load)
    return moekit.keep_pages()


@pytest.mark.parametrize(
    "process, libc, platform, reason",
    [
        (None, None, "darwin", "darwin has no glibc"),
        (None, None, "win32", "win32 has no glibc"),
        (library(), None, "linux", "the C library is not glibc"),
        (library(), without("gnu_get_libc_version"), "linux", "the C library is not glibc"),
        (library(), without("mallopt"), "linux", "the C library is not glibc"),
        (
            library(malloc=function()),
            library(),
            "linux",
            "malloc is not glibc's: another allocator is preloaded or linked in",
        ),
        (
            library(posix_memalign=function()),
            library(),
            "linux",
            "malloc is not glibc's: another allocator is preloaded or linked in",
        ),
        (library(), library(mallopt=function(0)), "linux", "mallopt of glibc 2.99 accepted no setting"),
    ],
)
def test_elsewhere_nothing_is_set_and_it_says_why(monkeypatch, process, libc, platform, reason):
    kept = faked(monkeypatch, process, libc, platform)
    assert not kept and kept.settings == {} and kept.reason == reason
    assert repr(kept) == f"keep_pages: nothing to do: {reason}"


def test_what_glibc_refuses_is_not_listed(monkeypatch):
    called: list[tuple[int, int]] = []

    def mallopt(number: int, value: int) -> int:
        called.append((number, value))
        return int(number != -8)

    kept = faked(monkeypatch, library(), library(mallopt=mallopt))
    assert called == [(-4, 0), (-1, -1), (-8, 1)]  # the numbers of glibc's malloc.h
    assert kept and kept.settings == {"mmap_max": 0, "trim_threshold": -1} and kept.reason == ""
    assert str(kept) == "keep_pages: mmap_max=0, trim_threshold=-1 (glibc 2.99)"
