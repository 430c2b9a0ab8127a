"""Every validation and error text of moekit.

Each message names the operation, the argument, what was wanted and what came. Checks look at shapes, dtypes and
devices only, so they never wait for a GPU; the checks of values at the end do nothing on one, but under ``moekit.debug()``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moekit import _backend

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
# Subclasses that stand for a plain tensor while it is traced, or until a collective has delivered it.
_TRANSPARENT = (
    "torch._subclasses.fake_tensor",
    "torch._subclasses.functional_tensor",
    "torch.distributed._functional_collectives",
)


def fail(op: str, argument: str, wanted: str, got: object) -> ValueError:
    """The ``ValueError`` to raise when ``argument`` of ``op`` has a wrong value."""
    return ValueError(f"moekit.{op}: {argument} must be {wanted}, got {got}")


def wrong_type(op: str, argument: str, wanted: str, got: object) -> TypeError:
    """The ``TypeError`` to raise when ``argument`` of ``op`` has a wrong type or dtype."""
    return TypeError(f"moekit.{op}: {argument} must be {wanted}, got {got}")


def tensor(op: str, name: str, value: object) -> None:
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise wrong_type(op, name, "a tensor", type(value).__name__)


def tensor_dim(op: str, name: str, value: Tensor, ndim: int) -> None:
    """``value`` is a tensor of ``ndim`` dimensions."""
    tensor(op, name, value)
    if value.dim() != ndim:
        raise fail(op, name, f"a {ndim}-D tensor", f"shape {list(value.shape)}")


def shape(op: str, name: str, value: Tensor, wanted: Sequence[int], legend: str) -> None:
    """``value`` is a tensor of exactly the shape ``wanted``, described by ``legend``."""
    tensor(op, name, value)
    if tuple(value.shape) != tuple(wanted):
        raise fail(op, name, f"of shape {legend} = {list(wanted)}", f"shape {list(value.shape)}")


def floating(op: str, name: str, value: Tensor) -> None:
    """``value`` is a tensor of floating-point numbers."""
    tensor(op, name, value)
    if not value.dtype.is_floating_point:
        raise wrong_type(op, name, "a floating-point tensor", value.dtype)


def transparent(value: Tensor) -> bool:
    """Whether a tensor is what it seems: not a subclass that computes by a dispatch of its own, but tracing's."""
    kind = type(value)
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or kind.__module__ in _TRANSPARENT


def computable(op: str, name: str, value: Tensor) -> None:
    """``value`` is a plain tensor of a dtype that products are computed in."""
    if type(value) not in _PLAIN:
        tensor(op, name, value)
        if not transparent(value):
            got = f"a {type(value).__name__} of dtype {value.dtype}; unwrap (to_local, full_tensor) or dequantise it first"
            raise wrong_type(op, name, f"a plain tensor of {names_of(FLOATS)}", got)
    if value.dtype not in FLOATS:
        raise wrong_type(op, name, f"a floating-point tensor ({names_of(FLOATS)})", value.dtype)


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """Dtypes in words."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def integer(op: str, name: str, value: Tensor) -> None:
    """``value`` is an int32 or int64 tensor."""
    tensor(op, name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise wrong_type(op, name, "an int32 or int64 tensor", value.dtype)


def real(op: str, name: str, value: object) -> float:
    """``value`` is a Python number; returned as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(op, name, "a number", type(value).__name__)
    return float(value)


def positive(op: str, name: str, value: Any, *, at_least: int = 1) -> Any:
    """``value`` is a Python integer (or a symbolic one) not below ``at_least``; returned as such."""
    if isinstance(value, Tensor) and torch.jit.is_tracing():  # where a size is a tensor
        value = operator.index(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise wrong_type(op, name, "an integer", type(value).__name__)
    if value < at_least:
        raise fail(op, name, f"at least {at_least}", value)
    return value


def one_of(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise fail(op, name, "one of " + ", ".join(repr(choice) for choice in choices), repr(value))


def topk(op: str, k: int, num_experts: int) -> None:
    """``k`` experts can be chosen among ``num_experts``."""
    positive(op, "k", k)
    if k > num_experts:
        raise fail(op, "k", f"at most the number of experts ({num_experts})", k)


def same_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors that are given live on one device."""
    first = None
    for name, value in tensors.items():
        if value is None:
            continue
        if first is None:
            first = (name, value.device)
        elif value.device != first[1]:
            raise fail(op, name, f"on the device of {first[0]} ({first[1]})", value.device)


# --- values: looked at on a CPU, where that is free, or under ``moekit.debug()`` ------------------------------------


def in_range(op: str, name: str, index: Tensor, end: int, what: str) -> None:
    """Refuse an index below -1 or past ``end``, where looking at values is free or asked for."""
    if not _backend.checks_values(index) or index.numel() == 0:
        return
    low, high = (int(v) for v in index.aminmax())
    if low < -1 or high >= end:
        raise fail(op, name, f"-1 (none) or below {end} ({what})", f"index {low if low < -1 else high}")


def route_indices(indices: Tensor, num_experts: int) -> None:
    """Refuse indices out of range, and a token with more of them than experts. Kernels that meet one leave the call to the reference, which starts with this."""
    op = "Routing.from_topk"
    in_range(op, "indices", indices, num_experts, "num_experts")
    if indices.shape[1] > num_experts and indices.numel() and _backend.checks_values(indices):
        slots = int((indices >= 0).sum(1).max())
        if slots > num_experts:
            raise fail(op, "indices", f"at most num_experts ({num_experts}) a token", slots)


def row_tokens(row_token: Tensor, num_tokens: int) -> None:
    """Refuse tokens out of range."""
    in_range("unpermute", "sorted_indices", row_token, num_tokens, "the number of tokens")


def chunks(split_sizes: Tensor, sorted_idxs: Tensor, num_in: int, num_out: int | None) -> None:
    """Refuse sizes that do not add up and chunks that do not exist."""
    if not _backend.checks_values(split_sizes):
        return
    chunks = split_sizes.shape[0]
    if sorted_idxs.numel() and not 0 <= int(sorted_idxs.min()) <= int(sorted_idxs.max()) < chunks:
        raise fail("sort_chunks", "sorted_idxs", f"chunk numbers in [0, {chunks})", sorted_idxs.tolist())
    if int(split_sizes.sum()) != num_in or (chunks and int(split_sizes.min()) < 0):
        raise fail("sort_chunks", "split_sizes", f"sizes that sum to the {num_in} rows", split_sizes.tolist())
    if num_out is not None and int(split_sizes[sorted_idxs.long()].sum()) != num_out:
        raise fail("sort_chunks", "sorted_idxs", "a permutation of the chunks", sorted_idxs.tolist())
