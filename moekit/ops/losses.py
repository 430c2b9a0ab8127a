"""Keeping the experts evenly loaded: auxiliary losses, Sinkhorn, capacity, bias updates, padding of the map.

A padding mask is bool and True means padding, everywhere; padded tokens count nowhere and receive no
gradient, not even if they hold NaN. Nothing writes into its arguments. Ties go to the earliest token or the
lowest expert.

Precision: losses are computed and returned in float32 (float64 for float64).

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops.select import descending, select_topk
from moekit.ops.topk import SCORE_FUNCTIONS, normalised, own_score
from moekit.routing import Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DROP_POLICIES = ("probs", "position")
# The published algorithm's guard against division by zero: part of its result.
_SINKHORN_EPS = 1e-8
# Tokens whose largest logit is below this are treated as if it were this: without it the guard would outweigh
# all that such a token has to give.
_SINKHORN_LOWEST_PEAK = -10.0


# --- losses -------------------------------------------------------------------------------------------------


def load_balancing_loss(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int | Tensor,
    topk: int,
    num_experts: int,
    coeff: float,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """The load-balancing loss of the Switch Transformer (arXiv 2101.03961, equation 4), for any K.

    ``coeff * E * sum_e f_e * P_e`` with ``f_e = tokens_per_expert_e / (K * N)`` and ``P_e = sum_t probs_te /
    N``. Evenly spread counts and probabilities that sum to one give exactly ``coeff``, for every K. It is
    linear in ``probs``: the losses of the parts of a batch, each with the counts of the whole, add up to the
    loss of the whole (the global-batch loss of arXiv 2501.11873).

    Args:
        probs: ``[T, E]``, floating point, not below 0 (logits are not probabilities); or ``[T, B * E]`` for B
            sequences side by side, giving the sum of their losses.
        tokens_per_expert: ``[E]`` (``[B * E]``), any real dtype: routed pairs by expert, without padding.
        total_num_tokens: N, a number or a one-element tensor (never read back from its device): the tokens
            that ``tokens_per_expert`` counted, without padding.
        topk: K.
        num_experts: E.
        coeff: factor of the loss.
        padding_mask: ``[T]`` bool, True for padding; such tokens add nothing.

    Returns:
        a 0-d tensor in float32 (float64 for float64); 0 if N is 0.

    Raises:
        ValueError: the shapes or devices do not fit, or (on a CPU, or under ``moekit.debug()``) ``probs`` below 0.
        TypeError: ``probs`` is not floating point or ``padding_mask`` not bool.
    """
    _check.floating("load_balancing_loss", "probs", probs)
    _check.probabilities("load_balancing_loss", "probs", _without_padding("load_balancing_loss", probs, padding_mask))
    return switch_loss(probs, tokens_per_expert, total_num_tokens, topk, num_experts, coeff, padding_mask)


def switch_loss(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int | Tensor,
    topk: int,
    num_experts: int,
    coeff: float,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """:func:`load_balancing_loss` of any numbers in the place of probabilities, as the drop-in takes them."""
    op = "load_balancing_loss"
    _check.tensor_dim(op, "probs", probs, 2)
    _check.floating(op, "probs", probs)
    topk = _check.positive(op, "topk", topk)
    num_experts = _check.positive(op, "num_experts", num_experts)
    total_num_tokens, coeff = _check.factor(op, "total_num_tokens", total_num_tokens), _check.factor(op, "coeff", coeff)
    if not isinstance(total_num_tokens, Tensor) and not 0 <= total_num_tokens < math.inf:
        raise _check.fail(op, "total_num_tokens", "a number of tokens, at least 0", total_num_tokens)
    if probs.shape[1] % num_experts:
        raise _check.fail(op, "probs", f"of shape [T, multiple of num_experts={num_experts}]", list(probs.shape))
    _check.shape(op, "tokens_per_expert", tokens_per_expert, probs.shape[1:], "[E]")
    _check.same_device(op, probs=probs, tokens_per_expert=tokens_per_expert)
    dtype = torch.promote_types(probs.dtype, torch.float32)
    prob_sums = _without_padding(op, probs, padding_mask).sum(0, dtype=dtype)
    products = (prob_sums * tokens_per_expert.to(dtype)).sum()
    if isinstance(total_num_tokens, Tensor):
        tokens = total_num_tokens.detach().to(dtype).reshape(())
        share = torch.where(tokens > 0, tokens.reciprocal(), 0.0)
    else:
        share = 1.0 / total_num_tokens if total_num_tokens > 0 else 0.0
    return products * share * share * (coeff * num_experts / topk)


def z_loss(logits: Tensor | Routing, coeff: float, padding_mask: Tensor | None = None) -> Tensor:
    """The router z-loss of ST-MoE (arXiv 2202.08906, equation 5).

    ``coeff * mean_t logsumexp_e(logits_te)**2`` keeps the logits small.

    Args:
        logits: ``[..., E]``, floating point; or a routing of :func:`moekit.route`, which knows its logits and padding.
        coeff: factor of the loss.
        padding_mask: ``[...]`` bool, True for padding; such tokens are left out of the mean.

    Returns:
        a 0-d tensor in float32 (float64 for float64); 0 if no token is left.

    Raises:
        ValueError: the shape or device of the mask does not fit.
        TypeError: ``logits`` is not floating point or ``padding_mask`` not bool.
    """
    if isinstance(logits, Routing):
        if padding_mask is not None or logits.scored is None:
            got = "padding_mask as well" if logits.scored is not None else "one without logits"
            raise _check.fail("z_loss", "logits", "logits, or a routing of moekit.route alone", got)
        logits, _, padding_mask, _ = logits.scored
    _check.floating("z_loss", "logits", logits)
    coeff = _check.factor("z_loss", "coeff", coeff)
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    squares = _without_padding("z_loss", values, padding_mask).logsumexp(-1).square()
    if padding_mask is None:
        return squares.sum() * (coeff / max(1, squares.numel()))
    tokens = (~padding_mask).sum().clamp(min=1)
    return squares.masked_fill(padding_mask, 0.0).sum() / tokens * coeff


def routing_scores_for_aux_loss(
    logits: Tensor, topk: int, score_function: str, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the load-balancing loss looks at: the plain top-K map and scores that sum to one.

    Neither bias nor groups nor capacity enter: the loss sees what the router itself prefers.

    Args:
        logits: ``[T, E]``, floating point.
        topk: K, 1 to E.
        score_function: ``"softmax"``, or ``"sigmoid"`` (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20) or
            ``"sqrtsoftplus"`` divided by its sum over the E experts.
        padding_mask: ``[T]`` bool, True for padding; such tokens have neither map nor scores.

    Returns:
        ``(routing_map [T, E] bool, scores [T, E])``, scores in float32 (float64 for float64).

    Raises:
        ValueError: K > E, an unknown ``score_function``, or the mask does not fit.
        TypeError: ``logits`` is not floating point or ``padding_mask`` not bool.
    """
    op = "routing_scores_for_aux_loss"
    _check.tensor_dim(op, "logits", logits, 2)
    _check.floating(op, "logits", logits)
    topk = _check.topk(op, topk, logits.shape[1])
    _check.one_of(op, "score_function", score_function, SCORE_FUNCTIONS)
    values = _without_padding(op, logits, padding_mask).to(torch.promote_types(logits.dtype, torch.float32))
    own = own_score(score_function)
    scores = values.softmax(1) if own is None else normalised(own.value(values))
    routing_map = torch.zeros_like(values, dtype=torch.bool).scatter(1, select_topk(values, topk), True)
    return _without_padding(op, routing_map, padding_mask), _without_padding(op, scores, padding_mask)


