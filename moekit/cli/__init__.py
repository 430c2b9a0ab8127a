"""The ``moekit`` command: one file a command; :mod:`moekit.cli.app` puts them together."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from moekit.cli.app import app
    except Exception as error:  # typer or rich is absent or broken: doctor is called for that, too
        from moekit.cli import _plain

        problem = error
    else:
        app(prog_name="moekit")
        return
    try:
        status = _plain.run(sys.argv[1:], problem)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has had enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    raise SystemExit(status)
