"""`moekit demo`: its text, model, training, comparison, picture and command line."""

import io
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from _ranks import on_ranks
from rich.console import Console
from typer.testing import CliRunner

import moekit
from moekit.cli.app import app
from moekit.demo import DemoError, data
from moekit.demo import run as demo_run
from moekit.demo.compare import largest_difference, layer_input, saved_for_backward, step_together
from moekit.demo.config import Config, config_names, load_config
from moekit.demo.display import LiveDisplay, PlainLog, progress
from moekit.demo.interrupt import Interrupt
from moekit.demo.model import LoopMoE, MoE, build_model, sample
from moekit.demo.report import balance_note, key_measurements
from moekit.demo.train import Measurement, Run, learning_rate, measured_steps

needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="--config reads TOML with Python 3.11's tomllib")
CPU = torch.device("cpu")
TINY = Config(
    layers=2, hidden=32, heads=2, experts=4, intermediate=16, context=32, batch=8, steps=40, learning_rate=1e-2,
    heldout_windows=8, measurements=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty files of text that a model can learn."""
    root = tmp_path_factory.mktemp("text")
    (root / "sub").mkdir()
    for i in range(20):
        place = root / "sub" if i % 2 else root
        lines = (f"line {i * j} of file {i}: {'word ' * (j % 4)}\n" for j in range(60))
        (place / f"file{i}.txt").write_text("".join(lines))
    (root / ".hidden").write_text("secret")
    (root / "binary.bin").write_bytes(b"\0\1\2")
    (root / "empty.txt").write_text("")
    return root


@pytest.fixture(scope="module")
def corpus(folder):
    return data.load_corpus(folder)


def new_run(corpus, layer=MoE, seed=0, config=TINY):
    return Run(build_model(config, seed, CPU, layer), config, corpus, seed)


@pytest.fixture(scope="module")
def trained(corpus):
    """Both layers, trained on the same batches."""
    run, rival = new_run(corpus), new_run(corpus, LoopMoE)
    run.measure()
    for number in range(1, TINY.steps + 1):
        step_together(run, rival)
        if number in measured_steps(TINY):
            run.measure()
    return run, rival


def invoke(*args):
    return CliRunner().invoke(app, ["demo", *map(str, args)])


# --- text -----------------------------------------------------------------------------------------------------------


def test_split_is_by_file_and_disjoint(folder, corpus):
    train, heldout = set(corpus.train_files), set(corpus.heldout_files)
    assert not train & heldout
    assert train | heldout == {p.relative_to(folder).as_posix() for p in folder.rglob("file*.txt")}
    assert heldout == {name for name in train | heldout if data.is_heldout(name)}
    for content, names in ((corpus.train, corpus.train_files), (corpus.heldout, corpus.heldout_files)):
        assert bytes(content.tolist()) == b"".join((folder / name).read_bytes() for name in names)


def test_split_depends_on_the_name_alone():
    assert [i for i in range(40) if data.is_heldout(f"package/module{i}.py")] == [0, 11, 16, 20, 28, 29, 33]
    assert sum(data.is_heldout(f"{i}.py") for i in range(5000)) == pytest.approx(500, abs=70)


def test_standard_library_leaves_out_packages_and_tests():
    corpus = data.load_corpus()
    names = corpus.train_files + corpus.heldout_files
    assert not set(corpus.train_files) & set(corpus.heldout_files)
    assert {"argparse.py", "asyncio/events.py"} <= set(names)
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]
    assert len(corpus.train) > 5 * len(corpus.heldout) > 1_000_000
    assert "Python's standard library" in corpus.source


def test_single_file_is_cut(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 201)))
    corpus = data.load_corpus(path)
    assert (corpus.train.tolist(), corpus.heldout.tolist()) == (list(range(1, 181)), list(range(181, 201)))


@pytest.mark.parametrize("names", [["a.txt", "b.txt"], ["package/module0.py", "package/module11.py"]])
def test_two_files_give_both_sides(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = data.load_corpus(tmp_path)
    assert len(corpus.train_files) == len(corpus.heldout_files) == 1


def test_reading_stops_at_a_limit(folder, monkeypatch):
    monkeypatch.setattr(data, "_MAX_BYTES", 2**14)
    corpus = data.load_corpus(folder)
    assert len(corpus.train) + len(corpus.heldout) <= 2**14
    assert "its first 0 MiB" in corpus.source


def test_windows_are_fixed_apart_and_from_the_text():
    content = torch.arange(250, dtype=torch.uint8)
    windows = data.heldout_windows(content, 100, 32)
    assert windows.shape == (7, 33)  # (250 - 1) // 32: no more fit without overlap
    assert (windows.diff(dim=1) == 1).all() and (windows[:, 0].diff() >= 32).all()
    assert windows[0, 0] == 0 and windows[-1, -1] == 249
    batch = data.training_batch(content, 500, 32, torch.Generator().manual_seed(0))
    assert batch.shape == (500, 33) and (batch.diff(dim=1) == 1).all()
    assert batch.min() == 0 and batch.max() == 249


def test_bigram_equals_an_independent_computation():
    text, unseen = b"the theme of the thing is then that\n", b"these things\nother"
    counts, firsts = Counter(pairwise(text)), Counter(text[:-1])
    pairs = list(pairwise(unseen))
    expected = -sum(math.log2((counts[pair] + 1) / (firsts[pair[0]] + 256)) for pair in pairs) / len(pairs)
    bigram = data.Bigram(torch.tensor(list(text), dtype=torch.uint8))
    assert bigram.bits_per_byte(torch.tensor([list(unseen)])) == pytest.approx(expected, rel=1e-12)
    assert torch.exp2(bigram.log_probs).sum(1) == pytest.approx(1.0)


# --- model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"balance_coeff": 0.0}, {"balance_coeff": 0.5}, {"balance": "bias"}, {"balance": "none", "collapsed": 3}]
)
def test_layers_have_equal_outputs_and_gradients(settings):
    torch.manual_seed(0)
    config = Config(hidden=32, heads=2, experts=8, topk=2, intermediate=24, **settings)
    layer, plain = MoE(config), LoopMoE(config)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.normal_()
    plain.load_state_dict(layer.state_dict())
    x, weight = torch.randn(100, 32), torch.randn(100, 32)
    results = []
    for each in (layer, plain):
        tokens = x.clone().requires_grad_()
        out = each(tokens)
        ((out * weight).sum() + each.extra_loss).backward()
        results.append({"out": out, "x": tokens.grad, **{name: p.grad for name, p in each.named_parameters()}})
    assert (layer.load == plain.load).all() and layer.load.sum() == 200
    if layer.router.expert_counts is not None:
        assert torch.equal(layer.router.expert_counts, plain.router.expert_counts)
    for name, got in results[0].items():
        assert got.abs().max() > 0.1, name
        torch.testing.assert_close(got, results[1][name], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_balancing_loss_reaches_the_router():
    torch.manual_seed(0)
    x, grads = torch.randn(100, 128), []
    for coeff in (0.0, 0.5):
        torch.manual_seed(1)
        layer = MoE(Config(balance_coeff=coeff))
        layer(x).sum().backward()
        grads.append(layer.router.weight.grad)
    assert (grads[0] - grads[1]).abs().max() > 1e-3


def test_collapsed_routers_send_every_token_to_the_same_experts():
    model = build_model(replace(TINY, collapsed=2), 0, CPU)
    model(torch.randint(256, (8, 32)))
    assert model.load().tolist() == [[256, 256, 0, 0]] * TINY.layers


@pytest.mark.parametrize("balance", ["loss", "bias", "none"])
def test_balancing_undoes_a_collapse(corpus, balance):
    config = replace(TINY, balance=balance, collapsed=2, steps=200, balance_coeff=0.2, bias_rate=0.02)
    run = new_run(corpus, config=config)
    for _ in range(config.steps):
        run.step()
    run.measure()
    load = run.measurements[-1].load.double()
    worst = (load.max(1).values / load.mean(1)).max()
    assert worst > 1.8 if balance == "none" else worst < 1.5


def test_measuring_moves_no_bias(corpus):
    run = new_run(corpus, config=replace(TINY, balance="bias"))
    for step in range(4):  # of which the first three are without balancing
        run.step()
        run.measure()
        biases = [layer.router.expert_bias.abs().max().item() for layer in run.model.layers]
        assert biases == pytest.approx([0.0 if step < 3 else 0.01] * TINY.layers)
        assert all((layer.router.expert_counts == 0).all() for layer in run.model.layers)


def test_model_sees_no_later_byte():
    model = build_model(TINY, 0, CPU)
    torch.nn.init.normal_(model.head.weight)
    windows = torch.randint(256, (1, 32))
    changed = windows.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 256
    before, after = model(windows)[0], model(changed)[0]
    torch.testing.assert_close(before[:20], after[:20])
    assert (before[20:] - after[20:]).abs().amax(1).min() > 1e-3


def test_parameters_depend_on_the_seed_alone():
    first, plain, other = build_model(TINY, 3, CPU), build_model(TINY, 3, CPU, LoopMoE), build_model(TINY, 4, CPU)
    for name, value in first.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
    assert not torch.equal(first.layers[0].router.weight, other.layers[0].router.weight)


# --- training -------------------------------------------------------------------------------------------------------


def test_training_learns_and_repeats_itself(trained, corpus):
    run, _ = trained
    assert run.measurements[0].bits_per_byte == pytest.approx(8.0)
    assert run.losses[0] == pytest.approx(8.0)
    assert run.losses[-1] < 5 and run.measurements[-1].bits_per_byte < 5
    again = new_run(corpus)
    for _ in range(5):
        again.step()
    assert again.losses == run.losses[:5]


def test_measurement_is_the_mean_over_the_windows(trained):
    run, _ = trained
    inputs, targets = run.windows[:, :-1], run.windows[:, 1:]
    with torch.no_grad():
        probs = run.model(inputs).softmax(-1).double()
    expected = -probs.gather(2, targets.unsqueeze(2)).log2().mean().item()
    assert run.measurements[-1].bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert run.measurements[-1].load.tolist() == run.model.load().tolist()
    assert (run.measurements[-1].load.sum(1) == inputs.numel() * TINY.topk).all()


def test_both_layers_train_alike(trained):
    run, rival = trained
    assert len(run.losses) == len(rival.losses) == TINY.steps
    largest, step = largest_difference(run, rival)
    assert largest == abs(run.losses[step - 1] - rival.losses[step - 1])
    assert largest < 1e-4


def test_other_choices_are_counted(corpus):
    run, rival = new_run(corpus), new_run(corpus, LoopMoE)
    assert step_together(run, rival) == 0
    with torch.no_grad():
        rival.model.layers[0].router.weight.neg_()
    assert 0 < step_together(run, rival) <= TINY.batch * TINY.context * TINY.layers
    assert torch.equal(rival.model.layers[0].load, run.model.layers[0].load)


def test_loads_are_shown_before_and_after_balancing(trained):
    run, _ = trained
    titles = [title for title, _ in key_measurements(run)]
    assert titles == [
        "step 0: untrained",
        "step 3: trained so far without the balancing loss",
        "step 40: with the balancing loss since step 3",
    ]
    assert [m.step for _, m in key_measurements(run)] == [0, 3, 40]


def test_learning_rate_rises_then_falls():
    config = Config(steps=100, warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == 1 and rates[100] == pytest.approx(0.05)


def test_diverged_training_says_so(corpus):
    run = new_run(corpus)
    torch.nn.init.constant_(run.model.head.weight, float("nan"))
    with pytest.raises(DemoError, match="the loss is nan after step 1"):
        run.step()


def test_sample_continues_the_prompt(trained):
    run, _ = trained
    texts = [sample(run.model, b"line ", 40, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(b"line ") and len(text) == 45 for text in texts)


# --- comparison -----------------------------------------------------------------------------------------------------


def test_saved_bytes_count_each_storage_once():
    x = torch.randn(10, 8)
    linear = torch.nn.Linear(8, 8)
    assert saved_for_backward(linear, x) == 0  # its input and its weight
    assert saved_for_backward(torch.nn.Sequential(linear, torch.nn.Sigmoid()), x) == 10 * 8 * 4

    # square keeps its input, the sigmoid's output: the same storage
    class Square(torch.nn.Module):
        def forward(self, x):
            return x.square()

    assert saved_for_backward(torch.nn.Sequential(torch.nn.Sigmoid(), Square()), x) == 10 * 8 * 4


def test_moekit_saves_less(trained):
    run, rival = trained
    x = layer_input(run.model, run.windows[:, :-1])
    rows, intermediate = x.shape[0] * TINY.topk, TINY.intermediate
    kept, plain = (saved_for_backward(each.model.layers[0], x) for each in (run, rival))
    assert 4 * rows * 2 * intermediate <= kept < plain / 2


# --- display --------------------------------------------------------------------------------------------------------


def console(terminal, **options):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, **options)


def test_display_suits_the_console():
    assert isinstance(progress(console(True, _environ={"TERM": "xterm"}), 3.5, 10), LiveDisplay)
    assert isinstance(progress(console(True, _environ={"TERM": "dumb"}), 3.5, 10), PlainLog)
    assert isinstance(progress(console(False), 3.5, 10), PlainLog)


def test_live_display_shows_figures_and_loads(trained):
    run, _ = trained
    screen = console(True, _environ={"TERM": "xterm"}, no_color=True)
    with progress(screen, 3.567, TINY.steps) as display:
        display.update(run)
    shown = screen.file.getvalue()
    for text in (f"{run.losses[-1]:.3f}", f"{run.measurements[-1].bits_per_byte:.3f}", "3.567", "tokens/s", "40/40"):
        assert text in shown
    assert "experts 1-4" in shown and any(level in shown for level in "▃▄▅")


def test_plain_log_prints_each_measurement_once(trained):
    run, _ = trained
    log = console(False)
    with progress(log, 3.567, TINY.steps) as display:
        display.update(run)
        display.update(run)
    *legend, line = log.file.getvalue().splitlines()
    assert len(legend) == 3
    assert line.startswith("step 40/40  loss ") and f"held-out {run.measurements[-1].bits_per_byte:.3f}" in line
    assert "model has 3.567" in log.file.getvalue() and all(each.isascii() for each in (*legend, line))


# --- the command ----------------------------------------------------------------------------------------------------

TOML = """
layers = 2
hidden = 32
heads = 2
experts = 4
intermediate = 16
context = 32
steps = 12
heldout_windows = 8
measurements = 2
learning_rate = 1e-2
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(TOML)
    return path


@needs_toml
def test_demo_trains_compares_prints_and_draws(folder, config_file, tmp_path):
    from matplotlib.image import imread

    picture = tmp_path / "new" / "picture.png"
    result = invoke("--config", config_file, "--data", folder, "--out", picture, "--compare")
    assert result.exit_code == 0, result.output
    for text in (
        "on the same 256 bytes (8 windows)",
        "mixture of experts",
        "byte bigram model",
        "tokens/s",
        "step 1: trained so far without the balancing loss",
        "loop over experts",
        "Largest difference of the training losses",
        "No sample: the model is not better than the bigram model yet.",
        "picture.png",
    ):
        assert text in result.output
    pixels = imread(picture)
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1500
    assert len({tuple(p) for p in pixels[::7, ::7].reshape(-1, pixels.shape[2]).tolist()}) > 50


@needs_toml
def test_steps_replace_the_config(folder, config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_run.Bigram, "bits_per_byte", lambda *_: 99.0)  # any model is better: there is a sample
    result = invoke("--config", config_file, "--data", folder, "--out", tmp_path, "--steps", 2, "--seed", 5)
    assert result.exit_code == 0, result.output
    assert "step 2/2 " in result.output and "Trained 2 steps" in result.output
    assert "A sample, continuing 'def '" in result.output
    assert (tmp_path / "demo.png").stat().st_size > 20_000


@needs_toml
def test_the_bias_and_a_collapse_are_options(folder, config_file, tmp_path):
    options = ("--config", config_file, "--data", folder, "--out", tmp_path, "--balance", "bias", "--collapsed", 2)
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    assert "step 12: with the balancing bias since step 1" in result.output
    assert "200 200   0   0" in result.output
    result = invoke(*options[:-3], "luck")
    assert result.exit_code == 2 and "setting 'balance': expected one of loss, bias, none" in result.output


@needs_toml
def test_time_limit_ends_the_run(folder, config_file, tmp_path):
    config_file.write_text(TOML + "time_limit = 0.0\n")
    result = invoke("--config", config_file, "--data", folder, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Stopped after 1 of 12 steps" in result.output


@pytest.mark.parametrize(("model_bits", "complete", "code"), [(3.0, True, 1), (2.4, True, 0), (3.0, False, 0)])
def test_a_whole_default_run_must_beat_the_bigram_model(monkeypatch, model_bits, complete, code):
    result = demo_run.Result(model_bits, bigram_bits=3.0, complete=complete)
    monkeypatch.setattr(demo_run, "run_demo", lambda *_, **__: result)
    assert invoke().exit_code == code
    assert invoke("--steps", 3).exit_code == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "missing", "No such file"),
        (lambda root: root / "empty.txt", "expected text, got 0 bytes"),
        (lambda root: root / "binary.bin", "expected text, got a binary file"),
        (lambda root: root / "folder", "expected at least 2 files of text, got 0"),
        (lambda root: root / "short.txt", "of held-out text (one window), got 50"),
    ],
)
def test_unusable_text_is_refused(tmp_path, make, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(b"\0" * 100)
    (tmp_path / "folder").mkdir()
    (tmp_path / "short.txt").write_text("0123456789" * 50)
    path = make(tmp_path)
    result = invoke("--data", path, "--out", tmp_path, "--steps", 1)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert message in result.output and str(path) in result.output


@needs_toml
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz = 3", "unknown setting 'stepz'; there are layers,"),
        ("steps = 1.5", "steps is int, got 1.5"),
        ("steps = true", "steps is int, got True"),
        ("steps = 0", "setting 'steps': expected at least 1, got 0"),
        ("topk = 17", "setting 'topk': expected at most experts (16), got 17"),
        ("intermediate = 30", "setting 'intermediate': expected a multiple of 4, got 30"),
        ("heads = 3", "setting 'hidden': expected a multiple of twice the heads"),
        ("warmup = 1", "setting 'warmup': expected a share"),
        ("steps =", "not a TOML file"),
        ("balance = 'luck'", "setting 'balance': expected one of loss, bias, none, got 'luck'"),
        ("collapsed = 17", "setting 'collapsed': expected at most experts (16), got 17"),
    ],
)
def test_bad_settings_are_refused(config_file, content, message):
    config_file.write_text(content)
    result = invoke("--config", config_file)
    assert result.exit_code == 2
    assert message in result.output


