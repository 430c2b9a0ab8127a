"""The one place that chooses a backend, and the only reader of environment variables.

Three backends serve every operator: ``torch`` (the reference: any device, any dtype, double backward), ``numba`` (CPU
kernels) and ``triton`` (GPU kernels). ``auto`` takes the fastest that is installed for the tensor's device. A backend
that is asked for by name is used or raises; it never falls back to another device's. Kernels state by returning
``NotImplemented`` what they leave to the reference (float64, say).

``MOEKIT_BACKEND`` sets the default, ``MOEKIT_DEBUG=1`` turns on the checks that cost a device-to-host sync.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import Parameter

CHOICES = ("auto", "torch", "numba", "triton")
_KERNEL_PACKAGES = {"numba": "moekit.kernels.numba", "triton": "moekit.kernels.triton"}
_HOW_TO_GET = {
    "numba": "pip install 'moekit[cpu]'",
    "triton": "pip install triton (it comes with PyTorch's GPU builds for Linux)",
}
_DEFAULT = os.environ.get("MOEKIT_BACKEND", "auto")
_DEFAULT_DEBUG = os.environ.get("MOEKIT_DEBUG", "0") not in ("", "0")
_requested: ContextVar[str] = ContextVar("moekit_backend", default=_DEFAULT)
_debug: ContextVar[bool] = ContextVar("moekit_debug", default=_DEFAULT_DEBUG)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operators called inside the ``with`` block on one backend.

    Args:
        name: ``"auto"``, ``"torch"``, ``"numba"`` or ``"triton"``.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: the backend is not installed; the message says how to get it.

    The choice holds for the current thread (or task) and for the backward of what was computed inside.
    """
    _require(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Check values on GPUs as on CPUs inside the ``with`` block: each check costs a device-to-host sync."""
    token = _debug.set(bool(enabled))
    try:
        yield
    finally:
        _debug.reset(token)


def debug_enabled() -> bool:
    """Whether checks that cost a device-to-host sync are on."""
    return _debug.get()


def checks_values(tensor: Tensor) -> bool:
    """Whether an operator may look at the values of ``tensor`` to validate them.

    Within ``torch.func`` a tensor may stand for many, while code is traced for none yet, and other classes keep their values
    to themselves: there the operators look, at the plain tensors that come to them in the end.
    """
    if type(tensor) not in (Tensor, Parameter) or is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type == "cpu" or (_debug.get() and tensor.device.type != "meta")


def current() -> str:
    """The backend asked for: a name or ``"auto"``."""
    return _requested.get()


def available() -> dict[str, bool]:
    """Which backends can be used in this process."""
    return {name: name == "torch" or _kernels(name) is not None for name in CHOICES[1:]}


def kernel(op: str, tensor: Tensor) -> Callable | None:
    """The kernel that runs ``op`` on ``tensor``, or None for the reference."""
    name = _requested.get()
    device = tensor.device.type
    if name == "torch" or device == "meta":
        return None
    if name == "auto":
        name = {"cpu": "numba", "cuda": "triton"}.get(device, "torch")
        table = None if name == "torch" else _kernels(name)
        return None if table is None else table.get(op)
    table = _require(name)
    _require_device(name, device)
    return table.get(op)


@functools.cache
def _load(name: str) -> Mapping[str, Callable] | ImportError:
    """The kernels of a backend by operator name, or why they cannot be had."""
    try:
        return importlib.import_module(_KERNEL_PACKAGES[name]).KERNELS
    except ImportError as error:
        return error


def _kernels(name: str) -> Mapping[str, Callable] | None:
    found = _load(name)
    return None if isinstance(found, ImportError) else found


def _require(name: str) -> Mapping[str, Callable]:
    if name not in CHOICES:
        raise ValueError(f"moekit.backend: name must be one of {', '.join(CHOICES)}, got {name!r}")
    if name in ("auto", "torch"):
        return {}
    found = _load(name)
    if isinstance(found, ImportError):
        raise RuntimeError(f"moekit.backend: {name!r} is not installed; get it with: {_HOW_TO_GET[name]}") from found
    return found


def _require_device(name: str, device: str) -> None:
    if name == "numba" and device != "cpu":
        raise RuntimeError(f"moekit.backend: 'numba' runs on CPU tensors, got a tensor on {device}")
    if name == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"moekit.backend: 'triton' runs on GPU tensors (or on any with TRITON_INTERPRET=1), got one on {device}"
        )
