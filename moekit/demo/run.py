"""The demo from start to end: read, train, compare, print, draw."""

from __future__ import annotations

import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import moekit
from moekit._pages import KeptPages
from moekit.demo import DemoError
from moekit.demo.compare import (
    largest_difference,
    layer_input,
    saved_for_backward,
    step_milliseconds,
    step_together,
)
from moekit.demo.config import Config
from moekit.demo.data import Bigram, Corpus, check_enough, load_corpus
from moekit.demo.display import progress, relative_load
from moekit.demo.interrupt import Interrupt
from moekit.demo.model import LoopMoE, build_model, sample
from moekit.demo.ranks import Alone, joined
from moekit.demo.report import balance_note, key_measurements, write_report
from moekit.demo.train import Run, measured_steps

_SAMPLE_BYTES = 400
_COLUMNS = 80  # of a terminal


@dataclass(frozen=True)
class Result:
    """Held-out bits per byte of the model at the end and of the bigram model, on the same bytes; how the run ended."""

    model_bits: float
    bigram_bits: float
    interrupted: bool = False  # by Ctrl-C
    complete: bool = True  # to the last step


def run_demo(
    config: Config, *, data: Path | None, device: str, out: Path, seed: int, compare: bool, console: Console
) -> Result:
    """Train, print the figures and a sample, and write the picture; with the other processes, if ``torchrun`` started some.

    Raises:
        DemoError: text, device or output path that cannot be used; a loss that is no longer finite.
    """
    picture = _output_file(out)
    with joined(device) as (ranks, device):
        if ranks.count > 1 and compare:
            raise DemoError("--compare: expected one process (the plain layer knows nothing of others)")
        speaker = console if ranks.rank == 0 else Console(quiet=True, force_terminal=False)
        return _run(config, data, _device(device), picture, seed, compare, speaker, ranks)


def _run(
    config: Config,
    data: Path | None,
    target: torch.device,
    picture: Path,
    seed: int,
    compare: bool,
    console: Console,
    ranks: Alone,
) -> Result:
    kept = moekit.keep_pages() if target.type == "cpu" else None
    corpus = load_corpus(data)
    check_enough(corpus, config.context)
    run = Run(build_model(config, seed, target), config, corpus, seed, ranks)
    rival = Run(build_model(config, seed, target, LoopMoE), config, corpus, seed) if compare else None
    bigram_bits = Bigram(corpus.train).bits_per_byte(run.windows)
    _print_start(console, run, kept)
    other_choices, interrupted = _train(run, rival, console, bigram_bits)
    _print_results(console, run, bigram_bits)
    if rival is not None:
        _print_comparison(console, run, rival, other_choices)
    if ranks.rank == 0:
        write_report(picture, run, bigram_bits, rival)
    model_bits = run.measurements[-1].bits_per_byte
    if model_bits < bigram_bits:
        _print_sample(console, run, seed)
    else:
        console.print("\nNo sample: the model is not better than the bigram model yet.", highlight=False)
    console.print(f"\nLoss curves and expert loads: {picture}", highlight=False, soft_wrap=True)
    return Result(model_bits, bigram_bits, interrupted, complete=len(run.losses) == config.steps)


