"""What docs/performance/scale.md says of bytes: its functions, by counting and against the bytes that processes send."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from torch import Tensor

import moekit
import moekit.ep
from moekit.plan.exchange import H200, QWEN3, Layer, needed, rows, sent, times

ROOT = Path(__file__).resolve().parent.parent
SMALL = replace(QWEN3, tokens=1500, hidden=4, row_bytes=8, weight_bytes=8)  # float64, on the reference


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize(("groups", "chosen"), [(1, 1), (4, 2), (2, 2)])
def test_needed_is_what_counting_gives(parts: int, groups: int, chosen: int):
    layer = Layer("", 1, 1, 1, experts=8, topk=2, groups=groups, groups_chosen=chosen)
    each, there, total = 8 // groups, 0, 0
    for some in itertools.combinations(range(groups), chosen):
        reached = [expert for group in some for expert in range(group * each, (group + 1) * each)]
        for choice in itertools.combinations(reached, layer.topk):
            there += any(expert < 8 // parts for expert in choice)
            total += 1
    assert needed(layer, parts) == pytest.approx(there / total, rel=1e-12)


def test_rows_between_nodes():
    one, two = rows(QWEN3, 16, 8, "rank"), rows(QWEN3, 16, 8, "node")
    assert one.between / one.inside == pytest.approx(8 / 7)
    assert two.between == pytest.approx(needed(QWEN3, 2)) and two.inside == pytest.approx(2 * one.inside)
    assert rows(QWEN3, 8, 8, "node").total == rows(QWEN3, 8, 8, "rank").total
    assert times(QWEN3, H200, 16, "all", 0.5).exchange == pytest.approx(2 * 4 * 8 * 8192 * 2048 * 2 / 50e9)


def send() -> tuple[dict[str, int], int]:
    """A forward and backward of random routing; nothing is computed with the rows."""
    g = torch.Generator().manual_seed(dist.get_rank())
    scores = torch.rand(SMALL.tokens, SMALL.experts, generator=g, dtype=torch.float64)
    weights, indices = scores.topk(SMALL.topk)
    x = torch.rand(SMALL.tokens, SMALL.hidden, generator=g, dtype=torch.float64, requires_grad=True)
    routing = moekit.Routing.from_topk(indices, weights.requires_grad_(), num_experts=SMALL.experts)
    weigh = lambda rows, local: rows * sum_of(local)  # noqa: E731
    dispatcher = moekit.ep.AllToAll(dist.group.WORLD, SMALL.experts)
    with moekit.ep.traffic() as seen:
        moekit.ep.run(dispatcher, x, routing, weigh).sum().backward()
    return seen.bytes, seen.rows


def sum_of(local: moekit.Routing) -> Tensor:
    return (local.weights * (local.indices >= 0)).sum(1, keepdim=True)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_that_processes_send(ranks: int, tmp_path: Path):
    found = on_ranks(send, ranks, tmp_path)
    for what, wanted in sent(SMALL, ranks).items():
        assert sum(of_rank[what] for of_rank, _ in found) / ranks == pytest.approx(wanted, rel=0.02), what
    a_token = sum(count for _, count in found) / ranks / SMALL.tokens / 4
    assert a_token == pytest.approx({2: 1.0, 4: 2.72, 8: 4.67}[ranks], rel=0.02)


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / f"benchmarks/{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_has_these_tables():
    text = (ROOT / "docs/performance/scale.md").read_text(encoding="utf-8")
    missing = [name for name, table in benchmark("scale").all_tables().items() if f"<!-- {name} -->\n{table}\n" not in text]
    assert not missing
    for found in json.loads((ROOT / "docs/performance/ep_h200.json").read_text(encoding="utf-8")):
        assert benchmark("ep").tables(found) in text, found["ranks"]
