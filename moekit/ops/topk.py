"""Router scores and top-k selection: which experts a token goes to, and with what weight.

The two halves are separate because only one of them has a gradient. :func:`router_indices` selects; it looks
at the scores before any rounding to the storage dtype, breaks ties towards the lowest expert and ranks NaN
below everything, so the indices are unique and in range whatever the logits, and the same on every run.
:func:`router_weights` weighs given indices, its own or recorded ones, and is differentiable as often as
wanted. :func:`topk_router` is one after the other.

Precision: everything is computed in float32 (float64 for float64) and rounded once, at the store.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops import _library

SCORE_FUNCTIONS = ("softmax", "sigmoid")
# Keeps a token whose scores are all zero from dividing by zero (as DeepSeek-V3's router does).
_NORMALISER_EPS = 1e-20


# --- selection ----------------------------------------------------------------------------------------------


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
    _check_matrix("select_topk", "scores", scores)
    _check.topk("select_topk", k, scores.shape[1])
    return descending(scores, dim=1)[:, :k].contiguous()


def group_limited_select(scores: Tensor, k: int, num_groups: int, group_topk: int) -> Tensor:
    """The K highest-scored experts of each token among those of its best groups.

    The E experts form ``num_groups`` groups of neighbours. A group's score is the sum of its ``max(1, K //
    group_topk)`` highest scores; a token takes its ``group_topk`` best groups, then its K best experts in
    them. It limits the devices (DeepSeek-V2, arXiv 2405.04434) or the nodes (DeepSeek-V3, arXiv 2412.19437)
    that a token travels to.

    Args:
        scores: ``[T, E]``, floating point.
        k: experts per token, 1 to ``group_topk * E // num_groups``.
        num_groups: number of groups, a divisor of E.
        group_topk: groups per token, 1 to ``num_groups``.

    Returns:
        indices ``[T, K]`` int64, descending by score; ties go to the lowest group and the lowest expert, NaN
        ranks lowest. Always within the chosen groups.

    Raises:
        ValueError: a number is out of its range, or ``scores`` is not 2-D.
        TypeError: ``scores`` is not floating point.
    """
    _check_matrix("group_limited_select", "scores", scores)
    num_experts = scores.shape[1]
    _check_groups("group_limited_select", k, num_experts, num_groups, group_topk)
    size = num_experts // num_groups
    grouped = scores.detach().reshape(-1, num_groups, size)
    best = descending(grouped, dim=2)[:, :, : max(1, k // group_topk)]
    # Back in ascending order, so that a tie between two chosen groups goes to the lower expert.
    chosen = select_topk(grouped.gather(2, best).sum(2), group_topk).sort(dim=1).values
    experts = (chosen[:, :, None] * size + torch.arange(size, device=scores.device)).flatten(1)
    return experts.gather(1, select_topk(scores.detach().gather(1, experts), k))


def selection_scores(
    logits: Tensor,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    expert_bias: Tensor | None = None,
) -> Tensor:
    """What the selection compares: scores ``[T, E]`` in float32 (float64 for float64), detached.

    ``sigmoid(logits)``, or ``softmax(logits)`` with ``pre_softmax``, or the logits themselves where the
    softmax comes after the selection; plus ``expert_bias``, which is therefore in the unit of these scores.
    """
    scores = logits.detach().to(_wide(logits))
    if score_function == "sigmoid":
        scores = scores.sigmoid()
    elif pre_softmax:
        scores = scores.softmax(1)
    return scores if expert_bias is None else scores + expert_bias.detach()


def router_indices(
    logits: Tensor,
    k: int,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    expert_bias: Tensor | None = None,
) -> Tensor:
    """The selecting half of :func:`topk_router`: indices ``[T, K]`` int64.

    Arguments and errors are described there.
    """
    _check_selection(logits, k, score_function, num_groups, group_topk, expert_bias)
    return _choose(logits, expert_bias, k, score_function, pre_softmax, num_groups, group_topk)


def _choose(
    logits: Tensor,
    expert_bias: Tensor | None,
    k: int,
    score_function: str,
    pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
) -> Tensor:
    if expert_bias is None and not group_topk:
        # Softmax and sigmoid keep the order of the logits, and add ties where they saturate.
        return select_topk(logits, k)
    scores = selection_scores(logits, score_function=score_function, pre_softmax=pre_softmax, expert_bias=expert_bias)
    if group_topk and num_groups:
        return group_limited_select(scores, k, num_groups, group_topk)
    return select_topk(scores, k)


# --- weights ------------------------------------------------------------------------------------------------


def router_weights(
    logits: Tensor,
    indices: Tensor,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    scaling_factor: float | None = None,
) -> Tensor:
    """The differentiable half of :func:`topk_router`: the weights of given experts.

    Args:
        logits: ``[T, E]``, floating point.
        indices: ``[T, K]`` int32 or int64, as :func:`router_indices` gives them or as they were recorded; -1
            is "no expert" and has weight 0.
        score_function: as in :func:`topk_router`.
        pre_softmax: as in :func:`topk_router`.
        scaling_factor: as in :func:`topk_router`.

    Returns:
        weights ``[T, K]`` in the dtype of ``logits``.

    Raises:
        ValueError: the shapes or devices do not fit, an unknown ``score_function``, or (on a CPU, or under
            ``moekit.debug()``) an index below -1 or not below E. On a GPU such an index has weight 0.
        TypeError: ``logits`` is not floating point, or ``indices`` not int32 or int64.
    """
    _check_router("router_weights", logits, score_function, None)
    _check.integer("router_weights", "indices", indices)
    _check.tensor_dim("router_weights", "indices", indices, 2)
    _check.shape("router_weights", "indices", indices, (logits.shape[0], indices.shape[1]), "[T, K]")
    _check.same_device("router_weights", logits=logits, indices=indices)
    num_experts = logits.shape[1]
    absent = (indices < 0) | (indices >= num_experts)
    if _may_look_at(indices):
        _check_range(indices, num_experts)
    index = indices.long().masked_fill(absent, 0)
    values = logits.to(_wide(logits))
    if score_function == "sigmoid":
        weights = values.gather(1, index).sigmoid().masked_fill(absent, 0.0)
        if indices.shape[1] > 1:
            weights = weights / (weights.sum(1, keepdim=True) + _NORMALISER_EPS)
    elif pre_softmax:
        weights = values.softmax(1).gather(1, index).masked_fill(absent, 0.0)
    else:
        # The lowest finite value rather than -inf: a token with no expert at all stays free of NaN.
        chosen = values.gather(1, index).masked_fill(absent, torch.finfo(values.dtype).min)
        weights = chosen.softmax(1).masked_fill(absent, 0.0)
    if scaling_factor is not None:
        weights = weights * scaling_factor
    return weights.to(logits.dtype)


def topk_router(
    logits: Tensor,
    k: int,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose K experts for each token and weigh them.

    Args:
        logits: ``[T, E]``, floating point.
        k: experts per token, 1 to E.
        score_function: ``"softmax"`` over the chosen K (Mixtral, arXiv 2401.04088), or over all E before the
            choice with ``pre_softmax`` (Switch Transformer, arXiv 2101.03961); ``"sigmoid"`` of each chosen
            logit, divided by their sum if K > 1 (DeepSeek-V3, arXiv 2412.19437).
        pre_softmax: take the softmax over all E experts; no effect on ``"sigmoid"``.
        num_groups: number of groups of experts, see :func:`group_limited_select`.
        group_topk: groups that a token may use; without it (None or 0) there is no grouping.
        scaling_factor: multiplies the weights; 0.0 is a factor like any other.
        expert_bias: ``[E]``, floating point, added to the scores for the selection only, never to the weights
            (loss-free balancing, arXiv 2408.15664). In the unit of the scores that are compared: sigmoid
            values, probabilities with ``pre_softmax``, otherwise logits.

    Returns:
        ``(weights [T, K] in the dtype of logits, indices [T, K] int64)``, descending by the compared score;
        ties go to the lowest expert. A token with NaN or infinite logits still has unique experts in range;
        its weights may be NaN, no other token is affected. Only the weights are differentiable, with respect
        to ``logits``.

    Raises:
        ValueError: ``k`` or the groups do not fit E, a shape or device does not fit, an unknown
            ``score_function``.
        TypeError: ``logits`` or ``expert_bias`` is not floating point.
    """
    _check_selection(logits, k, score_function, num_groups, group_topk, expert_bias)
    if scaling_factor is not None:
        scaling_factor = _check.real("topk_router", "scaling_factor", scaling_factor)
    return _topk_router(logits, expert_bias, k, score_function, bool(pre_softmax), num_groups, group_topk, scaling_factor)


