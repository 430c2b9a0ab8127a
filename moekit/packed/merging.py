"""An adapter becomes part of the weight that it stood beside."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moekit import _check
from moekit.ops.lora import Adapters, Lora, adapters
from moekit.packed.packing import pack_each
from moekit.packed.tensor import PackedExperts


@torch.no_grad()
def merge(
    weight: Tensor | PackedExperts, lora: Lora | Sequence[Lora], *, transposed: bool = False
) -> tuple[Tensor | PackedExperts, float]:
    """Add ``scale * B A`` to a weight; a packed one is unpacked for it and packed again.

    Args:
        weight: ``[E, out, in]``, or ``[E, in, out]`` with ``transposed``, dense or packed.
        lora: the adapter, or several; their dropout does not matter here.
        transposed: how the weight is seen.

    Returns:
        The new weight, of the kind, format, dtype and device of the old one, which stays as it is; and what rounding or
        packing it has lost: the norm of the difference from the exact sum over that of the sum (which waits for a GPU).

    Raises:
        TypeError: what is no weight or no :class:`moekit.Lora`.
        ValueError: factors that do not fit the weight.

    Expert by expert: of one there are copies in float32 at a time.
    """
    if not isinstance(weight, PackedExperts):
        _check.computable("merge", "weight", weight)
    _check.tensor_dim("merge", "weight", weight, 3)
    seen = weight.mT if transposed else weight  # [E, out, in]
    wide = torch.promote_types(weight.dtype, torch.float32)
    num_experts, outputs, inputs = seen.shape
    found = adapters("weight", lora, (num_experts, outputs, inputs), torch.empty(0, dtype=wide, device=weight.device))
    if found.A is None or found.B is None:
        return weight, 0.0
    sums = _Sums(seen, found.A, found.B * _scales(found, found.B), wide)
    if isinstance(seen, PackedExperts):
        old, double_quant = seen.stored(), len(seen.stored().scales) > 1
        stored = pack_each(sums.stored, old.shape, old.format, old.block, old.device, double_quant=double_quant)
        new = PackedExperts(stored, seen.dtype, seen.turned)
    else:
        new = torch.empty_like(seen)
        for expert in range(num_experts):
            new[expert] = sums(expert)
    return new.mT if transposed else new, sums.lost_in(new)


def _scales(found: Adapters, like: Tensor) -> Tensor:
    """The scale of each rank."""
    triples = zip(*[iter(found.numbers)] * 3, strict=True)
    each = [scale for rank, scale, _ in triples for _ in range(int(rank))]
    return torch.tensor(each, dtype=like.dtype, device=like.device)


class _Sums(NamedTuple):
    """The exact sums, an expert at a time."""

    weight: Tensor | PackedExperts  # [E, out, in]
    A: Tensor
    B: Tensor  # with the scales
    dtype: torch.dtype

    def __call__(self, expert: int) -> Tensor:
        return torch.addmm(values_of(self.weight, expert, self.dtype), self.B[expert], self.A[expert])

    def stored(self, expert: int) -> Tensor:
        """As a packed weight is stored."""
        turned = isinstance(self.weight, PackedExperts) and self.weight.turned
        return self(expert).mT.contiguous() if turned else self(expert)

    def lost_in(self, new: Tensor | PackedExperts) -> float:
        """How far ``new`` is from the sums, of their norm."""
        off = torch.zeros(2, dtype=torch.float64, device=new.device)
        for expert in range(new.shape[0]):
            exact = self(expert)
            off += torch.stack([(values_of(new, expert, self.dtype) - exact).square().sum(), exact.square().sum()])
        lost, whole = off.sqrt().tolist()
        return lost / whole if whole else 0.0


def values_of(weight: Tensor | PackedExperts, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert of a dense or packed weight."""
    if isinstance(weight, PackedExperts):
        return weight.unpack(slice(expert, expert + 1), dtype)[0]
    return weight[expert].to(dtype)


def fingerprint(packed: PackedExperts) -> str:
    """What tells the contents of a packed weight from any others, on whatever device: of its bytes (a GPU is waited for)."""
    found, stored = hashlib.blake2b(f"{packed.format} {packed.turned} {list(packed.shape)}".encode()), packed.stored()
    for part in (stored.codes, *stored.scales):
        found.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
