"""What each function is: formulas and loops in plain PyTorch, for float64 and for autograd to differentiate.

Nothing here knows moekit's operators, so ``moekit check moekit.moe_utils`` compares two things. Letters in shapes: T
tokens, E experts, K experts per token, S rows after permutation, H hidden, I intermediate, N rows of an activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Pairs = list[tuple[int, int]]  # the (token, expert) of each row; token -1: a row of zeros

# --- gated activations ----------------------------------------------------------------------------------------------


def silu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """``x * sigmoid(x)``."""
    return x * torch.sigmoid(x)


def gelu_tanh(x: Tensor, alpha: float = 1.0) -> Tensor:
    """GELU with its tanh (arXiv 1606.08415)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def quick_gelu(x: Tensor, alpha: float = 1.702) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    return x * torch.sigmoid(alpha * x)


def gated(
    y: Tensor,
    activation: Callable[[Tensor, float], Tensor],
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    linear_offset: float | Tensor = 0.0,
    clamp_value: float | None = None,
    alpha: float = 1.702,
) -> Tensor:
    """``activation(gate) * (up + linear_offset) * weights`` of ``y = [gate | up]``: ``[..., 2I]`` to ``[..., I]``.

    ``clamp_value`` limits the gate from above and the up half on both sides; then the bias is added.
    """
    gate, up = y.chunk(2, -1)
    if clamp_value is not None:
        gate, up = gate.clamp(max=clamp_value), up.clamp(-clamp_value, clamp_value)
    if bias is not None:
        gate_bias, up_bias = bias.chunk(2, -1)
        gate, up = gate + gate_bias, up + up_bias
    out = activation(gate, alpha) * (up + linear_offset)
    return out if weights is None else out * weights.reshape(*y.shape[:-1], 1)


# --- permutation ----------------------------------------------------------------------------------------------------


def pairs_of(routing_map: Tensor, num_out_tokens: int | None = None, drop_and_pad: bool = False) -> Pairs:
    """The (token, expert) of each row: expert by expert, tokens ascending; -1 for rows of no token.

    With ``drop_and_pad`` each expert has ``num_out_tokens // E`` rows: its first routed tokens, then unrouted ones by
    position, then none.
    """
    tokens, experts = routing_map.shape
    routed = [[t for t in range(tokens) if routing_map[t, e] != 0] for e in range(experts)]
    if drop_and_pad and num_out_tokens is not None:
        capacity = num_out_tokens // experts
        for e, chosen in enumerate(routed):
            chosen += [t for t in range(tokens) if t not in chosen] + [-1] * capacity
            routed[e] = chosen[:capacity]
    pairs = [(t, e) for e in range(experts) for t in routed[e]]
    return pairs + [(-1, 0)] * ((num_out_tokens or 0) - len(pairs))


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(rows [S, H], their probs [S] or None, their tokens [S])``."""
    pairs = pairs_of(routing_map, num_out_tokens, drop_and_pad)
    rows = [tokens[t] if t >= 0 else tokens.new_zeros(tokens.shape[1]) for t, _ in pairs]
    found = [] if probs is None else [probs[t, e] if t >= 0 else probs.new_zeros(()) for t, e in pairs]
    indices = torch.tensor([t for t, _ in pairs], dtype=torch.int64)
    return _stacked(rows, tokens), None if probs is None else _stacked(found, probs[:, 0]), indices


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: tuple[int, int],
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> Tensor:
    """Each token's rows, times their probs where given, added up: ``[T, H]``."""
    out = [permuted_tokens.new_zeros(restore_shape[1]) for _ in range(restore_shape[0])]
    pairs = [(int(t), 0) for t in sorted_indices]
    if probs is not None and routing_map is not None:
        pairs = pairs_of(routing_map, len(pairs), drop_and_pad)
    for row, (t, e) in enumerate(pairs):
        if t >= 0:
            out[t] = out[t] + permuted_tokens[row] * (1.0 if probs is None else probs[t, e])
    return torch.stack(out)


def sort_chunks(
    input: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The chunks of ``input`` (and of ``probs``), ``split_sizes`` rows each, in the order ``sorted_idxs``."""
    ends = split_sizes.cumsum(0).tolist()
    rows = [i for c in sorted_idxs.tolist() for i in range(ends[c] - int(split_sizes[c]), ends[c])]
    return input[rows], None if probs is None else probs[rows]


def _stacked(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like[:0]
