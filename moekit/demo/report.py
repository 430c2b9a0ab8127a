"""The picture of a run: loss curves, expert loads before and after balancing, and a rival's curve beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moekit.demo.compare import largest_difference
from moekit.demo.display import relative_load
from moekit.demo.train import Measurement, Run

_SMOOTHED_STEPS = 20
_UNEVEN = 1.5  # the busiest expert's load, as a multiple of an even share
_SETTLING_STEPS = 500  # in which balancing gets below that
WHAT_BALANCES = {"loss": "the balancing loss", "bias": "the balancing bias", "none": "balancing"}


def key_measurements(run: Run) -> list[tuple[str, Measurement]]:
    """The measurements that show what balancing does, each with what it is, in order and each once."""
    start, balanced_from, last = 0, run.config.unbalanced_steps, run.measurements[-1].step
    what = WHAT_BALANCES[run.config.balance]
    titles = {start: "step 0: untrained"}
    if start < balanced_from < last:
        titles[balanced_from] = f"step {balanced_from}: trained so far without {what}"
        titles[last] = f"step {last}: with {what} since step {balanced_from}"
    elif last:
        titles[last] = f"step {last}: {'without' if last <= balanced_from else 'with'} {what} throughout"
    by_step = {measured.step: measured for measured in run.measurements}
    return [(title, by_step[step]) for step, title in titles.items() if step in by_step]


def balance_note(run: Run) -> str | None:
    """Why the experts are not evenly loaded yet, where a run was too short for it."""
    last, balanced_from = run.measurements[-1], run.config.unbalanced_steps
    what, acted = WHAT_BALANCES[run.config.balance], last.step - balanced_from
    if run.config.balance == "none" or relative_load(last.load).max() < _UNEVEN:
        return None
    if acted <= 0:
        return f"Not even yet: this run ended before {what} joins in at step {balanced_from}."
    if acted < _SETTLING_STEPS:
        return f"Not even yet: {what} had {acted} steps, and needs some hundreds."
    return None


def write_report(path: Path, run: Run, bigram_bits: float, rival: Run | None = None) -> None:
    """Draw the run into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    maps = key_measurements(run)
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    rows = figure.add_gridspec(2, 1, height_ratios=(1.5, 1))
    top, bottom = figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])
    columns = 1 if rival is None else 2
    _draw_curves(top.add_subplot(1, columns, 1), run, bigram_bits)
    if rival is not None:
        _draw_rival(top.add_subplot(1, columns, 2), run, rival)
    bottom.suptitle("Expert load on the held-out windows, as multiples of an even share")
    grid = bottom.subplots(1, len(maps), squeeze=False)[0]
    image = None
    for axis, (title, measured) in zip(grid, maps, strict=True):
        image = _draw_load(axis, title, measured)
    if image is not None:
        bottom.colorbar(image, ax=list(grid), extend="max", shrink=0.8, label="times an even share")
    figure.savefig(path, format="png", dpi=110)


def _draw_curves(axis: Any, run: Run, bigram_bits: float) -> None:
    steps = range(1, len(run.losses) + 1)
    axis.plot(steps, run.losses, color="tab:blue", alpha=0.4, linewidth=0.7, label="training, each step")
    axis.plot(steps, _smooth(run.losses), color="tab:blue", label=f"training, mean of the last {_SMOOTHED_STEPS} steps")
    at, heldout = [m.step for m in run.measurements], [m.bits_per_byte for m in run.measurements]
    axis.plot(at, heldout, "o-", color="tab:orange", label=f"held-out: {heldout[-1]:.3f} at the end")
    axis.axhline(bigram_bits, color="black", linestyle="--", label=f"byte bigram model, held-out: {bigram_bits:.3f}")
    if 0 < run.config.unbalanced_steps < len(run.losses):
        axis.axvline(
            run.config.unbalanced_steps, color="grey", linewidth=0.8, label=f"{WHAT_BALANCES[run.config.balance]} joins in"
        )
    axis.set(title="Loss", xlabel="step", ylabel="bits per byte", ylim=(0, 8.2))
    axis.legend()
    axis.grid(alpha=0.3)


def _draw_rival(axis: Any, run: Run, rival: Run) -> None:
    largest, step = largest_difference(run, rival)
    axis.plot(range(1, len(run.losses) + 1), run.losses, color="tab:blue", linewidth=2.5, alpha=0.5, label="moekit")
    steps = range(1, len(rival.losses) + 1)
    axis.plot(steps, rival.losses, color="tab:red", linewidth=0.8, label="loop over experts")
    title = f"Training loss, same seed, batches and choice of experts\nlargest difference {largest:.1e} at step {step}"
    axis.set(title=title, xlabel="step", ylabel="bits per byte", xlim=(0, len(rival.losses) + 1))
    axis.legend()
    axis.grid(alpha=0.3)


def _draw_load(axis: Any, title: str, measured: Measurement) -> Any:
    shares = relative_load(measured.load).numpy()
    image = axis.imshow(shares, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    layers, experts = shares.shape
    axis.set(title=title, xlabel="expert", ylabel="layer")
    axis.title.set_fontsize(10)
    axis.set_xticks(range(experts), [str(e + 1) for e in range(experts)], fontsize=7)
    axis.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
    if experts <= 16:
        for layer in range(layers):
            for expert in range(experts):
                share = shares[layer, expert]
                colour = "white" if abs(share - 1) > 0.7 else "black"
                axis.text(expert, layer, f"{share:.1f}", ha="center", va="center", fontsize=6, color=colour)
    return image


def _smooth(losses: list[float]) -> list[float]:
    """Mean of each loss and those before it."""
    sums = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0)
    ends = torch.arange(1, len(losses) + 1)
    starts = (ends - _SMOOTHED_STEPS).clamp(min=0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
