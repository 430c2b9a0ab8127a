"""From floating-point weights to packed ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops.unpack import Stored
from moekit.packed import nf4
from moekit.packed._format import Block, Shape
from moekit.packed.formats import FORMATS
from moekit.packed.tensor import PackedExperts


@torch.no_grad()
def pack(weight: Tensor, format: str, *, double_quant: bool = False, block: Block | None = None) -> PackedExperts:
    """Pack a stack of experts' weights: deterministic, and bit for bit what the publishers' own packers make.

    Args:
        weight: ``[E, out, in]``, floating; any strides (``w.mT`` of a stack that is stored as ``[E, in, out]``).
        format: ``"nf4"``, ``"mxfp4"``, ``"fp8"`` or ``"int8"``; see :mod:`moekit.ops.unpack`.
        double_quant: nf4's scales in 8 bits, with scales of their own.
        block: fp8's rows and columns that share a scale: 128x128 unless given, ``(1, in)`` for a scale a row.

    Returns:
        The packed stack, which stands for the dtype of ``weight`` and is on its device. It is frozen: it has no gradient.

    Raises:
        ValueError: an unknown format, sizes that are not made of whole blocks, or (looked at on a CPU) weights that are
            not finite.
        TypeError: what is no plain floating-point tensor.

    Experts are packed one by one, so that of one there are copies in float32 at a time.

    Examples:
        >>> import torch, moekit
        >>> weight = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(0))
        >>> packed = moekit.pack(weight, "nf4")
        >>> packed.shape, packed.bytes, weight.nbytes
        (torch.Size([4, 64, 128]), 18432, 131072)
        >>> bool((packed.unpack() - weight).norm() / weight.norm() < 0.1)
        True
    """
    op = "pack"
    _check.one_of(op, "format", format, FORMATS)
    _check.computable(op, "weight", weight)
    _check.tensor_dim(op, "weight", weight, 3)
    if double_quant and format != "nf4":
        raise _check.unused(op, "double_quant", double_quant, f"on {format}")
    row = FORMATS[format]
    num_experts, height, width = weight.shape
    if not weight.numel():
        raise _check.fail(op, "weight", "of at least one value", f"shape {list(weight.shape)}")
    block, shape = row.block(op, height, width, block), (num_experts, height, width)
    stored = pack_each(lambda expert: weight[expert], shape, format, block, weight.device, double_quant=double_quant)
    return PackedExperts.of(stored, weight.dtype)


def pack_each(
    values: Callable[[int], Tensor], shape: Shape, format: str, block: Block, device: torch.device, *, double_quant: bool
) -> Stored:
    """Pack a stack ``[E, out, in]`` of which ``values`` gives an expert at a time, in order."""
    row = FORMATS[format]
    layout = row.layout(shape, block, False)
    codes, scales = layout.codes.empty(device), layout.scales[0].empty(device)
    for expert in range(shape[0]):
        weight = values(expert).contiguous()
        _check_finite(weight, expert)
        codes[expert], scales[expert] = row.pack(weight, block)
    return Stored(codes, nf4.compress(scales) if double_quant else [scales], format, block)


def _check_finite(weight: Tensor, expert: int) -> None:
    if _backend.checks_values(weight) and not bool(torch.isfinite(weight).all()):
        raise _check.fail("pack", "weight", "finite", f"infinities or NaN in expert {expert}")
