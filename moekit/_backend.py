"""The one place that chooses a backend, and the only reader of environment variables.

Three backends serve every operator: ``torch`` (the reference: any device, any dtype, double backward), ``numba`` (CPU
kernels) and ``triton`` (GPU kernels). ``auto`` takes the fastest that is installed for the tensor's device. A backend
that is asked for by name is used or raises; it never falls back to another device's. Kernels state by returning
``NotImplemented`` what they leave to the reference (float64, say).

``MOEKIT_BACKEND`` sets the default, ``MOEKIT_DEBUG=1`` turns on the checks that cost a device-to-host sync.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import Parameter


class Backend(NamedTuple):
    """One row of the table of backends: all that is known of one outside its package."""

    package: str  # a module with KERNELS: operator name to a function of the operator's own arguments
    devices: tuple[str, ...]  # the types of device it runs on, and the one that ``auto`` takes it for
    runs_on: str  # the same in words
    how_to_get: str
    everywhere_with: str | None = None  # an environment variable; where it is 1, the kernels run on any device


# The reference is no row: it is what remains. ``auto`` takes the first row that is installed for a device.
BACKENDS = {
    "numba": Backend("moekit.kernels.numba", ("cpu",), "CPU tensors", "pip install 'moekit[cpu]'"),
    "triton": Backend(
        "moekit.kernels.triton",
        ("cuda",),
        "GPU tensors",
        "pip install triton (it comes with PyTorch's GPU builds for Linux)",
        everywhere_with="TRITON_INTERPRET",
    ),
}
_VARIABLE = "MOEKIT_BACKEND"
_DEBUG_VARIABLE = "MOEKIT_DEBUG"
_DEFAULT = os.environ.get(_VARIABLE) or "auto"
_DEFAULT_DEBUG = os.environ.get(_DEBUG_VARIABLE, "0") not in ("", "0")
_requested: ContextVar[str] = ContextVar("moekit_backend", default=_DEFAULT)
_debug: ContextVar[bool] = ContextVar("moekit_debug", default=_DEFAULT_DEBUG)


class Variable(NamedTuple):
    """An environment variable as this process has it."""

    name: str
    value: str | None  # None: not set
    meaning: str  # what it amounts to
    problem: str | None


class _Within(ContextDecorator):
    """Gives a context variable a value inside a ``with`` block. Thrown away without one, it says so."""

    def __init__(self, variable: ContextVar, value: Any, call: str) -> None:
        self._variable, self._value, self._call = variable, value, call
        self._tokens: list[Token] = []
        self._entered = False

    def __repr__(self) -> str:
        return f"<{self._call}: acts inside a `with` block>"

    def __enter__(self) -> None:
        self._entered = True
        self._tokens.append(self._variable.set(self._value))

    def __exit__(self, *exception: object) -> None:
        self._variable.reset(self._tokens.pop())

    def _recreate_cm(self) -> _Within:
        self._entered = True  # as a decorator: each call of the function enters one of its own
        return type(self)(self._variable, self._value, self._call)

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(f"{self._call} has no effect without `with`: write `with {self._call}:`", stacklevel=2)


def backend(name: str) -> _Within:
    """Run the operators called inside the ``with`` block on one backend.

    Args:
        name: ``"auto"``, ``"torch"``, ``"numba"`` or ``"triton"``.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: the backend is not installed; the message says how to get it.

    The choice holds for the current thread (or task) and for the backward of what was computed inside. Without a
    ``with`` nothing is chosen, and a warning says so; ``MOEKIT_BACKEND`` chooses for a whole process.

    Examples:
        >>> import torch, moekit
        >>> x = torch.ones(2, 8)
        >>> with moekit.backend("torch"):
        ...     reference = moekit.glu(x)
        >>> torch.allclose(reference, moekit.glu(x))
        True
    """
    _require(name)
    return _Within(_requested, name, f"moekit.backend({name!r})")


def debug(enabled: bool = True) -> _Within:
    """Check values on GPUs as on CPUs inside the ``with`` block: each check costs a device-to-host sync."""
    return _Within(_debug, bool(enabled), f"moekit.debug({'' if enabled else enabled})")


def checks_values(tensor: Tensor) -> bool:
    """Whether values of ``tensor`` may be looked at to validate them: on a CPU, or in debug mode.

    Within ``torch.func`` a tensor may stand for many, while code is traced for none yet, and other classes keep their values
    to themselves: there the operators look, at the plain tensors that come to them in the end.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter) or is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.is_cpu or (_debug.get() and not tensor.is_meta)


def debugging() -> bool:
    """Whether values on GPUs are checked, too; not while code is compiled, as it may run in either mode."""
    return not torch.compiler.is_compiling() and _debug.get()


def current() -> str:
    """The backend asked for: a name or ``"auto"``."""
    return _requested.get()


def available() -> dict[str, bool]:
    """Which backends can be used in this process."""
    return {"torch": True, **{name: _kernels(name) is not None for name in BACKENDS}}


