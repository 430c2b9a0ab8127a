"""What the collectives of expert parallelism send, counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Traffic:
    """What this rank has sent to others.

    Attributes:
        bytes: by what was sent: ``"rows"`` (tokens, outputs and their gradients), ``"slots"`` (expert numbers and routing
            weights, and their gradients), ``"sizes"``.
        rows: rows ``[H]`` of tokens or outputs, and of their gradients.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    rows: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())

    def add(self, what: str, sent: Tensor, count: int) -> None:
        """Count ``count`` of the rows of ``sent``."""
        one = sent[:1].numel() * sent.element_size() if sent.shape[0] else 0
        self.bytes[what] = self.bytes.get(what, 0) + count * one
        self.rows += count if what == "rows" else 0


_watching: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what moekit's collectives of this process send to other ranks while the context is open, backward included."""
    seen = Traffic()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


def count(what: str, sent: Tensor, rows: int) -> None:
    """Tell whoever watches that ``rows`` of the rows of ``sent`` go to other ranks."""
    for seen in _watching:
        seen.add(what, sent, rows)
