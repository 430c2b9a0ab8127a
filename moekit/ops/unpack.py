"""Packed stacks of experts' weights: how they are stored, and what their bytes stand for.

A stack ``[E, out, in]`` is stored as codes and scales, in blocks along ``in``:

========  ===============================  ========================================  =================================
format    codes                            scales                                    value
========  ===============================  ========================================  =================================
nf4       uint8 ``[E, out, in/2]``         absmax float32 ``[E, out*in/64]``         ``NF4[nibble] * absmax``
mxfp4     uint8 ``[E, out, in/2]``         exponents uint8 ``[E, out, in/32]``       ``E2M1[nibble] * 2**(s - 127)``
fp8       float8_e4m3fn ``[E, out, in]``   ``[E, ceil(out/bm), ceil(in/bn)]``        ``code * scale``
int8      int8 ``[E, out, in]``            absmax float32 ``[E, out]``               ``code * absmax * (1 / 127)``
========  ===============================  ========================================  =================================

A byte of nf4 has the first of its two values in the high nibble (bitsandbytes), a byte of mxfp4 in the low one (gpt-oss).
A block of nf4 is 64 values in the flat order of an expert. Doubly quantised, its scales are absmax uint8 ``[E, out*in/64]``,
nested absmax float32, one for 256 of those in the flat order of the stack, and an offset float32 ``[]``:
``absmax = DYNAMIC[byte] * nested + offset``.

Values are computed in float32 (in float64 for a float64 result), in the order in which the table says, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit._codes import MXFP4_BLOCK, NESTED_BLOCK, NF4_BLOCK, dynamic_table, pair_table, powers_of_two
from moekit.ops import _library

FOUR_BITS = ("nf4", "mxfp4")  # two values a byte
_SCALES = ("scale", "nested", "offset")


class Stored(NamedTuple):
    """A packed stack as operators and kernels see it; the module's docstring says what the parts are."""

    codes: Tensor
    scales: list[Tensor]
    format: str
    block: tuple[int, int]  # rows and columns that share a scale; nf4: (1, 64), of the flat order

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(E, out, in)``."""
        num_experts, height, width = self.codes.shape
        return num_experts, height, width * (2 if self.format in FOUR_BITS else 1)

    def checked(self, op: str) -> Stored:
        """Itself, once the parts belong together: an operator is given them one by one, and kernels go by the codes."""
        _check.one_of(op, "format", self.format, _VALUES)
        _check.tensor_dim(op, "codes", self.codes, 3)
        shapes = scale_shapes(self.format, self.shape, self.block)
        if len(self.scales) not in (1, len(shapes)):
            raise _check.fail(op, "scales", "one tensor, or three of nf4 quantised doubly", len(self.scales))
        for name, scale, shape in zip(_SCALES, self.scales, shapes, strict=False):
            _check.shape(op, name, scale, shape, f"as {self.format} has for codes of shape {list(self.codes.shape)}")
        return self

    @property
    def device(self) -> torch.device:
        """The device of all parts."""
        return self.codes.device


def scale_shapes(format: str, shape: tuple[int, int, int], block: tuple[int, int]) -> list[tuple[int, ...]]:
    """The shapes of the scales that ``[E, out, in]`` may have in a format: one, and two more of nf4 quantised doubly."""
    num_experts, height, width = shape
    if format == "nf4":
        blocks = height * width // NF4_BLOCK
        return [(num_experts, blocks), (-(-num_experts * blocks // NESTED_BLOCK),), ()]
    if format == "mxfp4":
        return [(num_experts, height, width // MXFP4_BLOCK)]
    if format == "int8":
        return [(num_experts, height)]
    return [(num_experts, -(-height // max(block[0], 1)), -(-width // max(block[1], 1)))]


def unpack(stored: Stored, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The values of the experts ``start`` to ``stop``.

    Args:
        stored: ``[E, out, in]``, packed.
        start: the first expert.
        stop: one past the last.
        dtype: of the result.
        out: ``[stop - start, out, in]`` of ``dtype``, contiguous, to write into; nothing is recorded of that.

    Returns:
        ``[stop - start, out, in]``, which has no gradient.

    Raises:
        ValueError: experts that there are not, or an ``out`` that does not fit.
    """
    _check_slice(stored, start, stop)
    if dtype not in _check.FLOATS:
        raise _check.wrong_type("unpack", "dtype", _check.names_of(_check.FLOATS), dtype)
    if out is None:
        return _unpack(stored.codes, stored.scales, stored.format, stored.block, start, stop, dtype)
    _check.shape("unpack", "out", out, (stop - start, *stored.shape[1:]), "[experts, out, in]")
    if out.dtype != dtype or not out.is_contiguous():
        raise _check.wrong_type("unpack", "out", f"contiguous, of {dtype}", f"{out.dtype} with strides {out.stride()}")
    return _run(stored, start, stop, dtype, out)


