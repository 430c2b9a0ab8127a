"""Errors of collectives that say which operation failed, on which rank, and who does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def named(op: str, group: dist.ProcessGroup) -> Iterator[None]:
    """An error of PyTorch's becomes one that names ``op`` and this rank."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"moekit.{op}: failed on rank {group.rank()} of {group.size()}: {error}") from error
