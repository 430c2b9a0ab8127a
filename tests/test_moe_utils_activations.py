"""The drop-in activations: published conventions, and each decision where moekit departs from them."""

from __future__ import annotations

import functools

import pytest
import torch
from _reference import (
    DTYPES,
    LAYOUTS,
    Recorder,
    assert_accurate,
    assert_matches_formula,
    assert_same,
    doubled,
    draw,
    glu_formula,
    value_and_grads,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from moekit import moe_utils as ours

pytestmark = pytest.mark.usefixtures("backend")

QUICK = {"activation": "quick_gelu"}
UNGATED = {"activation": "quick_gelu", "layout": "ungated"}
GELU = {"activation": "gelu_tanh"}
OFFSET = {"linear_offset": 1.001}  # bfloat16 would make it 1
N, I = 11, 6


def inputs(*names, dtype=torch.float64, weight_dtype=None, num_rows=N, width=I):
    """Tensors by argument name, as a function takes them."""
    made = {
        "y": draw(1, num_rows, 2 * width, dtype=dtype),
        "input": draw(1, num_rows, 2 * width, dtype=dtype),
        "bias": draw(2, num_rows, 2 * width, dtype=dtype),
        "weights": draw(3, num_rows, 1, dtype=weight_dtype or dtype),
        "g": draw(4, num_rows, width, dtype=dtype),
    }
    return {name: made[name] for name in names}


def formula(parameters, y_name="y"):
    """The formula with the drop-in's argument names."""

    def function(**tensors):
        return glu_formula(tensors.pop(y_name), **tensors, **parameters)

    return function


# name: (function, its tensors, the formula's parameters)
UNWEIGHTED = {
    "swiglu": (ours.swiglu, {}),
    "geglu": (ours.geglu, GELU),
    "quick_gelu": (ours.quick_gelu, UNGATED),
    "quick_gelu-alpha": (functools.partial(ours.quick_gelu, alpha=0.9), {**UNGATED, "alpha": 0.9}),
    "quick_geglu": (ours.quick_geglu, QUICK),
    "quick_geglu-offset": (functools.partial(ours.quick_geglu, **OFFSET), {**QUICK, **OFFSET}),
}
WEIGHTED = {
    "weighted_swiglu": (ours.weighted_swiglu, {}),
    "weighted_geglu": (ours.weighted_geglu, GELU),
    "weighted_quick_geglu": (ours.weighted_quick_geglu, QUICK),
    "weighted_quick_geglu-offset": (functools.partial(ours.weighted_quick_geglu, **OFFSET), {**QUICK, **OFFSET}),
}
BACK = {
    "swiglu_back": (ours.swiglu_back, {}),
    "geglu_back": (ours.geglu_back, GELU),
    "quick_geglu_back": (ours.quick_geglu_back, QUICK),
    "quick_geglu_back-offset": (functools.partial(ours.quick_geglu_back, **OFFSET), {**QUICK, **OFFSET}),
}
WEIGHTED_BACK = {
    "weighted_swiglu_back": (ours.weighted_swiglu_back, {}),
    "weighted_geglu_back": (ours.weighted_geglu_back, GELU),
    "weighted_quick_geglu_back": (ours.weighted_quick_geglu_back, QUICK),
    "weighted_quick_geglu_back-offset": (
        functools.partial(ours.weighted_quick_geglu_back, **OFFSET),
        {**QUICK, **OFFSET},
    ),
}
IMPLS = {
    "weighted_bias_swiglu_impl": (ours.weighted_bias_swiglu_impl, {}),
    "weighted_bias_geglu_impl": (ours.weighted_bias_geglu_impl, GELU),
    "weighted_bias_quick_geglu_impl": (functools.partial(ours.weighted_bias_quick_geglu_impl, bias=None), QUICK),
}
CLASSES = {
    "WeightedSwiGLUFunction": (ours.WeightedSwiGLUFunction, {}, ()),
    "WeightedGEGLUFunction": (ours.WeightedGEGLUFunction, GELU, ()),
    "WeightedQuickGeGLUFunction": (ours.WeightedQuickGeGLUFunction, {**QUICK, **OFFSET}, (1.001,)),
    "WeightedBiasQuickGeGLUFunction": (ours.WeightedBiasQuickGeGLUFunction, {**QUICK, **OFFSET}, (1.001,)),
}


def each(table):
    return pytest.mark.parametrize("name", table)


# --- values and gradients -------------------------------------------------------------------------------------------


@each(UNWEIGHTED)
def test_unweighted(name):
    function, parameters = UNWEIGHTED[name]
    for dtype in DTYPES:
        grad = draw(5, N, 2 * I if name.startswith("quick_gelu") else I, dtype=dtype)
        assert_matches_formula(function, formula(parameters), inputs("y", dtype=dtype), grad, f"{dtype}")


@each(WEIGHTED)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.float64])
def test_weighted(name, weight_dtype):
    """The result is in y's dtype, and each gradient in its input's."""
    function, parameters = WEIGHTED[name]
    for dtype in DTYPES:
        tensors = inputs("y", "weights", dtype=dtype, weight_dtype=weight_dtype)
        assert function(**tensors).dtype is dtype
        assert_matches_formula(function, formula(parameters), tensors, draw(5, N, I, dtype=dtype), f"{dtype}")


