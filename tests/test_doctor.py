"""What ``moekit doctor`` finds out, where all is well and where things are broken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numba
import pytest
import torch

import moekit
from moekit import _backend
from moekit.cli import _show
from moekit.doctor import choices, examine, system, trials
from moekit.doctor.report import Line, judged, lines
from moekit.kernels.numba import KERNELS, _cache

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(trials, "_SIZES", (64, 32, 8, 2))
    monkeypatch.setattr(trials, "_TOKENS", {True: 32, False: 32})
    monkeypatch.setattr(trials, "_LEAST", 1)
    monkeypatch.setattr(trials, "_SECONDS", 0.0)


def report() -> dict:
    return judged(examine())


@pytest.fixture(scope="module")
def healthy():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MOEKIT_BACKEND", "MOEKIT_DEBUG", "TRITON_INTERPRET"):
            patch.delenv(name, raising=False)
        patch.setattr(trials, "_TOKENS", {True: 32, False: 32})
        patch.setattr(trials, "_SECONDS", 0.0)
        return report()


def plain(found: dict, capsys, monkeypatch) -> str:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    _show.show(list(lines(found)))
    return capsys.readouterr().out


# --- where all is well ------------------------------------------------------------------------------------------------


def test_a_healthy_installation(healthy):
    assert healthy["ok"] and not healthy["problems"] and not healthy["errors"], healthy["problems"]
    assert json.loads(json.dumps(healthy)) == healthy
    assert healthy["versions"]["moekit"] == moekit.__version__
    assert healthy["versions"]["torch"] == torch.__version__ and healthy["versions"]["numba"] == numba.__version__
    assert healthy["threads"] == {"threads": torch.get_num_threads(), "vectors": torch.backends.cpu.get_cpu_capability()}
    assert {name for name, why in healthy["backends"].items() if why is None} == {
        name for name, there in moekit.available().items() if there
    }


def test_the_page_lists_every_key(healthy):
    page = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(healthy)


def test_auto_is_what_runs(healthy):
    for name, choice in healthy["auto"]["cpu"].items():
        with moekit.backend("auto"):
            kernel = _backend.kernel(choices.OPERATORS[name], torch.empty(0, dtype=torch.float32))
        assert (kernel is None) == (choice["backend"] == "torch"), name
        assert kernel is None or kernel.__module__.startswith(f"moekit.kernels.{choice['backend']}."), name
    assert {choice["backend"] for choice in healthy["auto"]["cpu"].values()} == {"numba"}


def test_values_are_compared_on_every_backend(healthy):
    tried = {(trial["device"], trial["backend"], trial["operator"]): trial for trial in healthy["parity"]}
    operators = ("route", "permute", "unpermute", "glu", "glu backward", "experts")
    assert {key for key in tried if key[0] == "cpu"} == {
        ("cpu", name, operator) for name in ("torch", "numba") for operator in operators
    }
    assert all(trial["ok"] and trial["failed"] is None for trial in tried.values())
    assert all(trial["error"] == 0 for key, trial in tried.items() if key[2] == "permute")
    assert all(0 < trial["error"] <= 2**-8 for key, trial in tried.items() if key[2] in ("glu", "glu backward", "unpermute"))


def test_it_fits_a_screen(healthy, capsys, monkeypatch):
    text = plain(healthy, capsys, monkeypatch)
    assert text.splitlines()[0].split() == ["moekit", "doctor", "all", "is", "well"]
    assert len(text.splitlines()) <= 42 and max(map(len, text.splitlines())) <= 80
    for word in (moekit.__version__, "GPUs", "auto, cpu", "MOEKIT_DEBUG is not set", "parity, cpu", "GB/s", "route 1"):
        assert word in text or word == "route 1"


def test_shares_are_of_a_copy_of_as_many_bytes(monkeypatch):
    monkeypatch.setattr(trials, "medians", lambda calls, device: dict.fromkeys(calls, 0.5))
    found = trials.rates("cpu")
    T, H, I, E, K = found["shape"].values()
    assert (T, H, I, E, K) == (32, 64, 32, 8, 2)
    copied = 2 * T * K * 2 * I * 2  # the gate and up halves in bfloat16, read and written
    assert found["copy_gb_per_s"] == pytest.approx(copied / 0.5 / 1e9)
    moved = {"permute": (T + T * K) * H * 2, "glu": 3 * T * K * I * 2 + 4 * T * K, "route": 4 * T * E + 12 * T * K}
    for name, size in moved.items():
        assert found["operators"][name] == {"ms": 500.0, "share": pytest.approx(size / copied)}


def test_medians_are_of_calls_in_turn(monkeypatch):
    order = []
    monkeypatch.setattr(trials, "_LEAST", 3)
    found = trials.medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu")
    assert order == ["a", "b"] * 4 and set(found) == {"a", "b"}  # one to warm up, three that count


# --- where something is wrong -----------------------------------------------------------------------------------------


def broken(*args):
    raise RuntimeError("it broke\nand more")


def wrong(*args):
    return KERNEL(*args) + 1


def not_finite(*args):
    return KERNEL(*args) * float("nan")


KERNEL = KERNELS["permute"]


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (wrong, r"off by \S+ of the largest value, 0 may be"),
        (broken, "RuntimeError: it broke"),
        (not_finite, "off by nan of the largest value"),
    ],
)
def test_a_wrong_kernel_is_found(monkeypatch, capsys, kernel, said):
    monkeypatch.setitem(KERNELS, "permute", kernel)
    parity = list(trials.parity())
    monkeypatch.setattr(trials, "parity", lambda: parity)
    monkeypatch.setattr(choices, "environment", list)
    monkeypatch.setattr(trials, "rates", lambda device: None)
    found = report()
    assert not found["ok"] and json.dumps(found["parity"], allow_nan=False)
    assert re.fullmatch(f"permute by numba on cpu: {said}", found["problems"][0])
    assert {t["operator"] for t in found["parity"] if not t["ok"]} == {"permute", "experts"}  # which permute, too
    text = plain(found, capsys, monkeypatch)
    assert text.splitlines()[1].startswith("problem         permute by numba on cpu: ")
    assert "numba WRONG: permute, experts" in text


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MOEKIT_BACKEND", "foo", "MOEKIT_BACKEND: name must be one of auto, torch, numba, triton, got 'foo'"),
        ("MOEKIT_DEBUG", "false", "MOEKIT_DEBUG: wanted 0 or 1, got 'false': values on GPUs are checked"),
        (
            "TRITON_INTERPRET",
            "yes",
            "TRITON_INTERPRET: wanted 0 or 1, got 'yes'; moekit takes triton to run on GPU tensors only",
        ),
    ],
)
def test_invalid_variables(monkeypatch, name, value, said):
    for other in ("MOEKIT_BACKEND", "MOEKIT_DEBUG", "TRITON_INTERPRET"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(_backend, "_DEFAULT", "foo" if name == "MOEKIT_BACKEND" else "auto")
    monkeypatch.setattr(_backend, "_DEFAULT_DEBUG", name == "MOEKIT_DEBUG")
    found = {variable["name"]: variable for variable in choices.environment()}
    assert {key for key, variable in found.items() if variable["problem"]} == {name}
    assert found[name]["value"] == value and found[name]["problem"] == said


@pytest.mark.parametrize(
    ("value", "meaning"), [("1", "triton runs on any device, interpreted"), ("0", "triton runs on GPU tensors")]
)
def test_valid_variables(monkeypatch, value, meaning):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    (found,) = (variable for variable in _backend.variables() if variable.name == "TRITON_INTERPRET")
    assert found == ("TRITON_INTERPRET", value, meaning, None)
    assert _backend.serves("triton", "cpu") is (value == "1") and _backend.serves("torch", "xla")


@pytest.fixture
def cache_dir(monkeypatch, tmp_path):
    """Has Numba's folder set to one that a test names."""

    def choose(name: str) -> Path:
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / name))
        _cache.folder.cache_clear()
        return tmp_path / name

    yield choose
    _cache.folder.cache_clear()


