"""The tables of docs/performance/scale.md, from sizes of layers and published speeds of links.

``python benchmarks/scale.py`` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moekit.plan.exchange import H200, LAYERS, MACHINES, QWEN3, Layer, Machine, rows, sent, times

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
REACHED = 0.75  # of a link's published speed, by NCCL, for the predictions


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def rows_of_a_token() -> str:
    """Rows on the wire, one way, by how a dispatcher sends them."""
    lines = []
    for ranks in (2, 4, 8, 16, 32):
        each = (f"{rows(QWEN3, ranks, ranks, way).total:.2f}" for way in ("slot", "rank", "all"))
        lines.append([str(ranks), *each])
    return table(["ranks", "one a slot", "one a rank", "all-gather"], lines)


def scaling(layer: Layer, machine: Machine) -> str:
    """Messages and times from 8 GPUs to 1,024: more GPUs than experts are copies of the group."""
    lines = []
    for ranks in (gpus for gpus in GPUS if gpus <= layer.experts):
        wire = rows(layer, ranks, machine.node, "rank")
        megabytes = wire.total * layer.tokens * layer.hidden * layer.row_bytes / 1e6
        each = {way: times(layer, machine, ranks, way) for way in ("slot", "all", "rank", "node")}
        lines.append(
            [
                str(ranks) if ranks < layer.experts else f"{ranks}; to {GPUS[-1]} in copies",
                f"{wire.inside:.2f} + {wire.between:.2f}",
                f"{megabytes:.0f}",
                f"{1e3 * megabytes / (ranks - 1):.0f}",
                *(f"{1e3 * each[way].exchange:.1f}" for way in each),
                *(f"{each[way].ratio:.2f}" for way in ("rank", "node")),
            ]
        )
    head = ["GPUs", "rows a token, inside + between", "MB out", "kB a peer"]
    head += ["ms: a slot", "all-gather", "a rank", "two hops", "a rank / products", "two hops / products"]
    return table(head, lines)


def predictions(ranks: int) -> str:
    """What a run on GPUs of one H200 machine is to show."""
    lines = []
    for layer in LAYERS:
        each = {way: times(layer, H200, ranks, way, REACHED) for way in ("rank", "all", "slot")}
        products = each["rank"].experts
        for way, name in (("rank", "all_to_all"), ("all", "all_gather"), ("slot", "Transformers all_to_all")):
            exchange, row_bytes = each[way].exchange, layer.tokens * layer.hidden * layer.row_bytes
            lines.append(
                [
                    layer.name,
                    name,
                    f"{rows(layer, ranks, ranks, way).total * row_bytes / 1e6:.0f}",
                    f"{1e3 * exchange / 4:.2f}",
                    f"{1e3 * products / 3:.2f}",
                    f"{1e3 * products * 2 / 3:.2f}",
                    f"{1e3 * (exchange + products):.1f}",
                ]
            )
    head = ["layer", "dispatcher", "MB an exchange", "ms an exchange (of 4)", "products", "products, backward", "sum"]
    return table(head, lines)


def all_tables() -> dict[str, str]:
    """By the name that docs/performance/scale.md has them under."""
    found = {"rows": rows_of_a_token()}
    found |= {f"{layer.name}, {machine.name}": scaling(layer, machine) for layer in LAYERS for machine in MACHINES}
    return found | {f"{ranks} GPUs": predictions(ranks) for ranks in (2, 4, 8)}


if __name__ == "__main__":
    for name, text in all_tables().items():
        print(f"<!-- {name} -->\n{text}\n")
    print({ranks: {what: round(n) for what, n in sent(QWEN3, ranks).items()} for ranks in (2, 4, 8)})
