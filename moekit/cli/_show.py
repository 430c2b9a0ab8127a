"""Reports on a terminal: with rich where it is there, plain where it is not."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from moekit.doctor.report import Line

_LABEL = 14
_WIDEST = 100


def show(lines: Sequence[Line]) -> None:
    """Print labels in one column and text in another; a label is not repeated."""
    shown = [line._replace(label="") if line.label == before else line for line, before in _with_label_before(lines)]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except Exception:  # absent or broken: the report does not depend on it
        _show_plain(shown)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", min_width=_LABEL, no_wrap=True)
    table.add_column(overflow="fold")
    for line in shown:
        table.add_row(line.label, Text(line.text, line.style))
    console = Console(highlight=False)
    console.print(table, width=min(console.width, _WIDEST))


def _with_label_before(lines: Sequence[Line]) -> list[tuple[Line, str]]:
    return list(zip(lines, ["", *(line.label for line in lines)], strict=False))


def _show_plain(lines: Sequence[Line]) -> None:
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    for line in lines:
        first, rest = f"{line.label:<{_LABEL}}  ", " " * (_LABEL + 2)
        print(textwrap.fill(line.text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False))
