"""The table of formats, and what is done with a packed stack whatever its format."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit._codes import NESTED_BLOCK
from moekit.ops.unpack import Stored, float_scales
from moekit.packed._format import Entries, Format
from moekit.packed.fp8 import FP8
from moekit.packed.int8 import INT8
from moekit.packed.mxfp4 import MXFP4
from moekit.packed.nf4 import NF4

FORMATS: dict[str, Format] = {"nf4": NF4, "mxfp4": MXFP4, "fp8": FP8, "int8": INT8}


def check_stored(op: str, stored: Stored) -> None:
    """The parts fit together and, where that may be looked at, the scales are finite."""
    _check.one_of(op, "format", stored.format, FORMATS)
    _check.tensor_dim(op, "codes", stored.codes, 3)
    row, shape = FORMATS[stored.format], stored.shape
    block = row.block(op, shape[1], shape[2], stored.block)
    layout = row.layout(shape, block, len(stored.scales) > 1)
    layout.codes.check(op, "codes", stored.codes)
    if len(stored.scales) != len(layout.scales):
        raise _check.fail(op, "scales", f"{len(layout.scales)} for {stored.format}", len(stored.scales))
    names = [f"scales[{number}]" for number in range(len(stored.scales))]
    for name, scale, part in zip(names, stored.scales, layout.scales, strict=True):
        part.check(op, name, scale)
        _check_finite(op, name, scale, stored.format)
    _check.same_device(op, codes=stored.codes, **dict(zip(names, stored.scales, strict=True)))


def _check_finite(op: str, name: str, scale: Tensor, format: str) -> None:
    if not scale.numel() or not _backend.checks_values(scale):
        return
    exponents = format == "mxfp4"  # the largest of which says: no number
    if bool((scale == 255).any()) if exponents else not bool(torch.isfinite(scale.float()).all()):
        raise _check.fail(op, name, "finite", "255, which is no number" if exponents else "infinities or NaN")


def recognise(entries: Entries) -> str:
    """The format that tensors of a checkpoint are in, by their names."""
    for name, row in FORMATS.items():
        if entries.prefix + row.mark in entries.tensors:
            return name
    wanted = "with one of " + ", ".join(repr(entries.prefix + row.mark) for row in FORMATS.values())
    found = sorted(name for name in entries.tensors if name.startswith(entries.prefix))
    raise _check.fail(entries.op, "tensors", wanted, found or "none of that prefix")


def some_experts(stored: Stored, start: int, stop: int) -> Stored:
    """The experts ``start`` to ``stop``, as views.

    Where they begin within a block of doubly quantised scales there is no such view: these have their scales in float32.
    """
    first, *nested = stored.scales
    scales = [first[start:stop]]
    if nested:
        blocks = first.shape[1]
        begin, end = start * blocks, stop * blocks
        if begin % NESTED_BLOCK:
            scales = [float_scales(stored, start, stop)]
        else:
            scales += [nested[0][begin // NESTED_BLOCK : -(-end // NESTED_BLOCK)], nested[1]]
    return stored._replace(codes=stored.codes[start:stop], scales=scales)
