"""The figures as a table on a terminal, and the history as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moekit.monitor._totals import EXTRA

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {
    "tokens": "tokens",
    "load_max_over_mean": "max/mean",
    "load_cv": "cv",
    "load_entropy": "entropy",
    "dead_experts": "dead",
    "dropped_share": "dropped",
    "router_entropy": "router entropy",
    "router_z": "router z",
}
_COLUMNS = 6  # of panels
_MOST = 3.0  # times the mean, where the colours end


def table(layers: Mapping[str, dict[str, float]], total: dict[str, float], unread: Sequence[str]) -> Table:
    """A row for each router, and one for all of them."""
    from rich.table import Table

    shown = Table(title="Expert load")
    shown.add_column("router", overflow="fold")
    for heading in _HEADINGS.values():
        shown.add_column(heading, justify="right")
    for name, found in layers.items():
        shown.add_row(name, *_cells(found))
    for name in unread:
        shown.add_row(name, "not read", *[""] * (len(_HEADINGS) - 1))
    shown.add_section()
    shown.add_row("all", *_cells(total))
    return shown


def _cells(found: dict[str, float]) -> list[str]:
    return ["-" if math.isnan(found[name]) else _number(name, found[name]) for name in _HEADINGS]


def _number(name: str, value: float) -> str:
    return f"{value:,.0f}" if name in ("tokens", "dead_experts") else f"{value:.4g}"


def heatmap(path: str | Path, timelines: Mapping[str, Tensor], span: int) -> None:
    """Draw ``[intervals, E + 2]`` of each router into a PNG file: experts over time, and all routers in one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(_COLUMNS, len(timelines))
    rows = math.ceil(len(timelines) / columns)
    figure = Figure(figsize=(2 + 2.6 * columns, 4.5 + 2.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.add_gridspec(2, 1, height_ratios=(4, 2 * rows))
    top, bottom = figure.add_subfigure(parts[0]), figure.add_subfigure(parts[1])
    _draw_all(top.subplots(1, 1), timelines)
    grid = bottom.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    images = []
    for axis, (name, timeline) in zip(grid, timelines.items(), strict=False):
        images.append(axis.imshow(relative(timeline).mT.numpy(), **_look()))
        axis.set_title(name, fontsize=7)
        axis.tick_params(labelsize=6)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in grid[len(timelines) :]:
        axis.set_visible(False)
    bottom.supxlabel(f"interval of {span} step{'s' * (span > 1)}", fontsize=8)
    bottom.supylabel("expert", fontsize=8)
    bottom.colorbar(images[0], ax=list(grid), extend="max", shrink=0.8, label="load, as a multiple of the mean")
    figure.savefig(path, format="png", dpi=110)


def _draw_all(axis: Any, timelines: Mapping[str, Tensor]) -> None:
    """Routers by experts over the whole time; routers of fewer experts end earlier."""
    sums = [relative(timeline.sum(0, keepdim=True))[0] for timeline in timelines.values()]
    picture = sums[0].new_full((len(sums), max(len(row) for row in sums)), math.nan)
    for place, row in enumerate(sums):
        picture[place, : len(row)] = row
    axis.imshow(picture.numpy(), **_look())
    axis.set_yticks(range(len(sums)), list(timelines), fontsize=6)
    axis.set(title="Load of each expert over the whole time", xlabel="expert")


def _look() -> dict[str, Any]:
    return {"vmin": 0.0, "vmax": _MOST, "aspect": "auto", "interpolation": "nearest", "cmap": "viridis"}


def relative(timeline: Tensor) -> Tensor:
    """``[intervals, E + 2]`` counts as ``[intervals, E]`` multiples of the interval's mean; NaN where there was nothing."""
    loads = timeline[:, :-EXTRA].double()
    return loads / loads.mean(1, keepdim=True)
