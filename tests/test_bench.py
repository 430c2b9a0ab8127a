"""``moekit bench`` on tiny layers; no time is asserted."""

from __future__ import annotations

import gc
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from moekit import moe_utils
from moekit.bench import peers, run, timing
from moekit.bench.cases import Shape, experts_bytes
from moekit.cli.app import app

FIGURES = [
    *("route", "route, backward", "tables and permute", "tables and permute, backward"),
    *("unpermute, weighted", "unpermute, weighted, backward", "SwiGLU, weighted", "SwiGLU, weighted, backward"),
    *("experts", "experts, both ways"),
]
TINY = Shape("tiny", 16, 32, 16, 8, 2)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    measure = timing.measure
    monkeypatch.setattr(
        run, "measure", lambda contenders, *_, alike_only, **__: measure(contenders, 0.0, 1, 1, alike_only=alike_only)
    )
    gc.freeze()  # each measurement collects garbage first, and would look for it in all of Transformers


@pytest.fixture
def published(monkeypatch):
    """The drop-in stands in for a published package, and a broken copy of it for another."""
    twice = SimpleNamespace(permute=lambda x, *a, **k: tuple(2 * part for part in moe_utils.permute(x, *a, **k)[:1]))

    def fails(*args):
        raise RuntimeError("no compiler")

    found = {"same": moe_utils, "twice": twice, "fails": SimpleNamespace(weighted_bias_swiglu_impl=fails)}
    monkeypatch.setattr(peers, "load_peers", lambda: (found, ["gone: skipped, it is not installed"]))


def settings(**changes) -> run.Settings:
    usual = {"shape": TINY, "dtype": "bfloat16", "device": "cpu", "what": "all", "seconds": 0.0, "compiled": False}
    return run.Settings(**{**usual, **changes})


def test_contenders_are_compared_before_they_are_timed(published):
    seen = []
    report = run.run(settings(), lambda name, total: seen.append((name, total)))
    assert seen == [(name, 10) for name in FIGURES]
    assert [record["case"] for record in report["records"]] == FIGURES
    who = {record["case"]: set(record["seconds"]) for record in report["records"]}
    assert all({"moekit", "torch"} <= there for there in who.values())
    assert all(("copy_" in there) == ("experts" not in case) for case, there in who.items())
    of_peer = {case for case, there in who.items() if "same" in there}
    assert of_peer == {case for case in FIGURES if case.startswith(("tables", "unpermute", "SwiGLU"))}
    assert all("transformers" in who[case] for case in FIGURES[-2:])
    assert not any({"twice", "fails"} & there for there in who.values())
    for record in report["records"]:
        ours = {name: value for name, value in record["differences"].items() if name != "twice"}
        assert all(value < 0.03 for value in ours.values()) and {"torch"} <= set(ours), record
    T, H, I, E, R = 16, 32, 16, 8, 32
    assert [record["bytes"] for record in report["records"]] == [
        *(4 * T * E + 12 * R, 8 * T * E + 12 * R, 2 * (T + R) * H, 2 * (T + R) * H),
        *(2 * (T + R) * H + 4 * R, 2 * (T + 2 * R) * H + 8 * R, 2 * 3 * R * I + 4 * R, 2 * 5 * R * I + 8 * R),
        *(0, 0),
    ]
    said = " ".join(report["notes"])
    assert "tables and permute: twice skipped, another result than moekit's: twice (1)" in said
    assert "SwiGLU, weighted: fails skipped, RuntimeError: no compiler" in said and "gone: skipped" in said


@pytest.mark.parametrize(("what", "figures"), [("ops", FIGURES[:-2]), ("experts", FIGURES[-2:])])
def test_what_is_run(published, what, figures):
    report = run.run(settings(what=what, dtype="float32"))
    assert [record["case"] for record in report["records"]] == figures
    assert all(value < 1e-5 for r in report["records"] for who, value in r["differences"].items() if who == "torch")


def test_experts_that_do_not_fit_are_left_out(published, monkeypatch):
    monkeypatch.setattr(run, "_free_bytes", lambda device: experts_bytes(TINY, torch.bfloat16) - 1)
    report = run.run(settings(what="experts"))
    assert not report["records"]
    assert "experts: skipped, they need about 0 GiB, 0 GiB are free" in report["notes"]


def test_peers_that_are_absent_or_broken_are_notes(monkeypatch):
    def broken():
        raise AttributeError("module has no attribute 'that'\nmore")

    monkeypatch.setattr(peers, "_load_nemo", broken)
    monkeypatch.setitem(sys.modules, "megatron", None)
    versions = {"nemo-automodel": "1.2"}
    monkeypatch.setattr(peers, "version_of", versions.get)
    monkeypatch.setattr(peers, "_load_liger", lambda: {"liger": SimpleNamespace()})
    found, notes = peers.load_peers()
    assert set(found) == {"liger"}
    assert notes[0] == "nemo: skipped, nemo-automodel cannot be imported (AttributeError: module has no attribute 'that'"
    assert notes[1] == "megatron: skipped, megatron-core is not installed"


