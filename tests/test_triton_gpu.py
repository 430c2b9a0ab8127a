"""What only a GPU can show of the Triton kernels: real sizes, graphs, streams, no hidden waiting, the same bits each run."""

from __future__ import annotations

import pytest
import torch
from _interpreter import INTERPRETED

import moekit
from moekit import Routing
from moekit.ops import gemm, tables
from moekit.ops.packed_products import WORKSPACE, packed_rows
from moekit.ops.unpack import unpack

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_steps_of_experts_neither_wait_nor_change_in_a_graph(dtype):
    """PyTorch's grouped product in float32 and float16 reads the offsets on the host, which a capture would not survive."""
    indices, weights = (part[:512].clone() for part in choose())
    x = normal(512, H, dtype=dtype).requires_grad_()
    leaves = [normal(E, 2 * I, H, dtype=dtype, seed=1), normal(E, H, I, dtype=dtype, seed=2)]
    leaves = [x, weights.to(dtype).requires_grad_(), *((leaf * 0.1).requires_grad_() for leaf in leaves)]

    def step():
        out = moekit.experts(leaves[0], (indices, leaves[1]), *leaves[2:])
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, again, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    indices.copy_(choose(3)[0][:512])
    graph.replay()
    assert all(map(torch.equal, found, step()))
    with moekit.backend("torch"):
        leaves = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
        indices = indices.cpu()
        bound = 16 if dtype is torch.float32 else 1  # which adds up what it rounds
        for value, true in zip(found, step(), strict=True):
            assert (value.cpu().double() - true).norm() <= bound * torch.finfo(dtype).eps * true.norm()


def test_float32_is_rounded_to_tf32_where_torch_may():
    settings, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    drawn = normal(400, 256, dtype=torch.float32), normal(400, 128, dtype=torch.float32, seed=1)
    matrices, ends = (
        normal(4, 256, 128, dtype=torch.float32, seed=2),
        torch.tensor([100, 100, 333, 400], device="cuda").int(),
    )
    products = [lambda: gemm.grouped_outer(*drawn, ends), lambda: gemm.grouped_rows(drawn[0], matrices, ends)]
    products.append(lambda: gemm.grouped_rows(drawn[0], matrices.mT.contiguous().mT, ends))

    def found(allowed):
        settings.fp32_precision = allowed
        return [product() for product in products]

    try:
        exact, rounded, again = found("ieee"), found("tf32"), found("ieee")
    finally:
        settings.fp32_precision = before
    assert all(map(torch.equal, exact, again))
    true = torch.cat(
        [x @ m for x, m in zip(drawn[0].double().tensor_split([100, 100, 333]), matrices.double(), strict=True)]
    )
    for one, other in zip(exact[1:], rounded[1:], strict=True):
        assert (one - true).norm() < 1e-6 * true.norm() and 1e-5 < (other - true).norm() / true.norm() < 2**-10
    assert 1e-5 < (exact[0] - rounded[0]).norm() / exact[0].norm() < 2**-10


def test_few_tokens_read_nothing_of_the_call_before():
    """The second launch begins before the first has ended: with other tokens in turn, what is left of them would show."""
    (indices, weights), x = choose(), normal(T, H)
    layer = [normal(E, 2 * I, H, seed=1) * 0.1, normal(E, H, I, seed=2) * 0.1]
    calls = [(x[t : t + 1], (indices[t : t + 1], weights[t : t + 1])) for t in range(2)]
    expected = [moekit.experts(*call, *layer) for call in calls]
    assert not torch.equal(*expected)
    for _ in range(200):
        found = [moekit.experts(*call, *layer) for call in calls]
        assert all(map(torch.equal, found, expected))


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


# --- grouped products -----------------------------------------------------------------------------------------------

