"""A router in three steps, each of which can be given from outside: score, select, weigh.

*Score*: logits become scores. *Select*: the highest scores are chosen, or ``indices`` are given (a hash table, a recording,
a forced balance). *Weigh*: the scores of the chosen experts become routing weights. One operator does all three
(:mod:`moekit.ops.topk`); what few routers have is done around it, in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import tables
from moekit.ops.capacity import limit, padded_to
from moekit.ops.select import check_choice
from moekit.ops.topk import (
    NORMALISER_EPS,
    SCORE_FUNCTIONS,
    Scoring,
    check_indices,
    choose_and_weigh,
    weigh,
)
from moekit.routing import Routing, Scored

SELECT_BY = ("scores", "logits")
CAPACITY_BY = ("weights", "position")
OVERFLOWS = ("drop", "pad", "raise")


def route(
    logits: Tensor,
    k: int | None = None,
    *,
    score: str = "softmax",
    select_by: str = "scores",
    multiplier: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    num_groups: int | None = None,
    group_topk: int | None = None,
    group_best: int | None = None,
    indices: Tensor | None = None,
    normalise: bool | None = None,
    epsilon: float | None = None,
    scale: float | None = None,
    expert_scale: Tensor | None = None,
    padding_mask: Tensor | None = None,
    capacity: int | None = None,
    capacity_by: str | None = None,
    overflow: str | None = None,
) -> Routing:
    """Choose K experts for each token, weigh them and build the tables.

    Args:
        logits: ``[T, E]``, floating point.
        k: experts per token, 1 to E; left out with ``indices``.
        score: ``"softmax"`` (arXiv 1701.06538), ``"sigmoid"`` (DeepSeek-V3, arXiv 2412.19437) or ``"sqrtsoftplus"``, the
            square root of the softplus.
        select_by: ``"scores"``: the score is taken of all experts and compared. ``"logits"``: the logits are compared and
            the score is taken of the chosen ones, a softmax of them alone (Mixtral, arXiv 2401.04088).
        multiplier: multiplies the logits before anything else.
        softcap: then ``softcap * tanh(logits / softcap)`` takes their place.
        bias: ``[E]``, added to what is compared, never to the weights (loss-free balancing, arXiv 2408.15664).
        num_groups: the experts form this many groups of neighbours;
        group_topk: a token chooses among the experts of this many of them;
        group_best: a group's score is the sum of its highest so many (2 unless said; 1 is the maximum).
        indices: ``[T, K]`` int32 or int64, the choice: -1 is none. In place of ``k``, ``bias`` and groups.
        normalise: divide a token's weights by their sum. True unless said; a softmax of the chosen sums to one by itself.
        epsilon: added to that sum; 1e-20 unless said.
        scale: multiplies the weights; 0.0 is a factor like any other.
        expert_scale: ``[E]``, multiplies the weights of each expert. Differentiable.
        padding_mask: ``[T]`` bool, True for padding: such tokens go to no expert and count nowhere.
        capacity: the most rows of an expert.
        capacity_by: those that stay are of the highest ``"weights"`` (unless said) or the first by ``"position"``.
        overflow: ``"drop"`` (unless said): the rest goes to no expert. ``"pad"``: and every expert has ``capacity`` rows,
            the spare ones padding. ``"raise"``: too many are an error, for which a GPU is waited for.

    Returns:
        A :class:`moekit.Routing` with the weights ``[T, K]`` in the dtype of ``logits``, 0 where there is no expert.
        Descending by what was compared, ties to the lowest expert, NaN last: unique and in range whatever the logits. Only
        the weights are differentiable, with respect to ``logits`` and ``expert_scale``.

    Raises:
        ValueError: numbers, shapes or devices that do not fit, an argument that would have no effect, or (on a CPU, or under
            ``moekit.debug()``) an index below -1 or not below E.
        TypeError: tensors that are not floating point, ``indices`` that are not integers, a mask that is not bool.

    Examples:
        >>> import torch, moekit
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
        >>> routing = moekit.route(logits, 2)
        >>> routing.indices.tolist(), routing.tokens_per_expert.tolist()
        ([[0, 1], [2, 1]], [1, 2, 1])
        >>> routing.weights
        tensor([[0.7311, 0.2689],
                [0.8808, 0.1192]])
        >>> moekit.route(logits, 2, score="sigmoid", bias=torch.tensor([0.0, 0.0, 1.0])).indices.tolist()
        [[2, 0], [2, 1]]
    """
    op = "route"
    _check.tensor_dim(op, "logits", logits, 2)
    _check.floating(op, "logits", logits)
    _check.one_of(op, "score", score, SCORE_FUNCTIONS)
    _check.one_of(op, "select_by", select_by, SELECT_BY)
    scoring = _scoring(score, select_by, normalise, epsilon, scale)
    logits = _reshaped(logits, multiplier, softcap)
    num_experts = logits.shape[1]
    if padding_mask is not None:
        _mask(op, padding_mask, logits)
    if indices is None:
        groups = (num_groups, group_topk, group_best)
        weights, chosen, link = _select(logits, k, select_by, bias, groups, padding_mask, scoring)
    else:
        _refuse_selection(
            select_by, score, k=k, bias=bias, num_groups=num_groups, group_topk=group_topk, group_best=group_best
        )
        check_indices(op, logits, indices)
        chosen = indices
        weights, link = weigh(logits, indices, padding_mask, *scoring)
    if expert_scale is not None:
        _vector(op, "expert_scale", expert_scale, logits)
        factors = expert_scale[chosen.clamp(0, num_experts - 1)]
        weights = (weights * factors).to(weights.dtype)
    if padding_mask is not None:
        chosen = chosen.masked_fill(padding_mask.unsqueeze(1), -1)
    limited = _capacity(capacity, capacity_by, overflow)
    if limited is not None:
        chosen = limit(chosen, weights, num_experts, *limited)
    if padding_mask is not None or limited is not None:
        weights = weights.masked_fill(chosen < 0, 0)
    scored = Scored(logits, score, padding_mask, link)
    routing = Routing(chosen, weights, *tables.route_indices(chosen, num_experts), scored=scored)
    return padded_to(routing, limited[0]) if limited is not None and limited[2] == "pad" else routing


# --- score and weigh ------------------------------------------------------------------------------------------------


def _scoring(score: str, select_by: str, normalise: bool | None, epsilon: float | None, scale: float | None) -> Scoring:
    """How the chosen are weighed; an argument without an effect is refused."""
    op, of_chosen = "route", score == "softmax" and select_by == "logits"
    if of_chosen and normalise is not None:
        raise _check.unused(op, "normalise", normalise, "on a softmax of the chosen experts, which sums to one")
    if epsilon is not None and (of_chosen or normalise is False):
        raise _check.unused(op, "epsilon", epsilon, "where weights are not normalised")
    if of_chosen or normalise is False:
        epsilon = None
    else:
        epsilon = NORMALISER_EPS if epsilon is None else _check.real(op, "epsilon", epsilon)
        if not epsilon >= 0:
            raise _check.fail(op, "epsilon", "at least 0", epsilon)
    return Scoring(
        score, score == "softmax" and not of_chosen, epsilon, None if scale is None else _check.real(op, "scale", scale)
    )


def _reshaped(logits: Tensor, multiplier: float | None, softcap: float | None) -> Tensor:
    """The logits of which scores are taken, in float32 (or wider) if they are computed here."""
    if multiplier is None and softcap is None:
        return logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if multiplier is not None:
        logits = logits * _check.real("route", "multiplier", multiplier)
    if softcap is not None:
        softcap = _check.real("route", "softcap", softcap)
        if not softcap > 0:
            raise _check.fail("route", "softcap", "above 0", softcap)
        logits = torch.tanh(logits / softcap) * softcap
    return logits


# --- select ---------------------------------------------------------------------------------------------------------


def _select(
    logits: Tensor,
    k: int | None,
    select_by: str,
    bias: Tensor | None,
    groups: tuple[int | None, int | None, int | None],
    padding_mask: Tensor | None,
    scoring: Scoring,
) -> Any:
    """``(weights, indices, link)`` of the best."""
    if k is None:
        raise _check.fail("route", "k", "given, or indices", None)
    if bias is not None:
        _vector("route", "bias", bias, logits)
    num_groups, group_topk, best = groups
    best = 2 if group_topk and best is None else best
    k, choice = check_choice("route", logits, k, num_groups, group_topk, best, by_logits=select_by == "logits")
    return choose_and_weigh(logits, bias, padding_mask, k, *scoring, *choice)


def _refuse_selection(select_by: str, score: str, **given: Any) -> None:
    """Where the choice is given, what would say how to make it is refused."""
    if select_by == "logits" and score != "softmax":
        given = {**given, "select_by": select_by}
    for name, value in given.items():
        if value is not None:
            shown = "..." if isinstance(value, Tensor) else value
            raise _check.unused("route", name, shown, "where indices are given")


def _vector(op: str, name: str, value: Tensor, logits: Tensor) -> None:
    """``value`` is one number an expert."""
    _check.floating(op, name, value)
    _check.shape(op, name, value, logits.shape[1:], "[experts]")
    _check.same_device(op, logits=logits, **{name: value})


def _mask(op: str, padding_mask: Tensor, logits: Tensor) -> None:
    """``padding_mask`` is one bool a token."""
    _check.shape(op, "padding_mask", padding_mask, logits.shape[:1], "[tokens]")
    if padding_mask.dtype is not torch.bool:
        raise _check.wrong_type(op, "padding_mask", "a bool tensor (True for padding)", padding_mask.dtype)
    _check.same_device(op, logits=logits, padding_mask=padding_mask)


# --- capacity -------------------------------------------------------------------------------------------------------


def _capacity(capacity: int | None, by: str | None, overflow: str | None) -> tuple[int, str, str] | None:
    """``(capacity, by, overflow)``, looked at; None for no limit."""
    if capacity is None:
        for name, value in (("capacity_by", by), ("overflow", overflow)):
            if value is not None:
                raise _check.unused("route", name, value, "without capacity")
        return None
    by, overflow = by or "weights", overflow or "drop"
    _check.one_of("route", "capacity_by", by, CAPACITY_BY)
    _check.one_of("route", "overflow", overflow, OVERFLOWS)
    return _check.positive("route", "capacity", capacity), by, overflow
