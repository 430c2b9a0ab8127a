"""What a capacity left out: counted where the tokens are, and told without waiting for it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


class Overflow:
    """Counts what is dropped, and warns of it.

    On a GPU the count is copied to the host while other work goes on, and looked at by the next dispatch that finds it
    there. While a CUDA graph is captured the count goes on, in every replay, but nobody is told.

    Args:
        op: who drops, for the warning.
        option: beyond what.
        what: is dropped.
    """

    def __init__(self, op: str, option: str, what: str) -> None:
        self.op, self.option, self.what = op, option, what
        self.total: Tensor | None = None
        self._told = 0
        self._copy: tuple[Tensor, Any] | None = None

    def add(self, dropped: Tensor) -> None:
        """Count ``dropped [] int64``."""
        if torch._C._current_graph_task_id() != -1:
            return  # within backward: a checkpoint does again what has been counted
        if self.total is None:
            with torch.inference_mode(False):  # or no training step could count on
                self.total = torch.zeros_like(dropped)
        self.total += dropped
        if dropped.device.type != "cuda":
            self._tell(int(self.total))
        elif not torch.cuda.is_current_stream_capturing():
            self._look(self.total)

    def _look(self, total: Tensor) -> None:
        if self._copy is not None:
            copied, there = self._copy
            if not there.query():
                return
            self._tell(int(copied))
        copied, there = torch.empty_like(total, device="cpu", pin_memory=True), torch.cuda.Event()
        self._copy = copied.copy_(total, non_blocking=True), there
        there.record()

    def _tell(self, total: int) -> None:
        if total < max(2 * self._told, 1):  # when it begins, and then whenever it has doubled
            return
        self._told = total
        found = f"beyond {self.option}, and not computed: {total} {self.what} so far"
        warnings.warn(f"moekit.{self.op}: {found}", RuntimeWarning, stacklevel=2)
