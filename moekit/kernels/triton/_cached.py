"""Launches of compiled kernels without Triton's preparation of each, which takes longer than most of these kernels run.

``kernel[grid](...)`` asks of every argument, every time, what a kernel is specialised on, and makes a text of it and of all
options to find the compiled one by. Here that is kept, once Triton has found it, under a key of the same few facts:

- of a tensor the dtype and whether its address is a multiple of 16 (AMD: also whether 32 bits are enough to address it);
- of an integer how many bits it takes and, where the kernel does not decline it, whether it is 1 or a multiple of 16;
- of a descriptor the dtype and the block, and all constants and options by value.

Tensors are handed on as addresses. So they have to be on the device of the launch: any others, and arguments of any other
kind, take Triton's own way, which knows them or says what is wrong. So does everything while somebody watches launches
(a profiler's hooks) or has asked for other code (debug mode, instrumentation) than what was kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

_DESCRIPTORS = (TensorDescriptor, GluonDescriptor)
_SMALL = 2**31 - 1  # bytes of a storage that AMD's buffer instructions address
_AMD = torch.version.hip is not None
_DECLINED: dict[Any, tuple[bool, ...]] = {}
_FOUND: dict[tuple, tuple[Any, tuple]] = {}  # the compiled kernel, and what it is given for its constants


def launch(kernel: Any, grid: tuple[int, ...], device: int, args: tuple, constants: dict[str, Any]) -> None:
    """``kernel[grid](*args, **constants)`` on the current device, which is ``device``, and its current stream."""
    prepared = None if _watched(kernel) else prepare(args, declined(kernel), device)
    if prepared is None:
        kernel[grid](*args, **constants)
        return
    key, values = prepared
    key = (kernel.fn, device, *constants.items(), *key)
    found = _FOUND.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        if hasattr(compiled, "packed_metadata"):  # not so while it is compiled in another process
            _FOUND[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, tail = found
    stream = triton.runtime.driver.active.get_current_stream(device)
    compiled.run(
        *grid, *(1,) * (3 - len(grid)), stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *tail
    )


def prepare(args: tuple, without: tuple[bool, ...], device: int) -> tuple[list, list] | None:
    """What the arguments of a launch are specialised on, and what the compiled kernel takes for them; None: not known.

    Args:
        args: of the launch, without constants.
        without: :func:`declined` of the kernel.
        device: its index; -1 for a CPU.
    """
    key: list[Any] = []
    values = list(args)
    for place, arg in enumerate(args):
        kind = type(arg)
        if kind is int:
            bits = 32 if -(2**31) <= arg < 2**31 else 64 if arg < 2**63 else 65
            key.append(bits if without[place] else "1" if arg == 1 else bits + 128 * (arg % 16 == 0))
        elif arg is None or kind is float or kind is bool:
            key.append(kind)
        elif isinstance(arg, Tensor):
            if arg.get_device() != device:
                return None
            values[place] = address = arg.data_ptr()
            key += arg.dtype, address % 16 == 0
            if _AMD:
                key.append(arg.untyped_storage().nbytes() <= _SMALL)
        elif kind in _DESCRIPTORS and arg.base.get_device() == device:
            # How Gluon lays a block out in shared memory follows from the block and the dtype.
            key += kind, arg.base.dtype, *arg.block_shape, arg.padding
        else:
            return None
    return key, values


def declined(kernel: Any) -> tuple[bool, ...]:
    """For each argument of a kernel whether it declines to be specialised on it."""
    found = _DECLINED.get(kernel.fn)  # the kernel itself is hashed by its source
    if found is None:
        found = _DECLINED[kernel.fn] = tuple(parameter.do_not_specialize for parameter in kernel.params)
    return found


def _watched(kernel: Any) -> bool:
    """Whether somebody listens to launches, or wants kernels other than those that were kept."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return bool(
        any(getattr(hook, "calls", hook) for hook in hooks)
        or kernel.pre_run_hooks
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or compilation.instrumentation_mode
    )
