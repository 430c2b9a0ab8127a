"""Products with rows that are fetched from where they are: tokens by their numbers, with no copy of them in expert order.

For GPUs with a copy engine, which fetches the matrices, while threads fetch the rows. The gated activation may be applied
to a tile before it leaves the registers. Gate and up of the same features stand side by side in such a tile, whatever their
order in memory: a descriptor says where its rows come from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.kernels.triton import _launch, _policy
from moekit.kernels.triton._halves import through_gate
from moekit.kernels.triton._policy import Blocks, Shape
from moekit.kernels.triton._ragged import describable, describes, leaves_ragged
from moekit.kernels.triton._tiles import place_of, row_blocks, store
from moekit.kernels.triton.gemm import PLAIN, descriptor, grid, of_matrices, sizes
from moekit.kernels.triton.glu import gate_constants, tidy_bias


@triton.jit
def _tokens_of(index, row, end, num_tokens):
    """The tokens of rows, 0 for none, and which rows have one."""
    token = tl.load(index + row, mask=row < end, other=-1)
    known = (token >= 0) & (token < num_tokens)
    return tl.where(known, token, 0).to(tl.int64), known


@triton.jit
def _gate(
    tile, weights, bias, out, act, expert, top, block, end, width, stride_out, stride_act, stride_bias,
    c1, c3, linear_offset, clamp,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a tile of projections, rounded already, as they are and through the gate."""
    both = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if LAYOUT == "ungated":
        if out is not None:
            store(out, tile, top, both, end, width, stride_out)
        inner, column, gate = width, both, tile
        up = gate
    else:
        inner, column = width // 2, block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        gate, up = tl.split(tl.reshape(tile, (tile.shape[0], BLOCK_N // 2, 2)))
        if out is not None:
            if LAYOUT == "interleaved":
                store(out, tile, top, both, end, width, stride_out)
            else:
                store(out, gate, top, column, end, inner, stride_out)
                store(out + inner, up, top, column, end, inner, stride_out)
    value = through_gate(
        gate, up, weights, bias, expert, top + tl.arange(0, tile.shape[0]), column, end, inner, stride_bias,
        c1, c3, linear_offset, clamp, ACT, LAYOUT, CLAMP, FAST,
    )  # fmt: skip
    store(act, value, top, column, end, inner, stride_act)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_experts"])
