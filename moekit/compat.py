"""Put moekit in the place of NeMo Automodel's and Megatron-core's ``moe_utils``, reversibly.

Both frameworks take these functions by ``from ... import name``, so a substitution has to reach every loaded module
that holds the name. :func:`install` rebinds them all and :func:`uninstall` puts every one back::

    moekit.compat.install()          # or: with moekit.compat.install(): ...

A function is replaced by the form that the installed release has (:mod:`moekit.moe_utils` or :mod:`moekit.megatron`),
and only if that is one which moekit knows: by its parameters, and by what it returns for a small example. A call with a
parameter or a value that moekit does not know goes to the framework's own function. What is left alone, and what moekit
decides otherwise, is in the result of :func:`install`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

from torch import Tensor

from moekit import _compat_calls, moe_utils

# Each module to substitute in, by the package whose absence means that the framework is not installed.
_TARGETS = {
    "nemo_automodel": "nemo_automodel.components.moe.megatron.moe_utils",
    "megatron.core": "megatron.core.transformer.moe.moe_utils",
}

_Binding = tuple[ModuleType, str, Any]
_bindings: list[_Binding] = []
_replacements: list[tuple[Any, Any, str]] = []  # ours, theirs, the framework's top-level package
_scale_before: list[Any] = []  # moekit's process-wide auxiliary-loss scale at the first install


class Substitution:
    """What :func:`install` or :func:`uninstall` did; its text lists all of it.

    As a context manager it is undone at the end of the block: what was installed before stays, and the other way round.

    Attributes:
        names: every ``module.name`` that was rebound.
        left_alone: why, by ``module.name``, for each function of a framework that moekit has and did not replace.
        differences: what moekit decides otherwise, by ``module.name``, for each function that is replaced.
        missing: why, by module, for each framework that was not found or cannot be imported.
    """

    def __init__(
        self,
        names: list[str],
        undo: Callable[[], Any] | None,
        left_alone: dict[str, str] | None = None,
        differences: dict[str, str] | None = None,
        missing: dict[str, str] | None = None,
    ) -> None:
        self.names = names
        self.left_alone = left_alone or {}
        self.differences = differences or {}
        self.missing = missing or {}
        self._undo = undo

    def __enter__(self) -> Substitution:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._undo is not None:
            self._undo()

    def __repr__(self) -> str:
        lines = [f"Substitution({len(self.names)} names)"]
        for title, entries in (
            ("Left alone", self.left_alone),
            ("Decided differences", self.differences),
            ("Missing", self.missing),
        ):
            if entries:
                lines += [f"{title}:", *(f"  {name}: {text}" for name, text in entries.items())]
        return "\n".join(lines)


def install() -> Substitution:
    """Make NeMo Automodel and Megatron-core use moekit's functions and autograd classes.

    Reaches ``nemo_automodel.components.moe.megatron.moe_utils`` and ``megatron.core.transformer.moe.moe_utils``, and
    every loaded module that imported a name from them. Of two frameworks one may be absent. Calling it again reaches the
    modules that were loaded since.

    Returns:
        what was rebound, what was left alone and why, and where moekit decides otherwise than the framework; also a
        context manager that uninstalls at its end.

    Warns:
        UserWarning: no framework is installed, or one that is installed cannot be imported.
    """
    done = Substitution([], None if _replacements else uninstall)
    for package, target in _TARGETS.items():
        module = _import(package, target, done)
        if module is not None:
            _substitute(module, done)
    if len(done.missing) == len(_TARGETS):
        causes = "; ".join(done.missing.values())
        warnings.warn(f"moekit.compat.install: nothing to substitute in: {causes}", stacklevel=2)
    else:
        for cause in done.missing.values():
            if not cause.endswith(_NOT_INSTALLED):
                warnings.warn(f"moekit.compat.install: {cause}", stacklevel=2)
    return done


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
    # Modules that were imported in the meantime. A class of moekit's may also be used under its own name.
    old = {id(ours): theirs for ours, theirs, _ in _replacements if not inspect.isclass(ours)}
    found = _rebind(old, lambda module: _top_level(module) != "moekit")
    for package in dict.fromkeys(package for _, _, package in _replacements):
        old = {id(ours): theirs for ours, theirs, holder in _replacements if inspect.isclass(ours) and holder == package}
        found += _rebind(old, lambda module, package=package: _top_level(module) == package)
    names += [f"{m.__name__}.{n}" for m, n, _ in found]
    _replacements.clear()
    if _scale_before:
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = _scale_before.pop()
    return Substitution(names, install if was_installed else None)


_NOT_INSTALLED = "is not installed"


def _import(package: str, target: str, done: Substitution) -> ModuleType | None:
    try:
        importlib.import_module(package)
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name and f"{package}.".startswith(f"{error.name}."):
            done.missing[target] = f"{package} {_NOT_INSTALLED}"
        else:
            done.missing[target] = f"{target} cannot be imported: {error}"
    except Exception as error:  # a framework's import may fail in any way: for want of a driver, say
        done.missing[target] = f"{target} cannot be imported: {type(error).__name__}: {error}"
    return None


def _substitute(module: ModuleType, done: Substitution) -> None:
    package, new = _top_level(module), {}
    for name, (theirs, ours) in _plan(module, package).items():
        full_name = f"{module.__name__}.{name}"
        if isinstance(ours, str):
            done.left_alone[full_name] = ours
            continue
        if not any(pair[0] is ours and pair[2] == package for pair in _replacements):
            _replacements.append((ours, theirs, package))
            if name == "MoEAuxLossAutoScaler":
                _take_over_scale(theirs)
        if name in _compat_calls.DIFFERENCES:
            done.differences[full_name] = _compat_calls.DIFFERENCES[name]
        new[id(theirs)] = ours
    found = _rebind(new, lambda other: _top_level(other) != "moekit")
    _bindings.extend(found)
    done.names += [f"{m.__name__}.{n}" for m, n, _ in found]


def _plan(module: ModuleType, package: str) -> dict[str, tuple[Any, Any]]:
    """``(theirs, ours)`` of each name; in the place of ours a text that says why theirs is left alone."""
    plan: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys((*moe_utils.__all__, *_compat_calls.ALSO)):
        found = vars(module).get(name)
        if found is None:
            continue
        known = [pair for pair in _replacements if pair[0] is found and pair[2] == package]
        plan[name] = (known[0][1], found) if known else (found, _compat_calls.replacement(name, found, module))
    # What one returns the other has to read.
    for name, other in (("permute", "unpermute"), ("unpermute", "permute")):
        if name in plan and isinstance(plan[name][1], str) and other in plan and not isinstance(plan[other][1], str):
            plan[other] = plan[other][0], f"it goes with {name}, which is left alone"
    return plan


def _take_over_scale(theirs: Any) -> None:
    """Go on with the scale that the framework may have set already."""
    ours = moe_utils.MoEAuxLossAutoScaler
    if not _scale_before:
        _scale_before.append(ours.main_loss_backward_scale)
    if theirs.main_loss_backward_scale is not None:
        ours.main_loss_backward_scale = theirs.main_loss_backward_scale
    elif isinstance(ours.main_loss_backward_scale, Tensor):  # the one to come back must not be written into
        ours.main_loss_backward_scale = ours.main_loss_backward_scale.clone()


def _rebind(new: dict[int, Any], wanted: Callable[[ModuleType], bool]) -> list[_Binding]:
    """Bind ``new`` in the place of the objects of these ids, in each loaded module that is ``wanted``.

    Returns:
        what was bound before.
    """
    found: list[_Binding] = []
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or not wanted(module):
            continue
        for name, value in list(vars(module).items()):
            if id(value) in new:
                setattr(module, name, new[id(value)])
                found.append((module, name, value))
    return found


def _top_level(module: ModuleType) -> str:
    return (getattr(module, "__name__", None) or "").split(".", 1)[0]
