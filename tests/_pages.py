"""Runs the Python blocks of pages as they stand: ``python tests/_pages.py PAGE ...`` prints what became of each, as JSON.

A page's blocks share one session; each page has one of its own, in an empty folder. Lines in tracebacks are the page's.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(path: Path) -> list[tuple[str, int, str]]:
    """The fenced blocks of a page: language, line of the first line, text."""
    text = path.read_text(encoding="utf-8")
    return [(found[1], text.count("\n", 0, found.start(2)) + 1, found[2]) for found in BLOCK.finditer(text)]


def follow(path: Path) -> None:
    """Run the ``python`` blocks of a page in this process."""
    session = {"__name__": "page"}
    for language, line, code in blocks(path):
        if language == "python":
            exec(compile("\n" * (line - 1) + code, str(path), "exec"), session)


def outcome(path: Path) -> str:
    """Empty, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            follow(path)
        except BaseException:
            return traceback.format_exc()
        finally:
            os.chdir("/")
    return ""


def main(paths: list[str]) -> None:
    found, seconds = {}, {}
    for path in paths:
        begun = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            found[path] = outcome(Path(path))
        seconds[path] = time.perf_counter() - begun
    print(json.dumps(found))
    print(json.dumps(seconds), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
