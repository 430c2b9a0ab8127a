"""Transformers' FP8 experts (FineGrainedFP8 checkpoints): ``float8_e4m3fn`` weights with a scale a block.

The weights are dequantised for a slice of the experts at a time, and the layer is computed with them as any other: the
products of the stored weights and scales, with activations that are not quantised. In training the slices are made
again in backward. The weights are frozen; gradients go to the tokens and the routing weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moekit import _check
from moekit.hf.experts import Adapters, experts_forward, run
from moekit.hf.weights import Weights, plain
from moekit.ops._library import needs_grad
from moekit.ops.lora import Lora

_SLICE_BYTES = 2**30  # of dequantised weights at a time
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def fp8_experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    save: str = "recompute",
    lora: Adapters | None = None,
) -> Tensor:
    """The forward of an FP8 experts module of Transformers.

    Args:
        module: an instance of Transformers' ``FP8Experts``.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]`` integers; the number of experts marks a slot of another expert-parallel rank.
        top_k_weights: ``[T, K]`` routing weights.
        save: as in :func:`moekit.experts`.
        lora: as there; what :mod:`moekit.hf.peft` hands on.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``.

    Raises:
        TypeError: weights that are not float8_e4m3fn (packed 4-bit codes, say).
        NotImplementedError: activations with a static scale.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    if getattr(module, first).element_size() > 1:  # not quantised after all
        return experts_forward(module, hidden_states, top_k_index, top_k_weights, save=save, lora=lora)
    if module.activation_scheme == "static":
        raise NotImplementedError(
            "moekit.hf: FP8 experts with activation_scheme='static' clip their activations, which moekit does not do; "
            "use experts_implementation='eager'"
        )
    _check.computable("hf", "hidden_states", hidden_states)
    stored = (*_stored(module, first, 2 if module.has_gate else 1), *_stored(module, "down_proj", 1))
    block, num_experts = module.block_size, stored[0].shape[0]
    expert_bytes = (stored[0][:1].numel() + stored[2][:1].numel()) * hidden_states.element_size()
    count = max(1, _SLICE_BYTES // max(1, expert_bytes))

    def part(x: Tensor, weights: Tensor, start: int) -> Tensor:
        here = slice(start, start + count)
        codes, scales, down_codes, down_scales = (tensor[here] for tensor in stored)
        gate_up = _dequantised(codes, scales, block, x.dtype)
        down = _dequantised(down_codes, down_scales, block, x.dtype)
        mine = (top_k_index >= start) & (top_k_index < start + codes.shape[0])
        indices = torch.where(mine, top_k_index - start, -1)
        adapters = {name: [_of_experts(adapter, here) for adapter in given] for name, given in (lora or {}).items()}
        return run(module, x, indices, weights, Weights(gate_up, down, None, None), save, adapters)

    factors = [factor for given in (lora or {}).values() for adapter in given for factor in (adapter.A, adapter.B)]
    training = needs_grad(hidden_states, top_k_weights, *factors)
    parts = []
    for start in range(0, num_experts, count):
        args = (hidden_states, top_k_weights, start)
        parts.append(checkpoint(part, *args, use_reentrant=False) if training else part(*args))
    return parts[0] if len(parts) == 1 else torch.stack([out.float() for out in parts]).sum(0).to(hidden_states.dtype)


def _of_experts(adapter: Lora, experts: slice) -> Lora:
    return adapter._replace(A=adapter.A[experts], B=adapter.B[experts])


def _stored(module: Any, name: str, halves: int) -> tuple[Tensor, Tensor]:
    """The codes and scales of a weight; ``halves`` of it may not share a block."""
    codes, scales = plain(module, name, (torch.float8_e4m3fn,)), plain(module, f"{name}_scale_inv", _SCALES)
    (height, width), (rows, columns) = codes.shape[1:], scales.shape[1:]
    if module.block_size is None:
        fits = height % rows == 0 and columns == 1
    else:
        down, across = module.block_size
        fits = (rows, columns) == (-(-height // down), -(-width // across)) and (halves == 1 or height // halves % down == 0)
    if not fits:
        argument = f"{type(module).__name__}.{name}_scale_inv"
        wanted = f"one scale for each block {module.block_size} of {list(codes.shape)}, and gate and up of whole blocks"
        raise _check.fail("hf", argument, wanted, f"shape {list(scales.shape)}")
    return codes.detach(), scales.detach()


def _dequantised(codes: Tensor, scales: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """``[E, N, K]`` codes times their scales, each rounded once to ``dtype``."""
    height, width = codes.shape[1:]
    down, across = block or (height // scales.shape[1], width)
    wide = scales.float().repeat_interleave(down, 1)[:, :height]
    return (codes.float() * wide.repeat_interleave(across, 2)[:, :, :width]).to(dtype)
