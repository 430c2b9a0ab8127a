"""One weight of the experts with all that goes with it: dense or packed, alone or with adapters.

The forward and the backward of the experts multiply by it through :class:`Projection`, and need not know which it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.ops.gathered import Gathered, together
from moekit.ops.products import Products
from moekit.ops.unpack import Stored


class _Adapter(NamedTuple):
    """Where an adapter's ranks stand among those of all, and its numbers."""

    place: int
    ranks: slice
    scale: float
    dropout: float


class Projection(NamedTuple):
    """A frozen or trained weight, and the low-rank factors beside it."""

    weight: Tensor | Stored  # matrices [E, in, out], or packed
    turned: bool  # packed as [E, in, out]
    A: Tensor | None  # [E, r, in], the adapters side by side
    B: Tensor | None  # [E, out, r]
    numbers: list[float]  # the rank, scale and dropout of each adapter
    seed: Tensor | None  # of what the adapters drop, on the CPU
    products: Products

    def adapters(self) -> Iterator[_Adapter]:
        """The adapters in their order."""
        start = 0
        for place in range(len(self.numbers) // 3):
            rank, scale, dropout = self.numbers[3 * place : 3 * place + 3]
            yield _Adapter(place, slice(start, start + int(rank)), scale, dropout)
            start += int(rank)

    def forward(self, rows: Tensor, offsets: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``(rows W^T + low B^T, low)`` with :meth:`lower`'s ``low``; ``out`` may be written into, and not be ``rows``."""
        low = self.lower(rows, offsets)
        factors = None if low is None or self.B is None else self.B.mT
        return self._multiply(rows, offsets, out, low, factors, back=False), low

    def lower(self, rows: Tensor, offsets: Tensor) -> Tensor | None:
        """``scale * dropout(rows) A^T``, ``[R, r]``; None without adapters."""
        if self.A is None:
            return None
        parts = []
        for adapter in self.adapters():
            taken = self.dropped(rows, adapter)
            parts.append(self.products.rows(taken, self.A[:, adapter.ranks].mT, offsets) * adapter.scale)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def backward(self, grad: Tensor | Gathered, offsets: Tensor, high: Tensor | None) -> Tensor:
        """The gradient of ``rows``: ``grad W + dropout(high A)`` with :meth:`raised`'s ``high``."""
        if high is None or self.A is None:
            return self._multiply(grad, offsets, None, back=True)
        if not any(adapter.dropout for adapter in self.adapters()):
            return self._multiply(grad, offsets, None, high, self.A, back=True)
        result = self._multiply(grad, offsets, None, back=True)
        for adapter in self.adapters():
            mine, factors = high[:, adapter.ranks], self.A[:, adapter.ranks]
            if adapter.dropout:
                result = result + self.dropped(self.products.rows(mine, factors, offsets), adapter)
            else:
                result = self.products.add(result, mine, factors, offsets)
        return result

    def raised(self, grad: Tensor | Gathered, offsets: Tensor) -> Tensor | None:
        """``scale * grad B``, the gradient of ``dropout(rows) A^T``, ``[R, r]``; None without adapters."""
        if self.B is None:
            return None
        high = self.products.rows(grad, self.B, offsets)
        scaled = [high[:, adapter.ranks] * adapter.scale for adapter in self.adapters()]
        return scaled[0] if len(scaled) == 1 else torch.cat(scaled, 1)

    def gradient_of_a(self, rows: Tensor | Gathered, high: Tensor, offsets: Tensor) -> Tensor:
        """The gradient of ``A``."""
        found = [
            self.products.outer(high[:, adapter.ranks].contiguous(), self._taken(rows, adapter), offsets)
            for adapter in self.adapters()
        ]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _taken(self, rows: Tensor | Gathered, adapter: _Adapter) -> Tensor | Gathered:
        """What an adapter multiplies of ``rows``: where it drops nothing they need not be brought together."""
        return self.dropped(together(rows), adapter) if adapter.dropout else rows

    def dropped(self, rows: Tensor, adapter: _Adapter) -> Tensor:
        """``rows`` with elements dropped and the others divided by what remains: the same ones at every call."""
        if not adapter.dropout or self.seed is None:
            return rows
        generator = torch.Generator(rows.device).manual_seed(int(self.seed) + adapter.place)
        remain = 1 - adapter.dropout
        return torch.empty_like(rows).bernoulli_(remain, generator=generator) * rows / remain

    def _multiply(
        self,
        rows: Tensor | Gathered,
        offsets: Tensor,
        out: Tensor | None,
        low: Tensor | None = None,
        factors: Tensor | None = None,
        *,
        back: bool,
    ) -> Tensor:
        """By the weight, plus ``low`` by its factors: one sum where a kernel can."""
        if isinstance(self.weight, Stored):
            return self.products.packed(together(rows), self.weight, offsets, out, low, factors, back=back != self.turned)
        return self.products.rows(rows, self.weight.mT if back else self.weight, offsets, out, low, factors)
