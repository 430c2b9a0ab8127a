"""What PyTorch may do to packed weights: move and copy them, and take some of the experts. Nothing that computes.

FSDP2 asks for more than a user would: it splits a parameter, copies its shard into one of zeros, flattens it and gives it
its shape back. A packed stack has no elements to rearrange, so that it stays as it is in all of these (and in ``flatten``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit import _check
from moekit.packed.formats import some_experts

if TYPE_CHECKING:
    from moekit.packed.tensor import PackedExperts

_aten: Any = torch.ops.aten
_SENDING = ("aten.cat.default", "c10d.broadcast_.default")  # how DDP sends parameters: many as one, or a large one alone


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """The operator ``func``, if packed weights have it."""
    rule = RULES.get(func)
    of_packed = getattr(args[0], "is_packed_experts", False)
    if rule is not None and of_packed:
        # Of a tensor that inference mode did not make, it takes no views either.
        with torch.inference_mode(args[0].is_inference()):
            return rule(args[0], *args[1:], **kwargs)
    if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return func.decompose(*args, **kwargs)  # in inference mode nobody else has taken it apart
    changes = of_packed and func._schema.is_mutable
    taken = " (Transformers' experts take them with experts_implementation='moekit'); use .unpack()"
    if str(func) in _SENDING:
        taken = "; use .unpack(), or before DistributedDataParallel call moekit.ep.hide_from_ddp on what it is given"
    hint = ", which are immutable" if changes else taken
    raise TypeError(f"PackedExperts: {func} is not defined for packed weights{hint}")


def _view(packed: PackedExperts) -> PackedExperts:
    return packed.with_parts(torch.Tensor.detach)


def _clone(packed: PackedExperts, *, memory_format: Any = None) -> PackedExperts:
    return packed.with_parts(torch.clone)


def _to_copy(
    packed: PackedExperts, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> PackedExperts:
    """Another dtype is another thing to stand for: it takes no copy."""
    moved = device is not None and torch.device(device) != packed.device
    if dtype not in (None, packed.dtype) and not moved:
        return packed.standing_for(dtype)
    copied = packed.with_parts(lambda part: part.to(device, non_blocking=non_blocking, copy=True))
    return copied.standing_for(dtype or packed.dtype)


def _transpose(packed: PackedExperts, first: int, second: int) -> PackedExperts:
    if {first % 3, second % 3} != {1, 2}:
        raise _check.fail("PackedExperts.transpose", "dims", "the last two", (first, second))
    return packed.turn()


def _slice(packed: PackedExperts, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if dim % 3 or step != 1:
        got = f"dimension {dim} with step {step}"
        raise _check.fail("PackedExperts", "index", "a slice of experts (dimension 0) without a step", got)
    first, last, _ = slice(start, end).indices(len(packed))
    return _experts(packed, first, max(first, last))


def _experts(packed: PackedExperts, start: int, stop: int) -> PackedExperts:
    return packed.with_stored(some_experts(packed.stored(), start, stop))


def _copy(packed: PackedExperts, source: Any, non_blocking: bool = False) -> PackedExperts:
    """How a state dict is loaded, and a shard filled: with what was packed in the same way."""
    if not isinstance(source, type(packed)) or _kind(source) != _kind(packed):
        raise TypeError(f"PackedExperts: only what is packed in the same way can be copied into {packed}, got {source!r}")
    for mine, other in zip(_parts(packed), _parts(source), strict=True):
        mine.copy_(other, non_blocking=non_blocking)
        torch.autograd.graph.increment_version(mine)  # here, below autograd, nobody else does
    return packed


def _kind(packed: PackedExperts) -> tuple:
    return packed.format, packed.turned, packed.stored().block, [(part.shape, part.dtype) for part in _parts(packed)]


def _parts(packed: PackedExperts) -> list[Tensor]:
    stored = packed.stored()
    return [stored.codes, *stored.scales]


def _empty_like(packed: PackedExperts, *, device: Any = None, dtype: Any = None, **_: Any) -> PackedExperts:
    made = packed.with_parts(lambda part: torch.empty_like(part, device=device))
    return made.standing_for(dtype or packed.dtype)


def _is_pinned(packed: PackedExperts, device: Any = None) -> bool:
    return all(part.is_pinned() for part in _parts(packed))


def _pin_memory(packed: PackedExperts, device: Any = None) -> PackedExperts:
    return packed.with_parts(torch.Tensor.pin_memory)


# --- FSDP2 ----------------------------------------------------------------------------------------------------------


def _split(packed: PackedExperts, size: int, dim: int = 0) -> list[PackedExperts]:
    if dim % 3 or len(packed) % size:
        raise _check.fail("PackedExperts", "experts", f"divisible by the parts (of {size}) they are split in", len(packed))
    parts = [_experts(packed, start, start + size) for start in range(0, len(packed), size)]
    if any(_kind(part) != _kind(parts[0]) for part in parts):
        wanted = "in whole blocks for each part; pack without double_quant, or leave the parameter out (ignored_params=)"
        raise _check.fail("PackedExperts", "doubly quantised scales", wanted, f"{len(packed)} experts split by {size}")
    return parts


def _new_zeros(packed: PackedExperts, size: Any, **_: Any) -> PackedExperts:
    if list(size[1:]) != list(packed.shape[1:]) or size[0] > len(packed):
        raise _check.fail("PackedExperts.new_zeros", "size", "a part of the experts", list(size))
    return _experts(packed, 0, size[0]).with_parts(torch.zeros_like)


def _new_empty(packed: PackedExperts, size: Any, **_: Any) -> PackedExperts:
    """The shard of a rank for which no expert is left: the others could not be told from it when they are gathered."""
    raise _check.fail("PackedExperts", "experts", "at least one for each rank", f"{list(size)} for one of them")


def _same_shape(packed: PackedExperts, size: Any, strides: Any = None, offset: Any = None) -> PackedExperts:
    if list(size) not in ([-1], [packed.numel()], list(packed.shape)):
        raise _check.fail("PackedExperts.view", "size", f"{list(packed.shape)}, as it is", list(size))
    return _view(packed)


RULES: dict[Any, Callable[..., Any]] = {
    _aten.alias.default: _view,
    _aten.as_strided.default: _same_shape,
    _aten.clone.default: _clone,
    _aten.copy_.default: _copy,
    _aten.detach.default: _view,
    _aten.empty_like.default: _empty_like,
    _aten.is_pinned.default: _is_pinned,
    _aten.new_empty.default: _new_empty,
    _aten.new_zeros.default: _new_zeros,
    _aten._pin_memory.default: _pin_memory,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten._to_copy.default: _to_copy,
    _aten.transpose.int: _transpose,
    _aten.view.default: _same_shape,
}
