"""``moekit.glu`` against formulas in plain torch."""

from __future__ import annotations

import functools

import pytest
import torch
from _reference import (
    BIASES,
    DTYPES,
    ENDS,
    EVERY_DTYPE,
    LAYOUTS,
    VARIANTS,
    Recorder,
    assert_matches_formula,
    assert_same,
    draw,
    dtypes,
    glu_formula,
    glu_inputs,
    interleaved,
    value_and_grads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import moekit
from moekit import _backend

pytestmark = pytest.mark.usefixtures("backend")


def bound(function, parameters):
    return functools.partial(function, **parameters)


def run(inputs, parameters, grad):
    """Value and gradients."""
    return value_and_grads(bound(moekit.glu, parameters), inputs, grad)


def check(inputs, parameters, grad, what=""):
    """Value and gradients against the formula."""
    assert_matches_formula(bound(moekit.glu, parameters), bound(glu_formula, parameters), inputs, grad, what)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradients(variant, bias, backend):
    for dtype in dtypes(variant, backend):
        for weights in (True, False):
            inputs, parameters, grad = glu_inputs(variant, bias, dtype, weights=weights, seed=7)
            check(inputs, parameters, grad, f"{dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_rows_round_once(dtype):
    """The bias gradient is reduced in float32: a sum in bfloat16 would stop growing after 256 rows."""
    for bias in ("vector", "experts"):
        inputs, parameters, _ = glu_inputs("silu", bias, dtype, num_rows=3000, width=4)
        if bias == "experts":
            parameters["offsets"] = torch.tensor([1, 2000, 2000, 3000])
        check(inputs, parameters, torch.ones(3000, 4, dtype=dtype), bias)


def test_weights_of_either_shape_and_any_leading_shape():
    for lead in [(), (5,), (2, 5), (2, 1, 5)]:
        y, grad = draw(1, *lead, 8), draw(2, *lead, 4)
        for shape in (lead, (*lead, 1)):
            inputs = {"y": y, "weights": draw(3, *shape)}
            check(inputs, {}, grad, f"{shape}")
            assert value_and_grads(moekit.glu, inputs, grad)[1]["weights"].shape == shape


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_stride_and_parameters(data):
    """Drawn shapes, strides and parameters."""
    variant, bias = data.draw(st.sampled_from(list(VARIANTS))), data.draw(st.sampled_from(BIASES[:3]))
    num_rows, width = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
    dtype = dtypes(variant, _backend.current())[1]
    inputs, parameters, grad = glu_inputs(variant, bias, dtype, num_rows=num_rows, width=width)
    if data.draw(st.booleans()):
        ends = sorted(data.draw(st.lists(st.integers(0, num_rows), min_size=1, max_size=4)))
        parameters["offsets"] = torch.tensor(ends)
        if inputs["bias"] is not None:
            inputs["bias"] = draw(5, len(ends), inputs["y"].shape[1], dtype=dtype)
    layouts = [LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))] for _ in range(4)]
    inputs = {name: x if x is None else lay(x) for (name, x), lay in zip(inputs.items(), layouts, strict=False)}
    check(inputs, parameters, layouts[3](grad), f"{parameters}")


def test_odd_sizes():
    one_of_seven = [0, 0, 7, 7, 7, 7, 7]
    for num_rows, width, ends in [(1, 1, [1]), (1, 3, [0, 1]), (7, 5, [7]), (7, 33, one_of_seven), (64, 31, [9])]:
        for dtype in (torch.float32, torch.bfloat16):
            inputs, parameters, grad = glu_inputs("quick_gelu", "none", dtype, num_rows=num_rows, width=width)
            inputs["bias"] = draw(9, len(ends), 2 * width, dtype=dtype)
            parameters["offsets"] = torch.tensor(ends)
            check(inputs, parameters, grad, f"{num_rows, width, ends}")


# --- nothing there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("variant", ["silu", "clamp-after-bias", "ungated-relu2"])
@pytest.mark.parametrize("fp8_store", [False, True])
def test_no_tokens(variant, bias, fp8_store, poisoned):
    inputs, parameters, grad = glu_inputs(variant, bias, torch.bfloat16, num_rows=0)
    if bias == "experts":
        parameters["offsets"] = torch.zeros(4, dtype=torch.int32)
    out, grads = run(inputs, {**parameters, "fp8_store": fp8_store}, grad)
    assert out.shape == (0, 6) and out.dtype is torch.bfloat16
    for name, gradient in grads.items():
        assert gradient.shape == inputs[name].shape and gradient.dtype is inputs[name].dtype
        assert not gradient.any() and not gradient.isnan().any()