@needs_toml
def test_other_bad_options_are_refused(tmp_path):
    result = invoke("--config", "missing")
    assert result.exit_code == 2 and "--config missing: no such name (large, tiny)" in result.output
    result = invoke("--device", "nonsense")
    assert result.exit_code == 2 and "--device nonsense: " in result.output
    (tmp_path / "file").write_text("")
    result = invoke("--out", tmp_path / "file" / "below.png")
    assert result.exit_code == 2 and "--out " in result.output


@pytest.mark.parametrize(
    ("out", "got"),
    [
        ("new.jpg", "got a .jpg file"),
        ("old.svg", "got a .svg file"),
        ("old", "got another file"),
        ("pipe", "got neither a file nor a folder"),
        ("pipe.png", "got neither a file nor a folder"),
        (os.devnull, "got neither a file nor a folder"),
        ("folder.png", "cannot be written"),
    ],
)
def test_what_is_no_place_for_a_picture_is_refused_before_training(monkeypatch, tmp_path, out, got):
    for name in ("old.svg", "old"):
        (tmp_path / name).write_text("kept")
    for name in ("pipe", "pipe.png"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(demo_run, "_run", lambda *_: pytest.fail("it trains"))
    result = invoke("--out", tmp_path / out)
    assert result.exit_code == 2 and f"--out {tmp_path / out}: " in result.output and got in result.output
    assert not (tmp_path / "new.jpg").exists() and (tmp_path / "old.svg").read_text() == "kept"


def test_names_of_pictures_and_folders(tmp_path):
    (tmp_path / "v1.5").mkdir()
    for out, wanted in (("a.PNG", "a.PNG"), ("new", "new/demo.png"), ("v1.5", "v1.5/demo.png"), ("x/y.png", "x/y.png")):
        assert demo_run._output_file(tmp_path / out) == tmp_path / wanted
        assert (tmp_path / wanted).parent.is_dir()


@needs_toml
def test_shipped_settings_are_valid():
    assert config_names() == ["large", "tiny"]
    assert load_config(None) == Config()
    for name in config_names():
        assert load_config(name) != Config()
    assert load_config(None, balance="bias", collapsed=2) == Config(balance="bias", collapsed=2)
    changed = load_config("tiny", steps=7)
    assert (changed.steps, changed.time_limit) == (7, math.inf)


def test_help_loads_no_heavy_module():
    script = "import sys, moekit.cli.app; print({'torch', 'matplotlib', 'moekit.demo.run'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_waiting_threads_give_way():
    script = (
        "import os, sys, moekit.cli.app\n"
        "from typer.testing import CliRunner\n"
        "CliRunner().invoke(moekit.cli.app.app, ['demo', '--device', 'nonsense'])\n"
        "print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", script]
    for given, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | given)
        assert done.stdout == f"True {expected}\n"


