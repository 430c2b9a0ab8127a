"""What a user installs: the wheel, its metadata, a light import, and the commands the README promises."""

import importlib
import json
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

import moekit

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEAVY = ("triton", "numba", "llvmlite", "transformers", "matplotlib", "typer", "click", "rich")


def run_python(code: str, **kwargs) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from the tree as it is, without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    assert path.name == f"moekit-{moekit.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def wheel_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"moekit", f"moekit-{moekit.__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".so"))]
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "moekit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".nbi", ".nbc")
    }
    assert {name for name in names if name.startswith("moekit/")} == in_tree
    assert "moekit/py.typed" in names


def test_wheel_metadata(wheel, wheel_metadata):
    assert wheel_metadata["Name"] == "moekit"
    assert wheel_metadata["Version"] == moekit.__version__
    assert wheel_metadata["Requires-Python"] == ">=3.10"
    assert wheel_metadata["License-Expression"] == "Apache-2.0"
    assert "Mixture-of-Experts" in wheel_metadata.get_payload()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_wheel_requires_only_torch(wheel_metadata):
    required = [line for line in wheel_metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.10"]
    assert set(wheel_metadata.get_all("Provides-Extra")) == {"cpu", "cli", "hf", "test", "dev"}


def test_wheel_installs_the_command(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "moekit = moekit.cli:main" in wheel.read(name).decode()
    assert callable(importlib.import_module("moekit.cli").main)


def test_wheel_imports_from_anywhere(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "import moekit, moekit.moe_utils; print(moekit.__file__); print(moekit.__version__)"
    where, version = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}", cwd=tmp_path).split()
    assert Path(where).is_relative_to(tmp_path)
    assert version == moekit.__version__


def test_version_has_one_source():
    assert re.fullmatch(r"\d+\.\d+\.\d+", moekit.__version__)
    assert metadata.version("moekit") == moekit.__version__
    assert f"## [{moekit.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_45_import_is_light():
    """Beyond torch, the import brings in no backend, no tool and little else."""
    code = """
import json, sys, time
start = time.perf_counter()
import torch
after_torch, before = time.perf_counter(), set(sys.modules)
import moekit
after_moekit = time.perf_counter()
print(json.dumps([sorted(set(sys.modules) - before), after_torch - start, after_moekit - after_torch]))
"""
    new, torch_seconds, moekit_seconds = json.loads(run_python(code))
    assert not [name for name in new if name.split(".")[0] in HEAVY]
    assert len([name for name in new if name.split(".")[0] != "moekit"]) <= 25, new
    assert moekit_seconds < 0.5 * torch_seconds


def test_public_names_resolve_and_are_documented():
    assert len(moekit.__all__) == len(set(moekit.__all__))
    for name in moekit.__all__:
        value = getattr(moekit, name)
        assert name in dir(moekit)
        if not isinstance(value, str):
            assert (value.__doc__ or "").strip(), f"moekit.{name} has no docstring"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moekit.no_such_name


def test_readme_commands_exist_in_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(code_in((ROOT / page).read_text(encoding="utf-8")))))
        assert {"demo", "test"} <= named <= targets, f"{page}: {named - targets}"


def code_in(page: str) -> list[str]:
    """The fenced blocks and the inline code of a Markdown page."""
    return re.findall(r"```.*?```|`[^`\n]+`", page, re.DOTALL)


def test_readme_links_lead_somewhere():
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target


def test_readme_examples_run():
    """Each Python block of the README, in order, in one session."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    run_python("\n".join(blocks))
