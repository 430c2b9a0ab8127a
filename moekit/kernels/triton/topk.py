"""Router scores and top-k selection in one launch, and its gradient in another.

Experts are compared as integers: float32 bits put into the order of the numbers, NaN below all. A tie goes to the lowest
number. Of 32-bit integers a warp finds a maximum or a minimum in one instruction.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit import _check
from moekit.kernels.triton import _launch
from moekit.kernels.triton._activation import OWN_SCORES, own_score, own_score_slope

_ENTRIES = 512  # scores that a program holds
_TILES = 8  # of as many that a program adds up
_NAN = tl.constexpr(-(2**31) + 1)
_OUT = tl.constexpr(-(2**31))  # what is out of the race: below NaN
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # what the reference gives the logit of no expert


@triton.jit
def _ordered(score):
    """float32 to integers of the same order; both zeros are one, and NaN is lowest."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN)


@triton.jit
def _score_of(key):
    """What :func:`_ordered` was given."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _take_best(keys, number):
    """The highest of ``keys`` along the last axis, its number (of equal ones the lowest), and the keys without it."""
    axis: tl.constexpr = len(keys.shape) - 1
    best = tl.max(keys, axis=axis, keep_dims=True)
    found = tl.min(tl.where(keys == best, number, 0x7FFFFFFF), axis=axis, keep_dims=True)
    return best, found, tl.where(number == found, _OUT, keys)


@triton.jit
def _keep_groups(keys, expert, num_groups, group_topk, group_best, BLOCK_G: tl.constexpr):
    """``keys [T, G, S]`` with all but each token's ``group_topk`` best groups taken out.

    A group's score is the sum of its ``group_best`` highest scores.
    """
    rest = keys
    total = tl.zeros([keys.shape[0], BLOCK_G, 1], tl.float32)
    for _ in range(group_best):
        best, _, rest = _take_best(rest, expert)
        total += _score_of(best)
    group = tl.arange(0, BLOCK_G)[None, :]
    groups = tl.where(group < num_groups, _ordered(tl.reshape(total, (keys.shape[0], BLOCK_G))), _OUT)
    kept = tl.zeros([keys.shape[0], BLOCK_G], tl.int32)
    for _ in range(group_topk):
        _, best, groups = _take_best(groups, group)
        kept = tl.where(group == best, 1, kept)
    return tl.where(kept[:, :, None] > 0, keys, _OUT)


@triton.jit
def _row_softmax(x, mask):
    """Maximum and sum of exponentials over all experts of ``x [T, G, S]``: ``[T]`` each."""
    top = tl.max(tl.max(tl.where(mask, x, float("-inf")), axis=2), axis=1)
    return top, tl.sum(tl.sum(tl.where(mask, tl.exp(x - top[:, None, None]), 0.0), axis=2), axis=1)


@triton.jit
def _scored(chosen, slots, known, top, total, SCORE: tl.constexpr):
    """The scores of chosen logits ``[T, K]``, 0 where unknown; ``top`` and ``total`` are of the softmax over all."""
    if SCORE == "pre_softmax":
        scores = tl.exp(chosen - top[:, None]) / total[:, None]
    elif SCORE == "softmax":
        chosen = tl.where(known, chosen, _LOWEST)
        shifted = chosen - tl.max(tl.where(slots, chosen, float("-inf")), axis=1)[:, None]
        scores = tl.where(slots, tl.exp(shifted), 0.0)
        scores = scores / tl.sum(scores, axis=1)[:, None]
    else:
        scores = own_score(chosen, SCORE)
    return tl.where(known, scores, 0.0)


@triton.jit
def _weighed(scores, epsilon, scaling):
    """Scores divided by their sum and ``epsilon``, unless that is None, times ``scaling``."""
    if epsilon is not None:
        scores = scores / (tl.sum(scores, axis=1)[:, None] + epsilon)
    return scores * scaling


@triton.jit(do_not_specialize=["num_tokens"])
def _topk_kernel(
    logits, expert_bias, weights, indices, link, num_tokens, num_experts, stride, num_groups, group_topk, group_best,
    epsilon, scaling,
    K: tl.constexpr, SCORE: tl.constexpr, GROUPED: tl.constexpr, BIASED: tl.constexpr, BY_LOGITS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program serves TILE tokens; their scores lie as ``[TILE, groups, experts of a group]``."""
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    size = num_experts // num_groups
    member = tl.arange(0, BLOCK_S)[None, None, :]
    expert = tl.arange(0, BLOCK_G)[None, :, None] * size + member
    mask = (token < num_tokens)[:, None, None] & (member < size) & (expert < num_experts)
    rows = logits + token.to(tl.int64) * stride
    x = tl.load(rows[:, None, None] + expert, mask=mask, other=0).to(tl.float32)
    top, total = _row_softmax(x, mask)
    score = x
    if not BY_LOGITS:
        if SCORE == "pre_softmax":
            score = tl.exp(x - top[:, None, None]) / total[:, None, None]
        else:
            score = own_score(x, SCORE)
    if BIASED:
        score += tl.load(expert_bias + expert, mask=(member < size) & (expert < num_experts), other=0).to(tl.float32)
    keys = tl.where(mask, _ordered(score), _OUT)
    if GROUPED:
        keys = _keep_groups(keys, expert, num_groups, group_topk, group_best, BLOCK_G)
    keys, expert = tl.reshape(keys, (TILE, BLOCK_G * BLOCK_S)), tl.reshape(expert, (1, BLOCK_G * BLOCK_S))
    slot = tl.arange(0, BLOCK_K)[None, :]
    found = tl.zeros([TILE, BLOCK_K], tl.int32)
    chosen = tl.zeros([TILE, BLOCK_K], tl.float32)
    for j in range(K):
        best, number, keys = _take_best(keys, expert)
        found = tl.where(slot == j, number, found)
        chosen = tl.where(slot == j, _score_of(best), chosen)
    mask_k = (token < num_tokens)[:, None] & (slot < K)
    if BIASED or not BY_LOGITS:  # else what was compared are the logits
        chosen = tl.load(rows[:, None] + found, mask=mask_k, other=0).to(tl.float32)
    value = _weighed(_scored(chosen, mask_k, mask_k, top, total, SCORE), epsilon, scaling)
    place = token.to(tl.int64)[:, None] * K + slot
    tl.store(weights + place, value, mask=mask_k)
    tl.store(indices + place, found.to(tl.int64), mask=mask_k)
    # By the first program alone.
    first = expert + tl.program_id(0) * num_experts < num_experts
    tl.store(link + expert, tl.zeros([1, BLOCK_G * BLOCK_S], tl.float32), mask=first)


