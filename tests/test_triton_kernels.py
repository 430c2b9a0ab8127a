"""The Triton kernels against the references: on a GPU if there is one, else in Triton's interpreter on the CPU.

The interpreter is chosen when triton is imported, so without a GPU one test here starts another pytest on this file,
which interprets. The suites of the operators run on these kernels likewise (``test_triton_suites.py``).
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
from _interpreter import INTERPRETED, run_interpreted
from _reference import (
    BIASES,
    LAYOUTS,
    LOW,
    VARIANTS,
    assert_accurate,
    assert_same,
    doubled,
    draw,
    glu_formula,
    glu_inputs,
    value_and_grads,
)

import moekit
from moekit import Routing, _backend
from moekit.kernels.triton import _counting
from moekit.ops import glu as glu_ops
from moekit.ops import rows as row_ops
from moekit.ops import tables as table_ops
from moekit.ops import topk as topk_ops

pytest.importorskip("triton")

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_operators_pass_in_the_interpreter():
    run_interpreted(Path(__file__))


def combinations(*axes):
    """All combinations on a GPU; in the interpreter, which takes milliseconds an operation, each value at least once."""
    axes = [list(axis) for axis in axes]
    if GPU:
        return itertools.product(*axes)
    return itertools.islice(zip(*map(itertools.cycle, axes), strict=False), max(map(len, axes)))


def place(x):
    """Tensors, alone or in tuples and dicts, on the device of the kernels; strides stay."""
    if isinstance(x, torch.Tensor):
        moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
        return moved.copy_(x) if all(x.stride()) else x.to(DEVICE)
    if isinstance(x, dict):
        return {name: place(value) for name, value in x.items()}
    return tuple(place(value) for value in x) if isinstance(x, tuple | list) else x


def kernel(name, *args):
    """A kernel's results on the CPU; the reference must not have run in its place."""
    from moekit.kernels.triton import KERNELS

    result = KERNELS[name](*place(args))
    assert result is not NotImplemented, f"{name} left its arguments to the reference"
    return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()


def reference(function, *args):
    with moekit.backend("torch"):
        return function(*args)


def assert_exact(found, expected, what=""):
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for i, (a, b) in enumerate(pairs):
        assert a.dtype is b.dtype and a.shape == b.shape, f"{what}[{i}]: {a.dtype} {list(a.shape)}"
        where = (a != b).nonzero()
        assert len(where) == 0, f"{what}[{i}]: {len(where)} differ, the first at {where[0].tolist()}: {a} is not {b}"


# --- gated activations ----------------------------------------------------------------------------------------------


def check_glu(variant, bias, dtype, layout="contiguous", **sizes):
    inputs, parameters, grad = glu_inputs(variant, bias, dtype, **sizes)
    expected = value_and_grads(functools.partial(glu_formula, **parameters), doubled(inputs), grad.double())
    laid = {name: None if x is None else LAYOUTS[layout](x) for name, x in inputs.items()}
    with moekit.backend("triton"):
        call = functools.partial(moekit.glu, **place(parameters))
        found = value_and_grads(call, place(laid), place(LAYOUTS[layout](grad)))
    what = f"{variant} {bias} {dtype} {sizes}"
    assert_accurate(found[0].cpu(), expected[0], work=torch.float32, what=f"{what} value")
    for name, gradient in found[1].items():
        assert_accurate(gradient.cpu(), expected[1][name], work=torch.float32, what=f"{what} gradient of {name}")


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_glu(variant, bias):
    for dtype, weights in combinations(LOW if GPU else [torch.bfloat16], (True, False)):
        check_glu(variant, bias, dtype, weights=weights)


@pytest.mark.parametrize("variant", ["silu", "clamp-after-bias", "ungated-relu2"])
@pytest.mark.parametrize(("num_rows", "width"), [(70, 1), (1, 33), (3, 8), (11, 24), (9, 257)])
def test_glu_of_every_alignment(variant, num_rows, width):
    for layout, bias in combinations(LAYOUTS, ("none", "vector")):
        check_glu(variant, bias, torch.float16, layout, num_rows=num_rows, width=width)


