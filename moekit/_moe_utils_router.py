"""The router's half of :mod:`moekit.moe_utils`: Megatron-core's functions that need no process state.

Their argument names and order are those of release 0.16 and stay so; what later releases added is in
:mod:`moekit.megatron`. The work is done by :mod:`moekit.ops`. ``fused`` is accepted and changes nothing. A
``padding_mask`` is True for padding in every function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import losses, rows, select
from moekit.ops import topk as topk_ops


def topk_routing_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
    fused: bool = False,
    router_replay: Any = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``topk`` experts a token: :func:`moekit.topk_router` with its result as tables.

    ``router_replay`` is an object with Megatron-core's ``get_replay_topk(scores, topk, num_groups, group_topk,
    select)``, which supplies or records the indices.

    Returns:
        ``(routing_probs [T, E] in the dtype of logits, routing_map [T, E] bool)``, zero where a token is not routed.
    """
    weights, indices = choose_experts(
        logits,
        topk,
        router_replay,
        scaling_factor=scaling_factor,
        selection={"num_groups": num_groups, "group_topk": group_topk, "expert_bias": expert_bias},
        scoring={"score_function": score_function, "pre_softmax": use_pre_softmax},
    )
    return as_tables(logits, weights, indices)


def choose_experts(
    logits: Tensor,
    topk: int,
    router_replay: Any,
    *,
    scaling_factor: float | None,
    selection: dict[str, Any],
    scoring: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """``(weights [T, K], indices [T, K])``: :func:`moekit.topk_router`, or what a replay supplies or records."""
    # As there: only a softmax can come before the choice, and groups are switched on by ``group_topk``.
    scoring = {**scoring, "pre_softmax": scoring["pre_softmax"] and scoring["score_function"] == "softmax"}
    if not selection["group_topk"]:
        selection = {**selection, "num_groups": None}
    if router_replay is None:
        return topk_ops.topk_router(logits, topk, scaling_factor=scaling_factor, **selection, **scoring)
    scores = topk_ops.selection_scores(logits, expert_bias=selection["expert_bias"], **scoring)
    groups = selection["num_groups"], selection["group_topk"]
    _, indices = router_replay.get_replay_topk(scores, topk, *groups, _select)
    return topk_ops.router_weights(logits, indices, scaling_factor=scaling_factor, **scoring), indices


def as_tables(logits: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """A choice of experts as ``(probs [T, E], map [T, E] bool)``."""
    routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)
    return torch.zeros_like(logits).scatter(1, indices, weights), routing_map


def _select(
    scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The selection that a router replay records: ``(scores [T, K], indices [T, K])``."""
    if group_topk:
        num_tokens, num_experts = scores.shape
        return group_limited_topk(scores, topk, num_tokens, num_experts, num_groups or 0, group_topk)
    indices = select.select_topk(scores, topk)
    return scores.gather(1, indices), indices


def group_limited_topk(
    scores: Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """The best ``topk`` experts within each token's best ``group_topk`` groups.

    See :func:`moekit.ops.select.group_limited_select`. Returns ``(scores [T, K], indices [T, K] int64)``.

    Raises:
        ValueError: ``scores`` is not ``[num_tokens, num_experts]``, or the groups do not fit.
    """
    _check.shape("group_limited_topk", "scores", scores, (num_tokens, num_experts), "[num_tokens, num_experts]")
    indices = select.group_limited_select(scores, topk, num_groups, group_topk)
    return scores.gather(1, indices), indices


def compute_routing_scores_for_aux_loss(
    logits: Tensor, topk: int, score_function: str, fused: bool = False, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(routing_map [T, E] bool, scores [T, E])`` for the auxiliary loss; ``padding_mask`` is True for padding."""
    return losses.routing_scores_for_aux_loss(logits, topk, score_function, padding_mask)


def switch_load_balancing_loss_func(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int | Tensor,
    topk: int,
    num_experts: int,
    moe_aux_loss_coeff: float,
    fused: bool = False,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """:func:`moekit.load_balancing_loss`; ``padding_mask [T]`` is True for padding, as everywhere in moekit."""
    return losses.switch_loss(
        probs, tokens_per_expert, total_num_tokens, topk, num_experts, moe_aux_loss_coeff, padding_mask
    )


def z_loss_func(logits: Tensor, z_loss_coeff: float, padding_mask: Tensor | None = None) -> Tensor:
    """:func:`moekit.z_loss`; ``padding_mask [T]`` is True for padding."""
    return losses.z_loss(logits, z_loss_coeff, padding_mask)


def sinkhorn(cost: Tensor, tol: float = 0.0001) -> Tensor:
    """Balanced assignment ``[T, E]`` of the logits ``cost``; see :func:`moekit.ops.losses.sinkhorn`."""
    return losses.sinkhorn(cost, tol)


def get_capacity(num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int | None = None) -> int:
    """``ceil(num_tokens / num_experts * capacity_factor)``, at least ``min_capacity``."""
    return losses.get_capacity(num_tokens, num_experts, capacity_factor, min_capacity)


def apply_router_token_dropping(
    routing_probs: Tensor,
    routing_map: Tensor,
    router_topk: int,
    capacity_factor: float,
    drop_policy: str = "probs",
    pad_to_capacity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Limit each expert to its capacity; see :func:`moekit.ops.losses.apply_capacity`."""
    return losses.apply_capacity(routing_probs, routing_map, router_topk, capacity_factor, drop_policy, pad_to_capacity)


def pad_routing_map(routing_map: Tensor, pad_multiple: int) -> Tensor:
    """A copy of the map with each expert's count raised to a multiple: :func:`moekit.ops.losses.pad_routing_map`."""
    return losses.pad_routing_map(routing_map, pad_multiple)


def get_updated_expert_bias(
    tokens_per_expert: Tensor, expert_bias: Tensor, expert_bias_update_rate: float, group: Any = None
) -> Tensor:
    """Loss-free balancing's next bias; ``group`` is the process group to sum the counts over, None for this process.

    See :func:`moekit.ops.losses.updated_expert_bias`. Neither argument is written.
    """
    return losses.updated_expert_bias(tokens_per_expert, expert_bias, expert_bias_update_rate, group)


def sort_chunks_by_idxs(
    input: Tensor,
    split_sizes: Tensor,
    sorted_idxs: Tensor,
    probs: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Cut ``input`` into chunks of ``split_sizes`` rows and put them into the order ``sorted_idxs``.

    See :func:`moekit.sort_chunks` for shapes and errors; ``fused`` is accepted and changes nothing.
    """
    return rows.sort_chunks(input, split_sizes, sorted_idxs, probs)
