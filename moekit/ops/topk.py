"""Router scores and top-k selection: which experts a token goes to, and with what weight.

The two halves are separate because only one of them has a gradient. The selection looks at the scores before
any rounding to the storage dtype, breaks ties towards the lowest expert and ranks NaN below everything, so the
indices are unique and in range whatever the logits, and the same on every run. :func:`router_weights` weighs
given indices, the router's or recorded ones, and is differentiable as often as wanted. :func:`topk_router` is
one after the other.

Precision: everything is computed in float32 (float64 for float64) and rounded once, at the store.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import _library

# Keeps a token whose scores are all zero from dividing by zero (as DeepSeek-V3's router does).
NORMALISER_EPS = 1e-20
# Below this softplus(x) is exp(x) in float64 too; its square root is taken as exp(x / 2), which underflows much later.
_FAR = -40.0


# --- scores -------------------------------------------------------------------------------------------------


def _root_softplus(x: Tensor) -> Tensor:
    """``sqrt(log(1 + exp(x)))``: exact to the smallest numbers, and so is autograd's gradient of it."""
    near = torch.logaddexp(x.clamp(min=_FAR), x.new_zeros(())).sqrt()
    return torch.where(x < _FAR, (x.clamp(max=_FAR) / 2).exp(), near)


def _root_softplus_slope(x: Tensor, score: Tensor) -> Tensor:
    """``sigmoid(x) / (2 * score)``, which is ``score / 2`` where both factors would underflow."""
    near = x.clamp(min=_FAR)
    return torch.where(x < _FAR, score / 2, near.sigmoid() / (2 * _root_softplus(near)))


class Score(NamedTuple):
    """A score that depends on an expert's own logit ``x`` alone, as sums of it over experts are taken to 1."""

    value: Callable[[Tensor], Tensor]  # of x; ascending, so that the logits have its order
    slope: Callable[[Tensor, Tensor], Tensor]  # its derivative, of x and the value


# Softmax is none of these: it looks at all experts, or at the chosen ones.
ELEMENTWISE = {
    "sigmoid": Score(torch.sigmoid, lambda x, score: score * (-x).sigmoid()),
    "sqrtsoftplus": Score(_root_softplus, _root_softplus_slope),
}
SCORE_FUNCTIONS = ("softmax", *ELEMENTWISE)


def normalised(scores: Tensor, epsilon: float = NORMALISER_EPS) -> Tensor:
    """``scores [T, N]`` divided by each token's sum, plus ``epsilon``."""
    return scores / (scores.sum(1, keepdim=True) + epsilon)


