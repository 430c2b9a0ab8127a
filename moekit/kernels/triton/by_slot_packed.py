"""Slot by slot by packed weights: the two kernels of :mod:`moekit.kernels.triton.by_slot`, on codes as they are stored.

Codes become values and sums as in :mod:`moekit.kernels.triton.decode`, and are rounded as there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moekit.kernels.triton import _launch, _policy, decode
from moekit.kernels.triton._policy import Blocks
from moekit.kernels.triton._slots import features_of, slots_of, store_gated, weighted_bias
from moekit.kernels.triton.decode import Codes, registers, sums_of_codes


@triton.jit(do_not_specialize=["num_experts", "one"])
def _packed_gate_kernel(
    tokens, indices, weights, codes, scales, table, dynamic, nested, shift, bias, act,
    topk, num_experts, depth, inner, width, groups, feature_blocks, stride_tokens, stride_s, scale_columns, stride_bias, one,
    c1, c3, linear_offset, clamp,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
    FORMAT: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, ASM: tl.constexpr, SIZE: tl.constexpr,
    LOADS: tl.constexpr, BLOCK_G: tl.constexpr, FEATURES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Program for a slot and FEATURES of its expert: ``act [S, inner]``. A slot of no expert gets nothing."""
    if OVERLAPS:
        gdc_launch_dependents()  # the other kernel's programs may take the places that these leave
    slot, first = tl.program_id(0) // feature_blocks, tl.program_id(0) % feature_blocks * FEATURES
    expert = tl.load(indices + slot)
    if (expert >= 0) & (expert < num_experts):
        column, _ = features_of(first, inner, FEATURES, LAYOUT)
        x, n = tokens + (slot // topk).to(tl.int64) * stride_tokens, tl.minimum(column, width - 1)
        t = registers(table, one - 1, FORMAT, ASM)
        total = tl.zeros([n.shape[0], BLOCK_G], tl.float32)
        for group in range(0, groups, BLOCK_G):
            total += sums_of_codes(
                x, codes, scales, t, dynamic, nested, shift, expert, n, group,
                width, depth, groups, stride_s, scale_columns, one, FORMAT, SHARE_A, SHARE_B, ASM, BLOCK_G, SIZE, LOADS,
            )  # fmt: skip
        store_gated(
            tl.sum(total, 1), weights, bias, act, expert, slot, first, inner, stride_bias, c1, c3, linear_offset, clamp,
            FEATURES, ACT, LAYOUT, CLAMP, FAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_experts", "one"])
def _packed_down_kernel(
    act, indices, weights, codes, scales, table, dynamic, nested, shift, bias, out,
    topk, num_experts, depth, width, groups, column_blocks, stride_s, scale_columns, stride_bias, stride_result, one,
    WEIGHED: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, ASM: tl.constexpr, SIZE: tl.constexpr,
    LOADS: tl.constexpr, BLOCK_G: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Program for a token and BLOCK_N of its outputs, in steps: BLOCK_G sums of one of its experts after another's.

    AT_ONCE of these steps are independent of each other, so that their codes are on their way together.
    """
    token, block = tl.program_id(0) // column_blocks, tl.program_id(0) % column_blocks
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(column, width - 1)
    t = registers(table, one - 1, FORMAT, ASM)
    sums = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    if OVERLAPS:
        gdc_wait()
    for step in tl.range(0, tl.cdiv(groups, BLOCK_G) * topk, loop_unroll_factor=AT_ONCE):
        slot, expert, known = slots_of(indices, token, step % topk, topk, num_experts)
        value = sums_of_codes(
            act + slot * depth, codes, scales, t, dynamic, nested, shift, expert, n, step // topk * BLOCK_G,
            width, depth, groups, stride_s, scale_columns, one, FORMAT, SHARE_A, SHARE_B, ASM, BLOCK_G, SIZE, LOADS,
        )  # fmt: skip
        if not WEIGHED:
            value *= tl.load(weights + slot, mask=known, other=0.0).to(tl.float32)
        sums += tl.where(known, value, 0.0)  # for no expert another's codes and scales were read
    total = tl.sum(sums, 1)
    total += weighted_bias(bias, indices, weights, token, column, topk, num_experts, width, stride_bias)
    tl.store(out + token.to(tl.int64) * stride_result + column, total.to(out.dtype.element_ty), mask=column < width)


# --- launchers ------------------------------------------------------------------------------------------------------


def reads(stored: Any, x: Tensor) -> bool:
    """Whether the kernels multiply tokens by a packed stack ``[E, out, in]``, along ``in``."""
    quick = stored.format != "int8" or len(x) <= 1  # of which several tokens take 15% longer than with tables
    return quick and x.dtype in (torch.bfloat16, torch.float16) and stored.shape[0] > 0 and decode.reads(stored)


def launch_gate(
    x: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    stored: Any,
    bias: Tensor | None,
    activation: Tensor,
    numbers: tuple[float | None, ...],
    constants: dict[str, Any],
    *,
    overlaps: bool,
) -> None:
    """``activation [S, I]`` from the tokens; ``numbers`` and ``constants`` are those of the gate."""
    codes, (num_experts, width, depth) = Codes.of(stored, x.device, torch.float16), stored.shape
    cut, inner = _cut(codes, x), activation.shape[1]
    features = cut.columns // (1 if constants["LAYOUT"] == "ungated" else 2)
    feature_blocks = _launch.blocks(inner, features)
    _launch.launch(
        _packed_gate_kernel, (indices.numel() * feature_blocks,),
        x, indices, weights, *codes.tensors, bias, activation,
        indices.shape[1], num_experts, depth, inner, width, codes.groups, feature_blocks, x.stride(0), *codes.strides,
        0 if bias is None else bias.stride(0), 1, *numbers,
        **constants, **codes.constants, BLOCK_G=cut.depth, FEATURES=features, OVERLAPS=overlaps, config=cut,
    )  # fmt: skip


def launch_down(
    activation: Tensor,
    indices: Tensor,
    weights: Tensor,
    stored: Any,
    bias: Tensor | None,
    out: Tensor,
    *,
    weighed: bool,
    overlaps: bool,
) -> None:
    """``out [T, H]`` from the activation, which is ``weighed`` already or not."""
    codes, (num_experts, width, depth) = Codes.of(stored, out.device, torch.float16), stored.shape
    cut = _cut(codes, out, adds=True)
    column_blocks = _launch.blocks(width, cut.columns)
    _launch.launch(
        _packed_down_kernel, (len(out) * column_blocks,),
        activation, indices, weights, *codes.tensors, bias, out,
        indices.shape[1], num_experts, depth, width, codes.groups, column_blocks, *codes.strides,
        0 if bias is None else bias.stride(0), out.stride(0), 1,
        WEIGHED=weighed, AT_ONCE=cut.rows, BLOCK_N=cut.columns, **codes.constants, BLOCK_G=cut.depth, OVERLAPS=overlaps,
        config=cut, early=overlaps,
    )  # fmt: skip


def _cut(codes: Codes, tokens: Tensor, *, adds: bool = False) -> Blocks:
    arch = _launch.arch(tokens.device)
    along = decode.threads_along(codes.groups, arch.warp_size, used=3 if adds else 8)
    return _policy.slot_packed(len(tokens), along, arch.warp_size, arch.name, adds=adds)
