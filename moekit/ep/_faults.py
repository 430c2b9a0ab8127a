"""Errors of collectives that say which operation failed, on which rank, and who does not answer.

A collective that fails says that a connection was closed, or that time is up, and not by whom. So each rank on which one
fails reports in under a key of the group's store, waits a moment for the others, and names those who do not::

    rank 0   exchange fails, reports in, waits ----> "rank 2 (b) did not answer"
    rank 1   exchange fails, reports in, waits ----> "rank 2 (b) did not answer"
    rank 2   was killed

gloo fails at once where a process ended, and at the group's timeout where one hangs or a cable is cut, in forward and in
backward. NCCL hangs on the device, where no exception can be raised. The host waits for it when it reads the sizes of an
exchange, and :func:`read` gives up that wait before the timeout, at which PyTorch's watchdog ends the process. What hangs in
a backward is found by the next forward's read. With a capacity nobody reads: the watchdog alone is left, or
``TORCH_NCCL_BLOCKING_WAIT=1``, under which the host waits for every collective and errors come as those of gloo do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SHARE_TO_ASK, _LEAST_TO_ASK, _MOST_TO_ASK = 0.05, 1.0, 5.0  # of the timeout, and seconds, until a rank counts as gone
_FIRST = "moekit/first"  # the key of the first report

_hosts: dict[int, str] = {}  # by rank of the default group, as far as known
_reported: set[str] = set()  # the groups in whose stores this rank has reported in, by name


def remember_hosts(hosts: Mapping[int, str]) -> None:
    """Note which host each rank is on, for errors."""
    _hosts.update(hosts)


@contextmanager
def named(op: str, group: dist.ProcessGroup) -> Iterator[None]:
    """An error of PyTorch's becomes one that names ``op``, this rank, and the ranks that do not answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        me = _who([dist.get_global_rank(group, group.rank())])
        raise RuntimeError(f"moekit.{op}: failed on {me}; {Inquiry(op, group, error).result()}: {error}") from error
    if _reported:
        _withdraw(group)


def _withdraw(group: dist.ProcessGroup) -> None:
    """Take reports back: the group works again, and the next failure is another."""
    if group.group_name in _reported:
        _reported.discard(group.group_name)
        store: Any = group.get_group_store()
        store.delete_key(_key(dist.get_global_rank(group, group.rank())))
        store.delete_key(_FIRST)


def read(values: Tensor, op: str, group: dist.ProcessGroup) -> Callable[[], list[Any]]:
    """Begin to read what a collective gave.

    Returns:
        What gives ``values.tolist()``. The host waits there, for what was queued before :func:`read` and for nothing that
        was queued since, and no longer than the group's timeout allows.
    """
    if not values.is_cuda:
        return values.tolist
    arrived, there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True), torch.cuda.Event()
    arrived.copy_(values, non_blocking=True)
    there.record()

    def found() -> list[Any]:
        start = time.monotonic()
        with named(op, group):
            while not there.query():
                waited = time.monotonic() - start
                if waited > _LEAST_TO_ASK and waited > timeout(group) - 2 * _to_ask(group):
                    raise RuntimeError(f"the device has not finished an exchange after {waited:.0f} s")
        return arrived.tolist()

    return found


def timeout(group: dist.ProcessGroup) -> float:
    """Seconds after which a collective of the group fails."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", dist.default_pg_timeout).total_seconds()


def _to_ask(group: dist.ProcessGroup) -> float:
    """Seconds that a rank has to report in."""
    return min(max(_SHARE_TO_ASK * timeout(group), _LEAST_TO_ASK), _MOST_TO_ASK)


# --- who does not answer --------------------------------------------------------------------------------------------


class Inquiry(threading.Thread):
    """Report in, and ask who else does; in a thread of its own, since a store on a host that is gone never answers.

    Args:
        op: what failed.
        group: of whom.
        error: how.
    """

    def __init__(self, op: str, group: dist.ProcessGroup, error: BaseException) -> None:
        super().__init__(name="moekit.ep", daemon=True)
        self.store: Any = group.get_group_store()
        _reported.add(group.group_name)
        self.ranks = dist.get_process_group_ranks(group)
        self.mine = self.ranks[group.rank()]
        self.report = f"{_who([self.mine])}, in moekit.{op}: {str(error).splitlines()[0]}"
        self.seconds = _to_ask(group)
        self.found: str | None = None

    def result(self) -> str:
        """What was found out."""
        self.start()
        self.join(2 * self.seconds)
        return self.found or f"the store does not answer: {_who([0])}, who keeps it unless torchrun does, is gone or cut off"

    def run(self) -> None:
        """Ask."""
        try:
            store = self.store.clone()  # a connection of its own: another thread may be waiting on the group's
            first = store.compare_set(_FIRST, "", self.report).decode()
            store.set(_key(self.mine), self.report)
            missing = _wait_for(store, self.ranks, self.seconds)
        except RuntimeError:
            return  # the store is gone
        if missing:
            self.found = f"{_who(missing)} did not answer within {self.seconds:g} s"
        else:
            self.found = "all ranks answer" + ("" if first == self.report else f", the first to fail was {first}")


def _wait_for(store: Any, ranks: Sequence[int], seconds: float) -> list[int]:
    """Wait until all have reported in, or time is up; who has not."""
    end, pause = time.monotonic() + seconds, 0.02
    while (missing := _absent(store, ranks)) and time.monotonic() < end:
        time.sleep(min(pause, max(end - time.monotonic(), 0)))
        pause *= 2  # a thousand ranks ask the same store
    return missing


def _absent(store: Any, ranks: Sequence[int]) -> list[int]:
    """Who of them has not reported in, by halves: one question if all have."""
    if store.check([_key(rank) for rank in ranks]):
        return []
    if len(ranks) == 1:
        return list(ranks)
    middle = len(ranks) // 2
    return _absent(store, ranks[:middle]) + _absent(store, ranks[middle:])


def _key(rank: int) -> str:
    return f"moekit/failed/{rank}"


def _who(ranks: Sequence[int]) -> str:
    """``rank 3 (a)`` or ``ranks 3 (a), 4 (b)``."""
    names = (f"{rank} ({_hosts[rank]})" if rank in _hosts else str(rank) for rank in ranks)
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(names)
