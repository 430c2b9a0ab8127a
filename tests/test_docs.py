"""The pages: their code runs, their tables and pictures are what the scripts make, and the site builds without a warning."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _pages import blocks, follow
from _ranks import on_ranks, preload

import moekit

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)

ELSEWHERE = {"docs/how-to/expert_parallel.md": "test_ep_layer.py", "docs/how-to/deepep.md": "test_ep_adapters.py"}
RANKS = ("docs/how-to/ddp.md", "docs/how-to/fsdp2.md")  # under torchrun
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))]
WITH_CODE = [page for page in PAGES if any(language == "python" for language, _, _ in blocks(ROOT / page))]
ALONE = [page for page in WITH_CODE if page not in (*ELSEWHERE, *RANKS)]

preload("torch.distributed.fsdp")


# --- code ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What went wrong on each page, all of them in one process of their own, as a reader has it."""
    command = [sys.executable, str(ROOT / "tests" / "_pages.py"), *(str(ROOT / page) for page in ALONE)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return {Path(path).relative_to(ROOT).as_posix(): text for path, text in json.loads(done.stdout).items()}


@pytest.mark.parametrize("page", ALONE)
def test_code_runs(page: str, outcomes: dict[str, str]):
    assert not outcomes[page], outcomes[page]


def pages_of_ranks() -> list[str]:
    for page in RANKS:
        follow(ROOT / page)
    return list(RANKS)


def test_code_runs_on_two_ranks(tmp_path: Path):
    assert on_ranks(pages_of_ranks, 2, tmp_path) == [list(RANKS)] * 2


def test_links_to_other_files_lead_somewhere():
    for page in PAGES:
        path = ROOT / page
        for target in re.findall(r"\]\((\.\./[^)#\s]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{page}: {target}"


def test_no_code_is_left_out():
    assert {*ELSEWHERE, *RANKS} <= {*WITH_CODE}
    for page, test in ELSEWHERE.items():
        assert page.rpartition("/")[2] in (ROOT / "tests" / test).read_text(encoding="utf-8")
    for page in PAGES:
        for language, line, code in blocks(ROOT / page):
            if page.startswith("docs/") and language == "py":
                assert code.startswith("# needs "), f"{page}:{line}: code that is not run says what it needs"


EXAMPLES = [
    "moekit.route",
    "moekit.Routing",
    "moekit.permute",
    "moekit.unpermute",
    "moekit.glu",
    "moekit.experts",
    "moekit.grouped_linear",
    "moekit.pack",
    "moekit.Lora",
    "moekit.balance_loss",
    "moekit.aux_loss",
    "moekit.backend",
    "moekit.Replay",
    "moekit.nn.MoE",
    "moekit.nn.Router",
    "moekit.monitor.attach",
    "moekit.hf.register",
    "moekit.hf.pack",
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_of_a_docstring(name: str):
    """Those of the names that most users begin with; each with what it prints."""
    holder, _, last = name.rpartition(".")
    thing = getattr(importlib.import_module(holder), last)
    test = doctest.DocTestParser().get_doctest(thing.__doc__, {}, name, None, 0)
    assert test.examples and any(example.want for example in test.examples)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)


# --- tables and pictures ------------------------------------------------------------------------------------------------


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_figures():
    tables = script("tables")
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page(), "python docs/tables.py writes the page"
    assert tables.PLAN.read_text(encoding="utf-8") == tables.plan_page(), "python docs/tables.py writes its table of times"
    prose = (DOCS / "performance" / "gpu.md").read_text(encoding="utf-8")
    for shape in ("Mixtral-8x7B", "DeepSeek-V3"):
        assert tables.operators(shape).split("\n", 2)[2] in prose


def test_the_pictures_are_drawn():
    pictures = script("pictures")
    for name, draw in pictures.PICTURES.items():
        assert (pictures.FOLDER / name).read_text(encoding="utf-8") == draw(), "python docs/pictures.py draws them"


# --- the site -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a link or an anchor that leads nowhere fails. (``--quiet`` would hide it.)"""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_needs_nothing_from_elsewhere(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    loaded = re.compile(r"<(?:script|img|source|iframe)\b[^>]*\bsrc=\"?(https?:)?//|<link\b[^>]*\bhref=\"?(https?:)?//")
    for page in pages:
        found = loaded.search(page.read_text(encoding="utf-8"))
        assert not found, f"{page.relative_to(site)}: {found[0]}"


REFERENCE = ("", ".nn", ".ep", ".hf", ".monitor", ".moe_utils", ".plan", ".checks")


@pytest.mark.parametrize("module", [f"moekit{part}" for part in REFERENCE])
def test_every_public_name_is_in_the_reference(site: Path, module: str):
    written = "".join(page.read_text(encoding="utf-8") for page in (site / "reference" / "api").glob("*.html"))
    names = {f"{module}.{name}" for name in importlib.import_module(module).__all__} - {"moekit.hf.routers"}
    assert not {name for name in names if f'id="{name}"' not in written}


def test_no_role_of_another_markup_is_left(site: Path):
    for page in (site / "reference" / "api").glob("*.html"):
        assert not re.search(r":(func|class|meth|mod|attr):", page.read_text(encoding="utf-8")), page.name
    assert moekit.__name__ in (site / "index.html").read_text(encoding="utf-8")
