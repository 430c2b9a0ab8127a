"""Options of the dispatchers, and what they keep, count and refuse."""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import _ep
import pytest
import torch
from _ep import EXPERTS, HIDDEN, all_gather, all_to_all, equal, keeping, layer, rowwise
from _ranks import Everywhere, on_ranks, run_everywhere
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moekit
import moekit.ep
from moekit.ep._rounds import parts, rounds

WORLD = 2
everywhere = Everywhere()


VIEWS = ("detach", "new_empty", "slice", "unsqueeze", "view")  # and what else starts nothing


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_ranks(run_everywhere, WORLD, tmp_path_factory.mktemp("ranks"), __name__)


# --- capacity -------------------------------------------------------------------------------------------------------

CAPACITY = 3


@everywhere
def capacity() -> dict[str, Any]:
    given, used = _ep.mine(_ep.problem("random")), all_to_all(capacity=CAPACITY)
    counted = []
    with _warnings() as first, moekit.ep.traffic() as sent:
        result = _ep.together(given, used)
    counted.append(int(used.overflow))
    with _warnings() as second:
        _ep.together(given, used)  # twice as many: told again
    counted.append(int(used.overflow))
    with _warnings() as third:
        torch.utils.checkpoint.checkpoint(lambda: layer(given, used)[0], use_reentrant=False).sum().backward()
    counted.append(int(used.overflow))
    told = [
        [str(warning.message) for warning in seen if warning.category is RuntimeWarning] for seen in (first, second, third)
    ]
    return {"result": result, "counted": counted, "told": told, "sent": sent.bytes, "rows": sent.rows}


@everywhere
def evaluated_first() -> tuple[int, int]:
    """What is counted in inference mode, and then in training as well."""
    given, used = _ep.mine(_ep.problem("random")), all_to_all(capacity=1)
    with torch.inference_mode():
        layer(given, used)
    first = int(used.overflow)
    _ep.together(given, used)
    return first, int(used.overflow)


def test_evaluated_first(ranks: list[dict]):
    for first, both in (found["evaluated_first"] for found in ranks):
        assert both == 2 * first > 0


@contextmanager
def _warnings() -> Iterator[list]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen


def test_capacity(ranks: list[dict]):
    """The same as one process in which those pairs of token and rank are dropped that come last in their rank."""
    given = _ep.problem("random")
    owner, dropped = given["indices"] // (EXPERTS // WORLD), []
    indices = given["indices"].clone()
    first = 0
    for tokens in _ep.TOKENS[WORLD]:
        dropped.append(0)
        for rank in range(WORLD):
            needing = [t for t in range(first, first + tokens) if rank in owner[t]]
            for token in needing[CAPACITY:]:
                indices[token].masked_fill_(owner[token] == rank, -1)
                dropped[-1] += 1
        first += tokens
    wanted = _ep.alone(given, indices)
    for rank, found in enumerate(ranks):
        found, count = found["capacity"], dropped[rank]
        for name, value in _ep.of_rank({**given, **wanted}, rank, WORLD).items():
            if name in wanted:
                torch.testing.assert_close(found["result"][name], value, rtol=1e-12, atol=1e-12)
        assert found["counted"] == [count, 2 * count, 3 * count]  # and not again where a checkpoint recomputes
        assert [len(told) for told in found["told"]] == [count > 0, count > 0, 0]
        for told, total in zip(found["told"], (count, 2 * count), strict=False):
            assert all(f"{total} pairs (token, rank) of rank {rank} so far" in text for text in told)
        assert "sizes" not in found["sent"]  # nobody asks for them
        assert found["rows"] == 4 * CAPACITY * (WORLD - 1)
    assert any(dropped)


SLOTS = 13
FIXED: dict[str, Callable[[], Any]] = {
    "all_to_all": lambda: all_to_all(capacity=15, slot_capacity=SLOTS),
    "all_gather": lambda: all_gather(tokens_per_rank=15, slot_capacity=SLOTS),
}


