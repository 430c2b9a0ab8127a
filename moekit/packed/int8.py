"""int8: a scale a row, as bitsandbytes packs ``LLM.int8()`` weights (arXiv:2208.07339) without outliers.

Codes and scales are those of ``bitsandbytes.functional.int8_vectorwise_quant(weight)``, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.packed._format import Block, Format, Layout, Part, only_block


def block(op: str, height: int, width: int, wanted: Block | None) -> Block:
    """The only block: a row."""
    return only_block(op, "int8", wanted, (1, width))


def layout(shape: tuple[int, int, int], block: Block, double_quant: bool) -> Layout:
    """Codes, and absmax for each row."""
    return Layout(Part(shape, (torch.int8,)), [Part(shape[:2], (torch.float32,))])


def pack(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """One expert ``[out, in]``; a row of zeros has codes of zero."""
    absmax = weight.abs().amax(1).float()
    factor = torch.where(absmax > 0, 127 / absmax, 0)
    return (weight * factor.unsqueeze(1)).round_().to(torch.int8), absmax


INT8 = Format(block, layout, pack)
