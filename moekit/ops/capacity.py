"""Capacity: the most rows of an expert, as changes of a routing."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import tables
from moekit.ops._segments import expert_of_row
from moekit.ops.select import descending
from moekit.routing import Routing


def limit(indices: Tensor, weights: Tensor, num_experts: int, capacity: int, by: str, overflow: str) -> Tensor:
    """The indices with -1 for what is beyond an expert's capacity."""
    flat = indices.reshape(-1)
    device = flat.device
    first = descending(weights.reshape(-1), 0) if by == "weights" else torch.arange(flat.shape[0], device=device)
    counts, offsets, order, _ = tables.route_indices(flat[first].unsqueeze(1), num_experts)
    if overflow == "raise" and counts.numel() and int(counts.max()) > capacity:
        expert = int(counts.argmax())
        wanted = f"enough for every expert (expert {expert} has {int(counts[expert])} tokens)"
        raise _check.fail("route", "capacity", wanted, capacity)
    rank = torch.arange(order.shape[0], device=device) - _starts(counts, offsets, order.shape[0])
    # A spare last place takes the rows of no expert.
    place = torch.where(order >= 0, first[order.clamp(min=0)], flat.shape[0])
    kept = torch.zeros(flat.shape[0] + 1, dtype=torch.bool, device=device).scatter(0, place, rank < capacity)
    return indices.masked_fill(~kept[:-1].view_as(indices), -1)


def _starts(counts: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """The first row of each row's expert; rows of none have any."""
    expert = expert_of_row(offsets, num_rows).clamp(max=max(counts.shape[0] - 1, 0))
    return (offsets - counts)[expert] if counts.shape[0] else expert


def padded_to(routing: Routing, capacity: int) -> Routing:
    """The routing with exactly ``capacity`` rows an expert, of which those without a slot are padding."""
    experts, rows, device = routing.num_experts, routing.num_rows, routing.order.device
    expert = expert_of_row(routing.offsets, rows)
    row = torch.arange(rows, device=device)
    moved = row - _starts(routing.tokens_per_expert, routing.offsets, rows) + expert * capacity
    moved = torch.where(routing.order >= 0, moved, experts * capacity)
    order = torch.full((experts * capacity + 1,), -1, dtype=torch.int32, device=device).scatter(0, moved, routing.order)[:-1]
    of_slot = moved.to(torch.int32)[routing.inverse.clamp(min=0).long()] if rows else routing.inverse
    inverse = torch.where(routing.inverse >= 0, of_slot, -1)
    offsets = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * capacity
    return dataclasses.replace(routing, offsets=offsets, order=order, inverse=inverse)
