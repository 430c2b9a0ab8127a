"""Dispatchers of expert parallelism: several ranks equal one, values and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from torch import Tensor

import moekit
import moekit.ep

EXPERTS, HIDDEN, INNER, TOPK = 8, 16, 12, 4
TOKENS = (5, 0, 7, 3)  # of each rank


def problem(kind: str) -> dict[str, Tensor]:
    """All tokens of all ranks, their choice, the experts, and the gradient of the output."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    tokens = sum(TOKENS)
    distinct = torch.rand(tokens, EXPERTS, generator=g).argsort(1)[:, :TOPK]
    indices = {
        "random": distinct,
        "collapsed": torch.arange(2).repeat(tokens, TOPK // 2),
        "empty": torch.full((tokens, TOPK), -1),
        "duplicate": torch.randint(-1, EXPERTS, (tokens, TOPK), generator=g),
    }[kind]
    return {
        "x": draw(tokens, HIDDEN),
        "weights": torch.rand(tokens, TOPK, generator=g, dtype=torch.float64),
        "gate_up": draw(EXPERTS, 2 * INNER, HIDDEN),
        "down": draw(EXPERTS, HIDDEN, INNER),
        "indices": indices,
        "grad": draw(tokens, HIDDEN),
    }


LEAVES = ("x", "weights", "gate_up", "down")


def parts(given: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What a rank has of the problem."""
    of_tokens = [slice(sum(TOKENS[:r]), sum(TOKENS[: r + 1])) for r in range(world - 1)]
    of_tokens.append(slice(sum(TOKENS[: world - 1]), None))
    each = EXPERTS // world
    mine = slice(rank * each, (rank + 1) * each)
    return {name: v[mine] if name in ("gate_up", "down") else v[of_tokens[rank]] for name, v in given.items()}


def alone(given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in LEAVES}
    routing = moekit.Routing.from_topk(given["indices"], leaves["weights"], num_experts=EXPERTS)
    out = moekit.experts(leaves["x"], routing, leaves["gate_up"], leaves["down"])
    out.backward(given["grad"])
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def on_a_rank(kinds: list[str]) -> dict[str, Any]:
    group = dist.group.WORLD
    found = {}
    for kind in kinds:
        given = parts(problem(kind), dist.get_rank(), dist.get_world_size())
        leaves = {name: given[name].clone().requires_grad_() for name in LEAVES}
        routing = moekit.Routing.from_topk(given["indices"], leaves["weights"], num_experts=EXPERTS)
        out = moekit.ep.run(
            moekit.ep.AllToAll(group, EXPERTS),
            leaves["x"],
            routing,
            lambda rows, local, w=leaves: moekit.experts(rows, local, w["gate_up"], w["down"]),
        )
        out.backward(given["grad"])
        found[kind] = {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    return found


KINDS = ("random", "collapsed", "empty", "duplicate")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one(world: int, tmp_path: Path):
    found = on_ranks(on_a_rank, world, tmp_path, list(KINDS))
    for kind in KINDS:
        given = problem(kind)
        wanted = alone(given)
        for rank in range(world):
            for name, value in parts({**given, **wanted}, rank, world).items():
                if name in wanted:
                    torch.testing.assert_close(found[rank][kind][name], value, rtol=1e-12, atol=1e-12)
