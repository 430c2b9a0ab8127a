"""Native sort_chunks, against a loop over the chunks."""

from __future__ import annotations

import pytest
import torch
from _by_hand import chunks_by_hand, leaf
from _reference import DTYPES, LAYOUTS, assert_accurate, assert_same, draw

import moekit

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("shape", [(9,), (9, 5), (9, 2, 3)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.bool])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sort_chunks_is_exact(shape, dtype, index_dtype):
    sizes, order = [2, 0, 4, 3], [3, 0, 2, 1]
    x, probs = (draw(0, *shape) * 3).to(dtype), draw(1, 9, dtype=torch.float32)
    tables_of = [torch.tensor(t, dtype=index_dtype) for t in (sizes, order)]
    moved, moved_probs = moekit.sort_chunks(x, *tables_of, probs)
    assert_same(moved, chunks_by_hand(x, sizes, order))
    assert_same(moved_probs, chunks_by_hand(probs, sizes, order))
    if dtype.is_floating_point:
        x, probs = leaf(x), leaf(probs)
        moved, moved_probs = moekit.sort_chunks(x, *tables_of, probs)
        grad, probs_grad = draw(2, *shape, dtype=dtype), draw(3, 9, dtype=torch.float32)
        torch.autograd.backward((moved, moved_probs), (grad, probs_grad))
        assert_same(chunks_by_hand(x.grad, sizes, order), grad)
        assert_same(chunks_by_hand(probs.grad, sizes, order), probs_grad)


@pytest.mark.parametrize("order", [[2, 0], [1, 1, 2], [2]])
def test_sort_chunks_takes_some_or_repeats(order):
    x = leaf(draw(0, 6, 3))
    moved, probs = moekit.sort_chunks(x, torch.tensor([1, 3, 2]), torch.tensor(order))
    assert probs is None
    assert_same(moved.detach(), chunks_by_hand(x.detach(), [1, 3, 2], order))
    grad = draw(1, *moved.shape)
    moved.backward(grad)
    source = chunks_by_hand(torch.arange(6), [1, 3, 2], order)
    assert_accurate(x.grad, torch.stack([grad[source == r].sum(0) for r in range(6)]))


def test_sort_chunks_of_nothing():
    x = torch.zeros(0, 3, requires_grad=True)
    for sizes in ([0, 0], []):
        order = torch.arange(len(sizes)).flip(0)
        moved, _ = moekit.sort_chunks(x, torch.tensor(sizes, dtype=torch.int64), order)
        assert moved.shape == (0, 3)
        moved.sum().backward()
        assert x.grad.shape == (0, 3)
    assert moekit.sort_chunks(torch.zeros(4, 0), torch.tensor([1, 3]), torch.tensor([1, 0]))[0].shape == (4, 0)


def test_sort_chunks_of_strided_inputs():
    sizes, order = torch.tensor([2, 4, 3]), torch.tensor([2, 0, 1])
    x = draw(0, 9, 2, 3, dtype=torch.bfloat16)
    plain, _ = moekit.sort_chunks(x, sizes, order)
    for lay in LAYOUTS.values():
        assert_same(moekit.sort_chunks(lay(x), lay(sizes), lay(order))[0], plain)


@pytest.mark.parametrize(
    ("sizes", "order", "error", "message"),
    [
        ([1, 3], [0, 1], ValueError, r"split_sizes must be sizes that sum to the 6 rows, got \[1, 3\]"),
        ([9, -3], [0, 1], ValueError, "split_sizes must be sizes that sum to the 6 rows"),
        ([2, 4], [0, 2], ValueError, r"sorted_idxs must be chunk numbers in \[0, 2\), got \[0, 2\]"),
        ([2, 4], [0, -1], ValueError, r"sorted_idxs must be chunk numbers in \[0, 2\)"),
        ([2.0, 4.0], [0, 1], TypeError, "split_sizes must be an int32 or int64 tensor, got torch.float32"),
        ([2, 4], [0.0, 1.0], TypeError, "sorted_idxs must be an int32 or int64 tensor"),
        ([[2, 4]], [0, 1], ValueError, "split_sizes must be a 1-D tensor"),
    ],
)
def test_sort_chunks_refuses(sizes, order, error, message):
    with pytest.raises(error, match=message):
        moekit.sort_chunks(torch.zeros(6, 2), torch.tensor(sizes), torch.tensor(order))


def test_outputs_never_alias_inputs():
    """Chunks that stay where they are."""
    x, probs = draw(0, 4, 2), draw(1, 4)
    before = x.clone(), probs.clone()
    outputs = moekit.sort_chunks(x, torch.tensor([1, 3]), torch.tensor([0, 1]), probs)
    for out, was, now in zip(outputs, before, (x, probs), strict=True):
        assert_same(out, was)
        out.zero_()
        assert_same(now, was)


def test_mixed_devices():
    x, table = torch.zeros(2, 3), torch.tensor([1, 1])
    with pytest.raises(ValueError, match=r"probs must be on the device of input \(cpu\), got meta"):
        moekit.sort_chunks(x, table, table, probs=torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match=r"sorted_idxs must be on the device of split_sizes \(cpu\), got meta"):
        moekit.sort_chunks(x, table, table.to("meta"))
    with pytest.raises(ValueError, match=r"split_sizes must be on the device of input \(cpu\), got meta"):
        moekit.sort_chunks(x, table.to("meta"), table.to("meta"))


def test_wrong_shapes_say_so():
    with pytest.raises(ValueError, match=r"sort_chunks: input must be a tensor of rows, got shape \[\]"):
        moekit.sort_chunks(torch.tensor(1.0), torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"sort_chunks: probs must be of 6 rows, got shape \[5\]"):
        moekit.sort_chunks(torch.zeros(6, 2), torch.tensor([6]), torch.tensor([0]), probs=torch.zeros(5))