def own_score(score_function: str) -> Score | None:
    """The row of a score of a logit alone; None for softmax."""
    return None if score_function == "softmax" else _check.known("the references", "score", score_function, ELEMENTWISE)


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
    _check_matrix(op, "scores", scores)
    num_experts = scores.shape[1]
    k, num_groups, group_topk, group_best = check_groups(op, k, num_experts, num_groups, group_topk, group_best)
    size = num_experts // num_groups
    grouped = scores.detach().reshape(-1, num_groups, size)
    best = descending(grouped, dim=2)[:, :, :group_best]
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

    The scores of a logit alone (``sigmoid(logits)``, say), or ``softmax(logits)`` with ``pre_softmax``, or the
    logits themselves where the softmax comes after the selection; plus ``expert_bias``, which is therefore in
    the unit of these scores.
    """
    _check_scoring("selection_scores", score_function, pre_softmax)
    scores = logits.detach().to(_wide(logits))
    own = own_score(score_function)
    if own is not None:
        scores = own.value(scores)
    elif pre_softmax:
        scores = scores.softmax(1)
    return scores if expert_bias is None else scores + expert_bias.detach()


def _choose(
    logits: Tensor, expert_bias: Tensor | None, k: int, score_function: str, pre_softmax: bool, choice: Choice
) -> Tensor:
    if expert_bias is None and not choice.num_groups:
        # Every score keeps the order of the logits, and adds ties where it saturates.
        return select_topk(logits, k)
    scored = not choice.by_logits and (pre_softmax or score_function != "softmax")
    scores = selection_scores(
        logits,
        score_function=score_function if scored else "softmax",
        pre_softmax=pre_softmax and scored,
        expert_bias=expert_bias,
    )
    if choice.num_groups:
        return group_limited_select(scores, k, choice.num_groups, choice.group_topk, choice.group_best)
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
    """The differentiable half of :func:`topk_router`: the weights of given experts, in plain PyTorch.

    Args:
        logits: ``[T, E]``, floating point.
        indices: ``[T, K]`` int32 or int64, as :func:`topk_router` gives them or as they were recorded; -1 is
            "no expert" and has weight 0.
        score_function: as in :func:`topk_router`.
        pre_softmax: as in :func:`topk_router`.
        scaling_factor: as in :func:`topk_router`.

    Returns:
        weights ``[T, K]`` in the dtype of ``logits``.

    Raises:
        ValueError: the shapes or devices do not fit, an unknown ``score_function``, ``pre_softmax`` without
            softmax, or (on a CPU, or under ``moekit.debug()``) an index below -1 or not below E. On a GPU such
            an index has weight 0.
        TypeError: ``logits`` is not floating point, or ``indices`` not int32 or int64.
    """
    _check_router("router_weights", logits, score_function, pre_softmax, None)
    _check.tensor_dim("router_weights", "indices", indices, 2)
    epsilon = _megatron_epsilon(score_function, indices.shape[1])
    return _weigh_reference(logits, indices, score_function, pre_softmax, epsilon, scaling_factor)


def _megatron_epsilon(score_function: str, k: int) -> float | None:
    """There, scores of a logit alone are divided by their sum, if there are several."""
    return NORMALISER_EPS if score_function != "softmax" and k > 1 else None


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
            logit (DeepSeek-V3, arXiv 2412.19437) or ``"sqrtsoftplus"``, the square root of its softplus, both
            divided by their sum if K > 1.
        pre_softmax: take the softmax over all E experts, before the choice.
        num_groups: number of groups of experts, see :func:`group_limited_select`.
        group_topk: groups that a token may use; without groups both are None (or ``group_topk`` 0).
        scaling_factor: multiplies the weights; 0.0 is a factor like any other.
        expert_bias: ``[E]``, floating point, added to the scores for the selection only, never to the weights
            (loss-free balancing, arXiv 2408.15664). In the unit of the scores that are compared: probabilities
            with ``pre_softmax``, logits with softmax otherwise, else values of the score function.

    Returns:
        ``(weights [T, K] in the dtype of logits, indices [T, K] int64)``, descending by the compared score;
        ties go to the lowest expert. A token with NaN or infinite logits still has unique experts in range;
        its weights may be NaN, no other token is affected. Only the weights are differentiable, with respect
        to ``logits``.

    Raises:
        ValueError: ``k`` or the groups do not fit E, a shape or device does not fit, an unknown
            ``score_function``, or an argument that would have no effect (``pre_softmax`` without softmax,
            ``num_groups`` without ``group_topk``).
        TypeError: ``logits`` or ``expert_bias`` is not floating point.
    """
    _check_router("topk_router", logits, score_function, pre_softmax, expert_bias)
    k, choice = check_choice("topk_router", logits, k, num_groups, group_topk)
    if scaling_factor is not None:
        scaling_factor = _check.real("topk_router", "scaling_factor", scaling_factor)
    scoring = Scoring(score_function, bool(pre_softmax), _megatron_epsilon(score_function, k), scaling_factor)
    return choose_and_weigh(logits, expert_bias, k, *scoring, *choice)


# --- the operators ----------------------------------------------------------------------------------------------


class Scoring(NamedTuple):
    """How chosen experts are weighed, in the order of the operators' schemas."""

    score_function: str
    pre_softmax: bool  # the softmax is over all experts, not over the chosen ones
    epsilon: float | None  # weights are divided by their sum plus this; None: they are not
    scaling_factor: float | None


