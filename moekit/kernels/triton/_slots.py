"""What the kernels that go from slot to slot share, of dense and of packed weights: where a slot is, its gate, its bias."""

from __future__ import annotations

import triton
import triton.language as tl

from moekit.kernels.triton._halves import through_gate


@triton.jit
def features_of(first, inner, FEATURES: tl.constexpr, LAYOUT: tl.constexpr):
    """The outputs of gate_up that FEATURES from ``first`` on are made of, and whether there are such."""
    HALVES: tl.constexpr = 1 if LAYOUT == "ungated" else 2
    place = tl.arange(0, HALVES * FEATURES)
    if LAYOUT == "interleaved":
        column, known = 2 * first + place, 2 * first + place < 2 * inner
    else:
        column, known = first + place % FEATURES, first + place % FEATURES < inner
        column += place // FEATURES * inner
    return column, known


@triton.jit
def store_gated(
    both, weights, bias, act, expert, slot, first, inner, stride_bias, c1, c3, linear_offset, clamp,
    FEATURES: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The activation of a slot, from the sums of :func:`features_of`."""
    if LAYOUT == "ungated":
        gate = both[None, :]
        up = gate
    elif LAYOUT == "interleaved":
        gate, up = tl.split(tl.reshape(both, (1, FEATURES, 2)))
    else:
        gate, up = tl.split(tl.permute(tl.reshape(both, (1, 2, FEATURES)), (0, 2, 1)))
    feature = first + tl.arange(0, FEATURES)
    value = through_gate(
        gate, up, weights, bias, expert, slot + tl.arange(0, 1), feature, slot + 1, inner, stride_bias,
        c1, c3, linear_offset, clamp, ACT, LAYOUT, CLAMP, FAST,
    )  # fmt: skip
    target = act + slot.to(tl.int64) * inner + feature[None, :]
    tl.store(target, value.to(act.dtype.element_ty), mask=(feature < inner)[None, :])


@triton.jit
def slots_of(indices, token, place, topk, num_experts):
    """The slots at some of a token's places, their experts, and whether there is one; 0 for none."""
    slot = token.to(tl.int64) * topk + place
    expert = tl.load(indices + slot, mask=place < topk, other=-1)
    known = (expert >= 0) & (expert < num_experts)
    return slot, tl.where(known, expert, 0).to(tl.int64), known


@triton.jit
def weighted_bias(bias, indices, weights, token, column, topk, num_experts, width, stride_bias):
    """The bias of the down projection, added over a token's experts by their routing weights."""
    total = tl.zeros([column.shape[0]], tl.float32)
    if bias is not None:
        for place in range(topk):
            slot, expert, known = slots_of(indices, token, place, topk, num_experts)
            weight = tl.load(weights + slot, mask=known, other=0.0).to(tl.float32)
            inside = column < tl.where(known, width, 0)
            total += weight * tl.load(bias + expert * stride_bias + column, mask=inside, other=0.0).to(tl.float32)
    return total