def test_kernels_on_disk_are_counted(cache_dir):
    chosen = cache_dir("kept")
    folder = Path(choices.cache()["folder"])
    assert folder.is_relative_to(chosen) and folder.is_dir()
    (folder / "a.kernel-1.py311.1.nbc").write_bytes(bytes(100))
    (folder / "a.kernel-1.py311.nbi").write_bytes(bytes(7))
    other = folder.parent / "0123456789ab-0.1-cpython-311"
    other.mkdir()
    (other / "a.kernel-1.py311.1.nbc").write_bytes(bytes(30))
    found = choices.cache()
    assert (found["kernels"], found["kernels_bytes"], found["others"], found["others_bytes"]) == (1, 100, 1, 30)
    assert found["problem"] is None


def test_what_the_trials_compile_is_counted(cache_dir, monkeypatch):
    folder = cache_dir("new")

    def parity():
        (Path(choices.cache()["folder"]) / "a.kernel-1.py311.1.nbc").write_bytes(bytes(1000))
        return []

    monkeypatch.setattr(trials, "parity", parity)
    monkeypatch.setattr(trials, "rates", lambda device: None)
    found = report()
    assert Path(found["cache"]["folder"]).is_relative_to(folder)
    assert (found["cache"]["kernels"], found["cache"]["compiled"]) == (1, 1)
    (text,) = (line.text for line in lines(found) if line.label == "kernels")
    assert text.startswith("1 kernels (1 compiled just now), 0.0 MB, in ")
    assert any("moekit warmup" in hint for hint in found["hints"])  # as there were none before
    facts = {key: found[key] for key in found if key not in ("ok", "problems", "hints")}
    again = judged({**facts, "cache": choices.cache(1)})
    assert again["cache"]["compiled"] == 0 and not any("moekit warmup" in hint for hint in again["hints"])