@triton.jit(do_not_specialize=["num_tokens"])
def _weigh_kernel(
    logits, indices, weights, num_tokens, num_experts, stride, epsilon, scaling,
    K: tl.constexpr, SCORE: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program weighs the given experts of TILE tokens; an index out of range names none and has weight 0."""
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.arange(0, BLOCK_K)[None, :]
    mask_k = (token < num_tokens)[:, None] & (slot < K)
    rows = logits + token.to(tl.int64)[:, None] * stride
    place = token.to(tl.int64)[:, None] * K + slot
    index = tl.load(indices + place, mask=mask_k, other=-1)
    known = mask_k & (index >= 0) & (index < num_experts)
    chosen = tl.load(rows + index.to(tl.int32), mask=known, other=0).to(tl.float32)
    top, total = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    if SCORE == "pre_softmax":
        expert = tl.arange(0, BLOCK_E)[None, :]
        mask_e = (token < num_tokens)[:, None] & (expert < num_experts)
        x = tl.load(rows + expert, mask=mask_e, other=0).to(tl.float32)
        top, total = _row_softmax(x[:, None, :], mask_e[:, None, :])
    value = tl.where(known, _weighed(_scored(chosen, mask_k, known, top, total, SCORE), epsilon, scaling), 0.0)
    tl.store(weights + place, value, mask=mask_k)


@triton.jit
def _all_scores(x, mask, top, total, SCORE: tl.constexpr):
    """The scores ``[T, E]`` of all experts, 0 past the last, which sum to one a token; and what each is divided by."""
    if SCORE == "softmax" or SCORE == "pre_softmax":
        scores = tl.where(mask, tl.exp(x - top[:, None]), 0.0)
        whole = total[:, None]
    else:
        scores = tl.where(mask, own_score(x, SCORE), 0.0)
        whole = tl.sum(scores, axis=1)[:, None] + 1e-20
    return scores / whole, whole


@triton.jit(do_not_specialize=["num_tokens"])
def _score_sums_kernel(
    logits, padding_mask, sums, num_tokens, num_experts, stride,
    SCORE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program adds the scores of TILE * TILES tokens, in a fixed order; ``sums [programs, E]``."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    added = tl.zeros([1, BLOCK_E], tl.float32)
    for step in range(TILES):
        token = (tl.program_id(0) * TILES + step) * TILE + tl.arange(0, TILE)
        inside = token < num_tokens
        if padding_mask is not None:
            inside &= tl.load(padding_mask + token, mask=inside, other=1) == 0
        mask = inside[:, None] & (expert < num_experts)
        x = tl.load(logits + token.to(tl.int64)[:, None] * stride + expert, mask=mask, other=0).to(tl.float32)
        top, total = _row_softmax(
            x[:, None, :], (inside[:, None] | (expert == 0))[:, None, :] & (expert < num_experts)[:, None, :]
        )
        scores, _ = _all_scores(x, mask, top, total, SCORE)
        added += tl.sum(tl.where(mask, scores, 0.0), axis=0)[None, :]
    tl.store(sums + tl.program_id(0).to(tl.int64) * num_experts + expert, added, mask=expert < num_experts)


@triton.jit(do_not_specialize=["num_tokens"])
def _topk_backward_kernel(
    logits, grad, grad_sums, indices, padding_mask, dlogits, num_tokens, num_experts, stride, epsilon, scaling,
    K: tl.constexpr, SCORE: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program writes the gradients of TILE tokens' logits; ``grad`` is that of weights, ``grad_sums`` of summed scores.

    An index out of range names no expert and takes no part; the gradients of an expert named twice are added.
    """
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    expert, slot = tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_K)[None, :]
    mask_k = (token < num_tokens)[:, None] & (slot < K)
    mask_e = (token < num_tokens)[:, None] & (expert < num_experts)
    rows = logits + token.to(tl.int64)[:, None] * stride
    x = tl.load(rows + expert, mask=mask_e, other=0).to(tl.float32)
    top, total = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    if SCORE == "pre_softmax" or (SCORE == "softmax" and grad_sums is not None):
        top, total = _row_softmax(x[:, None, :], mask_e[:, None, :])
    dense = tl.zeros([TILE, BLOCK_E], tl.float32)
    if grad_sums is not None:
        g_sums = tl.load(grad_sums + expert, mask=expert < num_experts, other=0)
        scores, whole = _all_scores(x, mask_e, top, total, SCORE)
        dense = g_sums - tl.sum(scores * g_sums, axis=1)[:, None]
        if SCORE == "softmax" or SCORE == "pre_softmax":
            dense *= scores
        else:
            dense *= own_score_slope(x, scores * whole, SCORE) / whole
    if grad is not None:
        place = token.to(tl.int64)[:, None] * K + slot
        index = tl.load(indices + place, mask=mask_k, other=-1)
        known = mask_k & (index >= 0) & (index < num_experts)
        index = tl.where(known, index, -1).to(tl.int32)
        g = tl.load(grad + place, mask=known, other=0).to(tl.float32) * scaling
        chosen = tl.load(rows + index, mask=known, other=0).to(tl.float32)
        score = _scored(chosen, mask_k, known, top, total, SCORE)
        if epsilon is not None:
            divisor = tl.sum(score, axis=1)[:, None] + epsilon
            g = tl.where(known, (g - tl.sum(g * score, axis=1)[:, None] / divisor) / divisor, 0.0)
        if SCORE == "softmax" or SCORE == "pre_softmax":
            mean = tl.sum(g * score, axis=1)[:, None]
            g = score * (g - mean) if SCORE == "softmax" else score * g
            if SCORE == "pre_softmax":
                dense -= tl.exp(x - top[:, None]) / total[:, None] * mean
        else:
            g = tl.where(known, g * own_score_slope(chosen, score, SCORE), 0.0)
        for j in range(K):
            named = tl.sum(tl.where(slot == j, index, 0), axis=1)[:, None]
            dense += tl.where(expert == named, tl.sum(tl.where(slot == j, g, 0.0), axis=1)[:, None], 0.0)
    if padding_mask is not None:
        padding = tl.load(padding_mask + token, mask=token < num_tokens, other=1)
        dense = tl.where(padding[:, None] == 0, dense, 0.0)
    tl.store(dlogits + token.to(tl.int64)[:, None] * num_experts + expert, dense, mask=mask_e)