# --- the operators ----------------------------------------------------------------------------------------------


def _topk_router_reference(
    logits: Tensor,
    expert_bias: Tensor | None,
    k: int,
    score_function: str,
    pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
) -> tuple[Tensor, Tensor]:
    indices = _choose(logits, expert_bias, k, score_function, pre_softmax, num_groups, group_topk)
    weights = router_weights(
        logits, indices, score_function=score_function, pre_softmax=pre_softmax, scaling_factor=scaling_factor
    )
    return weights, indices


def _topk_router_fake(logits: Tensor, expert_bias: Tensor | None, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], k), logits.new_empty(logits.shape[0], k, dtype=torch.int64)


def _topk_router_backward_reference(
    grad: Tensor,
    logits: Tensor,
    indices: Tensor,
    score_function: str,
    pre_softmax: bool,
    scaling_factor: float | None,
) -> Tensor:
    """``grad [T, K]`` of the weights to the gradient of ``logits [T, E]``."""
    values = logits.to(_wide(logits))
    g = grad.to(values.dtype)
    if scaling_factor is not None:
        g = g * scaling_factor
    if score_function == "softmax" and pre_softmax:
        probs = values.softmax(1)
        g = torch.zeros_like(values).scatter(1, indices, g)
        return (probs * (g - (g * probs).sum(1, keepdim=True))).to(logits.dtype)
    chosen = values.gather(1, indices)
    if score_function == "softmax":
        probs = chosen.softmax(1)
        g = probs * (g - (g * probs).sum(1, keepdim=True))
    else:
        scores = chosen.sigmoid()
        if indices.shape[1] > 1:
            total = scores.sum(1, keepdim=True) + _NORMALISER_EPS
            g = (g - (g * scores).sum(1, keepdim=True) / total) / total
        g = g * scores * (-chosen).sigmoid()
    return torch.zeros_like(values).scatter(1, indices, g).to(logits.dtype)


