"""Problems of expert parallelism: tokens, choices and experts of all ranks, what a rank has of them, and one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moekit
import moekit.ep

EXPERTS, HIDDEN, INNER = 8, 16, 12
TOKENS = {2: (11, 4), 4: (5, 0, 7, 3), 8: (3, 0, 4, 1, 0, 5, 2, 0)}  # of each rank, by the number of ranks
ONE_SIDED = {2: (0, 15), 4: (0, 15, 0, 0), 8: (0, 15, 0, 0, 0, 0, 0, 0)}
LEAVES = ("x", "weights", "gate_up", "down")
OF_EXPERTS = ("gate_up", "down")

Problem = dict[str, Tensor]


def problem(kind: str, topk: int = 4, dtype: torch.dtype = torch.float64, tokens: int = 15) -> Problem:
    """All tokens of all ranks, their choice, the experts, and the gradient of the output; experts are float64."""
    g = torch.Generator().manual_seed(topk)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    indices = {
        "random": torch.rand(tokens, EXPERTS, generator=g).argsort(1)[:, :topk],
        "collapsed": torch.arange(2).repeat(tokens, topk)[:, :topk],
        "empty": torch.full((tokens, topk), -1),
        "duplicate": torch.randint(-1, EXPERTS, (tokens, topk), generator=g),
    }[kind]
    return {
        "x": draw(tokens, HIDDEN).to(dtype),
        "weights": torch.rand(tokens, topk, generator=g, dtype=torch.float64).to(dtype),
        "gate_up": draw(EXPERTS, 2 * INNER, HIDDEN),
        "down": draw(EXPERTS, HIDDEN, INNER),
        "indices": indices,
        "grad": draw(tokens, HIDDEN).to(dtype),
    }


def of_rank(given: Problem, rank: int, world: int) -> Problem:
    """What a rank has: uneven numbers of tokens, and of a collapsed routing one rank all."""
    collapsed = bool((given["indices"] < 2).all())
    counts = (ONE_SIDED if collapsed else TOKENS)[world] if len(given["x"]) else [0] * world
    start = sum(counts[:rank])
    mine = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
    return {name: v[mine] if name in OF_EXPERTS else v[start : start + counts[rank]] for name, v in given.items()}


def mine(given: Problem) -> Problem:
    """What this rank has."""
    return of_rank(given, dist.get_rank(), dist.get_world_size())


def leaves_of(given: Problem) -> Problem:
    """What has gradients."""
    return {name: given[name].clone().requires_grad_() for name in LEAVES}


def as_routing(indices: Tensor, weights: Tensor) -> moekit.Routing:
    """Of all experts, with duplicates."""
    tables = moekit.ops.tables.route_indices(indices, EXPERTS)
    return moekit.Routing(indices, weights, *tables)


def precise(rows: Tensor, routing: moekit.Routing, weights: Problem) -> Tensor:
    """The experts in float64, rounded once."""
    routing = moekit.Routing(
        routing.indices,
        None if routing.weights is None else routing.weights.double(),
        *(routing.tokens_per_expert, routing.offsets, routing.order, routing.inverse),
    )
    return moekit.experts(rows.double(), routing, weights["gate_up"], weights["down"]).to(rows.dtype)


def backward(out: Tensor, leaves: Problem, grad: Tensor) -> Problem:
    """The output and all gradients."""
    out.backward(grad)
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def alone(given: Problem, indices: Tensor | None = None) -> Problem:
    """One process, in float64; ``indices`` in the place of those of the problem."""
    leaves = leaves_of({name: v.double() if v.is_floating_point() else v for name, v in given.items()})
    routing = as_routing(given["indices"] if indices is None else indices, leaves["weights"])
    return backward(precise(leaves["x"], routing, leaves), leaves, given["grad"].double())


def together(given: Problem, dispatcher: Any, beside: Any = None) -> Problem:
    """This rank's part, by a dispatcher."""
    leaves = leaves_of(given)
    routing = as_routing(given["indices"], leaves["weights"])
    out = moekit.ep.run(dispatcher, leaves["x"], routing, lambda rows, local: precise(rows, local, leaves), beside)
    return backward(out, leaves, given["grad"])


def all_to_all(**options: Any) -> moekit.ep.AllToAll:
    return moekit.ep.AllToAll(dist.group.WORLD, EXPERTS, **options)


def all_gather(**options: Any) -> moekit.ep.AllGather:
    return moekit.ep.AllGather(dist.group.WORLD, EXPERTS, **options)


def layer(given: Problem, used: Any, experts: Any = None, **leaves: Tensor) -> tuple[Tensor, Problem]:
    """The output of the experts on this rank's tokens, and the leaves, of which some may be given."""
    found = {**leaves_of(given), **leaves}
    routing = as_routing(given["indices"], found["weights"])
    default = lambda rows, local: moekit.experts(rows, local, found["gate_up"], found["down"])  # noqa: E731
    return moekit.ep.run(used, found["x"], routing, experts or default), found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rowwise(rows: Tensor, local: moekit.Routing) -> Tensor:
    """Of each row by itself, so that its bits do not depend on how many there are."""
    weights: Any = local.weights
    return rows.tanh() * weights.masked_fill(local.indices < 0, 0).sum(1, keepdim=True)


@contextmanager
def keeping() -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        yield kept
