"""Fixtures of the suite: the backends, and memory that is never zero by luck."""

from __future__ import annotations

import gc
import os

import pytest

# Of tests and of the processes that they start: threads that wait give their core to others at once, and NumPy's products,
# which are small, take no second thread. Both libraries look once, when they are loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

import moekit

# The tensors here are small: a second thread costs more than it brings, and two test processes share two cores.
torch.set_num_threads(1)


# Files of a dozen seconds and more, in this order and before all others: what a process takes up last is short. Those of the
# CPU kernels come before those of ranks, each of which would compile for itself what is not yet on disk.
SLOWEST = (
    *("triton_suites", "glu", "compile", "triton_compile", "numba_kernels", "golden", "differential", "glu_operators"),
    *("integer_arguments", "experts", "packed_kernels", "ep_hf", "ep_layer", "demo", "examples", "docs", "benchmarks"),
    *("ep", "ep_calls", "ep_checkpoint", "ep_faults", "triton_kernels", "hf_pack", "hf_peft", "packaging", "default_dtype"),
)


def _backends() -> list[str]:
    """What this process can run on CPU tensors: MOEKIT_BACKEND narrows it to one."""
    asked = os.environ.get("MOEKIT_BACKEND", "auto")
    if asked != "auto":
        return [asked]
    return ["torch", *(["numba"] if moekit.available()["numba"] else [])]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what would repeat another test: it is not skipped, it runs elsewhere.

    ``reference_only`` tests look at what only the reference computes, ``not_interpreted`` ones take Triton's
    interpreter minutes. The Triton kernels' tests run in an interpreter that one of them starts, where there is no GPU.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    kernels_run_here = interpreted or torch.cuda.is_available()

    def repeats(item: pytest.Item) -> bool:
        if item.path.name in ("test_triton_kernels.py", "test_triton_packed.py") and not kernels_run_here:
            return item.name != "test_the_operators_pass_in_the_interpreter"
        if interpreted and item.get_closest_marker("not_interpreted") is not None:
            return True
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        return parameters.get("backend", "torch") != "torch" and item.get_closest_marker("reference_only") is not None

    positions = {item: position for position, item in enumerate(items)}
    left_out = [item for item in items if repeats(item)]
    config.hook.pytest_deselected(items=left_out)
    turns = {f"test_{name}.py": turn for turn, name in enumerate(SLOWEST)}
    items[:] = sorted(set(items) - set(left_out), key=lambda item: (turns.get(item.path.name, len(turns)), positions[item]))


def pytest_collection_finish() -> None:
    """Thousands of tests and all that they import stay: no garbage collection has to go through them again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Extension modules count what they made that is alive at the end."""
    gc.unfreeze()


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest):
    """Run the test on each backend for CPU tensors. float64 runs on the reference under every one of them."""
    with moekit.backend(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and its kin return with NaN (integers: a huge number), as dirty memory would."""

    def poison(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
                return tensor
            if tensor.dtype.is_floating_point:
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype is torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return empty

    with torch.device("cpu"):
        torch.empty(0)  # PyTorch remembers once which functions a device's context changes: the real ones
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
