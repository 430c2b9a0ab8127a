"""Spreading a kernel over threads: torch's own (:mod:`moekit.kernels.numba._team`), or a pool of ours.

The calling thread works too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from torch import get_num_threads

from moekit.kernels.numba._team import share

# Waking a thread costs 5 to 10 us: moving this many bytes takes longer than that.
_WORTH_SHARING = 1 << 18
# More pieces than threads, so that a thread that was held up does not hold up the rest.
_PIECES_A_THREAD = 4


def run(kernel: Callable, count: int, cost: int, *args: Any, block: int = 1) -> None:
    """Call ``kernel(start, stop, *args)`` on ranges that cover ``[0, count)``.

    As many threads take part as ``torch.get_num_threads()`` says now; small jobs stay on the calling one.

    Args:
        kernel: a compiled function that releases the GIL.
        count: the number of rows (or tokens).
        cost: bytes that are moved in all.
        args: further arguments.
        block: ranges start at multiples of this.
    """
    if cost >= _WORTH_SHARING and count > block:
        threads = get_num_threads()
        if threads > 1:
            _share(kernel, count, args, block, threads)
            return
    kernel(0, count, *args)


def _share(kernel: Callable, count: int, args: tuple, block: int, threads: int) -> None:
    step = -(-count // (threads * _PIECES_A_THREAD))
    step = -(-step // block) * block
    if share(kernel, count, step, args, threads):
        return
    job = _Job(kernel, count, step, args)
    _pool.invite(job, threads - 1)
    try:
        job.work()
    finally:
        job.wait()  # also after an error: the others are still writing to the caller's memory


class _Job:
    """Ranges of one call, taken one by one by whoever has time."""

    def __init__(self, kernel: Callable, count: int, step: int, args: tuple) -> None:
        self._kernel, self._count, self._step, self._args = kernel, count, step, args
        self._next = 0
        self._lock = threading.Lock()
        self._helpers = 0  # at work now, the caller not counted
        self._idle = threading.Condition(self._lock)
        self._error: BaseException | None = None

    def help(self) -> None:
        """Work as a thread of the pool. One that comes late finds nothing to do, and nobody has waited for it."""
        with self._lock:
            if self._next >= self._count:
                return
            self._helpers += 1
        try:
            self.work()
        except BaseException as error:  # handed to the caller
            self._error = error
        with self._lock:
            self._helpers -= 1
            if not self._helpers:
                self._idle.notify()

    def work(self) -> None:
        """Take ranges until none is left, or one went wrong."""
        while True:
            with self._lock:
                start = self._next
                self._next = start + self._step
            if start >= self._count:
                return
            try:
                self._kernel(start, min(start + self._step, self._count), *self._args)
            except BaseException:
                with self._lock:
                    self._next = self._count
                raise

    def wait(self) -> None:
        """Return when no range is being worked on any more."""
        with self._lock:
            while self._helpers:
                self._idle.wait()
        if self._error is not None:
            raise self._error


class _Pool:
    """Threads that wait for jobs. They die with the process and are not inherited by a fork."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()

    def invite(self, job: _Job, helpers: int) -> None:
        """Ask ``helpers`` threads to take part in a job, starting those that do not exist yet."""
        if self._threads < helpers:
            self._grow(helpers)
        for _ in range(helpers):
            self._jobs.put(job)

    def _grow(self, threads: int) -> None:
        with self._lock:
            while self._threads < threads:
                threading.Thread(target=self._serve, name=f"moekit-{self._threads}", daemon=True).start()
                self._threads += 1

    def _serve(self) -> None:
        while True:
            self._jobs.get().help()


_pool = _Pool()


def _start_afresh() -> None:
    """A forked child has none of its parent's threads, and perhaps a lock that one of them held."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
