"""What puts moekit's exchange into others' hands, and others' exchange into moekit's: as one process."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from torch import Tensor
from torch.nn import functional

import moekit
import moekit.ep
from moekit.ep.slices import mine, whole
from moekit.ep.torchtitan import TokenDispatcher

DOCS = Path(__file__).parent.parent / "docs" / "how-to"
EXPERTS, HIDDEN, INNER, TOPK = 8, 16, 12, 3
TOKENS = (5, 0, 7, 3)  # of each rank
LEAVES = ("x", "weights", "gate", "up", "down")
KINDS = ("random", "collapsed")


def problem(kind: str) -> dict[str, Tensor]:
    """All tokens of all ranks, their choice, the experts, and the gradient of the output."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    tokens = sum(TOKENS)
    random = torch.rand(tokens, EXPERTS, generator=g).argsort(1)[:, :TOPK]
    return {
        "x": draw(tokens, HIDDEN),
        "weights": torch.rand(tokens, TOPK, generator=g).double(),  # values of float32, in which DeepEP sends them
        **{"gate": draw(EXPERTS, INNER, HIDDEN), "up": draw(EXPERTS, INNER, HIDDEN), "down": draw(EXPERTS, HIDDEN, INNER)},
        "indices": random if kind == "random" else torch.arange(TOPK).repeat(tokens, 1),
        "grad": draw(tokens, HIDDEN),
    }


