"""Run a framework's own MoE tests without moekit and with ``moekit.compat.install()``, and compare.

    python tests/frameworks.py CHECKOUT [CHECKOUT ...]

Each argument is a checkout of Megatron-LM or NeMo Automodel, with its tests. The interpreter needs torch, pytest and
what the framework imports; no GPU (tests/_on_cpu.py). Exits with 1 if a test passes without moekit only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = ("tests/unit_tests/transformer/moe", "tests/unit_tests/moe")


def passed(checkout: Path, installed: bool, arguments: list[str]) -> set[str]:
    """The tests of the checkout that pass."""
    folder = next(name for name in FOLDERS if (checkout / name).is_dir())
    paths = (str(checkout), str(HERE.parent), str(HERE))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "MOEKIT_INSTALL": str(int(installed)),
        "PRETEND_A_GPU": str(int((checkout / "megatron").is_dir())),  # NeMo's tests do without one
        "MASTER_PORT": str(29500 + os.getpid() % 1000),
    }
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "_on_cpu", "-p", "no:cacheprovider", "-o", "addopts="]
        command += ["--continue-on-collection-errors", f"--junitxml={report}", f"--rootdir={checkout}", *arguments, folder]
        with (Path(scratch) / "output").open("w") as output:
            subprocess.run(command, cwd=checkout, env=environment, stdout=output, stderr=output, check=False)
        if not report.exists():
            sys.exit((Path(scratch) / "output").read_text()[-3000:])
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}" for case in cases if len(case) == 0}


def main() -> int:
    """Compare every checkout named on the command line; arguments with a dash are pytest's."""
    checkouts = [Path(argument).resolve() for argument in sys.argv[1:] if not argument.startswith("-")]
    arguments = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    lost_any = False
    for checkout in checkouts:
        without, with_moekit = (passed(checkout, installed, arguments) for installed in (False, True))
        lost = sorted(without - with_moekit)
        lost_any |= bool(lost)
        print(f"{checkout.name}: {len(without)} pass without moekit, {len(without) - len(lost)} of them with it", flush=True)
        for name in lost:
            print(f"  lost: {name}")
    return int(lost_any)


if __name__ == "__main__":
    sys.exit(main())