def _topk_router_backward_fake(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, args: tuple, outputs: tuple) -> None:
    logits, _, _, score_function, pre_softmax, _, _, scaling_factor = args
    ctx.scoring = (score_function, pre_softmax, scaling_factor)
    ctx.save_for_backward(logits, outputs[1])


def _backward(ctx: Any, needs: tuple, grad: Tensor, _: Any) -> tuple:
    return (_topk_router_backward(grad, *ctx.saved_tensors, *ctx.scoring), *[None] * 7)


def _save_backward(ctx: Any, args: tuple, outputs: Any) -> None:
    *tensors, ctx.scoring = *args[:3], args[3:]
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    _library.require_reference("topk_router_backward", ctx.saved_tensors[1])
    args = (*ctx.saved_tensors, *ctx.scoring)
    return _library.differentiate(lambda *a: (_topk_router_backward_reference(*a),), args, needs, (grad,))


_topk_router_backward = _library.define(
    "topk_router_backward(Tensor grad, Tensor logits, Tensor indices, str score_function, bool pre_softmax,"
    " float? scaling_factor) -> Tensor",
    reference=_topk_router_backward_reference,
    fake=_topk_router_backward_fake,
    save=_save_backward,
    backward=_double_backward,
)
_topk_router = _library.define(
    "topk_router(Tensor logits, Tensor? expert_bias, SymInt k, str score_function, bool pre_softmax,"
    " int? num_groups, int? group_topk, float? scaling_factor) -> (Tensor, Tensor)",
    reference=_topk_router_reference,
    fake=_topk_router_fake,
    save=_save,
    backward=_backward,
)


# --- checks -------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_matrix(op: str, name: str, value: Tensor) -> None:
    _check.tensor_dim(op, name, value, 2)
    _check.floating(op, name, value)


def _check_router(op: str, logits: Tensor, score_function: str, expert_bias: Tensor | None) -> None:
    _check_matrix(op, "logits", logits)
    _check.one_of(op, "score_function", score_function, SCORE_FUNCTIONS)
    if expert_bias is not None:
        _check.floating(op, "expert_bias", expert_bias)
        _check.shape(op, "expert_bias", expert_bias, logits.shape[1:], "[E]")
        _check.same_device(op, logits=logits, expert_bias=expert_bias)


def _check_selection(
    logits: Tensor,
    k: int,
    score_function: str,
    num_groups: int | None,
    group_topk: int | None,
    expert_bias: Tensor | None,
) -> None:
    op = "topk_router"
    _check_router(op, logits, score_function, expert_bias)
    if not group_topk:
        _check.topk(op, k, logits.shape[1])
    elif num_groups is None:
        raise _check.fail(op, "num_groups", f"given with group_topk={group_topk}", None)
    else:
        _check_groups(op, k, logits.shape[1], num_groups, group_topk)


def _check_groups(op: str, k: int, num_experts: int, num_groups: int, group_topk: int) -> None:
    _check.positive(op, "num_groups", num_groups)
    _check.positive(op, "group_topk", group_topk)
    if num_experts % num_groups:
        raise _check.fail(op, "num_groups", f"a divisor of the number of experts ({num_experts})", num_groups)
    if group_topk > num_groups:
        raise _check.fail(op, "group_topk", f"at most the number of groups ({num_groups})", group_topk)
    available = group_topk * (num_experts // num_groups)
    _check.positive(op, "k", k)
    if k > available:
        raise _check.fail(op, "k", f"at most the {available} experts of the {group_topk} chosen groups", k)


def _may_look_at(values: Tensor) -> bool:
    return not torch.compiler.is_compiling() and _backend.checks_values(values)


def _check_range(indices: Tensor, num_experts: int) -> None:
    if indices.numel() == 0:
        return
    low, high = (int(value) for value in indices.aminmax())
    if low < -1 or high >= num_experts:
        wanted = f"-1 (none) or below the number of experts ({num_experts})"
        raise _check.fail("router_weights", "indices", wanted, f"index {low if low < -1 else high}")