@everywhere
def slot_capacity() -> dict[str, Any]:
    given, found = _ep.mine(_ep.problem("duplicate")), {}
    for name, make in FIXED.items():
        used, rows = make(), []

        def experts(x: Tensor, local: moekit.Routing) -> Tensor:
            rows.append(local.num_rows)  # noqa: B023
            return _ep.precise(x, local, leaves)  # noqa: B023

        leaves = _ep.leaves_of(given)
        with _warnings() as seen:
            result = _ep.backward(*layer(given, used, experts, **leaves), given["grad"])
        told = [str(warning.message) for warning in seen if warning.category is RuntimeWarning]
        found[name] = {"result": result, "counted": int(used.slot_overflow), "told": told, "rows": rows}
    return found


def beyond_slots(indices: Tensor, deduplicated: bool) -> tuple[Tensor, list[int]]:
    """The choice without the slots beyond the capacity, and how many these are, of each rank's experts."""
    kept, counts, each = indices.clone(), [], EXPERTS // WORLD
    first = [sum(_ep.TOKENS[WORLD][:rank]) for rank in range(WORLD)]
    for rank in range(WORLD):
        slots = []  # by place among the rows of a rank, and by that rank
        for source, tokens in enumerate(_ep.TOKENS[WORLD]):
            place = 0
            for token in range(first[source], first[source] + tokens):
                mine = [
                    (place, source, token, k) for k, e in enumerate(indices[token].tolist()) if e >= 0 and e // each == rank
                ]
                slots += mine
                place += bool(mine) or not deduplicated
        for _, _, token, k in sorted(slots)[SLOTS:]:
            kept[token, k] = -1
        counts.append(max(len(slots) - SLOTS, 0))
    return kept, counts


@pytest.mark.parametrize("name", FIXED)
def test_slot_capacity(ranks: list[dict], name: str):
    given = _ep.problem("duplicate")
    kept, counts = beyond_slots(given["indices"], name == "all_to_all")
    wanted = _ep.alone(given, kept)
    assert all(counts)
    for rank, found in enumerate(ranks):
        found, mine = found["slot_capacity"][name], _ep.of_rank({**given, **wanted}, rank, WORLD)
        for leaf in wanted:
            torch.testing.assert_close(found["result"][leaf], mine[leaf], rtol=1e-12, atol=1e-12)
        assert found["rows"] == [SLOTS] and found["counted"] == counts[rank]
        (told,) = found["told"]
        assert told.endswith(f"slot_capacity, and not computed: {counts[rank]} slots of the experts of rank {rank} so far")


# --- bounded rows ---------------------------------------------------------------------------------------------------

MOST = 4


@everywhere
def max_rows() -> dict[str, Any]:
    given = _ep.mine(_ep.problem("collapsed"))
    seen: list[int] = []
    alive: list[int] = []
    received: list[Any] = []

    def experts(rows: Tensor, local: moekit.Routing) -> Tensor:
        alive.append(sum(ref() is not None for ref in received))
        received.append(weakref.ref(rows.untyped_storage()))
        seen.append(rows.shape[0])
        return moekit.experts(rows, local, leaves["gate_up"], leaves["down"])

    leaves = _ep.leaves_of(given)
    out, leaves = layer(given, all_to_all(max_rows=MOST), experts, **leaves)
    forward = len(seen)
    result = _ep.backward(out, leaves, given["grad"])
    return {"result": result, "forward": seen[:forward], "backward": seen[forward:], "alive": alive}


def test_max_rows(ranks: list[dict]):
    """All tokens of one rank go to the other, in rounds of which one exists at a time, in backward, too."""
    given = _ep.problem("collapsed")
    wanted = _ep.alone(given)
    for rank, found in enumerate(ranks):
        found = found["max_rows"]
        received = 15 if rank == 0 else 0
        assert len(found["forward"]) == len(found["backward"]) == 4
        assert sum(found["forward"]) == sum(found["backward"]) == received
        assert max(found["forward"]) == max(found["backward"]) == min(MOST, received)
        assert max(found["alive"]) <= 1
        for name, value in _ep.of_rank({**given, **wanted}, rank, WORLD).items():
            if name in wanted:
                torch.testing.assert_close(found["result"][name], value, rtol=1e-12, atol=1e-12)


