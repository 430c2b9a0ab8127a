"""What brings tokens to the ranks of their experts, and the results back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from moekit.routing import Routing


@runtime_checkable
class Dispatcher(Protocol):
    r"""Brings tokens to the experts of other ranks, and the results back.

    With E experts over N ranks, rank ``n`` has the experts ``n * E/N`` up to ``(n + 1) * E/N``, numbered from 0 there::

        rank 0                                   rank 1
        tokens [T0, H], choice of E              tokens [T1, H], choice of E
              |  \________________      ________________/  |
              |           dispatch \    / dispatch           |
        rows [N0, H], choice of E/N              rows [N1, H], choice of E/N
        experts 0 .. E/N - 1                     experts E/N .. E - 1
              |   ________________      ________________   |
              |  /        combine /    \ combine         \  |
        tokens [T0, H]                           tokens [T1, H]

    Whoever implements the two methods can be given to :class:`moekit.nn.MoE` and :func:`moekit.ep.run`. Both must be
    differentiable. Each must be called by all ranks, also by one without tokens, and so must backward: tokens and weights
    need a gradient on all ranks or on none. What else has to be the same on all, the width and dtype of tokens, K and the
    dtype of weights, those of this package compare with every message of sizes, or once where sizes are given.
    """

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        """Bring tokens to their experts.

        Args:
            tokens: ``[T, H]``; T may differ between ranks.
            routing: of these tokens over all E experts, with weights.

        Returns:
            ``(rows, routing, handle)``: ``[N, H]``, their routing over the experts of this rank, with weights (a slot of
            another rank is -1, and its tables may have no room for rows of no expert), and what :meth:`combine` needs, once.
        """
        ...

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Bring results back: ``rows [N, H]``, weighted and summed over the experts of this rank, to ``[T, H]``."""
        ...


class Underway(Protocol):
    """A dispatch that has begun. One of the two methods is to be called, once."""

    def finish(self) -> tuple[Tensor, Routing, Any]:
        """What :meth:`Dispatcher.dispatch` gives."""
        ...

    def through(self, experts: Callable[[Tensor, Routing], Tensor]) -> Tensor:
        """The results ``[T, H]`` of ``experts``, which make ``rows [N, H]`` and their routing to ``[N, H]``."""
        ...


@runtime_checkable
class Overlapping(Dispatcher, Protocol):
    """A dispatcher whose exchange can run beside something else."""

    def start(self, tokens: Tensor, routing: Routing) -> Underway:
        """Begin a dispatch."""
        ...
