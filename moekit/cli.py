"""The ``moekit`` command."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the moekit command needs {error.name}: pip install 'moekit[cli]'") from error

app = typer.Typer(
    help="Mixture-of-Experts building blocks for PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


# Bits per byte by which the default run must beat the bigram model; it exits with status 1 otherwise.
_CLEAR_WIN = 0.5


@app.callback()
def _root() -> None:
    """Make every command a subcommand, however many there are."""


@app.command()
def demo(
    config: Annotated[
        str | None,
        typer.Option(help="Settings: tiny, large or a TOML file. Default: two minutes on two cores."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder or file of text. Default: the source of Python's standard library."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to train, such as cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The PNG to write, or a folder for it.")] = Path("out/demo.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of parameters, batches and sample.")] = 0,
    balance: Annotated[
        str | None, typer.Option(help="How experts are kept evenly loaded: loss (the default), bias or none.")
    ] = None,
    collapsed: Annotated[
        int | None, typer.Option(min=0, help="Begin with routers that send every token to so many experts.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train the plain PyTorch loop over experts, and compare.")
    ] = False,
) -> None:
    """Train a small byte-level Mixture-of-Experts language model and compare it with a bigram model."""
    if "torch" not in sys.modules:
        # OpenMP threads spin while they wait, which makes a step 20 times slower when another process wants their core;
        # spinning briefly costs a tenth on an idle machine, not spinning at all the double.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from moekit.demo import DemoError
    from moekit.demo.config import load_config
    from moekit.demo.run import run_demo

    try:
        result = run_demo(
            load_config(config, steps, balance, collapsed),
            data=data,
            device=device,
            out=out,
            seed=seed,
            compare=compare,
            console=Console(),
        )
    except DemoError as error:
        typer.echo(f"moekit demo: {error}", err=True)
        raise typer.Exit(2) from error
    as_shipped = all(option is None for option in (config, steps, data, balance, collapsed))
    if as_shipped and result.model_bits > result.bigram_bits - _CLEAR_WIN:
        typer.echo(f"moekit demo: expected to beat the bigram model by {_CLEAR_WIN} bits per byte", err=True)
        raise typer.Exit(1)


@app.command()
def warmup() -> None:
    """Compile the CPU kernels of the usual layers, so that no first call has to."""
    import moekit

    with moekit.backend("numba"):  # raises, and says how to get it, where it is missing
        from moekit.kernels import numba as kernels
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=Console()) as progress:
        task = progress.add_task("Compiling", total=None)
        count = kernels.warmup(lambda done, total: progress.update(task, completed=done, total=total))
    typer.echo(f"{count} kernels are ready.")


@app.command()
def doctor() -> None:
    """Report versions, devices and backends: what to put into a bug report."""
    import platform

    import torch

    import moekit
    from moekit import _backend

    table = Table(show_header=False, box=None)
    table.add_row("moekit", moekit.__version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "numba", "triton", "transformers"):
        table.add_row(package, _version(package))
    table.add_row("threads", str(torch.get_num_threads()))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(devices) or "none")
    asked_for, problem = _backend.default()
    table.add_row("MOEKIT_BACKEND", f"{asked_for} (the default)" if problem is None else f"invalid: {problem}")
    for name, present in moekit.available().items():
        table.add_row(f"backend {name}", "available" if present else "not installed")
    Console().print(table)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Entry point of the console script."""
    app()