class Choice(NamedTuple):
    """How experts are chosen, in the order of the operators' schemas."""

    by_logits: bool = False  # the choice compares logits, not scores
    num_groups: int = 0  # 0: no groups
    group_topk: int = 0
    group_best: int = 0


def _topk_router_reference(logits: Tensor, expert_bias: Tensor | None, k: int, *constants: Any) -> tuple[Tensor, Tensor]:
    scoring, choice = Scoring(*constants[:4]), Choice(*constants[4:])
    indices = _choose(logits, expert_bias, k, scoring.score_function, scoring.pre_softmax, choice)
    return _weigh_reference(logits, indices, *scoring), indices


def _topk_router_fake(logits: Tensor, expert_bias: Tensor | None, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], k), logits.new_empty(logits.shape[0], k, dtype=torch.int64)


def _weigh_reference(
    logits: Tensor,
    indices: Tensor,
    score_function: str,
    pre_softmax: bool,
    epsilon: float | None,
    scaling_factor: float | None,
) -> Tensor:
    """The weights ``[T, K]`` of the experts ``indices [T, K]``; 0 for an index that names none."""
    num_experts = logits.shape[1]
    check_indices("router_weights", logits, indices)
    absent = (indices < 0) | (indices >= num_experts)
    index = indices.long().masked_fill(absent, 0)
    values = logits.to(_wide(logits))
    own = own_score(score_function)
    if own is not None:
        weights = own.value(values.gather(1, index)).masked_fill(absent, 0.0)
    elif pre_softmax:
        weights = values.softmax(1).gather(1, index).masked_fill(absent, 0.0)
    else:
        # The lowest finite value rather than -inf: a token with no expert at all stays free of NaN.
        chosen = values.gather(1, index).masked_fill(absent, torch.finfo(values.dtype).min)
        weights = chosen.softmax(1).masked_fill(absent, 0.0)
    if epsilon is not None:
        weights = normalised(weights, epsilon)
    if scaling_factor is not None:
        weights = weights * scaling_factor
    return weights.to(logits.dtype)


