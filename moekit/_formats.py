"""What the codes of packed weights stand for: numbers that every backend needs and none computes with."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

NESTED_BLOCK = 256  # scales of nf4 that share a scale of their own
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, arXiv:2305.14314, appendix E).
NF4_TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@functools.cache
def nf4_table(device: torch.device) -> Tensor:
    """The values of nf4: float32 ``[16]``."""
    return torch.tensor(NF4_TABLE, device=device)


@functools.cache
def dynamic_table(device: torch.device) -> Tensor:
    """bitsandbytes' signed dynamic map, which stands for the scales of scales: float32 ``[256]``, ascending.

    A decade below 1 has twice as many numbers as the one below it, from 1 to 64: the middles of equal parts of 0.1 to 1,
    times the decade. They are computed in float32 and in this order, on which their last bits depend.
    """
    parts = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        parts.append(10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(parts)
    zero, one = torch.zeros(1, device="cpu"), torch.ones(1, device="cpu")
    return torch.cat([-positive.flip(0), zero, positive, one]).to(device)
