"""Run the suite's core with the oldest and newest releases of what moekit builds on: ``make matrix``.

``python tests/matrix.py --triton`` runs the tests of kernels instead, interpreted and compiled without a GPU, with releases
of Triton: each in a folder of its own, ``.venv/matrix/triton-3.6.0``, before the packages of this interpreter.

Every combination gets an environment of its own, made once: ``.venv/matrix/torch-2.10.0-transformers-5.12.0``, say, with
the pins of ``constraints.txt`` for all else. ``python tests/matrix.py [PART OF A NAME ...]`` runs only those; a run of all
of them writes the table into ``docs/reference/versions.md``. The exit status is 1 if a test failed or an environment was not
made.

pip decides which build of torch that is; on Linux the default index has CUDA builds alone, of several gigabytes each. Where
an index with CPU builds is at hand, name it in PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "versions.md"
BEGIN, END = "<!-- matrix: begin -->\n", "<!-- matrix: end -->"
# The oldest that pyproject.toml admits, the pinned ones, and the newest that were tried.
COMBINATIONS = (("2.10.0", "5.12.0"), ("2.13.0", "5.12.0"), ("2.13.0", "5.24.0"), ("2.14.1", "5.24.0"))
# Operators, their autograd and compilation, the drop-in and the experts in Transformers, on the backends for a CPU. What
# is left out asks other things: the Triton kernels (bound to one triton), the commands, packaging, benchmarks, mutants.
# The interpreter of the triton that comes with torch 2.10 does not run on today's NumPy.
INTERPRETED = "gpu_kernels_stay_inside"
LEFT_OUT = ("triton", "demo", "packaging", "mutants", "layering", "cli", "bench", "doctor", "fuzz", "differential")
# What torch 2.11's CUDA builds bring, and the newest; the interpreter of 3.6 needs an older NumPy.
TRITONS = {"3.6.0": "numpy<2.4", "3.9.0": "numpy"}
VERSIONS = """
import importlib.metadata, json, sys
names = ("torch", "transformers", "numba", "numpy")
print(json.dumps([".".join(map(str, sys.version_info[:2])), *map(importlib.metadata.version, names)]))
"""
HEAD = ("Python", "torch", "Transformers", "Numba", "NumPy", "passed", "skipped", "failed", "minutes")


class Row(NamedTuple):
    """What one combination showed: the cells of its line, and the tests that failed or the reason that none ran."""

    name: str
    cells: tuple[str, ...]
    failures: tuple[str, ...]

    def line(self) -> str:
        return "| " + " | ".join(self.cells) + " |"


def tests() -> list[str]:
    """The files of the core."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file) for file in files if not file.stem.removeprefix("test_").startswith(LEFT_OUT)]


def environment(folder: Path, torch: str, transformers: str) -> Path:
    """The interpreter of the combination's environment, which is made if it is not there."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = folder / "ready"
    wanted = (ROOT / "pyproject.toml").read_text() + (ROOT / "constraints.txt").read_text()
    if ready.exists() and ready.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pins = re.sub(r"(?m)^(torch|transformers)==.*\n", "", (ROOT / "constraints.txt").read_text())
    (folder / "constraints.txt").write_text(f"{pins}\ntorch=={torch}\ntransformers=={transformers}\n")
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    install += ["--constraint", str(folder / "constraints.txt"), "--editable", f"{ROOT}[cpu,hf,test]"]
    subprocess.run(install, check=True)
    ready.write_text(wanted)
    return python


def run(python: Path, files: list[str]) -> tuple[list[str], list[int], list[str]]:
    """The versions there; how many passed, were skipped, failed; the names of those that failed."""
    versions = json.loads(subprocess.run([str(python), "-c", VERSIONS], capture_output=True, text=True, check=True).stdout)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        options = [
            "-q",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "-m",
            "not slow",
            "-k",
            f"not {INTERPRETED}",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ]
        done = subprocess.run([str(python), "-m", "pytest", *options, *files], cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError((done.stdout + done.stderr)[-500:])
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    counts = [len(cases) - len(failed) - len(skipped), len(skipped), len(failed)]
    return versions, counts, [f"{case.get('classname')}::{case.get('name')}" for case in failed]


def measure(folder: Path, torch: str, transformers: str, files: list[str]) -> Row:
    """One line of the table."""
    try:
        python = environment(folder, torch, transformers)
        start = time.perf_counter()
        versions, counts, failures = run(python, files)
    except (subprocess.CalledProcessError, RuntimeError) as error:
        cells = ("", torch, transformers, "", "", "", "", "not run", "")
        return Row(folder.name, cells, (" ".join(str(error).split()),))
    minutes = f"{(time.perf_counter() - start) / 60:.1f}"
    return Row(folder.name, (*versions, *map(str, counts), minutes), tuple(failures))


def shown(rows: list[Row]) -> str:
    """The table, and below it what failed."""
    lines = [Row("", HEAD, ()).line(), "|" + " --- |" * len(HEAD), *(row.line() for row in rows)]
    failures = [f"- {row.name}: `{failure}`" for row in rows for failure in row.failures]
    return "\n".join([*lines, *(["", *failures] if failures else [])])


def with_triton(folder: Path, release: str, files: list[str]) -> int:
    """pytest's exit status on the kernels' tests with a release of Triton; what they print is shown."""
    if not (folder / "triton").exists():
        install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
        subprocess.run([*install, "--target", str(folder), f"triton=={release}", TRITONS[release]], check=True)
    paths = [str(folder), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(folder / "cache")}
    files = files or [str(file) for file in sorted((ROOT / "tests").glob("test_triton_*.py"))]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, env=environment).returncode


def named(combination: tuple[str, str]) -> str:
    return "torch-{}-transformers-{}".format(*combination)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PART OF A NAME")
    parser.add_argument("--envs", type=Path, default=ROOT / ".venv" / "matrix", help="where the environments are kept")
    parser.add_argument("--triton", action="store_true", help="the kernels' tests, with the releases of Triton")
    parser.add_argument("--tests", nargs="*", help="files, in place of the core; the page is not written")
    options = parser.parse_args()
    if options.triton:
        chosen = [release for release in TRITONS if all(part in f"triton-{release}" for part in options.names)]
        status = [with_triton(options.envs / f"triton-{release}", release, options.tests or []) for release in chosen]
        return int(any(status))
    measured = []
    for combination in COMBINATIONS:
        name = named(combination)
        if all(part in name for part in options.names):
            measured.append(measure(options.envs / name, *combination, options.tests or tests()))
            print(shown(measured[-1:]), flush=True)
    if options.tests is None and len(measured) == len(COMBINATIONS):
        page = PAGE.read_text(encoding="utf-8")
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{head}{BEGIN}\n{shown(measured)}\n\n{END}{tail}", encoding="utf-8")
    return int(any(row.failures for row in measured))


if __name__ == "__main__":
    sys.exit(main())