@everywhere
def same_bits() -> list[str]:
    """The options that change bits."""
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        given = _ep.mine(_ep.problem("random", dtype=dtype))
        plain = _ep.backward(*layer(given, all_to_all(), rowwise), given["grad"])
        for options in ({}, {"max_rows": 2}, {"max_rows": 5}, {"redispatch": True}, {"capacity": 15}):
            again = _ep.backward(*layer(given, all_to_all(**options), rowwise), given["grad"])
            wrong += [] if equal(plain, again) else [f"{options} {dtype}"]
        given = {name: v.float() if v.is_floating_point() else v for name, v in given.items()}
        plain = _ep.backward(*layer(given, all_to_all()), given["grad"])
        again = _ep.backward(*layer(given, all_to_all(redispatch=True)), given["grad"])
        wrong += [] if equal(plain, again) else ["redispatch of experts"]
    return wrong


def test_same_bits(ranks: list[dict]):
    assert [found["same_bits"] for found in ranks] == [[], []]


@pytest.mark.parametrize(
    ("counts", "most", "wanted"),
    [
        ([[0, 0], [0, 0]], 2, 1),
        ([[3, 0], [1, 0]], 4, 1),
        ([[3, 0], [1, 0]], 3, 2),
        ([[3, 0], [1, 0]], 2, 3),
        ([[10, 0], [10, 7]], 8, 3),
        ([[10, 0], [10, 7]], 2, 10),
    ],
)
def test_rounds(counts: list, most: int, wanted: int):
    number = rounds(counts, most)
    assert number == wanted
    of_rounds = [parts(of_rank, number) for of_rank in counts]
    for rank, of_rank in enumerate(counts):
        assert [sum(part[to] for part in of_rounds[rank]) for to in range(2)] == of_rank
    for round_ in range(number):
        assert all(sum(of_rounds[rank][round_][to] for rank in range(2)) <= most for to in range(2))


# --- what is kept ---------------------------------------------------------------------------------------------------


@everywhere
def kept() -> dict[str, Any]:
    given = _ep.mine(_ep.problem("random"))
    found: dict[str, Any] = {}
    dispatchers = {
        "plain": all_to_all(),
        "capacity": all_to_all(capacity=15),
        "all_gather": all_gather(),
        "redispatch": all_to_all(redispatch=True),
    }
    for name, used in dispatchers.items():
        with keeping() as tensors:
            layer(given, used, lambda rows, local: rows * 2 + local.weights.sum())
        found[f"{name} by itself"] = sum(t.numel() for t in tensors if t.is_floating_point())
        received = []

        def experts(rows: Tensor, local: moekit.Routing) -> Tensor:
            received.append(rows.untyped_storage().data_ptr())  # noqa: B023
            return moekit.experts(rows, local, leaves["gate_up"], leaves["down"])  # noqa: B023

        leaves = _ep.leaves_of(given)
        with keeping() as tensors:
            layer(given, used, experts, **leaves)
        names = {received[0]: "rows", leaves["x"].untyped_storage().data_ptr(): "tokens"}
        wide = [t.untyped_storage().data_ptr() for t in tensors if t.dim() == 2 and t.shape[1] == HIDDEN]
        found[f"{name} with experts"] = [names.get(place) for place in wide]
    return found


def test_kept(ranks: list[dict]):
    """Of row size only what the experts keep: the rows that they were given, or the tokens that are sent again."""
    for rank, found in enumerate(ranks):
        for name in ("plain", "capacity", "all_gather", "redispatch"):
            tokens = _ep.TOKENS[WORLD][rank] * HIDDEN
            assert found["kept"][f"{name} by itself"] == (tokens if name == "redispatch" else 0)
            assert found["kept"][f"{name} with experts"] == (["tokens"] if name == "redispatch" else ["rows"])


