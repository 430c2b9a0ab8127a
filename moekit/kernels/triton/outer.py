"""Gradients of weights: the outer products of each expert's rows, summed over them.

In one kernel the copy engine of sm_90 and later fetches both factors. A descriptor of ragged rows ends where an expert's
rows do: what a block has past them are zeros, which add nothing, whatever the next expert's rows hold. In the other threads
fetch, on any architecture, what PyTorch would multiply expert by expert once the host knew the offsets.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moekit.kernels.triton import _launch, _policy
from moekit.kernels.triton._policy import Shape
from moekit.kernels.triton._ragged import MOST_ROWS, describes, load_ragged, ragged
from moekit.kernels.triton._tiles import place_in, row_blocks
from moekit.kernels.triton.gemm import even, processors
from moekit.kernels.triton.rows import permute

_GROUP = 8  # blocks of outputs that share what is in the L2 cache of the other factor


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _outer_kernel(
    offsets, left, right, out, num_rows, num_experts, blocks_m, blocks_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many-th tile ``[BLOCK_M, BLOCK_N]`` of ``out [E, M, N]``; all tensors are descriptors."""
    slot = tl.arange(0, BLOCK_E)
    begins, ends, _ = row_blocks(offsets, 0, num_experts, num_rows, slot, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_experts * blocks_m * blocks_n, tl.num_programs(0), flatten=FLAT):
        expert, begin, end, m, n = place_in(tile, begins, ends, slot, blocks_m, blocks_n, BLOCK_M, BLOCK_N, GROUP)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # An expert without rows has a block of zeros: one loop of two must not be one of no turns.
        for row in range(begin, tl.maximum(end, begin + 1), BLOCK_K):
            a = load_ragged(left, row, end, m, BLOCK_K, BLOCK_M)
            b = load_ragged(right, row, end, n, BLOCK_K, BLOCK_N)
            total = tl.dot(tl.trans(a), b, total)
        out.store([expert, m, n], tl.reshape(total.to(out.dtype), (1, BLOCK_M, BLOCK_N)))


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _fetched_outer_kernel(
    left, right, offsets, out, num_rows, num_experts, height, width, blocks_m, blocks_n, stride_left, stride_right,
    stride_expert, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same tiles. Columns past the last are read as zeros, and so are rows of other experts."""
    slot = tl.arange(0, BLOCK_E)
    begins, ends, _ = row_blocks(offsets, 0, num_experts, num_rows, slot, BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_experts * blocks_m * blocks_n, tl.num_programs(0)):
        expert, begin, end, m, n = place_in(tile, begins, ends, slot, blocks_m, blocks_n, BLOCK_M, BLOCK_N, GROUP)
        m, n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for row in range(begin, end, BLOCK_K):
            known, place = k < end - row, (row + k).to(tl.int64)
            of_left = left + (place * stride_left)[None, :] + m[:, None]
            a = tl.load(of_left, mask=known[None, :] & (m < height)[:, None], other=0.0)
            of_right = right + (place * stride_right)[:, None] + n[None, :]
            b = tl.load(of_right, mask=known[:, None] & (n < width)[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        line = (tl.zeros([BLOCK_M], tl.int64) + expert) * stride_expert + m.to(tl.int64) * stride_out
        inside = (m < height)[:, None] & (n < width)[None, :]
        tl.store(out + line[:, None] + n[None, :], total.to(out.dtype.element_ty), mask=inside)


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Any:
    """See :func:`moekit.ops.gemm.grouped_outer`, of rows that are together."""
    return _outer(left, right, offsets, len(left))


def gathered_outer(left: Tensor, right: Tensor, offsets: Tensor, tables: tuple[Tensor, Tensor, Tensor], side: str) -> Any:
    """The same where the rows of ``side``, "left" or "right", are tokens: see :class:`moekit.ops.gathered.Gathered`.

    They are fetched, or brought together; of many columns half at a time, which takes half of the memory.
    """
    index = tables[0]
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
        return NotImplemented
    product = _outer(left, right, offsets, len(index), index.contiguous(), side)
    return _by_column_halves(left, right, offsets, tables, side) if product is NotImplemented else product


def _by_column_halves(left: Tensor, right: Tensor, offsets: Tensor, tables: tuple[Tensor, Tensor, Tensor], side: str) -> Any:
    """Of rows that are brought together; not where PyTorch's product would take all of them, or no descriptor a half."""
    arch = _launch.arch(left.device).name
    whole = Shape(len(tables[0]), offsets.shape[0], left.shape[1], right.shape[1])
    tokens = left if side == "left" else right
    if not _policy.waits(left.dtype, arch):
        uneven = max(extent * left.itemsize % 16 for extent in (tokens.shape[1], whole.width))
        if uneven or _policy.outer(whole, left.dtype, arch) is None:
            return NotImplemented
    out = left.new_empty(whole.num_experts, whole.depth, whole.width)
    for part in _policy.column_halves(tokens.shape[1]):
        moved = permute(tokens[:, part], *tables)
        if moved is NotImplemented:
            return NotImplemented
        if side == "left":
            product = _outer(moved, right, offsets, whole.num_rows, out=out[:, part])
        else:
            product = _outer(left, moved, offsets, whole.num_rows, out=out[:, :, part])
        if product is NotImplemented:
            return NotImplemented
        del moved  # before the next half is there
    return out


def _outer(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    num_rows: int,
    index: Tensor | None = None,
    side: str = "none",
    out: Tensor | None = None,
) -> Any:
    shape = Shape(num_rows, offsets.shape[0], left.shape[1], right.shape[1])
    arch = _launch.arch(left.device).name
    cut = _policy.outer(shape, left.dtype, arch, gathered=side)
    fits = left.dtype is right.dtype and offsets.dtype in (torch.int32, torch.int64) and 0 < num_rows <= MOST_ROWS
    # Copies of 16 bytes, from rows whose distance is an integer of 32 bits.
    whole = left.shape[1] * left.itemsize % 16 == 0 and max(left.stride(0), right.stride(0)) < 2**31
    able = cut is not None and (index is None or (cut.fetchers and whole))
    apart = shape.width if out is None else out.stride(1)
    fits = fits and shape.num_experts > 0 and apart * left.itemsize % 16 == 0  # of which there is a descriptor
    if not (able and fits and describes(left) and describes(right)):
        takes = index is None and _policy.waits(left.dtype, arch)
        return _fetched(left, right, offsets, shape, out) if takes else NotImplemented
    out = left.new_empty(shape.num_experts, shape.depth, shape.width) if out is None else out
    offsets, programs = offsets.contiguous(), cut.programs * processors(left.device)
    if cut.fetchers:
        from moekit.kernels.triton import hopper_outer  # Gluon, for one architecture alone

        hopper_outer.launch_outer(cut, shape, offsets, left, right, index, side, out, programs)
        return out
    blocks_m, blocks_n = _launch.blocks(shape.depth, cut.rows), _launch.blocks(shape.width, cut.columns)
    _launch.launch(
        _outer_kernel, (min(shape.num_experts * blocks_m * blocks_n, programs),),
        offsets, ragged(left, [cut.depth, cut.rows]), ragged(right, [cut.depth, cut.columns]),
        TensorDescriptor.from_tensor(out, [1, cut.rows, cut.columns]), num_rows, shape.num_experts, blocks_m, blocks_n,
        BLOCK_M=cut.rows, BLOCK_N=cut.columns, BLOCK_K=cut.depth, BLOCK_E=_launch.power_of_two(shape.num_experts),
        GROUP=_GROUP, FLAT=cut.flat, num_stages=cut.stages, config=cut,
    )  # fmt: skip
    return out


def _fetched(left: Tensor, right: Tensor, offsets: Tensor, shape: Shape, out: Tensor | None = None) -> Any:
    """Launch the kernel whose threads fetch."""
    fits = _launch.computes(left) and left.dtype is right.dtype and offsets.dtype in (torch.int32, torch.int64)
    if not fits or shape.num_rows >= 2**31:
        return NotImplemented
    left, right = _launch.rows_of(left), _launch.rows_of(right)
    out = left.new_empty(shape.num_experts, shape.depth, shape.width) if out is None else out
    cut = _policy.fetched_outer(left.dtype, even=even(left, right))
    blocks_m, blocks_n = _launch.blocks(shape.depth, cut.rows), _launch.blocks(shape.width, cut.columns)
    _launch.launch(
        _fetched_outer_kernel, (min(shape.num_experts * blocks_m * blocks_n, cut.programs * processors(left.device)),),
        left, right, offsets.contiguous(), out, shape.num_rows, shape.num_experts, shape.depth, shape.width,
        blocks_m, blocks_n, left.stride(0), right.stride(0), out.stride(0), out.stride(1),
        BLOCK_M=cut.rows, BLOCK_N=cut.columns, BLOCK_K=cut.depth, BLOCK_E=_launch.power_of_two(shape.num_experts),
        GROUP=_GROUP, PRECISION=_launch.precision(left), num_stages=cut.stages, config=cut,
    )  # fmt: skip
    return out
