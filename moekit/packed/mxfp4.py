"""mxfp4: 4-bit floating point (e2m1) with a power of two for 32 values of a row, as gpt-oss is published in.

OCP Microscaling Formats 1.0. Packing follows ``downcast_to_mxfp`` of triton_kernels, which Transformers packs with: the
scale is the smallest power of two that keeps the largest value of the block within 6; a value between two codes goes to the nearer
one, away from zero if both are as near.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.ops.unpack import E2M1_TABLE, MXFP4_BLOCK
from moekit.packed._format import Block, Format, Layout, Part, divisible, only_block

_LARGEST = E2M1_TABLE[7]
_MANTISSA, _EXPONENT = 0x007FFFFF, 0x7F800000  # the bits of a float32


def block(op: str, height: int, width: int, wanted: Block | None) -> Block:
    """The only block; whole ones make up a row."""
    divisible(op, "mxfp4", "in", width, MXFP4_BLOCK)
    return only_block(op, "mxfp4", wanted, (1, MXFP4_BLOCK))


def layout(shape: tuple[int, int, int], block: Block, double_quant: bool) -> Layout:
    """Codes, and a biased exponent for each block."""
    num_experts, height, width = shape
    codes = Part((num_experts, height, width // 2), (torch.uint8,))
    return Layout(codes, [Part((num_experts, height, width // MXFP4_BLOCK), (torch.uint8,))])


def pack(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """One expert ``[out, in]``."""
    blocks = weight.float().reshape(weight.shape[0], -1, MXFP4_BLOCK)
    scale = blocks.abs().amax(2, keepdim=True) / _LARGEST
    rounded_up = (scale.view(torch.int32) + _MANTISSA) & _EXPONENT
    power = rounded_up.view(torch.float32)
    scaled = blocks * torch.where(power == 0, 0, 1 / power)
    magnitudes = torch.tensor(E2M1_TABLE[:8], device=weight.device)
    middles = (magnitudes[:-1] + magnitudes[1:]) / 2
    codes = torch.bucketize(scaled.abs(), middles, right=True, out_int32=True).to(torch.uint8)
    codes |= scaled.signbit().to(torch.uint8) << 3
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return packed.reshape(weight.shape[0], -1), (rounded_up >> 23).to(torch.uint8).squeeze(2)


MXFP4 = Format(block, layout, pack)
