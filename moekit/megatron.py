"""Megatron-core's ``moe_utils`` in the forms of its releases since 0.17, where these differ from :mod:`moekit.moe_utils`.

There the names, parameters and returns are those of 0.16 and of NeMo Automodel. Later releases return more from
``permute``, take more in ``unpermute`` and ``topk_routing_with_score_function``, and have new functions: these are here,
name for name, and what has not changed is in :mod:`moekit.moe_utils`. :func:`moekit.compat.install` chooses between the
two by what is installed.

Letters in shapes: T tokens, E experts, K experts per token, S rows after permutation, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit import _backend, _check, moe_utils
from moekit._moe_utils_router import as_tables, choose_experts
from moekit.ops import losses, rows, select, tables
from moekit.ops import topk as topk_ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "get_tokens_per_expert_and_token_count",
    "get_updated_expert_bias",
    "pad_routing_map",
    "permute",
    "qb_dual_update",
    "router_gating_linear",
    "topk_routing_with_score_function",
    "unpermute",
]


# --- rows -----------------------------------------------------------------------------------------------------------


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
    tokens_per_expert: Tensor | None = None,
    align_size: int = 0,
    return_batch_invariant_inverse_map: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Group the tokens by expert: :func:`moekit.moe_utils.permute` with five values.

    Args:
        tokens: ``[T, H]``, any dtype.
        routing_map: ``[T, E]``, any dtype; what is not zero is routed.
        probs: ``[T, E]`` routing weights, or None.
        num_out_tokens: S, as there; None counts.
        drop_and_pad: as there.
        fused: with ``probs``, ``tokens_per_expert`` and an ``align_size`` above 0, pad each expert's rows; it changes
            nothing else.
        tokens_per_expert: ``[E]`` integers, the counts of ``routing_map``.
        align_size: the multiple to which ``fused`` pads; the number of rows is then read from the device.
        return_batch_invariant_inverse_map: give the inverse map as fourth value. ``num_out_tokens`` is then required
            and is K times T, where no token has more than K experts.

    Returns:
        ``(permuted_input [S, H], permuted_probs [S] or None, sorted_indices [S] int64, fourth, counts)``. Padding rows
        are zero, with probability 0 and index -1. ``fourth`` is None, or the padding before each expert ``[E] int64``
        where rows were padded (None if no expert needed any), or the inverse map ``[2, T, K] int64``: the row and the
        expert of each of a token's slots, in ascending order of experts, -1 for none. ``counts`` is
        ``tokens_per_expert``, or a padded copy ``[E] int64``.

    Raises:
        ValueError: as :func:`moekit.moe_utils.permute`; padding or the inverse map together with ``drop_and_pad`` or
            with each other; on a CPU ``tokens_per_expert`` that are not the map's, a token with more than K experts.
        TypeError: ``tokens_per_expert`` that are not integers.
    """
    padded = fused and probs is not None and tokens_per_expert is not None and align_size > 0
    for asked, argument in (
        (padded, "align_size"),
        (return_batch_invariant_inverse_map, "return_batch_invariant_inverse_map"),
    ):
        if asked and drop_and_pad:
            raise _check.fail("permute", "drop_and_pad", f"False together with {argument}", drop_and_pad)
    if padded and return_batch_invariant_inverse_map:
        raise _check.fail("permute", "align_size", "0 together with return_batch_invariant_inverse_map", align_size)
    moved = moe_utils.permute(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)
    if padded and probs is not None and tokens_per_expert is not None:
        return _pad_experts(tokens, routing_map, probs, tokens_per_expert, align_size)
    if not return_batch_invariant_inverse_map:
        return *moved, None, tokens_per_expert
    return *moved, _inverse_map(routing_map, moved[2], num_out_tokens), tokens_per_expert


