"""Imports point one way: kernels <- ops <- moe_utils, hf, nn <- demo, cli. Read from the syntax trees."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import moekit

ROOT = Path(moekit.__file__).parent

# A module belongs to the longest prefix here; it may import from lower layers, and from its own without a cycle.
LAYERS = {
    "moekit._check": 0,
    "moekit._backend": 0,  # finds the kernels by name, at the call
    "moekit._codes": 0,
    "moekit._pages": 0,
    "moekit.checks": 0,  # what is true is said without the operators
    "moekit.kernels": 1,
    "moekit.ops": 2,
    "moekit.routing": 2,  # what the operators on rows take: built by ops.tables
    "moekit._moe_utils_router": 3,
    "moekit.megatron": 3,
    "moekit.moe_utils": 3,
    "moekit.compat": 3,
    "moekit._compat_calls": 3,
    "moekit._compat_probes": 3,
    "moekit.ep": 3,
    "moekit.hf": 3,
    "moekit._routers": 3,
    "moekit.choices": 3,
    "moekit.monitor": 3,
    "moekit.packed": 2,  # what the products of packed weights take; made of ops.unpack
    "moekit.plan": 3,
    "moekit.nn": 3,  # finds moekit.hf.blocks and moekit.ep by name, at the call
    "moekit.replay": 3,
    "moekit": 4,  # the public names, and what is not listed: bench, cli, demo, doctor
}

# Who may import what, by prefix.
ONLY_FOR = {
    "numba": ["moekit.kernels.numba"],
    "llvmlite": ["moekit.kernels.numba"],
    "triton": ["moekit.kernels.triton"],
    "transformers": ["moekit.hf"],
    "peft": ["moekit.hf.peft"],
    "torch.distributed": ["moekit.ep", "moekit.ops.losses", "moekit.hf._trainer", "moekit.demo.ranks"],
    "typer": ["moekit.cli"],
    "rich": ["moekit.cli", "moekit.demo", "moekit.monitor._show", "moekit.plan.show"],
    "matplotlib": ["moekit.bench.run", "moekit.demo", "moekit.monitor._show", "moekit.plan.show"],
    "numpy": ["moekit.kernels.numba"],
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {name_of(path) for path in ROOT.rglob("__init__.py")}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs: what is under ``if TYPE_CHECKING`` does not."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for other in child.orelse:
                yield from (other, *nodes(other))
        else:
            yield child
            yield from nodes(child)


def imports(module: str) -> Iterator[str]:
    """Every module that ``module`` imports, wherever in the file; ``from package import module`` means the module."""
    for node in nodes(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = module.split(".")[: None if module in PACKAGES else -1]
                source = ".".join([*base[: len(base) - node.level + 1], *source.split(".")]).rstrip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in TREES else source


def belongs(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def layer(module: str) -> int:
    return LAYERS[max((prefix for prefix in LAYERS if belongs(module, prefix)), key=len)]


def own(module: str) -> set[str]:
    return {found for found in imports(module) if belongs(found, "moekit")}


def test_imports_point_one_way():
    for module in TREES:
        wrong = {found for found in own(module) if layer(found) > layer(module)}
        assert not wrong, f"{module} (layer {layer(module)}) imports {sorted(wrong)} from above"


def test_there_are_no_cycles():
    graphlib.TopologicalSorter({module: own(module) - {module} for module in TREES}).prepare()


def test_kernels_of_one_backend_know_nothing_of_the_other():
    for module in TREES:
        if belongs(module, "moekit.kernels"):
            package = ".".join(module.split(".")[:3])
            wrong = {found for found in own(module) if layer(found) > 0 and not belongs(found, package)}
            assert not wrong, f"{module} imports {sorted(wrong)}"


def test_each_dependency_has_its_place():
    for dependency, users in ONLY_FOR.items():
        for module in TREES:
            found = [name for name in imports(module) if belongs(name, dependency)]
            assert not found or any(belongs(module, user) for user in users), f"{module} imports {found}"


def mentions_of_environ(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb"):
            yield node
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (alias for alias in node.names if alias.name in ("environ", "environb", "getenv", "getenvb"))


def test_only_backend_reads_the_environment():
    mentioned = {module: len([*mentions_of_environ(tree)]) for module, tree in TREES.items()}
    assert mentioned.pop("moekit._backend")
    # The command line sets what OpenMP reads, before torch is loaded.
    setdefault = [node for node in ast.walk(TREES["moekit.cli.demo"]) if getattr(node, "attr", "") == "setdefault"]
    assert mentioned.pop("moekit.cli.demo") == sum(len([*mentions_of_environ(node)]) for node in setdefault)
    assert not any(mentioned.values()), mentioned


def test_no_assert_statements():
    """They vanish under ``python -O`` and say nothing to a user."""
    found = [(m, node.lineno) for m, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not found


def test_these_tests_see_something():
    assert {"moekit.ops.rows", "moekit.ops._library", "moekit.routing"} <= set(TREES)
    assert "moekit.ops.rows" in own("moekit.moe_utils") and "moekit._check" in own("moekit.routing")
    assert "moekit.ops.rows" not in own("moekit")  # for type checkers only
    assert layer("moekit.ops.rows") == 2 and layer("moekit.demo.run") == layer("moekit") == 4


def test_the_layers_are_of_modules_that_exist():
    assert set(LAYERS) <= set(TREES)
    users = {user for users in ONLY_FOR.values() for user in users}
    assert users <= set(TREES)
    for dependency, names in ONLY_FOR.items():
        for user in names:
            imported = [name for module in TREES if belongs(module, user) for name in imports(module)]
            assert any(belongs(name, dependency) for name in imported), f"{user} does not import {dependency}"


def test_the_readers_of_imports_see_every_form():
    code = """
import a.b
from c import d
from . import rows
from .._check import fail
from ..ops import tables as t
def f():
    import e
if TYPE_CHECKING:
    import g
else:
    import h
"""
    TREES["moekit.ops.made_up"] = ast.parse(code)
    try:
        found = {"a.b", "c", "moekit.ops.rows", "moekit._check", "moekit.ops.tables", "e", "h"}
        assert set(imports("moekit.ops.made_up")) == found
    finally:
        del TREES["moekit.ops.made_up"]
