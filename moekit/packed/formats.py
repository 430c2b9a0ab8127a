"""The table of formats, and what is checked of a packed stack whatever its format."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops.unpack import Stored
from moekit.packed._format import Format, check_part
from moekit.packed.fp8 import FP8
from moekit.packed.int8 import INT8
from moekit.packed.mxfp4 import MXFP4
from moekit.packed.nf4 import NF4

FORMATS: dict[str, Format] = {"nf4": NF4, "mxfp4": MXFP4, "fp8": FP8, "int8": INT8}


def check_stored(op: str, stored: Stored) -> None:
    """The parts fit together and, where that may be looked at, the scales are finite."""
    _check.one_of(op, "format", stored.format, FORMATS)
    row = FORMATS[stored.format]
    _check.tensor_dim(op, "codes", stored.codes, 3)
    shape = stored.shape
    block = row.block(op, shape[1], shape[2], stored.block)
    layout = row.layout(shape, block, len(stored.scales) > 1)
    check_part(op, "codes", stored.codes, layout.codes)
    if len(stored.scales) != len(layout.scales):
        raise _check.fail(op, "scales", f"{len(layout.scales)} tensors", len(stored.scales))
    for number, (scale, part) in enumerate(zip(stored.scales, layout.scales, strict=True)):
        check_part(op, f"scales[{number}]", scale, part)
        _check_finite(op, f"scales[{number}]", scale, stored.format)
    named = {f"scales[{number}]": scale for number, scale in enumerate(stored.scales)}
    _check.same_device(op, codes=stored.codes, **named)


def _check_finite(op: str, name: str, scale: Tensor, format: str) -> None:
    if not scale.numel() or not _backend.checks_values(scale):
        return
    if format == "mxfp4":
        finite = bool((scale != 255).all())  # e8m0's NaN
    else:
        finite = bool(torch.isfinite(scale.float()).all())
    if not finite:
        raise _check.fail(op, name, "finite", "a scale that is not")
