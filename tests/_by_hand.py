"""Routing done by loops over tokens, slots and experts, and the routings that the tests try."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def case(seed: int, tokens: int, topk: int, experts: int, hidden: int) -> tuple[Tensor, int, int]:
    """Distinct experts for every token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :topk], experts, hidden


# indices [T, K], E, H. The named edge cases, and one without anything special.
CASES = {
    "plain": case(0, 13, 2, 5, 8),
    "empty_expert": (torch.tensor([[0, 3], [3, 0], [3, 4], [4, 0]]), 5, 4),  # 1 and 2 have no token
    "nobody": (torch.full((4, 2), -1), 3, 4),
    "one_expert": (torch.full((6, 1), 2), 4, 4),
    "one_token": case(1, 1, 3, 4, 8),
    "k1": case(2, 9, 1, 4, 8),
    "k_is_e": case(3, 5, 4, 4, 8),
    "e1": (torch.zeros(5, 1, dtype=torch.int64), 1, 4),
    "e7_odd_hidden": case(4, 11, 3, 7, 13),
    "hidden_1": case(5, 7, 2, 3, 1),
    "twice": (torch.tensor([[1, 1], [0, 1], [2, 2]]), 3, 5),
    "some_none": (torch.tensor([[1, -1], [-1, -1], [-1, 0], [2, 1]]), 3, 5),
}
every_case = pytest.mark.parametrize("name", CASES)


def slots_by_hand(indices: Tensor, experts: int) -> list[tuple[int, int]]:
    """The (token, slot) of each routed row: expert-major, ascending in token, then in slot."""
    found = indices.tolist()
    return [
        (t, k) for e in range(experts) for t in range(indices.shape[0]) for k in range(indices.shape[1]) if found[t][k] == e
    ]


def permute_by_hand(tokens: Tensor, indices: Tensor, experts: int, num_rows: int) -> Tensor:
    """Each slot's row, then zero rows."""
    out = torch.zeros(num_rows, tokens.shape[1], dtype=tokens.dtype)
    for row, (t, _) in enumerate(slots_by_hand(indices, experts)):
        out[row] = tokens[t]
    return out


def unpermute_by_hand(rows: Tensor, indices: Tensor, weights: Tensor | None, experts: int) -> tuple[Tensor, Tensor]:
    """The float64 sums, and the size of what was added."""
    out = torch.zeros(indices.shape[0], rows.shape[1], dtype=torch.float64)
    size = torch.zeros_like(out)
    for row, (t, k) in enumerate(slots_by_hand(indices, experts)):
        term = rows[row].detach().double() * (1.0 if weights is None else weights[t, k].detach().double())
        out[t] += term
        size[t] += term.abs()
    return out, size


def gradients_by_hand(
    grad: Tensor, rows: Tensor, indices: Tensor, weights: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(drows, dweights)`` of the weighted sum in float64, and the size of what dweights adds."""
    grad, rows, weights = grad.double(), rows.detach().double(), weights.detach().double()
    drows = torch.zeros(rows.shape, dtype=torch.float64)
    dweights = torch.zeros(indices.shape, dtype=torch.float64)
    size = torch.zeros_like(dweights)
    for row, (t, k) in enumerate(slots_by_hand(indices, experts)):
        drows[row] = grad[t] * weights[t, k]
        products = grad[t] * rows[row]
        dweights[t, k], size[t, k] = products.sum(), products.abs().sum()
    return drows, dweights, size


def leaf(x: Tensor) -> Tensor:
    """The same memory as a tensor that wants a gradient."""
    return x.detach().requires_grad_()


def chunks_by_hand(x: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    """The rows of the chunks in their new order."""
    starts = [sum(sizes[:c]) for c in range(len(sizes))]
    return torch.stack([x[starts[c] + i] for c in order for i in range(sizes[c])])


# --- maps: any number of experts a token, rows as (token, expert) pairs ---------------------------------------------


def map_case(seed: int, tokens: int, experts: int, density: float = 0.4) -> Tensor:
    """Any number of experts for each token."""
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density


def only(tokens: int, experts: int, *pairs: tuple[int, int]) -> Tensor:
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool)
    for t, e in pairs:
        routing_map[t, e] = True
    return routing_map


# Map [T, E] and H.
MAPS = {
    "plain": (map_case(0, 13, 5), 8),
    "empty_expert": (only(4, 5, (0, 0), (1, 0), (1, 3), (2, 3), (3, 4)), 4),
    "nobody": (only(4, 3), 4),
    "one_expert": (only(4, 3, (0, 1), (1, 1), (2, 1), (3, 1)), 4),
    "one_token": (only(1, 4, (0, 1), (0, 3)), 8),
    "k_is_e": (map_case(3, 5, 4, 1.0), 4),
    "e1": (only(4, 1, (0, 0), (2, 0)), 4),
    "e7_odd_hidden": (map_case(4, 11, 7), 13),
    "hidden_1": (map_case(5, 7, 3), 1),
}
every_map = pytest.mark.parametrize("name", MAPS)


def pairs_of(routing_map: Tensor) -> list[tuple[int, int]]:
    """The (token, expert) of each row: expert-major, ascending in token."""
    tokens, experts = routing_map.shape
    return [(t, e) for e in range(experts) for t in range(tokens) if routing_map[t, e] != 0]


def capacity_pairs(routing_map: Tensor, capacity: int) -> list[tuple[int, int]]:
    """With drop_and_pad: each expert's first routed tokens, then unrouted ones, then no token (-1)."""
    tokens, experts = routing_map.shape
    pairs = []
    for e in range(experts):
        routed = [t for t in range(tokens) if routing_map[t, e] != 0]
        chosen = routed + [t for t in range(tokens) if t not in routed] + [-1] * capacity
        pairs += [(t, e) for t in chosen[:capacity]]
    return pairs


def permute_pairs(tokens: Tensor, probs: Tensor, pairs: list) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their probs and their tokens; a pair of token -1 is a zero row."""
    rows = torch.zeros(len(pairs), tokens.shape[1], dtype=tokens.dtype)
    row_probs = torch.zeros(len(pairs), dtype=probs.dtype)
    for row, (t, e) in enumerate(pairs):
        if t >= 0:
            rows[row], row_probs[row] = tokens[t], probs[t, e]
    return rows, row_probs, torch.tensor([t for t, _ in pairs], dtype=torch.int64)


def unpermute_pairs(rows: Tensor, pairs: list, tokens: int, probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The float64 sums, and the size of what was added."""
    out = torch.zeros(tokens, rows.shape[1], dtype=torch.float64)
    size = torch.zeros_like(out)
    for row, (t, e) in enumerate(pairs):
        if t >= 0:
            term = rows[row].detach().double() * (1.0 if probs is None else probs[t, e].detach().double())
            out[t] += term
            size[t] += term.abs()
    return out, size
