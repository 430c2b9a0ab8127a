"""The benchmarks run end to end on tiny layers and judge what they measured; no time is asserted."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moekit.bench import timing

for needed in ("rich", "matplotlib"):
    pytest.importorskip(needed)

FOLDER = Path(__file__).parents[1] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture
def harness(monkeypatch):
    return load("_harness", monkeypatch)


@pytest.fixture
def run_here(harness, monkeypatch):
    """Run the jobs of a benchmark in this process, on one thread, and take one sample each: much faster."""
    measure, threads = harness.measure, torch.get_num_threads()

    def run_jobs(script: str, peers: Path, jobs: list) -> tuple[list, list]:
        work = sys.modules[Path(script).stem].work
        found = [work(job) for job in jobs]
        return [r for records, _ in found for r in records], [n for _, notes in found for n in notes]

    monkeypatch.setattr(harness, "run_jobs", run_jobs)
    for name in ("ops", "experts"):
        once = functools.partial(_measure_once, measure)
        monkeypatch.setattr(load(name, monkeypatch), "measure", once)
    torch.set_num_threads(1)
    gc.freeze()  # each measurement collects garbage first, and would look for it in all of Transformers
    yield
    torch.set_num_threads(threads)


def _measure_once(measure: Callable, contenders: Sequence, budget: float, least: int = 0) -> object:
    return measure(contenders, 0.0, 1, 1)


@pytest.fixture
def experts(run_here, monkeypatch):
    moe = pytest.importorskip("transformers.integrations.moe")
    before = dict(moe.ExpertsInterface._global_mapping)
    yield load("experts", monkeypatch)
    moe.ExpertsInterface._global_mapping.clear()
    moe.ExpertsInterface._global_mapping.update(before)


def written(folder: Path, name: str) -> dict:
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / f"{name}.json").read_text()
    assert str(Path.home()) not in text and str(folder) not in text and str(FOLDER.parent) not in text
    return json.loads(text)


# --- the harness ----------------------------------------------------------------------------------------------------


def test_contenders_take_turns(harness):
    calls = []

    def contender(name: str):
        return harness.Contender(name, lambda: calls.append(name) or torch.ones(3))

    names = ["moekit", "a", "b"]
    harness.measure([contender(name) for name in names], budget=0.0, least=4)
    samples = [name for name, previous in zip(calls, [None, *calls], strict=False) if name != previous]
    turns = samples[3:]  # after warming up
    assert len(turns) >= 3 * 4 - 3  # neighbours of two rounds may be the same
    assert max(turns.count(name) for name in names) - min(turns.count(name) for name in names) <= 2


def test_slow_contenders_take_fewer_rounds_spread_evenly(harness):
    order = []

    def sampled(contender, calls: int) -> float:
        order.append(contender.name)
        return 1.0

    ready = [(harness.Contender("fast", lambda: None), 1, 9), (harness.Contender("slow", lambda: None), 1, 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_sample", sampled)
        timing._take_turns(ready)
    assert order.count("fast") == 9 and order.count("slow") == 3
    assert [i for i, name in enumerate(order) if name == "slow"] == pytest.approx([2, 7, 10], abs=1)


def test_measure_reports_failures_and_differences(harness):
    def fail() -> None:
        raise RuntimeError("no compiler")

    ours = torch.linspace(-1, 1, 1000)
    spoiled = ours.clone()
    spoiled[::2] = float("nan")
    contenders = [
        harness.Contender("moekit", lambda: (ours, 1)),
        harness.Contender("near", lambda: [ours + 1e-3]),
        harness.Contender("far", lambda: ours * 2),
        harness.Contender("nan", lambda: spoiled),
        harness.Contender("broken", fail),
    ]
    measured = harness.measure(contenders, budget=0.01, least=2)
    assert measured.failed == {"broken": "RuntimeError: no compiler"}
    assert set(measured.times) == {"moekit", "near", "far", "nan"}
    assert measured.differences["near"] == pytest.approx(1e-3, rel=1e-3)
    assert measured.differences["far"] == pytest.approx(1.0)
    assert measured.differences["nan"] is None
    assert [text.split()[0] for text in harness.unlike(measured.differences)] == ["far", "nan"]


def test_ratio_is_the_others_time_over_ours(harness):
    measured = timing.Measured({"moekit": {"median": 2.0}, "peer": {"median": 6.0}}, {}, {})
    assert measured.ratio("peer") == 3.0
    assert measured.ratio("absent") is None


@pytest.mark.parametrize(
    ("value", "at_most", "met"), [(2.0, False, True), (1.9, False, False), (1.9, True, True), (2.1, True, False)]
)
def test_verdict(harness, value, at_most, met):
    target = harness.verdict("peer", value, 2.0, at_most=at_most)
    assert target["met"] is met
    assert ("met" in harness.verdict_text(target)) is met


def test_verdict_without_a_peer_is_not_measured(harness):
    target = harness.verdict("peer", None, 2.0)
    assert target["met"] is None and "not measured" in harness.verdict_text(target)
    assert "0 of 0 targets met, 1 not measured" in harness.summary([{**target, "where": "here"}])


def test_shapes_are_parsed(harness):
    known = {"layer": harness.Shape("layer", 1, 2, 3, 4, 5)}
    assert harness.parse_shape("layer", known) is known["layer"]
    assert harness.parse_shape("8,16,32,4,2", known) == harness.Shape("custom", 8, 16, 32, 4, 2)
    assert harness.parse_shape("layer:8,16,32,4,2", known).name == "layer"
    for wrong in ("other", "1,2,3", "a,b,c,d,e"):
        with pytest.raises(SystemExit, match="layer"):
            harness.parse_shape(wrong, known)


def test_copy_moves_as_many_bytes_as_asked(harness):
    copy = harness.copy_contender(4096, torch.bfloat16)
    source, target = (cell.cell_contents for cell in copy.call.__closure__)
    assert source.nbytes + target.nbytes == 4096
    target.zero_()
    copy.call()
    assert torch.equal(source, target)


# --- the benchmarks -------------------------------------------------------------------------------------------------


def test_ops_end_to_end(run_here, monkeypatch, tmp_path, capsys):
    ops = load("ops", monkeypatch)
    options = ["--quick", "--shape", "16,32,16,32,2", "--out", str(tmp_path), "--peers", str(tmp_path)]
    assert ops.main(options) == 0
    found = written(tmp_path, "ops")
    assert {record["tokens"] for record in found["records"]} == {16, 1}
    for record in found["records"]:
        assert not record["failed"], record
        assert {"moekit", "moekit torch", "copy_"} <= set(record["seconds"])
        assert all(value < 0.05 for value in record["differences"].values()), record
    # At one token the reference is the target; the targets belong to the full shapes.
    assert {bool(record["targets"]) for record in found["records"] if record["tokens"] == 1} == {True}
    assert not any(record["targets"] for record in found["records"] if record["tokens"] == 16)
    assert "weighted GEGLU backward" in capsys.readouterr().out


def test_ops_judges_the_full_shapes(run_here, monkeypatch):
    ops = load("ops", monkeypatch)
    jobs = ops.plan(load("_harness", monkeypatch).arguments("", ops.SHAPES, []))
    assert [(job["mode"], job["shape"]["name"]) for job in jobs] == [
        (mode, name) for name in ("qwen3", "mixtral") for mode in ("default", "warm")
    ]
    case = ops.Case("permute", 8, lambda: lambda: None, {}, {"nemo": (2.0, 1.2), "copy_": (1.0, 0.9)})
    measured = timing.Measured({n: {"median": 1.0} for n in ("moekit", "nemo", "copy_")}, {}, {})
    wanted = {
        (job["mode"], dtype): [t["wanted"] for t in ops._record(job, case, 4096, dtype, measured)["targets"]]
        for job in jobs
        for dtype in job["dtypes"]
    }
    assert wanted == {
        ("warm", "bf16"): [2.0, 1.0],
        ("warm", "float32"): [1.2, 0.9],
        ("default", "bf16"): [4.0],
        ("default", "float32"): [2.4],
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "warm"])
def test_a_job_in_its_own_process(mode, tmp_path):
    options = ["--quick", "--only", "top-k", "--mode", mode, "--shape", "8,16,8,8,2"]
    command = [sys.executable, str(FOLDER / "ops.py"), *options, "--peers", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    notes = written(tmp_path, "ops")["notes"]
    assert any("nemo: skipped" in note for note in notes) and any("megatron: skipped" in note for note in notes)


@pytest.mark.parametrize("shape", ["qwen3:8,32,16,40,2", "mixtral:8,32,16,4,2", "gpt-oss:8,32,32,4,2"])
def test_experts_end_to_end(experts, tmp_path, shape, capsys):
    assert experts.main(["--quick", "--shape", shape, "--out", str(tmp_path)]) == 0
    records = written(tmp_path, "experts")["records"]
    kinds = [record["kind"] for record in records]
    assert kinds.count("time") == 1 and "peak" in kinds
    assert ("eager" in kinds) is shape.startswith("qwen3")  # only where eager's step needs its own size
    timed = next(record for record in records if record["kind"] == "time")
    assert timed["saved"]["moekit fp8"] < timed["saved"]["moekit"] < timed["saved"]["moekit all"]
    assert timed["saved"]["moekit"] < timed["saved"]["grouped_mm"]
    for figure in ("forward", "step", "decode"):
        assert not timed[figure]["failed"]
        assert "moekit" in timed[figure]["times"] and "grouped_mm" in timed[figure]["times"]
        assert all(value < 0.05 for value in timed[figure]["differences"].values()), figure
    assert "grouped_mm" in capsys.readouterr().out


def test_experts_targets(experts):
    def times(**medians: float) -> dict:
        return {"times": {name: {"median": value} for name, value in medians.items()}}

    shape = {"name": "qwen3", "tokens": 2048, "hidden": 2048, "inner": 768, "experts": 128, "topk": 8}
    record = {"kind": "time", "mode": "warm", "shape": shape, "dtype": "bf16", "judged": True}
    record["saved"] = {"moekit": 10, "moekit fp8": 6, "grouped_mm": 46, "eager": 54}
    record["step"] = times(moekit=1.0, grouped_mm=1.2)
    record["outside"] = {"moekit": 0.2}
    record["forward"] = times(moekit=1.0, grouped_mm=0.9, eager=2.0)
    record["decode"] = times(moekit=1.0, grouped_mm=3.0, batched_mm=1.6)
    peak = {"kind": "peak", "mode": "default", "shape": shape, "dtype": "bf16", "judged": True}
    peaks = [{**peak, "implementation": name, "bytes": size} for name, size in (("moekit", 5), ("grouped_mm", 7))]
    found = {target["what"]: target["met"] for target in experts.judge([record, *peaks])}
    assert found == {
        "saved bytes: grouped_mm's over moekit's": True,
        "saved bytes: eager's over moekit's": False,
        "saved bytes: grouped_mm's over moekit fp8's": False,
        "step: times faster than grouped_mm": True,
        "step: share outside GEMM calls": False,
        "forward: times faster than the best peer": False,
        "decode: times faster than the best peer": True,
        "peak memory: the best peer's over ours": True,
    }


def test_whole_models_are_packed_and_learn(monkeypatch, tmp_path, capsys):
    for needed in ("transformers", "peft"):
        pytest.importorskip(needed)
    import moekit.hf

    whole_model = load("whole_model", monkeypatch)
    options = ["--tiny", "--device", "cpu", "--tokens", "600", "--steps", "3", "--json", str(tmp_path / "rows.json")]
    try:
        with moekit.backend("torch"):
            assert whole_model.main(options) == 0
    finally:
        moekit.hf.unregister()
    rows = json.loads((tmp_path / "rows.json").read_text())
    weights, factors = 2 * 8 * (128 * 64 + 64 * 64), 2 * 8 * 8 * (64 + 128 + 64 + 64)  # of 2 layers of 8 experts
    for row, name, bits in zip(rows, ("Qwen3-30B-A3B", "gpt-oss-20b"), (4.127, 4.25), strict=True):
        parts = {part: size * 2**30 for part, size in row["parts GiB"].items()}
        assert row["model"] == name and row["losses"][2] < row["losses"][1] < row["losses"][0]
        assert parts["experts"] == pytest.approx(weights * bits / 8, rel=1e-3)
        assert (parts["adapters"], parts["moments"]) == (2 * factors, 4 * factors)
    assert "tokens/s" in capsys.readouterr().out


def test_a_loss_in_chunks_is_that_of_the_whole(monkeypatch):
    pytest.importorskip("transformers")
    whole_model = load("whole_model", monkeypatch)
    hidden, head = torch.randn(1100, 8, requires_grad=True), torch.randn(30, 8)
    tokens = torch.randint(30, (1, 1101))

    model = SimpleNamespace(
        model=lambda **_: SimpleNamespace(last_hidden_state=hidden[None]), lm_head=SimpleNamespace(weight=head)
    )
    wanted = torch.nn.functional.cross_entropy(hidden @ head.T, tokens[0, 1:])
    found = whole_model.loss_of(model, tokens)
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in (found, wanted)]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-8)