def test_a_contender_may_differ_where_that_is_asked_for():
    contenders = [timing.Contender("moekit", lambda: torch.ones(8)), timing.Contender("far", lambda: torch.zeros(8))]
    assert "far" in timing.measure(contenders, 0.0, 1, 1).times
    found = timing.measure(contenders, 0.0, 1, 1, alike_only=True)
    assert set(found.times) == {"moekit"} and found.failed == {"far": "another result than moekit's: far (1)"}


def nan(size=8):
    return torch.full((size,), math.nan)


def test_a_result_that_is_not_finite_is_another_and_no_number_in_json():
    contenders = [timing.Contender("moekit", lambda: torch.ones(8)), timing.Contender("peer", nan)]
    found = timing.measure(contenders, 0.0, 1, 1, alike_only=True)
    assert set(found.times) == {"moekit"} and found.differences == {"peer": None}
    assert found.failed == {"peer": "another result than moekit's: peer (not finite)"}
    assert timing.unlike({"far": 0.06, "near": 0.05, "peer": None}) == ["far (0.06)", "peer (not finite)"]


@pytest.mark.parametrize(
    ("ours", "why"),
    [(lambda: 1 / 0, "ZeroDivisionError: division by zero"), (nan, "ValueError: the result has NaN or infinity")],
)
def test_nobody_is_compared_with_another_than_the_first(ours, why):
    peers_ = [timing.Contender("bad", lambda: torch.zeros(8)), timing.Contender("good", lambda: torch.ones(8))]
    found = timing.measure([timing.Contender("moekit", ours), *peers_], 0.0, 1, 1, alike_only=True)
    assert (found.failed, found.differences, found.times) == ({"moekit": why}, {}, {})
    found = timing.measure([timing.Contender("moekit", ours), *peers_], 0.0, 1, 1)
    assert (found.failed, found.differences, set(found.times)) == ({"moekit": why}, {}, {"bad", "good"})


def test_where_moekit_fails_its_row_says_so(published, monkeypatch, tmp_path):
    def wrong(gate_up, weights):
        return moe_utils.swiglu(gate_up) * math.nan

    def fails(*args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(run.moekit, "glu", wrong)
    monkeypatch.setattr(run.moekit, "unpermute", fails)
    options = ["--shape", "16,32,16,8,2", "--device", "cpu", "--what", "ops", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", *options], env={"COLUMNS": "120"})
    assert result.exit_code == 1, result.output
    rows = {line.split("  ")[0]: line.split() for line in result.output.splitlines()}
    records = json.loads((tmp_path / "bench.json").read_text(), parse_constant=fails)["records"]
    for record in records:
        ours = record["case"].startswith(("unpermute", "SwiGLU"))
        assert set(record["failed"]) - {"twice", "fails"} == ({"moekit"} if ours else set()), record
        assert ("failed" in rows[record["case"]]) is ours
        if ours:
            assert not record["differences"] and not record["seconds"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1.2e-3, "1.20"), (0.0123456, "12.3"), (0.1, "100"), (1.2345, "1230"), (9.999e-3, "10.0"), (4.5678e-6, "0.00457")],
)
def test_times_have_three_digits(seconds, said):
    assert run.milliseconds(seconds) == said


def _bench(tmp_path):
    options = ["--shape", "16,32,16,8,2", "--device", "cpu", "--what", "ops", "--out", str(tmp_path)]
    return CliRunner().invoke(app, ["bench", *options], env={"COLUMNS": "120"})


@pytest.mark.parametrize("load", [7.5, 0.1])
def test_work_of_others_is_said_before_the_figures_and_in_the_picture(published, monkeypatch, tmp_path, load):
    titles = []
    monkeypatch.setattr(run.system, "cpu", lambda: {"model": "one", "cores": 2, "load": load})
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axis, text, **_: titles.append(text))
    result = _bench(tmp_path)
    assert result.exit_code == 0, result.output
    warning = "others were at work (load 7.5 on 2 cores): these figures mean little"
    before_table = result.output.split("median times")[0].splitlines()
    assert (before_table[-1] == warning, warning in titles[0]) == (load > 1, load > 1)
    assert result.output.count("others were at work") == (load > 1)
    assert json.loads((tmp_path / "bench.json").read_text())["warnings"] == [warning] * (load > 1)


@pytest.mark.parametrize("after", [3, 0])
def test_ctrl_c_keeps_what_was_measured(published, monkeypatch, tmp_path, after):
    record, names = run._record, []

    def interrupted(name, *args):
        if len(names) == after:
            raise KeyboardInterrupt
        names.append(name)
        return record(name, *args)

    monkeypatch.setattr(run, "_record", interrupted)
    monkeypatch.setattr(run.system, "cpu", lambda: {"model": "one", "cores": 2, "load": None})
    result = _bench(tmp_path)
    assert result.exit_code == 130, result.output
    if not after:
        assert result.stderr == "moekit bench: interrupted; nothing was measured, nothing is written\n"
        assert not list(tmp_path.iterdir())
        return
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [one["case"] for one in report["records"]] == names == FIGURES[:3] and report["interrupted"]
    assert report["warnings"] == ["interrupted: 3 of 8 figures"]
    assert result.output.split("median times")[0].endswith("\ninterrupted: 3 of 8 figures\n")
    assert (tmp_path / "bench.png").is_file() and "Written: " in result.output


