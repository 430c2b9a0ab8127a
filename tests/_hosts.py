"""Ranks that may end early, and network namespaces that stand for hosts: what a working process cannot try on itself."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from _ranks import _context

_NEWUTS, _NEWUSER, _NEWNET = 0x04000000, 0x10000000, 0x40000000  # sched.h
_KINDS = {"user": _NEWUSER, "net": _NEWNET, "uts": _NEWUTS}
_PATIENCE = 60


# --- ranks ----------------------------------------------------------------------------------------------------------


def survivors(
    work: Callable[..., Any],
    lost: Sequence[int],
    world: int,
    meeting: str,
    *args: Any,
    timeout: float = 60,
    hosts: Sequence[int] = (),
    backend: str = "gloo",
) -> dict[int, Any]:
    """Run ``work(*args)`` on ``world`` ranks and give what each of those returned that are not lost on the way.

    Args:
        work: a function of a module, in which the default group is there.
        lost: the ranks that will not return.
        world: how many ranks.
        meeting: where they meet, as ``init_method`` of PyTorch.
        *args: what can be pickled.
        timeout: of a collective, in seconds.
        hosts: for each rank, the process whose namespaces it enters; none: all stay here.
        backend: of the default group; with ``"nccl"`` each rank has a GPU.
    """
    processes, ends = [], {}
    for rank in range(world):
        ours, theirs = _context.Pipe()
        host = hosts[rank] if hosts else None
        process = _context.Process(target=_rank, args=(theirs, rank, work, world, meeting, timeout, host, backend, args))
        process.start()
        theirs.close()
        processes.append(process)
        ends[rank] = ours
    try:
        return {rank: _answer(rank, end, timeout + _PATIENCE) for rank, end in ends.items() if rank not in lost}
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(rank: int, end: Connection, patience: float) -> Any:
    if not end.poll(patience):
        raise TimeoutError(f"rank {rank} does not return")
    ok, value = end.recv()
    if not ok:
        raise RuntimeError(f"rank {rank} raised {value}")
    return value


def _rank(
    end: Connection,
    rank: int,
    work: Callable[..., Any],
    world: int,
    meeting: str,
    timeout: float,
    host: int | None,
    backend: str,
    args: tuple,
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if host is not None:
        enter(host)
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    try:
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=limit)
        end.send((True, work(*args)))
    except Exception:
        end.send((False, traceback.format_exc()))
    end.poll(None)  # the others may still need the store, and a connection that closes now would be taken for a death


def vanish() -> None:
    """End this process as a kernel does that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Stop this process: its connections stay, and nothing comes, as when a cable is cut."""
    os.kill(os.getpid(), signal.SIGSTOP)


# --- hosts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hosts:
    """Two hosts: the processes that hold their namespaces, and the address of the first."""

    holders: tuple[int, int]
    address: str


@contextmanager
def two_hosts() -> Iterator[Hosts | None]:
    """``host-a`` and ``host-b``, network namespaces joined by a cable; None where this machine does not allow it.

    They belong to a user namespace of their own, so that no privilege is needed where users may have those. A cable is cut
    by a process within: ``ip link set eth0 down``.
    """
    held: list[tuple[Any, Connection]] = []
    try:
        held.append(_hold("host-a", None))
        held.append(_hold("host-b", held[0][0].pid))
        commands = (
            f"link add eth0 type veth peer name eth0 netns {held[1][0].pid}; {_address('10.77.0.1')}",
            _address("10.77.0.2"),
        )
        ready = [_ask(end, command) for (_, end), command in zip(held, commands, strict=True)]
        yield Hosts((held[0][0].pid, held[1][0].pid), "10.77.0.1") if all(ready) else None
    except OSError:
        yield None
    finally:
        for process, _ in held:
            process.kill()
            process.join()


def _address(address: str) -> str:
    return f"link set lo up; addr add {address}/24 dev eth0; link set eth0 up"


def _hold(name: str, other: int | None) -> tuple[Any, Connection]:
    """A process with namespaces of its own, in the user namespace of another's, that runs what it is told."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_holder, args=(theirs, name, other))
    process.start()
    theirs.close()
    if not (shutil.which("ip") and _ask(ours, "")):
        process.kill()
        process.join()
        raise OSError("no namespaces")
    return process, ours


def _ask(end: Connection, command: str) -> bool:
    end.send(command)
    try:
        return end.poll(_PATIENCE) and end.recv()
    except EOFError:
        return False


def _holder(end: Connection, name: str, other: int | None) -> None:
    user, group = os.getuid(), os.getgid()
    try:
        if other is None:
            _system("unshare", _NEWUSER)
            for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                with open(f"/proc/self/{file}", "w") as written:
                    written.write(text)
        else:
            enter(other, ("user",))
        _system("unshare", _NEWNET | _NEWUTS)
        socket.sethostname(name)
    except OSError:
        return
    while True:
        end.send(all(ip(*command.split()) for command in end.recv().split(";") if command))


def enter(process: int, kinds: Sequence[str] = tuple(_KINDS)) -> None:
    """Be where another process is."""
    for kind in kinds:
        with open(f"/proc/{process}/ns/{kind}") as namespace:
            _system("setns", namespace.fileno(), _KINDS[kind])


def ip(*command: str) -> bool:
    """Run a command of iproute2."""
    return subprocess.run(["ip", *command], capture_output=True).returncode == 0


def _system(name: str, *args: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*args):
        raise OSError(ctypes.get_errno(), f"{name}{args}")
