"""``python -m moekit`` is ``moekit``."""

from __future__ import annotations

from moekit.cli import main

main()
