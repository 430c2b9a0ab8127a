"""The gated activations backward.

Without a bias that is summed over rows, one program owns its rows: it sums a row's weight gradient in float32 and needs
nobody else. With one, a program owns a chunk of one expert's rows and a strip of columns, writes its sums beside the
others', and a second kernel adds them up in a fixed order. No atomics either way: the same bits every run.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.kernels.triton import _launch
from moekit.kernels.triton._activation import activate_with_slope
from moekit.kernels.triton._halves import (
    bias_rows,
    block_and_part,
    finish_pair,
    load_pair,
    per_row,
    rows_end,
    store_pair,
    times,
)
from moekit.kernels.triton.glu import describe, leaves, row_stride, tidy_bias

_CHUNK_ROWS = 64


@triton.jit
def _gradients(
    grad, y, scale, weight, bias, activation, dy, row, bias_row, start, inside, exists,
    width, grad_stride, y_stride, bias_stride, c1, c3, linear_offset, clamp,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, CLAMP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile: writes ``dy`` and the activation; returns the bias's gradient and the terms of the weight's."""
    gate, up = load_pair(y, row, y_stride, start, width, inside, LAYOUT, BLOCK_C)
    g, _ = load_pair(grad, row, grad_stride, start, width, inside, "ungated", BLOCK_C)
    if scale is not None:
        gate *= scale[:, None]
        up *= scale[:, None]
    gate, up, gate_inside, up_inside = finish_pair(
        gate, up, bias, bias_row, bias_stride, start, width, inside, clamp, LAYOUT, CLAMP, BLOCK_C
    )
    value, slope = activate_with_slope(gate, c1, c3, ACT)
    gp = g
    if weight is not None:
        gp = g * weight[:, None]
    up += linear_offset
    dgate, dup = gp * slope, gp * value
    if LAYOUT != "ungated":
        dgate = gp * up * slope
    if activation is not None:
        again = times(value, up, weight, LAYOUT)
        store_pair(activation, again, again, row, width, start, width, exists, "ungated", BLOCK_C)
    dgate_bias, dup_bias = dgate, dup
    if CLAMP != "none":
        dgate, dup = tl.where(gate_inside, dgate, 0.0), tl.where(up_inside, dup, 0.0)
        if CLAMP == "after_bias":
            dgate_bias, dup_bias = dgate, dup
    if dy is not None:
        stride = width if LAYOUT == "ungated" else 2 * width
        store_pair(dy, dgate, dup, row, stride, start, width, exists, LAYOUT, BLOCK_C)
    return dgate_bias, dup_bias, times(value, up, g, LAYOUT)


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _glu_backward_kernel(
    grad, y, scales, weights, bias, offsets, dy, dweights, dbias, activation,
    num_rows, width, num_experts, parts, grad_stride, y_stride, bias_stride, c1, c3, linear_offset, clamp,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, CLAMP: tl.constexpr, BIAS: tl.constexpr, MULTIPLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_R rows, and of their columns every ``parts``-th block."""
    if MULTIPLE > 1:
        width = tl.multiple_of(width, MULTIPLE)
        grad_stride = tl.multiple_of(grad_stride, MULTIPLE)
        y_stride = tl.multiple_of(y_stride, MULTIPLE)
        bias_stride = tl.multiple_of(bias_stride, MULTIPLE)
    block, part = block_and_part(parts)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < num_rows
    inside = row < rows_end(offsets, num_experts, num_rows)
    bias_row = bias_rows(row, offsets, num_experts, BIAS, BLOCK_E)
    weight, scale = weights, scales
    if weights is not None:
        weight = per_row(weights, row, inside)
    if scales is not None:
        scale = per_row(scales, row, inside)
    terms = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(part * BLOCK_C, width, parts * BLOCK_C):
        dgate, dup, term = _gradients(
            grad, y, scale, weight, bias, activation, dy, row, bias_row, start, inside, exists,
            width, grad_stride, y_stride, bias_stride, c1, c3, linear_offset, clamp, ACT, LAYOUT, CLAMP, BLOCK_C,
        )  # fmt: skip
        terms += term
        if dbias is not None:
            stride = width if LAYOUT == "ungated" else 2 * width
            store_pair(dbias, dgate, dup, row, stride, start, width, exists, LAYOUT, BLOCK_C)
    if dweights is not None:
        tl.store(dweights + row, tl.sum(terms, axis=1), mask=exists)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _chunks_of_experts(offsets, num_experts, num_rows, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Each expert's rows cut into chunks, as ``(number, first row, end, chunks before and with it)`` by expert.

    What lies behind the last expert counts as one more, and so does all there is without offsets.
    """
    expert = tl.arange(0, BLOCK_E)
    if offsets is None:
        begin = tl.where(expert == 0, 0, num_rows)
        end = expert * 0 + num_rows
    else:
        begin = tl.load(offsets + expert - 1, mask=(expert > 0) & (expert <= num_experts), other=0)
        begin = tl.where(expert <= num_experts, begin, num_rows)
        end = tl.load(offsets + expert, mask=expert < num_experts, other=num_rows)
        # Ascending within the rows, whatever they are: or chunks of several experts would have the same number.
        begin = tl.associative_scan(tl.minimum(tl.maximum(begin, 0), num_rows).to(tl.int32), 0, _larger)
        end = tl.associative_scan(tl.minimum(tl.maximum(end, 0), num_rows).to(tl.int32), 0, _larger)
    chunks = (end - begin + CHUNK - 1) // CHUNK
    return expert, begin, end, chunks, tl.cumsum(chunks, axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _glu_bias_kernel(
    grad, y, scales, weights, bias, offsets, dy, partial_weights, partial_bias, activation,
    num_rows, width, num_experts, grad_stride, y_stride, bias_stride, c1, c3, linear_offset, clamp,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, CLAMP: tl.constexpr, BIAS: tl.constexpr, MULTIPLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program takes a chunk of an expert's rows and BLOCK_C columns of them."""
    if MULTIPLE > 1:
        width = tl.multiple_of(width, MULTIPLE)
        grad_stride = tl.multiple_of(grad_stride, MULTIPLE)
        y_stride = tl.multiple_of(y_stride, MULTIPLE)
        bias_stride = tl.multiple_of(bias_stride, MULTIPLE)
    chunk, start = tl.program_id(0), tl.program_id(1) * BLOCK_C
    expert, begin, end, chunks, through = _chunks_of_experts(offsets, num_experts, num_rows, CHUNK, BLOCK_E)
    mine = (through - chunks <= chunk) & (chunk < through)
    first = tl.sum(tl.where(mine, begin + (chunk - through + chunks) * CHUNK, 0))
    last = tl.minimum(first + CHUNK, tl.sum(tl.where(mine, end, 0)))
    owner = tl.sum(tl.where(mine, expert, 0))
    behind = rows_end(offsets, num_experts, num_rows)
    if first < last:
        gate_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        up_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for above in range(first, last, BLOCK_R):
            row = above + tl.arange(0, BLOCK_R)
            exists = row < last
            inside = exists & (row < behind)
            weight, scale = weights, scales
            if weights is not None:
                weight = per_row(weights, row, inside)
            if scales is not None:
                scale = per_row(scales, row, inside)
            bias_row = row * 0 + owner
            dgate, dup, term = _gradients(
                grad, y, scale, weight, bias, activation, dy, row, bias_row, start, inside, exists,
                width, grad_stride, y_stride, bias_stride, c1, c3, linear_offset, clamp, ACT, LAYOUT, CLAMP, BLOCK_C,
            )  # fmt: skip
            gate_sum += dgate
            up_sum += dup
            if partial_weights is not None:
                strip = partial_weights + tl.program_id(1).to(tl.int64) * num_rows
                tl.store(strip + row, tl.sum(term, axis=1), mask=exists)
        here = tl.zeros([1], tl.int32) + chunk
        stride = width if LAYOUT == "ungated" else 2 * width
        gate_sum, up_sum = tl.sum(gate_sum, axis=0)[None, :], tl.sum(up_sum, axis=0)[None, :]
        store_pair(partial_bias, gate_sum, up_sum, here, stride, start, width, here >= 0, LAYOUT, BLOCK_C)


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _sum_chunks_kernel(
    partial, offsets, dbias, num_rows, num_experts, width,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program adds up the chunks of one expert in BLOCK_C columns."""
    owner, column = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    expert, _, _, chunks, through = _chunks_of_experts(offsets, num_experts, num_rows, CHUNK, BLOCK_E)
    last = tl.sum(tl.where(expert == owner, through, 0))
    first = last - tl.sum(tl.where(expert == owner, chunks, 0))
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for above in range(first, last, BLOCK_R):
        chunk = above + tl.arange(0, BLOCK_R)
        mask = (chunk < last)[:, None] & (column < width)[None, :]
        total += tl.load(partial + chunk.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0)
    tl.store(dbias + owner.to(tl.int64) * width + column, tl.sum(total, axis=0), mask=column < width)


def glu_backward(
    grad: Tensor,
    y: Tensor,
    scale: Tensor | None,
    weights: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    act: str,
    c1: float,
    c3: float,
    linear_offset: float,
    clamp: float | None,
    clamp_after_bias: bool,
    layout: str,
    wanted: list[bool],
    *,
    over: bool = False,
) -> Any:
    """``moekit::glu_backward``: ``(dy, dweights, dbias, activation)``, empty where not wanted.

    ``over`` writes the activation over ``grad``, each tile by the program that has read it. Where another thread writes a
    number than the one that reads it, a barrier lies between, by which NVIDIA's have read what they asked for before.
    """
    if leaves(y, bias, offsets, grad, scale if scale is not None else y, weights, bias):
        return NotImplemented
    dtype = y.dtype if scale is None else grad.dtype
    need = {
        "dy": torch.empty(y.shape, dtype=dtype, device=y.device) if wanted[0] else None,
        "dweights": torch.empty_like(weights, memory_format=torch.contiguous_format)
        if wanted[1] and weights is not None
        else None,
        "dbias": torch.empty(bias.shape, dtype=bias.dtype, device=y.device) if wanted[2] and bias is not None else None,
        "activation": None,
    }
    if wanted[3]:
        fits = over and grad.dtype is dtype and grad.is_contiguous() and torch.version.hip is None
        need["activation"] = grad if fits else torch.empty(grad.shape, dtype=dtype, device=y.device)
    grad, y, bias = _launch.rows_of(grad), _launch.rows_of(y), tidy_bias(bias)
    constants = describe(y, bias, offsets, act, clamp, clamp_after_bias, layout)
    constants["MULTIPLE"] = _launch.multiple(constants["MULTIPLE"], grad.stride(0))
    tensors = (
        grad,
        y if scale is None else _launch.float8(y),
        scale,
        _launch.dense(weights),
        bias,
        _launch.dense(offsets),
    )
    sizes = (grad.shape[0], grad.shape[1], 0 if offsets is None else offsets.shape[0])
    scalars = (*sizes, grad.stride(0), y.stride(0), row_stride(bias), c1, c3 or None, linear_offset, clamp or 0.0)
    reduces = need["dbias"] is not None and constants["BIAS"] != "row"
    (_backward_by_chunks if reduces else _backward_by_rows)(tensors, need, scalars, constants)
    empty = grad.new_empty(0)
    return tuple(empty.clone() if t is None else t for t in need.values())


glu_backward_over = functools.partial(glu_backward, over=True)
"""See :func:`moekit.ops.glu.backward_over`."""


def _backward_by_rows(tensors: tuple, need: dict[str, Tensor | None], scalars: tuple, constants: dict) -> None:
    grad = tensors[0]
    num_rows, width = grad.shape
    kernel = "glu_backward" if tensors[2] is None else "glu_fp8_backward"
    config = _launch.tile(kernel, grad.device, grad.dtype)
    plain = constants["BIAS"] == "none" and constants["LAYOUT"] != "interleaved" and constants["MULTIPLE"] > 1
    if not plain or grad.dtype is torch.float32 or tensors[1].dtype is torch.uint8:
        config = config._replace(registers=168)  # they need more
    block_r, block_c = _launch.shape_tile(grad.device, width, config)
    # A row's weight gradient is summed where all of the row is seen.
    parts = _launch.blocks(width, block_c) if need["dweights"] is None else 1
    grid = (_launch.blocks(num_rows, block_r) * parts,)
    outputs = (need["dy"], need["dweights"], need["dbias"], need["activation"])
    _launch.launch(
        _glu_backward_kernel, grid, *tensors, *outputs, *scalars[:3], parts, *scalars[3:],
        BLOCK_R=block_r, BLOCK_C=block_c, config=config, **constants,
    )  # fmt: skip


def _backward_by_chunks(tensors: tuple, need: dict[str, Tensor | None], scalars: tuple, constants: dict) -> None:
    grad, offsets, dweights, dbias = tensors[0], tensors[5], need["dweights"], need["dbias"]
    num_rows, width = grad.shape
    num_experts = 0 if offsets is None else offsets.shape[0]
    features = dbias.shape[-1]
    config = _launch.tile("glu_bias", grad.device)
    block_r, block_c = _launch.shape_tile(grad.device, width, config, max_columns=256)
    # Every expert, and the rows behind the last, may end in a chunk that is not full.
    chunks, strips = _launch.blocks(num_rows, _CHUNK_ROWS) + num_experts + 1, _launch.blocks(width, block_c)
    partial_bias = torch.empty(chunks, features, dtype=torch.float32, device=grad.device)
    partial_weights = None
    if dweights is not None:
        partial_weights = torch.empty(strips, num_rows, dtype=torch.float32, device=grad.device)
    _launch.launch(
        _glu_bias_kernel, (chunks, strips),
        *tensors, need["dy"], partial_weights, partial_bias, need["activation"], *scalars,
        BLOCK_R=block_r, BLOCK_C=block_c, CHUNK=_CHUNK_ROWS, config=config, **constants,
    )  # fmt: skip
    if dweights is not None:
        dweights.copy_(partial_weights.sum(0))
    _launch.launch(
        _sum_chunks_kernel, (max(num_experts, 1), _launch.blocks(features, 64)),
        partial_bias, offsets, dbias, num_rows, num_experts, features,
        BLOCK_R=32, BLOCK_C=64, BLOCK_E=constants["BLOCK_E"], CHUNK=_CHUNK_ROWS,
    )  # fmt: skip