def _output_file(out: Path) -> Path:
    """The PNG to write, its folder made: ``out`` itself, or ``demo.png`` in it when it is a folder or has no suffix.

    Raises:
        DemoError: it cannot be written. Found out before training rather than after.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DemoError("the picture needs matplotlib: pip install 'moekit[cli]'")
    is_picture = out.suffix.lower() == ".png"
    path = out if is_picture else out / "demo.png"
    wanted = "a .png file to write, or a folder for demo.png"
    if out.exists() and not (out.is_dir() or out.is_file()):
        raise DemoError(f"--out {out}: expected {wanted}, got neither a file nor a folder")
    if not (is_picture or out.is_dir()) and (out.suffix or out.exists()):
        raise DemoError(f"--out {out}: expected {wanted}, got {f'a {out.suffix} file' if out.suffix else 'another file'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out}: {error}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DemoError(f"--out {out}: {path} cannot be written")
    return path


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DemoError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _train(run: Run, rival: Run | None, console: Console, bigram_bits: float) -> tuple[int, bool]:
    """Train to the last step, the time limit or Ctrl-C, the rival in turns for like timings.

    Returns:
        how many choices of experts the rival's router would have made differently, and whether it was Ctrl-C.
    """
    config, marks, other_choices = run.config, measured_steps(run.config), 0
    limit, start, interrupted = config.time_limit * (1 if rival is None else 2), time.perf_counter(), False
    with Interrupt() as interrupt, progress(console, bigram_bits, config.steps) as display:
        run.measure()
        display.update(run)
        for number in range(1, config.steps + 1):
            if rival is None:
                run.step()
            else:
                other_choices += step_together(run, rival)
            ends = torch.tensor([interrupt.asked, time.perf_counter() - start > limit], dtype=torch.int32, device=run.device)
            interrupted, late = map(bool, run.ranks.sum(ends).tolist())  # of any process
            if number in marks or interrupted or late:
                run.measure()
            display.update(run)
            if interrupted or late:
                break
    if len(run.losses) < config.steps:
        why = "interrupted; all that follows is of these" if interrupted else f"{limit:.0f} s are over"
        if run.device.type == "cpu" and not interrupted:
            why += ". On cores that others use, OMP_NUM_THREADS=1 may be several times as fast"
        console.print(f"Stopped after {len(run.losses)} of {config.steps} steps: {why}.", highlight=False)
    return other_choices, interrupted


def _print_start(console: Console, run: Run, kept: KeptPages | None) -> None:
    corpus: Corpus = run.corpus
    config, model = run.config, run.model
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"Text: {corpus.source}\n"
        f"  training {len(corpus.train):,} bytes in {len(corpus.train_files)} files\n"
        f"  held-out {len(corpus.heldout):,} bytes in {len(corpus.heldout_files)} files\n"
        f"Model: {config.layers} layers, {config.experts} experts, top-{config.topk}, {parameters:,} parameters\n"
        f"  {config.steps} steps of {config.batch} x {config.context} bytes"
        + (f"\n  {run.layout}" * (run.ranks.count > 1))
        + (f"\n{kept}" if kept is not None else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _print_results(console: Console, run: Run, bigram_bits: float) -> None:
    last, measured = run.measurements[-1], run.windows[:, 1:]
    console.print(
        f"\nHeld-out bits per byte, on the same {measured.numel():,} bytes ({len(measured)} windows):\n"
        f"  mixture of experts  {last.bits_per_byte:.3f}\n"
        f"  byte bigram model   {bigram_bits:.3f}\n"
        f"Trained {len(run.losses)} steps in {sum(run.seconds):.0f} s, "
        f"{len(run.losses) * run.config.batch * run.config.context / sum(run.seconds):,.0f} tokens/s",
        highlight=False,
        soft_wrap=True,
    )
    console.print("\nEach expert's load on the held-out windows, percent of an even share:", highlight=False)
    for title, measured_load in key_measurements(run):
        console.print(f"  {title}", highlight=False, soft_wrap=True)
        for line in _percents(relative_load(measured_load.load).tolist()):
            console.print(line, highlight=False, soft_wrap=True)
    if note := balance_note(run):
        console.print(f"  {note}", highlight=False, soft_wrap=True)


def _percents(loads: list[list[float]]) -> list[str]:
    """A line a layer, or several of many experts, of at most 80 columns."""
    cells = [[f"{100 * share:.0f}" for share in shares] for shares in loads]
    width = 1 + max(3, *(len(cell) for row in cells for cell in row))
    lines, first = [], f"    layer {len(loads)}"
    fit = (_COLUMNS - len(first)) // width
    for layer, row in enumerate(cells, start=1):
        for begin in range(0, len(row), fit):
            title = "" if begin else f"    layer {layer}"
            lines.append(title.ljust(len(first)) + "".join(cell.rjust(width) for cell in row[begin : begin + fit]))
    return lines


def _print_comparison(console: Console, run: Run, rival: Run, other_choices: int) -> None:
    largest, step = largest_difference(run, rival)
    choices = len(rival.losses) * run.config.batch * run.config.context * run.config.layers
    windows = run.next_batch()[:, :-1]
    x = layer_input(run.model, windows)
    table = Table(title=f"One layer, {x.shape[0]} tokens; steps taken in turns", title_justify="left")
    for heading in ("", "ms per step", "bytes saved for backward"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, each in (("moekit", run), ("loop over experts", rival)):
        kept = saved_for_backward(each.model.layers[0], x)
        table.add_row(name, f"{step_milliseconds(each):.1f}", f"{kept:,}")
    console.print()
    console.print(table)
    console.print(
        f"Largest difference of the training losses: {largest:.2e} bits per byte,\n"
        f"  at step {step} of {len(rival.losses)}\n"
        f"The loop was given moekit's choice of experts;\n"
        f"  its own router differed in {other_choices:,} of {choices:,}",
        highlight=False,
        soft_wrap=True,
    )


def _print_sample(console: Console, run: Run, seed: int) -> None:
    prompt = run.config.prompt.encode()
    text = sample(run.model, prompt, _SAMPLE_BYTES, seed).decode("utf-8", errors="replace")
    printable = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    console.print(f"\nA sample, continuing {run.config.prompt!r}:", highlight=False, markup=False)
    encoding = console.encoding
    console.print(
        printable.encode(encoding, errors="replace").decode(encoding),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
