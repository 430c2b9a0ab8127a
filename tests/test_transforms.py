"""What PyTorch's transforms make of the operators: ``torch.func``, dual numbers, batched and per-sample gradients.

Each operator stands beside the same formula in plain PyTorch, and every transform of the one must give what it gives of
the other: in float64, second derivatives included, and to first order in float32 on each backend.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from _reference import draw
from torch import func
from torch.utils.flop_counter import FlopCounterMode

import moekit
from moekit import moe_utils

T, K, E, H, I = 5, 2, 3, 4, 3
INDICES = torch.tensor([[0, 2], [2, 1], [1, -1], [2, 0], [1, 2]])
MAP = torch.zeros(T, E + 1, dtype=torch.bool).scatter(1, INDICES % (E + 1), True)[:, :E]
ROUTING = moekit.Routing.from_topk(INDICES, num_experts=E)
SLOT = ROUTING.order.long()[: int(ROUTING.offsets[-1])]
EXPERT = INDICES.reshape(-1)[SLOT]
REST = T * K - len(SLOT)


class Case(NamedTuple):
    ours: object
    plain: object
    shapes: tuple
    once: str = ""  # why the operator has no second derivative in reverse mode
    tangent_twice: bool = True  # whether forward mode sees all of it: an attached loss has no part in the output


def padded(rows):
    return F.pad(rows, (0, 0, 0, REST))


def plain_permute(x):
    return padded(x[SLOT // K])


def plain_unpermute(rows, weights):
    live = rows[: len(SLOT)] * weights.reshape(-1)[SLOT, None]
    return torch.zeros(T, rows.shape[1], dtype=rows.dtype).index_add(0, SLOT // K, live)


def plain_swiglu(y, weights=1.0):
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up * weights


def plain_linear(rows, weight):
    return padded(torch.einsum("rh,roh->ro", rows[: len(SLOT)], weight[EXPERT]))


def plain_experts(x, weights, gate_up, down, gate_up_bias, down_bias):
    hidden = plain_linear(plain_permute(x), gate_up)[: len(SLOT)] + gate_up_bias[EXPERT]
    out = plain_linear(plain_swiglu(hidden), down)[: len(SLOT)] + down_bias[EXPERT]
    return plain_unpermute(out, weights)


def plain_top2(logits):
    chosen = logits.sigmoid().gather(1, logits.detach().topk(K, 1).indices)
    return chosen / chosen.sum(1, keepdim=True)


def plain_map(x, probs):
    expert, token = MAP.T.nonzero(as_tuple=True)
    return x[token].sum(1) * probs[token, expert]


def our_map(x, probs):
    rows, row_probs, _ = moe_utils.permute(x, MAP, probs, num_out_tokens=int(MAP.sum()))
    return rows.sum(1) * row_probs


def our_experts(x, weights, gate_up, down, gate_up_bias, down_bias, **options):
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    return moekit.experts(x, (INDICES, weights), gate_up, down, **biases, **options)


class WithLoss(torch.autograd.Function):
    """``output``, and ``factor`` as the gradient of ``loss``: what attaching a loss means, as PyTorch would have it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output, loss, factor):
        return output.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[2]

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.tensor(ctx.factor, dtype=grad.dtype), None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent.clone()


