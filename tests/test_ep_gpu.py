"""Expert parallelism over NCCL, one process a GPU: equality, waiting, CUDA graphs, a rank that is killed. Needs two GPUs."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import _ep
import pytest
import torch
import torch.distributed as dist
from _ep import EXPERTS
from _hosts import survivors, vanish
from test_ep import DISPATCHERS, KINDS, dispatcher, parts
from torch import Tensor

import moekit
import moekit.ep

RANKS = next((n for n in (8, 4, 2) if n <= torch.cuda.device_count()), 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(RANKS == 0, reason="needs two GPUs")]
# float64 runs on the reference, float32 and bfloat16 on kernels.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
WAITS = [name for name in DISPATCHERS if "capacity" not in name and "fixed" not in name]


def of(kind: str, dtype: torch.dtype) -> _ep.Problem:
    """A problem on this device, its experts in the same dtype."""
    return {n: v.to("cuda", dtype if v.is_floating_point() else v.dtype) for n, v in _ep.problem(kind).items()}


def step(used: Any, given: _ep.Problem) -> _ep.Problem:
    """A forward and backward, with the experts' kernels."""
    leaves = _ep.leaves_of(given)
    experts = lambda rows, local: moekit.experts(rows, local, leaves["gate_up"], leaves["down"])  # noqa: E731
    out = moekit.ep.run(used, leaves["x"], _ep.as_routing(given["indices"], leaves["weights"]), experts)
    return _ep.backward(out, leaves, given["grad"])


def aligned() -> _ep.Problem:
    """Of sizes that kernels for products take, which never wait."""
    given, g = _ep.mine(of("random", torch.bfloat16)), torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    tokens, each = len(given["x"]), EXPERTS // RANKS
    sizes = {"x": (tokens, 64), "grad": (tokens, 64), "gate_up": (each, 64, 64), "down": (each, 64, 32)}
    return given | {name: draw(*size) for name, size in sizes.items()}


def equality() -> list[tuple[str, float]]:
    """How far each case is from one process, relative to the largest value, in units of its tolerance."""
    found, rank = [], dist.get_rank()
    for dtype, tolerance in TOLERANCES.items():
        for kind in KINDS:
            given = of(kind, dtype)
            wanted = parts(given, _ep.alone(given), rank, RANKS)
            for name in DISPATCHERS:
                for what, value in step(dispatcher(name), _ep.mine(given)).items():
                    far = (value - wanted[what]).abs() / wanted[what].abs().max().clamp(min=1.0) if value.numel() else value
                    found.append((f"{name}, {kind}, {dtype}, {what}", float(far.max()) / tolerance if far.numel() else 0.0))
    return found


def waits() -> dict[str, int]:
    """How often a step waits for the device, as PyTorch sees it."""
    found, given = {}, aligned()
    for name in DISPATCHERS:
        used = dispatcher(name)
        step(used, given)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step(used, given)
            torch.cuda.set_sync_debug_mode("default")
        found[name] = sum("called a synchronizing" in str(warning.message) for warning in seen)
    return found


def graph() -> dict[str, bool]:
    """A captured forward and backward, replayed on other tokens, beside an eager one."""
    found = {}
    for name in DISPATCHERS:
        if name in WAITS:
            continue
        given = {n: v.clone() for n, v in aligned().items()}
        used, side, captured = dispatcher(name), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            for _ in range(3):
                step(used, given)
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            got = step(used, given)
        other = torch.Generator("cuda").manual_seed(dist.get_rank())
        given["x"].normal_(generator=other)
        scores = torch.rand(len(given["x"]), EXPERTS, generator=other, device="cuda")
        given["indices"].copy_(scores.argsort(1)[:, : given["indices"].shape[1]])
        captured.replay()
        wanted = step(used, given)
        found[name] = all(torch.equal(got[what], wanted[what]) for what in wanted)
    return found


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


def test_nothing_waits_but_for_sizes(found: dict[int, dict[str, Any]]):
    """Sizes are waited for by an event, which PyTorch does not count."""
    assert all(of_rank["waits"] == dict.fromkeys(DISPATCHERS, 0) for of_rank in found.values()), found[0]["waits"]


def test_cuda_graphs_of_what_never_waits(found: dict[int, dict[str, Any]]):
    assert all(all(of_rank["graph"].values()) for of_rank in found.values()), found[0]["graph"]


def trained(folder: str) -> dict[tuple[str, str], Tensor]:
    """Losses of models of Transformers, sharded by FSDP2, tensor parallelism and moekit's exchange."""
    import test_ep_hf as hf

    import moekit.hf

    moekit.hf.register()
    found = {}
    for layout, settings in hf.LAYOUTS.get(RANKS, {}).items():
        mine = hf.batch().chunk(settings.get("fsdp_size", 1))[dist.get_rank() // settings.get("tp_size", 1)].cuda()
        for kind in hf.MODELS:
            model = hf.load(folder, kind, ep_implementation="moekit", **settings).cuda()
            losses = torch.tensor(hf.trained(model, mine, hf.FEW), device="cuda")
            dist.all_reduce(losses)
            found[layout, kind] = losses.cpu() / RANKS
    return found


def test_transformers_with_fsdp_and_tensor_parallelism(tmp_path: Path):
    hf = pytest.importorskip("test_ep_hf")
    losses, _ = hf.alone(str(tmp_path))
    found = survivors(trained, [], RANKS, f"file://{tmp_path}/meeting", str(tmp_path), timeout=120, backend="nccl")
    for (layout, kind), values in found[0].items():
        torch.testing.assert_close(
            values, torch.tensor(losses[kind])[: len(values)], rtol=1e-4, atol=0, msg=f"{layout} {kind}"
        )


def killed() -> tuple[str, float]:
    """The last rank is killed between dispatch and combine: nothing waits before the next step's sizes."""
    last, given = dist.get_rank() == RANKS - 1, _ep.mine(of("random", torch.float32))
    used, start = dispatcher("all_to_all"), time.monotonic()
    step(used, given)
    torch.cuda.synchronize()

    def experts(rows: Tensor, local: moekit.Routing) -> Tensor:
        if last:
            vanish()
        return moekit.experts(rows, local, given["gate_up"], given["down"])

    try:
        for _ in range(2):
            moekit.ep.run(used, given["x"], _ep.as_routing(given["indices"], given["weights"]), experts)
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


def test_a_killed_rank_is_named_within_the_timeout(tmp_path: Path):
    timeout = 15.0
    found = survivors(killed, [RANKS - 1], RANKS, f"file://{tmp_path}/meeting", timeout=timeout, backend="nccl")
    for error, seconds in found.values():
        assert error.startswith("moekit.ep.AllToAll: failed on rank") and f"rank {RANKS - 1} (" in error, error
        assert "did not answer" in error and seconds < timeout