def _gathered_kernel(
    offsets, tokens, index, matrices, weights, bias, out, act,
    num_rows, num_tokens, num_experts, depth, width, column_blocks, stride_tokens, stride_out, stride_act, stride_bias,
    c1, c3, linear_offset, clamp,
    BACK: tl.constexpr, PAIRED: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr, CLAMP: tl.constexpr,
    FAST: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many-th tile ``[BLOCK_M, BLOCK_N]``; with ACT of pairs of gate and up."""
    slot = tl.arange(0, BLOCK_E)
    begins, ends, through = row_blocks(offsets, 0, num_experts, num_rows, slot, BLOCK_M)
    tiles = tl.max(through, 0) * column_blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        expert, top, end, block = place_of(tile, begins, ends, through, slot, column_blocks, BLOCK_M, GROUP)
        row = top + tl.arange(0, BLOCK_M)
        token, known = _tokens_of(index, row, end, num_tokens)
        k = tl.arange(0, BLOCK_K)
        address = tokens + token[:, None] * stride_tokens + k[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            mask = known[:, None] if EVEN else known[:, None] & (start + k < depth)[None, :]
            x = tl.load(address + start, mask=mask, other=0.0)
            if PAIRED:
                w = tl.trans(tl.reshape(matrices.load([expert, block * (BLOCK_N // 2), 0, start]), (BLOCK_N, BLOCK_K)))
            elif BACK:
                w = tl.reshape(matrices.load([expert, start, block * BLOCK_N]), (BLOCK_K, BLOCK_N))
            else:
                w = tl.trans(tl.reshape(matrices.load([expert, block * BLOCK_N, start]), (BLOCK_N, BLOCK_K)))
            total = tl.dot(x, w, total)
        if ACT == "none":
            store(out, total, top, block * BLOCK_N + tl.arange(0, BLOCK_N), end, width, stride_out)
        else:
            _gate(
                total.to(tokens.dtype.element_ty), weights, bias, out, act, expert, top, block, end, width,
                stride_out, stride_act, stride_bias, c1, c3, linear_offset, clamp, ACT, LAYOUT, CLAMP, FAST, BLOCK_N,
            )  # fmt: skip


# --- launchers ------------------------------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """Matrices as the kernel takes them: how many there are and their sizes, by columns or by rows, in pairs or plainly."""

    described: Any
    shape: Shape
    back: bool
    paired: bool


def _fits(tokens: Tensor, index: Tensor, matrices: Tensor, offsets: Tensor) -> bool:
    integers = all(t.dim() == 1 and t.dtype in (torch.int32, torch.int64) for t in (index, offsets))
    near = describes(tokens) and tokens.stride(0) < 2**31
    return tokens.dtype is matrices.dtype and integers and near and index.shape[0] < 2**31


def _plain(matrices: Tensor, num_rows: int, cut: Blocks) -> _Weights:
    """Of ``[E, in, out]``, any of the two adjacent."""
    described, back = of_matrices(matrices, cut)
    return _Weights(described, Shape(num_rows, *matrices.shape), back, False)


def _pairs(matrices: Tensor, num_rows: int, cut: Blocks, layout: str) -> _Weights:
    """Of ``[E, in, out]`` of gate and up: as features and their two halves, whatever lies between these in memory."""
    num_experts, depth, width = matrices.shape
    if layout == "ungated" or describes(matrices):
        return _plain(matrices, num_rows, cut)
    of_expert, _, of_feature = matrices.stride()
    feature, half = (2 * of_feature, of_feature) if layout == "interleaved" else (of_feature, width // 2 * of_feature)
    if cut.fetchers:  # whose epilogue wants all gates first
        sizes, strides, box = [2, width // 2], [half, feature], [2, cut.columns // 2]
    else:
        sizes, strides, box = [width // 2, 2], [feature, half], [cut.columns // 2, 2]
    described = descriptor(cut)(matrices, [num_experts, *sizes, depth], [of_expert, *strides, 1], [1, *box, cut.depth])
    return _Weights(described, Shape(num_rows, num_experts, depth, width), False, True)


def _launch_product(
    tokens: Tensor,
    index: Tensor,
    given: _Weights,
    offsets: Tensor,
    cut: Blocks,
    out: Tensor | None,
    gate: tuple[Any, ...] = (None, None, None, 0.0, None, 0.0, 0.0),
    constants: dict[str, Any] | None = None,
) -> None:
    """``gate``: routing weights, bias and output of the gate, and its numbers."""
    weights, bias, act, *numbers = gate
    shape, constants, index = given.shape, constants or PLAIN, index.contiguous()
    if cut.fetchers:
        from moekit.kernels.triton import hopper

        apart = out is not None and constants["LAYOUT"] == "concatenated"
        outs = (*out.chunk(2, 1), act) if apart else (out, None, act)
        hopper.launch_rows(
            grid(cut, shape, tokens.device), cut, shape, offsets.contiguous(), tokens, index, given.described, outs,
            gate=(weights, bias, *numbers), BACK=given.back, PAIRED=given.paired, **constants,
        )  # fmt: skip
        return
    _launch.launch(
        _gathered_kernel, grid(cut, shape, tokens.device),
        offsets.contiguous(), tokens, index, given.described, weights, bias, out, act,
        shape.num_rows, tokens.shape[0], shape.num_experts, shape.depth, shape.width,
        _launch.blocks(shape.width, cut.columns), tokens.stride(0), 0 if out is None else out.stride(0),
        0 if act is None else act.stride(0), 0 if bias is None else bias.stride(0), *numbers,
        BACK=given.back, PAIRED=given.paired, EVEN=shape.depth % cut.depth == 0, BLOCK_K=cut.depth, FLAT=cut.flat,
        **constants, **sizes(cut, shape.num_experts), config=cut,
    )  # fmt: skip


def gathered_rows(tokens: Tensor, index: Tensor, matrices: Tensor, offsets: Tensor) -> Any:
    """``tokens[index]``, expert by expert, by ``matrices [E, K, N]``: see :func:`moekit.ops.gemm.grouped_rows`."""
    shape = Shape(index.shape[0], *matrices.shape)
    leaves = leaves_ragged(len(index), tokens.dtype, shape.width, shape.depth)
    cut = _policy.gathered(shape, tokens.dtype, _launch.arch(tokens.device).name, leaves=leaves)
    if cut is None or not _fits(tokens, index, matrices, offsets) or not describable(tokens, matrices):
        return NotImplemented
    out = tokens.new_empty(shape.num_rows, shape.width)
    _launch_product(tokens, index, _plain(matrices, shape.num_rows, cut), offsets, cut, out)
    return out


def gathered_glu(
    tokens: Tensor,
    index: Tensor,
    matrices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    keep: bool,
    invariant: bool,
    act: str,
    c1: float,
    c3: float,
    linear_offset: float,
    clamp: float | None,
    clamp_after_bias: bool,
    layout: str,
) -> Any:
    """``tokens[index]`` by ``matrices [E, in, out]``, and that through the gate: ``(projected, activation)``.

    ``projected`` is None unless it is to be kept. What comes out are the bits of the product and then the gate.
    """
    shape = Shape(index.shape[0], *matrices.shape)
    gate = act if act == "gelu" else "plain" if bias is None and clamp is None else "full"
    cut_for, inner = shape.of_any_rows() if invariant else shape, shape.width if layout == "ungated" else shape.width // 2
    leaves = leaves_ragged(len(index), tokens.dtype, shape.width, inner, shape.depth)
    cut = _policy.gathered(cut_for, tokens.dtype, _launch.arch(tokens.device).name, gate=gate, leaves=leaves)
    if cut is None or not _fits(tokens, index, matrices, offsets) or not describable(tokens, matrices):
        return NotImplemented
    if layout == "concatenated" and describes(matrices):  # gate and up would be in two places of a row
        return NotImplemented
    projected = tokens.new_empty(shape.num_rows, shape.width) if keep else None
    result, bias = tokens.new_empty(shape.num_rows, inner), tidy_bias(bias)
    constants = gate_constants(bias, act, clamp, clamp_after_bias, layout) | {"FAST": _launch.approximates(tokens.device)}
    behind = (_launch.dense(weights), bias, result, c1, c3 or None, linear_offset, clamp or 0.0)
    given = _pairs(matrices, shape.num_rows, cut, layout)
    _launch_product(tokens, index, given, offsets, cut, projected, behind, constants)
    return projected, result
