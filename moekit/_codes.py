"""What the codes of packed weights stand for: the tables that the reference and the kernels of every backend share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NF4_BLOCK, NESTED_BLOCK, MXFP4_BLOCK = 64, 256, 32
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, arXiv:2305.14314, appendix E).
NF4_TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
E2M1_TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what ``make`` returns for the same arguments; but in a trace, say, where it is a tensor of that trace."""
    kept = functools.cache(make)
    return functools.wraps(make)(lambda *args: make(*args) if torch._C._len_torch_dispatch_stack() else kept(*args))


@_kept
def table(format: str, device: torch.device) -> Tensor:
    """The values of the 16 codes of ``nf4`` or ``mxfp4``: float32."""
    return torch.tensor(NF4_TABLE if format == "nf4" else E2M1_TABLE, dtype=torch.float32, device=device)


@_kept
def pair_table(format: str, device: torch.device) -> Tensor:
    """The two values of each byte of ``nf4`` or ``mxfp4``: float32 ``[256, 2]``."""
    codes = torch.arange(256, device=device)
    high, low = codes >> 4, codes & 15
    return table(format, device)[torch.stack([high, low] if format == "nf4" else [low, high], 1)]


@_kept
def dynamic_table(device: torch.device) -> Tensor:
    """The signed dynamic map of bitsandbytes, which stands for the scales of scales: float32 ``[256]``, ascending.

    A decade below 1 has twice as many numbers as the one below it, from 1 to 64: the middles of equal parts of 0.1 to 1,
    times the decade. They are computed in float32 and in this order, on which their last bits depend.
    """
    parts = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        parts.append(10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(parts)
    zero, one = torch.tensor([[0.0], [1.0]], dtype=torch.float32, device="cpu")
    return torch.cat([-positive.flip(0), zero, positive, one]).to(device)


def powers_of_two(exponents: Tensor) -> Tensor:
    """``2 ** (exponents - 127)`` from the bits of float32: exact, with the subnormal number for 0 and infinity for 255."""
    bits = exponents.int() << 23
    return torch.where(bits == 0, 1 << 22, bits).view(torch.float32)