class Interrupted(Run):
    """A run in which Ctrl-C is pressed during a step, as often as ``presses`` says."""

    presses = 1

    def step(self) -> None:
        if len(self.losses) == 4:
            for _ in range(self.presses):
                signal.raise_signal(signal.SIGINT)
        super().step()


@needs_toml
def test_an_interrupt_keeps_what_was_finished(monkeypatch, folder, config_file, tmp_path):
    monkeypatch.setattr(demo_run, "Run", Interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = invoke("--config", config_file, "--data", folder, "--out", tmp_path, "--steps", 12)
    assert result.exit_code == 130, result.output
    for text in ("Stopped after 5 of 12 steps: interrupted", "step 5: with the", "Trained 5 steps", "Ctrl-C again stops"):
        assert text in result.output
    assert (tmp_path / "demo.png").stat().st_size > 20_000
    assert signal.getsignal(signal.SIGINT) is before


@needs_toml
def test_a_second_interrupt_is_at_once(monkeypatch, folder, config_file, tmp_path):
    monkeypatch.setattr(demo_run, "Run", Interrupted)
    monkeypatch.setattr(Interrupted, "presses", 2)
    result = invoke("--config", config_file, "--data", folder, "--out", tmp_path)
    assert result.exit_code == 130 and "interrupted; nothing was kept" in result.output
    assert not (tmp_path / "demo.png").exists()


def test_other_threads_have_no_interrupt(corpus):
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(lambda: Interrupt().__enter__().asked).result()


@pytest.mark.parametrize("experts", [4, 16, 32, 64])
def test_what_is_printed_fits_80_columns(experts):
    config = Config(experts=experts, topk=2, hidden=32, heads=2, intermediate=16, context=16, steps=1500)
    text = torch.arange(20_000).remainder(251).to(torch.uint8)
    corpus = data.Corpus("somewhere", text, text[:5000], ["a"] * 1234, ["b"] * 123)
    run, rival = new_run(corpus, config=config), new_run(corpus, LoopMoE, config=config)
    for each in (run, rival):
        each.losses, each.seconds = [8.345] * 1500, [1e-3] * 1500
    load = torch.zeros(config.layers, experts)
    load[:, :2] = 5000  # all tokens to two experts
    run.load = load
    run.measurements = [Measurement(step, 8.345, load) for step in (0, 120, 1500)]
    for screen in (
        Console(file=io.StringIO(), width=200),
        live := Console(file=io.StringIO(), width=80, force_terminal=True),
    ):
        demo_run._print_start(screen, run, moekit.keep_pages())
        with progress(screen, 3.567, config.steps) as display:
            display.update(run)
        demo_run._print_results(screen, run, 3.567)
        demo_run._print_comparison(screen, run, rival, 12_345_678)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
        long = [line for line in shown.splitlines() if len(line.rstrip()) > 80]
        assert not long and "layer 4" in shown
    assert "busiest" in shown and f"{experts / 2:.2f}x" in shown and screen is live


def test_a_short_run_says_why_loads_are_uneven():
    uneven = torch.tensor([[10, 0, 0, 0]])

    def note(step: int, load: torch.Tensor = uneven, **settings: object) -> str | None:
        short = replace(TINY, **{"steps": 4000, "unbalanced": 0.1, **settings})
        return balance_note(SimpleNamespace(config=short, measurements=[Measurement(step, 5.0, load)]))

    assert note(300) == "Not even yet: this run ended before the balancing loss joins in at step 400."
    assert note(450, balance="bias") == "Not even yet: the balancing bias had 50 steps, and needs some hundreds."
    assert note(450, torch.ones(1, 4)) is None and note(3000) is None and note(450, balance="none") is None


# --- several processes ----------------------------------------------------------------------------------------------

# 5 held-out windows in batches of 4: the last one has a window for one of two ranks.
TOGETHER = replace(TINY, batch=4, steps=6, heldout_windows=5, measurements=2, unbalanced=0.3)
BALANCED = {balance: replace(TOGETHER, balance=balance) for balance in ("loss", "bias")}


class Seen(Run):
    """A run that can be looked at afterwards."""

    made: ClassVar[list[Run]] = []

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.made.append(self)


def run_all(folder) -> dict[str, tuple[list[float], list[float], torch.Tensor, str, int]]:
    """What a process sees of each run: losses, measurements, the last load, what it prints, and how often it draws."""
    found = {}
    for balance, config in BALANCED.items():
        printed, drawn = io.StringIO(), []
        options = {"data": folder, "device": "cpu", "out": folder / "demo.png", "seed": 0, "compare": False}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo_run, "Run", Seen)
            patch.setattr(demo_run, "write_report", lambda *args, drawn=drawn: drawn.append(args))
            demo_run.run_demo(config, **options, console=Console(file=printed))
        run = Seen.made.pop()
        measured = [each.bits_per_byte for each in run.measurements]
        found[balance] = run.losses, measured, run.measurements[-1].load, printed.getvalue(), len(drawn)
    return found


