"""``moekit demo``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moekit.cli._status import INTERRUPTED

# Bits per byte by which the default run must beat the bigram model; it exits with status 1 otherwise.
_CLEAR_WIN = 0.5


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
    except KeyboardInterrupt as error:
        typer.echo("\nmoekit demo: interrupted; nothing was kept", err=True)
        raise typer.Exit(INTERRUPTED) from error
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    as_shipped = all(option is None for option in (config, steps, data, balance, collapsed))
    if as_shipped and result.complete and result.model_bits > result.bigram_bits - _CLEAR_WIN:
        typer.echo(f"moekit demo: expected to beat the bigram model by {_CLEAR_WIN} bits per byte", err=True)
        raise typer.Exit(1)
