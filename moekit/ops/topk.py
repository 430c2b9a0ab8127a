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
from moekit.ops.select import Choice, check_choice, check_matrix, group_limited_select, select_topk

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
    return _weighed(logits, indices, score_function, pre_softmax, epsilon, scaling_factor)


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
    weights, indices, _ = choose_and_weigh(logits, expert_bias, None, k, *scoring, *choice)
    return weights, indices


# --- the operators ----------------------------------------------------------------------------------------------


class Scoring(NamedTuple):
    """How chosen experts are weighed, in the order of the operators' schemas."""

    score_function: str
    pre_softmax: bool  # the softmax is over all experts, not over the chosen ones
    epsilon: float | None  # weights are divided by their sum plus this; None: they are not
    scaling_factor: float | None


def _topk_router_reference(
    logits: Tensor, expert_bias: Tensor | None, padding_mask: Tensor | None, k: int, *constants: Any
) -> tuple[Tensor, Tensor, Tensor]:
    scoring, choice = Scoring(*constants[:4]), Choice(*constants[4:])
    indices = _choose(logits, expert_bias, k, scoring.score_function, scoring.pre_softmax, choice)
    return _weighed(logits, indices, *scoring), indices, link(logits)


def _topk_router_fake(logits: Tensor, _: Any, __: Any, k: int, *___: Any) -> tuple[Tensor, Tensor, Tensor]:
    weights, tokens = logits.new_empty(logits.shape[0], k), logits.shape[0]
    return weights, logits.new_empty(tokens, k, dtype=torch.int64), link(logits)


def link(logits: Tensor) -> Tensor:
    """Zeros ``[E]``: the gradient of the sums of scores reaches the router's backward by it, which is one for both."""
    return torch.zeros(logits.shape[1], dtype=_wide(logits), device=logits.device)


def _weigh_reference(logits: Tensor, indices: Tensor, padding_mask: Tensor | None, *scoring: Any) -> tuple[Tensor, Tensor]:
    return _weighed(logits, indices, *scoring), link(logits)


