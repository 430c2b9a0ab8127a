"""int8: a scale a row, as bitsandbytes packs the weights of ``LLM.int8()`` (arXiv:2208.07339).

Codes and scales are those of ``bitsandbytes.functional.int8_vectorwise_quant(weight)``, bit for bit. Checkpoints have
``SCB`` beside the codes, as those of bitsandbytes' 8-bit layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import _check
from moekit.ops.unpack import Stored, scale_shapes
from moekit.packed._format import Block, Entries, Format, Layout, Part, Shape, only_block

_MARK = ".SCB"


def block(op: str, height: int, width: int, wanted: Block | None) -> Block:
    """The only block: a row."""
    return only_block(op, "int8", wanted, (1, width))


def layout(shape: Shape, block: Block, double_quant: bool) -> Layout:
    """Codes, and absmax for each row."""
    return Layout(Part(shape, (torch.int8,)), [Part(scale_shapes("int8", shape, block)[0], (torch.float32,))])


def pack(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """One expert. A row of zeros has codes of zero."""
    absmax = weight.abs().amax(1).float()
    scaled = (weight * (127 / absmax).unsqueeze(1)).nan_to_num_(0).clamp_(-127, 127)
    return scaled.round_().to(torch.int8), absmax


def entries(stored: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes, and absmax by its name in bitsandbytes."""
    return {"": stored.codes, _MARK: stored.scales[0]}


def stored(entries: Entries) -> tuple[Stored, torch.dtype]:
    """And back."""
    codes, scales = entries.take(""), entries.take(_MARK)
    _check.tensor_dim(entries.op, entries.prefix, codes, 3)
    return Stored(codes, [scales], "int8", (1, codes.shape[2])), entries.dtype or torch.bfloat16


INT8 = Format(block, layout, pack, _MARK, entries, stored)
