"""Which backend runs: the context, the environment variable, threads, backward, and what is not installed.

Kernels here are made up for the test, so that it says the same whatever is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from types import ModuleType

import pytest
import torch
from _by_hand import leaf
from _reference import assert_same, draw

import moekit
from moekit import Routing, _backend

INDICES = torch.tensor([[1, 0], [0, 1], [1, 0]])


class Recorder(dict):
    """Kernels that note their name and leave the work to the reference."""

    def __init__(self, *names: str) -> None:
        self.calls: list[str] = []
        super().__init__({name: self._kernel(name) for name in names})

    def _kernel(self, name: str):
        def kernel(*args):
            self.calls.append(name)
            return NotImplemented

        return kernel


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """``install(name, kernels)`` stands in for a backend's package; None: not installed."""

    def install(name: str, kernels: dict | None) -> None:
        package = f"moekit_test_kernels_{name}"
        module = None
        if kernels is not None:
            module = ModuleType(package)
            module.KERNELS = kernels
        monkeypatch.setitem(sys.modules, package, module)  # None makes the import fail
        row = _backend.BACKENDS.get(name, _backend.Backend("", ("cpu",), "CPU tensors", f"pip install {name}"))
        monkeypatch.setitem(_backend.BACKENDS, name, row._replace(package=package))
        forget()

    yield install
    monkeypatch.undo()
    forget()


def forget() -> None:
    """What has been found out about the backends."""
    _backend._load.cache_clear()
    _backend._automatic.cache_clear()


@pytest.fixture
def kernels(install) -> Recorder:
    """A numba backend with kernels for the row movement."""
    recorder = Recorder("permute", "unpermute", "unpermute_backward")
    install("numba", recorder)
    return recorder


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    names = ("MOEKIT_BACKEND", "MOEKIT_DEBUG", "TRITON_INTERPRET")
    base = {key: value for key, value in os.environ.items() if key not in names}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**base, **environment})


def permute(tokens: torch.Tensor) -> torch.Tensor:
    return moekit.permute(tokens, Routing.from_topk(INDICES, num_experts=2))


# --- the context ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "Torch", "", "numpy"])
def test_unknown_name(name):
    message = rf"moekit\.backend: name must be one of auto, torch, numba, triton, got '{name}'"
    with pytest.raises(ValueError, match=message), moekit.backend(name):
        pytest.fail("entered")


@pytest.mark.parametrize(("name", "how"), [("numba", r"pip install 'moekit\[cpu\]'"), ("triton", "pip install triton")])
def test_missing_backend_says_how_to_get_it(install, name, how):
    install(name, None)
    before = _backend.current()
    message = rf"moekit\.backend: '{name}' is not installed; get it with: {how}"
    with pytest.raises(RuntimeError, match=message), moekit.backend(name):
        pytest.fail("entered")
    assert _backend.current() == before
    assert moekit.available()[name] is False
    with moekit.backend("auto"):  # falls back, as nobody asked for it
        assert permute(draw(0, 3, 2)).shape == (6, 2)


def test_a_broken_package_is_not_a_missing_one(install):
    """What cannot be imported for another reason than absence must not be taken for absent."""
    install("numba", {})
    del sys.modules["moekit_test_kernels_numba"].KERNELS
    with pytest.raises(AttributeError, match="KERNELS"), moekit.backend("numba"):
        pytest.fail("entered")


def test_the_context_is_restored(install):
    install("numba", {})
    install("triton", {})
    with moekit.backend("torch"):
        with pytest.raises(KeyError), moekit.backend("numba"):
            assert _backend.current() == "numba"
            with moekit.backend("triton"):
                assert _backend.current() == "triton"
            assert _backend.current() == "numba"
            raise KeyError
        assert _backend.current() == "torch"
        with pytest.raises(ValueError, match="one of"), moekit.backend("nonsense"):
            pass
        assert _backend.current() == "torch"
    with moekit.backend("auto"), pytest.raises(KeyError), moekit.debug():
        assert _backend._debug.get()
        with moekit.debug(False):
            assert not _backend._debug.get()
        assert _backend._debug.get()
        raise KeyError
    assert not _backend._debug.get()


@pytest.mark.parametrize(
    ("call", "written"),
    [
        (lambda: moekit.backend("torch"), "moekit.backend('torch')"),
        (lambda: moekit.debug(), "moekit.debug()"),
        (lambda: moekit.debug(False), "moekit.debug(False)"),
    ],
)
def test_a_choice_without_a_with_block_says_that_it_does_nothing(call, written):
    before = _backend.current()
    with pytest.warns(UserWarning, match=re.escape(f"{written} has no effect without `with`")) as caught:
        call()
    assert caught[0].filename == __file__ and _backend.current() == before


