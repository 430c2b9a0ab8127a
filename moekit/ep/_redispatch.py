"""Rows that are exchanged again in backward, in place of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.ep._eager import eager
from moekit.ep._ways import Way
from moekit.routing import Routing


class _Place(NamedTuple):
    """What autograd keeps in place of a view of the rows."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class Redispatch:
    """The received rows, to be had a second time.

    They travel beside the gradients of the results, so every rank takes part, also one that has kept nothing of them; and
    they are let go once their gradient is there.

    Args:
        tokens: ``[T, H]``, which are kept: they are the sender's, and there anyway.
        way: how they went.
    """

    def __init__(self, tokens: Tensor, way: Way) -> None:
        self._tokens, self.way = (tokens.detach(),), way
        self._pending: Tensor | None = None
        self._rows: Tensor | None = None

    def keep(self) -> tuple[Tensor, ...]:
        """The tokens, which are autograd's from now on."""
        kept, self._tokens = self._tokens, ()
        return kept

    def start(self, *kept: Tensor) -> None:
        """Send."""
        (tokens,) = kept
        self._pending = self.way.start(self.way.arrange(tokens))

    def finish(self) -> None:
        """Receive."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._rows = self.way.finish(pending)

    def release(self, *_: Any) -> None:
        """Let go."""
        self._rows = None

    @eager
    def run(self, experts: Callable[[Tensor, Routing], Tensor], rows: Tensor, routing: Routing) -> Tensor:
        """The experts' results, with nothing of ``rows`` kept for backward, and of all else what is kept without this."""
        storage = rows.untyped_storage()._cdata
        outer = _outer_hooks() or (_same, _same)

        def keep(tensor: Tensor) -> Any:
            if tensor.dtype is not rows.dtype or tensor.untyped_storage()._cdata != storage:
                return outer[0](tensor)
            return _Place(tensor.size(), tensor.stride(), tensor.storage_offset())

        def find(kept: Any) -> Tensor:
            return self._view(kept) if isinstance(kept, _Place) else outer[1](kept)

        if rows.requires_grad:
            rows.register_hook(self.release)
        with torch.autograd.graph.saved_tensors_hooks(keep, find):
            return experts(rows, routing)

    def _view(self, place: _Place) -> Tensor:
        rows = self._rows
        if rows is None:
            raise RuntimeError("moekit.ep: redispatch let rows go before the experts' backward asked for them")
        return rows.as_strided(*place)


def _outer_hooks() -> Any:
    """How others keep tensors, a checkpoint say: of several only the innermost is asked."""
    autograd: Any = torch._C
    return autograd._autograd._top_saved_tensors_default_hooks(True)


def _same(kept: Any) -> Any:
    return kept