def default() -> tuple[str, str | None]:
    """What the process starts with (``MOEKIT_BACKEND``), and why it cannot be had, if so."""
    try:
        _require(_DEFAULT, _VARIABLE)
    except (ValueError, RuntimeError) as error:
        return _DEFAULT, str(error)
    return _DEFAULT, None


def variables() -> list[Variable]:
    """Every environment variable that is read here: its value, what that amounts to, and what is wrong with it, if so."""
    asked, problem = default()
    found = [Variable(_VARIABLE, os.environ.get(_VARIABLE), f"{asked} runs unless asked otherwise", problem)]
    checks = "values on GPUs are checked" if _DEFAULT_DEBUG else "values on GPUs are not checked"
    switches = {_DEBUG_VARIABLE: ("", checks)}
    for name, row in BACKENDS.items():
        if row.everywhere_with:
            on = os.environ.get(row.everywhere_with) == "1"
            means = f"{name} runs on any device, interpreted" if on else f"{name} runs on {row.runs_on}"
            switches[row.everywhere_with] = (f"; moekit takes {name} to run on {row.runs_on} only", means)
    for name, (consequence, means) in switches.items():
        value = os.environ.get(name)
        wrong = None
        if value not in (None, "", "0", "1"):
            wrong = f"{name}: wanted 0 or 1, got {value!r}{consequence or f': {means}'}"
        found.append(Variable(name, value, means, wrong))
    return found


def automatic(device: str) -> str:
    """The backend that ``auto`` takes for a type of device: the first that is installed; ``"torch"``: the reference."""
    fit = (name for name, row in BACKENDS.items() if device in row.devices and _kernels(name) is not None)
    return next(fit, "torch")


def explain(op: str, device: str) -> tuple[str, str]:
    """The backend that runs ``op`` under ``auto`` on a type of device, and why."""
    name = automatic(device)
    if name == "torch":
        missing = [f"{other} {why_not(other)}" for other, row in BACKENDS.items() if device in row.devices]
        return name, "; ".join(missing) or f"no kernels for {device} tensors"
    if op in _automatic(device):
        return name, f"installed, and for {BACKENDS[name].runs_on}"
    return "torch", f"{name} has no kernel of it"


def why_not(name: str) -> str | None:
    """Why a backend cannot be had, or None where it can: what is not there, or what keeps it from being imported."""
    found = {} if name == "torch" else _load(name)
    if not isinstance(found, ImportError):
        return None
    if importlib.util.find_spec(name) is None:  # a backend is called like the package it needs
        return f"is not installed; get it with: {BACKENDS[name].how_to_get}"
    return f"cannot be imported: {found}"


def serves(name: str, device: str) -> bool:
    """Whether a backend runs on a type of device."""
    row = BACKENDS.get(name)
    if row is None or device in row.devices:  # the reference runs on all
        return True
    return row.everywhere_with is not None and os.environ.get(row.everywhere_with) == "1"


def kernel(op: str, tensor: Tensor) -> Callable | None:
    """The kernel that runs ``op`` on ``tensor``, or None for the reference."""
    name = _requested.get()
    device = tensor.device.type
    if name == "torch" or device == "meta":
        return None
    if name == "auto":
        return _automatic(device).get(op)
    table = _require(name, _VARIABLE)  # what moekit.backend() was given has been looked at there
    _require_device(name, device)
    return table.get(op)


def has_kernel(op: str, tensor: Tensor) -> bool:
    """Whether a kernel runs ``op`` on ``tensor``; in code that is compiled whether one may: the backend is chosen later."""
    return tensor.is_cuda if torch.compiler.is_compiling() else kernel(op, tensor) is not None


@functools.cache
def _automatic(device: str) -> Mapping[str, Callable]:
    """The kernels of the backend that ``auto`` takes for a type of device; none: the reference."""
    name = automatic(device)
    return {} if name == "torch" else _require(name)


@functools.cache
def _load(name: str) -> Mapping[str, Callable] | ImportError:
    """The kernels of a backend by operator name, or why they cannot be had."""
    try:
        return importlib.import_module(BACKENDS[name].package).KERNELS
    except ImportError as error:
        return error


def _kernels(name: str) -> Mapping[str, Callable] | None:
    found = _load(name)
    return None if isinstance(found, ImportError) else found


def _require(name: str, asked_by: str = "moekit.backend") -> Mapping[str, Callable]:
    if name in ("auto", "torch"):
        return {}
    if not isinstance(name, str) or name not in BACKENDS:
        choices = ", ".join(("auto", "torch", *BACKENDS))
        raise ValueError(f"{asked_by}: name must be one of {choices}, got {name!r}")
    found = _load(name)
    if isinstance(found, ImportError):
        raise RuntimeError(f"{asked_by}: {name!r} is not installed; get it with: {BACKENDS[name].how_to_get}") from found
    return found


def _require_device(name: str, device: str) -> None:
    if serves(name, device):
        return
    row = BACKENDS[name]
    anywhere = f" (or on any with {row.everywhere_with}=1)" if row.everywhere_with else ""
    raise RuntimeError(f"moekit.backend: {name!r} runs on {row.runs_on}{anywhere}, got a tensor on {device}")
