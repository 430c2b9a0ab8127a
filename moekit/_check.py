"""Every validation and error text of moekit.

Each message names the operation, the argument, what was wanted and what came. Checks look at shapes, dtypes and
devices only, so they never wait for a GPU; checks of values live inside the operators, which run them on a CPU (where
they are free) or under ``moekit.debug()``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def positive(op: str, name: str, value: object, *, at_least: int = 1) -> None:
    """``value`` is a Python integer (or a symbolic one) not below ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise wrong_type(op, name, "an integer", type(value).__name__)
    if value < at_least:
        raise fail(op, name, f"at least {at_least}", value)


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