def test_two_processes_are_as_one(folder, tmp_path):
    alone, (first, second) = run_all(folder), on_ranks(run_all, 2, tmp_path, folder)
    for balance, (losses, measured, load, printed, _) in alone.items():
        for rank in (first, second):
            assert rank[balance][0] == pytest.approx(losses, rel=1e-6)
            assert rank[balance][1] == pytest.approx(measured, rel=1e-6)
            assert torch.equal(rank[balance][2], load)
        assert "2 processes (gloo)" in first[balance][3] and "processes" not in printed
        assert second[balance][3] == "" and [each[balance][4] for each in (first, second)] == [1, 0]


def refused(folder, **changes) -> str:
    compare = changes.pop("compare", False)
    with pytest.raises(DemoError) as caught:
        demo_run.run_demo(
            replace(TINY, **changes), data=folder, device="cpu", out=folder, seed=0, compare=compare, console=Console()
        )
    return str(caught.value)


def all_refused(folder) -> list[str]:
    return [refused(folder, batch=3), refused(folder, experts=3), refused(folder, compare=True)]


def test_what_two_processes_cannot_do(folder, tmp_path):
    batch, experts, compare = on_ranks(all_refused, 2, tmp_path, folder)[0]
    assert "'batch': expected a multiple of the 2 processes, got 3" in batch
    assert "'experts': expected a multiple of the 2 processes, got 3" in experts
    assert compare.startswith("--compare: expected one process")


@pytest.mark.slow
def test_by_torchrun(folder, tmp_path):
    arguments = ["--steps", "2", "--data", folder, "--out", tmp_path]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moekit.demo"]
    ended = subprocess.run([*command, "--config", "tiny", *map(str, arguments)], capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Held-out bits per byte") == 1 and "2 processes (gloo)" in ended.stdout
    assert (tmp_path / "demo.png").exists()
