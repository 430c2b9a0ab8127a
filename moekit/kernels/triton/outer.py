"""Gradients of weights: the outer products of each expert's rows, summed over them.

For GPUs with a copy engine, which fetches both factors. A descriptor of ragged rows ends where an expert's rows do: what a
block has past them are zeros, which add nothing, whatever the next expert's rows hold.
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
from moekit.kernels.triton._ragged import MOST_ROWS, load_ragged, ragged
from moekit.kernels.triton._tiles import row_blocks
from moekit.kernels.triton.gemm import describes, processors

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
    of_expert = blocks_m * blocks_n
    for tile in tl.range(tl.program_id(0), num_experts * of_expert, tl.num_programs(0), flatten=FLAT):
        expert = tile // of_expert
        own = slot == expert
        begin = tl.sum(tl.where(own, begins, 0), 0)
        end = tl.sum(tl.where(own, ends, 0), 0)
        inner = tile - expert * of_expert
        group = inner // (GROUP * blocks_n)
        inner -= group * GROUP * blocks_n
        together = tl.minimum(blocks_m - group * GROUP, GROUP)
        m, n = (group * GROUP + inner % together) * BLOCK_M, inner // together * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # An expert without rows has a block of zeros: one loop of two must not be one of no turns.
        for row in range(begin, tl.maximum(end, begin + 1), BLOCK_K):
            a = load_ragged(left, row, end, m, BLOCK_K, BLOCK_M)
            b = load_ragged(right, row, end, n, BLOCK_K, BLOCK_N)
            total = tl.dot(tl.trans(a), b, total)
        out.store([expert, m, n], tl.reshape(total.to(out.dtype), (1, BLOCK_M, BLOCK_N)))


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Any:
    """See :func:`moekit.ops.gemm.grouped_outer`, of rows that are together."""
    return _outer(left, right, offsets, len(left))


def gathered_outer(left: Tensor, right: Tensor, offsets: Tensor, index: Tensor, side: str) -> Any:
    """The same where the rows of ``side``, "left" or "right", are those tokens of it that ``index`` names."""
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
        return NotImplemented
    return _outer(left, right, offsets, len(index), index.contiguous(), side)


def _outer(
    left: Tensor, right: Tensor, offsets: Tensor, num_rows: int, index: Tensor | None = None, side: str = "none"
) -> Any:
    shape = Shape(num_rows, offsets.shape[0], left.shape[1], right.shape[1])
    cut = _policy.outer(shape, left.dtype, _launch.arch(left.device).name, gathered=side)
    fits = left.dtype is right.dtype and offsets.dtype in (torch.int32, torch.int64) and 0 < num_rows <= MOST_ROWS
    # Copies of 16 bytes, from rows whose distance is an integer of 32 bits.
    whole = left.shape[1] * left.itemsize % 16 == 0 and max(left.stride(0), right.stride(0)) < 2**31
    able = cut is not None and (index is None or (cut.fetchers and whole))
    if not (able and fits and describes(left) and describes(right)):
        return NotImplemented
    out = left.new_empty(shape.num_experts, shape.depth, shape.width)
    if not describes(out):
        return NotImplemented
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
