"""The published names and parameters, and how a module's differ."""

from __future__ import annotations

import ast
import inspect
from operator import attrgetter
from pathlib import Path
from typing import Any

Parameters = list[tuple[str, Any, Any]]  # name, kind, default
_POSITIONAL, _KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
_NONE = inspect.Parameter.empty


def published() -> dict[str, Parameters]:
    """By ``"name"`` or ``"Class.method"``, from ``signatures.txt``: NeMo Automodel's first, then Megatron-core's."""
    lines = (Path(__file__).parent / "signatures.txt").read_text(encoding="utf-8").splitlines()
    return dict(_parse(line) for line in lines if line and not line.startswith("#"))


def names() -> list[str]:
    """Functions and classes, in that order of origin."""
    return list(dict.fromkeys(name.split(".")[0] for name in published()))


def has(module: Any, name: str) -> bool:
    """Whether the module has it. A name whose reading raises is there: its cases say what it raises."""
    try:
        return hasattr(module, name)
    except (Exception, SystemExit):
        return True


def differences(module: Any) -> dict[str, str]:
    """What is there under a published name with other parameters. More parameters, with defaults, are no difference."""
    found = {}
    for name, wanted in published().items():
        try:
            value = attrgetter(name)(module)
        except AttributeError:
            if "." in name and has(module, name.split(".")[0]):
                found[name] = "missing"
            continue
        except (Exception, SystemExit) as error:
            found[name] = f"cannot be read: {type(error).__name__}: {error}"
            continue
        try:
            there = [(p.name, p.kind, p.default) for p in inspect.signature(value).parameters.values()]
        except (TypeError, ValueError) as error:
            found[name] = f"no signature: {error}"
            continue
        if not _fits(there, wanted):
            found[name] = f"({_words(there)}), published ({_words(wanted)})"
    return found


def _fits(has: Parameters, wanted: Parameters) -> bool:
    """The published parameters, and after them only such as have a default; keywords in any place."""
    there = [p for p in has if p[1] is _POSITIONAL]
    published_ones = [p for p in wanted if p[1] is _POSITIONAL]
    more = [p for p in has if p not in wanted]
    return (
        there[: len(published_ones)] == published_ones
        and all(p in has for p in wanted)
        and all(p[2] is not _NONE or p[1] not in (_POSITIONAL, _KEYWORD) for p in more)
    )


def _words(parameters: Parameters) -> str:
    return ", ".join(name if default is _NONE else f"{name}={default!r}" for name, _, default in parameters)


def _parse(line: str) -> tuple[str, Parameters]:
    name, parameters = line.split("(", 1)
    arguments = ast.parse(f"lambda {parameters.removesuffix(')')}: 0", mode="eval").body.args  # pyright: ignore
    defaults = [_NONE] * (len(arguments.args) - len(arguments.defaults)) + [ast.literal_eval(d) for d in arguments.defaults]
    found: Parameters = [(a.arg, _POSITIONAL, d) for a, d in zip(arguments.args, defaults, strict=True)]
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return name, found + [(a.arg, _KEYWORD, ast.literal_eval(d)) for a, d in keywords]
