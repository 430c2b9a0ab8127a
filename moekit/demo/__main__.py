"""``python -m moekit.demo`` is ``moekit demo``; under ``torchrun`` the processes train together."""

from __future__ import annotations

import sys

from moekit.cli.app import app

app(["demo", *sys.argv[1:]], prog_name="moekit")