@pytest.mark.parametrize("without_rich", [False, True])
def test_paths_are_broken_at_slashes_and_lines_end_in_no_blanks(capsys, monkeypatch, without_rich):
    if without_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("COLUMNS", "60")
    path = "/".join(["", "a" * 30, "b-b" * 9, "c" * 70, "end"])
    _show.show(
        [Line("kernels", f"3 kernels, in {path}, which can be written"), Line("hint", "one [two] GB/s " * 7, "yellow")]
    )
    rows = capsys.readouterr().out.splitlines()
    assert all(row == row.rstrip() for row in rows)
    assert [row[16:] for row in rows[:4]] == ["3 kernels, in /", "a" * 30 + "/", "b-b" * 9 + "/", "c" * 70 + "/"]
    assert rows[0][:16] == "kernels         " and rows[4] == " " * 16 + "end, which can be written"
    assert " ".join(" ".join(rows[5:]).split()) == "hint " + " ".join(["one [two] GB/s"] * 7)


def test_auto_is_no_promise_where_the_variable_is_invalid(healthy):
    facts = {key: healthy[key] for key in healthy if key not in ("ok", "problems", "hints")}
    facts["environment"] = [{"name": "MOEKIT_BACKEND", "value": "foo", "meaning": "", "problem": "MOEKIT_BACKEND: not foo"}]
    texts = {line.text: line.style for line in lines(judged(facts)) if line.label == "auto, cpu"}
    said = "every main operator; but with this MOEKIT_BACKEND every call raises"
    assert texts == {f"numba (installed, and for CPU tensors): {said}": "red"}
    assert not any("every call raises" in line.text for line in lines(healthy))


def test_a_cache_folder_that_cannot_be_written(cache_dir, monkeypatch, capsys):
    chosen = cache_dir("file")
    chosen.write_text("")
    monkeypatch.setattr(trials, "parity", list)
    found = report()
    assert found["cache"]["folder"] is None and not found["ok"]
    said = f"kernels on disk: NUMBA_CACHE_DIR={chosen} cannot be written: each process compiles"
    assert found["problems"][0].startswith(said)
    assert "problem         kernels on disk: NUMBA_CACHE_DIR=" in plain(found, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("error", "spec", "said"),
    [
        (ModuleNotFoundError("No module named 'numba'", name="numba"), None, "is not installed; get it with: pip install"),
        (
            ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite"),
            object(),
            "cannot be imported: No module named",
        ),
        (ImportError("Numba needs NumPy 2.3 or less"), object(), "cannot be imported: Numba needs NumPy"),
    ],
)
def test_absent_is_not_broken(monkeypatch, error, spec, said):
    monkeypatch.setattr(_backend, "_load", lambda name: error if name == "numba" else {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert _backend.why_not("numba").startswith(said)
    assert _backend.explain("glu", "cpu") == ("torch", f"numba {_backend.why_not('numba')}")
    found = {**dict.fromkeys(("versions", "requires", "environment", "cache", "parity", "pages", "gpus")), "errors": {}}
    found = judged({**found, "backends": choices.backends()})
    assert found["ok"] is (spec is None)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (system, "versions"),
        (system, "cpu"),
        (system, "floors"),
        (system, "threads"),
        (system, "gpus"),
        (choices, "environment"),
        (choices, "backends"),
        (choices, "cache"),
        (choices, "automatic"),
        (trials, "devices"),
        (trials, "parity"),
        (trials, "rates"),
        (trials, "fresh_pages"),
    ],
)
def test_a_probe_that_fails_is_a_line(monkeypatch, capsys, module, name):
    quick = {(trials, "parity"): list, (trials, "rates"): lambda device: None, (trials, "fresh_pages"): lambda: None}
    for (other, attribute), stand_in in quick.items():
        monkeypatch.setattr(other, attribute, stand_in)
    monkeypatch.setattr(module, name, broken)
    found = report()
    (said,) = found["errors"].values()
    assert said == "RuntimeError: it broke" and f"could not be looked at: {said}" in found["problems"][-1]
    assert said in " ".join(plain(found, capsys, monkeypatch).split())


