"""The threads of the CPU kernels, torch's or a pool: they share all of the work, hand on errors, survive a fork."""

import itertools
import math
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

pytest.importorskip("numba")

from moekit.kernels.numba import _bits, _jit, _team, _threads
from moekit.ops import glu

LARGE = _threads._WORTH_SHARING


@pytest.fixture
def threads():
    """Set torch's thread count; it is restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Recorder:
    """Stands in for a kernel: notes its ranges and the threads that worked on them."""

    def __init__(self, meet: threading.Barrier | None = None) -> None:
        self.ranges, self.workers, self.meet = [], set(), meet

    def __call__(self, start: int, stop: int, *args: object) -> None:
        self.ranges.append((start, stop))
        self.workers.add(threading.current_thread())
        if self.meet is not None and len(self.ranges) <= self.meet.parties:
            self.meet.wait(30)


@pytest.mark.parametrize("count", [1, 7, 256, 1000])
@pytest.mark.parametrize("block", [1, 256])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_ranges_cover_the_count_in_blocks(threads, count, block, num_threads):
    threads(num_threads)
    kernel = Recorder()
    _threads.run(kernel, count, LARGE, block=block)
    edges = sorted(kernel.ranges)
    assert edges[0][0] == 0 and edges[-1][1] == count
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(edges))
    assert all(start % block == 0 for start, _ in edges)


@pytest.mark.parametrize(("num_threads", "cost"), [(1, LARGE), (4, LARGE - 1)])
def test_one_thread_or_little_work_stays_on_the_calling_thread(threads, num_threads, cost):
    threads(num_threads)
    kernel = Recorder()
    _threads.run(kernel, 1000, cost)
    assert kernel.ranges == [(0, 1000)] and kernel.workers == {threading.current_thread()}


def test_as_many_threads_as_torch_says(threads):
    threads(3)
    kernel = Recorder(threading.Barrier(3))  # passes only if three threads are at work at once
    _threads.run(kernel, 1000, LARGE)
    assert len(kernel.workers) == 3 and threading.current_thread() in kernel.workers


def test_an_error_waits_for_the_helpers(threads):
    """They may still be writing to memory that is gone when the caller has its error."""
    threads(2)
    both = threading.Barrier(2, timeout=10)
    finished = []

    def kernel(start, stop):
        caller = threading.current_thread() is threading.main_thread()
        both.wait()
        if caller:
            raise ValueError("here")
        threading.Event().wait(0.05)
        finished.append(start)

    with pytest.raises(ValueError, match="here"):
        _threads.run(kernel, 8, LARGE)
    assert len(finished) == 1  # and after an error no range is begun


def test_an_error_in_a_helper_reaches_the_caller(threads):
    threads(2)
    caller, met = threading.current_thread(), threading.Barrier(2)

    def kernel(start: int, stop: int) -> None:
        if start < 2 * 125:
            met.wait(30)
        if threading.current_thread() is not caller:
            raise ArithmeticError("from the pool")

    with pytest.raises(ArithmeticError, match="from the pool"):
        _threads.run(kernel, 1000, LARGE)
    after = Recorder()
    _threads.run(after, 1000, LARGE)
    assert sum(stop - start for start, stop in after.ranges) == 1000


@pytest.fixture
def team():
    if _team._entry_point() is None:
        pytest.skip("torch has no GNU OpenMP here")


@pytest.mark.parametrize("count", [2, 7, 1000])
@pytest.mark.parametrize("block", [1, 256])
@pytest.mark.parametrize("num_threads", [2, 5])
def test_torchs_threads_take_each_range_once_with_all_arguments(team, threads, count, block, num_threads):
    @_jit.kernel("test")
    def note(start: "int", stop: "int", target: "int", scale: "float", base: "int", shift: "float"):
        _bits.add_f32(target, start, scale * (stop - start) + base + shift)

    threads(num_threads)
    notes = torch.zeros(count)
    step = math.ceil(math.ceil(count / (num_threads * _threads._PIECES_A_THREAD)) / block) * block
    assert _team.share(note, count, step, (notes.data_ptr(), 0.5, 3, 0.25), num_threads)
    starts = torch.arange(0, count, step)
    wanted = torch.zeros(count).index_put((starts,), 0.5 * (starts + step).clamp(max=count).sub(starts) + 3.25)
    assert torch.equal(notes, wanted)
    notes.zero_()
    _threads.run(note, count, LARGE, notes.data_ptr(), 0.5, 3, 0.25, block=block)
    assert torch.equal(notes, wanted if count > block else torch.zeros(count).index_fill(0, starts[:1], count / 2 + 3.25))


def test_an_error_on_torchs_threads_reaches_the_caller(team, threads):
    @_jit.kernel("test")
    def fail(start: "int", stop: "int"):
        if stop > 500:
            raise ArithmeticError("from a kernel")

    threads(2)
    with pytest.raises(ArithmeticError, match="from a kernel"):
        _threads.run(fail, 1000, LARGE)


@pytest.mark.parametrize("way", ["torch's threads", "pool"])
def test_eight_python_threads_at_once(threads, monkeypatch, way):
    if way == "pool":
        monkeypatch.setattr(_team, "_entry_point", lambda: None)
    threads(2)
    x = torch.randn(2048, 256)
    expected, failures = x * torch.sigmoid(x), []

    def work() -> None:
        torch.set_num_threads(2)
        for _ in range(5):
            out = glu.glu(x, layout="ungated")
            if not torch.allclose(out, expected, rtol=1e-5, atol=1e-6):
                failures.append(out)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not failures and not any(worker.is_alive() for worker in workers)


FORK = """
    import os, sys, torch
    import moekit
    torch.set_num_threads(2)
    x = torch.randn(1024, 512)
    before = moekit.glu(x)  # the pool has threads now
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own OpenMP does not survive a fork
        from moekit.kernels.numba import _bits, _jit, _team, _threads
        _threads.get_num_threads = lambda: 2  # the pool does
        os._exit(0 if torch.equal(moekit.glu(x), before) and _threads._pool._threads == 1 else 1)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

LOADER = """
    import torch, moekit

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return moekit.glu(torch.full((1024, 512), float(i)))

    if __name__ == "__main__":
        wanted = [moekit.glu(torch.full((1024, 512), float(i))) for i in range(4)]
        loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert all(torch.equal(a, b) for a, b in zip(loader, wanted, strict=True))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("script", [FORK, LOADER], ids=["fork", "dataloader"])
def test_after_a_fork(script):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
