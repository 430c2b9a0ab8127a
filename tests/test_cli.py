"""The commands besides the demo: how they are called, and what they do with what the doctor and the benchmark find."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import moekit
from moekit import cli, doctor
from moekit.cli import _plain
from moekit.cli.app import COMMANDS, app
from moekit.doctor.system import PACKAGES

FACTS = dict.fromkeys(("gpus", "backends", "auto", "cache", "parity", "rates", "pages", "threads", "cpu", "torch_build"))
VERSIONS = dict.fromkeys((*PACKAGES, "moekit", "python", "system"), "9.9")
FACTS |= {"versions": VERSIONS, "requires": {}, "errors": {}}
VARIABLE = {"name": "MOEKIT_BACKEND", "value": "foo", "meaning": "", "problem": "MOEKIT_BACKEND: not foo"}


def call(monkeypatch, *arguments: str) -> int:
    """As the console script is called."""
    monkeypatch.setattr(sys, "argv", ["moekit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["--help", "-h"])
@pytest.mark.parametrize("command", [None, *(command.__name__ for command in COMMANDS)])
def test_every_command_has_help(monkeypatch, capsys, command, name):
    assert call(monkeypatch, *([command] if command else []), name) == 0
    text = capsys.readouterr().out
    assert "Usage: moekit" in text
    if command is None:
        assert all(command.__name__ in text for command in COMMANDS)


def test_version(monkeypatch, capsys):
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"moekit {moekit.__version__}\n"


def test_alone_it_prints_help_once(monkeypatch, capsys):
    assert call(monkeypatch) == 0
    output = capsys.readouterr()
    assert output.out.count("Usage: moekit") == 1 and not output.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--x"], "moekit: No such option: --x (see moekit --help)\n"),
        (["nonsense"], "moekit: No such command 'nonsense'. (see moekit --help)\n"),
        (["warmup", "--x"], "moekit warmup: No such option: --x (see moekit warmup --help)\n"),
        (["demo", "--steps", "0"], "moekit demo: Invalid value for '--steps': "),
    ],
)
def test_a_wrong_command_line_gets_one_line(monkeypatch, capsys, arguments, said):
    assert call(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(said) and output.err.count("\n") == 1


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "moekit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"moekit {moekit.__version__}\n"


def test_what_needs_typer_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "moekit.cli.app", None)
    assert call(monkeypatch, "demo") == 2
    assert capsys.readouterr().err.startswith("moekit demo: ")


def test_the_commands_are_the_same_without_typer():
    assert list(_plain.COMMANDS) == [command.__name__ for command in COMMANDS]


# --- doctor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without_typer", [False, True])
@pytest.mark.parametrize(("variables", "status"), [([], 0), ([VARIABLE], 1)])
def test_doctor_status_and_json(monkeypatch, capsys, without_typer, variables, status):
    monkeypatch.setattr(doctor, "examine", lambda: {**FACTS, "environment": variables})
    if without_typer:
        monkeypatch.setitem(sys.modules, "moekit.cli.app", None)
    assert call(monkeypatch, "doctor", "--json") == status
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is (status == 0) and found["problems"] == [v["problem"] for v in variables]
    assert list(found)[:3] == ["ok", "problems", "hints"]


@pytest.mark.parametrize("without_rich", [False, True])
def test_doctor_says_what_is_wrong_first(monkeypatch, capsys, without_rich):
    monkeypatch.setattr(doctor, "examine", lambda: {**FACTS, "environment": [VARIABLE]})
    if without_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert call(monkeypatch, "doctor") == 1
    first, second, *rest = (line.split() for line in capsys.readouterr().out.splitlines())
    assert first == ["moekit", "doctor", "1", "problem"] and second == ["problem", "MOEKIT_BACKEND:", "not", "foo"]
    assert ["environment", "MOEKIT_BACKEND", "=", "foo:", "invalid,", "see", "above"] in rest


# --- warmup -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("here", "Interrupted: 2 of 3 kernels are kept; run it again to go on.\n"),
        (None, "Interrupted: there is no folder to keep kernels in (see moekit doctor).\n"),
    ],
)
def test_warmup_interrupted_says_what_is_kept(monkeypatch, folder, said):
    from moekit.doctor import choices
    from moekit.kernels import numba as kernels

    def two(progress):
        for done in range(3):
            progress(done, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "warmup", two)
    monkeypatch.setattr(choices, "cache", lambda: {"folder": folder})
    result = CliRunner().invoke(app, ["warmup"])
    assert (result.exit_code, result.stderr) == (130, said) and "ready" not in result.output


def test_warmup_compiles_and_counts(monkeypatch):
    from moekit.kernels import numba as kernels

    seen: list[tuple[int, int]] = []

    def few(progress):
        for done in range(4):
            progress(done, 3)
            seen.append((done, 3))
        return 3

    monkeypatch.setattr(kernels, "warmup", few)
    result = CliRunner().invoke(app, ["warmup"])
    assert result.exit_code == 0, result.output
    assert "3 kernels are ready." in result.output
    assert seen[-1] == (3, 3)
