"""The tables of docs/performance/measured.md, and that of times in plan.md, from the JSON files beside them.

``python docs/tables.py`` writes them. Each table of measured.md has the columns that its file has: a contender that is
measured later becomes a column or a line by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moekit.plan import MACHINES, Model, given, plan

FOLDER = Path(__file__).parent / "performance"
PAGE, PLAN = FOLDER / "measured.md", FOLDER / "plan.md"
NAMES = {"compile": "torch.compile", "nemo": "NeMo", "megatron": "Megatron", "liger": "Liger"}
ASIDE = ("called", "left out")  # of small batches, what is no time of a graph
PRODUCTS, MLP = "grouped_mm, ", "expert MLP, forward and backward"
SHAPES = {  # the settings of benchmarks/gpu.py
    "Qwen3-30B-A3B": "T=16384, H=2048, I=768, E=128, K=8",
    "Mixtral-8x7B": "T=16384, H=4096, I=14336, E=8, K=2",
    "DeepSeek-V3": "T=4096, H=7168, I=2048, E=256, K=8",
}


def load(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def number(value: float | None) -> str:
    """Three or four digits of a time or a size; nothing for None."""
    if value is None:
        return ""
    digits = next((digits for digits, least in enumerate((100, 10, 1)) if value >= least), 3)
    return f"{value:,.{digits}f}"


def by_case(shape: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What was found of each contender, by case, in the order of the file."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for one in load("h200.json")["results"]:
        name, _, case = one["case"].partition(": ")
        if name == shape:
            found.setdefault(case, {})[one["who"]] = one
    return found


def operators(shape: str) -> str:
    """Milliseconds of each operator; in brackets moekit's share of a measured copy."""
    cases = {case: found for case, found in by_case(shape).items() if not case.startswith(PRODUCTS) and case != MLP}
    who = list(dict.fromkeys(name for found in cases.values() for name in found))
    who.sort(key=lambda name: name != "moekit")
    lines = []
    for case, found in cases.items():
        cells = [f"{found[name]['ms']:.3f}" if name in found else "" for name in who]
        share = found.get("moekit", {}).get("percent_of_copy")
        lines.append([case, f"{cells[0]} ({share:.0f}%)" if share else cells[0], *cells[1:]])
    return table(["ms (share of a copy)", *(NAMES.get(name, name) for name in who)], lines)


def expert_mlp(shape: str) -> str:
    """The expert MLP, and the products alone."""
    lines = []
    for case, found in by_case(shape).items():
        if case.startswith(PRODUCTS) or case == MLP:
            for who, one in found.items():
                lines.append([case, who, number(one["ms"]), f"{one['TFLOPs']:.0f}", one.get("note", "")])
    return table(["", "by", "ms", "TFLOP/s", ""], lines)


def shapes_of_experts(file: str = "gpu_experts.json") -> str:
    """A line for each shape and measure, a column for each contender."""
    shapes = load(file)["shapes"]
    who = list(dict.fromkeys(name for shape in shapes.values() for each in shape.values() for name in each))
    lines = []
    for name, shape in shapes.items():
        for at, (what, each) in enumerate(shape.items()):
            cells = [number(each[one]) if isinstance(each.get(one), (int, float)) else "" for one in who]
            lines.append([name if not at else "", what if "MiB" in what else f"{what}, ms", *cells])
    return table(["shape", "", *who], lines)


def small_batches(batches: dict[str, Any]) -> str:
    """Microseconds of a layer in a graph, by the number of tokens."""
    what = [name for name in dict.fromkeys(name for each in batches.values() for name in each) if name not in ASIDE]
    lines = [[tokens, *(number(each.get(name)) for name in what)] for tokens, each in batches.items()]
    return table(["tokens", *what], lines)


def called(runs: list[dict[str, Any]]) -> str:
    """Microseconds of calls from the host, by the number of tokens: the others of each run, and moekit in it."""
    lines = []
    for run in runs:
        batches = run["small batches"]
        who = list(dict.fromkeys(name for each in batches.values() for name in each.get("called", {})))
        lines += [[name, *(number(each["called"].get(name)) for each in batches.values())] for name in who]
    return table(["called", *(f"T={tokens}" for tokens in runs[0]["small batches"])], lines)


def one_token() -> str:
    """The same of one token, by the layer."""
    layers = load("gpu_experts.json")["one token"]
    what = list(dict.fromkeys(name for each in layers.values() for name in each))
    return table(["layer", *what], [[layer, *(number(each.get(name)) for name in what)] for layer, each in layers.items()])


def other_dtypes() -> str:
    """Milliseconds and MiB of steps that are not in bfloat16."""
    lines, found = [], load("gpu_experts.json")["other dtypes"]
    who = list(
        dict.fromkeys(name for shapes in found.values() for shape in shapes.values() for e in shape.values() for name in e)
    )
    for dtype, shapes in found.items():
        for name, shape in shapes.items():
            for what, each in shape.items():
                lines.append(
                    [f"{name}, {dtype}", what if "MiB" in what else f"{what}, ms", *(number(each.get(w)) for w in who)]
                )
    return table(["shape", "", *who], lines)


def packed(what: str, layer: str) -> str:
    """packed_h200.json: a line for each contender, columns for each number of tokens."""
    rows = [row for row in load("packed_h200.json") if row["what"] == what and row["layer"] == layer]
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    measures = [name for name in ("ms", "graph ms", "kept MiB", "peak MiB") if any(name in row for row in rows)]
    head = [f"{count:,} tokens: {measure}" for count in tokens for measure in measures]
    cells = {(row["name"], row["tokens"], measure): row.get(measure) for row in rows for measure in measures}
    return table(["", *head], [[n, *(number(cells.get((n, t, m))) for t in tokens for m in measures)] for n in names])


