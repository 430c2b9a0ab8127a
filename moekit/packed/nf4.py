"""nf4: 4-bit quantiles of a normal distribution, as bitsandbytes packs them: a scale for 64 values in flat order.

QLoRA, arXiv:2305.14314. Codes and scales are those of ``bitsandbytes.functional.quantize_4bit(weight, blocksize=64,
quant_type="nf4")`` on a CPU, bit for bit, and so are the doubly quantised scales of ``compress_statistics=True``.
Checkpoints have the names that bitsandbytes gives to a quantised parameter.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit._codes import NESTED_BLOCK, NF4_BLOCK, dynamic_table, table
from moekit.ops.unpack import Stored, scale_shapes
from moekit.packed._format import Block, Entries, Format, Layout, Part, Shape, divisible, only_block

_SMALLEST = 1e-38  # what a block of zeros is divided by
_GRID = 65535  # bitsandbytes looks codes of scales up in a table of so many steps from -1 to 1
_MARK = ".quant_state.bitsandbytes__nf4"


def block(op: str, height: int, width: int, wanted: Block | None) -> Block:
    """The only block; whole ones make up an expert."""
    divisible(op, "a last dimension (in: nf4 has two values a byte)", width, 2)
    divisible(op, "so many values an expert (out * in: nf4 has blocks of them)", height * width, NF4_BLOCK)
    return only_block(op, "nf4", wanted, (1, NF4_BLOCK))


def layout(shape: Shape, block: Block, double_quant: bool) -> Layout:
    """Codes, and absmax for each block: float32, or in 8 bits with scales of their own and an offset."""
    num_experts, height, width = shape
    codes = Part((num_experts, height, width // 2), (torch.uint8,))
    first, *others = scale_shapes("nf4", shape, block)
    if not double_quant:
        return Layout(codes, [Part(first, (torch.float32,))])
    return Layout(codes, [Part(first, (torch.uint8,)), *(Part(other, (torch.float32,)) for other in others)])


def pack(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """One expert: the nearest of 16 values, the lower one if two are as near."""
    blocks = weight.float().reshape(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=_SMALLEST)).unsqueeze(1)).clamp_(-1, 1)
    codes = _nearest(scaled, table("nf4", weight.device))
    return (codes[:, ::2] << 4 | codes[:, 1::2]).view(weight.shape[0], -1), absmax


def _nearest(values: Tensor, candidates: Tensor) -> Tensor:
    """The places of the nearest candidates, which ascend."""
    return torch.bucketize(values, (candidates[:-1] + candidates[1:]) / 2, out_int32=True).to(torch.uint8)


def compress(absmax: Tensor) -> list[Tensor]:
    """Quantise the scales of a stack around their mean, 256 to a scale of their own."""
    offset = absmax.reshape(-1).mean()
    flat = absmax.reshape(-1) - offset
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    # Where all of a block are the mean, 0 * (1 / 0) is no number: bitsandbytes has code 0 there.
    scaled = (blocks * (1 / nested).unsqueeze(1)).nan_to_num_(-1).clamp_(-1, 1)
    steps = ((scaled + 1) * 0.5 * _GRID + 0.5).int()
    codes = _nearest(steps.float() / _GRID * 2 - 1, dynamic_table(absmax.device))
    return [codes.view(-1)[: len(flat)].view(absmax.shape), nested, offset]


def entries(stored: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
    """As ``QuantState.as_dict(packed=True)`` names them, beside the codes in a column."""
    absmax, *nested = stored.scales
    device = stored.device
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(stored.shape),
    }
    found = {"": stored.codes.view(-1, 1), ".absmax": absmax.view(-1), ".quant_map": table("nf4", device).clone()}
    if nested:
        found |= {".nested_absmax": nested[0], ".nested_quant_map": dynamic_table(device).clone()}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nested[1].item()}
    return found | {_MARK: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def stored(entries: Entries) -> tuple[Stored, torch.dtype]:
    """What bitsandbytes has written, in bytes or, as for FSDP, in another dtype of as many bytes."""
    op, device = entries.op, entries.take("").device
    state = _state(entries)
    shape, dtype = _shape(op, state), entries.dtype or getattr(torch, str(state.get("dtype")), None)
    if state.get("blocksize") != NF4_BLOCK:
        raise _check.fail(op, "blocksize", f"{NF4_BLOCK}", state.get("blocksize"))
    _check_table(entries, ".quant_map", table("nf4", torch.device("cpu")))
    block_ = block(op, shape[1], shape[2], entries.block)
    double_quant = "nested_offset" in state
    parts = layout(shape, block_, double_quant)
    codes = _shaped(entries, "", entries.take("").contiguous().view(torch.uint8), parts.codes)
    scales = [_shaped(entries, ".absmax", entries.take(".absmax"), parts.scales[0])]
    if double_quant:
        if state.get("nested_blocksize") != NESTED_BLOCK:
            raise _check.fail(op, "nested_blocksize", f"{NESTED_BLOCK}", state.get("nested_blocksize"))
        _check_table(entries, ".nested_quant_map", dynamic_table(torch.device("cpu")))
        scales += [entries.take(".nested_absmax"), torch.tensor(state["nested_offset"], dtype=torch.float32, device=device)]
    return Stored(codes, scales, "nf4", block_), dtype or torch.bfloat16


def _state(entries: Entries) -> dict[str, Any]:
    """What is no tensor, which bitsandbytes writes as the bytes of a JSON text."""
    written = entries.take(_MARK).tolist()
    try:
        state = json.loads(bytes(written))
    except (TypeError, ValueError):
        state = None
    if not isinstance(state, dict):
        raise _check.fail(entries.op, entries.prefix + _MARK, "the bytes of a JSON object", f"{written[:20]}...")
    return state


def _shape(op: str, state: dict[str, Any]) -> Shape:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise _check.fail(op, "shape", "[experts, out, in]", shape)
    return shape[0], shape[1], shape[2]


def _shaped(entries: Entries, suffix: str, value: Tensor, part: Part) -> Tensor:
    if value.numel() != torch.Size(part.shape).numel():
        wanted = f"of {torch.Size(part.shape).numel()} elements, for the shape {list(part.shape)}"
        raise _check.fail(entries.op, entries.prefix + suffix, wanted, f"{value.numel()} (truncated?)")
    return value.reshape(part.shape)


def _check_table(entries: Entries, suffix: str, standard: Tensor) -> None:
    """Refuse codes of another table: nothing else would show that every value is wrong."""
    found = entries.take(suffix).cpu()
    if found.shape != standard.shape or not torch.allclose(found.float(), standard, rtol=1e-6, atol=0):
        raise _check.fail(entries.op, entries.prefix + suffix, "the standard table of nf4", "other values")


NF4 = Format(block, layout, pack, _MARK, entries, stored)
