"""Put moekit in the place of NeMo Automodel's and Megatron-core's ``moe_utils``, reversibly.

Both frameworks take these functions by ``from ... import name``, so a substitution has to reach every loaded module
that holds the name. :func:`install` rebinds them all and :func:`uninstall` puts every one back::

    moekit.compat.install()          # or: with moekit.compat.install(): ...

Where an installed release has parameters that moekit does not know, or gives one another meaning, a call that uses such
a parameter goes to the framework's own function.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

from moekit import moe_utils

_TARGETS = (
    "nemo_automodel.components.moe.megatron.moe_utils",
    "megatron.core.transformer.moe.moe_utils",
)
# Megatron-core's sums over its global process group, which moekit's takes as an argument.
_LEFT_ALONE = {"get_updated_expert_bias"}
# Megatron-core's mask is True for valid tokens here and for padding elsewhere.
_OTHER_MEANING = {"switch_load_balancing_loss_func": {"padding_mask"}}

_Binding = tuple[ModuleType, str, Any]
_bindings: list[_Binding] = []
_replacements: list[tuple[Any, Any, str]] = []  # ours, theirs, the framework's top-level package
_scale_before: list[Any] = []  # moekit's process-wide auxiliary-loss scale at the first install


class Substitution:
    """What :func:`install` or :func:`uninstall` did: ``names`` lists every ``module.name`` that was rebound.

    As a context manager it is undone at the end of the block: what was installed before stays, and the other way round.
    """

    def __init__(self, names: list[str], undo: Callable[[], Any] | None) -> None:
        self.names = names
        self._undo = undo

    def __enter__(self) -> Substitution:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._undo is not None:
            self._undo()

    def __repr__(self) -> str:
        return f"Substitution({len(self.names)} names)"


def install() -> Substitution:
    """Make NeMo Automodel and Megatron-core use moekit's functions and autograd classes.

    Reaches ``nemo_automodel.components.moe.megatron.moe_utils`` and ``megatron.core.transformer.moe.moe_utils``, and
    every loaded module that imported a name from them. A framework that is not installed is passed over. Calling it
    again reaches the modules that were loaded since.

    Returns:
        what was rebound; also a context manager that uninstalls at its end.
    """
    names = []
    was_installed = bool(_replacements)
    for target in _TARGETS:
        module = _import(target)
        if module is not None:
            names += _substitute(module)
    return Substitution(names, None if was_installed else uninstall)


def uninstall() -> Substitution:
    """Put back every name that :func:`install` rebound, in every module that holds it by now.

    Returns:
        what was put back; also a context manager that installs again at its end.
    """
    names = []
    was_installed = bool(_replacements)
    for module, name, theirs in reversed(_bindings):
        if any(vars(module).get(name) is ours for ours, _, _ in _replacements):
            setattr(module, name, theirs)
            names.append(f"{module.__name__}.{name}")
    _bindings.clear()
    for ours, theirs, package in _replacements:  # modules that were imported in the meantime
        names += [f"{m.__name__}.{n}" for m, n, _ in _rebind(ours, theirs, _holder(ours, package))]
    _replacements.clear()
    if _scale_before:
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = _scale_before.pop()
    return Substitution(names, install if was_installed else None)


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:  # not installed, or one of its own requirements is not
        return None


def _substitute(module: ModuleType) -> list[str]:
    names = []
    for name in moe_utils.__all__:
        theirs = vars(module).get(name)
        if theirs is None or name in _LEFT_ALONE:
            continue
        package = _top_level(module)
        known = [pair for pair in _replacements if pair[0] is theirs and pair[2] == package]
        if known:
            ours, theirs, _ = known[0]
        else:
            ours = getattr(moe_utils, name)
            ours = ours if inspect.isclass(ours) else _dispatch(name, ours, theirs)
            _replacements.append((ours, theirs, package))
            if name == "MoEAuxLossAutoScaler":
                _take_over_scale(theirs)
        found = _rebind(theirs, ours, lambda m: _top_level(m) != "moekit")
        _bindings.extend(found)
        names += [f"{m.__name__}.{n}" for m, n, _ in found]
    return names


def _take_over_scale(theirs: Any) -> None:
    """Go on with the scale that the framework may have set already."""
    ours = moe_utils.MoEAuxLossAutoScaler
    if not _scale_before:
        _scale_before.append(ours.main_loss_backward_scale)
    if theirs.main_loss_backward_scale is not None:
        ours.main_loss_backward_scale = theirs.main_loss_backward_scale


def _holder(ours: Any, package: str) -> Callable[[ModuleType], bool]:
    """Which modules got ``ours`` through a substitution: a class of moekit's may also be used under its own name."""
    if inspect.isclass(ours):
        return lambda module: _top_level(module) == package
    return lambda module: _top_level(module) != "moekit"


def _rebind(old: Any, new: Any, wanted: Callable[[ModuleType], bool]) -> list[_Binding]:
    """Bind ``new`` wherever a loaded module that is ``wanted`` holds ``old``; returns what was bound before."""
    found: list[_Binding] = []
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or not wanted(module):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
                found.append((module, name, old))
    return found


def _dispatch(name: str, ours: Callable, theirs: Any) -> Callable:
    """``ours``, but a call with an argument that only ``theirs`` understands goes there."""
    signature = inspect.signature(getattr(theirs, "_torchdynamo_orig_callable", theirs))
    parameters = list(inspect.signature(ours).parameters)
    known = set(parameters) - _OTHER_MEANING.get(name, set())
    foreign = {key: p.default for key, p in signature.parameters.items() if key not in known}
    in_order = list(signature.parameters) == parameters[: len(signature.parameters)]

    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        if foreign or not in_order:
            given = signature.bind(*args, **kwargs).arguments
            if any(key in given and given[key] is not default for key, default in foreign.items()):
                return theirs(*args, **kwargs)
            kwargs = {key: value for key, value in given.items() if key not in foreign}
            args = ()
        return ours(*args, **kwargs)

    return call


def _top_level(module: ModuleType) -> str:
    return (getattr(module, "__name__", None) or "").split(".", 1)[0]
