"""Several ranks on one machine: processes of gloo, each of which runs one function and hands back what it returns."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import mutants
import torch
import torch.distributed as dist

# The server that the processes are forked from has these loaded, so that a process starts in a moment.
_context = multiprocessing.get_context("forkserver")
_preloaded = ["torch", "torch.distributed.tensor", "moekit.ep", "moekit.nn", "moekit.kernels.numba", "numba.np.arrayobj"]
_context.set_forkserver_preload(_preloaded)


def preload(*modules: str) -> None:
    """Have these loaded there, too; to be called while tests are collected, before the server is started."""
    _preloaded.extend(modules)
    _context.set_forkserver_preload(_preloaded)


def on_ranks(work: Callable[..., Any], world: int, folder: Path, *args: Any, timeout: float = 60) -> list[Any]:
    """Run ``work(*args)`` on ``world`` ranks and give what each returned, in the order of ranks.

    Args:
        work: a function of a module (it is found by name), in which the default group of gloo is there.
        world: how many ranks.
        folder: an empty one, where the ranks meet.
        *args: what can be pickled.
        timeout: of a collective, in seconds.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what a rank raised.
    """
    torch.multiprocessing.start_processes(
        _rank, args=(work, world, str(folder), timeout, args), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


class Everywhere:
    """Functions of a module that all ranks run, in one start; the tests of their names look at what they gave.

    Used as a decorator, under the name ``everywhere``, by which the ranks find it.
    """

    def __init__(self) -> None:
        self.works: list[Callable[[], Any]] = []

    def __call__(self, work: Callable[[], Any]) -> Callable[[], Any]:
        self.works.append(work)
        return work


def run_everywhere(module: str) -> dict[str, Any]:
    """What each of them gives, by its name."""
    return {work.__name__: work() for work in importlib.import_module(module).everywhere.works}


def _rank(rank: int, work: Callable[..., Any], world: int, folder: str, timeout: float, args: tuple) -> None:
    warnings.simplefilter("ignore")
    if mutants.ENVIRONMENT in os.environ:
        mutants.pytest_configure()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    try:
        torch.save(work(*args), f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
