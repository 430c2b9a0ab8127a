"""Cached launches: their keys against what Triton itself specialises on, and what is kept and what is not.

No GPU is needed: Triton binds arguments for a device that is not there, and a stand-in notes what would be launched.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit
from triton.tools.tensor_descriptor import TensorDescriptor

from moekit.kernels.triton import _cached, hopper

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
MEMORY = torch.zeros(4096, dtype=torch.uint8)


def kernel_of(first, second, third):
    """The arguments of a kernel; it is never run."""


def at(offset: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor so many bytes behind an address that is a multiple of 16."""
    start = -MEMORY.data_ptr() % 16 + offset
    return MEMORY[start : start + 64].view(dtype)


def huge(dtype: torch.dtype) -> torch.Tensor:
    """A tensor of more bytes than 32 bits address: its pages are never touched."""
    return torch.empty(2**31 // dtype.itemsize + 16, dtype=dtype)[:4]


VALUES = {
    "integers": [0, 1, 2, 16, 17, -1, -16, 2**31 - 1, -(2**31), 2**31, 2**31 + 1, -(2**31) - 16, 2**63, 2**63 + 1],
    "others": [None, 1.0, 2.5, True, False],
    "tensors": [at(o, d) for o, d in itertools.product((0, 4, 8), (torch.int32, torch.float32, torch.bfloat16))]
    + [at(0, torch.int64), at(1, torch.uint8), at(0, torch.bool), torch.nn.Parameter(torch.zeros(4)), huge(torch.float32)],
    "descriptors": [
        TensorDescriptor.from_tensor(torch.zeros(64, 64, dtype=dtype), list(box))
        for dtype, box in itertools.product((torch.bfloat16, torch.float16), ((16, 64), (64, 16), (64, 64)))
    ]
    + [
        hopper.described(torch.zeros(64, 64, dtype=dtype), (64, 64), (64, 1), list(box))
        for dtype, box in itertools.product((torch.bfloat16, torch.float16), ((16, 64), (64, 16), (64, 64)))
    ],
}


def of_triton(args: tuple, declines: list[str], target: str) -> str:
    """Triton's own key for a launch."""
    function = jit.JITFunction(kernel_of, do_not_specialize=declines)
    binder = jit.create_function_from_signature(function.signature, function.params, make_backend(TARGETS[target]))
    _, specialization, options = binder(*args)
    return jit.compute_cache_key({}, specialization, options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("declines", [[], ["second"]])
def test_what_triton_tells_apart_has_keys_apart(monkeypatch, target, declines):
    """And what has one key is one to Triton; it may be one to Triton that has two here, which costs a look more."""
    monkeypatch.setattr(_cached, "_AMD", target == "hip")
    without = tuple(name in declines for name in ("first", "second", "third"))
    found: dict[tuple, str] = {}
    for value in itertools.chain(*VALUES.values()):
        for args in ((at(0, torch.float32), value, 3), (value, 5, None)):
            prepared = _cached.prepare(args, without, -1)
            assert prepared is not None
            key, expected = tuple(prepared[0]), of_triton(args, declines, target)
            assert found.setdefault(key, expected) == expected, args
    assert len(found) < 3 * len(set(found.values())), "keys are not much finer than they need to be"


def test_addresses_stand_for_tensors():
    tensor, descriptor = at(4, torch.int32), VALUES["descriptors"][0]
    _, values = _cached.prepare((tensor, 7, descriptor, None), (False,) * 4, -1)
    assert values == [tensor.data_ptr(), 7, descriptor, None]


@pytest.mark.parametrize("value", ["text", (1, 2), torch.float32, 1j])
def test_what_is_not_known_is_left_to_triton(value):
    assert _cached.prepare((value,), (False,), -1) is None


def test_a_tensor_of_another_device_is_left_to_triton():
    assert _cached.prepare((torch.zeros(4), 1), (False, False), 0) is None


class Compiled:
    """Notes its launches."""

    packed_metadata, function = "packed", "function"

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def run(self, *args: object) -> None:
        self.launches.append(args)


class Kernel:
    """As much of a JITFunction as a launch sees: it compiles at every call."""

    arg_names = ("x", "n", "BLOCK", "WIDE")
    params = tuple(SimpleNamespace(do_not_specialize=name == "n") for name in arg_names)

    def __init__(self) -> None:
        self.fn, self.pre_run_hooks, self.calls = object(), [], []

    def __getitem__(self, grid: tuple[int, ...]):
        def compile_and_run(*args: object, **constants: object) -> Compiled:
            self.calls.append((grid, args, constants, Compiled()))
            return self.calls[-1][-1]

        return compile_and_run


@pytest.fixture
def launches(monkeypatch):
    """Launch a kernel on a device whose stream is number 5."""
    active = SimpleNamespace(get_current_stream=lambda device: 5)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    kernel = Kernel()

    def launch(n: int = 3, grid: tuple[int, ...] = (4,), x: torch.Tensor = MEMORY, **constants: object) -> None:
        _cached.launch(kernel, grid, -1, (x, n), {"WIDE": True, "num_warps": 2, "BLOCK": 64, **constants})

    return kernel, launch


def test_the_second_launch_takes_what_the_first_compiled(launches):
    kernel, launch = launches
    launch(3)
    launch(9, (7, 2))
    ((grid, args, _, compiled),) = kernel.calls
    assert (grid, args[1]) == ((4,), 3), "the first is Triton's"
    expected = (7, 2, 1, 5, "function", "packed", None, None, None, MEMORY.data_ptr(), 9, 64, True)
    assert compiled.launches == [expected], "grid, stream, kernel, no hooks, arguments and constants in their order"


@pytest.mark.parametrize("other", [{"BLOCK": 128}, {"num_warps": 4}, {"x": MEMORY.view(torch.int32)}, {"n": 2**40}])
def test_others_are_compiled_on_their_own(launches, other):
    kernel, launch = launches
    launch()
    launch(**other)
    assert len(kernel.calls) == 2


def test_whoever_watches_sees_every_launch(launches, monkeypatch):
    kernel, launch = launches
    launch()
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    launch()
    hook.remove(print)
    for holder, name, value in (
        (triton.knobs.runtime, "debug", True),
        (triton.knobs.runtime, "add_stages_inspection_hook", lambda *_: None),
        (triton.knobs.compilation, "instrumentation_mode", "consan"),
        (kernel, "pre_run_hooks", [print]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, value)
            launch()
    assert len(kernel.calls) == 6
    launch()
    assert len(kernel.calls) == 6