@pytest.mark.parametrize("bias", ["none", "experts"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_past_the_last_offset_are_zero(variant, bias, backend, poisoned):
    """Such rows hold whatever a grouped GEMM left there. Twice, as dirty memory comes with the second step."""
    for dtype in dtypes(variant, backend):
        inputs, parameters, grad = glu_inputs(variant, bias, dtype)
        parameters["offsets"] = torch.tensor(ENDS, dtype=torch.int32)
        clean = run(inputs, parameters, grad)
        inputs["y"][9:] = torch.tensor([float("nan"), float("inf")], dtype=dtype).unsqueeze(1)
        inputs["weights"][9:] = float("nan")
        grad[9:] = float("nan")
        for _ in range(2):
            out, grads = run(inputs, parameters, grad)
            assert_same(out, clean[0], "value")
            for name, gradient in grads.items():
                assert_same(gradient, clean[1][name], name)
            assert not out[9:].any() and not grads["y"][9:].any() and not grads["weights"][9:].any()


def test_no_row_belongs_to_an_expert():
    for offsets in (torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)):
        inputs, parameters, grad = glu_inputs("silu", "none", torch.float32)
        inputs["bias"] = torch.ones(len(offsets), 12)
        out, grads = run(inputs, {**parameters, "offsets": offsets}, grad)
        assert not out.any()
        for name, gradient in grads.items():
            assert gradient.shape == inputs[name].shape and not gradient.any()


def test_an_expert_without_rows_has_no_bias_gradient(poisoned):
    inputs, parameters, grad = glu_inputs("clamp-before-bias", "experts", torch.bfloat16)
    _, grads = run(inputs, parameters, grad)
    assert not grads["bias"][[0, 2]].any() and grads["bias"][[1, 3]].any(1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_that_was_not_written_is_not_read(variant, backend, poisoned):
    for bias in BIASES:
        for fp8_store in sorted({False, backend == "torch" or variant in EVERY_DTYPE}):
            inputs, parameters, grad = glu_inputs(variant, bias, torch.bfloat16)
            out, grads = run(inputs, {**parameters, "fp8_store": fp8_store}, grad)
            for name, tensor in {"out": out, **grads}.items():
                assert not tensor.isnan().any(), (name, bias, fp8_store)


# --- layout of memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["embedded", "transposed"])
@pytest.mark.parametrize("bias", BIASES)
def test_strided_is_the_same_as_contiguous(layout, bias, backend):
    for variant in ("silu", "clamp-after-bias", "ungated-silu"):
        for dtype in dtypes(variant, backend):
            inputs, parameters, grad = glu_inputs(variant, bias, dtype)
            out, grads = run(inputs, parameters, grad)
            laid = {name: None if x is None else LAYOUTS[layout](x) for name, x in inputs.items()}
            if bias == "experts":
                parameters["offsets"] = LAYOUTS[layout](parameters["offsets"])
            laid_out, laid_grads = run(laid, parameters, LAYOUTS[layout](grad))
            assert_same(laid_out, out, "value")
            for name, gradient in grads.items():
                assert_same(laid_grads[name], gradient, name)


def test_chunk_views():
    """Halves of a fused projection: each row of the view lies inside a wider one."""
    wide = draw(1, 9, 24, dtype=torch.bfloat16)
    for part in wide.chunk(2, dim=-1):
        assert_same(moekit.glu(part), moekit.glu(part.contiguous()))
    batch = draw(2, 3, 5, 8, dtype=torch.float32).transpose(0, 1)
    assert_same(moekit.glu(batch), moekit.glu(batch.contiguous()))


@pytest.mark.parametrize("bias", BIASES)
def test_expanded_gradient(bias):
    inputs, parameters, _ = glu_inputs("clamp-before-bias", bias, torch.bfloat16)
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in inputs.items()}
    moekit.glu(**leaves, **parameters).sum().backward()
    _, grads = run(inputs, parameters, torch.ones(11, 6))
    for name, gradient in grads.items():
        assert_same(leaves[name].grad, gradient, name)


def test_interleaved_is_concatenated_with_converted_weights():
    for variant in ("silu", "gelu_tanh", "clamp-before-bias"):
        for bias in BIASES:
            inputs, parameters, grad = glu_inputs(variant, bias, torch.bfloat16)
            out, grads = run(inputs, parameters, grad)
            pairs = {
                name: x if name == "weights" or x is None else interleaved(x).contiguous() for name, x in inputs.items()
            }
            pair_out, pair_grads = run(pairs, {**parameters, "layout": "interleaved"}, grad)
            assert_same(pair_out, out, "value")
            for name, gradient in grads.items():
                assert_same(pair_grads[name], gradient if name == "weights" else interleaved(gradient), name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_own_their_memory(variant):
    inputs, parameters, grad = glu_inputs(variant, "rows", torch.bfloat16)
    out, grads = run(inputs, parameters, grad)
    tensors = [*inputs.values(), grad, out, *grads.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scales(variant, scale, backend):
    for dtype in dtypes(variant, backend)[1:]:
        inputs, parameters, grad = glu_inputs(variant, "vector", dtype, scale=scale, width=32)
        check(inputs, parameters, grad, f"{dtype}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gates_far_out(variant, backend):
    """Finite where the true value is."""
    for dtype in dtypes(variant, backend)[1:]:
        check_gates_far_out(variant, dtype)


def check_gates_far_out(variant, dtype):
    """For ReLU squared, whose slope doubles the gate, half of the largest."""
    largest = torch.finfo(dtype).max / (2 if "relu2" in variant else 1)
    gate = torch.tensor([100.0, -100.0, largest, -largest, largest / 2, -largest / 2, 1e4, -1e4], dtype=dtype)
    inputs, parameters, _ = glu_inputs(variant, "none", dtype, num_rows=8, width=1)
    index = (slice(None), 0)
    inputs["y"][index] = gate
    inputs["weights"].fill_(0.5)
    if inputs["y"].shape[1] == 2:
        inputs["y"][:, 1] = 0.25
    check(inputs, parameters, torch.ones(8, 1, dtype=dtype), f"{dtype}")


def test_gates_at_the_largest_float64():
    """Where the formula itself would overflow: the gate is open or shut."""
    largest = torch.finfo(torch.float64).max
    y = torch.tensor([[largest, 0.25], [-largest, 0.25]], dtype=torch.float64)
    for activation in ("silu", "quick_gelu", "gelu_tanh", "gelu", "relu"):
        out, grads = value_and_grads(
            bound(moekit.glu, {"activation": activation}), {"y": y}, torch.ones(2, 1, dtype=torch.float64)
        )
        assert out.tolist() == [[largest / 4], [0.0]]
        assert grads["y"].tolist() == [[0.25, largest], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamp_passes_the_gradient_at_its_boundary(dtype):
    """As ``torch.clamp`` up to 2.13: at the limit and inside, not beyond. The gate has no lower limit."""
    y = torch.tensor([[0.5, 0.5], [0.5625, 0.5625], [-0.5, -0.5], [-9.0, -0.5625], [0.25, 0.0]], dtype=dtype)
    inputs, grad = {"y": y, "bias": torch.zeros(2, dtype=dtype)}, torch.ones(5, 1, dtype=dtype)
    for after in (False, True):
        parameters = {"clamp": 0.5, "clamp_after_bias": after}
        check(inputs, parameters, grad)
        _, grads = run(inputs, parameters, grad)
        assert (grads["y"] != 0).tolist() == [[1, 1], [0, 0], [1, 1], [1, 0], [0, 1]]


def test_each_gradient_keeps_its_dtype():
    """bfloat16 rows, float32 weights and a float16 bias: what moves between them is not rounded in between."""
    for weight_dtype in (torch.float32, torch.float64):
        inputs, parameters, grad = glu_inputs("quick_gelu-alpha-offset", "vector", torch.bfloat16)
        inputs["weights"] = torch.rand(11, dtype=weight_dtype, generator=torch.Generator().manual_seed(0))
        inputs["bias"] = inputs["bias"].half()
        out, grads = run(inputs, parameters, grad)
        assert out.dtype is torch.bfloat16
        assert [grads[name].dtype for name in inputs] == [torch.bfloat16, weight_dtype, torch.float16]
        check(inputs, parameters, grad)


def test_autocast_changes_nothing():
    for dtype, weight_dtype in [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]:
        inputs, parameters, grad = glu_inputs("silu", "vector", dtype)
        inputs["weights"] = inputs["weights"].to(weight_dtype)
        out, grads = run(inputs, parameters, grad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast_out, cast_grads = run(inputs, parameters, grad)
        assert_same(cast_out, out)
        for name, gradient in grads.items():
            assert_same(cast_grads[name], gradient, name)


# --- autograd -------------------------------------------------------------------------------------------------------


def far_from_kinks(variant, bias):
    """Small float64 inputs at which a step of gradcheck's size crosses no kink of ReLU or clamp."""
    for seed in range(0, 4000, 4):
        num_rows = 10 if bias == "experts" else 3
        inputs, parameters, grad = glu_inputs(variant, bias, num_rows=num_rows, width=2, seed=seed)
        y, added = inputs["y"], inputs["bias"]
        if bias == "experts":
            added = added.repeat_interleave(torch.tensor([0, 5, 0, 4]), 0)
            y = y[:9]
        total = y if added is None else y + added
        limits = [0.0, *(s * parameters["clamp"] for s in (1, -1) if "clamp" in parameters)]
        if all((x.abs() - abs(limit)).abs().min() > 1e-4 for x in (y, total) for limit in limits):
            return inputs, parameters, grad
    raise AssertionError("no inputs found")


@pytest.mark.reference_only("float64 is computed by the reference on every backend")
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_and_gradgradcheck(variant, bias, backend):
    inputs, parameters, grad = far_from_kinks(variant, bias)
    names = [name for name, x in inputs.items() if x is not None]
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*tensors):
        return moekit.glu(**dict(zip(names, tensors, strict=True)), **parameters)

    assert gradcheck(function, leaves, fast_mode=bias == "experts")
    assert gradgradcheck(function, leaves, grad.requires_grad_(), fast_mode=True)


def double_backward(**parameters):
    y, weights = draw(0, 4, 6, dtype=torch.float32).requires_grad_(), draw(1, 4, dtype=torch.float32).requires_grad_()
    out = moekit.glu(y, weights, **parameters)
    (first,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
    return torch.autograd.grad(first.square().sum(), [y, weights])


def test_double_backward_says_where_it_exists(backend):
    if backend == "torch":
        assert all(gradient.isfinite().all() for gradient in double_backward())
    else:
        with pytest.raises(RuntimeError, match=r"moekit\.glu: double backward .*'torch' backend"):
            double_backward()
    advice = "fp8_store=False" if backend == "torch" else r"moekit\.backend\('torch'\)"
    with pytest.raises(RuntimeError, match=rf"moekit\.glu: double backward .*'torch' backend.*{advice}"):
        double_backward(fp8_store=True)


@pytest.mark.parametrize("fp8_store", [False, True])
def test_backward_twice(fp8_store):
    """Two backwards give the same bits and leave inputs, upstream gradient and saved tensors as they were."""
    inputs, parameters, grad = glu_inputs("clamp-after-bias", "experts", torch.bfloat16)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append((x, x.clone())) or x, lambda x: x):
        out = moekit.glu(**leaves, **parameters, fp8_store=fp8_store)
    given = grad.clone()
    first = torch.autograd.grad(out, list(leaves.values()), given, retain_graph=True)
    second = torch.autograd.grad(out, list(leaves.values()), given)
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)
    assert_same(given, grad)
    for name, leaf in leaves.items():
        assert_same(leaf.detach(), inputs[name], name)
    assert saved
    for tensor, copy in saved:
        assert torch.equal(tensor.detach().view(torch.uint8), copy.detach().view(torch.uint8))


@pytest.mark.parametrize("needed", [("y",), ("weights",), ("bias",), ("y", "bias"), ("y", "weights", "bias")])
def test_gradients_nobody_needs_are_not_computed(needed):
    inputs, parameters, grad = glu_inputs("clamp-before-bias", "vector", torch.bfloat16)
    leaves = {name: x.clone().requires_grad_(name in needed) for name, x in inputs.items()}
    out = moekit.glu(**leaves, **parameters)
    with Recorder() as recorder:
        out.backward(grad)
    (results,) = recorder.results("glu_backward")
    _, grads = run(inputs, parameters, grad)
    for name, result in zip(("y", "weights", "bias"), results, strict=False):
        if name in needed:
            assert_same(leaves[name].grad, grads[name], name)
        else:
            assert leaves[name].grad is None and result.numel() == 0
    assert results[3].numel() == 0  # the forward's output again: for other callers


def test_nothing_is_kept_when_no_gradient_is_wanted():
    inputs, parameters, _ = glu_inputs("silu", "vector", torch.float32)
    assert moekit.glu(**inputs, **parameters).grad_fn is None
    with torch.no_grad():
        assert moekit.glu(inputs["y"].requires_grad_()).grad_fn is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    for num_rows in (11, 0):
        for fp8_store in (False, True):
            inputs, parameters, grad = glu_inputs("silu", "vector", torch.bfloat16, num_rows=num_rows)
            _, grads = run(inputs, {**parameters, "fp8_store": fp8_store}, grad)
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}

            def block(y, weights, bias, fp8_store=fp8_store):
                return moekit.glu(y, weights, bias=bias, fp8_store=fp8_store)

            checkpoint(block, *leaves.values(), use_reentrant=use_reentrant).backward(grad)
            for name, gradient in grads.items():
                assert_same(leaves[name].grad, gradient, name)
