"""Dispatchers of expert parallelism: several ranks equal one, values and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _ep
import pytest
import torch
import torch.distributed as dist
from _ep import EXPERTS, LEAVES
from _ranks import on_ranks
from torch import Tensor

import moekit.ep

KINDS = ("random", "collapsed", "empty", "duplicate")
MOST = 15  # tokens of a rank
DISPATCHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all_to_all": ("all_to_all", {}),
    "capacity": ("all_to_all", {"capacity": MOST}),
    "a row a round": ("all_to_all", {"max_rows": 4}),
    "few rounds": ("all_to_all", {"max_rows": 9}),
    "one round": ("all_to_all", {"max_rows": 1000}),
    "redispatch": ("all_to_all", {"redispatch": True}),
    "all_gather": ("all_gather", {}),
    "fixed all_gather": ("all_gather", {"tokens_per_rank": MOST + 1}),
}
# By K: fewer than the experts of a rank, more, and all.
CASES = [(name, kind, topk) for name in DISPATCHERS for kind in KINDS for topk in ((1, 4, 8) if kind == "random" else (4,))]


class Plain:
    """No more than the protocol asks for."""

    def __init__(self, inner: Any) -> None:
        self.dispatch, self.combine = inner.dispatch, inner.combine


def dispatcher(name: str) -> Any:
    kind, options = DISPATCHERS[name]
    return moekit.ep.dispatcher(dist.group.WORLD, EXPERTS, 4, kind=kind, **options)


def on_a_rank() -> dict[str, Any]:
    found: dict[Any, Any] = {}
    for case in CASES:
        name, kind, topk = case
        found[case] = _ep.together(_ep.mine(_ep.problem(kind, topk)), dispatcher(name))
    for name in DISPATCHERS:
        for dtype in (torch.float32, torch.bfloat16):
            found[name, dtype] = _ep.together(_ep.mine(_ep.problem("random", dtype=dtype)), dispatcher(name))
        nobody = _ep.mine(_ep.problem("random", tokens=0))
        found[name, "nobody"] = _ep.together(nobody, dispatcher(name))
        found[name, "beside"] = _beside(dispatcher(name))
    found["plain", "beside"] = _beside(Plain(dispatcher("all_to_all")))
    return found


def _beside(used: Any) -> dict[str, Tensor]:
    given = _ep.mine(_ep.problem("random"))
    shared = torch.ones(_ep.HIDDEN, dtype=torch.float64, requires_grad=True)
    result = _ep.together(given, used, lambda: given["x"] * shared)
    return {**result, "shared": shared.grad}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_ranks(on_a_rank, request.param, tmp_path_factory.mktemp("ranks"))


def parts(given: dict[str, Tensor], wanted: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    found = _ep.of_rank({**given, **wanted}, rank, world)
    return {name: found[name] for name in wanted}


def test_ranks_equal_one(ranks: list[dict]):
    for case in CASES:
        given = _ep.problem(*case[1:])
        wanted = _ep.alone(given)
        for rank, found in enumerate(ranks):
            for name, value in parts(given, wanted, rank, len(ranks)).items():
                torch.testing.assert_close(found[case][name], value, rtol=1e-12, atol=1e-12, msg=lambda m: f"{case}: {m}")  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_partial_sum_and_a_sum_are_rounded_once_each(ranks: list[dict], dtype: torch.dtype):
    given, world = _ep.problem("random", dtype=dtype), len(ranks)
    wanted, each = _ep.alone(given), EXPERTS // world
    owner = given["indices"] // each
    partial = [_ep.alone(given, given["indices"].masked_fill(owner != rank, -1)) for rank in range(world)]
    unit = torch.finfo(dtype).eps / 2
    bound = {name: unit * (sum(p[name].abs() for p in partial) * (1 + unit) + value.abs()) for name, value in wanted.items()}
    bound["weights"] = unit * wanted["weights"].abs()  # is no sum: each is of one rank
    for rank, found in enumerate(ranks):
        most = parts(given, bound, rank, world)
        for name, value in parts(given, wanted, rank, world).items():
            for used in DISPATCHERS:
                error = (found[used, dtype][name].double() - value).abs()
                assert bool((error <= most[name] + 1e-12).all()), (used, name)
                assert found[used, dtype][name].dtype is (dtype if name not in _ep.OF_EXPERTS else torch.float64)


def test_no_rank_has_a_token(ranks: list[dict]):
    for found in ranks:
        for name in DISPATCHERS:
            result = found[name, "nobody"]
            assert result["out"].shape == (0, _ep.HIDDEN)
            assert all(torch.equal(result[leaf], torch.zeros_like(result[leaf])) for leaf in LEAVES)


def test_a_shared_expert_runs_beside(ranks: list[dict]):
    given = _ep.problem("random")
    wanted = _ep.alone(given)
    wanted["out"] = wanted["out"] + given["x"]
    for rank, found in enumerate(ranks):
        mine = _ep.of_rank(given, rank, len(ranks))
        of_shared = (mine["x"] * mine["grad"]).sum(0)
        for name in (*DISPATCHERS, "plain"):
            for leaf, value in parts(given, wanted, rank, len(ranks)).items():
                torch.testing.assert_close(found[name, "beside"][leaf], value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found[name, "beside"]["shared"], of_shared, rtol=1e-12, atol=1e-12)


# --- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "topk", "wanted"),
    [
        (1, 8, "local"),
        (2, 1, "all_to_all"),
        (2, 2, "all_to_all"),  # saves a quarter
        (2, 3, "all_gather"),  # an eighth
        (4, 5, "all_to_all"),
        (4, 8, "all_gather"),  # a tenth
        (8, 8, "all_to_all"),  # a third
        (8, 12, "all_to_all"),  # just a fifth
        (8, 13, "all_gather"),
        (64, 8, "all_to_all"),
        (8, 22, "all_gather"),
    ],
)
def test_the_rule(ranks: int, topk: int, wanted: str):
    assert moekit.ep.choose(ranks, topk) == wanted


# --- rows on the wire -----------------------------------------------------------------------------------------------


def routed_uniformly(tokens: int) -> dict[str, tuple[int, int]]:
    """Rows that this rank sends to others on the way there, and later, by the kind of dispatcher."""
    g = torch.Generator().manual_seed(dist.get_rank())
    indices = torch.rand(tokens, 128, generator=g).argsort(1)[:, :8]
    routing = moekit.Routing.from_topk(indices, torch.ones(tokens, 8), num_experts=128)
    sent = {}
    for kind in ("all_to_all", "all_gather"):
        x = torch.ones(tokens, 2, requires_grad=True)
        used = moekit.ep.dispatcher(dist.group.WORLD, 128, 8, kind=kind)
        with moekit.ep.traffic() as there:
            rows, _, handle = used.dispatch(x, routing)
        with moekit.ep.traffic() as later:
            used.combine(rows, handle).sum().backward()
        assert there.bytes["rows"] == 8 * there.rows and later.total == 8 * later.rows  # no gradient of weights
        sent[kind] = (there.rows, later.rows)
    return sent


@pytest.mark.parametrize(("world", "deduplicated"), [(2, 1.0), (4, 2.7), (8, 4.7)])
def test_rows_on_the_wire(world: int, deduplicated: float, tmp_path: Path):
    """As many for each token as docs/performance/scale.md says: 128 experts, of which a token chooses 8 uniformly."""
    tokens = 1000
    sent = on_ranks(routed_uniformly, world, tmp_path, tokens)
    for kind, wanted in (("all_to_all", deduplicated), ("all_gather", world - 1)):
        there, later = (sum(numbers) for numbers in zip(*(found[kind] for found in sent), strict=True))
        assert there / (tokens * world) == pytest.approx(wanted, rel=0.02)
        assert later == 3 * there  # results, and the gradients of both
