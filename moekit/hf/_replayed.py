"""The weights of a choice that was given to a router of Transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit.ops.route import _reshaped, _scoring
from moekit.ops.topk import normalised, own_score


def weights_of(
    logits: Tensor,
    indices: Tensor,
    *,
    score: str = "softmax",
    select_by: str = "scores",
    multiplier: float | None = None,
    softcap: float | None = None,
    normalise: bool | None = None,
    epsilon: float | None = None,
    scale: float | None = None,
    expert_scale: Tensor | None = None,
) -> Tensor:
    """The weights that :func:`moekit.route` gives to ``indices``, in plain PyTorch, differentiated by autograd.

    Most of Transformers' routers compute theirs so, score all experts and then look at the chosen, and a choice that the
    router would have made itself then gets the same weights, and the logits the same gradients, to the last bit. A kernel
    would round otherwise.

    Args:
        logits: ``[T, E]``.
        indices: ``[T, K]`` int64, -1 for none.
        score: this and what follows as in :func:`moekit.route`.
        select_by: as there.
        multiplier: as there.
        softcap: as there.
        normalise: as there.
        epsilon: as there.
        scale: as there.
        expert_scale: as there.

    Returns:
        ``[T, K]`` in the dtype that :func:`moekit.route` returns; 0 for -1.
    """
    values = _reshaped(logits, multiplier, softcap)
    absent = indices < 0
    # A token without any expert would divide by the sum of nothing, and its NaN would come back in backward.
    anybody = values.detach().argmax(1, keepdim=True)
    chosen = indices.where(~absent.all(1, keepdim=True), anybody)
    how = _scoring(score, select_by, normalise, epsilon, scale)
    wide, index, own = values.to(torch.promote_types(values.dtype, torch.float32)), chosen.clamp(min=0), own_score(score)
    if own is not None or how.pre_softmax:
        scores = own.value(wide) if own is not None else wide.softmax(1)
        weights = scores.gather(1, index).masked_fill(chosen < 0, 0)
    else:  # of the chosen alone
        weights = wide.gather(1, index).masked_fill(chosen < 0, -torch.inf).softmax(1)
    if how.epsilon is not None:
        weights = normalised(weights, how.epsilon)
    if how.scaling_factor is not None:
        weights = weights * how.scaling_factor
    weights = weights.to(values.dtype)
    if expert_scale is not None:
        weights = (weights * expert_scale[index]).to(weights.dtype)
    return weights.masked_fill(absent, 0)


def somewhere(indices: Tensor, num_experts: int) -> Tensor:
    """``indices`` with an expert of no other slot in the place of -1, as Transformers' experts know no slot without one.

    Its weight is 0, so it does not matter which.
    """
    used = torch.zeros(indices.shape[0], num_experts + 1, dtype=torch.int8, device=indices.device)
    used = used.scatter(1, indices.where(indices >= 0, num_experts), 1)[:, :num_experts]
    return indices.where(indices >= 0, used.argmin(1, keepdim=True))


def replayed(spec: Any, module: Any, args: tuple, kwargs: dict[str, Any], output: Any, logits: Tensor, given: Tensor) -> Any:
    """A router's ``output`` with the choice ``given [T, K]`` in it; ``logits`` are ``spec.logits`` of these arguments."""
    given = given.masked_fill(given >= logits.shape[1], -1)  # on a GPU, where nobody has looked: goes nowhere
    weights = weights_of(logits, given, **spec.weighing(module, args, kwargs))
    return spec.pack(output, weights, somewhere(given, logits.shape[1]))