def _check_slice(stored: Stored, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= stored.shape[0]:
        raise _check.fail("unpack", "experts", f"a slice of the {stored.shape[0]}", f"{start}:{stop}")


def float_scales(stored: Stored, start: int, stop: int) -> Tensor:
    """The scales of the experts ``start`` to ``stop``: float32, in their stored shape, and not quantised themselves."""
    first = stored.scales[0][start:stop]
    if stored.format == "mxfp4":
        return powers_of_two(first)
    if len(stored.scales) == 1:
        return first.float()
    _, nested, offset = stored.scales
    blocks = first.shape[1]
    groups = torch.arange(start * blocks, stop * blocks, device=first.device) // NESTED_BLOCK
    values = dynamic_table(first.device).index_select(0, first.reshape(-1).int())
    return (values * nested.index_select(0, groups) + offset).view(first.shape)


def _pairs(stored: Stored, expert: int, wide: torch.dtype) -> Tensor:
    codes = stored.codes[expert].reshape(-1).int()
    return pair_table(stored.format, codes.device).to(wide).index_select(0, codes)


def _four_bits(stored: Stored, expert: int, scale: Tensor) -> Tensor:
    """nf4 and mxfp4: blocks of as many values as there are for a scale, in the flat order of an expert."""
    return _pairs(stored, expert, scale.dtype).view(scale.numel(), -1) * scale.reshape(-1, 1)


def _fp8(stored: Stored, expert: int, scale: Tensor) -> Tensor:
    codes = stored.codes[expert]
    (height, width), (down, across) = codes.shape, stored.block
    spread = scale.repeat_interleave(down, 0)[:height].repeat_interleave(across, 1)[:, :width]
    return codes.to(scale.dtype) * spread


def _int8(stored: Stored, expert: int, scale: Tensor) -> Tensor:
    return stored.codes[expert] * scale.unsqueeze(1) * (1 / 127)


_VALUES: dict[str, Callable[[Stored, int, Tensor], Tensor]] = {
    "nf4": _four_bits,
    "mxfp4": _four_bits,
    "fp8": _fp8,
    "int8": _int8,
}


def _run(stored: Stored, start: int, stop: int, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The kernel of the backend, or the reference: expert by expert, so that float32 values of one exist at a time."""
    kernel = _backend.kernel("unpack", stored.codes)
    found = NotImplemented if kernel is None else kernel(stored, start, stop, dtype, out)
    if found is not NotImplemented:
        return found
    if out is None:
        out = torch.empty(stop - start, *stored.shape[1:], dtype=dtype, device=stored.device)
    wide = torch.promote_types(dtype, torch.float32)
    for expert in range(start, stop):
        scale = float_scales(stored, expert, expert + 1)[0].to(wide)
        out[expert - start].copy_(_VALUES[stored.format](stored, expert, scale).view(stored.shape[1:]))
    return out


def _operator(
    codes: Tensor, scales: list[Tensor], format: str, block: list[int], start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    stored = Stored(codes, scales, format, (block[0], block[1])).checked("unpack")
    _check_slice(stored, start, stop)
    return _run(stored, start, stop, dtype, None)


def _fake(
    codes: Tensor, scales: list[Tensor], format: str, block: list[int], start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    shape = Stored(codes, scales, format, (block[0], block[1])).shape
    return codes.new_empty(stop - start, *shape[1:], dtype=dtype)


_unpack = _library.define(
    "unpack(Tensor codes, Tensor[] scales, str format, int[] block, int start, int stop, ScalarType dtype) -> Tensor",
    reference=_operator,
    fake=_fake,
    kernels=False,
)