@everywhere
def reads() -> dict[str, int]:
    """How often the host reads what a collective gave, in a forward and backward."""
    given, read, found = _ep.mine(_ep.problem("random")), moekit.ep._ways.read, {}
    dispatchers = {
        "plain": all_to_all(),
        "rounds": all_to_all(max_rows=5),
        "capacity": all_to_all(capacity=15),
        "all_gather": all_gather(),
        "fixed": all_gather(tokens_per_rank=15),
    }
    for name, used in dispatchers.items():
        calls: list[int] = []
        moekit.ep._ways.read = lambda *args: calls.append(0) or read(*args)  # noqa: B023
        _ep.together(given, used)
        found[name] = len(calls)
    moekit.ep._ways.read = read
    return found


def test_reads(ranks: list[dict]):
    for found in ranks:
        assert found["reads"] == {"plain": 1, "rounds": 1, "capacity": 0, "all_gather": 1, "fixed": 0}


class Names(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@everywhere
def operators() -> dict[str, list[str]]:
    """What is called until the host waits for sizes, then until rows travel, and on the way back."""
    given, read, found = _ep.mine(_ep.problem("random")), moekit.ep._ways.read, {}
    leaves, used = _ep.leaves_of(given), all_to_all()
    routing = _ep.as_routing(given["indices"], leaves["weights"])
    with Names() as names:

        def noted(*args: Any) -> Callable[[], list]:
            result = read(*args)

            def wait() -> list:
                found["before"], names.seen = names.seen, []
                return result()

            return wait

        moekit.ep._ways.read = noted
        started = used.start(leaves["x"], routing)
        moekit.ep._ways.read = read
        found["after"], names.seen = names.seen, []
        out = started.through(lambda rows, local: rows)
        names.seen = []
        out.backward(given["grad"])
        return {**found, "backward": names.seen}


def test_what_is_called(ranks: list[dict]):
    """The device has all but the exchange to do before the host waits, and no row is touched twice on the way back."""
    for found in ranks:
        found = {name: [op.split("::")[1] for op in ops] for name, ops in found["operators"].items()}
        kernels = [op for op in found["before"] if op not in VIEWS]
        assert kernels.count("permute") == 2 and kernels.count("route_map") == 1 and len(kernels) <= 16
        assert [op for op in found["after"] if op not in VIEWS] == ["all_to_all_single"] * 2
        back = [op for op in found["backward"] if op not in (*VIEWS, "zeros")]  # zeros: of weights that nobody used
        assert sorted(back) == sorted(["permute", *["unpermute"] * 2, *["all_to_all_single", "wait_tensor"] * 3])


@everywhere
def memory() -> list[str]:
    """What outlives the output, or backward, with no garbage collection."""
    given, left = _ep.mine(_ep.problem("random")), []
    gc.collect()
    gc.disable()
    for options in ({}, {"max_rows": 5}, {"redispatch": True}):
        for goes_back in (True, False):
            x = given["x"].clone().requires_grad_()
            inner = x * 2
            ref = weakref.ref(inner)
            out = layer(given, all_to_all(**options), None, x=inner)[0]
            del inner
            if goes_back:
                out.sum().backward()
                left += [] if gone(ref) else [f"{options} after backward"]
            del out
            left += [] if gone(ref) else [f"{options} {goes_back}"]
    gc.enable()
    return left


def gone(ref: weakref.ref) -> bool:
    """Whether a tensor goes by itself: a thread of gloo may hold what it has sent for a moment longer."""
    end = time.monotonic() + 10
    while ref() is not None and time.monotonic() < end:
        time.sleep(0.001)
    return ref() is None


def test_memory(ranks: list[dict]):
    assert [found["memory"] for found in ranks] == [[], []]
