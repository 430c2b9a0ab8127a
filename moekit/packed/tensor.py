"""``PackedExperts``: a tensor that stands for a stack ``[E, out, in]`` and holds the packed bytes of it.

It goes where a weight goes (a frozen parameter, a state dict, another device), and refuses to be computed with: that is for
the values of :meth:`PackedExperts.unpack`, and for the operators that take packed weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import unpack as _ops
from moekit.ops.unpack import Stored
from moekit.packed import _rules
from moekit.packed._format import Block, Entries
from moekit.packed.formats import FORMATS, check_stored, recognise

_PARTS = ("_codes", "_scales", "_nested", "_offset")


class PackedExperts(Tensor):
    """A packed, frozen stack of experts' weights; made by :func:`moekit.pack`.

    It can be a parameter (``torch.nn.Parameter(packed, requires_grad=False)``), moved, copied, saved, and sliced by experts;
    ``.to(dtype)`` changes what it stands for. Its contents can only be replaced as a whole, by loading a state dict.

    Attributes:
        shape: ``[E, out, in]``; ``[E, in, out]`` where :attr:`turned`.
        dtype: the floating-point type that it stands for. Nothing is stored in it.
    """

    is_packed_experts = True  # for those who may not import this class
    _codes: Tensor
    _scales: Tensor
    _nested: Tensor  # the next two where scales are doubly quantised
    _offset: Tensor
    _count: int  # of the parts
    _format: str
    _block: Block
    _turned: bool

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, stored: Stored, dtype: torch.dtype = torch.bfloat16, turned: bool = False, **other: Any) -> Any:
        """Wrap parts that are known to fit; :meth:`of` is the form with checks."""
        if other or not isinstance(stored, Stored):
            raise TypeError(
                "PackedExperts: made by moekit.pack, PackedExperts.of or a state dict, not from a tensor; software that "
                "makes parameters anew, as Accelerate's cpu_offload and disk_offload do, cannot hold packed experts: give "
                "these a device of their own"
            )
        num_experts, height, width = stored.shape
        shape = (num_experts, width, height) if turned else (num_experts, height, width)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=stored.device)
        for name, part in zip(_PARTS, (stored.codes, *stored.scales), strict=False):
            setattr(made, name, part)
        made._count, made._format, made._block, made._turned = 1 + len(stored.scales), stored.format, stored.block, turned
        return made

    @classmethod
    def of(cls, stored: Stored, dtype: torch.dtype = torch.bfloat16) -> PackedExperts:
        """Take parts that were packed elsewhere.

        Args:
            stored: codes and scales, as :mod:`moekit.ops.unpack` describes them.
            dtype: what they stand for.

        Raises:
            ValueError: parts that do not fit together, or (looked at on a CPU) scales that are not finite.
            TypeError: parts of a wrong dtype.
        """
        check_stored("PackedExperts", stored)
        whole = stored._replace(
            codes=stored.codes.detach().contiguous(), scales=[scale.detach().contiguous() for scale in stored.scales]
        )
        return cls(whole, _floating(dtype))

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], prefix: str, *, block: Block | None = None, dtype: torch.dtype | None = None
    ) -> PackedExperts:
        """Take the parts from a checkpoint: one of :meth:`state_dict`'s, or the publishers'. The names say the format.

        Args:
            tensors: among others, those of the weight.
            prefix: the name of the weight, with which theirs begin.
            block: fp8's, if it is neither 128x128 nor a row nor a matrix.
            dtype: what is stood for; what was packed, where that is known (nf4), and bfloat16 where it is not, if None.

        Raises:
            ValueError: no weight of that name in a known format, parts that are missing or do not fit together, scales that
                are not finite, or nf4 with another table or block.
            TypeError: parts of a wrong dtype.
        """
        entries = Entries("PackedExperts.from_state_dict", prefix, tensors, block, dtype)
        return cls.of(*FORMATS[recognise(entries)].stored(entries))

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The parts under the names that checkpoints of the format have, each of which begins with ``prefix``.

        They are those of ``[E, out, in]``, turned or not.
        """
        entries = FORMATS[self.format].entries(self.stored(), self.dtype)
        return {prefix + suffix: part for suffix, part in entries.items()}

    @property
    def stored(self) -> Callable[[], Stored]:
        """``packed.stored()``: codes and scales, as operators and kernels take them, of ``[E, out, in]``, turned or not."""
        # Not a method: torch.compile takes a tensor's method for one operation, but steps into a function.
        return functools.partial(_stored, self)

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
        """The size of what is stored: codes and scales."""
        stored = self.stored()
        return sum(part.nbytes for part in (stored.codes, *stored.scales))

    def unpack(self, experts: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The values.

        Args:
            experts: a slice of them, without a step; all if None.
            dtype: of the result; the one that is stood for if None.

        Returns:
            ``[experts, out, in]``, or a view of that as ``[experts, in, out]`` where :attr:`turned`. It has no gradient.
        """
        start, stop, step = (slice(None) if experts is None else experts).indices(self.shape[0])
        if step != 1:
            raise _check.fail("PackedExperts.unpack", "experts", "a slice without a step", experts)
        values = _ops.unpack(self.stored(), start, max(start, stop), dtype or self.dtype)
        return values.mT if self._turned else values

    # --- the same with something changed ---

    def with_stored(self, stored: Stored) -> PackedExperts:
        """The same of other parts."""
        return PackedExperts(stored, self.dtype, self._turned)

    def with_parts(self, change: Callable[[Tensor], Tensor]) -> PackedExperts:
        """The same with each part changed."""
        stored = self.stored()
        return self.with_stored(stored._replace(codes=change(stored.codes), scales=[change(part) for part in stored.scales]))

    def standing_for(self, dtype: torch.dtype) -> PackedExperts:
        """The same parts for another dtype."""
        return PackedExperts(self.stored(), _floating(dtype), self._turned)

    def turn(self) -> PackedExperts:
        """The same parts seen as ``[E, in, out]``, or as ``[E, out, in]`` again; ``.mT`` gives the same."""
        return PackedExperts(self.stored(), self.dtype, not self._turned)

    # --- as a tensor ---

    def share_memory_(self) -> PackedExperts:
        """Move the parts to shared memory, for other processes; GPU memory is shared as it is."""
        for part in (self._codes, *self._scales):
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether all parts can be seen by other processes."""
        return all(part.is_shared() for part in (self._codes, *self._scales))

    def requires_grad_(self, requires_grad: bool = True) -> PackedExperts:
        """Nothing, or an error: packed weights are frozen."""
        if requires_grad:
            raise _frozen()
        return self

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def data(self) -> Any:
        """The same parts, apart from any parameter."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Any) -> None:
        """Take the parts of another one, and what it stands for."""
        if not isinstance(value, PackedExperts):
            raise _check.wrong_type("PackedExperts", ".data", "a PackedExperts", type(value).__name__)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]  # sizes, dtype and device
        for name in (*_PARTS[: value._count], "_count", "_format", "_block", "_turned"):
            setattr(self, name, getattr(value, name))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _rules.run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(_PARTS[: self._count]), (self._format, self._block, self.dtype, self._turned)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: Any, size: Any, stride: Any) -> PackedExperts:
        codes, *scales = (parts[name] for name in _PARTS if name in parts)
        format, block, dtype, turned = context
        return PackedExperts(Stored(codes, scales, format, block), dtype, turned)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        place = f"{'turned, ' * self._turned}{str(self.dtype).removeprefix('torch.')}, {self.device}"
        return f"PackedExperts({self._format}, {list(self.shape)}, {place}, {self.bytes:,} bytes)"

    def __reduce_ex__(self, protocol: Any) -> tuple:
        stored = self.stored()
        # Bytes as such: pickle, other than torch.save, knows no float8.
        parts = [
            (part.view(torch.uint8) if part.itemsize == 1 else part, part.dtype) for part in (stored.codes, *stored.scales)
        ]
        return _rebuild, (parts, self._format, self._block, self.dtype, self._turned, _is_parameter(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedExperts:
        if id(self) not in memo:
            memo[id(self)] = _as_parameter(self.with_parts(torch.clone), _is_parameter(self))
        return memo[id(self)]

    # --- FSDP2: parts are gathered as they are, in bytes ---

    def fsdp_pre_all_gather(self, mesh: Any, size: Any, stride: Any, module: Any, policy: Any) -> tuple[tuple, Any]:
        """The parts of this rank's experts, and what is the same on all ranks."""
        *parts, offset = (getattr(self, name, None) for name in _PARTS)
        return tuple(part for part in parts if part is not None), offset

    def fsdp_post_all_gather(self, gathered: tuple, offset: Any, dtype: torch.dtype, *, out: Any = None) -> Any:
        """All experts; ``out``, of an earlier time, has the memory that was gathered into for its own already."""
        if out is not None:
            return None
        codes, *scales = gathered
        scales += [] if offset is None else [offset]
        return PackedExperts(Stored(codes, scales, self._format, self._block), dtype, self._turned), gathered


def _stored(packed: PackedExperts) -> Stored:
    scales = [packed._scales] if packed._count == 2 else [packed._scales, packed._nested, packed._offset]
    return Stored(packed._codes, scales, packed._format, packed._block)


def _floating(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _check.FLOATS:
        raise _check.wrong_type("PackedExperts", "dtype", _check.names_of(_check.FLOATS), dtype)
    return dtype


def _frozen() -> RuntimeError:
    return RuntimeError(
        "PackedExperts: packed weights are frozen and cannot require a gradient; use "
        "torch.nn.Parameter(packed, requires_grad=False), and train an adapter beside them"
    )


def _is_parameter(packed: PackedExperts) -> bool:
    return isinstance(packed, torch.nn.Parameter)


def _as_parameter(packed: PackedExperts, wanted: bool) -> Any:
    return torch.nn.Parameter(packed, requires_grad=False) if wanted else packed


def _rebuild(
    parts: list[tuple[Tensor, torch.dtype]], format: str, block: Block, dtype: torch.dtype, turned: bool, parameter: bool
) -> Any:
    """What was pickled."""
    codes, *scales = (part.view(kind) for part, kind in parts)
    return _as_parameter(PackedExperts(Stored(codes, scales, format, block), dtype, turned), parameter)


def _refuse(name: str) -> Callable:
    """Python's operators, whose TypeError PyTorch would take for a wish to try the other operand's."""

    def refused(self: PackedExperts, *others: object) -> Any:
        raise TypeError(f"PackedExperts: {name} is not defined for packed weights; use .unpack()")

    return refused


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
for _name in (*(prefix + name for name in _BINARY for prefix in ("", "r", "i")), *_COMPARISONS):
    setattr(PackedExperts, f"__{_name}__", _refuse(f"__{_name}__"))
torch.serialization.add_safe_globals([_rebuild])