def test_waits_are_timed():
    waited = []
    timing.measure([timing.Contender("moekit", lambda: torch.ones(8), wait=lambda: waited.append(1))], 0.0, 1, 1)
    assert len(waited) >= 3


def test_the_device_that_is_named_is_waited_for():
    assert run._wait(torch.device("cpu:0")) is None
    wait = run._wait(torch.device("cuda:1"))
    assert wait.func is torch.accelerator.synchronize and wait.args == (torch.device("cuda:1"),)


def test_the_command(published, tmp_path):
    options = [
        "--shape",
        "24,32,16,8,2",
        "--device",
        "cpu:0",
        "--dtype",
        "bf16",
        "--seconds",
        "0.01",
        "--out",
        str(tmp_path / "a"),
    ]
    result = CliRunner().invoke(app, ["bench", *options], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "a" / "bench.json").read_text())
    assert (report["settings"]["dtype"], report["settings"]["device"]) == ("bfloat16", "cpu:0")
    assert report["settings"]["shape"] == {
        "name": "custom",
        "tokens": 24,
        "hidden": 32,
        "inner": 16,
        "experts": 8,
        "topk": 2,
    }
    assert set(report) == {"machine", "settings", "records", "notes", "warnings", "interrupted"}
    assert (tmp_path / "a" / "bench.png").read_bytes().startswith(b"\x89PNG")
    lines = result.output.splitlines()
    header = next(line.split() for line in lines if line.startswith("median times"))
    assert header == ["median", "times", "moekit,", "ms", "torch", "same", "transformers", "copy_"]
    row = next(line for line in lines if line.startswith("SwiGLU, weighted "))
    seconds = report["records"][6]["seconds"]
    for name in ("torch", "same", "copy_"):
        assert f"{seconds[name]['median'] / seconds['moekit']['median']:.2f}x" in row
    assert any("gone: skipped" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nope"], "CONFIG: no file 'nope', and no preset of that name; presets: DeepSeek-V3, "),
        (["--shape", "1,2"], "--shape: wanted T,H,I,E,K, got '1,2'"),
        (["--shape", "4,4,4,2,3"], "--shape: wanted positive numbers and K <= E, got '4,4,4,2,3'"),
        (["OLMoE", "--shape", "4,4,4,2,1"], "--shape: takes the place of a config"),
        (["--shape", "4,4,4,2,1", "--tokens", "8"], "--tokens: the T of --shape says it"),
        (["--device", "nonsense"], "--device: "),
        (["--device", "meta"], "--device: tensors on meta have no values"),
        (["--seconds", "inf"], "--seconds: wanted a finite number, got inf"),
        (["--seconds", "nan"], "'--seconds'"),
        (["--out", "/dev/null"], "--out: wanted a folder to write to, got '/dev/null' (File exists)"),
        (["--dtype", "int8"], "--dtype: wanted bfloat16, float16, float32, got 'int8'"),
        (["--what", "all of it"], "--what: wanted ops, experts, all, got 'all of it'"),
        (["--peers", "/no/such/folder"], "--peers: no such folder: /no/such/folder"),
    ],
)
def test_bad_options_are_one_line(options, said):
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 2
    assert said in result.output and len(result.output.splitlines()) == 1


def test_what_cannot_be_written_is_said_before_anything_is_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "run", None)
    (tmp_path / "bench.png").mkdir()
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "(Is a directory)" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["bench.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--out", str(tmp_path / "other")])
    assert result.exit_code == 2 and "the picture needs matplotlib: pip install 'moekit[cli]'" in result.output


@pytest.mark.parametrize(
    ("name", "tokens", "sizes"),
    [
        (None, None, (2048, 768, 128, 8)),
        ("Mixtral-8x7B", None, (4096, 14336, 8, 2)),
        ("DeepSeek-V3", 7, (7168, 2048, 256, 8)),
        ("gpt-oss-20b", None, (2880, 2880, 32, 4)),
        ("OLMoE-1B-7B", None, (2048, 1024, 64, 8)),
    ],
)
def test_presets(monkeypatch, tmp_path, name, tokens, sizes):
    asked = []

    def stop(settings, progress):
        asked.append(settings)
        raise RuntimeError

    monkeypatch.setattr(run, "run", stop)
    options = [*([name] if name else []), "--device", "cpu", "--out", str(tmp_path)]
    CliRunner().invoke(app, ["bench", *options, *(["--tokens", str(tokens)] if tokens else [])])
    (settings,) = asked
    assert settings.shape == Shape(name or "Qwen3-30B-A3B", tokens or 512, *sizes)
