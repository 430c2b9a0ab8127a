"""The ``moekit`` command: one file a command; :mod:`moekit.cli.app` puts them together."""

from __future__ import annotations


def main() -> None:
    """Entry point of the console script."""
    from moekit.cli.app import app

    app()
