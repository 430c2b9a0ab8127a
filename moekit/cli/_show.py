"""Reports on a terminal: with rich where it is there, plain where it is not."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from moekit.doctor.report import Line

_LABEL = 14
_WIDEST = 100


def show(lines: Sequence[Line]) -> None:
    """Print labels in one column and text in another; a label is not repeated."""
    shown = [line._replace(label="") if line.label == before else line for line, before in _with_label_before(lines)]
    try:
        from rich.console import Console
        from rich.text import Text
    except Exception:  # absent or broken: the report does not depend on it
        for label, text, _ in _rows(shown, shutil.get_terminal_size().columns):
            print(label + text)
        return
    console = Console(highlight=False)
    for label, text, style in _rows(shown, console.width):
        console.print(Text.assemble((label, "bold"), (text, style)), soft_wrap=True)


def _with_label_before(lines: Sequence[Line]) -> list[tuple[Line, str]]:
    return list(zip(lines, ["", *(line.label for line in lines)], strict=False))


def _rows(lines: Sequence[Line], columns: int) -> Iterator[Line]:
    """Lines that fit, their labels padded."""
    wrapper = _Wrapper(min(columns, _WIDEST) - _LABEL - 2, break_on_hyphens=False, break_long_words=False)
    for line in lines:
        for number, text in enumerate(wrapper.wrap(line.text)):
            yield Line(f"{'' if number else line.label:<{_LABEL}}  ", text, line.style)


class _Wrapper(textwrap.TextWrapper):
    """Breaks a path that is longer than a line at its slashes, and nowhere else."""

    def _split(self, text: str) -> list[str]:
        parts = (re.split("(?<=/)", word) if len(word) > self.width else [word] for word in super()._split(text))
        return [part for found in parts for part in found if part]
