"""Launchers of the router: ``topk_router``, ``weigh_experts``, ``score_sums`` and the backward of all."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.kernels.numba import _router_kernels as kernels
from moekit.kernels.numba._elements import E4M3, KINDS
from moekit.kernels.numba._launch import INDICES, address, dense
from moekit.kernels.numba._threads import run

# Selecting costs more than moving the logits: about this many bytes' worth for each.
_EFFORT = 8


SCORINGS = {"softmax": kernels.SOFTMAX, "sigmoid": kernels.SIGMOID, "sqrtsoftplus": kernels.ROOT_SOFTPLUS}


def _scoring(score_function: str, pre_softmax: bool) -> int:
    scoring = _check.known("the numba kernels", "score", score_function, SCORINGS)
    return kernels.PRE_SOFTMAX if pre_softmax and scoring == kernels.SOFTMAX else scoring


def _factors(epsilon: float | None, scaling_factor: float | None) -> tuple[float, float]:
    """As the kernels have them: -1 is no normalisation."""
    return -1.0 if epsilon is None else epsilon, 1.0 if scaling_factor is None else scaling_factor


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
    """``logits [T, E]`` to ``(weights [T, K], indices [T, K], link [E])``."""
    element = KINDS.get(logits.dtype, E4M3)
    if element == E4M3 or (expert_bias is not None and expert_bias.dtype is torch.float64):
        return NotImplemented
    logits, expert_bias = dense(logits), dense(expert_bias, torch.float32)
    tokens, experts = logits.shape
    weights = torch.empty((tokens, k), dtype=logits.dtype)
    indices, link = torch.empty((tokens, k), dtype=torch.int64), torch.empty(experts, dtype=torch.float32)
    scoring, biased = _scoring(score_function, pre_softmax), expert_bias is not None
    # Every score keeps the order of the logits, and adds ties where it saturates.
    by_logits = by_logits or scoring == kernels.SOFTMAX or not (biased or num_groups)
    run(
        kernels.router_kernel(element, scoring, biased, bool(num_groups), by_logits), tokens, logits.nbytes * _EFFORT,
        logits.data_ptr(), address(expert_bias), experts, k, num_groups, group_topk, group_best,
        *_factors(epsilon, scaling_factor), weights.data_ptr(), indices.data_ptr(), link.data_ptr(),
    )  # fmt: skip
    return weights, indices, link


def weigh_experts(
    logits: Tensor,
    indices: Tensor,
    padding_mask: Tensor | None,
    score_function: str,
    pre_softmax: bool,
    epsilon: float | None,
    scaling_factor: float | None,
) -> Any:
    """The weights ``[T, K]`` of given experts; an index out of range is the reference's."""
    element = KINDS.get(logits.dtype, E4M3)
    if element == E4M3 or indices.dtype not in INDICES or indices.dim() != 2 or indices.shape[0] != logits.shape[0]:
        return NotImplemented
    logits, indices = dense(logits), dense(indices, torch.int64)
    (tokens, experts), slots = logits.shape, indices.shape[1]
    weights, wrong = torch.empty(indices.shape, dtype=logits.dtype), ctypes.c_int64()
    run(
        kernels.weigh_kernel(element, _scoring(score_function, pre_softmax)), tokens, logits.nbytes * _EFFORT,
        logits.data_ptr(), indices.data_ptr(), experts, slots, *_factors(epsilon, scaling_factor),
        weights.data_ptr(), ctypes.addressof(wrong),
    )  # fmt: skip
    return NotImplemented if wrong.value else (weights, torch.zeros(experts, dtype=torch.float32))


def _optional(value: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether ``value`` is None, or of this kind."""
    return value is None or (value.dtype is dtype and value.shape == shape)


def score_sums(logits: Tensor, link: Tensor, score_function: str, padding_mask: Tensor | None) -> Any:
    """Sums ``[E]`` of the scores of ``logits [T, E]``, which sum to one a token."""
    element = KINDS.get(logits.dtype, E4M3)
    if element == E4M3 or not logits.shape[1] or not _optional(padding_mask, torch.bool, logits.shape[:1]):
        return NotImplemented
    logits, padding_mask = dense(logits), dense(padding_mask)
    tokens, experts = logits.shape
    blocks = -(-tokens // kernels.SUMMED)
    sums = torch.empty((blocks, experts), dtype=torch.float32)
    run(
        kernels.score_sums_kernel(element, _scoring(score_function, False)), blocks, logits.nbytes * _EFFORT,
        logits.data_ptr(), address(padding_mask), tokens, experts, sums.data_ptr(),
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
    """The gradient of ``logits [T, E]``; an index out of range is the reference's."""
    element, grad_element = KINDS.get(logits.dtype, E4M3), KINDS.get(logits.dtype if grad is None else grad.dtype, E4M3)
    if E4M3 in (element, grad_element) or indices.dtype not in INDICES or indices.shape[:-1] != logits.shape[:1]:
        return NotImplemented
    fits = grad is None or grad.shape == indices.shape
    if not (
        fits
        and _optional(grad_sums, torch.float32, logits.shape[1:])
        and _optional(padding_mask, torch.bool, logits.shape[:1])
    ):
        return NotImplemented
    grad, grad_sums, padding_mask = dense(grad), dense(grad_sums), dense(padding_mask)
    logits, indices = dense(logits), dense(indices, torch.int64)
    (tokens, experts), slots = logits.shape, indices.shape[1]
    out, wrong = torch.empty(logits.shape, dtype=logits.dtype), ctypes.c_int64()
    run(
        kernels.router_backward_kernel(element, grad_element, _scoring(score_function, pre_softmax)),
        tokens, logits.nbytes * _EFFORT,
        address(grad), address(grad_sums), logits.data_ptr(), indices.data_ptr(), address(padding_mask), experts, slots,
        *_factors(epsilon, scaling_factor), out.data_ptr(), ctypes.addressof(wrong),
    )  # fmt: skip
    return NotImplemented if wrong.value else out
