"""The drop-in's names, parameters, order, kinds and defaults, against a table of the published ones."""

from __future__ import annotations

import ast
import inspect
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from moekit import moe_utils

TABLE = Path(moe_utils.__file__).parent / "checks" / "signatures.txt"


def read_table():
    """``{"name" or "Class.method": [(parameter, kind, default), ...]}``."""
    lines = [line for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    return dict(parse(line) for line in lines)


def parse(line):
    name, parameters = line.split("(", 1)
    arguments = ast.parse(f"lambda {parameters.removesuffix(')')}: 0", mode="eval").body.args
    empty = inspect.Parameter.empty
    defaults = [empty] * (len(arguments.args) - len(arguments.defaults)) + [ast.literal_eval(d) for d in arguments.defaults]
    found = [
        (argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default)
        for argument, default in zip(arguments.args, defaults, strict=True)
    ]
    found += [
        (argument.arg, inspect.Parameter.KEYWORD_ONLY, ast.literal_eval(default))
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return name, found


SIGNATURES = read_table()
# A process group in place of global state.
SIGNATURES["get_updated_expert_bias"].append(("group", inspect.Parameter.POSITIONAL_OR_KEYWORD, None))
CLASSES = sorted({name.split(".")[0] for name in SIGNATURES if "." in name})


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(attrgetter(name)(moe_utils)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in parameters] == SIGNATURES[name]
    # Equal is not enough for defaults: 0 == 0.0 == False.
    for parameter, (_, _, default) in zip(parameters, SIGNATURES[name], strict=True):
        assert type(parameter.default) is type(default)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_autograd_functions_with_static_methods(name):
    cls = getattr(moe_utils, name)
    assert issubclass(cls, torch.autograd.Function)
    for method in (full.split(".")[1] for full in SIGNATURES if full.startswith(f"{name}.")):
        assert isinstance(inspect.getattr_static(cls, method), staticmethod)


def test_the_table_is_complete():
    names = {name.split(".")[0] for name in SIGNATURES}
    assert names == set(moe_utils.__all__)
    assert len(CLASSES) == 5 and len(names) == 5 + 20 + 11
    assert hasattr(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale")


def test_every_name_is_documented():
    for name in SIGNATURES:
        assert inspect.getdoc(attrgetter(name)(moe_utils)), name
