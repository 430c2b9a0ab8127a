"""``moekit doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from moekit.cli._plain import run_doctor


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: keys in docs/cli.md.")] = False,
) -> None:
    """Look at this installation: versions, choices, values, speed. Status 1 if something is wrong."""
    raise typer.Exit(run_doctor(as_json=as_json))