def _weigh_fake(logits: Tensor, indices: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(indices.shape), link(logits)


def _weighed(
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
        weights = weights / _divisor(weights, absent, epsilon)
    if scaling_factor is not None:
        weights = weights * scaling_factor
    return weights.to(logits.dtype)


def _divisor(scores: Tensor, absent: Tensor, epsilon: float) -> Tensor:
    """``[T, 1]``, what a token's weights are divided by; 1 for a token of no expert, which has no sum."""
    return (scores.sum(1, keepdim=True) + epsilon).masked_fill(absent.all(1, keepdim=True), 1.0)


def token_scores(logits: Tensor, score_function: str, padding_mask: Tensor | None) -> Tensor:
    """Scores ``[T, E]`` that sum to one a token, in float32 or wider; 0 for padding, whatever it holds."""
    values = logits.to(_wide(logits))
    if padding_mask is not None:
        values = values.masked_fill(padding_mask.unsqueeze(1), 0)
    own = own_score(score_function)
    scores = values.softmax(1) if own is None else normalised(own.value(values))
    return scores if padding_mask is None else scores.masked_fill(padding_mask.unsqueeze(1), 0)


def _sums_reference(logits: Tensor, link: Tensor, score_function: str, padding_mask: Tensor | None) -> Tensor:
    return token_scores(logits, score_function, padding_mask).sum(0)


def _sums_fake(logits: Tensor, link: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(link)


def _backward_reference(
    grad: Tensor | None,
    grad_sums: Tensor | None,
    logits: Tensor,
    indices: Tensor,
    padding_mask: Tensor | None,
    score_function: str,
    pre_softmax: bool,
    epsilon: float | None,
    scaling_factor: float | None,
) -> Tensor:
    """The gradient of ``logits [T, E]`` from those of the weights ``[T, K]`` and of the sums of scores ``[E]``.

    Padding has none, whatever it holds. An index that names no expert takes no part, as in :func:`router_weights`.
    """
    op = "topk_router_backward"
    check_indices(op, logits, indices)
    found = logits.new_zeros(logits.shape, dtype=_wide(logits))
    if grad is not None:
        _check.shape(op, "grad", grad, indices.shape, "[tokens, topk]")
        found = found + _weights_gradient(grad, logits, indices, score_function, pre_softmax, epsilon, scaling_factor)
    if grad_sums is not None:
        _check.shape(op, "grad_sums", grad_sums, logits.shape[1:], "[experts]")
        found = found + _sums_gradient(grad_sums, logits, padding_mask, score_function)
    if padding_mask is not None:
        found = found.masked_fill(padding_mask.unsqueeze(1), 0)
    return found.to(logits.dtype)


def _weights_gradient(
    grad: Tensor,
    logits: Tensor,
    indices: Tensor,
    score_function: str,
    pre_softmax: bool,
    epsilon: float | None,
    scaling_factor: float | None,
) -> Tensor:
    num_experts = logits.shape[1]
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
        total = _divisor(scores, absent, epsilon)
        g = (g - (g * scores).sum(1, keepdim=True) / total) / total
    if own is not None:
        return _spread(g * own.slope(chosen, scores), index, absent, num_experts)
    mean = (g * scores).sum(1, keepdim=True)
    if pre_softmax:
        return probs * (_spread(g, index, absent, num_experts) - mean)
    return _spread(scores * (g - mean), index, absent, num_experts)


def _spread(values: Tensor, index: Tensor, absent: Tensor, num_experts: int) -> Tensor:
    """``values [T, K]`` added at their experts in zeros ``[T, E]``; one slot after the other, in an order that is fixed."""
    spread = values.new_zeros(values.shape[0], num_experts)
    for slot, value in zip(index.unbind(1), values.masked_fill(absent, 0.0).unbind(1), strict=True):
        spread = spread.scatter_add(1, slot.unsqueeze(1), value.unsqueeze(1))
    return spread


def _sums_gradient(grad: Tensor, logits: Tensor, padding_mask: Tensor | None, score_function: str) -> Tensor:
    """The gradient of the sums of :func:`token_scores`."""
    values, own = logits.to(_wide(logits)), own_score(score_function)
    if padding_mask is not None:
        values = values.masked_fill(padding_mask.unsqueeze(1), 0)
    g = grad.to(values.dtype)
    if own is None:
        scores = values.softmax(1)
        found = scores * (g - (scores * g).sum(1, keepdim=True))
    else:
        scores = own.value(values)
        total = scores.sum(1, keepdim=True) + NORMALISER_EPS
        found = (g - (scores * g).sum(1, keepdim=True) / total) / total * own.slope(values, scores)
    return found if padding_mask is None else found.masked_fill(padding_mask.unsqueeze(1), 0)


def _backward_fake(grad: Any, grad_sums: Any, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, args: tuple, outputs: tuple) -> None:
    logits, _, padding_mask, _, *constants = args
    ctx.scoring = constants[:4]
    ctx.set_materialize_grads(False)  # of a link that no loss has used
    ctx.save_for_backward(logits, outputs[1], padding_mask)


def _backward(ctx: Any, needs: tuple, grad: Tensor | None, _: Any, grad_sums: Tensor | None) -> tuple:
    return (_topk_router_backward(grad, grad_sums, *ctx.saved_tensors, *ctx.scoring), *[None] * 11)


def _save_weigh(ctx: Any, args: tuple, outputs: Any) -> None:
    *tensors, ctx.scoring = *args[:3], args[3:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_weigh(ctx: Any, needs: tuple, grad: Tensor | None, grad_sums: Tensor | None) -> tuple:
    return (_topk_router_backward(grad, grad_sums, *ctx.saved_tensors, *ctx.scoring), *[None] * 6)


def _save_backward(ctx: Any, args: tuple, outputs: Any) -> None:
    *tensors, ctx.scoring = *args[:5], args[5:]
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    _library.require_reference("topk_router_backward", ctx.saved_tensors[2])
    args = (*ctx.saved_tensors, *ctx.scoring)
    return _library.differentiate(lambda *a: (_backward_reference(*a),), args, needs, (grad,))


_SCORING = "str score_function, bool pre_softmax, float? epsilon, float? scaling_factor"
_topk_router_backward = _library.define(
    "topk_router_backward(Tensor? grad, Tensor? grad_sums, Tensor logits, Tensor indices, Tensor? padding_mask,"
    f" {_SCORING}) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
    save=_save_backward,
    backward=_double_backward,
)
weigh = _library.define(
    f"weigh_experts(Tensor logits, Tensor indices, Tensor? padding_mask, {_SCORING}) -> (Tensor, Tensor)",
    reference=_weigh_reference,
    fake=_weigh_fake,
    save=_save_weigh,
    backward=_backward_weigh,
)
choose_and_weigh = _library.define(
    f"topk_router(Tensor logits, Tensor? expert_bias, Tensor? padding_mask, SymInt k, {_SCORING},"
    " bool by_logits, int num_groups, int group_topk, int group_best) -> (Tensor, Tensor, Tensor)",
    reference=_topk_router_reference,
    fake=_topk_router_fake,
    save=_save,
    backward=_backward,
)
# Its gradient goes to ``link``, and by it to the logits; forward-mode differentiation takes the direct way.
score_sums = _library.define(
    "score_sums(Tensor logits, Tensor link, str score_function, Tensor? padding_mask) -> Tensor",
    reference=_sums_reference,
    fake=_sums_fake,
    save=lambda ctx, args, output: None,
    backward=lambda ctx, needs, grad: (None, grad, None, None),
)


# --- checks -------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_scoring(op: str, score_function: str, pre_softmax: bool) -> None:
    _check.one_of(op, "score_function", score_function, SCORE_FUNCTIONS)
    if pre_softmax and score_function != "softmax":
        raise _check.unused(op, "pre_softmax", pre_softmax, f"on score_function={score_function!r}")


def _check_router(op: str, logits: Tensor, score_function: str, pre_softmax: bool, expert_bias: Tensor | None) -> None:
    check_matrix(op, "logits", logits)
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