def _without_padding(op: str, values: Tensor, padding_mask: Tensor | None) -> Tensor:
    """``values [..., E]`` with the padded rows set to 0: no value and no gradient passes, NaN included."""
    if padding_mask is None:
        return values
    _check.shape(op, "padding_mask", padding_mask, values.shape[:-1], "[T]")
    if padding_mask.dtype is not torch.bool:
        raise _check.wrong_type(op, "padding_mask", "a bool tensor (True for padding)", padding_mask.dtype)
    _check.same_device(op, values=values, padding_mask=padding_mask)
    return values.masked_fill(padding_mask.unsqueeze(-1), 0)


# --- balanced assignment ------------------------------------------------------------------------------------


def sinkhorn(cost: Tensor, tol: float = 1e-4, max_iterations: int = 1000) -> Tensor:
    """Scale ``exp(cost)`` towards an even plan: rows sum to 1/T and columns to 1/E.

    Sinkhorn's iteration (Sinkhorn and Knopp 1967) for balanced assignment to experts (BASE layers, arXiv
    2103.16716; Clark et al., arXiv 2202.01169). From ``d1 = 1``, until ``d1`` changes by at most ``tol`` in
    the mean::

        d0 = 1 / (T * (sum_e d1 * exp(cost) + 1e-8))
        d1 = 1 / (E * (sum_t d0 * exp(cost) + 1e-8))

    and the plan is ``d0 * exp(cost) * d1``. It is computed on logarithms relative to each token's largest
    logit, which is the same algebra without overflow or underflow, and in float64, so that every dtype takes
    the same number of iterations. One thing differs: a token whose logits are all below -10 keeps its share
    instead of losing it to the 1e-8.

    Each iteration reads the change back: one device-to-host sync each, and no
    ``torch.compile(fullgraph=True)``.

    Args:
        cost: ``[T, E]``, floating point: logits, higher is better.
        tol: largest mean change of ``d1`` at which to stop.
        max_iterations: stop after so many in any case; logits that no even plan fits converge very slowly.

    Returns:
        the plan ``[T, E]`` in the dtype of ``cost``, all NaN if ``cost`` holds NaN or +inf. Differentiable.

    Raises:
        ValueError: ``cost`` is not 2-D, or ``max_iterations`` is below 1.
        TypeError: ``cost`` is not floating point.
    """
    _check.tensor_dim("sinkhorn", "cost", cost, 2)
    _check.floating("sinkhorn", "cost", cost)
    tol = _check.real("sinkhorn", "tol", tol)
    max_iterations = _check.positive("sinkhorn", "max_iterations", max_iterations)
    if cost.numel() == 0:
        return cost.clone()
    num_tokens, num_experts = cost.shape
    values = cost.double()
    # Lower-bounded, so that a row of -inf minus its peak is -inf and not NaN.
    peak = values.detach().amax(1).clamp(min=torch.finfo(values.dtype).min)
    values = values - peak[:, None]
    log_eps = values.new_tensor(math.log(_SINKHORN_EPS))
    row_log_eps = log_eps - peak.clamp(min=_SINKHORN_LOWEST_PEAK)
    log_d0, log_d1 = torch.zeros_like(peak), values.new_zeros(num_experts)
    for _ in range(max_iterations):
        previous = log_d1
        log_d0 = -torch.logaddexp((values + log_d1).logsumexp(1), row_log_eps) - math.log(num_tokens)
        log_d1 = -torch.logaddexp((values + log_d0[:, None]).logsumexp(0), log_eps) - math.log(num_experts)
        change = (log_d1.detach().exp() - previous.detach().exp()).abs().mean().item()
        if not change > tol:  # NaN ends it too
            break
    return (values + log_d0[:, None] + log_d1).exp().to(cost.dtype)


