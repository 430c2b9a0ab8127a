"""What only a GPU can show of the Triton kernels: real sizes, graphs, streams, no hidden waiting, the same bits each run."""

from __future__ import annotations

import pytest
import torch
from _interpreter import INTERPRETED

import moekit
from moekit import Routing
from moekit.ops import tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU"),
]
T, H, I, E, K = 4096, 2048, 768, 128, 8
OPERATIONS = ("tables", "map", "capacity", "router", "permute", "unpermute", "glu", "glu-bias", "glu-fp8")


def normal(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def choose(seed=0, tokens=T):
    """Indices and weights of a random routing with some slots of no expert, and expert 3 empty."""
    weights, indices = moekit.topk_router(normal(tokens, E, dtype=torch.float32, seed=seed), K)
    indices = torch.where((indices == 3) | (normal(tokens, K, dtype=torch.float32, seed=seed + 1) > 1.5), -1, indices)
    return indices, weights


def run(operation):
    """Results and gradients of one operation at the size of a real layer."""
    indices, weights = choose()
    routing = Routing.from_topk(indices, weights.requires_grad_(), num_experts=E)
    if operation == "tables":
        padded = routing.pad_to_multiple(16)
        found = tables.rows_of_tokens(routing.row_tables()[0], T)
        return [routing.offsets, routing.order, routing.inverse, padded.order, padded.inverse, *found]
    if operation == "map":
        routing_map = routing.to_map()[0]
        return [*tables.route_map(routing_map, T * K), tables.map_to_indices(routing_map, K)]
    if operation == "capacity":
        return [tables.route_capacity(routing.to_map()[0], 300)]
    inputs = {
        "router": lambda: [normal(T, E, dtype=torch.float32)],
        "permute": lambda: [normal(T, H)],
        "unpermute": lambda: [normal(T * K, H)],
        "glu": lambda: [normal(T * K, 2 * I), torch.rand(T * K, device="cuda")],
        "glu-bias": lambda: [normal(T * K, 2 * I), torch.rand(T * K, device="cuda"), normal(E, 2 * I)],
        "glu-fp8": lambda: [normal(T * K, 2 * I), torch.rand(T * K, device="cuda")],
    }[operation]()
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in inputs]
    function = {
        "router": lambda x: moekit.topk_router(x, K, score_function="sigmoid", num_groups=8, group_topk=4)[0],
        "permute": lambda x: moekit.permute(x, routing),
        "unpermute": lambda x: moekit.unpermute(x, routing, weighted=True),
        "glu": lambda y, p: moekit.glu(y, p),
        "glu-bias": lambda y, p, b: moekit.glu(y, p, bias=b, offsets=routing.offsets, clamp=2.0, layout="interleaved"),
        "glu-fp8": lambda y, p: moekit.glu(y, p, fp8_store=True),
    }[operation]
    out = function(*inputs)
    sources = [*inputs, weights] if operation == "unpermute" else inputs
    return [out.detach(), *torch.autograd.grad(out, sources, normal(*out.shape, seed=9).to(out.dtype))]


@pytest.fixture
def fixed_random(monkeypatch):
    """``torch.rand`` on the GPU draws the same numbers each time."""
    monkeypatch.setattr(torch, "rand", lambda *shape, device: normal(*shape, dtype=torch.float32, seed=5).sigmoid())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_real_sizes_match_the_reference(operation, fixed_random):
    found = run(operation)
    with moekit.backend("torch"):
        expected = run(operation)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype is b.dtype and a.shape == b.shape, f"{operation}[{i}]"
        if not a.is_floating_point():
            differ = (a != b).nonzero()
            assert len(differ) == 0, f"{operation}[{i}]: {len(differ)} differ, the first at {differ[0].tolist()}"
            continue
        error = float((a.double() - b.double()).norm() / b.double().norm())
        assert error < (1e-2 if a.dtype is torch.bfloat16 else 1e-5), f"{operation}[{i}]: relative error {error}"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_twenty_runs_bit_equal(operation, fixed_random):
    first = run(operation)
    for _ in range(20):
        for i, (a, b) in enumerate(zip(run(operation), first, strict=True)):
            assert torch.equal(a, b), f"{operation}[{i}]"