EXPERTS = ((T, H), (T, K), (E, 2 * I, H), (E, H, I), (E, 2 * I), (E, H))
NO_DOUBLE = "double backward does not exist for this operator"
CASES = {
    "glu": Case(moekit.glu, plain_swiglu, ((T, 2 * I),)),
    "glu, weighted, biased": Case(
        lambda y, w, b: moekit.glu(y, w, bias=b, fp8_store=False),
        lambda y, w, b: plain_swiglu(y + b, w[:, None]),
        ((T, 2 * I), (T,), (2 * I,)),
    ),
    "glu, a bias an expert": Case(
        lambda y, b: moekit.glu(y, bias=b, offsets=ROUTING.offsets),
        lambda y, b: padded(plain_swiglu(y[: len(SLOT)] + b[EXPERT])),
        ((T * K, 2 * I), (E, 2 * I)),
    ),
    "permute": Case(lambda x: moekit.permute(x, ROUTING), plain_permute, ((T, H),)),
    "unpermute, weighted": Case(
        lambda rows, w: moekit.unpermute(rows, moekit.Routing.from_topk(INDICES, w, num_experts=E), weighted=True),
        plain_unpermute,
        ((T * K, H), (T, K)),
    ),
    "row_weights": Case(
        lambda w: moekit.Routing.from_topk(INDICES, w, num_experts=E).row_weights(),
        lambda w: F.pad(w.reshape(-1)[SLOT], (0, REST)),
        ((T, K),),
    ),
    "sort_chunks": Case(
        lambda x: moekit.sort_chunks(x, torch.tensor([2, 1, 2]), torch.tensor([2, 0, 1]))[0],
        lambda x: x[[3, 4, 0, 1, 2]],
        ((T, H),),
    ),
    "grouped_linear": Case(
        lambda rows, w: moekit.grouped_linear(rows, w, ROUTING.offsets), plain_linear, ((T * K, H), (E, 2 * I, H))
    ),
    "experts": Case(our_experts, plain_experts, EXPERTS, NO_DOUBLE),
    "experts, all kept": Case(lambda *args: our_experts(*args, save="all"), plain_experts, EXPERTS, NO_DOUBLE),
    "experts, weighted after": Case(
        lambda *args: our_experts(*args, weight_after_down=True), plain_experts, EXPERTS, NO_DOUBLE
    ),
    "topk_router": Case(lambda logits: moekit.topk_router(logits, K, score_function="sigmoid")[0], plain_top2, ((T, E),)),
    "load_balancing_loss": Case(
        lambda p: moekit.load_balancing_loss(p.softmax(1), MAP.sum(0), T, K, E, 0.5),
        lambda p: 0.5 * E * (p.softmax(1).sum(0) / T * (MAP.sum(0).to(p.dtype) / (K * T))).sum(),
        ((T, E),),
    ),
    "z_loss": Case(
        lambda logits: moekit.z_loss(logits, 0.5), lambda logits: 0.5 * logits.logsumexp(1).square().mean(), ((T, E),)
    ),
    "aux_loss": Case(
        lambda x: moekit.aux_loss(x.sin(), x.square().sum(), 0.5),
        lambda x: WithLoss.apply(x.sin(), x.square().sum(), 0.5),
        ((T, H),),
        tangent_twice=False,
    ),
    "aux_loss, scale in a tensor": Case(
        lambda x: moekit.aux_loss(x.sin(), x.square().sum(), torch.tensor(0.5)),
        lambda x: WithLoss.apply(x.sin(), x.square().sum(), 0.5),
        ((T, H),),
        tangent_twice=False,
    ),
    "MoEAuxLossAutoScaler": Case(
        lambda x: moe_utils.MoEAuxLossAutoScaler.apply(x.sin(), x.square().sum()),
        lambda x: WithLoss.apply(x.sin(), x.square().sum(), 1.0),
        ((T, H),),
        tangent_twice=False,
    ),
    "permute by map": Case(our_map, plain_map, ((T, H), (T, E))),
    "WeightedSwiGLUFunction": Case(
        lambda y, w: moe_utils.WeightedSwiGLUFunction.apply(y, w, False), plain_swiglu, ((T, 2 * I), (T, 1))
    ),
    "WeightedGEGLUFunction": Case(
        lambda y, w: moe_utils.WeightedGEGLUFunction.apply(y, w, False),
        lambda y, w: F.gelu(y[:, :I], approximate="tanh") * y[:, I:] * w,
        ((T, 2 * I), (T, 1)),
    ),
    "WeightedQuickGeGLUFunction": Case(
        lambda y, w: moe_utils.WeightedQuickGeGLUFunction.apply(y, w, False, 0.5),
        lambda y, w: y[:, :I] * (1.702 * y[:, :I]).sigmoid() * (y[:, I:] + 0.5) * w,
        ((T, 2 * I), (T, 1)),
    ),
    "WeightedBiasQuickGeGLUFunction": Case(
        lambda y, b, w: moe_utils.WeightedBiasQuickGeGLUFunction.apply(y, b, w, False, 0.5),
        lambda y, b, w: (y + b)[:, :I] * (1.702 * (y + b)[:, :I]).sigmoid() * ((y + b)[:, I:] + 0.5) * w,
        ((T, 2 * I), (2 * I,), (T, 1)),
    ),
}


def inputs_of(case, dtype=torch.float64, seed=1):
    return tuple(draw(seed + i, *shape, dtype=dtype) for i, shape in enumerate(case.shapes))


def total(f):
    return lambda *args: f(*args).sin().sum()  # curved, so that second derivatives are not zero where f is linear


