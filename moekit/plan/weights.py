"""Bytes of a stack of experts' weights in each format, from the layouts of :mod:`moekit.packed`."""

from __future__ import annotations

import math
from collections.abc import Callable

from moekit import _check

Shape = tuple[int, int, int]
FORMATS = ("nf4", "mxfp4", "fp8", "int8")


def packed_bytes(shape: Shape, format: str, *, double_quant: bool = False) -> int:
    """What :func:`moekit.pack` makes of a stack.

    Args:
        shape: ``[E, out, in]``.
        format: one of :data:`FORMATS`, in its usual block.
        double_quant: scales of ``nf4`` in 8 bits.

    Raises:
        ValueError: an unknown format, one that has no such blocks, or ``double_quant`` of another format.
    """
    from moekit.packed.formats import FORMATS as known

    _check.one_of("plan", "format", format, FORMATS)
    if double_quant and format != "nf4":
        raise _check.fail("plan", "double_quant", "False for all formats but nf4", f"True for {format}")
    row = known[format]
    layout = row.layout(shape, row.block("plan", shape[1], shape[2], None), double_quant)
    return sum(math.prod(part.shape) * part.dtypes[0].itemsize for part in (layout.codes, *layout.scales))


def in_every_format(of: Callable[[str, bool], int]) -> dict[str, int | None]:
    """Bytes by format, by a function of it and of ``double_quant``; None for what does not fit into its blocks."""
    kinds = {"nf4": ("nf4", False), "nf4, double_quant": ("nf4", True)} | {name: (name, False) for name in FORMATS[1:]}
    found: dict[str, int | None] = {}
    for name, kind in kinds.items():
        try:
            found[name] = of(*kind)
        except ValueError:
            found[name] = None
    return found
