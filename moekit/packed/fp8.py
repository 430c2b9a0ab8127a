"""fp8: e4m3 codes with a scale a block, of 128x128 (DeepSeek-V3, Qwen3-FP8 checkpoints) or a row.

Packing follows the quantiser of Transformers' FineGrainedFP8 (``Fp8Quantize``), bit for bit; blocks at the edges may be
smaller, as published checkpoints have them. Checkpoints have ``*_scale_inv`` beside the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import _check
from moekit.ops.unpack import Stored, scale_shapes
from moekit.packed._format import Block, Entries, Format, Layout, Part, Shape

_CODE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_CODE).max
_SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
_USUAL = (128, 128)


def block(op: str, height: int, width: int, wanted: Block | None) -> Block:
    """128x128, or what is asked for."""
    if wanted is None:
        return _USUAL
    if not isinstance(wanted, tuple | list) or len(wanted) != 2:
        raise _check.wrong_type(op, "block", "two integers (rows, columns) or None", wanted)
    return _check.positive(op, "block", wanted[0]), _check.positive(op, "block", wanted[1])


def layout(shape: Shape, block: Block, double_quant: bool) -> Layout:
    """Codes, and a scale for each block."""
    return Layout(Part(shape, (_CODE,)), [Part(scale_shapes("fp8", shape, block)[0], _SCALES)])


def pack(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """One expert."""
    (height, width), (down, across) = weight.shape, block
    padded = torch.nn.functional.pad(weight.float(), (0, -width % across, 0, -height % down))
    blocks = padded.view(padded.shape[0] // down, down, padded.shape[1] // across, across)
    absmax = blocks.abs().amax((1, 3))
    factor = torch.where(absmax > 0, _LARGEST / absmax, 1)
    # A block of subnormal numbers has an infinite factor: its scale is zero, and so are the values, whatever the codes.
    scaled = (blocks * factor[:, None, :, None]).clamp_(-_LARGEST, _LARGEST).nan_to_num_(0)
    return scaled.view(padded.shape)[:height, :width].to(_CODE), 1 / factor


def entries(stored: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes, and the scales they are multiplied by."""
    return {"": stored.codes, "_scale_inv": stored.scales[0]}


def stored(entries: Entries) -> tuple[Stored, torch.dtype]:
    """What checkpoints have. Unless ``block`` is given it is 128x128, a row or a matrix, whichever fits."""
    codes, scales = entries.take(""), entries.take("_scale_inv")
    _check.tensor_dim(entries.op, entries.prefix, codes, 3)
    height, width = codes.shape[1:]
    fitting = [found for found in (_USUAL, (1, width), (height, width)) if _shape(codes, found) == tuple(scales.shape)]
    chosen = block(entries.op, height, width, entries.block or next(iter(fitting), _USUAL))
    return Stored(codes, [scales], "fp8", chosen), entries.dtype or torch.bfloat16


def _shape(codes: Tensor, block: Block) -> tuple[int, ...]:
    num_experts, height, width = codes.shape
    return layout((num_experts, height, width), block, False).scales[0].shape if height and width else ()


FP8 = Format(block, layout, pack, "_scale_inv", entries, stored)