def layer(indices, x, weights):
    routing = Routing.from_topk(indices, weights, num_experts=E)
    rows = moekit.permute(x, routing)
    return moekit.unpermute(moekit.glu(rows, routing.row_weights(), offsets=routing.offsets), routing)


def test_graph_replay_with_new_routing():
    x, (indices, weights) = normal(T, 2 * I), choose()
    layer(indices, x, weights)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(indices, x, weights)
    for seed in (1, 2, 3):
        new_indices, new_weights = choose(seed)
        indices.copy_(new_indices), weights.copy_(new_weights)
        graph.replay()
        assert torch.equal(out, layer(new_indices, x, new_weights))


def test_nothing_waits_for_the_gpu():
    (indices, weights), x = choose(), normal(T, 2 * I)
    logits = normal(T, E, dtype=torch.float32)
    routing_map = Routing.from_topk(indices, num_experts=E).to_map()[0]
    sizes = torch.full((E,), T * K // E, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(indices, x, weights)
        moekit.topk_router(logits, K)
        tables.route_map(routing_map, T * K)
        tables.map_to_indices(routing_map, K)
        tables.route_capacity(routing_map, 300)
        tables.sort_chunk_rows(sizes, torch.arange(E, device="cuda"), T * K, T * K)
        Routing.from_topk(indices, num_experts=E).pad_to_multiple(16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams():
    x, (indices, weights) = normal(T, 2 * I), choose()
    expected = layer(indices, x, weights)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found += [layer(indices, x, weights) for _ in range(10)]
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current():
    x, (indices, weights) = normal(T, 2 * I), choose()
    other = [t.to("cuda:1") for t in (indices, x, weights)]
    assert torch.equal(layer(*other).cpu(), layer(indices, x, weights).cpu())
    assert torch.cuda.current_device() == 0


def test_a_token_alone_or_in_a_batch():
    x, (indices, weights) = normal(T, 2 * I), choose()
    out = layer(indices, x, weights)
    for token in (0, 17, T - 1):
        one = slice(token, token + 1)
        assert torch.equal(layer(indices[one], x[one], weights[one]), out[one])


def test_past_2_to_the_31_elements():
    tokens, width, tail = 2**19 + 3, 2048, slice(-5, None)
    x = torch.empty(tokens, width, dtype=torch.bfloat16, device="cuda").random_(-64, 64)
    indices = torch.stack([torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.int64)], 1).cuda()
    routing = Routing.from_topk(indices, torch.full((tokens, 2), 0.5, device="cuda"), num_experts=2)
    rows = moekit.permute(x, routing)
    assert rows.numel() > 2**31
    assert torch.equal(rows[tail], x[tail]) and torch.equal(rows[:tokens][tail], x[tail])
    assert torch.equal(moekit.unpermute(rows, routing, weighted=True)[tail], x[tail])
    out = moekit.glu(rows, routing.row_weights(), offsets=routing.offsets)
    assert torch.equal(out[tail], moekit.glu(rows[tail].clone(), torch.full((5,), 0.5, device="cuda")))
    needed = rows.requires_grad_()
    gradient = torch.autograd.grad(moekit.glu(needed, routing.row_weights()), needed, out)[0]
    few = rows.detach()[tail].clone().requires_grad_()
    expected = torch.autograd.grad(moekit.glu(few, torch.full((5,), 0.5, device="cuda")), few, out[tail])[0]
    assert torch.equal(gradient[tail], expected)
    weights = routing.row_weights().requires_grad_()
    back = torch.ops.moekit.unpermute(needed, weights, *routing.row_tables())
    drows, dweights = torch.autograd.grad(back, [needed, weights], x)
    assert torch.equal(drows[tail], x[tail] * 0.5)
    expected = (x[tail].double() * rows.detach()[tail].double()).sum(1)
    assert torch.allclose(dweights[tail].double(), expected, rtol=1e-6)
