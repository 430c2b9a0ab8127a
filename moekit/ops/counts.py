"""Adding up what experts were given, over forwards that are not computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit import _check

_LIBRARY = torch.library.Library("moekit", "FRAGMENT")


def accumulate(total: Tensor, counts: Tensor) -> None:
    """Add ``counts`` to ``total``, once a forward: not again where activation checkpointing computes it again.

    A recomputation runs inside a backward, which is how it is known, whichever kind of checkpointing asked for it. So
    does, and is left out as well, a first forward that somebody calls from within a backward.

    Args:
        total: ``[E]`` integers; written to.
        counts: ``[E]`` integers, on the same device.

    Raises:
        ValueError: shapes or devices that differ.
        TypeError: a tensor that holds no integers.
    """
    for name, value in (("total", total), ("counts", counts)):
        _check.integer("accumulate", name, value)
    _check.shape("accumulate", "counts", counts, total.shape, "total's")
    _check.same_device("accumulate", total=total, counts=counts)
    torch.ops.moekit.accumulate(total, counts)


def _accumulate_reference(total: Tensor, counts: Tensor) -> None:
    if torch._C._current_graph_task_id() == -1:  # no backward is at work in this thread
        total.add_(counts)


def _accumulate_fake(total: Tensor, counts: Tensor) -> None:
    return None


# Not through ``_library.define``, whose operators return tensors and write to none. One node for ``torch.compile``: what
# it asks about backward it has to ask at each run.
_LIBRARY.define("accumulate(Tensor(a!) total, Tensor counts) -> ()")
_LIBRARY.impl("accumulate", _accumulate_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("accumulate", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("moekit::accumulate", _accumulate_fake, lib=_LIBRARY)