FIRST_ORDER = {
    "grad": lambda f, args: func.grad(total(f), tuple(range(len(args))))(*args),
    "vjp": lambda f, args: func.vjp(f, *args)[1](torch.ones_like(f(*args)).cumsum(0)),
    "jacrev": lambda f, args: func.jacrev(f, tuple(range(len(args))))(*args),
    "jvp": lambda f, args: func.jvp(f, args, tuple(arg.cos() for arg in args)),
    "jacfwd": lambda f, args: func.jacfwd(f, tuple(range(len(args))))(*args),
    "vmap": lambda f, args: func.vmap(f)(*twice(args)),
    "vmap over the first": lambda f, args: func.vmap(lambda x: f(x, *args[1:]), in_dims=1, out_dims=-1)(
        torch.stack((args[0], args[0].sin(), -args[0]), 1)
    ),
    "per-sample gradients": lambda f, args: func.vmap(func.grad(total(f), tuple(range(len(args)))))(*twice(args)),
    "gradient of vmap": lambda f, args: func.grad(lambda *a: func.vmap(total(f))(*a).sum())(*twice(args)),
    "batched gradients": lambda f, args: batched_gradients(f, args),
    "dual numbers": lambda f, args: dual_tangent(f, args),
}
SECOND_ORDER = {
    "hessian": lambda f, args: func.hessian(total(f))(*args),
    "forward over forward": lambda f, args: func.jacfwd(func.jacfwd(total(f)))(*args),
    "forward over reverse, dual": lambda f, args: dual_over_reverse(f, args),
    "reverse over forward": lambda f, args: func.jacrev(func.jacfwd(total(f)))(*args),
}
REVERSE_TWICE = {
    "reverse over reverse": lambda f, args: func.jacrev(func.jacrev(total(f)))(*args),
    "gradient of a gradient": lambda f, args: func.grad(lambda *a: func.grad(total(f))(*a).sin().sum())(*args),
}


def twice(args):
    return tuple(torch.stack((arg, arg.cos())) for arg in args)


def batched_gradients(f, args):
    leaves = [arg.clone().requires_grad_() for arg in args]
    out = f(*leaves)
    directions = torch.stack((torch.ones_like(out), out.detach().cos()))
    return torch.autograd.grad(out, leaves, directions, is_grads_batched=True)


def dual_tangent(f, args):
    with fwd.dual_level():
        out = fwd.unpack_dual(f(*(fwd.make_dual(arg, arg.cos()) for arg in args)))
    return out.primal, out.tangent


def dual_over_reverse(f, args):
    with fwd.dual_level():
        duals = [fwd.make_dual(arg.clone().requires_grad_(), arg.cos()) for arg in args]
        grads = torch.autograd.grad(total(f)(*duals), duals, create_graph=True)
        return [fwd.unpack_dual(grad).tangent for grad in grads]


def assert_same(actual, expected, **tolerance):
    actual, expected = (torch.utils._pytree.tree_leaves(found) for found in (actual, expected))
    assert len(actual) == len(expected)
    for ours, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, plain, **tolerance)


@pytest.mark.parametrize("transform", [*FIRST_ORDER, *SECOND_ORDER])
@pytest.mark.parametrize("name", CASES)
def test_a_transform_of_an_operator_is_that_of_its_formula(name, transform):
    case, apply = CASES[name], (FIRST_ORDER | SECOND_ORDER)[transform]
    args = inputs_of(case)
    if transform == "forward over forward" and not case.tangent_twice:
        case = case._replace(plain=torch.sin)
    expected = apply(case.plain, args)
    assert any(leaf.abs().max() > 0 for leaf in torch.utils._pytree.tree_leaves(expected))
    assert_same(apply(case.ours, args), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", REVERSE_TWICE)
@pytest.mark.parametrize("name", CASES)
def test_reverse_mode_twice_is_right_or_an_error(name, transform):
    case, apply = CASES[name], REVERSE_TWICE[transform]
    args = inputs_of(case)
    with moekit.backend("torch"):
        if case.once:
            with pytest.raises(RuntimeError, match=case.once):
                apply(case.ours, args)
        else:
            assert_same(apply(case.ours, args), apply(case.plain, args), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", FIRST_ORDER)
@pytest.mark.parametrize("name", CASES)
def test_in_float32_on_each_backend(name, transform, backend):
    case, apply = CASES[name], FIRST_ORDER[transform]
    expected = torch.utils._pytree.tree_leaves(apply(case.plain, inputs_of(case)))
    # float32's plain result has the dtypes: PyTorch makes the tangent of a scalar times a number float64.
    dtypes = [leaf.dtype for leaf in torch.utils._pytree.tree_leaves(apply(case.plain, inputs_of(case, torch.float32)))]
    found = torch.utils._pytree.tree_leaves(apply(case.ours, inputs_of(case, torch.float32)))
    assert [leaf.dtype for leaf in found] == dtypes
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), plain, rtol=0, atol=1e-5 * max(1.0, float(plain.abs().max())))


