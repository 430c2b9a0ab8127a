"""``PackedExperts``: a tensor that stands for a stack ``[E, out, in]`` and holds the packed bytes of it.

It goes where a weight goes (a frozen parameter, a state dict, another device), and refuses to be computed with: what is computed
are the values of :meth:`PackedExperts.unpack`, or products by the operators that take packed weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import unpack as _ops
from moekit.ops.unpack import Stored
from moekit.packed.formats import check_stored

_aten: Any = torch.ops.aten


class PackedExperts(Tensor):
    """A packed, frozen stack of experts' weights; made by :func:`moekit.pack`.

    Attributes:
        shape: ``[E, out, in]``; ``[E, in, out]`` where :attr:`turned`.
        dtype: what it stands for. Nothing is stored in it.
    """

    _codes: Tensor
    _scales: list[Tensor]
    _format: str
    _block: tuple[int, int]
    _turned: bool

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, stored: Stored, dtype: torch.dtype, turned: bool = False) -> PackedExperts:
        num_experts, height, width = stored.shape
        shape, strides = (num_experts, height, width), (height * width, width, 1)
        if turned:
            shape, strides = (num_experts, width, height), (height * width, 1, width)
        made = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=stored.device)
        made._codes, made._scales = stored.codes, list(stored.scales)
        made._format, made._block, made._turned = stored.format, tuple(stored.block), turned
        return made

    @classmethod
    def of(cls, stored: Stored, dtype: torch.dtype = torch.bfloat16) -> PackedExperts:
        """Take parts that were packed elsewhere.

        Args:
            stored: codes and scales, as :mod:`moekit.ops.unpack` describes them.
            dtype: what they stand for.

        Raises:
            ValueError: parts that do not fit together, or scales that are not finite.
            TypeError: parts of a wrong dtype.
        """
        check_stored("PackedExperts", stored)
        if dtype not in _check.FLOATS:
            raise _check.wrong_type("PackedExperts", "dtype", _check.names_of(_check.FLOATS), dtype)
        return cls(stored, dtype)

    def stored(self) -> Stored:
        """The codes and scales, as operators and kernels take them: ``[E, out, in]``, turned or not."""
        return Stored(self._codes, self._scales, self._format, self._block)

    @property
    def format(self) -> str:
        """``"nf4"``, ``"mxfp4"``, ``"fp8"`` or ``"int8"``."""
        return self._format

    @property
    def turned(self) -> bool:
        """Whether it is seen as ``[E, in, out]``."""
        return self._turned

    @property
    def bytes(self) -> int:
        """What is stored: codes and scales."""
        return sum(part.numel() * part.element_size() for part in (self._codes, *self._scales))

    def unpack(self, experts: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The values.

        Args:
            experts: which; all if None. Without a step.
            dtype: of the result; the one that is stood for if None.

        Returns:
            ``[experts, out, in]``, a view of that as ``[experts, in, out]`` where :attr:`turned`; without a gradient.
        """
        start, stop, step = (experts or slice(None)).indices(len(self))
        if step != 1:
            raise _check.fail("PackedExperts.unpack", "experts", "a slice without a step", experts)
        values = _ops.unpack(self.stored(), start, max(start, stop), dtype or self.dtype)
        return values.mT if self._turned else values

    def __repr__(self, *, tensor_contents: object = None) -> str:
        turned = ", turned" if self._turned else ""
        place = f"{str(self.dtype).removeprefix('torch.')}, {self.device}"
        return f"PackedExperts({self._format}, {list(self.shape)}{turned}, {place}, {self.bytes:,} bytes)"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["_codes", *(f"_scale{number}" for number in range(len(self._scales)))]
        return names, (self._format, self._block, self.dtype, self._turned)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: Any, size: Any, stride: Any) -> PackedExperts:
        format, block, dtype, turned = context
        codes, *scales = parts.values()
        return PackedExperts(Stored(codes, scales, format, block), dtype, turned)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        if rule is None or not isinstance(args[0], PackedExperts):
            raise TypeError(f"PackedExperts: {func} is not defined for packed weights; use .unpack()")
        return rule(args[0], *args[1:], **(kwargs or {}))

    def _with(self, part: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> PackedExperts:
        """The same with each part changed."""
        stored = Stored(part(self._codes), [part(scale) for scale in self._scales], self._format, self._block)
        return PackedExperts(stored, dtype or self.dtype, self._turned)


def _detach(packed: PackedExperts) -> PackedExperts:
    return packed._with(Tensor.detach)


def _clone(packed: PackedExperts, *, memory_format: Any = None) -> PackedExperts:
    return packed._with(torch.clone)


def _to_copy(packed: PackedExperts, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> Any:
    return packed._with(lambda part: part.to(device or part.device, non_blocking=non_blocking, copy=True), dtype)


def _transpose(packed: PackedExperts, first: int, second: int) -> PackedExperts:
    if {first % 3, second % 3} != {1, 2}:
        raise _check.fail("PackedExperts.transpose", "dims", "the last two", (first, second))
    return PackedExperts(packed.stored(), packed.dtype, not packed.turned)


_RULES: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.transpose.int: _transpose,
}
