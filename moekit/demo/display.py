"""Progress of a training run: a live display on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from torch import Tensor

from moekit.demo.train import Run

_REFRESH_SECONDS = 0.25
# A cell's height is its expert's load: half height is an even share, full height twice that or more.
_LEVELS = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS = "12345678"


def relative_load(load: Tensor) -> Tensor:
    """``[L, E]`` token counts as multiples of an even share."""
    return load.double() / load.double().mean(1, keepdim=True).clamp(min=1)


class PlainLog:
    """One line for each held-out measurement: for logs, pipes and dumb terminals."""

    def __init__(self, console: Console, bigram_bits: float) -> None:
        self._console, self._bigram_bits = console, bigram_bits
        self._start = time.perf_counter()
        self._measured = 0

    def __enter__(self) -> PlainLog:
        self._console.print(
            f"\nHeld-out: bits per byte; the byte bigram model has {self._bigram_bits:.3f}.\n"
            "Load: of the idlest and the busiest expert; 1 is an even share.",
            highlight=False,
            soft_wrap=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, run: Run) -> None:
        """Print a line if there is a new measurement."""
        if len(run.measurements) == self._measured:
            return
        self._measured = len(run.measurements)
        last = run.measurements[-1]
        loss = f"{run.losses[-1]:.3f}" if run.losses else "    -"
        share, steps = relative_load(last.load), str(run.config.steps)
        self._console.print(
            f"step {last.step:>{len(steps)}}/{steps}  loss {loss}  held-out {last.bits_per_byte:.3f}  "
            f"{run.tokens_per_second:6,.0f} tok/s  load {share.min():.2f}-{share.max():.2f}  "
            f"{time.perf_counter() - self._start:3.0f}s",
            highlight=False,
            soft_wrap=True,
        )


class LiveDisplay:
    """Progress bar, figures and every expert's load, redrawn a few times a second without a thread of its own."""

    def __init__(self, console: Console, bigram_bits: float, steps: int) -> None:
        self._bigram_bits = bigram_bits
        self._levels = _ASCII_LEVELS if console.options.ascii_only else _LEVELS
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=steps)
        self._live = Live(self._bar, console=console, auto_refresh=False)
        self._drawn, self._measured = 0.0, -1

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.refresh()
        self._live.stop()

    def update(self, run: Run) -> None:
        """Redraw for a new measurement or after a moment."""
        now, measured = time.perf_counter(), len(run.measurements)
        if measured == self._measured and now - self._drawn < _REFRESH_SECONDS:
            return
        self._drawn, self._measured = now, measured
        self._bar.update(self._task, completed=len(run.losses))
        self._live.update(Group(self._bar, self._figures(run), self._loads(run)), refresh=True)

    def _figures(self, run: Run) -> Text:
        loss = f"{run.losses[-1]:.3f}" if run.losses else "-"
        heldout = f"{run.measurements[-1].bits_per_byte:.3f}" if run.measurements else "-"
        return Text.assemble(
            "loss ", (loss, "bold"), "   held-out ", (heldout, "bold green"), " bits/byte   bigram ",
            (f"{self._bigram_bits:.3f}", "bold"), f"   {run.tokens_per_second:,.0f} tokens/s",
        )  # fmt: skip

    def _loads(self, run: Run) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("layer")
        table.add_column(f"load of experts 1-{run.load.shape[1]}, last batch")
        table.add_column("idlest", justify="right")
        table.add_column("busiest", justify="right")
        for number, shares in enumerate(relative_load(run.load).tolist(), start=1):
            table.add_row(str(number), self._bars(shares), f"{min(shares):.2f}x", f"{max(shares):.2f}x")
        return table

    def _bars(self, shares: list[float]) -> Text:
        text, gap = Text(), " " if len(shares) <= 16 else ""
        for share in shares:
            level = self._levels[min(int(share * len(self._levels) / 2), len(self._levels) - 1)]
            style = "red" if share >= 2 else "yellow" if share < 0.25 else "green"
            text.append(level, style).append(gap)
        return text


def progress(console: Console, bigram_bits: float, steps: int) -> PlainLog | LiveDisplay:
    """What suits the console: live on a terminal that can move its cursor, else plain lines."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console, bigram_bits, steps)
    return PlainLog(console, bigram_bits)
