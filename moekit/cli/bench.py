"""``moekit bench``."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moekit.cli._status import INTERRUPTED

_FILES = ("bench.json", "bench.png")
_TOKENS = {True: 512, False: 16384}  # on a CPU or not


def bench(
    config: Annotated[
        str | None,
        typer.Argument(help="A preset of moekit plan (Qwen3-30B-A3B by default), a config.json or the folder it lies in."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="T,H,I,E,K", help="A layer of one's own: tokens, hidden, intermediate, experts, top-k."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Of a model's layer. Default: 512 on a CPU, else 16384.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 (or bf16), float16 or float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU, if there is one.")] = None,
    what: Annotated[str, typer.Option(help="ops, experts or all.")] = "all",
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Seconds of timing; drawing inputs and warming up take theirs besides.")
    ] = 30.0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also time torch.compile of the plain form, which takes minutes more.")
    ] = False,
    keep_pages: Annotated[bool, typer.Option("--keep-pages", help="Call moekit.keep_pages() first.")] = False,
    peers: Annotated[Path | None, typer.Option(help="A folder with installed packages to compare with.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("out"),
) -> None:
    """Time the operators and experts of a layer against what else is installed."""
    if peers is not None:
        if not peers.is_dir():
            raise typer.BadParameter(f"no such folder: {peers}", param_hint="--peers")
        sys.path.append(str(peers))
    from moekit.bench.run import Settings, plot

    device = _device(device)
    dtype = "bfloat16" if dtype == "bf16" else dtype
    _check(dtype, what, seconds)
    layer = _layer(config, shape, tokens, device)
    _check_out(out)
    report = _measured(Settings(layer, dtype, device, what, seconds, compiled, keep_pages))
    if report["interrupted"] and not report["records"]:
        typer.echo("moekit bench: interrupted; nothing was measured, nothing is written", err=True)
        raise typer.Exit(INTERRUPTED)
    console = Console(highlight=False)
    _print(report, console)
    numbers, picture = (out / name for name in _FILES)
    numbers.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plot(report, picture)
    console.print(f"N.NNx: so many times moekit's time. Written: {numbers}, {picture}", markup=False)
    if report["interrupted"]:
        raise typer.Exit(INTERRUPTED)
    if any("moekit" in record["failed"] for record in report["records"]):
        raise typer.Exit(1)


def _measured(settings: Any) -> dict[str, Any]:
    """Run with a bar on stderr."""
    from moekit.bench.run import run

    columns, console = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()), Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as bar:
        task = bar.add_task("Drawing inputs", total=None)

        def progress(name: str, total: int) -> None:
            bar.update(task, description=name, total=total, advance=0 if bar.tasks[0].total is None else 1)

        return run(settings, progress)


def _device(wanted: str | None) -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    device = wanted or (found.type if found is not None else "cpu")
    try:
        torch.empty(0, device=device, dtype=torch.int8)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(str(error).split("\n")[0], param_hint="--device") from error
    if torch.device(device).type == "meta":
        raise typer.BadParameter("tensors on meta have no values: there is nothing to time", param_hint="--device")
    return device


def _check(dtype: str, what: str, seconds: float) -> None:
    from moekit.bench.run import DTYPES, WHAT

    for name, value, known in (("--dtype", dtype, tuple(DTYPES)), ("--what", what, WHAT)):
        if value not in known:
            raise typer.BadParameter(f"wanted {', '.join(known)}, got {value!r}", param_hint=name)
    if not math.isfinite(seconds):
        raise typer.BadParameter(f"wanted a finite number, got {seconds}", param_hint="--seconds")


def _check_out(out: Path) -> None:
    """What would keep the results from being written, before minutes of timing."""
    from moekit.bench.run import need_matplotlib

    try:
        need_matplotlib()
    except ImportError as error:
        typer.echo(f"moekit bench: the picture needs matplotlib: pip install 'moekit[cli]' ({error})", err=True)
        raise typer.Exit(2) from error
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in (out / name for name in _FILES):
            new = not path.exists()
            path.open("ab").close()
            if new:
                path.unlink()
    except OSError as error:
        words = f"wanted a folder to write to, got {str(out)!r} ({error.strerror})"
        raise typer.BadParameter(words, param_hint="--out") from error


def _layer(config: str | None, shape: str | None, tokens: int | None, device: str) -> Any:
    import torch

    from moekit.bench.cases import Shape
    from moekit.plan import read

    if shape is not None:
        if tokens is not None:
            raise typer.BadParameter("the T of --shape says it: give one of them", param_hint="--tokens")
        if config is not None:
            raise typer.BadParameter("takes the place of a config: give one of them", param_hint="--shape")
        try:
            numbers = [int(number) for number in shape.split(",")]
            T, H, I, E, K = numbers
        except ValueError:
            raise typer.BadParameter(f"wanted T,H,I,E,K, got {shape!r}", param_hint="--shape") from None
        if min(numbers) < 1 or K > E:
            raise typer.BadParameter(f"wanted positive numbers and K <= E, got {shape!r}", param_hint="--shape")
        return Shape("custom", T, H, I, E, K)
    try:
        model = read(config or "Qwen3-30B-A3B")
    except (OSError, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error).removeprefix("moekit.plan: "), param_hint="CONFIG") from error
    tokens = tokens or _TOKENS[torch.device(device).type == "cpu"]
    return Shape(model.name, tokens, model.hidden, model.inner, model.experts, model.topk)


def _print(report: dict[str, Any], console: Console) -> None:
    """A row for each figure: moekit's milliseconds, and how many times that the others take."""
    from moekit.bench.cases import Shape
    from moekit.bench.run import milliseconds

    settings, machine = report["settings"], report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine["gpu"] or f"{machine['model']}, {machine['cores']} cores, {machine['threads']} threads"
    console.print(f"{Shape(**settings['shape'])}, {settings['dtype']}, on {where}; {versions}", markup=False)
    for warning in report["warnings"]:
        console.print(warning, markup=False, style="yellow")
    records = report["records"]
    others = list(dict.fromkeys(who for record in records for who in record["seconds"] if who != "moekit"))
    others.sort(key="copy_".__eq__)  # a yardstick, and no contender: last
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("median times", no_wrap=True)
    table.add_column("moekit, ms", justify="right")
    for who in others:
        table.add_column(who, justify="right", overflow="fold")
    for record in records:
        took = {who: times["median"] for who, times in record["seconds"].items()}
        ours = took.get("moekit")
        ratios = [f"{took[who] / ours:.2f}x" if ours and who in took else "-" for who in others]
        table.add_row(record["case"], milliseconds(ours) if ours else "failed", *ratios)
    console.print(table)
    for note in report["notes"]:
        console.print(note, markup=False, style="dim")
