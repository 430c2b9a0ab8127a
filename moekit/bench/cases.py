"""A layer's sizes, and what is timed on it: the same function of the same inputs for all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import moekit
from moekit.bench import moved


@dataclass(frozen=True)
class Shape:
    """One Mixture-of-Experts layer: T tokens, H hidden, I intermediate, E experts, K experts a token."""

    name: str
    tokens: int
    hidden: int
    inner: int
    experts: int
    topk: int

    @property
    def rows(self) -> int:
        """R."""
        return self.tokens * self.topk

    def __str__(self) -> str:
        return f"{self.name} (T={self.tokens} H={self.hidden} I={self.inner} E={self.experts} K={self.topk})"


class Call(NamedTuple):
    """A differentiable function without arguments, and what to differentiate by."""

    function: Callable[[], Tensor]
    leaves: Sequence[Tensor]


@dataclass
class Case:
    """One computation: who does it (moekit first), and the bytes that it and its backward have to move, if they decide."""

    name: str
    calls: dict[str, Call]
    bytes: int = 0
    backward_bytes: int = 0
    whole_step: bool = False  # time forward and backward together, as a graph that is kept would be gigabytes


class Inputs:
    """The tensors of one layer; the floating ones want gradients."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        T, E, K, H = shape.tokens, shape.experts, shape.topk, shape.hidden
        self.logits = self.normal(T, E, dtype=torch.float32)
        weights, self.indices = self.logits.detach().softmax(1).topk(K)
        self.weights = (weights / weights.sum(1, keepdim=True)).requires_grad_()
        self.routing = moekit.Routing.from_topk(self.indices, self.weights, num_experts=E)
        self.order = self.indices.flatten().sort(stable=True).indices
        self.row_weights = torch.rand(shape.rows, device=device, dtype=torch.float32).requires_grad_()
        self.tokens = self.normal(T, H)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Random values."""
        drawn = torch.empty(*shape, dtype=dtype or self.dtype, device=self.device).normal_(0, scale)
        return drawn.requires_grad_()


def operator_cases(x: Inputs, peers: Mapping[str, Any]) -> Iterator[Case]:
    """What stands between the matrix products. Peers take routing as a map, and build their tables from it."""
    yield _route(x)
    yield _permute(x, peers)
    yield _unpermute(x, peers)
    yield _glu(x, peers)


def _route(x: Inputs) -> Case:
    T, E, K = x.shape.tokens, x.shape.experts, x.shape.topk
    calls = {
        "moekit": lambda: moekit.topk_router(x.logits, K)[0],
        "torch": lambda: x.logits.topk(K).values.softmax(-1),
    }
    return Case("route", _by([x.logits], calls), moved.route(T, E, K), moved.route_backward(T, E, K))


def _permute(x: Inputs, peers: Mapping[str, Any]) -> Case:
    E, K, rows = x.shape.experts, x.shape.topk, x.shape.rows
    calls: dict[str, Callable[[], Tensor]] = {
        "moekit": lambda: moekit.permute(x.tokens, moekit.Routing.from_topk(x.indices, num_experts=E)),
        "torch": lambda: x.tokens.index_select(0, x.indices.flatten().sort(stable=True).indices // K),
    }
    routing_map, _ = x.routing.to_map()
    for name, peer in _with(peers, "permute"):
        calls[name] = lambda peer=peer: peer.permute(x.tokens, routing_map, num_out_tokens=rows)[0]
    size = moved.permute(x.shape.tokens, rows, x.shape.hidden, x.dtype.itemsize)
    return Case("tables and permute", _by([x.tokens], calls), size, size)


def _unpermute(x: Inputs, peers: Mapping[str, Any]) -> Case:
    T, H, R, K = x.shape.tokens, x.shape.hidden, x.shape.rows, x.shape.topk
    rows, token = x.normal(R, H), x.order // K

    def by_hand() -> Tensor:
        weighted = (rows * x.weights.flatten()[x.order].unsqueeze(1)).to(x.dtype)
        return torch.zeros(T, H, dtype=x.dtype, device=x.device).index_add(0, token, weighted)

    calls = _by([rows, x.weights], {"moekit": lambda: moekit.unpermute(rows, x.routing, weighted=True), "torch": by_hand})
    routing_map, probs = (table.detach() for table in x.routing.to_map() if table is not None)
    probs.requires_grad_()
    for name, peer in _with(peers, "unpermute"):
        extra = {"probs": probs, "routing_map": routing_map}
        call = functools.partial(peer.unpermute, rows, token, torch.Size((T, H)), **extra)
        calls[name] = Call(call, [rows, probs])
    sizes = T, R, H, x.dtype.itemsize
    return Case("unpermute, weighted", calls, moved.unpermute(*sizes), moved.unpermute_backward(*sizes))


def _glu(x: Inputs, peers: Mapping[str, Any]) -> Case:
    gate_up, weights = x.normal(x.shape.rows, 2 * x.shape.inner), x.row_weights

    def by_hand() -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate) * up * weights.unsqueeze(1)).to(x.dtype)

    calls: dict[str, Callable[[], Tensor]] = {"moekit": lambda: moekit.glu(gate_up, weights), "torch": by_hand}
    for name, peer in _with(peers, "weighted_bias_swiglu_impl"):
        calls[name] = lambda peer=peer: peer.weighted_bias_swiglu_impl(gate_up, weights.unsqueeze(1))
    for name, peer in _with(peers, "silu_mul"):  # has no weights: they are one more product

        def silu_mul(peer: Any = peer) -> Tensor:
            halves = (half.contiguous() for half in gate_up.chunk(2, -1))
            return (peer.silu_mul(*halves) * weights.unsqueeze(1)).to(x.dtype)

        calls[name] = silu_mul
    sizes = x.shape.rows, x.shape.inner, x.dtype.itemsize
    return Case("SwiGLU, weighted", _by([gate_up, weights], calls), moved.glu(*sizes), moved.glu_backward(*sizes))


def experts_case(x: Inputs, peers: Mapping[str, Any]) -> Case:
    """The routed expert MLP."""
    E, H, I = x.shape.experts, x.shape.hidden, x.shape.inner
    gate_up, down = x.normal(E, 2 * I, H, scale=H**-0.5), x.normal(E, H, I, scale=I**-0.5)
    p = x.weights.detach().to(x.dtype).requires_grad_()

    def by_hand() -> Tensor:
        order = x.indices.flatten().sort(stable=True).indices
        token = order // x.shape.topk
        gate, up = F.grouped_mm(x.tokens[token], gate_up.mT, offs=x.routing.offsets).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, down.mT, offs=x.routing.offsets)
        return torch.zeros_like(x.tokens).index_add(0, token, rows * p.flatten()[order].unsqueeze(-1))

    calls: dict[str, Callable[[], Tensor]] = {
        "moekit": lambda: moekit.experts(x.tokens, (x.indices, p), gate_up, down),
        "torch": by_hand,
    }
    for name, peer in _with(peers, "grouped_mm_experts"):
        module = peer.grouped_mm_experts(gate_up, down)
        calls[name] = lambda module=module: module(x.tokens, x.indices, p)
    for name, peer in _with(peers, "experts"):
        if x.device.type != "cpu":
            calls[name] = lambda peer=peer: peer.experts(x.tokens, gate_up, down, x.indices.int(), p)
    return Case("experts", _by([x.tokens, p, gate_up, down], calls), whole_step=True)


def experts_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """What their step needs, generously: parameters, their gradients, blocks that cannot be reused, rows."""
    parameters = 3 * shape.experts * shape.hidden * shape.inner
    return (3 * parameters + 2 * shape.rows * (4 * shape.hidden + 8 * shape.inner)) * dtype.itemsize


def _by(leaves: Sequence[Tensor], calls: Mapping[str, Callable[[], Tensor]]) -> dict[str, Call]:
    return {name: Call(call, leaves) for name, call in calls.items()}


def _with(peers: Mapping[str, Any], function: str) -> list[tuple[str, Any]]:
    return [(name, peer) for name, peer in peers.items() if hasattr(peer, function)]