def test_a_third_derivative_is_not_dropped():
    args = inputs_of(CASES["glu"])
    third = lambda f: func.grad(lambda y: func.grad(lambda y: func.grad(total(f))(y).sin().sum())(y).sin().sum())(*args)  # noqa: E731
    with moekit.backend("torch"):
        torch.testing.assert_close(third(moekit.glu), third(plain_swiglu), rtol=1e-10, atol=1e-12)


def test_routing_is_made_for_each_sample():
    """Per-sample gradients in which each sample has a routing of its own, made within the transform."""

    def ours(x, logits, gate_up, down):
        weights, indices = moekit.topk_router(logits, K, score_function="sigmoid")
        routing = moekit.Routing.from_topk(indices, weights, num_experts=E)
        rows = moekit.grouped_linear(moekit.permute(x, routing), gate_up, routing.offsets)
        out = moekit.unpermute(moekit.grouped_linear(moekit.glu(rows), down, routing.offsets), routing, weighted=True)
        return (out + moekit.experts(x, (indices, weights), gate_up, down)).sin().sum()

    def plain(x, logits, gate_up, down):
        chosen, indices = plain_top2(logits), logits.topk(K, 1).indices
        hidden = plain_swiglu(torch.einsum("th,tkoh->tko", x, gate_up[indices]))
        return (2 * torch.einsum("tk,tki,tkhi->th", chosen, hidden, down[indices])).sin().sum()

    shapes = ((3, T, H), (3, T, E), (E, 2 * I, H), (E, H, I))
    args = tuple(draw(7 + i, *shape, dtype=torch.float64) for i, shape in enumerate(shapes))
    each = lambda f: func.vmap(func.grad(f, (0, 1, 2, 3)), in_dims=(0, 0, None, None))(*args)  # noqa: E731
    assert_same(each(ours), each(plain), rtol=1e-10, atol=1e-12)


def test_what_each_sample_has_another_size_of_is_an_error():
    maps = torch.stack((MAP, torch.ones_like(MAP)))
    with pytest.raises(RuntimeError, match="equal size"):
        func.vmap(lambda routing_map: moe_utils.permute(torch.ones(T, H), routing_map)[0])(maps)


def test_values_are_checked_for_each_sample():
    indices = torch.stack((INDICES, INDICES + 7))
    with pytest.raises(ValueError, match="below 3"):
        func.vmap(lambda chosen: moekit.Routing.from_topk(chosen, num_experts=E).order)(indices)


def test_flops_of_the_products_are_counted():
    x, weights, gate_up, down = (arg.requires_grad_() for arg in inputs_of(CASES["experts"], torch.float32)[:4])
    rows = T * K
    with FlopCounterMode(display=False) as counter:
        out = moekit.experts(x, (INDICES, weights), gate_up, down)
    up, through = 2 * rows * H * 2 * I, 2 * rows * I * H
    assert counter.get_total_flops() == up + through
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * (up + through)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        moekit.grouped_linear(moekit.permute(x, ROUTING), gate_up, ROUTING.offsets)
    assert counter.get_total_flops() == up


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_grouped_linear_is_in_the_dtype_of_autocast(dtypes):
    rows, weight = (
        draw(1, T * K, H, dtype=dtypes[0]).requires_grad_(),
        draw(2, E, 2 * I, H, dtype=dtypes[1]).requires_grad_(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = moekit.grouped_linear(rows, weight, ROUTING.offsets)
        wide = moekit.grouped_linear(rows.double(), weight.double(), ROUTING.offsets)
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float64)
    torch.testing.assert_close(out.double(), plain_linear(rows.double(), weight.double()), rtol=2**-8, atol=0.02)
    out.sum().backward()
    assert (rows.grad.dtype, weight.grad.dtype) == dtypes


@pytest.mark.parametrize("name", ["glu", "experts", "unpermute, weighted", "topk_router"])
def test_compiled_transforms_are_those_of_eager_mode(name):
    case = CASES[name]
    args, f = inputs_of(case), total(case.ours)

    def all_of_them(*args):
        each = func.vmap(func.grad(f))(*(torch.stack((arg, arg)) for arg in args))
        return func.grad(f)(*args), each, func.jvp(f, args, args)[1]

    compiled = torch.compile(all_of_them, backend="aot_eager", fullgraph=True)
    assert_same(compiled(*args), all_of_them(*args), rtol=1e-12, atol=1e-12)
