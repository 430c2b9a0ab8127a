"""The pictures of the concepts: ``python docs/pictures.py`` writes them into docs/concepts.

Plain SVG on a light ground of its own, so that it reads the same on a dark page; letters are large enough for a phone, where
640 units are some 350 pixels.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "concepts"
WIDTH = 640
INK, SOFT, GROUND = "#22303c", "#6b7a86", "#fbfcfd"
FILL = ("#8fd0bd", "#f7bd8b", "#b9b5dd", "#f3a5cb")  # of tokens
TOKENS = ((0, 2), (1, 2), (0, 1), (2, 0))  # the experts of each


def text(
    x: float, y: float, words: str, *, size: int = 19, anchor: str = "middle", ink: str = INK, bold: bool = False
) -> str:
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{ink}"'
    return f'<text {place} font-weight="{600 if bold else 400}">{words}</text>'


def box(x: float, y: float, wide: float, high: float, fill: str, *, line: str = INK, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" rx="6" fill="{fill}" stroke="{line}"{dash}/>'


def arrow(x: float, y: float, to_x: float, to_y: float, *, ink: str = SOFT) -> str:
    half = (x + to_x) / 2
    path = f"M{x:g} {y:g} C{half:g} {y:g} {half:g} {to_y:g} {to_x - 9:g} {to_y:g}"
    head = f"M{to_x:g} {to_y:g} l-11 -5 v10 z"
    return f'<path d="{path}" fill="none" stroke="{ink}" stroke-width="2"/><path d="{head}" fill="{ink}"/>'


def picture(high: float, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high:g}" role="img" '
    head += 'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">'
    ground = box(0.5, 0.5, WIDTH - 1, high - 1, GROUND, line="#d5dce1")
    return "\n".join([head, f"<title>{title}</title>", ground, *parts, "</svg>\n"])


def permutation() -> str:
    """Four tokens, two experts each, and their rows."""
    parts = [text(95, 36, "tokens", bold=True), text(445, 36, "rows, expert by expert", bold=True)]
    rows: dict[tuple[int, int], float] = {}
    y = 56.0
    for expert in range(3):
        mine = [token for token, chosen in enumerate(TOKENS) if expert in chosen]
        parts.append(box(350, y, 270, 42 * len(mine) + 10, "#eef2f4", line="#d5dce1"))
        parts.append(text(610, y + 21 * len(mine) + 12, f"expert {expert}", anchor="end", ink=SOFT))
        for at, token in enumerate(mine):
            rows[token, expert] = y + 8 + 42 * at
        y += 42 * len(mine) + 22
    for (token, _), top in rows.items():
        parts += [box(360, top, 140, 36, FILL[token]), text(430, top + 25, f"x{token}")]
    for token, chosen in enumerate(TOKENS):
        top = 92 + 88 * token
        parts += [box(20, top, 150, 46, FILL[token]), text(95, top + 30, f"x{token}: {chosen[0]} and {chosen[1]}")]
        parts += [arrow(170, top + 23, 358, rows[token, expert] + 18) for expert in chosen]
    parts.append(text(320, y + 26, "permute copies to the right, unpermute adds up to the left"))
    return picture(y + 44, "permute: tokens to rows, grouped by expert", parts)


def kept() -> str:
    """What each step makes, in MiB, and what stays for backward: one layer of Qwen3-30B-A3B, 4,096 tokens, bfloat16."""
    tokens, experts, hidden, inner = 4096, 8, 2048, 768
    of_rows = lambda wide: 2 * tokens * experts * wide / 2**20  # noqa: E731
    steps = [
        ("tokens", 2 * tokens * hidden / 2**20, True, "kept: the layer's input"),
        ("gathered rows", of_rows(hidden), False, "gathered again"),
        ("gate and up", of_rows(2 * inner), True, "kept (float8: half)"),
        ("activation", of_rows(inner), False, "computed again"),
        ("down's output", of_rows(hidden), False, "not needed"),
    ]
    parts = [text(20, 36, "made in forward, MiB", anchor="start", bold=True)]
    for at, (name, size, stays, why) in enumerate(steps):
        y = 56 + 74 * at
        wide = size * 3.2
        look = {"fill": "#4db39b", "line": INK} if stays else {"fill": "none", "line": SOFT, "dashed": True}
        parts.append(box(20, y + 26, wide, 34, **look))
        parts.append(text(20, y + 18, f"{name}: {size:.0f}", anchor="start"))
        inside = wide > 300
        parts.append(text(32 if inside else wide + 34, y + 49, why, anchor="start", ink=INK if stays else SOFT))
    y = 56 + 74 * len(steps) + 14
    parts.append(text(20, y, "Qwen3-30B-A3B, one layer, 4,096 tokens, bfloat16", anchor="start", ink=SOFT, size=18))
    return picture(y + 22, "what is kept for backward", parts)


def dispatch() -> str:
    """One token, whose experts are on two other ranks: a row a slot, and a row a rank."""
    parts: list[str] = []
    titles = {"a row for each expert: 3 travel": False, "a row for each rank: 2 travel": True}
    for panel, (title, joined) in enumerate(titles.items()):
        top = 20 + 310 * panel
        parts.append(text(20, top + 22, title, anchor="start", bold=True))
        parts += [box(20, top + 100, 130, 90, "#eef2f4", line="#d5dce1"), text(85, top + 122, "rank 0", ink=SOFT, size=18)]
        parts += [box(40, top + 134, 90, 42, FILL[0]), text(85, top + 162, "x")]
        for rank, experts, y in ((1, (4, 5), top + 40), (2, (9,), top + 176)):
            high = 38 + 44 * len(experts)
            parts.append(box(330, y, 290, high, "#eef2f4", line="#d5dce1"))
            parts.append(text(345, y + 24, f"rank {rank}", anchor="start", ink=SOFT, size=18))
            middles = [y + 34 + 44 * at + 19 for at in range(len(experts))]
            for expert, middle in zip(experts, middles, strict=True):
                parts += [box(470, middle - 19, 138, 36, FILL[2]), text(539, middle + 6, f"expert {expert}")]
            if joined:
                entry = sum(middles) / len(middles)
                parts += [box(342, entry - 19, 64, 36, FILL[0]), text(374, entry + 6, "x")]
                parts += [arrow(406, entry, 468, middle) for middle in middles]
                parts.append(arrow(130, top + 155, 340, entry, ink=INK))
            else:
                parts += [arrow(130, top + 155, 468, middle, ink=INK) for middle in middles]
    parts.append(text(20, 640, "back: rank 1 sends one row, s4 y4 + s5 y5", anchor="start"))
    return picture(662, "deduplicated dispatch", parts)


PICTURES = {"permutation.svg": permutation, "kept.svg": kept, "dispatch.svg": dispatch}


def main() -> None:
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
