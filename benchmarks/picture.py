"""Draw the README's picture from the figures in docs: time and memory of a training step of one layer's experts.

    python benchmarks/picture.py [--out FILE]

``gpu_experts_peers.json`` is of ``gpu_experts.py --peers``, ``packed_h200.json`` of ``packed.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs" / "performance"
OURS, THEIRS, LIGHT = "#0b6e4f", "#8a8f98", 0.55  # backward is drawn in the lighter shade
LEFT_OUT = ("old", "moekit fp8", "moekit batch-invariant")


def bars(axes: Any, title: str, unit: str, parts: dict[str, list[float]]) -> None:
    """One bar a contender, of its parts, the smallest sum on top."""
    order = sorted(parts, key=lambda who: sum(parts[who]), reverse=True)
    for who in order:
        begun = 0.0
        for number, part in enumerate(parts[who]):
            color = OURS if who.startswith("moekit") else THEIRS
            axes.barh(who, part, left=begun, color=color, alpha=LIGHT if number else 1.0)
            begun += part
        axes.text(begun, who, f" {begun:,.1f}" if begun < 100 else f" {begun:,.0f}", va="center", fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(unit, fontsize=9)
    axes.margins(x=0.16)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def draw(dense: dict[str, Any], packed: list[dict[str, Any]], path: Path) -> None:
    layer = dense["shapes"]["qwen3"]
    whole = {who: ms for who, ms in layer["forward + backward"].items() if who not in LEFT_OUT}
    ahead = layer["forward"]
    lora = [r for r in packed if (r["what"], r["layer"], r["tokens"]) == ("LoRA step", "Qwen3-30B-A3B", 4096)]
    lora = {r["name"]: r for r in lora if r["name"] in ("moekit, nf4", "PEFT + grouped_mm", "grouped-nf4-gemm")}
    figure, panels = plt.subplots(2, 2, figsize=(10, 4.8), gridspec_kw={"height_ratios": [5, 3]})
    step = "training step, 16,384 tokens"
    bars(panels[0][0], step, "ms: forward, and backward in light", {w: [ahead[w], ms - ahead[w]] for w, ms in whole.items()})
    bars(panels[0][1], step, "peak MiB beyond parameters and inputs", {who: [layer["peak MiB"][who]] for who in whole})
    tuned = "LoRA step, frozen experts, 4,096 tokens"
    bars(panels[1][0], tuned, "ms", {who: [r["ms"]] for who, r in lora.items()})
    bars(panels[1][1], tuned, "peak MiB beyond weights and inputs", {who: [r["peak MiB"]] for who, r in lora.items()})
    figure.suptitle(f"Experts of one Qwen3-30B-A3B layer, bfloat16, {dense['device']}", fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS / "overview.png")
    options = parser.parse_args()
    dense, packed = (json.loads((DOCS / f"{name}.json").read_text()) for name in ("gpu_experts_peers", "packed_h200"))
    draw(dense, packed, options.out)


if __name__ == "__main__":
    main()
