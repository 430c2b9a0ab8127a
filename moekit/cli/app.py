"""The commands, as typer has them."""

from __future__ import annotations

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the moekit command needs {error.name}: pip install 'moekit[cli]'") from error

from moekit.cli.check import check
from moekit.cli.demo import demo
from moekit.cli.doctor import doctor
from moekit.cli.plan import plan
from moekit.cli.warmup import warmup

app = typer.Typer(
    help="Mixture-of-Experts building blocks for PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Make every command a subcommand, however many there are."""


for command in (demo, plan, check, warmup, doctor):
    app.command()(command)
