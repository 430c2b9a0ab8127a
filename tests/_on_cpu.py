"""A pytest plugin for tests/frameworks.py: the frameworks' tests on a CPU, and with ``MOEKIT_INSTALL=1`` on moekit.

Megatron's tests ask for a GPU in many ways: with ``PRETEND_A_GPU=1`` everything that asks for one gets the CPU, and NCCL
is Gloo. What still needs a GPU fails alike with moekit and without it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import typing
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


def _on_cpu(value: Any) -> Any:
    asked = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return torch.device("cpu") if asked else value


class _Cpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {key: _on_cpu(value) if key == "device" else value for key, value in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(value) for value in args)
        return func(*args, **kwargs)


def _pretend() -> None:
    torch.cuda.__dict__.update(
        is_available=lambda: True,
        _lazy_init=lambda: None,
        is_initialized=lambda: False,
        get_device_capability=lambda *_: (9, 0),
        get_device_properties=mock.MagicMock(),
        reset_peak_memory_stats=lambda *_: None,
        max_memory_allocated=lambda *_: 0,
        current_device=lambda: torch.device("cpu"),
        set_device=lambda *_: None,
        device_count=lambda: 1,
        synchronize=lambda *_: None,
        empty_cache=lambda: None,
        manual_seed=lambda *_: None,
        memory_allocated=lambda *_: 0,
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        current_stream=mock.MagicMock,
        stream=lambda *_: contextlib.nullcontext(),
        Stream=mock.MagicMock,
        Event=mock.MagicMock,
    )
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch.nn.Module.cuda = lambda self, *_: self
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda *args, **kwargs: init(*args, **{**kwargs, "backend": "gloo"})
    _Cpu().__enter__()


if os.environ.get("PRETEND_A_GPU") == "1":
    _pretend()
vars(typing).setdefault("override", lambda function: function)  # in Python from 3.12 on, which the checkouts may ask for


def pytest_runtest_teardown(item: Any) -> None:
    """Megatron's test models take the process groups down when they are collected: not in the middle of another test."""
    gc.collect()


def _without_transformer_engine() -> None:
    """Megatron's tests compare its version, which is None without it, and a release looks for a name that is not there."""
    try:
        from megatron.core import utils
        from megatron.core.transformer.moe import moe_utils
        from packaging.version import Version
    except ImportError:
        return
    if utils.get_te_version() is None:
        utils.get_te_version = lambda: Version("0")
    vars(moe_utils).setdefault("te_general_gemm", None)
    _destroy_groups_too()


def _destroy_groups_too() -> None:
    """Megatron only forgets its process groups, and each of Gloo's keeps threads: thousands after a hundred tests."""
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d as c10d

    forget = parallel_state.destroy_model_parallel

    def destroy() -> None:
        forget()
        if c10d.is_initialized():
            default = c10d._get_default_group()
            for group in [group for group in c10d._world.pg_map if group is not default]:
                c10d.destroy_process_group(group)

    parallel_state.destroy_model_parallel = destroy


def pytest_configure(config: Any) -> None:
    """Install before any test module imports a name."""
    _without_transformer_engine()
    if os.environ.get("MOEKIT_INSTALL") == "1":
        import moekit.compat

        print(moekit.compat.install())