def updated_expert_bias(
    tokens_per_expert: Tensor, expert_bias: Tensor, update_rate: float, group: ProcessGroup | None = None
) -> Tensor:
    """One step of loss-free balancing (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437).

    ``expert_bias + update_rate * sign(mean load - load)``: underloaded experts become easier to choose.

    Args:
        tokens_per_expert: ``[..., E]``, any real dtype: load of each expert (of each layer).
        expert_bias: ``[..., E]``, floating point; float32 keeps small rates from being rounded away.
        update_rate: step size.
        group: process group over which the loads are summed first, on a copy; None sums over nobody.

    Returns:
        the new bias in the dtype of ``expert_bias``, detached. The arguments are left as they are.

    Raises:
        ValueError: the shapes or devices differ.
        TypeError: ``expert_bias`` is not floating point.
    """
    op = "updated_expert_bias"
    _check.floating(op, "expert_bias", expert_bias)
    _check.shape(op, "tokens_per_expert", tokens_per_expert, expert_bias.shape, "[..., E] as expert_bias")
    _check.same_device(op, tokens_per_expert=tokens_per_expert, expert_bias=expert_bias)
    update_rate = _check.factor(op, "update_rate", update_rate)
    load = tokens_per_expert.detach()
    if load.dtype.is_floating_point:
        load = load.to(torch.promote_types(load.dtype, torch.float32))
    if group is not None:
        load = summed_over(load, group)
    # sum - E * load has the sign of mean - load, and is exact in integers.
    below_mean = (load.sum(-1, keepdim=True) - load.shape[-1] * load).sign()
    return expert_bias.detach() + below_mean.to(expert_bias.dtype) * update_rate


def summed_over(counts: Tensor, group: ProcessGroup) -> Tensor:
    """``counts`` summed over the processes of ``group``, on a copy."""
    from torch.distributed import all_reduce

    counts = counts.detach().clone(memory_format=torch.contiguous_format)
    all_reduce(counts, group=group)
    return counts


# --- capacity and padding -----------------------------------------------------------------------------------


def get_capacity(num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int | None = None) -> int:
    """Rows that one expert may take (Switch Transformer, arXiv 2101.03961, equation 3).

    ``ceil(num_tokens / num_experts * capacity_factor)``, at least ``min_capacity`` if that is given. For K
    experts per token, ``num_tokens`` is T * K.

    Raises:
        ValueError: ``num_experts`` is below 1, or another below 0, or ``capacity_factor`` infinite.
        TypeError: counts that are no integers.
    """
    num_tokens = _check.positive("get_capacity", "num_tokens", num_tokens, at_least=0)
    num_experts = _check.positive("get_capacity", "num_experts", num_experts)
    capacity_factor = _check.real("get_capacity", "capacity_factor", capacity_factor)
    if not 0 <= capacity_factor < math.inf:
        raise _check.fail("get_capacity", "capacity_factor", "finite and at least 0", capacity_factor)
    capacity = math.ceil((num_tokens / num_experts) * capacity_factor)
    if min_capacity is None:
        return capacity
    return max(capacity, _check.positive("get_capacity", "min_capacity", min_capacity, at_least=0))


