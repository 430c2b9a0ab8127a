"""``moekit warmup``."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from moekit.cli._status import INTERRUPTED


def warmup() -> None:
    """Compile the CPU kernels of the usual layers, so that no first call has to."""
    import moekit

    with moekit.backend("numba"):  # raises, and says how to get it, where it is missing
        from moekit.kernels import numba as kernels
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=Console()) as progress:
        task = progress.add_task("Compiling", total=None)
        bar = progress.tasks[0]
        try:
            count = kernels.warmup(lambda done, total: progress.update(task, completed=done, total=total))
        except KeyboardInterrupt:
            count = None
    if count is None:
        typer.echo(_interrupted(int(bar.completed), bar.total), err=True)
        raise typer.Exit(INTERRUPTED)
    typer.echo(f"{count} kernels are ready.")


def _interrupted(done: int, total: float | None) -> str:
    from moekit.doctor import choices

    if choices.cache()["folder"] is None:
        return "Interrupted: there is no folder to keep kernels in (see moekit doctor)."
    return f"Interrupted: {done} of {int(total or 0)} kernels are kept; run it again to go on."
