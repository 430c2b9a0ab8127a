"""Expert parallelism over NCCL, one process a GPU: equality, waiting, CUDA graphs, a rank that is killed. Needs two GPUs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _hosts import survivors, vanish
from test_ep import EXPERTS, KINDS, LEAVES, TOPK, alone, parts, problem
from torch import Tensor

import moekit
import moekit.ep

RANKS = next((n for n in (8, 4, 2) if n <= torch.cuda.device_count()), 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(RANKS == 0, reason="needs two GPUs")]
# float64 runs on the reference, float32 and bfloat16 on kernels.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def dispatchers() -> dict[str, Any]:
    group = dist.group.WORLD
    return {
        "all_to_all": moekit.ep.AllToAll(group, EXPERTS),
        "all_to_all, redispatch": moekit.ep.AllToAll(group, EXPERTS, redispatch=True),
        "all_to_all, rounds": moekit.ep.AllToAll(group, EXPERTS, max_rows=max(4, group.size())),
        "all_to_all, capacity": moekit.ep.AllToAll(group, EXPERTS, capacity=16),
        "all_gather": moekit.ep.AllGather(group, EXPERTS),
    }


def step(dispatcher: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in LEAVES}
    routing = moekit.Routing.from_topk(given["indices"], leaves["weights"], num_experts=EXPERTS)
    experts = lambda rows, local: moekit.experts(rows, local, leaves["gate_up"], leaves["down"])  # noqa: E731
    out = moekit.ep.run(dispatcher, leaves["x"], routing, experts)
    out.backward(given["grad"])
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def of(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The problem on this device."""
    return {name: v.to("cuda", dtype if v.is_floating_point() else v.dtype) for name, v in problem(kind).items()}


def equality() -> list[tuple[str, float]]:
    """How far each case is from one process, relative to the largest value, in units of its tolerance."""
    found, rank = [], dist.get_rank()
    for dtype, tolerance in TOLERANCES.items():
        for kind in KINDS:
            given = of(kind, dtype)
            wanted = parts({**given, **alone(given)}, rank, RANKS)
            for name, dispatcher in dispatchers().items():
                got = step(dispatcher, parts(given, rank, RANKS))
                for what, value in got.items():
                    scale = wanted[what].abs().max().clamp(min=1.0) if value.numel() else 1.0
                    worst = float(((value - wanted[what]).abs() / scale).max()) if value.numel() else 0.0
                    found.append((f"{name}, {kind}, {dtype}, {what}", worst / tolerance))
    return found


def waits() -> dict[str, int]:
    """How often a step waits for the device, as PyTorch sees it, and what it says where nothing may wait."""
    found, given = {}, parts(of("random", torch.float32), dist.get_rank(), RANKS)
    for name, dispatcher in dispatchers().items():
        step(dispatcher, given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step(dispatcher, given)
        torch.cuda.set_sync_debug_mode("default")
        found[name] = sum("synchroniz" in str(warning.message) for warning in seen)
    return found


def graph() -> list[float]:
    """A captured forward and backward, replayed on other tokens, beside an eager one."""
    given = parts(of("random", torch.float32), 0, RANKS)
    given = {name: v if name in ("gate_up", "down") else v.clone() for name, v in given.items()}
    dispatcher = moekit.ep.AllToAll(dist.group.WORLD, EXPERTS, capacity=16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(dispatcher, given)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = step(dispatcher, given)
    other = torch.Generator("cuda").manual_seed(dist.get_rank())
    given["x"].normal_(generator=other)
    given["indices"].copy_(torch.rand(len(given["x"]), EXPERTS, generator=other, device="cuda").argsort(1)[:, :TOPK])
    captured.replay()
    got = {name: value.clone() for name, value in got.items()}
    wanted = step(dispatcher, given)
    return [float((got[name] - wanted[name]).abs().max()) for name in got]


def all_cases() -> dict[str, Any]:
    return {case.__name__: case() for case in (equality, waits, graph)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """All of it in one start."""
    meeting = f"file://{tmp_path_factory.mktemp('ranks')}/meeting"
    return survivors(all_cases, [], RANKS, meeting, timeout=120, backend="nccl")


def test_ranks_equal_one(found: dict[int, dict[str, Any]]):
    wrong = [(rank, *case) for rank, of_rank in found.items() for case in of_rank["equality"] if not case[1] <= 1]
    assert not wrong, wrong[:20]


def test_one_wait_a_layer_and_none_with_a_capacity(found: dict[int, dict[str, Any]]):
    """The sizes are waited for by an event, which PyTorch does not count: nothing else may wait."""
    assert all(of_rank["waits"] == dict.fromkeys(of_rank["waits"], 0) for of_rank in found.values()), found[0]["waits"]


def test_a_cuda_graph_with_a_capacity(found: dict[int, dict[str, Any]]):
    assert all(max(of_rank["graph"]) < 1e-5 for of_rank in found.values()), found[0]["graph"]


def killed(timeout: float) -> tuple[str, float]:
    """The last rank is killed between dispatch and combine: nothing waits before the next step's sizes."""
    last, given = dist.get_rank() == RANKS - 1, parts(of("random", torch.float32), dist.get_rank(), RANKS)
    dispatcher = moekit.ep.AllToAll(dist.group.WORLD, EXPERTS)
    step(dispatcher, given)
    torch.cuda.synchronize()

    def experts(rows: Tensor, local: moekit.Routing, die: Callable[[], None] | None = None) -> Tensor:
        if die is not None:
            die()
        return moekit.experts(rows, local, given["gate_up"], given["down"])

    routing = moekit.Routing.from_topk(given["indices"], given["weights"], num_experts=EXPERTS)
    start = time.monotonic()
    try:
        for _ in range(2):
            moekit.ep.run(
                dispatcher, given["x"], routing, lambda rows, local: experts(rows, local, vanish if last else None)
            )
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


def test_a_killed_rank_is_named_within_the_timeout(tmp_path: Path):
    timeout = 15.0
    found = survivors(killed, [RANKS - 1], RANKS, f"file://{tmp_path}/meeting", timeout, timeout=timeout, backend="nccl")
    for rank, (error, seconds) in found.items():
        print(rank, seconds, error)
        assert error.startswith("moekit.ep.AllToAll: failed on rank") and f"rank {RANKS - 1}" in error
        assert "did not answer" in error and seconds < timeout
