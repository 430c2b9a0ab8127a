"""What goes wrong between ranks: they differ, one dies, one hangs, a cable is cut."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import _ep
import pytest
import torch
import torch.distributed as dist
from _hosts import hang, ip, survivors, two_hosts, vanish
from _ranks import on_ranks
from test_ep import KINDS, parts
from torch import Tensor

import moekit
import moekit.ep
from moekit.ep._agree import agree, differences, spans
from moekit.ep._faults import _key, _wait_for, named

# --- ranks that differ ----------------------------------------------------------------------------------------------


def test_a_table_of_what_differs():
    given = [{"E": 8, "dtype": torch.float32}, {"E": 8, "dtype": torch.float32}, {"E": 6, "dtype": torch.float32, "K": 2}]
    assert differences((4, 5, 7), given) == "  E: 8 on ranks 4-5; 6 on rank 7\n  K: nothing on ranks 4-5; 2 on rank 7"
    assert differences((0, 1), given[:2]) == ""


@pytest.mark.parametrize(("ranks", "text"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([0, 2, 3, 9], "ranks 0, 2-3, 9")])
def test_ranks_in_words(ranks: list[int], text: str):
    assert spans(ranks) == text


def message(call: Callable[[], Any]) -> str:
    """Of the error that ``call`` raises."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def different() -> list[str]:
    group, rank = dist.group.WORLD, dist.get_rank()
    agree("test", group, E=8, shape=(2, 3))
    return [
        message(lambda: agree("test", group, E=8, shape=(2, 3))),
        message(lambda: agree("test", group, E=8, shape=(2, 3 + rank // 3))),
        message(lambda: agree(f"test.{rank == 1}", group)),
        message(lambda: moekit.ep.AllToAll(group, 8 * (1 + rank // 3))),
    ]


def test_all_ranks_hear_of_a_difference(tmp_path: Path):
    on_all = on_ranks(different, 4, tmp_path)
    assert [found[0] for found in on_all] == ["no error"] * 4
    wanted = "shape: (2, 3) on ranks 0-2; (2, 4) on rank 3"
    wanted = f"ValueError: moekit.test: the ranks of a group must be given the same, got\n  {wanted}"
    assert [found[1] for found in on_all] == [wanted] * 4
    assert all("operation: 'test.False' on ranks 0, 2-3; 'test.True' on rank 1" in found[2] for found in on_all)
    assert all("experts: 8 on ranks 0-2; 16 on rank 3" in found[3] for found in on_all)


# --- ranks that do not answer ---------------------------------------------------------------------------------------


class Backward(torch.autograd.Function):
    """Does something on the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, act: Callable[[], None]) -> Tensor:
        ctx.act = act
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ctx.act()
        return grad, None


def nothing() -> None:
    pass


def step(group: dist.ProcessGroup, before: Callable, between: Callable, back: Callable) -> tuple[str, float]:
    """A step of a layer; what it raised, and after how many seconds."""
    dispatcher = moekit.ep.AllToAll(group, 12)
    x = torch.ones(4, 8, dtype=torch.float64, requires_grad=True)
    routing = moekit.Routing.from_topk(torch.arange(12).expand(4, 12), torch.ones(4, 12).double(), num_experts=12)

    def experts(rows: Tensor, local: moekit.Routing) -> Tensor:
        between()
        return Backward.apply(rows, back)

    start = time.monotonic()
    before()
    raised = message(lambda: moekit.ep.run(dispatcher, x, routing, experts).sum().backward())
    return raised, time.monotonic() - start


# Groups of ranks, the last of which is lost; what it does before dispatch, before combine, in backward; the timeout.
LOST = (
    ((0, 1), (vanish, nothing, nothing), 60),
    ((2, 3, 4), (nothing, vanish, nothing), 60),
    ((5, 6), (nothing, nothing, vanish), 60),
    ((7, 8), (nothing, hang, nothing), 5),
)


def in_groups() -> tuple[str, float]:
    rank, mine = dist.get_rank(), None
    for ranks, acts, seconds in LOST:
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=seconds))
        if rank in ranks:
            mine = group, acts if rank == ranks[-1] else (nothing,) * 3
    group, acts = mine
    message(lambda: early(group))
    return step(group, *acts)


def early(group: dist.ProcessGroup) -> None:
    """An error that all get over, and whose reports say nothing of the next."""
    with named("test", group):
        raise RuntimeError("early")


def test_others_name_the_rank_that_does_not_answer(tmp_path: Path):
    lost = [ranks[-1] for ranks, _, _ in LOST]
    found = survivors(in_groups, lost, 1 + max(lost), f"file://{tmp_path}/meeting")
    host = socket.gethostname()
    for ranks, acts, timeout in LOST:
        asked = 1 if hang in acts else 3
        for rank in ranks[:-1]:
            raised, seconds = found[rank]
            wanted = f"failed on rank {rank} ({host}); rank {ranks[-1]} ({host}) did not answer within {asked} s: "
            assert raised.startswith(f"RuntimeError: moekit.ep.AllToAll: {wanted}"), raised
            assert timeout <= seconds < 30 if hang in acts else seconds < timeout  # a busy machine takes its time


def test_who_has_not_reported_in():
    store, ranks = dist.HashStore(), [0, 2, 3, 7, 8]
    for rank in (0, 3):
        store.set(_key(rank), "here")
    assert _wait_for(store, ranks, 0.0) == [2, 7, 8]
    assert _wait_for(store, [0, 3], 60.0) == []


def stumble() -> str:
    def meet() -> None:
        with named("test", dist.group.WORLD):
            if dist.get_rank() == 1:
                raise RuntimeError("stumbled")
            dist.barrier()

    return message(meet)


def test_who_failed_first_is_named_where_all_answer(tmp_path: Path):
    """Rank 0 hears of it at its timeout, when rank 1 has given up on it long since."""
    found = survivors(stumble, [], 2, f"file://{tmp_path}/meeting", timeout=3)
    assert found[1] == "RuntimeError: moekit.test: failed on rank 1; rank 0 did not answer within 1 s: stumbled"
    first = "all ranks answer, the first to fail was rank 1, in moekit.test: stumbled"
    assert found[0].startswith(f"RuntimeError: moekit.test: failed on rank 0; {first}: ")


# --- two hosts ------------------------------------------------------------------------------------------------------


def on_two_hosts() -> tuple[dict, str, float]:
    dispatcher = moekit.ep.AllToAll(dist.group.WORLD, _ep.EXPERTS)
    values = {kind: _ep.together(_ep.mine(_ep.problem(kind)), dispatcher) for kind in KINDS}
    dist.barrier()
    return values, *step(dist.group.WORLD, nothing, cut if dist.get_rank() == 3 else nothing, nothing)


def cut() -> None:
    if not ip("link", "set", "eth0", "down"):
        raise OSError("the cable cannot be cut")


def test_two_hosts_equal_one_process_until_their_cable_is_cut():
    with two_hosts() as hosts:
        if hosts is None:
            pytest.skip("needs network namespaces; a rank that hangs is tried in any case")
        one, other = hosts.holders
        where = (one, one, other, other)
        found = survivors(on_two_hosts, [], 4, f"tcp://{hosts.address}:29555", timeout=6, hosts=where)
    for kind in KINDS:
        given = _ep.problem(kind)
        wanted = _ep.alone(given)
        for rank, (values, *_) in found.items():
            for name, value in parts(given, wanted, rank, 4).items():
                torch.testing.assert_close(values[kind][name], value, rtol=1e-12, atol=1e-12)
    hears = {
        "host-a": "ranks 2 (host-b), 3 (host-b) did not answer within 1 s",
        "host-b": "the store does not answer: rank 0 (host-a), who keeps it unless torchrun does, is gone or cut off",
    }
    for rank, (_, raised, seconds) in found.items():
        host = "host-a" if rank < 2 else "host-b"
        wanted = f"RuntimeError: moekit.ep.AllToAll: failed on rank {rank} ({host}); {hears[host]}: "
        assert raised.startswith(wanted), raised
        assert 6 <= seconds < 30
