"""Losses of what a router chose, and the bias that balances without one.

They take the :class:`moekit.Routing` that :func:`moekit.route` made, with its choice and what it chose from: logits are not
routed again, so what is counted is what happened, biases, groups, hash tables, replays, capacity and padding included.

Precision: computed and returned in float32 (float64 for float64). Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import tables
from moekit.ops.losses import summed_over
from moekit.ops.topk import score_sums, token_scores
from moekit.routing import Routing, Scored, require

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def balance_loss(
    routing: Routing,
    coeff: float,
    *,
    counts: Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The load-balancing loss of the Switch Transformer (arXiv 2101.03961, equation 4) of the actual choice, for any K.

    ``coeff * E * sum_e f_e * P_e`` with ``f_e = counts_e / (K * N)``, what each expert got, and ``P_e = sum_t p_te / N``,
    the mean of its scores, which sum to one a token (a sigmoid's are divided by their sum). Evenly spread it is ``coeff``.

    Args:
        routing: of :func:`moekit.route`. Tokens that its padding mask left out add nothing and are not counted.
        coeff: factor of the loss.
        counts: ``[E]``, the slots of each expert in the whole batch of which this is a micro-batch; by default those of
            ``routing``. With ``num_tokens``, the losses of the parts add up to the loss of the whole (arXiv 2501.11873).
        num_tokens: N, the tokens of the whole batch, padding left out; goes with ``counts``.
        group: sum counts and tokens over these processes. Each one's loss is its share times their number, so that the
            mean over processes, which data parallelism takes of gradients, is the loss of the global batch.

    Returns:
        a 0-d tensor, differentiable with respect to the logits; 0 where there is no token. No value is read from a device.

    Raises:
        ValueError: a routing that does not know its logits, ``counts`` without ``num_tokens``, shapes that do not fit.
        TypeError: something else than a routing.

    Examples:
        >>> import torch, moekit
        >>> even = moekit.route(torch.eye(4), 1)  # each token another expert
        >>> round(moekit.balance_loss(even, 1.0).item(), 3)
        1.0
        >>> same = moekit.route(torch.eye(4)[:1].expand(4, 4), 1)  # all tokens to one
        >>> round(moekit.balance_loss(same, 1.0).item(), 3)
        1.901
    """
    op = "balance_loss"
    scored = _scored(op, routing)
    if (counts is None) != (num_tokens is None):
        raise _check.fail(op, "counts and num_tokens", "given together, or neither", "one of them")
    own_tokens: int | Tensor = _num_tokens(scored)
    if counts is None or num_tokens is None:
        counts, num_tokens = routing.tokens_per_expert, own_tokens
    _check.shape(op, "counts", counts, (routing.num_experts,), "[experts]")
    processes = 1
    if group is not None:
        processes = group.size()
        counts, num_tokens = summed_over(counts, group), summed_over(_as_tensor(num_tokens, counts), group)
    sums = _score_sums(scored)
    share = _reciprocal(num_tokens, sums)
    factor = share * share * (coeff * routing.num_experts * processes / max(routing.topk, 1))
    return torch.dot(sums, counts.to(sums.dtype)) * factor


def sequence_balance_loss(routing: Routing, coeff: float, *, sequences: int | Tensor) -> Tensor:
    """The balance loss of each sequence, averaged over sequences (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    Being a mean over sequences, it does not depend on how they are spread over micro-batches of equally many.

    Args:
        routing: of :func:`moekit.route`, its tokens sequence after sequence.
        coeff: factor of the loss.
        sequences: how many sequences of equal length there are; or, packed, ``[B + 1]`` integers, where each begins and the
            last ends (``cu_seqlens``), on the device of the routing.

    Returns:
        a 0-d tensor as :func:`balance_loss`; sequences without a token add nothing.

    Raises:
        ValueError: T is no multiple of ``sequences``, a routing that does not know its logits.
        TypeError: something else than a routing, or ``sequences`` that are no integers.
    """
    op = "sequence_balance_loss"
    scored = _scored(op, routing)
    tokens, experts = routing.num_tokens, routing.num_experts
    sequence, number = _sequence_of_token(op, sequences, routing)
    scores = token_scores(scored.logits, scored.score, scored.padding_mask)
    present = torch.ones(tokens, dtype=scores.dtype, device=scores.device)
    if scored.padding_mask is not None:
        present = present.masked_fill(scored.padding_mask, 0)
    keys = torch.where(routing.indices >= 0, sequence.unsqueeze(1) * experts + routing.indices, -1)
    counts = tables.route_indices(keys, number * experts)[0].view(number, experts)
    spread = torch.nn.functional.one_hot(sequence, number).to(scores.dtype).mT  # [B, T]: sums as products
    share = _reciprocal(spread @ present, scores)
    each = (counts.to(scores.dtype) * (spread @ scores)).sum(1) * share * share
    return each.sum() * (coeff * experts / max(routing.topk, 1) / max(number, 1))


def _scored(op: str, routing: Routing) -> Scored:
    require(op, routing)
    if routing.scored is None:
        raise _check.fail(op, "routing", "one of moekit.route, which knows what it chose from", "one without logits")
    return routing.scored


def _score_sums(scored: Scored) -> Tensor:
    """Each expert's sum of the tokens' scores, ``[E]``."""
    if scored.link is None:
        return token_scores(scored.logits, scored.score, scored.padding_mask).sum(0)
    return score_sums(scored.logits, scored.link, scored.score, scored.padding_mask)


def _num_tokens(scored: Scored) -> int | Tensor:
    """The tokens that are no padding; a tensor where a mask says it, so that nothing waits for a device."""
    return scored.logits.shape[0] if scored.padding_mask is None else (~scored.padding_mask).sum()


def _as_tensor(number: int | Tensor, like: Tensor) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, device=like.device)


def _reciprocal(number: int | Tensor, like: Tensor) -> float | Tensor:
    """``1 / number`` in the dtype of ``like``, 0 for 0."""
    if not isinstance(number, Tensor):
        return 1.0 / number if number > 0 else 0.0
    wide = number.to(like.dtype)
    return torch.where(wide > 0, wide.clamp(min=1).reciprocal(), 0)


def _sequence_of_token(op: str, sequences: int | Tensor, routing: Routing) -> tuple[Tensor, int]:
    """``[T]`` the sequence of each token, and how many there are."""
    tokens, device = routing.num_tokens, routing.indices.device
    position = torch.arange(tokens, device=device)
    if not isinstance(sequences, Tensor) or sequences.dim() == 0:
        number = _check.positive(op, "sequences", sequences)
        if tokens % number:
            raise _check.fail(op, "sequences", f"a divisor of the number of tokens ({tokens})", number)
        return position // max(tokens // number, 1), number
    _check.tensor_dim(op, "sequences", sequences, 1)
    _check.integer(op, "sequences", sequences)
    _check.same_device(op, routing=routing.indices, sequences=sequences)
    number = sequences.shape[0] - 1
    if number < 1:
        raise _check.fail(op, "sequences", "where each of them begins and the last ends", f"shape {list(sequences.shape)}")
    _check.offsets(op, sequences[1:], tokens)
    return torch.searchsorted(sequences[1:].contiguous(), position, right=True).clamp(max=number - 1), number