def _weigh_fake(logits: Tensor, indices: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(indices.shape)


def _topk_router_backward_reference(
    grad: Tensor,
    logits: Tensor,
    indices: Tensor,
    score_function: str,
    pre_softmax: bool,
    epsilon: float | None,
    scaling_factor: float | None,
) -> Tensor:
    """``grad [T, K]`` of the weights to the gradient of ``logits [T, E]``.

    An index that names no expert takes no part, as in :func:`router_weights`.
    """
    num_experts = logits.shape[1]
    check_indices("topk_router_backward", logits, indices)
    _check.shape("topk_router_backward", "grad", grad, indices.shape, "[tokens, topk]")
    absent = (indices < 0) | (indices >= num_experts)
    index = indices.long().masked_fill(absent, 0)
    values = logits.to(_wide(logits))
    g = grad.to(values.dtype).masked_fill(absent, 0.0)
    if scaling_factor is not None:
        g = g * scaling_factor
    own = own_score(score_function)
    chosen = values.gather(1, index)
    if own is not None:
        scores = own.value(chosen)
    elif pre_softmax:
        probs = values.softmax(1)
        scores = probs.gather(1, index)
    else:
        scores = chosen.masked_fill(absent, torch.finfo(values.dtype).min).softmax(1)
    scores = scores.masked_fill(absent, 0.0)
    if epsilon is not None:
        total = scores.sum(1, keepdim=True) + epsilon
        g = (g - (g * scores).sum(1, keepdim=True) / total) / total
    if own is not None:
        g = (g * own.slope(chosen, scores)).masked_fill(absent, 0.0)
    elif pre_softmax:
        mean = (g * scores).sum(1, keepdim=True)
        return (probs * (_spread(g, indices, absent, num_experts) - mean)).to(logits.dtype)
    else:
        g = scores * (g - (g * scores).sum(1, keepdim=True))
    return _spread(g, indices, absent, num_experts).to(logits.dtype)


def _spread(values: Tensor, indices: Tensor, absent: Tensor, num_experts: int) -> Tensor:
    """``values [T, K]`` at their experts in zeros ``[T, E]``; a spare last column takes those of no expert."""
    values = values.masked_fill(absent, 0.0)
    place = indices.long().masked_fill(absent, num_experts)
    spread = values.new_zeros(values.shape[0], num_experts + 1).scatter(1, place, values)
    return spread[:, :num_experts].contiguous()


def _topk_router_backward_fake(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, args: tuple, outputs: tuple) -> None:
    logits, _, _, *constants = args
    ctx.scoring = constants[:4]
    ctx.save_for_backward(logits, outputs[1])


def _backward(ctx: Any, needs: tuple, grad: Tensor, _: Any) -> tuple:
    return (_topk_router_backward(grad, *ctx.saved_tensors, *ctx.scoring), *[None] * 10)


def _save_weigh(ctx: Any, args: tuple, outputs: Any) -> None:
    logits, indices, *ctx.scoring = args
    ctx.save_for_backward(logits, indices)


def _backward_weigh(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    return (_topk_router_backward(grad, *ctx.saved_tensors, *ctx.scoring), *[None] * 5)


def _save_backward(ctx: Any, args: tuple, outputs: Any) -> None:
    *tensors, ctx.scoring = *args[:3], args[3:]
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    _library.require_reference("topk_router_backward", ctx.saved_tensors[1])
    args = (*ctx.saved_tensors, *ctx.scoring)
    return _library.differentiate(lambda *a: (_topk_router_backward_reference(*a),), args, needs, (grad,))


_SCORING = "str score_function, bool pre_softmax, float? epsilon, float? scaling_factor"
_topk_router_backward = _library.define(
    f"topk_router_backward(Tensor grad, Tensor logits, Tensor indices, {_SCORING}) -> Tensor",
    reference=_topk_router_backward_reference,
    fake=_topk_router_backward_fake,
    save=_save_backward,
    backward=_double_backward,
)
weigh = _library.define(
    f"weigh_experts(Tensor logits, Tensor indices, {_SCORING}) -> Tensor",
    reference=_weigh_reference,
    fake=_weigh_fake,
    save=_save_weigh,
    backward=_backward_weigh,
)
choose_and_weigh = _library.define(
    f"topk_router(Tensor logits, Tensor? expert_bias, SymInt k, {_SCORING},"
    " bool by_logits, int num_groups, int group_topk, int group_best) -> (Tensor, Tensor)",
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


def _check_scoring(op: str, score_function: str, pre_softmax: bool) -> None:
    _check.one_of(op, "score_function", score_function, SCORE_FUNCTIONS)
    if pre_softmax and score_function != "softmax":
        raise _check.unused(op, "pre_softmax", pre_softmax, f"on score_function={score_function!r}")


def _check_router(op: str, logits: Tensor, score_function: str, pre_softmax: bool, expert_bias: Tensor | None) -> None:
    _check_matrix(op, "logits", logits)
    _check_scoring(op, score_function, pre_softmax)
    if expert_bias is not None:
        _check.floating(op, "expert_bias", expert_bias)
        _check.shape(op, "expert_bias", expert_bias, logits.shape[1:], "[E]")
        _check.same_device(op, logits=logits, expert_bias=expert_bias)


def check_indices(op: str, logits: Tensor, indices: Tensor) -> None:
    """``indices`` are ``[T, K]`` integers of the experts of ``logits [T, E]``."""
    _check.tensor_dim(op, "indices", indices, 2)
    _check.integer(op, "indices", indices)
    _check.shape(op, "indices", indices, (logits.shape[0], indices.shape[1]), "[tokens, topk]")
    _check.same_device(op, logits=logits, indices=indices)
    _check.in_range(op, "indices", indices, logits.shape[1], "the number of experts")


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
