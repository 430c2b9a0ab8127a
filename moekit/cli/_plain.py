"""The command without typer: what must work on the base install, and where packages are broken."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "train a small Mixture-of-Experts language model",
    "plan": "say what a model takes, from its config alone",
    "doctor": "look at this installation; status 1 if something is wrong",
    "bench": "time a layer's operators and experts against what else is installed",
    "check": "check a module's functions against float64",
    "warmup": "compile the usual CPU kernels ahead",
}
"""All commands, those too that need typer."""

_HELP = """usage: moekit [-h] [--version] COMMAND ...

Mixture-of-Experts building blocks for PyTorch.

{commands}

  --version    print the version
  -h, --help   print this

doctor works on this install; the other commands need the extra cli: pip install 'moekit[cli]'"""

_DOCTOR_HELP = """usage: moekit doctor [-h] [--json]

Look at this installation: versions, choices, values, speed. Status 1 if something is wrong.

  --json       print one JSON object: keys in docs/cli.md
  -h, --help   print this"""

_ASK_HELP = {"-h", "--help"}


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

    first, *options = arguments or ["--help"]
    if first in _ASK_HELP:
        print(_HELP.format(commands="\n".join(f"  {name:<11}  {does}" for name, does in COMMANDS.items())))
        return 0
    if first == "--version":
        print(f"moekit {moekit.__version__}")
        return 0
    if first == "doctor":
        return _doctor(options)
    if first in COMMANDS:
        print(f"moekit {first}: {problem}", file=sys.stderr)
    else:
        what = "option" if first.startswith("-") else "command"
        print(f"moekit: no such {what}: {first} (see moekit --help)", file=sys.stderr)
    return 2


def _doctor(options: Sequence[str]) -> int:
    if _ASK_HELP & {*options}:
        print(_DOCTOR_HELP)
        return 0
    unknown = [option for option in options if option != "--json"]
    if unknown:
        print(f"moekit doctor: no such option: {unknown[0]} (see moekit doctor --help)", file=sys.stderr)
        return 2
    return run_doctor(as_json=bool(options))
