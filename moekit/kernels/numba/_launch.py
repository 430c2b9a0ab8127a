"""What launchers share: addresses of tensors, and when to write past the cache."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

INDICES = (torch.int32, torch.int64)
_LINE = 64  # bytes; streaming writes whole cache lines
# Smaller results are likely to be read again while they are still in the cache.
_OUTGROWS_CACHE = 1 << 22


class Nonsense(ValueError):
    """Raised by a kernel that meets a number which cannot be, before it becomes an address: the reference says which."""


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements are; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@overload
def dense(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...
@overload
def dense(tensor: None, dtype: torch.dtype | None = None) -> None: ...
@overload
def dense(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None: ...
def dense(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """The tensor itself if it is contiguous and of ``dtype``, otherwise a copy."""
    if tensor is None:
        return None
    if dtype is not None and tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def streams(tensor: Tensor, row_bytes: int, outgrows: int = _OUTGROWS_CACHE) -> int:
    """1 if a kernel should write ``tensor`` (rows or halves of ``row_bytes``) past the cache, else 0."""
    return int(tensor.nbytes >= outgrows and row_bytes % _LINE == 0 and tensor.data_ptr() % _LINE == 0)
