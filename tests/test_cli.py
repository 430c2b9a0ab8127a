"""The commands besides the demo."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import moekit
from moekit import _backend
from moekit.cli.app import app


def test_doctor_names_versions_and_backends():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert moekit.__version__ in result.output
    for name, present in moekit.available().items():
        line = next(line for line in result.output.splitlines() if f"backend {name}" in line)
        assert ("not installed" not in line) == present


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("auto", "auto (the default)"),
        ("foo", "invalid: MOEKIT_BACKEND: name must be one of auto, torch, numba, triton, got 'foo'"),
    ],
)
def test_doctor_names_the_default_backend(monkeypatch, name, said):
    monkeypatch.setattr(_backend, "_DEFAULT", name)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert said in next(line for line in result.output.splitlines() if "MOEKIT_BACKEND" in line)


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
