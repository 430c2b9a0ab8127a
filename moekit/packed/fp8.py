"""fp8: e4m3 codes with a scale a block, 128x128 (DeepSeek-V3, Qwen3-FP8 checkpoints) or a row.

Packing follows the quantiser of Transformers' FineGrainedFP8 (``Fp8Quantize``), bit for bit; blocks at the edges may be
smaller, as they are in published checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.packed._format import Block, Format, Layout, Part, as_block

_CODE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_CODE).max
_SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)


def block(op: str, height: int, width: int, wanted: Block | None) -> Block:
    """128x128, or what is asked for."""
    return (128, 128) if wanted is None else as_block(op, wanted)


def layout(shape: tuple[int, int, int], block: Block, double_quant: bool) -> Layout:
    """Codes, and a scale for each block."""
    num_experts, height, width = shape
    blocks = (num_experts, -(-height // block[0]), -(-width // block[1]))
    return Layout(Part(shape, (_CODE,)), [Part(blocks, _SCALES)])


def pack(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """One expert ``[out, in]``."""
    (height, width), (down, across) = weight.shape, block
    padded = torch.nn.functional.pad(weight.float(), (0, -width % across, 0, -height % down))
    blocks = padded.view(padded.shape[0] // down, down, padded.shape[1] // across, across)
    absmax = blocks.abs().amax((1, 3))
    factor = torch.where(absmax > 0, _LARGEST / torch.where(absmax > 0, absmax, 1), 1)
    scaled = (blocks * factor[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
    return scaled.view(padded.shape)[:height, :width].to(_CODE), 1 / factor


FP8 = Format(block, layout, pack)