def test_versions_that_are_too_old(healthy):
    floors = {"torch": "99.1", "numba": "0.62"}
    found = judged({**{key: healthy[key] for key in healthy if key not in ("ok", "problems", "hints")}, "requires": floors})
    assert found["problems"] == [f"torch {torch.__version__} is too old: moekit needs 99.1 or newer"]
    for version, floor, old in (("2.9.1", "2.10", True), ("2.10.0+cpu", "2.10", False), ("3.0", "2.10", False)):
        assert system.too_old(version, floor) is old


def test_hints_say_what_to_install(healthy):
    facts = {key: healthy[key] for key in healthy if key not in ("ok", "problems", "hints")}
    lacking = {**facts, "versions": {**facts["versions"], "numba": None, "transformers": None}}
    assert [hint for hint in judged(lacking)["hints"] if "pip" in hint] == [
        "pip install 'moekit[cpu]': kernels for CPUs, several times as fast as the reference",
        "pip install 'moekit[hf]': Transformers' models with moekit's experts",
    ]
    slow = {**facts, "pages": {"fresh_ms": 40.0, "again_ms": 8.0}}
    assert any("moekit.keep_pages()" in hint and "40 ms" in hint for hint in judged(slow)["hints"])
    fast = {**facts, "pages": {"fresh_ms": 8.0, "again_ms": 8.0}}
    assert not any("keep_pages" in hint for hint in judged(fast)["hints"])


# --- the base install -------------------------------------------------------------------------------------------------

BASE = """
import contextlib, io, json, sys
for name in ("typer", "rich", "numba", "numpy", "llvmlite", "triton", "transformers", "matplotlib"):
    sys.modules[name] = None
from moekit import cli

def run(*arguments):
    sys.argv = ["moekit", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            status = None
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()

found = {" ".join(a): run(*a) for a in ((), ("-h",), ("--version",), ("plan",), ("foo",), ("--x",))}
found |= {" ".join(a): run("doctor", *a) for a in (("-h", "--json"), ("--json", "--y"))}
from moekit.doctor import trials
trials._TOKENS, trials._SIZES, trials._SECONDS = {True: 32, False: 32}, (64, 32, 8, 2), 0.0
found["doctor"], found["doctor --json"] = run("doctor"), run("doctor", "--json")
sys.modules["torch"] = None
found["no torch"] = run("doctor")
print(json.dumps(found))
"""


def test_the_base_install_and_without_torch(monkeypatch):
    for name in ("MOEKIT_BACKEND", "MOEKIT_DEBUG", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", BASE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[""] == found["-h"] and found["-h"][0] == 0 and "pip install 'moekit[cli]'" in found["-h"][1]
    assert all(f"\n  {name} " in found["-h"][1] for name in ("demo", "plan", "doctor", "bench", "check", "warmup"))
    assert found["--version"] == [0, f"moekit {moekit.__version__}\n", ""]
    assert found["plan"] == [2, "", "moekit plan: needs the extra cli: pip install 'moekit[cli]' (no module rich)\n"]
    assert found["foo"] == [2, "", "moekit: no such command: foo (see moekit --help)\n"]
    assert found["--x"] == [2, "", "moekit: no such option: --x (see moekit --help)\n"]
    assert found["-h --json"][0] == 0 and found["-h --json"][1].startswith("usage: moekit doctor [-h] [--json]\n")
    assert found["--json --y"] == [2, "", "moekit doctor: no such option: --y (see moekit doctor --help)\n"]
    status, text, error = found["doctor"]
    assert status == 0 and not error, (text, error)
    assert text.splitlines()[0].split()[2:] == ["all", "is", "well"]
    assert "torch (numba is not installed; get it with: pip install" in " ".join(text.split())
    facts = json.loads(found["doctor --json"][1])
    assert facts["ok"] and facts["backends"]["numba"].startswith("is not installed")
    assert {trial["backend"] for trial in facts["parity"]} == {"torch"} and all(t["ok"] for t in facts["parity"])
    assert {choice["backend"] for choice in facts["auto"]["cpu"].values()} == {"torch"}
    status, text, error = found["no torch"]
    assert status == 1 and not error
    first, second = text.splitlines()[:2]
    assert first.split()[2:] == ["1", "problem"] and second.startswith(
        "problem         torch cannot be used: ModuleNotFound"
    )
