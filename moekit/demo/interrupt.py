"""Ctrl-C: the step at work is finished, and what was trained is kept."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType


class Interrupt:
    """Within it a first Ctrl-C is noted, and a second one interrupts at once.

    Attributes:
        asked: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.asked = False
        # Python lets no other thread set handlers, and tells no other of Ctrl-C.
        self._handles = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupt:
        if self._handles:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        sys.stderr.write("\nInterrupted: finishing this step and writing what there is. Ctrl-C again stops at once.\n")