def apply_capacity(
    probs: Tensor,
    routing_map: Tensor,
    topk: int,
    capacity_factor: float,
    drop_policy: str = "probs",
    pad_to_capacity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Limit every expert to ``C = get_capacity(T * K, E, capacity_factor)`` tokens.

    Args:
        probs: ``[T, E]``, floating point: routing weights, zero where a token is not routed.
        routing_map: ``[T, E]``, any dtype: non-zero is routed.
        topk: K.
        capacity_factor: 1 gives every expert just its even share.
        drop_policy: ``"probs"`` keeps the C tokens of highest probability of each expert (NaN ranks lowest),
            ``"position"`` the first C.
        pad_to_capacity: fill every expert up to C with tokens not routed to it, under the same policy.

    Returns:
        ``(probs, map)``: the map as bool and the probs in their dtype, zero outside the map. Routed tokens
        come before unrouted ones, ties go to the earliest token. If C > T nothing is dropped (and padding
        takes every token).

    Raises:
        ValueError: the shapes or devices differ, or an unknown ``drop_policy``.
        TypeError: ``probs`` is not floating point.
    """
    op = "apply_capacity"
    _check.tensor_dim(op, "probs", probs, 2)
    _check.floating(op, "probs", probs)
    _check.routing_map(op, "routing_map", routing_map)
    _check.shape(op, "routing_map", routing_map, probs.shape, "[T, E] as probs")
    _check.same_device(op, probs=probs, routing_map=routing_map)
    topk = _check.positive(op, "topk", topk)
    _check.one_of(op, "drop_policy", drop_policy, DROP_POLICIES)
    num_tokens, num_experts = probs.shape
    capacity = get_capacity(num_tokens * topk, num_experts, capacity_factor)
    routed = routing_map != 0
    if capacity > num_tokens:
        kept = torch.ones_like(routed)
    else:
        kept = torch.zeros_like(routed).scatter(0, _ranking(probs, routed, drop_policy)[:capacity], True)
    final_map = kept if pad_to_capacity else routed & kept
    return probs.masked_fill(~final_map, 0), final_map


def _ranking(probs: Tensor, routed: Tensor, drop_policy: str) -> Tensor:
    """Token indices ``[T, E]``, each column from the first to be kept to the first to be dropped."""
    unrouted = (~routed).to(torch.uint8)
    if drop_policy == "position":
        return unrouted.argsort(dim=0, stable=True)
    by_prob = descending(probs, dim=0)
    return by_prob.gather(0, unrouted.gather(0, by_prob).argsort(dim=0, stable=True))


def pad_routing_map(routing_map: Tensor, pad_multiple: int) -> Tensor:
    """Route more tokens to each expert until its count is a multiple of ``pad_multiple``.

    The earliest tokens not routed to it are added. It serves grouped GEMMs that want aligned row counts; an
    expert without tokens stays without.

    Args:
        routing_map: ``[T, E]``, any dtype: non-zero is routed.
        pad_multiple: at least 1.

    Returns:
        a new map in the same dtype, with 1 at the added places.

    Raises:
        ValueError: the map is not 2-D, ``pad_multiple`` is below 1, or an expert would need more rows than
            there are tokens. The last is checked on a CPU or under ``moekit.debug()``: on a GPU it would cost
            a sync, and such an expert takes every token.
    """
    padded = fill_routing_map(routing_map, pad_multiple)
    if _backend.checks_values(routing_map):
        counts = (routing_map != 0).sum(0)
        _check_room(counts + -counts % pad_multiple, routing_map.shape[0], pad_multiple)
    return padded


def fill_routing_map(routing_map: Tensor, pad_multiple: int) -> Tensor:
    """:func:`pad_routing_map` as far as the tokens go: an expert that would need more of them takes every one."""
    _check.routing_map("pad_routing_map", "routing_map", routing_map)
    pad_multiple = _check.positive("pad_routing_map", "pad_multiple", pad_multiple)
    free = routing_map == 0
    missing = -(~free).sum(0) % pad_multiple
    return routing_map.masked_fill(free & (free.cumsum(0) <= missing), 1)


def _check_room(needed: Tensor, num_tokens: int, pad_multiple: int) -> None:
    if needed.numel() == 0 or int(needed.max()) <= num_tokens:
        return
    expert = int(needed.argmax())
    wanted = f"such that {num_tokens} tokens suffice (expert {expert} needs {int(needed[expert])} rows)"
    raise _check.fail("pad_routing_map", "pad_multiple", wanted, pad_multiple)
