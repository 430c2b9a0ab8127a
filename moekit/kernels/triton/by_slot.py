"""The experts of few tokens, slot by slot: two launches, without routing tables.

What counts here are bytes of weights and launches. A slot is a token's choice of an expert; as long as few slots have the
same expert, there are no rows worth bringing together, and so nothing to sort:

- each program of the first kernel takes some features of one slot's expert, gate and up, to the activation;
- each of the second takes some outputs of one token, and adds over its slots.

Programs are of a warp or a few; many of them together keep the memory busy. Where a GPU can, those of the second kernel
begin while the last of the first still run. Sums are in float32, in an order that depends on neither the other tokens nor
their experts; what is rounded is the activation and the output, once each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moekit.kernels.triton import _launch, _policy, by_slot_packed
from moekit.kernels.triton._slots import features_of, slots_of, store_gated, weighted_bias
from moekit.kernels.triton.glu import gate_constants, tidy_bias


@triton.jit(do_not_specialize=["num_experts"])
def _slot_gate_kernel(
    tokens, indices, weights, matrices, bias, act,
    topk, num_experts, depth, inner, feature_blocks, stride_tokens, stride_expert, stride_in, stride_out, stride_bias,
    c1, c3, linear_offset, clamp,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Program for a slot and FEATURES of its expert: ``act [S, inner]``. A slot of no expert gets nothing."""
    if OVERLAPS:
        gdc_launch_dependents()  # the other kernel's programs may take the places that these leave
    HALVES: tl.constexpr = 1 if LAYOUT == "ungated" else 2
    slot, first = tl.program_id(0) // feature_blocks, tl.program_id(0) % feature_blocks * FEATURES
    expert = tl.load(indices + slot)
    if (expert >= 0) & (expert < num_experts):
        column, known = features_of(first, inner, FEATURES, LAYOUT)
        k = tl.arange(0, BLOCK_K)
        x = tokens + (slot // topk).to(tl.int64) * stride_tokens + k
        address = matrices + expert.to(tl.int64) * stride_expert + (column * stride_out)[:, None] + (k * stride_in)[None, :]
        total = tl.zeros([HALVES * FEATURES, BLOCK_K], tl.float32)
        for start in tl.range(0, depth, BLOCK_K, loop_unroll_factor=2):  # so that more loads are on their way at once
            inside = start + k < depth
            w = tl.load(address + start * stride_in, mask=known[:, None] & inside[None, :], other=0.0)
            total += w.to(tl.float32) * tl.load(x + start, mask=inside, other=0.0).to(tl.float32)[None, :]
        store_gated(
            tl.sum(total, 1), weights, bias, act, expert, slot, first, inner, stride_bias, c1, c3, linear_offset, clamp,
            FEATURES, ACT, LAYOUT, CLAMP, FAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_experts"])
def _slot_down_kernel(
    act, indices, weights, matrices, bias, out,
    topk, num_experts, depth, width, column_blocks, stride_expert, stride_in, stride_out, stride_bias, stride_result,
    WEIGHED: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Program for a token and BLOCK_N of its outputs, SLOTS of its experts at a time.

    The bias is multiplied by the routing weights; the activation has been already, if it is WEIGHED. A program that OVERLAPS
    the other kernel's last ones has its first weights on their way before it waits for these.
    """
    token, block = tl.program_id(0) // column_blocks, tl.program_id(0) % column_blocks
    column, k = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    allowed, within = column < width, (column * stride_out)[None, :, None] + (k * stride_in)[None, None, :]
    total = tl.zeros([SLOTS, BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, topk, SLOTS):
        slot, expert, known = slots_of(indices, token, first + tl.arange(0, SLOTS), topk, num_experts)
        for start in range(0, depth, BLOCK_K):
            inside = known[:, None] & (start + k < depth)[None, :]
            address = matrices + (expert * stride_expert)[:, None, None] + start * stride_in + within
            w = tl.load(address, mask=inside[:, None, :] & allowed[None, :, None], other=0.0)
            if OVERLAPS:
                gdc_wait()
            a = tl.load(act + (slot * depth)[:, None] + (start + k)[None, :], mask=inside, other=0.0).to(tl.float32)
            if not WEIGHED:
                a *= tl.load(weights + slot, mask=known, other=0.0).to(tl.float32)[:, None]
            total += w.to(tl.float32) * a[:, None, :]
    biases = weighted_bias(bias, indices, weights, token, column, topk, num_experts, width, stride_bias)
    value = tl.sum(tl.sum(total, 2), 0) + biases
    if OVERLAPS:
        gdc_wait()  # with nothing to add, too: memory that is written may be what a launch ahead still reads
    tl.store(out + token.to(tl.int64) * stride_result + column, value.to(out.dtype.element_ty), mask=allowed)


# --- launcher -------------------------------------------------------------------------------------------------------


def experts_by_slot(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Any,
    down: Any,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    c1: float,
    c3: float,
    linear_offset: float,
    clamp: float | None,
    clamp_after_bias: bool,
    layout: str,
    weight_after_down: bool,
) -> Any:
    """``moekit::experts_topk`` of few tokens; weights are ``[E, H, 2I]`` and ``[E, I, H]`` in any storage, or packed.

    Packed ones are :class:`moekit.ops.unpack.Stored` ``[E, 2I, H]`` and ``[E, H, I]``.
    """
    (num_tokens, topk), (num_experts, inner, hidden) = indices.shape, _shape(down)
    if not _policy.slots_apart(num_tokens, topk, num_experts):
        return NotImplemented
    width = inner if layout == "ungated" else 2 * inner
    fits = _launch.computes(x, weights, gate_up_bias, down_bias) and _reads(gate_up, x) and _reads(down, x)
    fits = fits and indices.dtype in (torch.int32, torch.int64) and weights.shape == indices.shape
    fits = fits and x.shape == (num_tokens, hidden) and _shape(gate_up) == (num_experts, hidden, width)
    for bias, size in ((gate_up_bias, width), (down_bias, hidden)):
        fits = fits and (bias is None or bias.shape == (num_experts, size))
    if not fits:
        return NotImplemented
    x, indices, weights = _launch.rows_of(x), indices.contiguous(), weights.contiguous()
    # There is nothing to overlap with if the first launch has no programs.
    overlaps = _launch.overlaps(x.device) and num_tokens * topk * inner > 0
    activation, out = x.new_empty(num_tokens * topk, inner), x.new_empty(num_tokens, hidden)
    bias, before = tidy_bias(gate_up_bias), None if weight_after_down else weights
    gate = by_slot_packed.launch_gate if _is_packed(gate_up) else _launch_gate
    constants = gate_constants(bias, act, clamp, clamp_after_bias, layout) | {"FAST": _launch.approximates(x.device)}
    numbers = (c1, c3 or None, linear_offset, clamp or 0.0)
    gate(x, indices, before, gate_up, bias, activation, numbers, constants, overlaps=overlaps)
    last = by_slot_packed.launch_down if _is_packed(down) else _launch_down
    last(activation, indices, weights, down, tidy_bias(down_bias), out, weighed=not weight_after_down, overlaps=overlaps)
    return out


def _launch_gate(
    x: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    matrices: Tensor,
    bias: Tensor | None,
    activation: Tensor,
    numbers: tuple[float | None, ...],
    constants: dict[str, Any],
    *,
    overlaps: bool,
) -> None:
    """``activation [S, I]`` from the tokens; ``numbers`` and ``constants`` are those of the gate."""
    (num_slots, inner), (num_experts, hidden, _) = activation.shape, matrices.shape
    cut = _policy.slot_gate(x.dtype, along=matrices.stride(1) == 1)
    features = cut.columns if constants["LAYOUT"] == "ungated" else cut.columns // 2
    feature_blocks = _launch.blocks(inner, features)
    _launch.launch(
        _slot_gate_kernel, (num_slots * feature_blocks,),
        x, indices, weights, matrices, bias, activation,
        indices.shape[1], num_experts, hidden, inner, feature_blocks, x.stride(0), *matrices.stride(),
        0 if bias is None else bias.stride(0), *numbers,
        **constants, FEATURES=features, BLOCK_K=cut.depth, OVERLAPS=overlaps, config=cut,
    )  # fmt: skip


def _launch_down(
    activation: Tensor,
    indices: Tensor,
    weights: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    weighed: bool,
    overlaps: bool,
) -> None:
    """``out [T, H]`` from the activation, which is ``weighed`` already or not."""
    (num_experts, inner, hidden), topk = matrices.shape, indices.shape[1]
    cut = _policy.slot_down(topk, inner, out.dtype, along=matrices.stride(1) == 1)
    column_blocks = _launch.blocks(hidden, cut.columns)
    _launch.launch(
        _slot_down_kernel, (len(out) * column_blocks,),
        activation, indices, weights, matrices, bias, out,
        topk, num_experts, inner, hidden, column_blocks, *matrices.stride(),
        0 if bias is None else bias.stride(0), out.stride(0),
        WEIGHED=weighed, SLOTS=cut.rows, BLOCK_N=cut.columns, BLOCK_K=cut.depth, OVERLAPS=overlaps,
        config=cut, early=overlaps,
    )  # fmt: skip


def _is_packed(weight: Any) -> bool:
    return not isinstance(weight, Tensor)


def _shape(weight: Any) -> tuple[int, ...]:
    """``[E, in, out]``."""
    num_experts, first, last = weight.shape
    return (num_experts, last, first) if _is_packed(weight) else (num_experts, first, last)


def _reads(weight: Any, x: Tensor) -> bool:
    """Whether the kernels multiply tokens by it."""
    return by_slot_packed.reads(weight, x) if _is_packed(weight) else _launch.computes(weight) and _reachable(weight)


def _reachable(matrices: Tensor) -> bool:
    """Whether the numbers of an expert are adjacent along one side, and no further apart than 32 bits can say."""
    _, *strides = matrices.stride()
    _, *sides = matrices.shape
    return 1 in strides and sum(stride * (side - 1) for stride, side in zip(strides, sides, strict=True)) < 2**31
