"""Bytes that a call allocates on a GPU, and those that a forward keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def peak(call: Callable[[], Any]) -> int:
    """The most at a time, beyond what is allocated before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kept(run: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """What stays for backward, without the storages of ``own`` tensors."""
    there, found = {tensor.untyped_storage().data_ptr() for tensor in own}, {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(found.values())