def _pad_experts(
    tokens: Tensor, routing_map: Tensor, probs: Tensor, tokens_per_expert: Tensor, align_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The rows of each expert padded to a multiple of ``align_size``, and how."""
    num_tokens, num_experts = routing_map.shape
    _check.integer("permute", "tokens_per_expert", tokens_per_expert)
    _check.shape("permute", "tokens_per_expert", tokens_per_expert, (num_experts,), "[experts]")
    counts, token, slot, *_ = tables.route_map(routing_map, None)
    if _backend.checks_values(counts) and not torch.equal(tokens_per_expert.to(counts), counts):
        wanted = f"the counts of routing_map, {counts.tolist()}"
        raise _check.fail("permute", "tokens_per_expert", wanted, tokens_per_expert.tolist())
    missing = -counts % align_size
    compact = torch.arange(token.shape[0], dtype=torch.int32, device=token.device)
    row = tables.pad_rows(counts.cumsum(0).int(), compact, compact, align_size)[1]
    total, any_missing = torch.stack([(counts + missing).sum(), missing.sum()]).tolist()
    row = row[:total]
    # The spare last entry is for rows of no token.
    index = torch.nn.functional.pad(token, (0, 1), value=-1)[row]
    slots = torch.nn.functional.pad(slot, (0, 1), value=-1)[row]
    moved = rows.move_rows(tokens, index, *tables.rows_of_tokens(index, num_tokens))
    offsets = missing.cumsum(0) - missing if any_missing else None
    return moved, tables.take(probs, slots), index, offsets, counts + missing


def _inverse_map(routing_map: Tensor, sorted_indices: Tensor, num_out_tokens: int | None) -> Tensor:
    """``[2, T, K]``: row and expert of each slot of a token."""
    num_tokens = routing_map.shape[0]
    if isinstance(num_out_tokens, Tensor):
        num_out_tokens = int(num_out_tokens)
    if num_out_tokens is None or num_out_tokens % max(num_tokens, 1):
        raise _check.fail("permute", "num_out_tokens", f"a multiple of the {num_tokens} tokens", num_out_tokens)
    experts = tables.map_to_indices(routing_map, num_out_tokens // max(num_tokens, 1))
    # Rows and slots are both ascending in expert, so a token's rows in order are those of its slots.
    starts, found = tables.rows_of_tokens(sorted_indices, num_tokens)
    place = starts[:-1, None].long() + torch.arange(experts.shape[1], device=experts.device)
    token_rows = tables.take(found, torch.where(experts >= 0, place, -1)).long()
    return torch.stack([torch.where(experts >= 0, token_rows, -1), experts])


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: torch.Size | Sequence[int],
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
    pad_offsets: Tensor | None = None,
    batch_invariant_inverse_map: Tensor | None = None,
) -> Tensor:
    """Sum each token's rows: :func:`moekit.moe_utils.unpermute` for what :func:`permute` returns.

    Args:
        permuted_tokens: ``[S, H]`` floating rows.
        sorted_indices: ``[S]`` int32 or int64, the token of each row, -1 for none.
        restore_shape: ``(T, H)``.
        probs: ``[T, E]`` routing weights, or None; needs ``routing_map``.
        routing_map: ``[T, E]``, any dtype; what is not zero is routed.
        fused: accepted; changes nothing.
        drop_and_pad: as there.
        pad_offsets: ``[E]``, given where :func:`permute` padded the experts' rows.
        batch_invariant_inverse_map: ``[2, T, K]`` from :func:`permute`: spares its computation. A token's sum depends
            on its own rows only, with it or without.

    Returns:
        ``[T, H]`` in the dtype of ``permuted_tokens``.

    Raises:
        ValueError: as :func:`moekit.moe_utils.unpermute`; both of the last two, a shape that does not fit; on a CPU a
            map that disagrees with ``sorted_indices``.
        TypeError: as :func:`moekit.moe_utils.unpermute`, for the last two as well.
    """
    op = "unpermute"
    inverse_map = batch_invariant_inverse_map
    if pad_offsets is None and inverse_map is None:
        return moe_utils.unpermute(permuted_tokens, sorted_indices, restore_shape, probs, routing_map, fused, drop_and_pad)
    if drop_and_pad:
        raise _check.fail(op, "drop_and_pad", "False together with pad_offsets or batch_invariant_inverse_map", True)
    moe_utils.check_unpermute(permuted_tokens, sorted_indices, restore_shape, probs, routing_map)
    if inverse_map is None:
        found, slots = _find_padded(pad_offsets, sorted_indices, restore_shape[0], routing_map)
    elif pad_offsets is None:
        found, slots = _find_by_map(inverse_map, sorted_indices, restore_shape[0], routing_map)
    else:
        raise _check.fail(op, "pad_offsets", "None together with batch_invariant_inverse_map", "both")
    weights = None if probs is None or slots is None else tables.take(probs, slots)
    return rows.sum_rows(permuted_tokens, weights, sorted_indices, *found)


def _find_padded(
    pad_offsets: Any, sorted_indices: Tensor, num_tokens: int, routing_map: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """The rows of each token, and where each row's entry stands in a flat ``[T, E]`` table, -1 for padding.

    The entries of the map in order are those of the rows that have a token: the offsets say nothing more.
    """
    _check.integer("unpermute", "pad_offsets", pad_offsets)
    _check.tensor_dim("unpermute", "pad_offsets", pad_offsets, 1)
    found = tables.rows_of_tokens(sorted_indices, num_tokens)
    if routing_map is None:
        return found, None
    _check.shape("unpermute", "pad_offsets", pad_offsets, (routing_map.shape[1],), "[experts]")
    slots = tables.route_map(routing_map, sorted_indices.shape[0])[2]
    filled = sorted_indices >= 0
    return found, torch.where(filled, slots[(filled.cumsum(0) - 1).clamp(min=0)], -1)


def _find_by_map(
    inverse_map: Tensor, sorted_indices: Tensor, num_tokens: int, routing_map: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """The rows of each token's slots, and where each slot's entry stands in a flat ``[T, E]`` table, -1 for none."""
    _check_inverse_map(inverse_map, sorted_indices, num_tokens)
    token_rows, experts = inverse_map
    topk = experts.shape[1]
    found = torch.arange(num_tokens + 1, dtype=torch.int32, device=experts.device) * topk, token_rows.reshape(-1).int()
    if routing_map is None:
        return found, None
    token = torch.arange(num_tokens, device=experts.device).unsqueeze(1)
    return found, tables.row_slots(token, experts, routing_map.shape[1])


def _check_inverse_map(inverse_map: Tensor, sorted_indices: Tensor, num_tokens: int) -> None:
    op, name = "unpermute", "batch_invariant_inverse_map"
    _check.integer(op, name, inverse_map)
    _check.tensor_dim(op, name, inverse_map, 3)
    _check.shape(op, name, inverse_map, (2, num_tokens, inverse_map.shape[2]), "[2, tokens, slots]")
    _check.same_device(op, sorted_indices=sorted_indices, batch_invariant_inverse_map=inverse_map)
    if torch.compiler.is_compiling() or not _backend.checks_values(inverse_map):
        return
    row = inverse_map[0].long()
    _check.in_range(op, name, row, sorted_indices.shape[0], "the number of rows")
    token = torch.arange(num_tokens, device=row.device).unsqueeze(1).expand_as(row)
    if not torch.equal(sorted_indices[row[row >= 0]].long(), token[row >= 0]):
        raise _check.fail(op, name, "the inverse of sorted_indices", "rows of other tokens")


# --- the router -----------------------------------------------------------------------------------------------------


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
    dense_output: bool = False,
    precomputed_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``topk`` experts a token: :func:`moekit.moe_utils.topk_routing_with_score_function`, and two arguments more.

    ``dense_output`` asks for the choice itself rather than tables over the experts. ``precomputed_indices``, ``[T, K]``
    int32 or int64, are experts that were chosen already, -1 for none: groups, bias and ``router_replay`` have no effect
    then. The other arguments are described there.

    Returns:
        ``(routing_probs [T, E] in the dtype of logits, routing_map [T, E] bool)``; with ``dense_output``
        ``(weights [T, K], indices [T, K])``.
    """
    scoring = {"score_function": score_function, "pre_softmax": use_pre_softmax and score_function == "softmax"}
    if precomputed_indices is None:
        selection = {"num_groups": num_groups, "group_topk": group_topk, "expert_bias": expert_bias}
        weights, indices = choose_experts(
            logits, topk, router_replay, scaling_factor=scaling_factor, selection=selection, scoring=scoring
        )
        return (weights, indices) if dense_output else as_tables(logits, weights, indices)
    op = "topk_routing_with_score_function"
    _check.tensor_dim(op, "logits", logits, 2)
    _check.shape(op, "precomputed_indices", precomputed_indices, (logits.shape[0], topk), "[tokens, topk]")
    weights = topk_ops.router_weights(logits, precomputed_indices, scaling_factor=scaling_factor, **scoring)
    if dense_output:
        return weights, precomputed_indices
    # A spare last column takes what is no expert.
    num_experts = logits.shape[1]
    column = precomputed_indices.long()
    column = torch.where((column >= 0) & (column < num_experts), column, num_experts)
    probs, routing_map = as_tables(torch.nn.functional.pad(logits, (0, 1)), weights, column)
    return probs[:, :num_experts].contiguous(), routing_map[:, :num_experts].contiguous()


def get_updated_expert_bias(
    tokens_per_expert: Tensor,
    expert_bias: Tensor,
    expert_bias_update_rate: float,
    tp_dp_cp_group: ProcessGroup | None = None,
) -> Tensor:
    """Loss-free balancing's next bias: :func:`moekit.moe_utils.get_updated_expert_bias` with the group's new name.

    ``tp_dp_cp_group`` is the process group to sum the counts over; None is this process, where Megatron-core takes a
    group from its global state. Neither tensor is written.
    """
    return losses.updated_expert_bias(tokens_per_expert, expert_bias, expert_bias_update_rate, tp_dp_cp_group)


def get_tokens_per_expert_and_token_count(
    routing_map: Tensor,
    reduce_group: ProcessGroup | None = None,
    topk: int | None = None,
    with_padding_mask: bool = False,
) -> tuple[Tensor, int | Tensor, int | Tensor]:
    """What the load-balancing loss counts, over a process group.

    Args:
        routing_map: ``[T, E]``, any dtype; what is not zero is routed.
        reduce_group: process group to sum over; None is this process.
        topk: K, needed with ``with_padding_mask``.
        with_padding_mask: tokens without experts are padding: count tokens as routed pairs over K.

    Returns:
        ``(tokens_per_expert [E] int64 over the group, local tokens, tokens over the group)``. The last two are numbers,
        or 0-d tensors ``with_padding_mask``; without it every process is taken to have as many tokens as this one.

    Raises:
        ValueError: a map that is not 2-D, ``topk`` missing or below 1.
    """
    op = "get_tokens_per_expert_and_token_count"
    _check.tensor_dim(op, "routing_map", routing_map, 2)
    local = (routing_map != 0).sum(0)
    counts = local if reduce_group is None else losses.summed_over(local, reduce_group)
    if not with_padding_mask:
        num_tokens = routing_map.shape[0]
        return counts, num_tokens, num_tokens if reduce_group is None else num_tokens * reduce_group.size()
    if topk is None:
        raise _check.fail(op, "topk", "given with with_padding_mask", None)
    _check.positive(op, "topk", topk)
    return counts, local.sum() / topk, counts.sum() / topk


def qb_dual_update(scores: Tensor, k: int, beta: Tensor, update_beta: bool = True) -> tuple[Tensor, Tensor]:
    """One step of quantile balancing: experts chosen by ``scores - beta``, and the ``beta`` that would even them out.

    With alpha the (k+1)-th highest of each token's ``scores - beta``, the new beta of an expert is the ``(T*k/E + 1)``-th
    highest of its ``scores - alpha``: ``T*k/E`` tokens are above it.

    Args:
        scores: ``[T, E]``, floating point.
        k: experts per token, 1 to E, or to E - 1 with ``update_beta``.
        beta: ``[E]``, floating point.
        update_beta: compute a new beta; False returns the given one.

    Returns:
        ``(indices [T, k] int64, beta [E])``: indices descending, ties to the lowest expert. Not differentiable.

    Raises:
        ValueError: shapes or devices that do not fit, ``k`` out of range, ``T*k`` not a multiple of E.
        TypeError: ``scores`` or ``beta`` is not floating point.
    """
    op = "qb_dual_update"
    _check.tensor_dim(op, "scores", scores, 2)
    _check.floating(op, "scores", scores)
    _check.floating(op, "beta", beta)
    num_tokens, num_experts = scores.shape
    _check.shape(op, "beta", beta, (num_experts,), "[experts]")
    _check.same_device(op, scores=scores, beta=beta)
    _check.topk(op, k, num_experts - 1 if update_beta else num_experts)
    scores = scores.detach()
    adjusted = scores - beta.detach()
    if not update_beta:
        return select.select_topk(adjusted, k), beta
    if num_tokens * k % num_experts:
        raise _check.fail(op, "scores", f"of tokens times k divisible by {num_experts} experts", f"{num_tokens} times {k}")
    if num_tokens == 0:
        return scores.new_empty(0, k, dtype=torch.int64), beta
    order = select.select_topk(adjusted, k + 1)
    above = scores - adjusted.gather(1, order[:, k:])
    place = select.descending(above, dim=0)[num_tokens * k // num_experts]
    return order[:, :k].contiguous(), above.gather(0, place.unsqueeze(0)).squeeze(0)


class _GatingLinear(torch.autograd.Function):
    """A linear map that computes in ``dtype`` and keeps its operands for backward in their own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inp: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        wide_bias = None if bias is None else bias.to(dtype)
        return torch.nn.functional.linear(inp.to(dtype), weight.to(dtype), wide_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        inp, weight, bias, _ = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(inp, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        inp, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        dinp = (grad @ weight.to(grad.dtype)).to(inp.dtype) if wanted[0] else None
        dweight = (flat.T @ inp.reshape(-1, inp.shape[-1]).to(grad.dtype)).to(weight.dtype) if wanted[1] else None
        dbias = flat.sum(0).to(ctx.bias_dtype) if wanted[2] else None
        return dinp, dweight, dbias, None


def router_gating_linear(inp: Tensor, weight: Tensor, bias: Tensor | None, router_dtype: torch.dtype) -> Tensor:
    """The router's logits ``inp @ weight.T + bias`` in another precision than that of the tokens.

    Products and sums are of ``router_dtype``, forward and backward; what is kept for backward stays in the dtypes of
    ``inp`` and ``weight``, and gradients come in those of their tensors.

    Args:
        inp: ``[..., H]``, floating point.
        weight: ``[E, H]``, floating point.
        bias: ``[E]``, floating point, or None.
        router_dtype: a floating-point dtype.

    Returns:
        ``[..., E]`` in ``router_dtype``.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: a dtype that is not floating point.
    """
    op = "router_gating_linear"
    for name, value in (("inp", inp), ("weight", weight)) + (() if bias is None else (("bias", bias),)):
        _check.floating(op, name, value)
    if not router_dtype.is_floating_point:
        raise _check.wrong_type(op, "router_dtype", "a floating-point dtype", router_dtype)
    _check.tensor_dim(op, "weight", weight, 2)
    if inp.dim() == 0 or inp.shape[-1] != weight.shape[1]:
        raise _check.fail(op, "inp", f"[..., {weight.shape[1]}] as weight", f"shape {list(inp.shape)}")
    if bias is not None:
        _check.shape(op, "bias", bias, weight.shape[:1], "[experts]")
    _check.same_device(op, inp=inp, weight=weight, bias=bias)
    return _GatingLinear.apply(inp, weight, bias, router_dtype)


# --- padding --------------------------------------------------------------------------------------------------------


def pad_routing_map(routing_map: Tensor, pad_multiple: int) -> Tensor:
    """A copy of the map with each expert's count raised to a multiple, as far as there are tokens.

    Megatron-core's dispatchers call it without asking whether the tokens suffice. :func:`moekit.moe_utils.pad_routing_map`
    raises where they do not; here such an expert takes every token.
    """
    return losses.fill_routing_map(routing_map, pad_multiple)