def test_a_choice_can_be_kept_and_decorate(kernels):
    """No warning: what is raised in the suite is a failure."""
    chosen = moekit.backend("numba")
    assert "with" in repr(chosen)
    for _ in range(2):
        with chosen, chosen:
            assert _backend.current() == "numba"
        assert _backend.current() == _backend._DEFAULT

    @moekit.backend("torch")
    def name(again):
        return [_backend.current(), *(name(False) if again else [])]

    with warnings.catch_warnings(record=True) as caught:
        assert name(True) == ["torch", "torch"]
        del chosen
    assert not caught and _backend.current() == _backend._DEFAULT


def test_available_lists_every_backend(install):
    install("numba", {})
    install("triton", None)
    assert moekit.available() == {"torch": True, "numba": True, "triton": False}


def test_a_row_of_the_table_is_all_that_a_backend_needs(install, monkeypatch):
    recorder = Recorder("permute")
    install("made_up", recorder)
    assert moekit.available()["made_up"] is True
    tokens = draw(0, 3, 2)
    with moekit.backend("made_up"):
        assert permute(tokens).shape == (6, 2) and recorder.calls == ["permute"]
    with pytest.raises(ValueError, match="one of auto, torch, numba, triton, made_up, got 'other'"):
        moekit.backend("other")
    monkeypatch.setitem(_backend.BACKENDS, "made_up", _backend.BACKENDS["made_up"]._replace(devices=("cuda",)))
    message = r"moekit\.backend: 'made_up' runs on CPU tensors, got a tensor on cpu"
    with pytest.raises(RuntimeError, match=message), moekit.backend("made_up"):
        permute(tokens)
    install("made_up", None)
    with pytest.raises(RuntimeError, match="'made_up' is not installed; get it with: pip install made_up"):
        moekit.backend("made_up")


def test_auto_takes_the_first_row_that_is_there(install):
    first, second = Recorder("permute"), Recorder("permute")
    install("numba", first)
    install("made_up", second)
    with moekit.backend("auto"):
        permute(draw(0, 3, 2))
        assert (first.calls, second.calls) == (["permute"], [])
        install("numba", None)
        permute(draw(0, 3, 2))
        assert (first.calls, second.calls) == (["permute"], ["permute"])


# --- where values are looked at --------------------------------------------------------------------------------------


def test_values_are_looked_at_where_there_are_some():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, seen = torch.rand(3), []

    def look(t):
        seen.append(_backend.checks_values(t))
        return t.sum()

    assert _backend.checks_values(x) and not _backend.checks_values(x.to("meta"))
    with moekit.debug():
        assert not _backend.checks_values(x.to("meta"))
    with FakeTensorMode():
        assert not _backend.checks_values(torch.rand(3))
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x.view(1, 3))
    torch.func.vmap(torch.func.grad(look))(x.view(1, 3))
    torch.compile(look, fullgraph=True, backend="eager")(x)
    assert not any(seen) and len(seen) == 4


# --- what runs ------------------------------------------------------------------------------------------------------


def test_a_kernel_runs_and_may_leave_the_work(kernels):
    tokens = draw(0, 3, 2)
    with moekit.backend("torch"):
        expected = permute(tokens)
    assert kernels.calls == []
    for name in ("numba", "auto"):
        kernels.calls.clear()
        with moekit.backend(name):
            assert_same(permute(tokens), expected)
        assert kernels.calls == ["permute"]


def test_a_kernels_result_is_the_operators(install):
    install("numba", {"permute": lambda tokens, row_token, *_: tokens.new_full((len(row_token), 2), 42)})
    with moekit.backend("numba"):
        assert_same(permute(draw(0, 3, 2)), torch.full((6, 2), 42.0, dtype=torch.float64))


def test_a_kernel_that_fails_is_not_covered_up(install):
    def broken(*args):
        raise ArithmeticError("kernel")

    install("numba", {"permute": broken})
    for name in ("numba", "auto"):
        with pytest.raises(ArithmeticError, match="kernel"), moekit.backend(name):
            permute(draw(0, 3, 2))


def test_what_a_kernel_leaves_is_checked_by_the_reference(install):
    recorder = Recorder("route_indices", "rows_of_tokens")
    install("numba", recorder)
    with moekit.backend("numba"):
        with pytest.raises(ValueError, match="index 2"):
            Routing.from_topk(torch.tensor([[2]]), num_experts=2)
        with pytest.raises(ValueError, match="index 5"):
            moekit.ops.tables.rows_of_tokens(torch.tensor([5]), 2)
    assert recorder.calls == ["route_indices", "rows_of_tokens"]