@pytest.mark.parametrize("variant", ["silu", "silu-interleaved", "ungated-silu"])
def test_glu_bias_summed_over_many_chunks(variant):
    check_glu(variant, "vector", torch.float32, num_rows=300, width=3)
    check_glu(variant, "experts", torch.float32, num_rows=150, width=3)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_glu_backward_gives_what_is_wanted(wanted):
    inputs, parameters, grad = glu_inputs("clamp-before-bias", "experts", torch.float32)
    offsets = parameters.pop("offsets")
    args = (grad, inputs["y"], None, inputs["weights"], inputs["bias"], offsets, *glu_ops.make_glu(**parameters))
    found = kernel("glu_backward", *args, list(wanted))
    for value, expected in zip(found, reference(glu_ops.glu_backward_reference, *args, list(wanted)), strict=True):
        assert_accurate(value, expected.double(), what=f"{wanted}")


@pytest.mark.parametrize("bias", ["none", "experts"])
def test_glu_backward_writes_the_activation_over_the_gradient(bias):
    from moekit.kernels.triton import KERNELS

    inputs, parameters, grad = glu_inputs("silu", bias, torch.bfloat16, num_rows=70, width=40)
    offsets = parameters.pop("offsets", None)
    args = (inputs["y"], None, inputs["weights"], inputs.get("bias"), offsets, *glu_ops.make_glu(**parameters))
    for given in (grad, torch.stack([grad, grad], 1)[:, 0], grad.float()):
        found, own = kernel("glu_backward", given, *args, [True] * 4), place(given)
        results = KERNELS["glu_backward_over"](own, *place(args), [True] * 4)
        assert_exact(tuple(result.cpu() for result in results), found, "over the gradient")
        taken = given.is_contiguous() and given.dtype is torch.bfloat16
        assert (results[3] is own) is taken
        assert taken or torch.equal(own.cpu(), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", glu_ops.LAYOUTS)
def test_glu_float8(layout, dtype):
    spec = glu_ops.make_glu(layout=layout)
    tiny, huge = torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max
    scales = torch.tensor([1.0, 0.0, tiny, huge / 8, 1e-3, 30.0], dtype=torch.float64)
    y = (draw(3, 6, 70) * scales[:, None]).clamp(-huge, huge).to(dtype)
    y[1:4, 0] = torch.tensor([0.0, -tiny, huge])
    out, stored, scale = kernel("glu_fp8", y, None, None, None, *spec)
    _, expected, expected_scale = reference(glu_ops._glu_fp8_reference, y, None, None, None, *spec)
    assert_exact((stored.view(torch.uint8), scale), (expected.view(torch.uint8), expected_scale), "float8")
    assert_same(out, kernel("glu", y, None, None, None, *spec))
    grad, flags = draw(4, *out.shape, dtype=dtype), [True, False, False, False]
    args = (grad, expected, expected_scale, None, None, None, *spec, flags)
    found, true = kernel("glu_backward", *args), reference(glu_ops.glu_backward_reference, *args)
    assert_accurate(found[0], true[0].double(), what="dy")


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 9000), (torch.float32, 4200), (torch.float16, 70)])
def test_glu_float8_of_rows_wider_than_a_tile_and_not_finite(dtype, width):
    spec, huge = glu_ops.make_glu(), torch.finfo(dtype).max
    y = draw(5, 5, 2 * width).to(dtype)
    y[0, [3, -1]] = torch.tensor([huge, -huge], dtype=dtype)  # the largest of a wide row lies in its last step
    y[1, [0, 7, -2]] = torch.tensor([float("inf"), 500.0, float("-inf")], dtype=dtype)
    y[2, [5, -1]] = torch.tensor([float("nan"), -470.0], dtype=dtype)
    y[3, -1] = 1000.0
    _, stored, scale = kernel("glu_fp8", y, None, None, None, *spec)
    _, expected, expected_scale = reference(glu_ops._glu_fp8_reference, y, None, None, None, *spec)
    assert_exact((stored.view(torch.uint8), scale), (expected.view(torch.uint8), expected_scale), "float8")


@pytest.mark.parametrize("ends", [[9], [3, 12], [0, 7, 8], [20, 20]])
def test_offsets_past_the_last_row_write_nothing_there(ends, monkeypatch):
    """Seven rows: what lies behind the outputs keeps its bytes, though nobody looks at values, as on a GPU."""
    made, empty = [], torch.empty

    def guarded(*shape, dtype=None, device=None):
        shape = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        made.append(empty(shape.numel() + 64, dtype=dtype, device=device).fill_(7))
        return made[-1][: shape.numel()].view(shape)

    y, grad, bias = draw(1, 7, 12, dtype=torch.float32), draw(2, 7, 6, dtype=torch.float32), draw(3, len(ends), 12)
    offsets, weights = torch.tensor(ends, dtype=torch.int32), torch.rand(7)
    constants = ("sigmoid", 1.0, 0.0, 0.0, None, True, "concatenated")
    args = place((y, None, weights, bias.float(), offsets))
    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr("moekit._backend.checks_values", lambda tensor: False)
    from moekit.kernels.triton import KERNELS

    KERNELS["glu_backward"](place(grad), *args, *constants, [True, True, True, True])
    monkeypatch.undo()
    assert made and all(bool((memory[-64:] == 7).all()) for memory in made)


