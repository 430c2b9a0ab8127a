"""``moekit check``."""

from __future__ import annotations

import importlib
import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from moekit.checks import Outcome, Report


def check(
    module: Annotated[
        str,
        typer.Argument(help="Module with functions of moe_utils, installed or in this folder, such as moekit.moe_utils."),
    ],
    golden: Annotated[
        Path | None, typer.Option(help="Also run the golden cases: the folder tests/golden of moekit's repository.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    eager: Annotated[
        bool, typer.Option("--eager", help="Run what the module compiles by torch.compile as it stands.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every case as JSON.")] = False,
) -> None:
    """Check a module's permutation, activation and router functions against float64. Exit code 1 if a case fails."""
    sys.path.append("")  # the folder that one is in, as `python -m` has it, but behind everything else
    # What the module prints must not get between the lines of a JSON.
    with redirect_stdout(sys.stderr):
        report = _run(_import(module), golden, _device(device), eager)
    about = {"module": module, "package": _package(module), "device": device, "torch": metadata.version("torch")}
    if as_json:
        typer.echo(json.dumps({**about, **_as_json(report)}, indent=1))
    else:
        _print(Console(highlight=False), about, report)
    raise typer.Exit(1 if report.failed else 0)


def _import(name: str) -> Any:
    if Path(name).name != name or name.endswith(".py"):
        _stop(f"{name} is a path: wanted a module's name, such as {Path(name).stem}, installed or in this folder")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever an import may run into; a program exits
        _stop(f"{name} cannot be imported: {type(error).__name__}: {error}")


def _device(name: str) -> str:
    import torch

    try:
        torch.empty(0, dtype=torch.float32, device=name)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        _stop(f"--device {name}: {str(error).splitlines()[0]}")
    return name


def _run(module: Any, golden: Path | None, device: str, eager: bool) -> Report:
    from moekit.checks import check as run

    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    console = Console(stderr=True)
    # Piped, a bar would be an empty line.
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_interactive)
    task = bar.add_task("Cases", total=None)

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)

    try:
        with bar:
            return run(module, device, golden, eager, show)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        _stop(str(error).removeprefix("moekit.check: "))


def _stop(message: str) -> NoReturn:
    typer.echo(f"moekit check: {message}", err=True)
    raise typer.Exit(2)


def _package(module: str) -> str:
    """The distribution that the module is of, and its version."""
    top = module.split(".")[0]
    owners = metadata.packages_distributions().get(top, [])
    if owners:
        return f"{owners[0]} {metadata.version(owners[0])}"
    try:
        version = getattr(sys.modules.get(top), "__version__", None)
    except (Exception, SystemExit):  # of a module's own __getattr__
        version = None
    return f"{top} {version}" if version else "of no installed package"


def _as_json(report: Report) -> dict[str, Any]:
    """JSON has no infinity: an error that is no number is null."""
    cases = [asdict(outcome) for outcome in report.outcomes]
    for case in cases:
        case["error"] = case["error"] if math.isfinite(case["error"]) else None
    return {
        "cases": len(cases),
        "failed": len(report.failed),
        "missing": report.missing,
        "signatures": report.signatures,
        "outcomes": cases,
    }


def _print(console: Console, about: dict[str, str], report: Report) -> None:
    from moekit.checks import SEAMS

    console.print(f"{about['module']} ({about['package']}), torch {about['torch']}, {about['device']}", soft_wrap=True)
    console.print(_functions(report))
    seams = Table(
        show_header=False, box=None, pad_edge=False, title="\nWhere published code falls short", title_justify="left"
    )
    for key, words in SEAMS.items():
        found = report.of_seam(key)
        failed = sum(outcome.status != "passed" for outcome in found)
        verdict = "[dim]no such function[/]" if not found else f"[red]{failed} of {len(found)} fail[/]" if failed else "ok"
        seams.add_row(words, verdict)
    console.print(seams, end="\n\n")
    for outcome in report.failed:
        seam = f", seam '{outcome.seam}'" if outcome.seam else ""
        words = f"{outcome.status}: " if outcome.status != "failed" else ""
        console.print(
            f"[red]{outcome.function}[/] ({escape(outcome.case)}{seam}): {escape(words + outcome.note)}", soft_wrap=True
        )
    for name, difference in report.signatures.items():
        console.print(f"[yellow]{name}[/]: other signature: {escape(difference)}", soft_wrap=True)
    if report.missing:
        console.print(f"[yellow]missing[/]: {', '.join(report.missing)}", soft_wrap=True)
    console.print(f"{len(report.outcomes)} cases, {len(report.failed)} failed")


def _functions(report: Report) -> Table:
    """One function a row: how many of its cases fail, and the largest error among all."""
    table = Table(box=None, pad_edge=False)
    table.add_column("function", no_wrap=True, min_width=32)
    for title in ("cases", "failed", "worst"):
        table.add_column(title, justify="right")
    table.add_column("where", overflow="fold")
    for name in dict.fromkeys(outcome.function for outcome in report.outcomes):
        found, worst = report.of(name), report.worst(name)
        failed = sum(outcome.status != "passed" for outcome in found)
        size, where = _worst(worst) if worst else ("", "")
        table.add_row(name, str(len(found)), f"[red]{failed}[/]" if failed else "0", size, escape(where))
    return table


def _worst(outcome: Outcome) -> tuple[str, str]:
    """Its size and place."""
    size = f"{outcome.error:.1e}" if math.isfinite(outcome.error) else outcome.status if outcome.status != "failed" else "-"
    return size, f"{outcome.case}: {outcome.what}" if outcome.what else outcome.case
