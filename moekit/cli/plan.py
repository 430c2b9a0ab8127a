"""``moekit plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from moekit.plan import Model, Plan, Rates

_PREFIXES = ("moekit.plan: ", "plan: ")
_SIZE = "Sizes of a model whose type is not known: "


def plan(
    config: Annotated[
        str | None, typer.Argument(help="A preset's name, a config.json or the folder it lies in; see --presets.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a step, of one rank.")] = None,
    ep: Annotated[int, typer.Option(help="Ranks that share the experts.")] = 1,
    format: Annotated[str | None, typer.Option(help="Experts packed as nf4, mxfp4, fp8 or int8, and frozen.")] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="Scales of nf4 in 8 bits.")] = False,
    lora: Annotated[int, typer.Option(help="Rank of an adapter on every weight of the experts, which are frozen.")] = 0,
    frozen: Annotated[bool, typer.Option("--frozen", help="Nothing is trained in the experts.")] = False,
    device: Annotated[str, typer.Option(help="Whose kernels: cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16 (or bf16), float16 or float32.")] = "bfloat16",
    memory: Annotated[float | None, typer.Option(help="GiB of a device: what is left of it?")] = None,
    machine: Annotated[str | None, typer.Option(help="Rates of H200 (default with cuda), B200 or GB200.")] = None,
    flops: Annotated[float | None, typer.Option(help="Own rate of products, TFLOP/s.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Own rate of a copy, read and written, GB/s.")] = None,
    link: Annotated[float | None, typer.Option(help="Own rate of links within a node, GB/s.")] = None,
    between: Annotated[float | None, typer.Option(help="Own rate of links between nodes, GB/s.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure products (in --dtype) and copies here.")] = False,
    layers: Annotated[int | None, typer.Option(help=f"{_SIZE}layers with experts.")] = None,
    hidden: Annotated[int | None, typer.Option(help=f"{_SIZE}of the hidden state.")] = None,
    intermediate: Annotated[int | None, typer.Option(help=f"{_SIZE}of an expert.")] = None,
    experts: Annotated[int | None, typer.Option(help=f"{_SIZE}experts of a layer.")] = None,
    topk: Annotated[int | None, typer.Option(help=f"{_SIZE}experts of a token.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write a picture to this PNG.")] = None,
    list_presets: Annotated[bool, typer.Option("--presets", help="List the bundled models, and stop.")] = False,
) -> None:
    """Say what a model takes, from its config alone: parameters, memory, messages and time of its experts."""
    import moekit.plan as plans
    from moekit.plan.show import chart

    if list_presets:
        typer.echo("\n".join(plans.presets()))
        return
    dtype = "bfloat16" if dtype == "bf16" else dtype
    sizes = {"layers": layers, "hidden": hidden, "intermediate": intermediate, "experts": experts, "topk": topk}
    own = {"flops": flops, "bandwidth": bandwidth, "inside": link, "between": between}
    try:
        if tokens is None:
            raise ValueError("say how many --tokens a step has")
        _check_out(out)
        found = plans.plan(
            _model(config, sizes),
            tokens=tokens,
            ep=ep,
            format=format,
            double_quant=double_quant,
            lora=lora,
            frozen=frozen,
            device=device,
            dtype=dtype,
            memory=memory,
            rates=_rates(device, dtype, machine, own, measure=measure),
        )
        if out is not None:
            chart(found, out)
    except (OSError, TypeError, ValueError) as error:
        typer.echo(f"moekit plan: {_plain(error)}", err=True)
        raise typer.Exit(2) from error
    _say(found, out, as_json=as_json)


def _say(found: Plan, out: Path | None, *, as_json: bool) -> None:
    from moekit.plan.show import headline, tables

    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
        return
    console = Console()
    for line in headline(found):
        console.print(line, highlight=False, markup=False)
    for table in tables(found):
        console.print()
        console.print(table)
    if out is not None:
        console.print(f"\nWrote {out}", highlight=False, markup=False)


def _model(config: str | None, sizes: dict[str, int | None]) -> Model:
    """By its config, or by sizes where nothing else is known."""
    from moekit import plan as plans

    own = [f"--{name}" for name, size in sizes.items() if size is not None]
    if config is not None and not own:
        return plans.read(config)
    if config is None and not own:
        raise ValueError(f"say which model: one of {', '.join(plans.presets())}, or the path of a config.json")
    if config is None:
        return plans.given("as given", **sizes)
    try:
        found = plans.read(config)
    except plans.UnknownModelError:  # the sizes say what the config does not
        return plans.given(config, **sizes)
    raise ValueError(f"{', '.join(own)} must be left out, as the config of {found.name} says it")


def _rates(device: str, dtype: str, machine: str | None, own: dict[str, float | None], *, measure: bool) -> Rates | None:
    """Of a named machine, of this one, or one's own; the units of the command line are thousands of millions."""
    from moekit import plan as plans

    wrong = [name for name, value in own.items() if value is not None and not value > 0]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must be positive")
    if machine is not None and machine not in plans.MACHINES:
        known = ", ".join(plans.MACHINES)
        raise ValueError(f"machine must be one of {known}, got {machine!r}; of others give --flops and --bandwidth")
    if machine is not None and device == "cpu":
        raise ValueError(f"--machine {machine} is a GPU's: with --device cpu give --flops and --bandwidth, or --measure")
    if machine is not None and measure:
        raise ValueError("give --machine or --measure, not both")
    if machine is None and device == "cuda" and own["flops"] is None:
        machine = "H200"
    base = plans.measured(device, dtype) if measure else plans.MACHINES[machine] if machine else None
    units = {"flops": 1e12, "bandwidth": 1e9, "inside": 1e9, "between": 1e9}
    return plans.changed(base, **{name: value and value * units[name] for name, value in own.items()})


def _check_out(out: Path | None) -> None:
    if out is None:
        return
    if out.suffix.lower() != ".png":
        raise ValueError(f"out must be a file that ends in .png, got {str(out)!r}")
    if not out.parent.is_dir():
        raise ValueError(f"out must be in a folder that exists, got {str(out)!r}")


def _plain(error: Exception) -> str:
    """The message without the name of the function that was called."""
    text = str(error)
    for prefix in _PREFIXES:
        text = text.removeprefix(prefix)
    return text
