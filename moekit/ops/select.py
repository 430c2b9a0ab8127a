"""Choosing the highest of scores: ties go to the lowest index, NaN ranks below everything, on every run the same.

So the indices are unique and in range whatever the scores. Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekit import _check


class Choice(NamedTuple):
    """How experts are chosen, in the order of the operators' schemas."""

    by_logits: bool = False  # the choice compares logits, not scores
    num_groups: int = 0  # 0: no groups
    group_topk: int = 0
    group_best: int = 0


def descending(scores: Tensor, dim: int) -> Tensor:
    """The order that sorts ``scores`` descending along ``dim``: ties by position, NaN last.

    Sorting the negated scores ascending puts NaN last by itself. ``0.0 - x`` makes one zero of both, and the
    fill one NaN of all: a radix sort may look at the sign bits.
    """
    scores = scores.detach()
    keys = (0.0 - scores).masked_fill(scores.isnan(), float("nan"))
    return keys.argsort(dim=dim, stable=True)


def select_topk(scores: Tensor, k: int) -> Tensor:
    """The K highest-scored experts of each token.

    Args:
        scores: ``[T, E]``, floating point.
        k: experts per token, 1 to E.

    Returns:
        indices ``[T, K]`` int64, descending by score. Ties go to the lowest expert and NaN ranks below
        ``-inf``, so the indices are unique and in range whatever the scores. Not differentiable.

    Raises:
        ValueError: ``k`` is below 1 or above E, or ``scores`` is not 2-D.
        TypeError: ``scores`` is not floating point.
    """
    check_matrix("select_topk", "scores", scores)
    k = _check.topk("select_topk", k, scores.shape[1])
    return descending(scores, dim=1)[:, :k].contiguous()


def group_limited_select(scores: Tensor, k: int, num_groups: int, group_topk: int, group_best: int | None = None) -> Tensor:
    """The K highest-scored experts of each token among those of its best groups.

    The E experts form ``num_groups`` groups of neighbours. A group is scored by the sum of its ``group_best`` highest; a
    token takes its ``group_topk`` best groups, then its K best experts in them. It limits the devices (DeepSeek-V2, arXiv
    2405.04434) or the nodes (DeepSeek-V3, arXiv 2412.19437) that a token travels to.

    Args:
        scores: ``[T, E]``, floating point.
        k: experts per token, 1 to ``group_topk * E // num_groups``.
        num_groups: number of groups, a divisor of E.
        group_topk: groups per token, 1 to ``num_groups``.
        group_best: scores that a group's is the sum of, 1 to ``E // num_groups``; None is ``max(1, K // group_topk)``.

    Returns:
        indices ``[T, K]`` int64, descending by score; ties go to the lowest group and the lowest expert, NaN
        ranks lowest. Always within the chosen groups.

    Raises:
        ValueError: a number is out of its range, or ``scores`` is not 2-D.
        TypeError: ``scores`` is not floating point.
    """
    op = "group_limited_select"
    check_matrix(op, "scores", scores)
    num_experts = scores.shape[1]
    k, num_groups, group_topk, group_best = check_groups(op, k, num_experts, num_groups, group_topk, group_best)
    size = num_experts // num_groups
    grouped = scores.detach().reshape(-1, num_groups, size)
    best = descending(grouped, dim=2)[:, :, :group_best]
    # Back in ascending order, so that a tie between two chosen groups goes to the lower expert.
    chosen = select_topk(grouped.gather(2, best).sum(2), group_topk).sort(dim=1).values
    experts = (chosen[:, :, None] * size + torch.arange(size, device=scores.device)).flatten(1)
    return experts.gather(1, select_topk(scores.detach().gather(1, experts), k))


# --- checks -------------------------------------------------------------------------------------------------------


def check_matrix(op: str, name: str, value: Tensor) -> None:
    """``value`` is a floating-point tensor of two dimensions."""
    _check.tensor_dim(op, name, value, 2)
    _check.floating(op, name, value)


def check_choice(
    op: str,
    logits: Tensor,
    k: int,
    num_groups: int | None,
    group_topk: int | None,
    group_best: int | None = None,
    *,
    by_logits: bool = False,
) -> tuple[int, Choice]:
    """``k`` and the groups as Python's integers, looked at."""
    num_experts = logits.shape[1]
    if group_topk:
        if num_groups is None:
            raise _check.fail(op, "num_groups", f"given with group_topk={group_topk}", None)
        k, *groups = check_groups(op, k, num_experts, num_groups, group_topk, group_best)
        return k, Choice(by_logits, *groups)
    for name, value in (("num_groups", num_groups), ("group_best", group_best)):
        if value is not None:
            raise _check.unused(op, name, value, "without group_topk")
    return _check.topk(op, k, num_experts), Choice(by_logits)


def check_groups(
    op: str, k: int, num_experts: int, num_groups: int, group_topk: int, group_best: int | None
) -> tuple[int, int, int, int]:
    """The numbers of :func:`group_limited_select`, looked at."""
    num_groups = _check.positive(op, "num_groups", num_groups)
    group_topk = _check.positive(op, "group_topk", group_topk)
    if num_experts % num_groups:
        raise _check.fail(op, "num_groups", f"a divisor of the number of experts ({num_experts})", num_groups)
    if group_topk > num_groups:
        raise _check.fail(op, "group_topk", f"at most the number of groups ({num_groups})", group_topk)
    size = num_experts // num_groups
    k = _check.positive(op, "k", k)
    if k > group_topk * size:
        raise _check.fail(op, "k", f"at most the {group_topk * size} experts of the {group_topk} chosen groups", k)
    # What Megatron-core has, where it is not said; no more than a group has.
    group_best = max(1, k // group_topk) if group_best is None else _check.positive(op, "group_best", group_best)
    if group_best > size:
        raise _check.fail(op, "group_best", f"at most the {size} experts of a group", group_best)
    return k, num_groups, group_topk, group_best
