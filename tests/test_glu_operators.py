"""The gated activation as an operator: float8 store, checks, opcheck, compilation, determinism."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from _interpreter import RUNS
from _reference import (
    BIASES,
    EVERY_DTYPE,
    LAYOUTS,
    VARIANTS,
    assert_accurate,
    assert_matches_formula,
    assert_same,
    doubled,
    draw,
    dtypes,
    glu_formula,
    glu_inputs,
    opcheck,
    value_and_grads,
)

import moekit
from moekit import moe_utils
from moekit.ops._activations import ACTIVATIONS, make_glu

pytestmark = pytest.mark.usefixtures("backend")


def operands(variant, bias="none", dtype=torch.bfloat16, layout="contiguous", requires_grad=True, **sizes):
    """The arguments of ``torch.ops.moekit.glu`` and an upstream gradient."""
    inputs, parameters, grad = glu_inputs(variant, bias, dtype, **sizes)
    offsets = parameters.pop("offsets", None)
    lay = LAYOUTS[layout]
    tensors = [None if x is None else lay(x).requires_grad_(requires_grad) for x in inputs.values()]
    return (*tensors, offsets, *make_glu(**parameters)), lay(grad).requires_grad_(requires_grad)


# --- float8 store ---------------------------------------------------------------------------------------------------


def stored(y):
    """What the operator keeps of ``y``: float8 rows and their scales."""
    _, rows, scale = torch.ops.moekit.glu_fp8(y, None, None, None, *make_glu())
    assert rows.dtype is torch.float8_e4m3fn and rows.shape == y.shape
    assert scale.dtype is (torch.float64 if y.dtype is torch.float64 else torch.float32)
    return rows, scale


def rows_of_all_sizes(dtype):
    """One row for each power of two that the dtype has, and rows at the ends of its range."""
    info = torch.finfo(dtype)
    lowest, highest = (int(torch.tensor(x, dtype=torch.float64).log2()) for x in (info.smallest_normal, info.max))
    pattern = torch.tensor([1.0, -0.8125, 0.4375, 0.1, -0.0625, 0.03, 1e-4, 0.0], dtype=torch.float64)
    powers = torch.arange(lowest, highest, dtype=torch.float64).exp2()
    special = torch.tensor([0.0, info.max, info.smallest_normal, info.tiny * info.eps], dtype=torch.float64)
    at_will = [torch.tensor([size], dtype=torch.float64) for size in (1e-30, 1e30) if size < info.max]
    return (torch.cat([powers, special, *at_will]).unsqueeze(1) * pattern).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_float8_rows(dtype):
    y = rows_of_all_sizes(dtype)
    rows, scale = stored(y)
    assert ((scale > 0) & scale.isfinite()).all()
    assert (torch.frexp(scale).mantissa == 0.5).all()  # powers of two
    restored, true = (rows.to(scale.dtype) * scale.unsqueeze(1)).double(), y.double()
    assert restored.isfinite().all()
    assert not restored[true == 0].any()
    error, in_units = (restored - true).abs(), true.abs() / scale.double().unsqueeze(1)
    normal = in_units >= 2**-6  # the smallest normal number of e4m3
    assert (error[normal] <= 2**-4 * true.abs()[normal]).all()
    assert (error <= 2**-10 * scale.double().unsqueeze(1) + 2**-4 * true.abs()).all()
    # The scale leaves nothing to spare: a row's largest element lies in the top octave of e4m3's range.
    top = in_units.amax(1)
    assert (top <= 448).all() and (top[true.abs().amax(1) > 1e-30] > 224).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_float8_gradients_are_those_of_the_stored_rows(variant, backend):
    """Forward is that of the rows themselves; backward is exact for the rows that were kept."""
    # A kernel reads float8 rows as it reads others, and each combination costs a compilation: one dtype for most.
    fewer = backend != "torch" and variant not in (*EVERY_DTYPE, "ungated-relu2")
    for bias in BIASES[:1] if fewer else BIASES:
        for dtype in dtypes(variant, backend)[1:]:
            inputs, parameters, grad = glu_inputs(variant, bias, dtype, scale=1e-3)
            glu = functools.partial(moekit.glu, fp8_store=True, **parameters)
            out, grads = value_and_grads(glu, inputs, grad)
            assert_same(out, moekit.glu(**inputs, **parameters), "value")
            rows, scale = stored(inputs["y"])
            kept = doubled({**inputs, "y": rows.double() * scale.double().unsqueeze(1)})
            _, expected = value_and_grads(functools.partial(glu_formula, **parameters), kept, grad.double())
            for name, gradient in grads.items():
                assert gradient.dtype is inputs[name].dtype
                assert_accurate(gradient, expected[name], work=torch.float32, what=f"{name}, {bias}")


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3])
def test_float8_gradients_are_close_at_any_scale(scale):
    """A cast without a scale gives 56% at 1e-3 and NaN past 448."""
    y = draw(0, 64, 32, dtype=torch.float32) * scale
    inputs, grad = {"y": y, "weights": draw(1, 64, dtype=torch.float32)}, draw(2, 64, 16, dtype=torch.float32)
    _, exact = value_and_grads(moekit.glu, inputs, grad)
    _, found = value_and_grads(functools.partial(moekit.glu, fp8_store=True), inputs, grad)
    for name in exact:
        assert (found[name] - exact[name]).norm() <= 0.05 * exact[name].norm(), name


def test_float8_row_that_is_not_finite_stays_alone():
    y = draw(0, 3, 8, dtype=torch.float32)
    y[1, 0], y[1, 1] = float("nan"), float("inf")
    rows, scale = stored(y)
    assert scale[1] == 1 and rows[1, 0].isnan()
    for row in (0, 2):
        alone, own_scale = stored(y[row : row + 1])
        assert torch.equal(rows[row].view(torch.uint8), alone[0].view(torch.uint8)) and scale[row] == own_scale


def test_float8_store_keeps_no_wide_rows():
    def kept(fp8_store):
        y, sizes = draw(0, 32, 64, dtype=torch.bfloat16).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            moekit.glu(y, draw(1, 32, dtype=torch.bfloat16), fp8_store=fp8_store)
        return sum(sizes)

    assert kept(False) == 32 * 64 * 2 + 32 * 2
    assert kept(True) == 32 * 64 + 32 * 4 + 32 * 2


# --- checks ---------------------------------------------------------------------------------------------------------

Y = torch.zeros(3, 8)
ERRORS = [
    ((torch.zeros(3, 7),), {}, ValueError, r"y must be of an even last dimension .*, got shape \[3, 7\]"),
    ((torch.zeros(()),), {}, ValueError, r"y must be a tensor of at least one dimension, got a scalar"),
    ((Y.long(),), {}, TypeError, r"y must be a floating-point tensor, got torch.int64"),
    (([1.0, 2.0],), {}, TypeError, r"y must be a tensor, got list"),
    ((Y, torch.zeros(4)), {}, ValueError, r"weights must be .*\[3, 8\]: shape \[3\] or \[3, 1\], got shape \[4\]"),
    ((Y, torch.zeros(1, 3)), {}, ValueError, r"weights must be .* got shape \[1, 3\]"),
    ((Y, torch.zeros(3).int()), {}, TypeError, r"weights must be a floating-point tensor, got torch.int32"),
    ((Y,), {"bias": torch.zeros(7)}, ValueError, r"bias must be of shape \[8\] or \[3, 8\] .*, got shape \[7\]"),
    ((Y,), {"bias": torch.zeros(2, 8)}, ValueError, r"bias must be .* \(one for each expert needs offsets\), got"),
    ((Y,), {"bias": torch.zeros(8).int()}, TypeError, r"bias must be a floating-point tensor, got torch.int32"),
    (
        (Y,),
        {"bias": torch.zeros(3, 8), "offsets": torch.tensor([1, 3])},
        ValueError,
        r"bias must be of shape \[experts, features\] = \[2, 8\], got shape \[3, 8\]",
    ),
    ((Y,), {"offsets": torch.zeros(2)}, TypeError, r"offsets must be an int32 or int64 tensor, got torch.float32"),
    ((Y,), {"offsets": torch.zeros(2, 1).int()}, ValueError, r"offsets must be a 1-D tensor, got shape \[2, 1\]"),
    ((Y,), {"activation": "swish"}, ValueError, r"activation must be one of 'silu', 'quick_gelu', .*, got 'swish'"),
    ((Y,), {"layout": "mixed"}, ValueError, r"layout must be one of 'concatenated', .*, got 'mixed'"),
    ((Y,), {"clamp": -1.0}, ValueError, r"clamp must be None or at least 0, got -1.0"),
    ((Y,), {"clamp": float("nan")}, ValueError, r"clamp must be None or at least 0, got nan"),
    ((Y,), {"clamp": "7"}, TypeError, r"clamp must be a number, got str"),
    ((Y,), {"alpha": True}, TypeError, r"alpha must be a number, got bool"),
    ((Y,), {"linear_offset": torch.ones(())}, TypeError, r"linear_offset must be a number, got Tensor"),
    ((Y,), {"layout": "ungated", "clamp": 1.0}, ValueError, r"linear_offset and clamp must be left out for an ungated"),
    ((Y,), {"alpha": 1.702}, ValueError, r"alpha=1.702 has no effect on activation='silu'; leave it out"),
    ((Y,), {"clamp_after_bias": True}, ValueError, r"clamp_after_bias=True has no effect without clamp; leave it out"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "text"), ERRORS, ids=[error[3][:30] for error in ERRORS])
def test_errors_name_operation_argument_wanted_and_got(args, kwargs, error, text):
    with pytest.raises(error, match=rf"^moekit\.glu: {text}"):
        moekit.glu(*args, **kwargs)


def test_errors_name_who_was_called():
    """Whatever looks the constants up."""
    g, w = torch.ones(3, 4), torch.ones(3, 1)
    for name, call in {
        "quick_gelu": lambda: moe_utils.quick_gelu(Y, alpha="1"),
        "weighted_bias_quick_geglu_impl": lambda: moe_utils.weighted_bias_quick_geglu_impl(Y, None, w, clamp_value="1"),
        "quick_geglu_back": lambda: moe_utils.quick_geglu_back(g, Y, "1"),
        "experts": lambda: make_glu("swiglu", op="experts"),
    }.items():
        with pytest.raises((TypeError, ValueError), match=rf"^moekit\.{name}: "):
            call()


# --- every backend has every activation -----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_row_of_the_table_is_computed(activation):
    """By every backend, forward and backward: a new one fails until all have it, and ``_reference`` its formula."""
    constants = {"alpha": 0.7} if activation == "quick_gelu" else {}
    for layout in ("concatenated", "ungated"):
        inputs = {"y": draw(1, 9, 8, dtype=torch.float32, scale=3.0), "weights": draw(2, 9, dtype=torch.float32)}
        parameters = {"activation": activation, "layout": layout, **constants}
        grad = draw(3, 9, 8 if layout == "ungated" else 4, dtype=torch.float32)
        glu, formula = (functools.partial(function, **parameters) for function in (moekit.glu, glu_formula))
        assert_matches_formula(glu, formula, inputs, grad, f"{activation}, {layout}")
    assert any(variant.get("activation", "silu") == activation for variant in VARIANTS.values())


def test_an_activation_that_a_backend_lacks_is_not_taken_for_another(backend, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "made_up", ("made_up", 1.0, 0.0))
    y, owner = torch.ones(3, 8), {"torch": "the references"}.get(backend, f"the {backend} kernels")
    message = f"moekit: {owner} have no activation 'made_up', only '"
    for options in ({}, {"layout": "ungated"}, {"fp8_store": True}, {"bias": torch.ones(8)}):
        with pytest.raises(ValueError, match=message):
            moekit.glu(y, activation="made_up", **options)
    constants = make_glu("made_up")
    for scale, rows in ((None, y), (torch.ones(3), y.to(torch.float8_e4m3fn))):
        with pytest.raises(ValueError, match=message):
            torch.ops.moekit.glu_backward(
                torch.ones(3, 4), rows, scale, None, None, None, *constants, [True, True, False, False]
            )
    routing, weight = moekit.Routing.from_topk(torch.tensor([[0]] * 3), torch.ones(3, 1), num_experts=1), torch.ones(1, 8, 8)
    with pytest.raises(ValueError, match=message):
        moekit.experts(y, routing, weight, weight[:, :, :4], activation="made_up")


def test_a_layout_that_a_backend_lacks_is_not_taken_for_another():
    args = (torch.ones(3, 8), None, None, None, *make_glu()._replace(layout="made_up"))
    with pytest.raises(ValueError, match=r"layout .*'made_up'"):
        torch.ops.moekit.glu(*args)
    with pytest.raises(ValueError, match=r"layout .*'made_up'"):
        torch.ops.moekit.glu_backward(torch.ones(3, 4), args[0], None, *args[1:], [True, False, False, False])


def test_mixed_devices():
    others = {
        "weights": torch.zeros(3, device="meta"),
        "bias": torch.zeros(8, device="meta"),
        "offsets": torch.tensor([3], device="meta"),
    }
    for name, value in others.items():
        with pytest.raises(ValueError, match=rf"moekit\.glu: {name} must be on the device of y \(cpu\), got meta"):
            moekit.glu(Y, **{name: value})
    with pytest.raises(ValueError, match=r"weights must be on the device of y \(meta\), got cpu"):
        moekit.glu(Y.to("meta"), torch.zeros(3))


def test_meta_tensors_give_shapes():
    for fp8_store in (False, True):
        y = torch.zeros(2, 3, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
        out = moekit.glu(y, torch.zeros(2, 3, device="meta"), fp8_store=fp8_store)
        assert out.shape == (2, 3, 4) and out.dtype is torch.bfloat16 and out.device.type == "meta"
        (grad,) = torch.autograd.grad(out, y, out)
        assert grad.shape == y.shape and grad.device.type == "meta"


# --- operators and compilation --------------------------------------------------------------------------------------

# Opcheck's other checks calculate with every tensor they meet, which torch cannot do with float8.
FOR_FLOAT8 = {"test_utils": ("test_autograd_registration", "test_faketensor")}
# Opcheck sums all outputs to go back, which the gradients of ours that nobody wanted do not take part in.
FORWARD_ONLY = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("variant", "bias"), [("silu", "none"), ("clamp-after-bias", "experts"), ("relu2", "vector")])
def test_opcheck(variant, bias, layout):
    (y, *others), grad = operands(variant, bias, layout=layout)
    opcheck(torch.ops.moekit.glu.default, (y, *others))
    for wanted in ([True, True, True, True], [False, True, False, False]):
        args = (grad, y, None, *others, wanted)
        torch.library.opcheck(torch.ops.moekit.glu_backward.default, args, **FORWARD_ONLY)
    torch.library.opcheck(torch.ops.moekit.glu_fp8.default, (y, *others), **FOR_FLOAT8)
    rows, scale = torch.ops.moekit.glu_fp8(y, *others)[1:]
    args = (grad, rows, scale, *others, [True] * 4)
    torch.library.opcheck(torch.ops.moekit.glu_backward.default, args, **FOR_FLOAT8)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck_without_rows(requires_grad):
    (y, *others), grad = operands("silu", "vector", num_rows=0, requires_grad=requires_grad)
    opcheck(torch.ops.moekit.glu.default, (y, *others))
    torch.library.opcheck(torch.ops.moekit.glu_fp8.default, (y, *others), **FOR_FLOAT8)
    args = (grad, y, None, *others, [True] * 4)
    torch.library.opcheck(torch.ops.moekit.glu_backward.default, args, **FORWARD_ONLY)


@pytest.mark.reference_only("double backward exists on the 'torch' backend only")
def test_opcheck_of_backward_with_its_own_gradient(backend):
    (y, *others), grad = operands("clamp-before-bias", "rows")
    torch.library.opcheck(torch.ops.moekit.glu_backward.default, (grad, y, None, *others, [True, True, True, False]))


def counting_compile(function):
    """The compiled function and its counter of compilations."""
    from torch._dynamo.testing import CompileCounterWithBackend  # takes a second to import

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def assert_compiled_is_eager(compiled, function, inputs, grad):
    out, grads = value_and_grads(function, inputs, grad)
    compiled_out, compiled_grads = value_and_grads(compiled, inputs, grad)
    assert_same(compiled_out, out, "value")
    for name, gradient in grads.items():
        assert_same(compiled_grads[name], gradient, name)


@pytest.mark.parametrize("fp8_store", [False, True])
def test_compile_for_any_number_of_rows(fp8_store):
    def function(y, weights, bias):
        return moekit.glu(y, weights, bias=bias, activation="quick_gelu", linear_offset=1.0, fp8_store=fp8_store)

    compiled, counter = counting_compile(function)
    for num_rows in (11, 7, 64, 3, 30):
        inputs, _, grad = glu_inputs("silu", "vector", torch.bfloat16, num_rows=num_rows)
        assert_compiled_is_eager(compiled, function, inputs, grad)
    assert counter.frame_count <= 2


def test_compile_for_any_routing():
    def function(y, weights, bias, offsets):
        return moekit.glu(y, weights, bias=bias, offsets=offsets, clamp=0.75)

    compiled, counter = counting_compile(function)
    for num_rows, ends in [(11, [0, 5, 5, 9]), (9, [9, 9, 9, 9]), (40, [1, 2, 3, 40]), (12, [0, 0, 0, 0])]:
        inputs, _, grad = glu_inputs("silu", "experts", torch.float32, num_rows=num_rows)
        inputs["offsets"] = torch.tensor(ends)
        assert_compiled_is_eager(compiled, function, inputs, grad)
    assert counter.frame_count <= 2


@pytest.mark.reference_only("the compiled graph calls the same operator")
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
def test_compile_with_inductor(backend):

    def function(y, weights):
        return moekit.glu(y, weights)

    torch._dynamo.reset()
    inputs, _, grad = glu_inputs("silu", "none", torch.float32)
    del inputs["bias"]
    assert_compiled_is_eager(torch.compile(function, fullgraph=True), function, inputs, grad)


# --- determinism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
def test_twenty_runs_are_bit_equal(bias):
    inputs, parameters, grad = glu_inputs("clamp-after-bias", bias, torch.bfloat16, num_rows=700, width=32)
    if bias == "experts":
        parameters["offsets"] = torch.tensor([0, 300, 301, 690])
    runs = [value_and_grads(functools.partial(moekit.glu, **parameters), inputs, grad) for _ in range(RUNS)]
    for out, grads in runs[1:]:
        assert_same(out, runs[0][0], "value")
        for name, gradient in grads.items():
            assert_same(gradient, runs[0][1][name], name)


def test_a_row_alone_is_a_row_in_a_batch():
    for width in (6, 33):
        inputs, parameters, grad = glu_inputs("gelu_tanh", "rows", torch.bfloat16, width=width)
        out, grads = value_and_grads(functools.partial(moekit.glu, **parameters), inputs, grad)
        for row in range(11):
            here = slice(row, row + 1)
            alone = {name: x[here] for name, x in inputs.items()}
            row_out, row_grads = value_and_grads(functools.partial(moekit.glu, **parameters), alone, grad[here])
            assert_same(row_out, out[here], "value")
            for name, gradient in row_grads.items():
                assert_same(gradient, grads[name][here], name)