@each(BACK)
def test_backs_return_the_promoted_dtype(name):
    function, parameters = BACK[name]
    for dtype in DTYPES:
        for grad_dtype in (dtype, torch.float32):
            y, g = draw(1, N, 2 * I, dtype=dtype), draw(4, N, I, dtype=grad_dtype)
            _, expected = value_and_grads(formula(parameters), {"y": y.double()}, g.double())
            dy = function(g, y)
            assert dy.dtype is torch.promote_types(dtype, grad_dtype)
            assert_accurate(dy, expected["y"], work=None if dtype is torch.float64 else torch.float32, what=f"{dtype}")


@each(WEIGHTED_BACK)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_weighted_backs(name, weight_dtype):
    function, parameters = WEIGHTED_BACK[name]
    for dtype in DTYPES:
        tensors = inputs("g", "y", "weights", dtype=dtype, weight_dtype=weight_dtype)
        grad = tensors["g"].double()
        _, expected = value_and_grads(formula(parameters), doubled({n: tensors[n] for n in ("y", "weights")}), grad)
        dy, dweights = function(**tensors)
        assert dy.dtype is dtype and dweights.dtype is (weight_dtype or dtype)
        assert_accurate(dy, expected["y"], what=f"{dtype} dy")
        work = torch.float64 if dtype is torch.float64 else torch.float32
        assert_accurate(dweights, expected["weights"], work=work, what=f"{dtype} dweights")
        with Recorder() as recorder:
            alone, nothing = function(**tensors, need_weight_grad=False)
        assert nothing is None and recorder.results("glu_backward")[0][1].numel() == 0
        assert_same(alone, dy)


def test_bias():
    both = {**QUICK, **OFFSET}
    function = functools.partial(ours.weighted_bias_quick_geglu, **OFFSET)
    for dtype in DTYPES:
        for shape in [(2 * I,), (1, 2 * I), (N, 2 * I)]:
            tensors = {**inputs("y", "bias", "weights", dtype=dtype), "bias": draw(2, *shape, dtype=dtype)}
            assert_matches_formula(function, formula(both), tensors, draw(5, N, I, dtype=dtype), f"{dtype} {shape}")
    for shape in [(N, 1), (1, 1), (1,)]:  # whatever broadcasts
        tensors = {**inputs("y", "bias", "weights"), "bias": draw(2, *shape)}
        assert_matches_formula(function, formula(both), tensors, draw(5, N, I), f"{shape}")


def test_bias_back_returns_the_full_bias_gradient():
    for dtype in DTYPES:
        for shape in [(2 * I,), (1, 2 * I), (N, 2 * I)]:
            tensors = {**inputs("g", "y", "bias", "weights", dtype=dtype), "bias": draw(2, *shape, dtype=dtype)}
            full = {**tensors, "bias": tensors["bias"].expand(N, 2 * I).clone()}
            grad = full.pop("g").double()
            _, expected = value_and_grads(formula({**QUICK, **OFFSET}), doubled(full), grad)
            found = ours.weighted_bias_quick_geglu_back(**tensors, **OFFSET)
            for actual, name in zip(found, ("y", "bias", "weights"), strict=True):
                assert actual.dtype is dtype
                assert_accurate(actual, expected[name], what=f"{dtype} {shape} {name}")