RANK = 16
PRODUCTS = {  # tokens, and what the weight is packed in
    "dense": (T, None),
    "dense, no update": (T, None),
    "dense, few rows": (64, None),
    "by slices": (4 * T, "nf4"),
    "in registers": (T // 4, "mxfp4"),
    "in registers, few rows": (256, "fp8"),
}


def operands(name, back=False):
    """Rows, a weight, offsets and a low-rank update of a layer's first projection."""
    tokens, form = PRODUCTS[name]
    depth, width = (2 * I, H) if back else (H, 2 * I)
    weight = normal(E, 2 * I, H, seed=3) * 0.02
    weight = weight if form is None else moekit.pack(weight, form).stored()
    update = (normal(tokens * K, RANK, seed=4), normal(E, width, RANK, seed=5).mT * 0.02)
    if name.endswith("no update"):
        update = (None, None)
    return normal(tokens * K, depth, seed=6), weight, offsets_of(tokens), *update


def offsets_of(tokens, seed=7):
    chosen = normal(tokens, E, dtype=torch.float32, seed=seed).topk(K, 1).indices.flatten()
    return torch.bincount(chosen, minlength=E).cumsum(0).int()


def multiply(name, rows, weight, offsets, low, factors, back=False, out=None):
    if PRODUCTS[name][1] is None:
        return gemm.grouped_rows(rows, weight if back else weight.mT, offsets, out, low, factors)
    return packed_rows(rows, weight, offsets, out, low, factors, back=back)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_rounded_once(name, back):
    rows, weight, offsets, low, factors = operands(name, back)
    found = multiply(name, rows, weight, offsets, low, factors, back)
    matrices = weight if PRODUCTS[name][1] is None else unpack(weight, 0, E, rows.dtype)
    begin = 0
    for expert, end in enumerate(offsets.tolist()[:8]):
        block = slice(begin, end)
        matrix = matrices[expert] if back else matrices[expert].mT
        terms = [(rows[block].double(), matrix.double())]
        terms += [] if low is None else [(low[block].double(), factors[expert].double())]
        value, size = sum(x @ m for x, m in terms), sum(x.abs() @ m.abs() for x, m in terms)
        allowed = torch.finfo(rows.dtype).eps / 2 * value.abs() + 2**-20 * size
        assert ((found[block].double() - value).abs() <= allowed).all(), f"expert {expert}"
        begin = end


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_graphs_streams_and_without_waiting(name):
    rows, weight, offsets, low, factors = operands(name)
    expected = multiply(name, rows, weight, offsets, low, factors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = multiply(name, rows, weight, offsets, low, factors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [multiply(name, rows, weight, offsets, low, factors) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(found, expected) for found in runs)
    for seed in (8, 9):
        offsets.copy_(offsets_of(PRODUCTS[name][0], seed))
        graph.replay()
        assert torch.equal(out, multiply(name, rows, weight, offsets, low, factors))
    expected = out.clone()
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            found += [multiply(name, rows, weight, offsets, low, factors) for _ in range(5)]
    torch.cuda.synchronize()
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["dense", "dense, few rows"])
def test_products_on_another_device_than_the_current(name):
    given = operands(name)
    assert torch.equal(multiply(name, *(t.to("cuda:1") for t in given)).cpu(), multiply(name, *given).cpu())


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_take_no_memory_but_a_workspace(name):
    rows, weight, offsets, low, factors = operands(name)
    out = multiply(name, rows, weight, offsets, low, factors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert multiply(name, rows, weight, offsets, low, factors, out=out) is out
    assert torch.cuda.max_memory_allocated() - before <= (WORKSPACE if name == "by slices" else 0)


def peak_of_a_step(gate_up, down):
    """Bytes above what is there before, of the forward and backward of a layer with adapters on both weights."""
    (indices, weights), x = choose(), normal(T, H).requires_grad_()
    routing = Routing.from_topk(indices, weights, num_experts=E)
    lora = {}
    for which, (width, depth) in (("gate_up", (2 * I, H)), ("down", (H, I))):
        factors = normal(E, RANK, depth).requires_grad_(), normal(E, width, RANK).requires_grad_()
        lora[which] = moekit.Lora(*factors)
    grad = normal(T, H, seed=1)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        moekit.experts(x, routing, gate_up, down, lora=lora).backward(grad)
        peak = torch.cuda.max_memory_allocated() - before
    return peak


def test_a_step_on_packed_weights_peaks_at_a_workspace_more():
    dense = normal(E, 2 * I, H, seed=3) * 0.02, normal(E, H, I, seed=4) * 0.02
    packed = [moekit.pack(weight, "nf4") for weight in dense]
    assert peak_of_a_step(*packed) <= peak_of_a_step(*dense) + WORKSPACE
