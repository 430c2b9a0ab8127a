"""LoRA adapters of the experts' weights: what is added to a frozen weight as two factors of a small rank.

An adapter of a weight ``W [E, out, in]`` has ``A [E, r, in]`` and ``B [E, out, r]``: expert ``e`` computes
``W x + scale * B (A dropout(x))``. The product ``B A`` is never made, but by :func:`merge`.

Source: arXiv 2106.09685 (LoRA); the rank-stabilised scale ``alpha / sqrt(r)`` is that of arXiv 2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import _check

_OP = "experts"
WEIGHTS = ("gate_up", "down")


class Lora(NamedTuple):
    """One adapter of one weight.

    Attributes:
        A: ``[E, r, in]``, floating.
        B: ``[E, out, r]``, floating; ``out`` and ``in`` are those of the weight, however it is stored.
        scale: what ``B A`` is multiplied by.
        dropout: the probability with which each element of the adapter's input is dropped; 0 in evaluation.

    Examples:
        >>> import torch, moekit
        >>> gate_up, down = torch.randn(4, 16, 8), torch.randn(4, 8, 8)
        >>> A, B = torch.randn(4, 2, 8, requires_grad=True), torch.zeros(4, 16, 2, requires_grad=True)
        >>> x, routing = torch.randn(3, 8), moekit.route(torch.randn(3, 4), 2)
        >>> y = moekit.experts(x, routing, gate_up, down, lora={"gate_up": moekit.Lora(A, B, scale=2.0)})
        >>> torch.allclose(y, moekit.experts(x, routing, gate_up, down))  # B is zero so far
        True
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    dropout: float = 0.0

    @staticmethod
    def of_alpha(A: Tensor, B: Tensor, alpha: float, *, rank_stabilised: bool = False, dropout: float = 0.0) -> Lora:
        """An adapter whose scale is ``alpha / r``, or ``alpha / sqrt(r)`` if ``rank_stabilised``."""
        _check.tensor_dim("Lora", "A", A, 3)
        rank = _check.positive("Lora", "rank", A.shape[1])
        return Lora(A, B, _check.real("Lora", "alpha", alpha) / (math.sqrt(rank) if rank_stabilised else rank), dropout)


class Adapters(NamedTuple):
    """The adapters of one weight side by side, as operators take them."""

    A: Tensor | None  # [E, r, in], r of all adapters
    B: Tensor | None  # [E, out, r]
    numbers: list[float]  # the rank, scale and dropout of each

    @property
    def drop(self) -> bool:
        """Whether anything is dropped."""
        return any(self.numbers[2::3])


NONE = Adapters(None, None, [])


def of_weights(lora: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """What is given for ``gate_up`` and for ``down``."""
    if lora is None:
        return None, None
    if not isinstance(lora, Mapping):
        raise _check.wrong_type(_OP, "lora", "a dict of 'gate_up' and 'down'", type(lora).__name__)
    for name in lora:
        _check.one_of(_OP, "lora", name, WEIGHTS)
    return lora.get("gate_up"), lora.get("down")


def adapters(name: str, given: Any, weight_shape: tuple[int, int, int], like: Tensor) -> Adapters:
    """Check what is given for a weight ``[E, out, in]`` and put it side by side in the dtype of ``like``.

    Raises:
        TypeError: something that is no adapter, or factors that are no floating-point tensors.
        ValueError: factors that do not fit the weight, or a scale or dropout out of range.
    """
    if given is None:
        return NONE
    found = [given] if isinstance(given, Lora) else list(given) if isinstance(given, Iterable) else [given]
    if not found:
        return NONE
    numbers: list[float] = []
    for place, adapter in enumerate(found):
        label = f"lora[{name!r}]" + f"[{place}]" * (not isinstance(given, Lora))
        numbers += _checked(label, adapter, weight_shape, like)
    A, B = ([factors.to(like.dtype) for factors in side] for side in zip(*(adapter[:2] for adapter in found), strict=True))
    if len(found) == 1:
        return Adapters(A[0], B[0], numbers)
    return Adapters(torch.cat(A, 1), torch.cat(B, 2), numbers)


def _checked(label: str, adapter: Any, weight_shape: tuple[int, int, int], like: Tensor) -> list[float]:
    if not isinstance(adapter, Lora):
        raise _check.wrong_type(_OP, label, "a moekit.Lora or a list of them", type(adapter).__name__)
    num_experts, outputs, inputs = weight_shape
    for factor, value in (("A", adapter.A), ("B", adapter.B)):
        _check.computable(_OP, f"{label}.{factor}", value)
        _check.tensor_dim(_OP, f"{label}.{factor}", value, 3)
        _check.same_device(_OP, hidden_states=like, **{f"{label}.{factor}": value})
    rank = _check.positive(_OP, f"the rank of {label}", adapter.A.shape[1])
    _check.shape(_OP, f"{label}.A", adapter.A, (num_experts, rank, inputs), "[experts, rank, in]")
    _check.shape(_OP, f"{label}.B", adapter.B, (num_experts, outputs, rank), "[experts, out, rank]")
    scale = _check.real(_OP, f"{label}.scale", adapter.scale)
    if not math.isfinite(scale):
        raise _check.fail(_OP, f"{label}.scale", "finite", scale)
    return [rank, scale, dropout_of(f"{label}.dropout", adapter.dropout)]


def dropout_of(label: str, value: Any) -> float:
    """A probability below 1."""
    probability = _check.real(_OP, label, value)
    if not 0 <= probability < 1:
        raise _check.fail(_OP, label, "at least 0 and below 1", probability)
    return probability
