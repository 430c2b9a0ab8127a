"""A plan as tables of at most 80 columns, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.plan.planning import Exchange, Fit, Plan, Times

if TYPE_CHECKING:
    from rich.table import Table

_MI, _GI = 2**20, 2**30
_WAYS = {
    "rank": "AllToAll: a row a rank",
    "all": "AllGather: to all",
    "slot": "a row an expert",
    "node": "two hops: a row a node",
}
_LINKS = {"inside": "--link", "between": "--between"}
_SHOWN = 0.05  # GiB: what is less has no slice of its own


def headline(plan: Plan) -> list[str]:
    """What is planned, in words."""
    model, ranks = plan.model, f" on each of {plan.ep} ranks" if plan.ep > 1 else ""
    kind = f" ({model.model_type})" if model.model_type else ""
    experts = f"{model.experts} experts of {model.hidden} x {model.inner}, {model.topk} a token"
    weights = plan.format + (" doubly quantised" if plan.double_quant else "") if plan.format else plan.dtype
    state = "trained" if plan.trained else f"frozen, adapters of rank {plan.lora}" if plan.lora else "frozen"
    return [
        f"{model.name}{kind}: {model.moe_layers} of {model.layers} layers with {experts}",
        f"A step of {plan.tokens:,} tokens{ranks}, {plan.dtype}; experts in {weights}, {state}; kernels of {plan.device}",
    ]


def tables(plan: Plan) -> list[Table]:
    """One for each part that there is."""
    found = [_parameters(plan), _formats(plan), _activations(plan)]
    if plan.exchange is not None:
        found.append(_exchange(plan.exchange, plan.ep))
    if plan.times is not None:
        found.append(_times(plan.times, plan.ep))
    if plan.fit is not None:
        found.append(_fit(plan.fit))
    return found


def _table(title: str, heads: Sequence[str], lines: Iterable[Sequence[str]], caption: str = "") -> Table:
    from rich.table import Table

    shown = Table(title=title, title_justify="left", title_style="bold", caption=caption or None, caption_justify="left")
    for place, head in enumerate(heads):
        shown.add_column(head, justify="right" if place else "left", overflow="fold")
    for line in lines:
        shown.add_row(*line)
    return shown


def _parameters(plan: Plan) -> Table:
    found = plan.parameters
    lines = [("routed experts", found.experts), ("one expert", found.expert), *found.others.items()]
    lines += [("all", found.total), ("active for a token", found.active)] if found.total and found.active else []
    lines += [("adapters", found.adapters)] if found.adapters else []
    shown = ((name, f"{number:,}", f"{number / 1e9:.3f}") for name, number in lines if number)
    note = "" if found.total else "Only the sizes of experts are known, so nothing is said of the rest."
    return _table("Parameters", ("of", "number", "billions"), shown, note)


def _formats(plan: Plan) -> Table:
    lines = []
    for name, size in plan.formats.items():
        bits = "" if size is None else f"{8 * size / plan.parameters.experts:.3f}"
        rank = "" if size is None else f"{size / plan.ep / _GI:.2f}"
        lines.append((name, "does not fit its blocks" if size is None else f"{size / _GI:.2f}", rank, bits))
    return _table("Weights of the experts", ("format", "GiB", "GiB a rank", "bits a parameter"), lines)


def _activations(plan: Plan) -> Table:
    lines = []
    for save, found in plan.activations.items():
        layer = (f"{found.kept / _MI:,.1f}", f"{found.peak / _MI:,.1f}", found.peak_at)
        lines.append((save, *layer, f"{found.all_kept / _GI:.2f}", f"{found.all_peak / _GI:.2f}"))
    note = (
        "save is that of moekit.experts, recompute unless given: what a layer keeps for backward. A layer's input, to which "
        f"backward refers, takes {plan.inputs / _MI:,.1f} MiB; it is in the sums of all layers."
    )
    heads = ("save", "kept, MiB", "peak, MiB", "peak at", "kept by all layers, GiB", "peak of all layers, GiB")
    return _table("Activations of the experts", heads, lines, note)


def _exchange(found: Exchange, ep: int) -> Table:
    sizes = {way: size / 1e6 for way, size in found.messages.items()}
    peers = {way: "-" if way == "node" else f"{size / (ep - 1):,.2f}" for way, size in sizes.items()}
    lines = [(_WAYS[way], f"{size:,.1f}", peers[way]) for way, size in sizes.items()]
    total = sum(found.sent.values())
    note = f"A rank receives {found.received:,} rows. By AllToAll it sends {total / 1e6:,.1f} MB in a step of a layer."
    return _table("Messages of a rank, one exchange of four", ("how", "MB to others", "MB a peer"), lines, note)


def _times(found: Times, ep: int) -> Table:
    speeds, sources = found.rates, found.rates.sources
    rate = f"{speeds.flops / 1e12:,.4g} TFLOP/s, {sources['flops']}"
    if found.products is None:
        rate = f"known in {' and '.join(speeds.dtypes or ())} only: give --flops"
    lines = [("products", _ms(found.products), rate)]
    rate = "no rate is known: give --bandwidth"
    if speeds.bandwidth is not None:
        rate = f"{speeds.bandwidth / 1e9:,.4g} GB/s, {sources['bandwidth']}"
    lines.append(("reading and writing", _ms(found.moves), rate))
    if ep > 1:
        known = [sources[link] for link in ("inside", *(["between"] if ep > speeds.node else [])) if link in sources]
        missing = [_LINKS[link] for link in speeds.unknown_links(ep)]
        rate = f"not known: give {' and '.join(missing)}" if missing else "; between nodes: ".join(known)
        lines.append(("exchange", _ms(found.exchange), f"links: {rate}"))
    lines += [("a layer", _ms(found.layer), ""), ("all layers", _ms(found.layers, 1), "")]
    note = "No sums, as a part of them is not known." if found.layer is None else ""
    return _table(f"Expected time of the experts, {speeds.name}", ("forward + backward", "ms", "rate"), lines, note)


def _ms(seconds: float | None, digits: int = 3) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.{digits}f}"


def _fit(found: Fit) -> Table:
    parts = {"experts": found.experts, "other weights": found.others, "training": found.training}
    fixed = " + ".join(f"{size / _GI:.2f} {name}" for name, size in parts.items())
    lines = []
    for save, total in found.total.items():
        left = "" if found.capacity is None else f"{found.left[save] / _GI:.2f}" if found.left[save] >= 0 else "does not fit"
        lines.append((save, f"{found.activations[save] / _GI:.2f}", f"{total / _GI:.2f}", *([left] if left else [])))
    of = "" if found.capacity is None else f" of {found.capacity / _GI:.4g} GiB"
    heads = ("save", "activations, GiB", "a step, GiB", *([f"left{of}"] if of else []))
    note = (
        f"GiB of a step: {fixed}, and activations. Checkpointed: a layer keeps its input alone and is computed again "
        "(gradient checkpointing). Not in it: what attention and the head keep, buffers of messages, fragmentation."
    )
    return _table("Memory of a device in a step", heads, lines, note)


def chart(plan: Plan, path: Path) -> None:
    """Write a PNG: weights by format, activations of a layer by ``save``, and what a device holds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    weights, layer, device = figure.subplots(1, 3)
    sizes = {name: size / _GI for name, size in plan.formats.items() if size is not None}
    bars = weights.barh(list(sizes), list(sizes.values()), color="tab:blue")
    weights.bar_label(bars, fmt="%.1f", padding=2)
    weights.invert_yaxis()
    weights.margins(x=0.25)
    weights.set(title="weights of the experts", xlabel="GiB")
    for place, (what, color) in enumerate((("kept", "tab:blue"), ("peak", "tab:orange"))):
        values = [getattr(found, what) / _MI for found in plan.activations.values()]
        positions = [number + 0.4 * place - 0.2 for number in range(len(values))]
        layer.bar_label(layer.bar(positions, values, 0.4, label=what, color=color), fmt="%.0f")
    layer.set_xticks(range(len(plan.activations)), list(plan.activations))
    layer.set(title=f"a layer's activations, {plan.tokens:,} tokens", ylabel="MiB")
    layer.margins(y=0.12)
    layer.legend()
    if plan.fit is None:
        device.set_axis_off()
    else:
        _stacked(plan.fit, device)
    figure.suptitle(headline(plan)[0])
    figure.savefig(path, dpi=110, format="png")


def _stacked(fit: Fit, axes: Any) -> None:
    names = list(fit.total)
    parts = {"experts": fit.experts, "other weights": fit.others, "training": fit.training}
    heights = {name: [size / _GI] * len(names) for name, size in parts.items() if size / _GI >= _SHOWN}
    heights["activations"] = [fit.activations[name] / _GI for name in names]
    below = [0.0] * len(names)
    for name, values in heights.items():
        axes.bar(names, values, bottom=below, label=name)
        below = [low + value for low, value in zip(below, values, strict=True)]
    if fit.capacity is not None:
        axes.axhline(fit.capacity / _GI, color="black", linewidth=1, linestyle="--", label="memory of the device")
    axes.set(title="a device, in all", ylabel="GiB")
    axes.margins(y=0.25)
    axes.legend(fontsize=8)