def _score(score_function: str, pre_softmax: bool) -> str:
    if score_function == "softmax":
        return "pre_softmax" if pre_softmax else "softmax"
    return _check.known("the triton kernels", "score", score_function, OWN_SCORES)


def _scaling(scaling_factor: float | None) -> float:
    return 1.0 if scaling_factor is None else scaling_factor


def topk_router(
    logits: Tensor,
    expert_bias: Tensor | None,
    padding_mask: Tensor | None,
    k: int,
    score_function: str,
    pre_softmax: bool,
    epsilon: float | None,
    scaling_factor: float | None,
    by_logits: bool,
    num_groups: int,
    group_topk: int,
    group_best: int,
) -> Any:
    """``moekit::topk_router``: weights ``[T, K]``, indices ``[T, K]`` and link ``[E]``."""
    if not _launch.computes(logits, expert_bias):
        return NotImplemented
    logits = _launch.rows_of(logits)
    num_tokens, num_experts = logits.shape
    groups, score, biased = num_groups or 1, _score(score_function, pre_softmax), expert_bias is not None
    weights = torch.empty(num_tokens, k, dtype=logits.dtype, device=logits.device)
    indices = torch.empty(num_tokens, k, dtype=torch.int64, device=logits.device)
    make = torch.empty if num_tokens else torch.zeros  # where there is a token a kernel writes it
    link = make(num_experts, dtype=torch.float32, device=logits.device)
    block_g, block_s = _launch.power_of_two(groups), _launch.power_of_two(num_experts // groups)
    tile = max(_ENTRIES // (block_g * block_s), 1)
    _launch.launch(
        _topk_kernel, (_launch.blocks(num_tokens, tile),),
        logits, _launch.dense(expert_bias), weights, indices, link, num_tokens, num_experts, logits.stride(0),
        groups, group_topk or 1, group_best or 1, epsilon, _scaling(scaling_factor),
        K=k, SCORE=score, GROUPED=bool(num_groups), BIASED=biased,
        # Every score keeps the order of the logits, and adds ties where it saturates.
        BY_LOGITS=by_logits or score == "softmax" or not (biased or num_groups),
        TILE=tile, BLOCK_G=block_g, BLOCK_S=block_s, BLOCK_K=_launch.power_of_two(k),
    )  # fmt: skip
    return weights, indices, link


def _indices_fit(logits: Tensor, indices: Tensor) -> bool:
    whole = indices.dtype in (torch.int32, torch.int64)
    return whole and indices.dim() == 2 and indices.shape[0] == logits.shape[0]


def weigh_experts(
    logits: Tensor,
    indices: Tensor,
    padding_mask: Tensor | None,
    score_function: str,
    pre_softmax: bool,
    epsilon: float | None,
    scaling_factor: float | None,
) -> Any:
    """``moekit::weigh_experts``: the weights ``[T, K]`` of given experts."""
    if not _launch.computes(logits) or not _indices_fit(logits, indices):
        return NotImplemented
    logits = _launch.rows_of(logits)
    (num_tokens, num_experts), k = logits.shape, indices.shape[1]
    weights = torch.empty(num_tokens, k, dtype=logits.dtype, device=logits.device)
    block_e = _launch.power_of_two(num_experts)
    tile = max(_ENTRIES // block_e, 1)
    _launch.launch(
        _weigh_kernel, (_launch.blocks(num_tokens, tile),),
        logits, indices.contiguous(), weights, num_tokens, num_experts, logits.stride(0), epsilon,
        _scaling(scaling_factor),
        K=k, SCORE=_score(score_function, pre_softmax), TILE=tile, BLOCK_E=block_e, BLOCK_K=_launch.power_of_two(k),
    )  # fmt: skip
    return weights, torch.zeros(num_experts, dtype=torch.float32, device=logits.device)


def _optional(value: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether ``value`` is None, or of this kind."""
    return value is None or (value.dtype is dtype and value.shape == shape)


def score_sums(logits: Tensor, link: Tensor, score_function: str, padding_mask: Tensor | None) -> Any:
    """``moekit::score_sums``: sums ``[E]`` of the tokens' scores."""
    if not _launch.computes(logits) or not _optional(padding_mask, torch.bool, logits.shape[:1]):
        return NotImplemented
    logits = _launch.rows_of(logits)
    num_tokens, num_experts = logits.shape
    block_e = _launch.power_of_two(num_experts)
    tile = max(_ENTRIES // block_e, 1)
    programs = _launch.blocks(num_tokens, tile * _TILES)
    sums = torch.empty(programs, num_experts, dtype=torch.float32, device=logits.device)
    _launch.launch(
        _score_sums_kernel, (programs,),
        logits, _launch.dense(padding_mask), sums, num_tokens, num_experts, logits.stride(0),
        SCORE=_score(score_function, False), TILE=tile, TILES=_TILES, BLOCK_E=block_e,
    )  # fmt: skip
    return sums.sum(0)


def topk_router_backward(
    grad: Tensor | None,
    grad_sums: Tensor | None,
    logits: Tensor,
    indices: Tensor,
    padding_mask: Tensor | None,
    score_function: str,
    pre_softmax: bool,
    epsilon: float | None,
    scaling_factor: float | None,
) -> Any:
    """``moekit::topk_router_backward``: the gradient of the logits."""
    fits = _indices_fit(logits, indices) and (grad is None or grad.shape == indices.shape)
    if not fits or not _launch.computes(logits, grad) or not _optional(padding_mask, torch.bool, logits.shape[:1]):
        return NotImplemented
    if not _optional(grad_sums, torch.float32, logits.shape[1:]):
        return NotImplemented
    logits = _launch.rows_of(logits)
    num_tokens, num_experts = logits.shape
    dlogits = torch.empty(num_tokens, num_experts, dtype=logits.dtype, device=logits.device)
    k, block_e = indices.shape[1], _launch.power_of_two(num_experts)
    tile = max(_ENTRIES // block_e, 1)
    _launch.launch(
        _topk_backward_kernel, (_launch.blocks(num_tokens, tile),),
        logits, _launch.dense(grad), _launch.dense(grad_sums), indices.contiguous(), _launch.dense(padding_mask), dlogits,
        num_tokens, num_experts, logits.stride(0), epsilon, _scaling(scaling_factor),
        K=k, SCORE=_score(score_function, pre_softmax), TILE=tile, BLOCK_E=block_e, BLOCK_K=_launch.power_of_two(k),
    )  # fmt: skip
    return dlogits
