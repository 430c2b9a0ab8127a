"""torch.compile of whole layers: one graph, few compilations, eager's values and gradients."""

from __future__ import annotations

import pytest
import torch
from _by_hand import leaf
from _reference import assert_same, draw
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import moekit
from moekit import Routing, moe_utils
from moekit.moe_utils import MoEAuxLossAutoScaler

pytestmark = pytest.mark.usefixtures("fresh")
EXPERTS, HIDDEN = 6, 8


@pytest.fixture
def fresh():
    """No compiled code of an earlier test, and no scale."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


# --- layers: permute -> glu -> unpermute, and an auxiliary loss ------------------------------------------------------


def native(x, router, bias, scale=0.5):
    """From logits, with a bias per expert."""
    logits = x @ router
    weights, indices = moekit.topk_router(logits, 2)
    routing = Routing.from_topk(indices, weights, num_experts=EXPERTS)
    rows = torch.cat((moekit.permute(x, routing),) * 2, dim=1)
    hidden = moekit.glu(rows, routing.row_weights(), bias=bias, offsets=routing.offsets)
    out = moekit.unpermute(hidden, routing)
    loss = moekit.load_balancing_loss(logits.softmax(1), routing.tokens_per_expert, x.shape[0], 2, EXPERTS, coeff=0.1)
    return moekit.aux_loss(out, loss, scale)


def native_padded(x, router, bias):
    """From a map, rows padded for a tiled GEMM, weighted by unpermute."""
    probs = (x @ router).softmax(1)
    routing_map = probs >= probs.topk(2, dim=1).values[:, -1:]
    routing = Routing.from_map(routing_map, probs, topk=3).pad_to_multiple(4)
    rows = torch.cat((moekit.permute(x, routing),) * 2, dim=1)
    return moekit.unpermute(moekit.glu(rows, bias=bias[0]), routing, weighted=True)


def drop_in(x, router, bias, known_size=True):
    probs, routing_map = moe_utils.topk_routing_with_score_function(x @ router, 2)
    tokens = torch.cat((x, x), dim=1)
    rows, row_probs, index = moe_utils.permute(tokens, routing_map, probs, x.shape[0] * 2 if known_size else None)
    hidden = moe_utils.weighted_bias_quick_geglu_impl(rows, bias[0], row_probs.unsqueeze(1))
    out = moe_utils.unpermute(hidden, index, x.shape, fused=True)
    return MoEAuxLossAutoScaler.apply(out, moe_utils.z_loss_func(x @ router, 0.25))


def drop_in_unknown_size(x, router, bias):
    """num_out_tokens=None: the number of rows depends on the routing."""
    return drop_in(x, router, bias, known_size=False)


def drop_in_weighted(x, router, bias):
    """Probs given to unpermute, and capacity."""
    probs, routing_map = moe_utils.topk_routing_with_score_function(x @ router, 2)
    tokens = torch.cat((x, x), dim=1)
    size = x.shape[0] * EXPERTS
    rows, _, index = moe_utils.permute(tokens, routing_map, None, size, drop_and_pad=True)
    hidden = moe_utils.weighted_bias_swiglu_impl(rows + bias[0], torch.ones_like(rows[:, :1]))
    return moe_utils.unpermute(hidden, index, x.shape, probs, routing_map, drop_and_pad=True)


LAYERS = [native, native_padded, drop_in, drop_in_unknown_size, drop_in_weighted]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)


def inputs(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = (tokens, HIDDEN), (HIDDEN, EXPERTS), (EXPERTS, 2 * HIDDEN)
    return [leaf(draw(3 * seed + i, *shape, dtype=dtype)) for i, shape in enumerate(shapes)]


def run(layer, args, upstream):
    out = layer(*args)
    return out.detach(), *torch.autograd.grad(out, args, upstream)


def assert_compiled_equals_eager(compiled, layer, args, exact: bool) -> None:
    upstream = draw(77, *args[0].shape, dtype=args[0].dtype)
    results = run(compiled, args, upstream), run(layer, args, upstream)
    for actual, expected in zip(*results, strict=True):
        assert expected.any() or not args[0].numel()
        if exact:
            assert_same(actual, expected)
        else:  # the compiler fuses what stands around the operators
            torch.testing.assert_close(actual, expected)


@every_layer
def test_one_graph_two_compilations(layer):
    """The sizes and the routing change; the second compilation makes the sizes symbolic."""
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed, tokens in enumerate((5, 7, 16)):
        assert_compiled_equals_eager(compiled, layer, inputs(tokens, seed), exact=True)
    assert compilations() == 2


@pytest.mark.parametrize("layer", [native, drop_in], ids=lambda layer: layer.__name__)
def test_symbolic_from_the_start(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 4, 17):
        assert_compiled_equals_eager(compiled, layer, inputs(tokens), exact=True)
    assert compilations() == 1


@pytest.mark.parametrize("layer", [native, native_padded, drop_in_unknown_size], ids=lambda layer: layer.__name__)
def test_no_token_and_one(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (0, 1):
        assert_compiled_equals_eager(compiled, layer, inputs(tokens), exact=True)


def test_inductor():
    routing_map = draw(5, 9, EXPERTS) > 0

    def layer(x, w, bias):
        rows, row_probs, index = moe_utils.permute(x, routing_map, (x @ w).sigmoid())
        hidden = moe_utils.weighted_bias_swiglu_impl(torch.cat((rows, rows), 1) + bias[0], row_probs.unsqueeze(1))
        return MoEAuxLossAutoScaler.apply(moe_utils.unpermute(hidden, index, x.shape), w.sum())

    MoEAuxLossAutoScaler.main_loss_backward_scale = 3.0
    compiled = torch.compile(layer, fullgraph=True)
    assert_compiled_equals_eager(compiled, layer, inputs(9), exact=False)
    assert compilations() == 1


def test_bfloat16():
    compiled = torch.compile(drop_in, fullgraph=True, backend="aot_eager")
    assert_compiled_equals_eager(compiled, drop_in, inputs(9, dtype=torch.bfloat16), exact=True)


def test_all_tokens_to_one_expert_or_none():
    """Same graph for every routing, -1 and an empty expert included."""

    def layer(x, weights, indices):
        routing = Routing.from_topk(indices, weights, num_experts=3)
        return moekit.unpermute(moekit.permute(x, routing).square(), routing, weighted=True)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, weights = leaf(draw(0, 4, 3)), leaf(draw(1, 4, 2))
    for indices in ([[0, 1]] * 4, [[2, 2]] * 4, [[-1, -1]] * 4, [[0, -1], [2, 1], [1, 1], [-1, 0]]):
        indices = torch.tensor(indices)
        results = []
        for function in (compiled, layer):
            out = function(x, weights, indices)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), (x, weights))))
        for actual, expected in zip(*results, strict=True):
            assert_same(actual, expected)
        by_hand = (weights.detach() * (indices >= 0)).sum(1, keepdim=True) * x.detach().square()
        torch.testing.assert_close(results[0][0], by_hand)
    assert compilations() == 1


def test_sort_chunks():
    def layer(x, probs, sizes, order):
        return moe_utils.sort_chunks_by_idxs(x * 2, sizes, order, probs)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for sizes, order in (([2, 0, 3], [2, 1, 0]), ([4, 1, 2], [1, 2, 0]), ([1, 9, 1], [2, 0, 1])):
        x, probs = leaf(draw(0, sum(sizes), 3)), leaf(draw(1, sum(sizes)))
        args = torch.tensor(sizes), torch.tensor(order)
        results = []
        for function in (compiled, layer):
            moved, moved_probs = function(x, probs, *args)
            grads = torch.autograd.grad((moved.square().sum(), moved_probs.square().sum()), (x, probs))
            results.append((moved.detach(), moved_probs.detach(), *grads))
        for actual, expected in zip(*results, strict=True):
            assert_same(actual, expected)
    assert compilations() <= 2


# --- the auxiliary loss ---------------------------------------------------------------------------------------------


def test_the_process_wide_scale_is_read_at_backward():
    """Neither the value at compilation nor at forward is baked in."""

    def layer(x, w):
        return MoEAuxLossAutoScaler.apply(x * 2, (w**2).sum())

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, w = leaf(draw(0, 3)), leaf(draw(1, 4))
    for at_forward, at_backward in ((None, 3.0), (5.0, None), (torch.tensor(2.0), torch.tensor([7.0])), (1.0, 0.0)):
        MoEAuxLossAutoScaler.main_loss_backward_scale = at_forward
        out = compiled(x, w)
        MoEAuxLossAutoScaler.main_loss_backward_scale = at_backward
        dx, dw = torch.autograd.grad(out.sum(), (x, w))
        assert MoEAuxLossAutoScaler.main_loss_backward_scale is at_backward
        assert_same(dx, torch.full_like(dx, 2.0))
        assert_same(dw, 2 * w.detach() * (1.0 if at_backward is None else float(at_backward)))
    assert compilations() == 1


def test_a_tensor_scale_of_the_native_loss_is_read_at_backward():
    compiled = torch.compile(lambda x, w, s: moekit.aux_loss(x * 2, (w**2).sum(), s), fullgraph=True, backend="aot_eager")
    x, w, scale = leaf(draw(0, 3)), leaf(draw(1, 4)), torch.tensor(3.0, dtype=torch.float64)
    for at_backward in (7.0, 0.25):
        out = compiled(x, w, scale)
        scale.fill_(at_backward)
        if torch.__version__ < (2, 11):  # which refuses what was written to since forward
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(out.sum(), (x, w))
            return
        dx, dw = torch.autograd.grad(out.sum(), (x, w))
        assert_same(dx, torch.full_like(dx, 2.0))
        assert_same(dw, 2 * w.detach() * at_backward)
    assert compilations() == 1


def test_compiled_checkpointing():
    def layer(*args):
        return checkpoint(native, *args, use_reentrant=False)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_compiled_equals_eager(compiled, native, inputs(9), exact=True)


# --- a GPU's tensors, which have no values to be looked at ------------------------------------------------------------


def from_choice(x, logits, indices, weights, gate_up, down):
    return moekit.experts(x, (indices, weights), gate_up, down)


def invariant(x, logits, indices, weights, gate_up, down):
    return moekit.experts(x, (indices, weights), gate_up, down, batch_invariant=True)


def dropped_in(x, logits, indices, weights, gate_up, down):
    """The other layers of this file cut pieces out of tensors, which needs the device."""
    probs, routing_map = moe_utils.topk_routing_with_score_function(logits, 2)
    rows, row_probs, index = moe_utils.permute(x, routing_map, probs, 8)
    hidden = moe_utils.weighted_bias_swiglu_impl(torch.cat((rows, rows), 1), row_probs.unsqueeze(1))
    y = moekit.experts(moe_utils.unpermute(hidden, index, x.shape), (indices, weights), gate_up, down)
    return MoEAuxLossAutoScaler.apply(y, moe_utils.z_loss_func(logits, 0.25))


def from_logits(x, logits, indices, weights, gate_up, down):
    return moekit.experts(x, moekit.route(logits, 2), gate_up, down)


@pytest.mark.parametrize("grads", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("layer", [from_choice, from_logits, invariant, dropped_in], ids=lambda layer: layer.__name__)
def test_one_graph_on_a_gpu(layer, grads):
    """No such device is needed to trace for it."""
    module = torch.nn.Module()
    module.forward = layer
    shapes = {"x": (4, HIDDEN), "logits": (4, EXPERTS), "indices": (4, 2), "weights": (4, 2)}
    shapes |= {"gate_up": (EXPERTS, 6, HIDDEN), "down": (EXPERTS, HIDDEN, 3)}
    dtypes = {"indices": torch.int64}
    with FakeTensorMode():
        given = [torch.zeros(shape, dtype=dtypes.get(name), device="cuda") for name, shape in shapes.items()]
    with torch.set_grad_enabled(grads):
        graph = torch.export.export(module, tuple(given), strict=True).graph
    called = {node.target.__name__ for node in graph.nodes if node.op == "call_function"}
    alone = layer in (from_choice, dropped_in) and not grads
    assert ("experts_topk.default" if alone else "experts.default") in called
    assert ("route_indices.default" in called) is not alone
