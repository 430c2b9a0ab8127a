"""The command without typer: what must work on the base install, and where packages are broken."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

_HELP = """usage: moekit [-h] [--version] doctor [--json]

Mixture-of-Experts building blocks for PyTorch.

  doctor       look at this installation; --json for one object; status 1 if something is wrong
  --version    print the version
  -h, --help   print this

The other commands need typer: pip install 'moekit[cli]'"""


def run_doctor(*, as_json: bool) -> int:
    """Examine, print, and give the exit status."""
    from moekit.cli._show import show
    from moekit.doctor import examine
    from moekit.doctor.report import judged, lines

    if sys.stderr.isatty():
        print("Looking; kernels that are not on disk yet are compiled (half a minute at most) ...", file=sys.stderr)
    report = judged(examine())
    if as_json:
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        show(list(lines(report)))
    return 0 if report["ok"] else 1


def run(arguments: Sequence[str], problem: Exception) -> int:
    """Do what can be done without typer.

    Args:
        arguments: of the command line.
        problem: why typer's commands cannot be had.

    Returns:
        the exit status.
    """
    import moekit

    if not arguments or {"-h", "--help"} & {*arguments}:
        print(_HELP)
        return 0 if arguments else 2
    if list(arguments) == ["--version"]:
        print(f"moekit {moekit.__version__}")
        return 0
    if arguments[0] == "doctor":
        options = list(arguments[1:])
        if options in ([], ["--json"]):
            return run_doctor(as_json=bool(options))
        print(f"moekit doctor: no such option: {options[-1]}", file=sys.stderr)
        return 2
    print(f"moekit {arguments[0]}: {problem}", file=sys.stderr)
    return 2