@each(IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_leading_shape_contiguous_or_not(name, layout):
    """Published: a 4-D input collapses, a transposed 3-D one and one without rows fail."""
    function, parameters = IMPLS[name]
    lay = LAYOUTS[layout]
    for lead in [(5,), (2, 3), (0, 3), (2, 0), (2, 3, 2), (0,)]:
        rows = torch.Size(lead).numel()
        for weight_shape in {(rows, 1), (*lead, 1)}:
            tensors = {"input": lay(draw(1, *lead, 2 * I)), "weights": lay(draw(3, *weight_shape))}
            assert function(**tensors).shape == (*lead, I)
            assert_matches_formula(function, formula(parameters, "input"), tensors, lay(draw(5, *lead, I)), f"{lead}")


@each(IMPLS)
def test_one_row_without_a_row_dimension(name):
    """Callers rely on it for a rank that has no expert."""
    function, parameters = IMPLS[name]
    for weight_shape, out_shape in [((1,), (I,)), ((1, 1), (1, I))]:
        tensors = {"input": draw(1, 2 * I), "weights": draw(3, *weight_shape)}
        out = function(**tensors)
        assert out.shape == out_shape
        reference = functools.partial(glu_formula, **parameters)
        expected = reference(tensors["input"].unsqueeze(0), tensors["weights"].view(1)).view(out_shape)
        assert_accurate(out, expected)
        for fp8 in (False, True):
            _, grads = value_and_grads(functools.partial(function, fp8_input_store=fp8), tensors, torch.ones(out_shape))
            assert {n: g.shape for n, g in grads.items()} == {n: x.shape for n, x in tensors.items()}


# --- decisions ------------------------------------------------------------------------------------------------------


def impl(**parameters):
    return functools.partial(ours.weighted_bias_quick_geglu_impl, **parameters)


def test_decision_alpha_is_honoured():
    for alpha in (1.0, 0.5):
        for bias in (False, True):
            tensors = inputs("input", "bias", "weights") if bias else {**inputs("input", "weights"), "bias": None}
            assert_matches_formula(
                impl(alpha=alpha), formula({**QUICK, "alpha": alpha}, "input"), tensors, draw(5, N, I), f"{alpha}"
            )
    swish = impl(alpha=1.0)(bias=None, **inputs("input", "weights"))
    assert_accurate(swish, ours.weighted_bias_swiglu_impl(**inputs("input", "weights")))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decision_linear_offset_is_exact(dtype):
    """At ``up = -1`` an offset of 1.001 leaves 0.001; one that was rounded to bfloat16 leaves nothing."""
    y = draw(1, N, 2 * I, dtype=dtype)
    y[:, I:] = -1
    for function in (ours.quick_geglu, lambda y, offset: ours.weighted_quick_geglu(y, torch.ones(N, 1), offset)):
        expected = glu_formula(y.double(), **QUICK, linear_offset=1.001)
        # In float32 the sum itself loses what 1.001 does not keep: half an ulp of 1, of the gate's size.
        assert_accurate(function(y, 1.001), expected, scale=y[:, :I].double().abs())
        assert (expected != 0).all()


def test_decision_linear_offset_costs_no_copy():
    y, weights = draw(1, N, 2 * I, dtype=torch.float32), draw(3, N, 1, dtype=torch.float32)
    with Recorder() as recorder:
        ours.weighted_quick_geglu(y, weights, 1.001)
        ours.quick_geglu_back(y[:, :I], y, 1.001)
    only_looking = ("aten.view", "aten.slice", "aten.promote_types")
    calculating = [name for name, _, _ in recorder.calls if not name.startswith(only_looking)]
    assert calculating == ["moekit.glu.default", "moekit.glu_backward.default"]


@pytest.mark.parametrize("offset_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decision_linear_offset_may_be_a_tensor(offset_dtype):
    for shape in [(), (1,), (1, 1)]:
        offset = torch.full(shape, 1.001, dtype=offset_dtype)
        tensors = {**inputs("y", "weights", dtype=torch.bfloat16), "linear_offset": offset}
        assert_matches_formula(
            ours.weighted_quick_geglu, formula(QUICK), tensors, draw(5, N, I, dtype=torch.bfloat16), f"{shape}"
        )
    with pytest.raises(ValueError, match=r"linear_offset must be a number or a tensor of one element, got \[2\]"):
        ours.quick_geglu(draw(1, N, 2 * I), torch.ones(2))
    with pytest.raises(TypeError, match=r"linear_offset must be a number, got str"):
        ours.quick_geglu(draw(1, N, 2 * I), "1")


def test_decision_clamp_comes_before_the_bias():
    """As published. ``moekit.glu(clamp_after_bias=True)`` has the other order."""
    input = torch.tensor([[3.0, -3.0]], dtype=torch.float64)
    bias = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    out = impl(clamp_value=2.0)(input=input, bias=bias, weights=torch.ones(1, 1, dtype=torch.float64))
    assert_accurate(out, glu_formula(torch.tensor([[3.0, -1.0]], dtype=torch.float64), **QUICK))
    for dtype in DTYPES:
        for with_bias in (True, False):
            tensors = inputs("input", "bias", "weights", dtype=dtype)
            tensors["bias"] = tensors["bias"] if with_bias else None
            assert_matches_formula(
                impl(clamp_value=0.75, **OFFSET),
                formula({**QUICK, **OFFSET, "clamp": 0.75}, "input"),
                tensors,
                draw(5, N, I, dtype=dtype),
                f"{dtype} {with_bias}",
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decision_bias_gradient_is_reduced_in_float32(dtype):
    """Published: ``[N, 2I]``, rounded, then summed. 3000 equal terms show it."""
    for shape in [(2 * I,), (1, 2 * I)]:
        tensors = inputs("input", "weights", dtype=dtype, num_rows=3000)
        tensors["bias"] = draw(2, *shape, dtype=dtype)
        assert_matches_formula(impl(), formula(QUICK, "input"), tensors, torch.ones(3000, I, dtype=dtype), f"{shape}")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_decision_float8_store_scales_each_row(scale):
    """Published: a bare cast, 56% off at 1e-3 and saturated past 448."""
    for name, (function, _) in IMPLS.items():
        tensors, grad = inputs("input", "weights", dtype=torch.float32), draw(5, N, I, dtype=torch.float32)
        tensors["input"] = tensors["input"] * scale
        out, exact = value_and_grads(function, tensors, grad)
        kept_out, found = value_and_grads(functools.partial(function, fp8_input_store=True), tensors, grad)
        assert_same(kept_out, out)
        for part, gradient in exact.items():
            assert (found[part] - gradient).norm() <= 0.07 * gradient.norm(), (name, part)


def test_decision_large_gates_are_finite():
    """Published: ``geglu_back`` gives NaN at 300 in float16 and at 1e20 in float32."""
    for dtype, gate in [(torch.float16, 300.0), (torch.float32, 1e20), (torch.bfloat16, 1e30)]:
        for sign in (1.0, -1.0):
            y, g = torch.tensor([[sign * gate, 0.5]], dtype=dtype), torch.ones(1, 1, dtype=dtype)
            expected = torch.tensor([[0.5, gate] if sign > 0 else [0.0, 0.0]], dtype=dtype)
            for back in (ours.geglu_back, ours.swiglu_back, ours.quick_geglu_back):
                assert_same(back(g, y), expected)
            assert_same(ours.weighted_geglu_back(g, y, g)[0], expected)
            assert_same(value_and_grads(ours.geglu, {"y": y}, g)[1]["y"], expected)


WEIGHT_TAKERS = {**WEIGHTED, **IMPLS, "weighted_bias_quick_geglu": (ours.weighted_bias_quick_geglu, QUICK)}


@each(WEIGHT_TAKERS)
def test_decision_weights_need_their_last_dimension(name):
    """Published: ``[N]`` broadcasts over features when N happens to equal I."""
    function = WEIGHT_TAKERS[name][0]
    first = "input" if name.endswith("impl") else "y"
    extra = {"bias": torch.zeros(8)} if name == "weighted_bias_quick_geglu" else {}
    text = r"weights must be of shape \[4, 1\] for an input of shape \[4, 8\], got shape "
    for shape, got in [((4,), r"\[4\]"), ((1, 4), r"\[1, 4\]"), ((1,), r"\[1\]"), ((1, 1), r"\[1, 1\]"), ((), r"\[\]")]:
        with pytest.raises(ValueError, match=text + got):
            function(**{first: torch.zeros(4, 8)}, weights=torch.zeros(shape), **extra)


def test_an_offset_that_is_none_is_no_other_activation():
    y, weights = torch.randn(4, 8), torch.rand(4, 1)
    calls = {
        "WeightedQuickGeGLUFunction": lambda: ours.WeightedQuickGeGLUFunction.apply(y, weights, False, None),
        "WeightedBiasQuickGeGLUFunction": lambda: ours.WeightedBiasQuickGeGLUFunction.apply(y, y[0], weights, False, None),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name}: linear_offset must be a number, got NoneType"):
            call()


def test_decision_weights_in_the_backs():
    for function in (ours.weighted_swiglu_back, ours.weighted_geglu_back, ours.weighted_quick_geglu_back):
        with pytest.raises(ValueError, match=r"moekit\.weighted_\w+_back: weights must be .* got shape \[4\]"):
            function(torch.zeros(4, 4), torch.zeros(4, 8), torch.zeros(4))
        with pytest.raises(ValueError, match=r"moekit\.weighted_\w+_back: g must be of shape \[4, 4\], got shape \[4, 3\]"):
            function(torch.zeros(4, 3), torch.zeros(4, 8), torch.zeros(4, 1))


@each({**UNWEIGHTED, **WEIGHTED, **IMPLS})
def test_errors_name_operation_argument_wanted_and_got(name):
    function = {**UNWEIGHTED, **WEIGHTED, **IMPLS}[name][0]
    operation, first = name.split("-")[0], "input" if name.endswith("impl") else "y"
    weights = {} if name in UNWEIGHTED else {"weights": torch.zeros(3, 1)}
    if not name.startswith("quick_gelu"):
        text = rf"moekit\.{operation}: y must be of an even last dimension .*, got shape \[3, 7\]"
        with pytest.raises(ValueError, match=text):
            function(**{first: torch.zeros(3, 7)}, **weights)
    with pytest.raises(TypeError, match=rf"moekit\.{operation}: y must be a floating-point tensor, got torch.int64"):
        function(**{first: torch.zeros(3, 8).long()}, **weights)
    if weights:
        with pytest.raises(ValueError, match=r"weights must be on the device of y \(cpu\), got meta"):
            function(**{first: torch.zeros(3, 8)}, weights=torch.zeros(3, 1, device="meta"))


# --- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.reference_only("float64 is computed by the reference on every backend")
@each({**UNWEIGHTED, **WEIGHTED, **BACK})
def test_gradcheck_and_gradgradcheck(name, backend):
    """The hand-written backwards are functions of their arguments too, and differentiable once."""
    function = {**UNWEIGHTED, **WEIGHTED, **BACK}[name][0]
    names = {"_back": ("g", "y")}.get(name.split("-")[0][-5:], ("y",) if name in UNWEIGHTED else ("y", "weights"))
    leaves = [x.requires_grad_() for x in inputs(*names, num_rows=3, width=2).values()]
    assert gradcheck(lambda *args: function(*args), leaves)
    if name not in BACK:
        assert gradgradcheck(lambda *args: function(*args), leaves, fast_mode=True)


@pytest.mark.reference_only("float64 is computed by the reference on every backend")
@each(WEIGHTED_BACK)
def test_weighted_backs_are_differentiable(name, backend):
    leaves = [x.requires_grad_() for x in inputs("g", "y", "weights", num_rows=3, width=2).values()]
    assert gradcheck(lambda *args: WEIGHTED_BACK[name][0](*args), leaves)


def class_arguments(name, dtype=torch.float64, fp8=False, **sizes):
    """``(tensors by name, a function of them)`` for ``.apply``."""
    cls, _, rest = CLASSES[name]
    names = ("input", "bias", "weights") if "Bias" in name else ("input", "weights")
    return inputs(*names, dtype=dtype, **sizes), lambda **tensors: cls.apply(*tensors.values(), fp8, *rest)


@each(CLASSES)
def test_autograd_functions(name):
    for dtype in DTYPES:
        tensors, apply = class_arguments(name, dtype)
        assert_matches_formula(apply, formula(CLASSES[name][1], "input"), tensors, draw(5, N, I, dtype=dtype), f"{dtype}")


@each(CLASSES)
def test_autograd_functions_with_float8_store(name):
    tensors, apply = class_arguments(name, torch.bfloat16)
    kept, apply_kept = class_arguments(name, torch.bfloat16, fp8=True)
    grad = draw(5, N, I, dtype=torch.bfloat16)
    out, exact = value_and_grads(apply, tensors, grad)
    kept_out, found = value_and_grads(apply_kept, kept, grad)
    assert_same(kept_out, out)
    for part, gradient in exact.items():
        assert found[part].dtype is torch.bfloat16
        assert (found[part] - gradient).float().norm() <= 0.07 * gradient.float().norm(), part


@pytest.mark.reference_only("float64 is computed by the reference on every backend")
@each(CLASSES)
def test_autograd_functions_are_twice_differentiable(name, backend):
    tensors, apply = class_arguments(name, num_rows=3, width=2)
    leaves = [x.requires_grad_() for x in tensors.values()]

    def function(*args):
        return apply(**dict(zip(tensors, args, strict=True)))

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves, fast_mode=True)


@each(CLASSES)
def test_autograd_functions_compute_what_is_needed(name):
    tensors, apply = class_arguments(name, torch.float32)
    _, exact = value_and_grads(apply, tensors, draw(5, N, I, dtype=torch.float32))
    places = {"input": 0, "weights": 1, "bias": 2}  # in the operator's results
    for needed in tensors:
        leaves = {part: x.clone().requires_grad_(part == needed) for part, x in tensors.items()}
        out = apply(**leaves)
        with Recorder() as recorder:
            out.backward(draw(5, N, I, dtype=torch.float32))
        (results,) = recorder.results("glu_backward")
        assert [part for part in tensors if results[places[part]].numel()] == [needed]
        assert_accurate(leaves[needed].grad, exact[needed].double(), what=needed)
        assert all(leaf.grad is None for part, leaf in leaves.items() if part != needed)


def test_autograd_function_takes_an_offset_tensor_and_any_bias():
    offset = torch.tensor([1.001])
    for shape in [(2 * I,), (1, 2 * I), (N, 2 * I)]:
        tensors = {**inputs("input", "bias", "weights"), "bias": draw(2, *shape)}
        parameters = {**QUICK, "linear_offset": offset.double()}
        assert_matches_formula(
            lambda input, bias, weights: ours.WeightedBiasQuickGeGLUFunction.apply(input, bias, weights, False, offset),
            formula(parameters, "input"),
            tensors,
            draw(5, N, I),
            f"{shape}",
        )


@each(IMPLS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(name, use_reentrant):
    function = IMPLS[name][0]
    for num_rows in (N, 0):
        for fp8 in (False, True):
            call = functools.partial(function, fp8_input_store=fp8)
            tensors = inputs("input", "weights", dtype=torch.bfloat16, num_rows=num_rows)
            grad = draw(5, num_rows, I, dtype=torch.bfloat16)
            _, exact = value_and_grads(call, tensors, grad)
            leaves = {part: x.clone().requires_grad_() for part, x in tensors.items()}
            # Positional tensors: the older of the two modes differentiates no others.
            block = functools.partial(lambda call, *args: call(input=args[0], weights=args[1]), call)
            checkpoint(block, *leaves.values(), use_reentrant=use_reentrant).backward(grad)
            for part, gradient in exact.items():
                assert_same(leaves[part].grad, gradient, part)


@each({**WEIGHTED, **IMPLS})
def test_autocast_changes_nothing(name):
    function = {**WEIGHTED, **IMPLS}[name][0]
    first = "input" if name.endswith("impl") else "y"
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(first, "weights", dtype=dtype, weight_dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(function(**tensors), function(**tensors).to(dtype))


@pytest.mark.reference_only("the compiled graph calls the same operators")
@each({**WEIGHTED, **IMPLS, **CLASSES})
def test_compile(name, backend):
    if name in CLASSES:
        tensors, function = class_arguments(name, torch.bfloat16)
    else:
        function = {**WEIGHTED, **IMPLS}[name][0]
        tensors = inputs("input" if name.endswith("impl") else "y", "weights", dtype=torch.bfloat16)
    grad = draw(5, N, I, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: function(**given), fullgraph=True, backend="aot_eager")
    out, grads = value_and_grads(function, tensors, grad)
    compiled_out, compiled_grads = value_and_grads(compiled, tensors, grad)
    assert_same(compiled_out, out)
    for part, gradient in grads.items():
        assert_same(compiled_grads[part], gradient, part)
