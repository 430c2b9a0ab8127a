"""The routing tables of every operator in ``ops/tables.py``, against loops."""

from __future__ import annotations

import pytest
import torch
from _by_hand import CASES, every_case, slots_by_hand
from _reference import LAYOUTS, assert_same, draw, opcheck
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moekit import Routing
from moekit.ops import tables

pytestmark = pytest.mark.usefixtures("backend")
ops = torch.ops.moekit

# What may stand in a map: everything that is not zero is routed. An int8 cast would lose 256 and 0.5.
MAPS = {
    "bool": (torch.bool, True),
    "uint8": (torch.uint8, 255),
    "int8": (torch.int8, -1),
    "int16": (torch.int16, 256),
    "int32": (torch.int32, 65536),
    "int64": (torch.int64, 2**32),
    "float32": (torch.float32, 0.5),
    "float64": (torch.float64, 1e-300),
    "bfloat16": (torch.bfloat16, 0.25),
    "float16": (torch.float16, -(2.0**-24)),
    "nan": (torch.float32, float("nan")),
}


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def map_of(indices: Tensor, experts: int, dtype: torch.dtype = torch.bool, mark=True) -> Tensor:
    """The map of a ``[T, K]`` table; -1 leaves no mark."""
    out = torch.zeros(indices.shape[0], experts, dtype=dtype)
    for t, row in enumerate(indices.tolist()):
        for e in row:
            if e >= 0:
                out[t, e] = mark
    return out


def route_map_by_hand(routing_map: Tensor, num_rows: int | None) -> tuple[Tensor, ...]:
    """Counts, token of each row, place in the map of each row, and the rows of each token."""
    tokens, experts = routing_map.shape
    pairs = [(t, e) for e in range(experts) for t in range(tokens) if routing_map[t, e] != 0]
    counts = ints(*(sum(e == expert for _, e in pairs) for expert in range(experts)))
    spare = [-1] * ((num_rows or 0) - len(pairs))
    by_token = sorted(range(len(pairs)), key=lambda row: pairs[row][0])  # Python's sort is stable
    begins = [sum(t < token for t, _ in pairs) for token in range(tokens + 1)]
    return (
        counts,
        ints(*(t for t, _ in pairs), *spare),
        ints(*(t * experts + e for t, e in pairs), *spare),
        ints(*begins, dtype=torch.int32),
        ints(*by_token, *spare, dtype=torch.int32),
    )


def assert_tables(actual, expected) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same(a, e, f"table {i}")


# --- from top-k indices ---------------------------------------------------------------------------------------------


