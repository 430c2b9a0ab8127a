"""What a user installs: the wheel, its metadata, a light import, and the commands the README promises."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
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


def build(target: str, tree: Path, folder: Path) -> Path:
    """A wheel or an sdist of a tree as it is, without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    built = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.iterdir()
    return path


def files_below(folder: Path) -> set[str]:
    """What is source in a tree's folder, as paths in the tree."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in paths if path.suffix not in (".nbi", ".nbc")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    path = build("wheel", ROOT, tmp_path_factory.mktemp("dist"))
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
    assert {name for name in names if name.startswith("moekit/")} == files_below(ROOT / "moekit")
    assert "moekit/py.typed" in names


def test_wheel_is_small(wheel):
    """548 kB when this was written: what makes it grow past this is worth a look."""
    assert Path(wheel.filename).stat().st_size < 600_000


def test_sdist_can_be_tested_and_built(wheel, wheel_metadata, tmp_path):
    """It holds the tree, so that its own tests are collected, and the wheel built from it is the wheel of the tree."""
    shutil.unpack_archive(build("sdist", ROOT, tmp_path / "dist"), tmp_path)
    tree = tmp_path / f"moekit-{moekit.__version__}"
    held = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    single = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile"}
    single |= {"constraints.txt", "hatch_build.py", "mkdocs.yml", "pyproject.toml"}
    folders = [files_below(ROOT / name) for name in ("moekit", "tests", "docs", "benchmarks", "examples")]
    assert all(folders) and held == single.union(*folders, {".gitignore", "PKG-INFO"})
    assert all((tree / name).read_bytes() == (ROOT / name).read_bytes() for name in held - {"PKG-INFO"})

    with zipfile.ZipFile(build("wheel", tree, tmp_path / "wheel")) as again:
        assert set(again.namelist()) == set(wheel.namelist())
        (name,) = (name for name in again.namelist() if name.endswith(".dist-info/METADATA"))
        assert Parser().parsestr(again.read(name).decode()).as_string() == wheel_metadata.as_string()

    command = [sys.executable, "-m", "pytest", "-n0", "--collect-only", "tests/test_docs.py", "tests/test_packaging.py"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    collected = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert collected.returncode == 0 and "test_code_runs[README.md]" in collected.stdout, collected.stdout + collected.stderr


def test_wheel_metadata(wheel, wheel_metadata):
    assert wheel_metadata["Name"] == "moekit"
    assert wheel_metadata["Version"] == moekit.__version__
    assert wheel_metadata["Requires-Python"] == ">=3.10"
    assert wheel_metadata["License-Expression"] == "Apache-2.0"
    assert "Mixture-of-Experts" in wheel_metadata.get_payload()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_wheel_metadata_says_where_the_project_is(wheel_metadata):
    urls = dict(line.split(", ") for line in wheel_metadata.get_all("Project-URL"))
    assert set(urls) == {"Homepage", "Documentation", "Repository", "Changelog", "Issues"}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())


def test_wheel_readme_has_no_links_to_files(wheel_metadata):
    """There is nothing beside it, on a package index or in an environment."""
    text = wheel_metadata.get_payload()
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"\b(?:src|srcset|href)=\"([^\"]+)", text)
    assert targets and not [target for target in targets if "://" not in target and not target.startswith("#")]
    # Nothing else is changed.
    assert re.sub(r"https://github.com/moekit/moekit/(blob|raw|tree)/main/", "", text).strip() == README.strip()


def test_links_become_addresses():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = {
        "[a](docs/a.md)": "[a](R/blob/main/docs/a.md)",
        "[a](./docs/a.md#b)": "[a](R/blob/main/docs/a.md#b)",
        "[a](examples/)": "[a](R/tree/main/examples/)",
        "![a](docs/a.png)": "![a](R/raw/main/docs/a.png)",
        '<img src="docs/a.svg">': '<img src="R/raw/main/docs/a.svg">',
        "[a](#heading)": "[a](#heading)",
        "[a](https://x.org/y)": "[a](https://x.org/y)",
        "f(x)[0](y z)": "f(x)[0](y z)",
        "```py\nf[0](x)\n```\n[a](b.md)": "```py\nf[0](x)\n```\n[a](R/blob/main/b.md)",
    }
    for text, wanted in cases.items():
        assert module.with_addresses(text, "R") == wanted


def test_every_declared_python_can_read_every_file(wheel_metadata):
    """The oldest one's grammar; ruff and pyright look at names and at the standard library of the same version."""
    minors = [int(c.rsplit(".")[-1]) for c in wheel_metadata.get_all("Classifier") if " 3." in c]
    assert minors == [10, 11, 12, 13, 14]
    for path in [*(ROOT / "moekit").rglob("*.py"), *(ROOT / "examples").glob("*.py"), ROOT / "hatch_build.py"]:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'target-version = "py310"' in settings and 'pythonVersion = "3.10"' in settings


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, whose other packages are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    pip(python, "install", "--no-index", "--no-deps", str(wheel.filename))
    return python


def pip(python: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_uninstalling_leaves_nothing_that_imports(environment, tmp_path):
    """Not even compiled kernels: a folder that holds some is a package without a name to Python."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NUMBA", "MOEKIT"))}
    clean["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def run(code: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [environment, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=clean, check=False
        )

    code = """
import torch, moekit, moekit.cli.app, moekit.checks
from moekit.kernels.numba import _row_kernels
_row_kernels.permute_kernel()
print(moekit.__file__)
"""
    first = run(code)
    assert first.returncode == 0, first.stderr
    package = Path(first.stdout.strip()).parent
    assert package.is_relative_to(environment.parents[1])
    assert [*(tmp_path / "cache" / "moekit").rglob("*.nbi")] and not [*package.rglob("*.nb?")]
    pip(environment, "uninstall", "--yes", "moekit")
    assert not package.exists()
    assert "No module named 'moekit'" in run("import moekit").stderr


def test_wheel_requires_only_torch(wheel_metadata):
    required = [line for line in wheel_metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.10"]
    assert set(wheel_metadata.get_all("Provides-Extra")) == {"cpu", "cli", "hf", "test", "docs", "dev"}


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
    """Beyond torch, the import brings in moekit itself, and the drop-in no backend, no tool and little else."""
    code = """
import json, sys
import torch
before = set(sys.modules)
import moekit
light = set(sys.modules) - before
import moekit.moe_utils
print(json.dumps([sorted(light), sorted(set(sys.modules) - before)]))
"""
    light, all_ = json.loads(run_python(code))
    assert light == ["moekit"]
    assert not [name for name in all_ if name.split(".")[0] in HEAVY]
    assert len([name for name in all_ if name.split(".")[0] != "moekit"]) <= 5, all_


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


def test_make_wheel_needs_no_environment():
    done = subprocess.run(["make", "-n", "wheel"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip" in done.stdout and "wheel --no-deps" in done.stdout and ".venv" not in done.stdout


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
