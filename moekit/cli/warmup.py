"""``moekit warmup``."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn


def warmup() -> None:
    """Compile the CPU kernels of the usual layers, so that no first call has to."""
    import moekit

    with moekit.backend("numba"):  # raises, and says how to get it, where it is missing
        from moekit.kernels import numba as kernels
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=Console()) as progress:
        task = progress.add_task("Compiling", total=None)
        count = kernels.warmup(lambda done, total: progress.update(task, completed=done, total=total))
    typer.echo(f"{count} kernels are ready.")
