"""The commands, as typer has them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

try:
    import rich  # noqa: F401
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"needs the extra cli: pip install 'moekit[cli]' (no module {error.name})") from error

import moekit
from moekit.cli.bench import bench
from moekit.cli.check import check
from moekit.cli.demo import demo
from moekit.cli.doctor import doctor
from moekit.cli.plan import plan
from moekit.cli.warmup import warmup

COMMANDS = (
    demo,
    plan,
    doctor,
    bench,
    check,
    warmup,
)

# Of click, or of the copy of it that newer releases of typer bring.
_ClickException: Any = typer.BadParameter.__mro__[2]


class _OneLine(TyperGroup):
    """A wrong command line gets one line, not a box of five; none at all gets the help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            status = super().main(*args, standalone_mode=False, **extra)
        except _ClickException as error:
            _say(error)
            sys.exit(getattr(error, "exit_code", 2))
        except typer.Abort:
            sys.exit("Aborted.")
        sys.exit(status if isinstance(status, int) else 0)


def _say(error: Any) -> None:
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "moekit"
    typer.echo(f"{where}: {error.format_message()} (see {where} --help)", err=True)


app = typer.Typer(
    cls=_OneLine,
    help="Mixture-of-Experts building blocks for PyTorch.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moekit {moekit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Make every command a subcommand, however many there are."""


for command in COMMANDS:
    app.command()(command)
