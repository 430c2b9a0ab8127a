"""Transformers' FP8 experts (FineGrainedFP8 checkpoints): ``float8_e4m3fn`` weights with a scale a block.

They run as packed weights do, in the bytes they are stored in: the products of the stored weights and scales, with
activations that are not quantised. The weights are frozen; gradients go to the tokens and the routing weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.hf.experts import Adapters, experts_forward, run
from moekit.hf.weights import Weights, plain
from moekit.ops.unpack import Stored
from moekit.packed import PackedExperts
from moekit.routing import Routing

_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def fp8_experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor | Routing,
    top_k_weights: Tensor,
    *,
    save: str = "recompute",
    lora: Adapters | None = None,
) -> Tensor:
    """The forward of an FP8 experts module of Transformers.

    Args:
        module: an instance of Transformers' ``FP8Experts``.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]`` integers; the number of experts marks a slot of another expert-parallel rank. Or a routing.
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
    gate_up = _packed(module, first, 2 if module.has_gate else 1, hidden_states.dtype)
    down = _packed(module, "down_proj", 1, hidden_states.dtype)
    weights = Weights(gate_up, down, None, None)
    return run(module, hidden_states, top_k_index, top_k_weights, weights, save, lora or {}).to(hidden_states.dtype)


def _packed(module: Any, name: str, halves: int, dtype: torch.dtype) -> PackedExperts:
    """A weight's codes and scales, standing for ``dtype``; ``halves`` of it may not share a block."""
    codes, scales = plain(module, name, (torch.float8_e4m3fn,)), plain(module, f"{name}_scale_inv", _SCALES)
    (height, width), (rows, columns) = codes.shape[1:], scales.shape[1:]
    if module.block_size is None:
        block, fits = (height // max(1, rows), width), columns == 1 and height % max(1, rows) == 0
    else:
        block = down, across = tuple(module.block_size)
        fits = (rows, columns) == (-(-height // down), -(-width // across)) and (halves == 1 or height // halves % down == 0)
    if not fits:
        argument = f"{type(module).__name__}.{name}_scale_inv"
        wanted = f"one scale for each block {module.block_size} of {list(codes.shape)}, and gate and up of whole blocks"
        raise _check.fail("hf", argument, wanted, f"shape {list(scales.shape)}")
    scales = scales.detach()
    return PackedExperts(
        Stored(codes.detach(), [scales.float() if scales.dtype is torch.float16 else scales], "fp8", block), dtype
    )
