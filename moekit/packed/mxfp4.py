"""mxfp4: 4-bit floating point (e2m1) with a power of two for 32 values of a row, as gpt-oss is published in.

OCP Microscaling Formats 1.0. Packing follows ``downcast_to_mxfp`` of triton_kernels, which Transformers packs with: the
scale is the smallest power of two that keeps the largest value of a block within 6, and the nearest code is taken, the even
one if two are as near. Checkpoints have ``*_blocks`` and ``*_scales``, as gpt-oss does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import _check
from moekit._codes import E2M1_TABLE, MXFP4_BLOCK, table
from moekit.ops.unpack import Stored, scale_shapes
from moekit.packed._format import Block, Entries, Format, Layout, Part, Shape, divisible, only_block

_LARGEST = E2M1_TABLE[7]
_MANTISSA, _EXPONENT = 0x007FFFFF, 0x7F800000  # bits of a float32
_BYTES = MXFP4_BLOCK // 2


def block(op: str, height: int, width: int, wanted: Block | None) -> Block:
    """The only block; whole ones make up a row."""
    divisible(op, "a last dimension (in: mxfp4 has blocks along it)", width, MXFP4_BLOCK)
    return only_block(op, "mxfp4", wanted, (1, MXFP4_BLOCK))


def layout(shape: Shape, block: Block, double_quant: bool) -> Layout:
    """Codes, and a biased exponent for each block."""
    num_experts, height, width = shape
    codes = Part((num_experts, height, width // 2), (torch.uint8,))
    return Layout(codes, [Part(scale_shapes("mxfp4", shape, block)[0], (torch.uint8,))])


def pack(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """One expert."""
    blocks = weight.float().reshape(weight.shape[0], -1, MXFP4_BLOCK)
    scale = blocks.abs().amax(2, keepdim=True) / _LARGEST
    rounded_up = (scale.view(torch.int32) + _MANTISSA) & _EXPONENT
    power = rounded_up.view(torch.float32)
    scaled = blocks * torch.where(power == 0, 0, 1 / power)
    codes = torch.bucketize(scaled.abs(), _limits(weight.device), out_int32=True).to(torch.uint8)
    codes |= scaled.signbit().to(torch.uint8) << 3
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return packed.reshape(weight.shape[0], -1), (rounded_up >> 23).to(torch.uint8).squeeze(2)


def _limits(device: torch.device) -> Tensor:
    """The largest magnitude of each code but the last: half-way to the next, or just below that where the next is even."""
    magnitudes = table("mxfp4", device)[:8]
    middles = (magnitudes[:-1] + magnitudes[1:]) / 2
    even = torch.arange(7, device=device) % 2 == 0
    return torch.where(even, middles, middles.nextafter(torch.zeros_like(middles)))


def entries(stored: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
    """Bytes by block, and exponents."""
    num_experts, height, width = stored.shape
    return {"_blocks": stored.codes.view(num_experts, height, width // MXFP4_BLOCK, _BYTES), "_scales": stored.scales[0]}


def stored(entries: Entries) -> tuple[Stored, torch.dtype]:
    """What gpt-oss's checkpoints have; exponents may also be of float8_e8m0fnu."""
    blocks, scales = entries.take("_blocks"), entries.take("_scales")
    if blocks.dim() != 4 or blocks.shape[3] != _BYTES:
        wanted = f"of shape [experts, out, in / {MXFP4_BLOCK}, {_BYTES}]"
        raise _check.fail(entries.op, f"{entries.prefix}_blocks", wanted, f"shape {list(blocks.shape)}")
    scales = scales.view(torch.uint8) if scales.dtype is torch.float8_e8m0fnu else scales
    found = Stored(blocks.flatten(2), [scales], "mxfp4", entries.block or (1, MXFP4_BLOCK))
    return found, entries.dtype or torch.bfloat16


MXFP4 = Format(block, layout, pack, "_blocks", entries, stored)
