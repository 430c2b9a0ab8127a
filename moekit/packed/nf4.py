"""nf4: 4-bit quantiles of a normal distribution, as bitsandbytes packs them: a scale for 64 values in flat order.

QLoRA, arXiv:2305.14314. Codes and scales are those of ``bitsandbytes.functional.quantize_4bit(weight, blocksize=64,
quant_type="nf4")``, bit for bit, and so are the doubly quantised scales of ``compress_statistics=True``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.ops.unpack import NESTED_BLOCK, NF4_BLOCK, NF4_TABLE, dynamic_table
from moekit.packed._format import Block, Format, Layout, Part, divisible, only_block

_SMALLEST = 1e-38  # a block of zeros is divided by this


def block(op: str, height: int, width: int, wanted: Block | None) -> Block:
    """The only block; whole ones make up an expert."""
    divisible(op, "nf4", "even in, that is", width, 2)
    divisible(op, "nf4", "out * in", height * width, NF4_BLOCK)
    return only_block(op, "nf4", wanted, (1, NF4_BLOCK))


def layout(shape: tuple[int, int, int], block: Block, double_quant: bool) -> Layout:
    """Codes, and absmax for each block: float32, or doubly quantised."""
    num_experts, height, width = shape
    blocks = height * width // NF4_BLOCK
    codes = Part((num_experts, height, width // 2), (torch.uint8,))
    if not double_quant:
        return Layout(codes, [Part((num_experts, blocks), (torch.float32,))])
    nested = -(-num_experts * blocks // NESTED_BLOCK)
    scales = [Part((num_experts, blocks), (torch.uint8,)), Part((nested,), (torch.float32,)), Part((), (torch.float32,))]
    return Layout(codes, scales)


def pack(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """One expert ``[out, in]``: the nearest of 16 values, the lower of two as near."""
    blocks = weight.float().reshape(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=_SMALLEST)).unsqueeze(1)).clamp_(-1, 1)
    codes = _nearest(scaled, torch.tensor(NF4_TABLE, device=weight.device))
    return (codes[:, ::2] << 4 | codes[:, 1::2]).view(weight.shape[0], -1), absmax


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """The places of the nearest values of an ascending table."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)


def compress(absmax: Tensor) -> list[Tensor]:
    """Quantise the scales of a stack, 256 to a scale of their own, around their mean."""
    offset = absmax.reshape(-1).mean()
    flat = absmax.reshape(-1) - offset
    missing = -len(flat) % NESTED_BLOCK
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    scaled = (blocks * (1 / nested.clamp(min=_SMALLEST)).unsqueeze(1)).clamp_(-1, 1)
    codes = _nearest(scaled, dynamic_table(absmax.device)).view(-1)[: len(flat)]
    return [codes.view(absmax.shape), nested, offset]


NF4 = Format(block, layout, pack)