def part(given: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What a rank has."""
    return {
        name: value.chunk(len(TOKENS))[rank] if name in ("gate", "up", "down") else value.split(TOKENS)[rank]
        for name, value in given.items()
    }


def alone(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """One process, expert by expert."""
    x, weights, gate, up, down = leaves = [given[name].clone().requires_grad_() for name in LEAVES]
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        chosen = ((given["indices"] == expert) * weights).sum(1, keepdim=True)
        out = out + chosen * ((functional.silu(x @ gate[expert].T) * (x @ up[expert].T)) @ down[expert].T)
    out.backward(given["grad"])
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in zip(LEAVES, leaves, strict=True)}}


# --- torchtitan: its RoutedExperts, around our dispatcher ---------------------------------------------------------------


def routed_experts(dispatcher: Any, leaves: dict[str, Tensor], indices: Tensor) -> Tensor:
    """What torchtitan's ``RoutedExperts`` does, with experts that know rows and their numbers alone."""
    counts = torch.bincount(indices.flatten(), minlength=EXPERTS)
    rows, per_expert, metadata = dispatcher.dispatch(leaves["x"], leaves["weights"], indices, counts)
    assert rows.shape[0] == per_expert.sum() and per_expert.shape == leaves["gate"].shape[:1]
    out = []
    for of_expert, gate, up, down in zip(
        rows.split(per_expert.tolist()), leaves["gate"], leaves["up"], leaves["down"], strict=True
    ):
        out.append((functional.silu(of_expert @ gate.T) * (of_expert @ up.T)) @ down.T)
    return dispatcher.combine(torch.cat(out), metadata, leaves["x"])


def titan(leaves: dict[str, Tensor], indices: Tensor) -> Tensor:
    dispatcher = TokenDispatcher(SimpleNamespace(num_experts=EXPERTS, top_k=TOPK))
    dispatcher.wire_meshes(ep_mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    return routed_experts(dispatcher, leaves, indices)


# --- DeepEP: the code of the docs, over a stand-in for its buffer ---------------------------------------------------------


class Buffer:
    """``ElasticBuffer`` of DeepEP as far as the docs use it: signatures, what must be None, layouts."""

    def __init__(self) -> None:
        self.num_ranks, self.rank = dist.get_world_size(), dist.get_rank()

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        num_experts: int,
        handle: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any, None]:
        if handle is None:
            assert topk_idx is not None and topk_idx.dtype is torch.int64 and topk_weights.dtype is torch.float32
        else:
            assert topk_idx is None and num_experts == handle.num_experts
        assert x.is_contiguous()
        chosen = handle.topk_idx if topk_idx is None else topk_idx
        each = num_experts // self.num_ranks
        given = everybody(chosen)
        here = [(at >= 0) & (at // each == self.rank) for at in given]
        source = [needed.any(1).nonzero().flatten() for needed in here]
        rows = torch.cat([x[at] for x, at in zip(everybody(x), source, strict=True)])
        if handle is not None:
            return rows, None, None, handle, None
        local = torch.cat([at.sub(self.rank * each).where(ok, -1)[s] for at, ok, s in zip(given, here, source, strict=True)])
        weights = [w.where(ok, float("nan"))[s] for w, ok, s in zip(everybody(topk_weights), here, source, strict=True)]
        handle = SimpleNamespace(topk_idx=topk_idx.clone(), num_experts=num_experts, source=source)
        return rows, local, torch.cat(weights), handle, None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Tensor, Tensor | None, None]:
        assert x.is_contiguous() and (topk_weights is None or topk_weights.dtype is torch.float32)
        return self._home(x, handle), None if topk_weights is None else self._home(topk_weights, handle), None

    def _home(self, x: Tensor, handle: Any) -> Tensor:
        home = x.new_zeros(handle.topk_idx.shape[0], x.shape[1])
        for rows, source in zip(everybody(x), everybody(handle.source), strict=True):
            home.index_add_(0, source[self.rank], rows.split([len(at) for at in source])[self.rank])
        return home


def everybody(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value.detach() if isinstance(value, Tensor) else value)
    return found


def code_of(document: str) -> dict[str, Any]:
    """The names that the first block of a document defines."""
    block = re.search(r"```python\n(.*?)```", (DOCS / document).read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(block[1], names)
    return names


def deep_ep(leaves: dict[str, Tensor], indices: Tensor) -> Tensor:
    dispatcher = code_of("deepep.md")["DeepEP"](Buffer(), EXPERTS)
    assert isinstance(dispatcher, moekit.ep.Dispatcher)
    routing = moekit.Routing.from_topk(indices, leaves["weights"], num_experts=EXPERTS)
    gate_up = torch.cat([leaves["gate"], leaves["up"]], 1)
    return moekit.ep.run(
        dispatcher, leaves["x"], routing, lambda rows, local: moekit.experts(rows, local, gate_up, leaves["down"])
    )


# --- slices of one batch --------------------------------------------------------------------------------------------------


def sliced() -> None:
    """Slices of every number of tokens come together again, and so do their gradients."""
    group = dist.group.WORLD
    for count in (0, 1, 3, 4, 5, 9):
        tokens = torch.randn(count, 2, generator=torch.Generator().manual_seed(count)).requires_grad_()
        each = -(-count // dist.get_world_size())
        own = mine(tokens, group)
        assert torch.equal(own, tokens[dist.get_rank() * each :][:each])
        back = whole(own * (1 + dist.get_rank()), count, group)
        factors = 1 + torch.arange(count).div(max(each, 1), rounding_mode="floor").unsqueeze(1)
        assert torch.equal(back, tokens * factors)
        back.backward(torch.ones_like(back))
        assert torch.equal(tokens.grad, factors.expand(count, 2).float())


def on_a_rank() -> dict[tuple[str, str], dict[str, Tensor]]:
    sliced()
    found = {}
    for kind in KINDS:
        for adapter in (titan, deep_ep):
            given = part(problem(kind), dist.get_rank())
            leaves = {name: given[name].clone().requires_grad_() for name in LEAVES}
            with moekit.ep.traffic() as seen:
                out = adapter(leaves, given["indices"])
                out.backward(given["grad"])
            values = {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
            found[kind, adapter.__name__] = {**values, "rows": seen.rows}
    return found


def test_adapters(tmp_path: Path):
    found = on_ranks(on_a_rank, len(TOKENS), tmp_path)
    for kind in KINDS:
        given = problem(kind)
        wanted = alone(given)
        for adapter, tolerance in (("titan", 1e-12), ("deep_ep", 1e-6)):  # DeepEP's weights, and gradients, are float32
            for rank in range(len(TOKENS)):
                values = found[rank][kind, adapter]
                for name, value in part({**given, **wanted}, rank).items():
                    if name in wanted:
                        torch.testing.assert_close(values[name], value, rtol=tolerance, atol=tolerance)
        each = EXPERTS // len(TOKENS)
        for rank, indices in enumerate(given["indices"].split(TOKENS)):
            owners = [{int(i) // each for i in of_token} - {rank} for of_token in indices]
            there, back = sum(map(len, owners)), found[rank][kind, "titan"]["rows"]
            come = sum(rank in {int(i) // each for i in of_token} for of_token in given["indices"]) - sum(
                rank in {int(i) // each for i in of_token} for of_token in indices
            )
            assert back == 2 * (there + come)  # once to each rank that needs it; results back, and gradients both ways


def test_torchtitan_without_a_mesh():
    given = problem("random")
    leaves = {name: given[name].clone().requires_grad_() for name in LEAVES}
    out = routed_experts(TokenDispatcher(SimpleNamespace(num_experts=EXPERTS, top_k=TOPK)), leaves, given["indices"])
    out.backward(given["grad"])
    for name, value in alone(given).items():
        torch.testing.assert_close(out if name == "out" else leaves[name].grad, value, rtol=1e-12, atol=1e-12)


def test_torchtitan_refuses_what_is_not_its_own():
    dispatcher = TokenDispatcher(SimpleNamespace(num_experts=EXPERTS, top_k=TOPK))
    with pytest.raises(TypeError, match=r"moekit\.ep\.torchtitan: metadata must be what dispatch gave, got dict"):
        dispatcher.combine(torch.zeros(3, 4), {})
