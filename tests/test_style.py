"""What CONTRIBUTING.md says of lengths and dtypes holds: 60 lines a function, 500 a file, but for those that are named."""

from __future__ import annotations

import ast
from pathlib import Path

import moekit

ROOT = Path(moekit.__file__).parent
FILE, FUNCTION = 500, 60
FACTORIES = {f"torch.{name}" for name in ("empty", "zeros", "ones", "full", "rand", "randn", "linspace")}

# The most lines that each may have, and no exception is kept that is not needed.
LONGER = {
    "moe_utils.py": 620,  # thirty signatures of others, with their docstrings
    "kernels/numba/_glu_kernels.py:backward_kernel": 110,  # makes the next one, and the sums around it
    "kernels/numba/_glu_kernels.py:backward": 90,  # one loop over the columns, all of whose values it shares
}


def lengths() -> dict[str, int]:
    """Lines of every file, and of every function without its docstring."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                described = isinstance(first, ast.Expr) and ast.get_docstring(node) is not None
                docstring = (first.end_lineno or 0) - first.lineno + 1 if described else 0
                key, lines = f"{name}:{node.name}", (node.end_lineno or 0) - node.lineno + 1 - docstring
                found[key] = max(lines, found.get(key, 0))
    return found


def test_functions_fit_a_screen_and_files_a_reading():
    found = lengths()
    longer = {name: lines for name, lines in found.items() if lines > (FUNCTION if ":" in name else FILE)}
    assert {name: lines for name, lines in longer.items() if lines > LONGER.get(name, 0)} == {}
    assert set(LONGER) <= set(longer) and len(found) > 300


def test_factories_say_their_dtype():
    """The default one is whatever the program has set, and kernels write float32 to the addresses they are given."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in FACTORIES and not {"dtype", None} & {keyword.arg for keyword in node.keywords}:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found