def route_indices_by_hand(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = slots_by_hand(indices, experts)
    topk = indices.shape[1]
    counts = ints(*(int((indices == e).sum()) for e in range(experts)))
    order = [t * topk + k for t, k in slots] + [-1] * (indices.numel() - len(slots))
    inverse = torch.full(indices.shape, -1, dtype=torch.int32)
    for row, (t, k) in enumerate(slots):
        inverse[t, k] = row
    return counts, counts.cumsum(0).int(), ints(*order, dtype=torch.int32), inverse


@every_case
def test_route_indices(poisoned, name):
    indices, experts, _ = CASES[name]
    expected = route_indices_by_hand(indices, experts)
    for dtype in (torch.int32, torch.int64):
        for lay in LAYOUTS.values():
            assert_tables(tables.route_indices(lay(indices.to(dtype)), experts), expected)


def test_route_indices_of_nothing(poisoned):
    counts, offsets, order, inverse = tables.route_indices(torch.zeros(0, 2, dtype=torch.int32), 3)
    assert_tables((counts, offsets), (ints(0, 0, 0), ints(0, 0, 0, dtype=torch.int32)))
    assert order.shape == (0,) and inverse.shape == (0, 2)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_indices(data):
    experts, topk = data.draw(st.integers(1, 20), "experts"), data.draw(st.integers(1, 5), "topk")
    flat = data.draw(st.lists(st.integers(-1, experts - 1), max_size=60), "indices")
    indices = torch.tensor(flat[: len(flat) // topk * topk], dtype=torch.int64).view(-1, topk)
    assert_tables(tables.route_indices(indices, experts), route_indices_by_hand(indices, experts))


@pytest.mark.not_interpreted
@pytest.mark.parametrize(("size", "runs"), [(1 << 10, 20), (1 << 15, 2)])
def test_many_rows(size, runs):
    """Long enough for several threads; the sort is stable, so the answer is known."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, 37, (size, 3), generator=generator)
    flat = indices.view(-1)
    counts, offsets, order, inverse = tables.route_indices(indices, 37)
    assert_same(counts, torch.bincount(flat[flat >= 0], minlength=37))
    assert_same(offsets, counts.cumsum(0).int())
    routed = int(counts.sum())
    assert not (order[routed:] + 1).any()
    found = flat[order[:routed].long()]
    assert not (found.diff() < 0).any()  # expert-major
    assert ((order[:routed].diff() > 0) | (found.diff() > 0)).all()  # ascending within
    assert_same(inverse.view(-1)[order[:routed].long()], torch.arange(routed, dtype=torch.int32))
    assert_same(inverse == -1, indices == -1)
    for _ in range(runs - 1):
        assert_tables(tables.route_indices(indices, 37), (counts, offsets, order, inverse))


# --- from a map -----------------------------------------------------------------------------------------------------


@every_case
def test_route_map(poisoned, name):
    indices, experts, _ = CASES[name]
    for dtype, mark in MAPS.values():
        routing_map = map_of(indices, experts, dtype, mark)
        routed = int((routing_map != 0).sum())
        for num_rows in (None, routed, routed + 3):
            assert_tables(tables.route_map(routing_map, num_rows), route_map_by_hand(routing_map, num_rows))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_of_any_layout(layout):
    indices, experts, _ = CASES["e7_odd_hidden"]
    routing_map = map_of(indices, experts)
    laid = LAYOUTS[layout](routing_map)
    assert_tables(tables.route_map(laid, None), route_map_by_hand(routing_map, None))
    assert_same(tables.map_to_indices(laid, None), indices.sort(1).values)
    assert_same(tables.route_capacity(laid, 4), capacity_by_hand(routing_map, 4))
    column = torch.tensor([[True], [False], [True]]).expand(3, 4)  # stride 0
    assert_tables(tables.route_map(column, None), route_map_by_hand(column, None))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_maps_of_nothing(poisoned, shape):
    routing_map = torch.zeros(shape)
    for num_rows in (None, 0, 2):
        assert_tables(tables.route_map(routing_map, num_rows), route_map_by_hand(routing_map, num_rows))
    assert tables.map_to_indices(routing_map, None).shape == (shape[0], 0)
    assert_same(tables.map_to_indices(routing_map, 2), torch.full((shape[0], 2), -1))
    assert_same(tables.route_capacity(routing_map, 2), capacity_by_hand(routing_map, 2))


@pytest.mark.parametrize("num_rows", [0, 3])
def test_capacity_below_the_routed_count(num_rows):
    routing_map = torch.tensor([[1, 1], [0, 1], [1, 0]])
    with pytest.raises(ValueError, match=rf"num_out_tokens .*at least the 4 routed pairs .*, got {num_rows}"):
        tables.route_map(routing_map, num_rows)


@every_case
def test_map_to_indices(poisoned, name):
    indices, experts, _ = CASES[name]
    for dtype, mark in MAPS.values():
        routing_map = map_of(indices, experts, dtype, mark)
        rows = [[e for e in range(experts) if routing_map[t, e] != 0] for t in range(indices.shape[0])]
        widest = max(map(len, rows))
        for topk in {None, widest, experts}:
            width = widest if topk is None else topk
            expected = ints(*(e for row in rows for e in row + [-1] * (width - len(row)))).view(len(rows), width)
            assert_same(tables.map_to_indices(routing_map, topk), expected)


def test_map_wider_than_topk():
    with pytest.raises(ValueError, match=r"topk must be at least the 3 experts of a token, got 2"):
        tables.map_to_indices(torch.tensor([[1, 0, 0], [1, 1, 1]]), 2)


# --- capacity -------------------------------------------------------------------------------------------------------


def capacity_by_hand(routing_map: Tensor, capacity: int) -> Tensor:
    """For each expert the first routed tokens, then unrouted ones, then -1."""
    tokens, experts = routing_map.shape
    out = []
    for e in range(experts):
        routed = [t for t in range(tokens) if routing_map[t, e] != 0]
        chosen = routed + [t for t in range(tokens) if t not in routed] + [-1] * capacity
        out += chosen[:capacity]
    return ints(*out)


@every_case
def test_route_capacity(poisoned, name):
    indices, experts, _ = CASES[name]
    for dtype, mark in MAPS.values():
        routing_map = map_of(indices, experts, dtype, mark)
        for capacity in (0, 1, 3, indices.shape[0], indices.shape[0] + 2):
            assert_same(tables.route_capacity(routing_map, capacity), capacity_by_hand(routing_map, capacity))


# --- the rows of each token -----------------------------------------------------------------------------------------


def rows_of_tokens_by_hand(row_token: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    lists = [[row for row, token in enumerate(row_token) if token == t] for t in range(num_tokens)]
    offsets, found = [0], []
    for rows in lists:
        found += rows
        offsets.append(len(found))
    found += [-1] * (len(row_token) - len(found))
    return ints(*offsets, dtype=torch.int32), ints(*found, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("row_token", "num_tokens"),
    [([2, 0, -1, 2, 1, 2, -1], 4), ([0, 0, 0], 1), ([-1, -1], 3), ([], 2), ([], 0), ([-1], 0), ([3, 2, 1, 0], 4)],
)
def test_rows_of_tokens(poisoned, row_token, num_tokens, dtype):
    expected = rows_of_tokens_by_hand(row_token, num_tokens)
    for lay in LAYOUTS.values():
        assert_tables(tables.rows_of_tokens(lay(ints(*row_token, dtype=dtype)), num_tokens), expected)


@pytest.mark.parametrize("size", [1 << 10, pytest.param(1 << 15, marks=pytest.mark.not_interpreted)])
def test_rows_of_many_tokens(size):
    generator = torch.Generator().manual_seed(1)
    row_token = torch.randint(-1, 100, (size,), generator=generator)
    offsets, found = tables.rows_of_tokens(row_token, 100)
    wanted = torch.cat([(row_token == t).nonzero().view(-1) for t in range(100)]).int()
    assert_same(found[: len(wanted)], wanted)
    assert not (found[len(wanted) :] + 1).any()
    assert_same(offsets.diff(), torch.bincount(row_token[row_token >= 0], minlength=100).int())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [4, 2**31 - 1, -2, -(2**31)])
def test_out_of_range(bad, dtype):
    index = ints(0, 3, bad, 1, dtype=dtype)
    with pytest.raises(ValueError, match=rf"unpermute: sorted_indices must be .* below 4 .*, got index {bad}$"):
        tables.rows_of_tokens(index, 4)
    with pytest.raises(ValueError, match=rf"from_topk: indices must be .* below 4 .*, got index {bad}$"):
        tables.route_indices(index.view(2, 2), 4)


# --- chunks and padding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("sizes", "order"),
    [([2, 0, 3], [2, 1, 0]), ([2, 0, 3], [2, 0]), ([1, 2], [1, 1, 0]), ([], []), ([0, 0], [1, 0]), ([4], [0])],
)
def test_sort_chunk_rows(poisoned, sizes, order, dtype):
    starts = [sum(sizes[:c]) for c in range(len(sizes))]
    expected = ints(*(starts[c] + i for c in order for i in range(sizes[c])))
    for lay in LAYOUTS.values():
        args = lay(ints(*sizes, dtype=dtype)), lay(ints(*order, dtype=dtype)), sum(sizes)
        assert_same(tables.sort_chunk_rows(*args, None), expected)
        assert_same(tables.sort_chunk_rows(*args, len(expected)), expected)


def test_sort_chunk_rows_must_give_the_rows_it_was_told():
    with pytest.raises(ValueError, match=r"sorted_idxs must be a permutation of the chunks, got \[1, 1\]"):
        tables.sort_chunk_rows(ints(1, 2), ints(1, 1), 3, 3)


def pad_rows_by_hand(indices: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    topk = indices.shape[1]
    order, ends, inverse = [], [], torch.full(indices.shape, -1, dtype=torch.int32)
    for e in range(experts):
        for t, k in slots_by_hand(indices, experts):
            if indices[t, k] == e:
                inverse[t, k] = len(order)
                order.append(t * topk + k)
        order += [-1] * (-len(order) % multiple)
        ends.append(len(order))
    size = tables.padded_size(indices.numel(), experts, multiple)
    order += [-1] * (size - len(order))
    return ints(*ends, dtype=torch.int32), ints(*order, dtype=torch.int32), inverse


@every_case
@pytest.mark.parametrize("multiple", [1, 2, 5, 16])
def test_pad_rows(poisoned, name, multiple):
    indices, experts, _ = CASES[name]
    routing = Routing.from_topk(indices, num_experts=experts)
    padded = tables.pad_rows(routing.offsets, routing.order, routing.inverse, multiple)
    assert_tables(padded, pad_rows_by_hand(indices, experts, multiple))


def test_pad_rows_of_nothing(poisoned):
    indices = torch.zeros(0, 2, dtype=torch.int64)
    routing = Routing.from_topk(indices, num_experts=3)
    padded = tables.pad_rows(routing.offsets, routing.order, routing.inverse, 4)
    assert_tables(padded, pad_rows_by_hand(indices, 3, 4))


@given(rows=st.integers(0, 40), experts=st.integers(1, 9), multiple=st.integers(1, 17), data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_padded_size_always_suffices_and_is_a_multiple(rows, experts, multiple, data):
    size = tables.padded_size(rows, experts, multiple)
    assert size % multiple == 0
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=experts - 1, max_size=experts - 1)))
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    assert sum(-(-count // multiple) * multiple for count in counts) <= size
    assert size < rows + experts * multiple + multiple  # and does not waste


def test_take_and_row_slots():
    values = draw(0, 3, 4)
    values.requires_grad_()
    slots = tables.row_slots(ints(2, 0, -1, 1), ints(3, 0, -1, 2, dtype=torch.int32), 4)
    assert_same(slots, ints(11, 0, -1, 6))
    taken = tables.take(values, slots.view(2, 2))
    assert_same(taken.detach(), values.detach()[[2, 0, 0, 1], [3, 0, 0, 2]].view(2, 2) * ints(1, 1, 0, 1).view(2, 2))
    taken.backward(torch.tensor([[1.0, 2], [3, 4]], dtype=torch.float64))
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[2, 3], expected[0, 0], expected[1, 2] = 1, 2, 4
    assert_same(values.grad, expected)
    nothing = torch.zeros(0, 4, requires_grad=True)
    assert_same(tables.take(nothing, ints(-1, -1)), torch.zeros(2))
    tables.take(nothing, ints(-1, -1)).sum().backward()
    assert nothing.grad.shape == (0, 4)


def test_take_with_its_inverse():
    values = draw(0, 2, 2).requires_grad_()
    index, back = ints(3, -1, 0), ints(2, -1, -1, 0)
    tables.take(values, index, back).backward(torch.tensor([1.0, 2, 3], dtype=torch.float64))
    assert_same(values.grad, torch.tensor([[3.0, 0], [0, 1]], dtype=torch.float64))
    torch.autograd.gradcheck(tables.take, (values, index, back))
    torch.autograd.gradcheck(tables.take, (values, index))
    torch.autograd.gradcheck(tables.put, (values, ints(4, -1, 0, 1).view(2, 2), 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_put_and_take_any_dtype(poisoned, dtype, index_dtype):
    values = torch.arange(1, 7).view(2, 3).T.to(dtype)  # strided
    index = ints(6, -1, 0, 9, 2, 1, dtype=index_dtype)
    expected = torch.tensor([2, 6, 3, 0, 0, 0, 1]).to(dtype)
    assert_same(tables.put(values, index.view(3, 2), 7), expected)
    assert_same(tables.take(values, index).flatten(), torch.tensor([0, 0, 1, 0, 2, 4]).to(dtype))


def test_row_tables_by_hand(poisoned):
    found = tables.row_tables(ints(5, 0, -1, 3, dtype=torch.int32), 3, 2)
    assert_tables(found, (ints(2, 0, -1, 1, dtype=torch.int32), ints(0, 2, 4, 6, dtype=torch.int32)))
    empty = ints(dtype=torch.int32)
    assert_tables(tables.row_tables(empty, 2, 0), (empty, ints(0, 0, 0, dtype=torch.int32)))


# --- every operator -------------------------------------------------------------------------------------------------


def operator_calls():
    """Arguments of each operator: plain, strided, empty."""
    indices, experts, _ = CASES["some_none"]
    strided = LAYOUTS["transposed"]
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    for i in (indices, strided(indices.int()), nothing):
        yield "route_indices", (i, experts)
    routing_map = map_of(indices, experts, torch.bfloat16, 0.5)
    for m, size in ((routing_map, None), (strided(routing_map), 9), (torch.zeros(0, 3), 2), (torch.zeros(3, 0), None)):
        yield "route_map", (m, size)
        yield "map_to_indices", (m, size)
        yield "route_capacity", (m, size or 3)
    yield "route_map", (routing_map, 9)
    yield "map_to_indices", (routing_map, 2)
    values = draw(0, 2, 3, dtype=torch.float32)
    for v in (values, values.clone().requires_grad_(), strided(values)):
        yield "take", (v, ints(3, -1, 0), None)
        yield "take", (v, ints(3, -1, 0), ints(2, -1, -1, 0, -1, -1))
        yield "put", (v, ints(4, -1, 0, 1, 7, 2).view(2, 3), 8)
    yield "row_tables", (ints(5, 0, -1, 3, dtype=torch.int32), 3, 2)
    for row_token in (ints(2, -1, 0, 2), strided(ints(2, -1, 0, 2, dtype=torch.int32)), ints()):
        yield "rows_of_tokens", (row_token, 3)
    for sizes, order, size in ((ints(2, 0, 3), ints(2, 1, 0), 5), (strided(ints(1, 4)), strided(ints(1, 0)), 5)):
        yield from (("sort_chunk_rows", (sizes, order, size, num_out)) for num_out in (None, size))
    yield "sort_chunk_rows", (ints(), ints(), 0, None)
    for i in (indices, nothing):
        routing = Routing.from_topk(i, num_experts=experts)
        yield "pad_rows", (routing.offsets, routing.order, routing.inverse, 4)
        yield "pad_rows", (strided(routing.offsets), strided(routing.order), strided(routing.inverse), 1)


CALLS = [pytest.param(name, args, id=f"{name}-{i}") for i, (name, args) in enumerate(operator_calls())]


@pytest.mark.parametrize(("name", "args"), CALLS)
def test_opcheck(name, args):
    opcheck(getattr(ops, name).default, args)


@pytest.mark.parametrize(("name", "args"), CALLS)
def test_tables_are_new_memory(name, args):
    """Also where nothing moves: padding to a multiple of 1 is the identity."""
    given_tensors = [a for a in args if isinstance(a, Tensor)]
    before = [a.clone() for a in given_tensors]
    outputs = getattr(ops, name)(*args)
    for out in outputs if isinstance(outputs, tuple) else (outputs,):
        out.fill_(99)
    for now, was in zip(given_tensors, before, strict=True):
        assert_same(now, was)


@pytest.mark.parametrize(("name", "args"), [call for call in CALLS if call.values[1][-1] is not None])
def test_fake_tables_have_the_real_shapes(name, args):
    """On meta tensors, where the size does not depend on values."""
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    real, fake = getattr(ops, name)(*args), getattr(ops, name)(*meta)
    for r, f in zip(*((x if isinstance(x, tuple) else (x,)) for x in (real, fake)), strict=True):
        assert (f.device.type, f.shape, f.dtype) == ("meta", r.shape, r.dtype)
        assert f.stride() == r.stride() or not r.numel()