def test_a_backend_of_another_device_raises(install, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    install("triton", Recorder("permute"))
    message = r"'triton' runs on GPU tensors .*TRITON_INTERPRET=1.*, got a tensor on cpu"
    with pytest.raises(RuntimeError, match=message), moekit.backend("triton"):
        permute(draw(0, 3, 2))


def test_meta_tensors_need_no_kernel(kernels):
    routing = Routing.from_topk(INDICES.to("meta"), num_experts=2)
    with moekit.backend("numba"):
        assert moekit.permute(torch.zeros(3, 2, device="meta"), routing).shape == (6, 2)
    assert kernels.calls == []


# --- backward -------------------------------------------------------------------------------------------------------


def weighted(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return moekit.unpermute(rows, Routing.from_topk(INDICES, weights, num_experts=2), weighted=True)


def test_backward_runs_where_forward_ran(kernels):
    """Whatever is chosen when backward runs."""
    rows, weights = leaf(draw(0, 6, 2)), leaf(draw(1, 3, 2))
    for forward, backward, expected in (
        ("numba", "torch", ["unpermute", "unpermute_backward"]),
        ("torch", "numba", []),
    ):
        kernels.calls.clear()
        with moekit.backend(forward):
            out = weighted(rows, weights)
        with moekit.backend(backward):
            out.sum().backward()
            assert _backend.current() == backward
        assert kernels.calls == expected


def test_backward_in_another_thread_runs_where_forward_ran(kernels):
    with moekit.backend("numba"):
        out = weighted(leaf(draw(0, 6, 2)), leaf(draw(1, 3, 2)))
    kernels.calls.clear()
    seen = []

    def work():
        with moekit.backend("torch"):
            out.sum().backward()
            seen.append(_backend.current())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert kernels.calls == ["unpermute_backward"] and seen == ["torch"]


def test_double_backward_where_there_is_none(kernels):
    rows, weights = leaf(draw(0, 6, 2, dtype=torch.float32)), leaf(draw(1, 3, 2, dtype=torch.float32))
    message = r"moekit\.unpermute: double backward exists on the 'torch' backend only; .*`with moekit\.backend\('torch'\):`"
    with moekit.backend("numba"):
        (grad,) = torch.autograd.grad(weighted(rows, weights).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()
    with moekit.backend("torch"):  # as the message says
        (grad,) = torch.autograd.grad(weighted(rows, weights).square().sum(), rows, create_graph=True)
    grad.sum().backward()
    assert rows.grad.abs().min() > 0
    with moekit.backend("numba"):  # float64 is the reference's on every backend
        rows, weights = leaf(rows.double()), leaf(weights.double())
        (grad,) = torch.autograd.grad(weighted(rows, weights).square().sum(), rows, create_graph=True)
        grad.sum().backward()
    assert rows.grad.abs().min() > 0


# --- threads and the environment ------------------------------------------------------------------------------------


def test_each_thread_has_its_own_choice(kernels):
    seen: dict[str, list[str]] = {}
    ready = threading.Barrier(2)

    def work(name):
        ready.wait()
        seen[name] = [_backend.current()]
        with moekit.backend(name):
            ready.wait()  # both are inside
            seen[name].append(_backend.current())
            permute(draw(0, 3, 2))
            ready.wait()
        seen[name].append(_backend.current())

    with moekit.backend("torch"):
        default = _backend._DEFAULT
        threads = [threading.Thread(target=work, args=(name,)) for name in ("numba", "torch")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert _backend.current() == "torch"
    assert seen == {name: [default, name, default] for name in ("numba", "torch")}
    assert kernels.calls == ["permute"]


CODE = """if True:
    import torch
    import moekit
    from moekit import _backend
    indices = torch.tensor([[1], [0]])
    rows = moekit.permute(torch.tensor([[1.0], [2.0]]), moekit.Routing.from_topk(indices, num_experts=2))
    print(_backend.current(), _backend._debug.get(), rows.flatten().tolist())
"""


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({"MOEKIT_BACKEND": ""}, "auto False [2.0, 1.0]"),
        ({"MOEKIT_BACKEND": "torch", "MOEKIT_DEBUG": "1"}, "torch True [2.0, 1.0]"),
    ],
    ids=["default", "torch"],
)
def test_environment(environment, printed):
    result = run_python(CODE, **environment)
    assert result.stdout.strip() == printed, result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", "ValueError: MOEKIT_BACKEND: name must be one of auto, torch, numba, triton, got 'fast'"),
        ("numba", "RuntimeError: MOEKIT_BACKEND: 'numba' is not installed; get it with: pip install"),
    ],
    ids=["unknown", "missing"],
)
def test_environment_names_what_is_not_there(name, message):
    result = run_python("import sys\nsys.modules['numba'] = None\n" + CODE, MOEKIT_BACKEND=name)
    assert result.returncode != 0 and result.stdout == ""
    assert message in result.stderr