def whole_models() -> str:
    """whole_models_h200.json."""
    found = load("whole_models_h200.json")
    parts = list(dict.fromkeys(part for one in found for part in one["parts GiB"]))
    head = ["", "format", *(f"{part}, GiB" for part in parts), "peak, GiB", "s a step", "tokens/s"]
    lines = []
    for one in found:
        kind = one["format"] + (", doubly quantised" if one.get("double_quant") else "")
        sizes = [f"{one['parts GiB'][part]:.1f}" for part in parts]
        speed = [f"{one['peak GiB']:.1f}", f"{one['seconds a step']:.2f}", f"{one['tokens/s']:,.0f}"]
        lines.append([one["model"], kind, *sizes, *speed])
    return table(head, lines)


def planned(model: str | Model, measured: float, **options: Any) -> list[str]:
    """What a plan has for a step of a layer on an H200, beside its measured ms."""
    found = plan(model, rates=MACHINES["H200"], **options).times
    parts = f"{1e3 * found.products:.2f} + {1e3 * found.moves:.2f}"
    return [parts, f"{measured:.2f}", f"{1e3 * found.layer / measured:.2f}"]


def times() -> str:
    """Planned beside measured: trained layers of gpu_experts.json, and steps with adapters of packed_h200.json."""
    lines = []
    layers = load("gpu_experts.json")
    for name, shape in layers["shapes"].items():
        tokens, *sizes = layers["sizes"][name]
        model = given(layers=1, **dict(zip(("hidden", "intermediate", "experts", "topk"), sizes, strict=True)))
        measured = shape["forward + backward, graph"]["moekit"]
        lines.append([f"{name}, trained", *planned(model, measured, tokens=tokens)])
    for row in load("packed_h200.json"):
        format = {"moekit, dense": None, "moekit, nf4": "nf4"}.get(row["name"], "")
        if row["what"] == "LoRA step" and format != "":
            step = f"{row['layer']}, {row['tokens']:,} tokens, adapters on {format or 'dense'} weights"
            options = {"tokens": row["tokens"], "lora": 16, "format": format}
            lines.append([step, *planned(row["layer"], row["graph ms"], **options)])
    return table(["step", "products + moves", "measured", "planned / measured"], lines)


def plan_page() -> str:
    """plan.md as it is, but for its table of times."""
    made = times()
    before, head, rest = PLAN.read_text(encoding="utf-8").partition(made.split("\n", 1)[0] + "\n")
    if not head:
        raise ValueError(f"{PLAN} must have a table of times, got none")
    return before + made + "\n\n" + rest.partition("\n\n")[2]


def page() -> str:
    """The whole page."""
    of, experts, beside = load("h200.json"), load("gpu_experts.json"), load("small_batches_peers.json")
    setting, ceilings = of["environment"], of["ceilings"]
    parts = [
        "# Measured, all figures",
        "`python docs/tables.py` writes this page from the JSON files; the other pages say what the figures mean. "
        "bfloat16 where nothing else is said.",
        "## Operators",
        f"One {setting['device']}, torch {setting['torch']}, triton {setting['triton']}, transformers "
        f"{setting['transformers']}, {setting['peers']}. A copy moves {ceilings['copy_GBps']:,} GB/s, a dense product "
        f"reaches {ceilings['matmul_TFLOPs']} TFLOP/s. [h200.json](h200.json) has the host's times as well.",
    ]
    for shape, sizes in SHAPES.items():
        parts += [f"### {shape}", f"{sizes}.", operators(shape), expert_mlp(shape)]
    parts += [
        "## The expert MLP",
        f"One {experts['device']}, torch {experts['torch']}; a copy moves {experts['copy GB/s']:,} GB/s, a dense product "
        f"reaches {experts['dense TFLOP/s']} TFLOP/s. [gpu_experts.json](gpu_experts.json).",
        shapes_of_experts(),
        "Beside others, in two runs: [gpu_experts_peers.json](gpu_experts_peers.json) and "
        "[gpu_experts_sonicmoe.json](gpu_experts_sonicmoe.json).",
        shapes_of_experts("gpu_experts_peers.json"),
        shapes_of_experts("gpu_experts_sonicmoe.json"),
        "Small batches: microseconds of a layer in a graph, beside the reading of the touched experts' weights.",
        small_batches(experts["small batches"]),
        "One token.",
        one_token(),
        "Small batches beside others, another run: [small_batches_peers.json](small_batches_peers.json).",
        small_batches(beside[0]["small batches"]),
        "Those that wait for the GPU, which no graph takes; in two runs.",
        called(beside),
        "Steps in other dtypes.",
        other_dtypes(),
        "## Packed experts",
        "One H200; a step is forward and backward of one layer's experts with adapters of rank 16. "
        "[packed_h200.json](packed_h200.json).",
    ]
    for layer in dict.fromkeys(row["layer"] for row in load("packed_h200.json")):
        parts += [f"### {layer}, LoRA step", packed("LoRA step", layer), f"### {layer}, decoding", packed("decode", layer)]
    parts += [
        "## Whole models",
        "One H200, adapters of rank 8 on every expert, 4,096 tokens a step, every layer checkpointed. "
        "[whole_models_h200.json](whole_models_h200.json).",
        whole_models(),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    PLAN.write_text(plan_page(), encoding="utf-8")
