"""From floating-point weights to packed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops.unpack import Stored
from moekit.packed import nf4
from moekit.packed._format import Block, empty
from moekit.packed.formats import FORMATS
from moekit.packed.tensor import PackedExperts


@torch.no_grad()
def pack(weight: Tensor, format: str, *, double_quant: bool = False, block: Block | None = None) -> PackedExperts:
    """Pack a stack of experts' weights.

    Args:
        weight: ``[E, out, in]``, floating; any strides (``w.mT`` of a stack that is stored ``[E, in, out]``).
        format: ``"nf4"``, ``"mxfp4"``, ``"fp8"`` or ``"int8"``.
        double_quant: nf4's scales in 8 bits, with scales of their own.
        block: fp8's rows and columns that share a scale: ``(128, 128)`` unless given, ``(1, in)`` for a scale a row.

    Returns:
        The packed stack, of the dtype and on the device of ``weight``: what the publishers' own packers make, bit for bit. It
        is frozen: it has no gradient.

    Raises:
        ValueError: an unknown format, sizes that are not made of whole blocks, or weights that are not finite.
        TypeError: what is no plain floating-point tensor.

    The float32 values of one expert exist at a time.
    """
    op = "pack"
    _check.one_of(op, "format", format, FORMATS)
    _check.tensor_dim(op, "weight", weight, 3)
    _check.computable(op, "weight", weight)
    if double_quant and format != "nf4":
        raise _check.unused(op, "double_quant", double_quant, f"on {format}, whose scales stay as they are")
    row = FORMATS[format]
    num_experts, height, width = weight.shape
    block = row.block(op, height, width, block)
    layout = row.layout((num_experts, height, width), block, False)
    codes, scales = empty(layout.codes, weight.device), empty(layout.scales[0], weight.device)
    for expert in range(num_experts):
        _check_finite(weight[expert], expert)
        found = row.pack(weight[expert], block)
        codes[expert], scales[expert] = found
    parts = nf4.compress(scales) if double_quant else [scales]
    return PackedExperts.of(Stored(codes, parts, format, block), weight.dtype)


def _check_finite(weight: Tensor, expert: int) -> None:
    if weight.numel() and _backend.checks_values(weight) and not bool(torch.isfinite(weight).all()):
        raise _check.fail("pack", "weight", "finite", f"infinities or NaN in expert {expert}")