# --- rows -----------------------------------------------------------------------------------------------------------


def random_tables(num_tokens, topk, num_experts, *, seed=0, spare=0, sort=False):
    """The tables of a random routing in which some slots and some tokens have no expert."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :topk]
    indices[torch.rand(num_tokens, topk, generator=generator) < 0.2] = -1
    routing = reference(functools.partial(Routing.from_topk, num_experts=num_experts), indices)
    if not sort:
        return routing.row_tables()
    row_token = torch.cat([routing.row_tables()[0].long(), torch.full((spare,), -1)])
    return row_token, *reference(table_ops.rows_of_tokens, row_token, num_tokens)


ROUTINGS = [(5, 2, 4), (1, 1, 1), (9, 3, 5), (3, 12, 12)]
WIDTHS = [1, 7, 64, 72, 1030]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float32, torch.int64, torch.complex64])
def test_permute_copies_any_dtype(dtype):
    for sizes, sort, width, layout in combinations(ROUTINGS, (True, False), WIDTHS, LAYOUTS.values()):
        tables = random_tables(*sizes, sort=sort, spare=200)
        tokens = (draw(1, sizes[0], width) * 4).to(dtype)
        expected = reference(row_ops._permute_reference, tokens, *tables)
        assert_exact(kernel("permute", layout(tokens), *tables), expected, f"{sizes} {width}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS if GPU else WIDTHS[1:4])
def test_unpermute_and_its_gradient(width, dtype):
    flags, layouts = ([True, True], [True, False], [False, True]), LAYOUTS.values()
    for sizes, sort, weighted, layout, wanted in combinations(ROUTINGS, (True, False), (True, False), layouts, flags):
        row_token, *tables = random_tables(*sizes, sort=sort, spare=150)
        rows = draw(2, len(row_token), width, dtype=dtype)
        by_slot = not sort and width != 7
        weights = draw(3, *(sizes[:2] if by_slot else (len(row_token),)), dtype=torch.float32)
        given, wide = (weights, weights.double()) if weighted else (None, None)
        expected = reference(row_ops._unpermute_reference, rows.double(), wide, row_token, *tables)
        found = kernel("unpermute", layout(rows), given, row_token, *tables)
        assert_accurate(found, expected, work=torch.float32, what=f"{sizes}")
        args = (draw(4, sizes[0], width, dtype=dtype), rows, weights, row_token, *tables, wanted)
        doubles = (t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args)
        expected = reference(row_ops._weighted_backward_reference, *doubles)
        for value, true in zip(kernel("unpermute_backward", *args), expected, strict=True):
            assert_accurate(value, true, work=torch.float32, what=f"{sizes} {wanted}")


def test_expanded_gradients():
    row_token, *tables = random_tables(9, 3, 5)
    grad, rows, weights = torch.ones(()).expand(9, 24), draw(1, 27, 24, dtype=torch.float32), torch.ones(27)
    args = (row_token, *tables)
    assert_exact(kernel("permute", grad, *args), reference(row_ops._permute_reference, grad, *args))
    expected = reference(row_ops._weighted_backward_reference, grad, rows, weights, *args, [True, True])
    for value, true in zip(kernel("unpermute_backward", grad, rows, weights, *args, [True, True]), expected, strict=True):
        assert_accurate(value, true.double())


@pytest.mark.parametrize(("num_tokens", "num_rows", "width"), [(0, 0, 4), (0, 3, 4), (3, 0, 4), (3, 5, 0)])
def test_empty_rows(num_tokens, num_rows, width):
    row_token = torch.full((num_rows,), -1)
    tables = (row_token, *reference(table_ops.rows_of_tokens, row_token, num_tokens))
    assert not kernel("permute", torch.ones(num_tokens, width), *tables).any()
    assert not kernel("unpermute", torch.ones(num_rows, width), None, *tables).any()
    args = (torch.ones(num_tokens, width), torch.ones(num_rows, width), torch.ones(num_rows), *tables, [True, True])
    assert not any(x.any() for x in kernel("unpermute_backward", *args))


# --- tables ---------------------------------------------------------------------------------------------------------

BIG = [(16384, 8, 128), (5000, 6, 160), (20000, 1, 500)] if GPU else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_entries(dtype, index_dtype):
    values = torch.randperm(1500, generator=torch.Generator().manual_seed(0)).view(3, 500).T.to(dtype)
    index = torch.randperm(1600, generator=torch.Generator().manual_seed(1)).sub(50).to(index_dtype)
    expected = reference(table_ops._take_reference, values, index.view(40, 40), None)
    assert_exact(kernel("take", values, index.view(40, 40), None), expected, "take")
    for size in (1400, 2000):
        expected = reference(table_ops._put_reference, values, index[:1500].view(500, 3), size)
        assert_exact(kernel("put", values, index[:1500].view(500, 3), size), expected, "put")
    empty = index[:0]
    assert kernel("take", values[:0], empty, None).shape == (0,)
    assert_exact(kernel("put", values[:0], empty, 3), torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize(("num_tokens", "topk"), [(5, 3), (700, 2), (0, 2), (3, 0)])
def test_row_tables(num_tokens, topk):
    order = torch.randperm(num_tokens * topk + 4, generator=torch.Generator().manual_seed(0)).sub(4).clamp(min=-1).int()
    expected = reference(table_ops._row_tables_reference, order, num_tokens, topk)
    assert_exact(kernel("row_tables", order, num_tokens, topk), expected, "row_tables")


@pytest.mark.parametrize(("num_tokens", "topk"), [(5, 3), (700, 2), (0, 2), (3, 0)])
@pytest.mark.parametrize("ends", [[3, 3, 9], [-4, 2**40, 1], [99999, 2, -1], []])
def test_a_calls_tables_in_one_launch(num_tokens, topk, ends):
    order = torch.randperm(num_tokens * topk + 4, generator=torch.Generator().manual_seed(0)).sub(4).clamp(min=-1).int()
    weights, offsets = draw(1, num_tokens, topk).bfloat16(), torch.tensor(ends, dtype=torch.int64)
    expected = (
        *reference(table_ops._row_tables_reference, order, num_tokens, topk),
        torch.where(order >= 0, torch.cat([weights.flatten(), weights.new_zeros(1)])[order.long()], 0),
        offsets.clamp(0, len(order)).cummax(0).values,
    )
    assert_exact(kernel("row_order", order, weights, offsets, num_tokens, topk), expected, "row_order")


@pytest.mark.parametrize("sizes", [(5, 2, 4), (0, 2, 4), (100, 3, 5), (20, 2, 130), (700, 3, 5), *BIG])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tables_from_indices(sizes, dtype, monkeypatch):
    monkeypatch.setattr(_backend, "checks_values", lambda tensor: False)  # as on a GPU: what is out of range is nowhere
    num_tokens, topk, num_experts = sizes
    if num_tokens == 700:  # several tiles to a block, as of 65,536 slots and more
        monkeypatch.setattr(_counting, "_MAX_BLOCKS", 2)
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(-1, num_experts, (num_tokens, topk), generator=generator).to(dtype)
    counts, offsets, order, inverse = reference(table_ops._route_indices_reference, indices, num_experts)
    assert_exact(kernel("route_indices", indices, num_experts), (counts, offsets, order, inverse), "route_indices")
    if not num_tokens:  # for which the tables above do
        with pytest.raises(AssertionError, match="left its arguments"):
            kernel("choice_rows", indices, draw(2, 0, topk), num_experts)
    for of_weights in (torch.bfloat16, torch.float64) if num_tokens else ():
        weights = draw(2, topk, num_tokens).to(of_weights).T
        token, starts = reference(table_ops._row_tables_reference, order, num_tokens, topk)
        of_rows = reference(table_ops._take_reference, weights, order, None)
        expected = (token, starts, of_rows, offsets, inverse)
        assert_exact(kernel("choice_rows", indices, weights, num_experts), expected, "choice_rows")
    for row_token in (torch.div(order, topk, rounding_mode="floor").to(dtype), indices.reshape(-1) * 3 - 1):
        expected = reference(table_ops._rows_of_tokens_reference, row_token, num_tokens)
        assert_exact(kernel("rows_of_tokens", row_token, num_tokens), expected, "rows_of_tokens")
    for multiple in (4, 7):
        expected = reference(table_ops._pad_rows_reference, offsets, order, inverse, multiple)
        assert_exact(kernel("pad_rows", offsets, order, inverse, multiple), expected, "pad_rows")


@pytest.mark.parametrize("num_tokens", [700, *([70000] if GPU else [])])
def test_radix_sort_of_more_tokens_than_rows(num_tokens):
    row_token = torch.randint(-1, num_tokens, (300,), generator=torch.Generator().manual_seed(0))
    expected = reference(table_ops._rows_of_tokens_reference, row_token, num_tokens)
    assert_exact(kernel("rows_of_tokens", row_token, num_tokens), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.int64])
@pytest.mark.parametrize("sizes", [(5, 4), (1, 1), (0, 4), (80, 7), (20, 130), *([(16384, 128)] if GPU else [])])
def test_tables_from_a_map(sizes, dtype):
    drawn = torch.rand(sizes, generator=torch.Generator().manual_seed(2)) < 0.3
    routing_map = (drawn * torch.tensor(0.5 if dtype.is_floating_point else 2)).to(dtype)
    rows, widest = int(drawn.sum()), int(drawn.sum(1).max()) if sizes[0] else 0
    maps = (routing_map, routing_map.T.contiguous().T)
    for given, size in combinations(maps, (None, rows, rows + 5)):
        expected = reference(table_ops._route_map_reference, given, size)
        assert_exact(kernel("route_map", given, size), expected, "route_map")
    for given, topk in combinations(maps, (None, widest, widest + 2)):
        expected = reference(table_ops._map_to_indices_reference, given, topk)
        assert_exact(kernel("map_to_indices", given, topk), expected, "map_to_indices")
    for given, capacity in combinations(maps, (0, 1, sizes[0], sizes[0] + 3)):
        expected = reference(table_ops._route_capacity_reference, given, capacity)
        assert_exact(kernel("route_capacity", given, capacity), expected, "route_capacity")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("chunks", [1, 5, 40])
def test_chunk_tables(chunks, dtype):
    generator = torch.Generator().manual_seed(chunks)
    sizes = torch.randint(0, 3000 // chunks, (chunks,), generator=generator).to(dtype)
    rows = int(sizes.sum())
    order = torch.randperm(chunks, generator=generator).to(dtype)
    expected = reference(table_ops._sort_chunks_reference, sizes, order, rows, rows)
    assert_exact(kernel("sort_chunk_rows", sizes, order, rows, rows), expected)
    some = torch.randint(0, chunks, (chunks + 2,), generator=generator).to(dtype)
    expected = reference(table_ops._sort_chunks_reference, sizes, some, rows, None)
    assert_exact(kernel("sort_chunk_rows", sizes, some, rows, None), expected)


# --- top-k ----------------------------------------------------------------------------------------------------------

SCORES = [("softmax", True), *((name, False) for name in topk_ops.SCORE_FUNCTIONS)]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sizes", [(7, 12, 3, 0, 0, 0), (5, 20, 8, 4, 2, 4), (1, 1, 1, 0, 0, 0), (12, 128, 8, 8, 4, 2)])
def test_topk_router(sizes, score):
    num_tokens, num_experts, k, *groups = sizes
    options = [(False, None, torch.float32, True), (True, 2.5, torch.bfloat16, False), (True, 0.0, torch.float32, True)]
    for biased, scaling, dtype, tied in options:
        logits = draw(1, num_tokens, num_experts, dtype=dtype)
        bias = draw(2, num_experts, dtype=torch.float32, scale=0.1) if biased else None
        if tied:
            logits, bias = logits.round(), None if bias is None else bias.round()
        scoring = (*score, 1e-20 if score[0] != "softmax" and k > 1 else None, scaling)
        args = (logits, bias, None, k, *scoring, False, *groups)
        weights, indices, _ = kernel("topk_router", *args)
        _, expected, _ = reference(topk_ops._topk_router_reference, *args)
        assert_exact(indices, expected, f"{args[2:]}")
        wide = (logits.double(), indices, *scoring)
        true = reference(topk_ops._weighed, *wide)
        assert_accurate(weights, true, work=torch.float32, scale=4.0, what=f"{args[2:]}")
        grad = draw(3, num_tokens, k, dtype=dtype)
        again, _ = kernel("weigh_experts", logits, indices, None, *scoring)
        assert_accurate(again, true, work=torch.float32, scale=4.0, what=f"{args[2:]} given")
        grad_sums, mask = draw(4, num_experts, dtype=torch.float32), torch.arange(num_tokens) % 3 == 1
        sums = kernel("score_sums", logits, grad_sums, score[0], mask)
        assert_accurate(sums, reference(topk_ops._sums_reference, logits.double(), grad_sums, score[0], mask), scale=8.0)
        for parts in ((grad, None), (None, grad_sums), (grad, grad_sums)):
            found = kernel("topk_router_backward", *parts, logits, indices, mask, *scoring)
            whole = (None if part is None else part.double() for part in parts)
            true = reference(topk_ops._backward_reference, *whole, *wide[:2], mask, *scoring)
            assert_accurate(found, true, work=torch.float32, scale=16.0, what=f"{args[2:]} gradient")


def test_topk_of_what_is_no_number():
    nan, inf = float("nan"), float("inf")
    logits = draw(5, 6, 8, dtype=torch.float32)
    logits[0], logits[1, 3], logits[2, :4], logits[3, 2], logits[4] = nan, nan, -inf, inf, -inf
    logits[4, 7], logits[5] = nan, torch.tensor([-0.0, 0.0] * 4)
    for groups, score in itertools.product([(0, 0, 0), (4, 2, 2)], SCORES):
        args = (logits, None, None, 4, *score, None, None, False, *groups)
        weights, indices, _ = kernel("topk_router", *args)
        true, expected, _ = reference(topk_ops._topk_router_reference, *args)
        assert_exact(indices, expected)
        assert torch.equal(weights.isnan(), true.isnan())


def test_a_name_that_a_launcher_knows_and_a_kernel_does_not(monkeypatch):
    from moekit.kernels.triton import _activation

    monkeypatch.setitem(_activation.ACTIVATIONS, "made_up", "made_up")
    monkeypatch.setitem(_activation.OWN_SCORES, "made_up", "made_up")
    y, logits, indices = torch.ones(3, 8), torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.int64)
    glu = (None, None, None, *glu_ops.make_glu()._replace(act="made_up"))
    for name, what, *args in (
        ("glu", "activation", y, *glu),
        ("glu_backward", "activation", y[:, :4], y, None, *glu, [True, True, False, False]),
        ("topk_router", "score", logits, None, None, 2, "made_up", False, None, None, False, 0, 0, 0),
        ("topk_router", "score", logits, logits[0], None, 2, "made_up", False, None, None, False, 0, 0, 0),
        ("weigh_experts", "score", logits, indices, None, "made_up", False, None, None),
        ("score_sums", "score", logits, logits[0], "made_up", None),
        ("topk_router_backward", "score", logits[:, :2], None, logits, indices, None, "made_up", False, None, None),
    ):
        with pytest.raises(Exception, match=r"(?s).+") as raised:
            kernel(name, *args)
        said, error = [], raised.value
        while error is not None:  # compiled, it is the cause of the error of each function on the way
            said.append(str(error))
            error = error.__cause__ or error.__context__
        assert any(f"no {what} of this name" in text for text in said), said


# --- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "warps"), [(4, 2), (8, 8), (16, 4), (32, 4)])
def test_every_configuration(monkeypatch, size, warps):
    from moekit.kernels.triton import _launch

    monkeypatch.setattr(_launch, "_TILES", {name: _launch.Tile(size, warps) for name in _launch._TILES})
    check_glu("silu", "experts", torch.bfloat16, num_rows=70, width=40)
    check_glu("clamp-after-bias", "none", torch.bfloat16, num_rows=70, width=40)
    test_unpermute_and_its_gradient(72, torch.bfloat16)


@pytest.mark.parametrize(("op", "size"), [("route_map", None), ("map_to_indices", 1), ("route_capacity", 2)])
def test_what_is_no_map_is_left_to_the_reference(op, size):
    from moekit.kernels.triton import KERNELS

    assert KERNELS[op](torch.ones(6, dtype=torch.bool), size) is NotImplemented


def test_float64_is_left_to_the_reference():
    from moekit.kernels.triton import KERNELS

    y = place(torch.ones(3, 4, dtype=torch.float64))
    assert KERNELS["glu"](y, None, None, None, *glu_ops.make_glu()) is NotImplemented
    assert KERNELS["topk_router"](y, None, None, 1, "softmax", False, None, None, False, 0, 0, 0) is NotImplemented
