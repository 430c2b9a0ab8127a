"""moekit.hf fuses only what is provably the same: what a user attaches, patches or replaces is heard, as in eager code."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from _hf import T, chosen, experts_class, make, run
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

import moekit
import moekit.hf
from moekit.hf.gates import _GATES, digest, fused_options

transformers = pytest.importorskip("transformers")
from transformers import activations  # noqa: E402
from transformers.integrations import moe  # noqa: E402
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts  # noqa: E402
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402

HYV4 = experts_class("hy_v4", "HYV4Experts")
seen: list[int] = []


@pytest.fixture(autouse=True)
def registered():
    moekit.hf.register()
    seen.clear()
    with moekit.backend("torch"):  # which gate runs is what counts here, not on which kernels
        yield
    moekit.hf.unregister()


def agree(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Output and gradients are eager's: to rounding in float32; in bfloat16 no further from the exact than eager's are."""
    expected = run(module, "eager", chosen(False), dtype)
    actual = run(module, "moekit", chosen(False), dtype)
    exact = run(copy.deepcopy(module).double(), "eager", chosen(False), torch.float64) if dtype is torch.bfloat16 else None
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        elif exact is None:
            assert (actual[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
        else:
            ours, theirs = ((found[name].double() - exact[name]).norm() for found in (actual, expected))
            assert ours <= 1.5 * theirs + 2**-8 * exact[name].norm(), (name, float(ours), float(theirs))


# --- activations: (what to put in the place of act_fn, whether it is fused) ------------------------------------------


class Sloped(nn.Module):
    """Swish with a slope that is learned."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class Halved(activations.SiLUActivation):
    def forward(self, input):
        return super().forward(input) / 2


class Called(nn.SiLU):
    def __call__(self, input):
        return super().__call__(input).clamp(max=0.1)


class Slope(nn.Module):
    def forward(self, x):
        return 2 * x


def sine(x, approximate):
    return torch.sin(x)


def with_attribute(act: nn.Module, name: str, value: object) -> nn.Module:
    setattr(act, name, value)
    return act


def parametrized(act: nn.Module) -> nn.Module:
    act.scale = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(act, "scale", Slope())
    return act


ACTIVATIONS: dict[str, tuple[Callable[[], object], bool]] = {
    "SiLUActivation": (lambda: activations.SiLUActivation(), True),
    "nn.SiLU": (lambda: nn.SiLU(), True),
    "nn.ReLU": (lambda: nn.ReLU(), True),
    "nn.GELU": (lambda: nn.GELU(), True),
    "nn.GELU tanh": (lambda: nn.GELU(approximate="tanh"), True),
    "GELUActivation": (lambda: activations.GELUActivation(), True),
    "GELUActivation in Python": (lambda: activations.GELUActivation(use_gelu_python=True), True),
    "GELUTanh": (lambda: activations.GELUTanh(), True),
    "GELUTanh in Python": (lambda: activations.GELUTanh(use_gelu_tanh_python=True), True),
    "NewGELUActivation": (lambda: activations.NewGELUActivation(), True),
    "QuickGELUActivation": (lambda: activations.QuickGELUActivation(), True),
    "ReLUSquaredActivation": (lambda: activations.ReLUSquaredActivation(), True),
    "F.silu": (lambda: functional.silu, True),
    "F.relu": (lambda: functional.relu, True),
    "torch.relu": (lambda: torch.relu, True),
    "F.gelu": (lambda: functional.gelu, True),
    "FastGELUActivation": (lambda: activations.FastGELUActivation(), False),
    "ClippedGELUActivation": (lambda: activations.ClippedGELUActivation(-0.1, 0.3), False),
    "nn.Tanh": (lambda: nn.Tanh(), False),
    "a user's function named silu": (lambda: functools.wraps(functional.silu)(lambda x: functional.silu(x) / 2), False),
    "a partial": (lambda: functools.partial(functional.gelu, approximate="tanh"), False),
    "a user's class named SiLU": (type("SiLU", (Sloped,), {}), False),
    "a subclass": (Halved, False),
    "a subclass that is called otherwise": (Called, False),
    "a Sequential": (lambda: nn.Sequential(nn.SiLU()), False),
    "parametrized": (lambda: parametrized(nn.SiLU()), False),
    "GELUActivation of another function": (lambda: with_attribute(activations.GELUActivation(), "act", torch.sin), False),
    "GELUTanh of another function": (
        lambda: with_attribute(activations.GELUTanh(), "act", functools.partial(functional.gelu, approximate="none")),
        False,
    ),
    "GELUTanh of a partial of another function": (
        lambda: with_attribute(activations.GELUTanh(), "act", functools.partial(sine, approximate="tanh")),
        False,
    ),
    "forward on the instance": (lambda: with_attribute(nn.SiLU(), "forward", torch.sin), False),
    "_call_impl on the instance": (lambda: with_attribute(nn.SiLU(), "_call_impl", torch.sin), False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_known_by_themselves_not_by_name(name):
    build, fused = ACTIVATIONS[name]
    for kind in (Qwen3MoeExperts, DeepseekV4Experts, NemotronHExperts):
        module = make(kind)
        del module.act_fn  # or a function could not take its place
        module.act_fn = build()
        assert (fused_options(module) is not None) == fused
        agree(module)


# --- hooks and patches ----------------------------------------------------------------------------------------------


def counting(result: Callable | None = None) -> Callable:
    """A hook that notes its call and returns ``result`` of its last argument."""

    def hook(*args, **kwargs):
        seen.append(1)
        return None if result is None else result(args[-1])

    return hook


@contextlib.contextmanager
def hooked(register: Callable, *args: object, **kwargs: object) -> Iterator[None]:
    handle = register(*args, **kwargs)
    try:
        yield
    finally:
        handle.remove()


def halved(grads: tuple) -> tuple:
    return tuple(grad / 2 for grad in grads)


def input_times(factor: float) -> Callable:
    return lambda args: tuple(factor * arg for arg in args)


HOOKS: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager]] = {
    "forward": lambda act: hooked(act.register_forward_hook, counting(lambda out: out.clamp(max=0.1))),
    "forward with kwargs": lambda act: hooked(
        act.register_forward_hook, counting(lambda out: out * 2), with_kwargs=True, prepend=True
    ),
    "forward, always called": lambda act: hooked(act.register_forward_hook, counting(), always_call=True),
    "before forward": lambda act: hooked(act.register_forward_pre_hook, counting(input_times(0.5))),
    "before forward with kwargs": lambda act: hooked(act.register_forward_pre_hook, counting(), with_kwargs=True),
    "backward": lambda act: hooked(
        act.register_full_backward_hook, lambda m, inputs, outputs: seen.append(1) or halved(inputs)
    ),
    "before backward": lambda act: hooked(act.register_full_backward_pre_hook, counting(halved)),
    "every forward": lambda act: hooked(torch_module.register_module_forward_hook, lambda m, a, out: on(m is act, out)),
    "before every forward": lambda act: hooked(torch_module.register_module_forward_pre_hook, lambda m, a: on(m is act)),
    "every backward": lambda act: hooked(
        torch_module.register_module_full_backward_hook, lambda m, inputs, outputs: on(m is act, inputs, halved)
    ),
}


def on(wanted: bool, value: object = None, change: Callable = lambda out: out * 2) -> object:
    """The result of a global hook: ``change`` of the module's value, where it is the wanted module."""
    if not wanted:
        return None
    seen.append(1)
    return None if value is None else change(value)


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_the_activation_are_heard(name):
    for kind in (Qwen3MoeExperts, DeepseekV4Experts, NemotronHExperts):
        module = make(kind)
        assert fused_options(module) is not None
        with HOOKS[name](module.act_fn):
            assert fused_options(module) is None
            agree(module)
            seen.clear()
            run(module, "moekit", chosen(False), torch.float32)
            assert seen
        assert fused_options(module) is not None


def test_bfloat16_with_a_hook_and_without():
    module = make(Qwen3MoeExperts).to(torch.bfloat16)
    agree(module, torch.bfloat16)
    with hooked(module.act_fn.register_forward_hook, lambda m, a, out: out.clamp(max=0.1)):
        agree(module, torch.bfloat16)


@contextlib.contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(owner, name, value)
        yield


def twice(function: Callable) -> Callable:
    """A patch as people write them: it says that it is the original."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        seen.append(1)
        return 2 * function(*args, **kwargs)

    return wrapper


def bare(self, gate_up):
    """A patch that has neither a closure nor a name of its own."""
    seen.append(1)
    return 2 * gpt_oss_gate(self, gate_up)


gpt_oss_gate = GptOssExperts._apply_gate
functools.update_wrapper(bare, gpt_oss_gate)
silu = functional.silu
PATCHES: dict[str, tuple[type, Callable[[nn.Module], contextlib.AbstractContextManager]]] = {
    "the activation's class": (
        Qwen3MoeExperts,
        lambda m: patched(activations.SiLUActivation, "forward", twice(activations.SiLUActivation.forward)),
    ),
    "how it is called": (
        Qwen3MoeExperts,
        lambda m: patched(activations.SiLUActivation, "__call__", twice(activations.SiLUActivation.__call__)),
    ),
    "F.silu": (Qwen3MoeExperts, lambda m: patched(functional, "silu", twice(silu))),
    **{
        f"F.silu in the gate of {kind.__name__}": (kind, lambda m: patched(functional, "silu", twice(silu))) for kind in HYV4
    },
    "the gate of the class": (
        GptOssExperts,
        lambda m: patched(GptOssExperts, "_apply_gate", twice(GptOssExperts._apply_gate)),
    ),
    "the gate of the class, without a closure": (GptOssExperts, lambda m: patched(GptOssExperts, "_apply_gate", bare)),
    "the gate of an instance": (Qwen3MoeExperts, lambda m: patched(m, "_apply_gate", twice(m._apply_gate))),
    "the gate of an instance of GptOss": (GptOssExperts, lambda m: patched(m, "_apply_gate", twice(m._apply_gate))),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_are_heard(name):
    kind, patch = PATCHES[name]
    module = make(kind, swiglu_limit=0.5)
    # Classes that come with a gate of their own do not call it in their eager forward: grouped_mm does.
    with patch(module):
        assert fused_options(module) is None
        expected = run(module, "grouped_mm", chosen(False), torch.float32)
        assert seen
        actual = run(module, "moekit", chosen(False), torch.float32)
        assert all((actual[n] - v).abs().max() <= 1e-5 * v.abs().max() for n, v in expected.items())
    assert fused_options(module) is not None


def test_a_known_gate_is_known_in_whatever_class_it_stands():
    class Copied(Qwen3MoeExperts):
        _apply_gate = MiniMaxM3VLExperts._apply_gate

    module = make(Copied)
    module.swiglu_alpha, module.swiglu_limit = 1.2, 0.75
    assert fused_options(module) == {"activation": "quick_gelu", "alpha": 1.2, "clamp": 0.75, "linear_offset": 1.0}
    expected = run(module, "grouped_mm", chosen(False), torch.float32)
    actual = run(module, "moekit", chosen(False), torch.float32)
    assert all((actual[n] - v).abs().max() <= 1e-5 * v.abs().max() for n, v in expected.items())


def test_a_gate_with_other_names_behind_it_is_not_known():
    class Other(GptOssExperts):
        _apply_gate = type(gpt_oss_gate)(gpt_oss_gate.__code__, {"torch": nn, "__builtins__": __builtins__}, "_apply_gate")

    assert fused_options(make(GptOssExperts)) is not None
    assert fused_options(make(Other)) is None


def test_the_layout_is_the_gates_not_the_flags():
    # Experts that say "interleaved" but have the default gate: Transformers' own code cuts in halves.
    module = make(Qwen3MoeExperts)
    module.is_concatenated = False
    expected = run(module, "grouped_mm", chosen(False), torch.float32)
    actual = run(module, "moekit", chosen(False), torch.float32)
    assert all((actual[n] - v).abs().max() <= 1e-5 * v.abs().max() for n, v in expected.items())


@pytest.mark.parametrize("kind", [GptOssExperts, DeepseekV4Experts, MiniMaxM3VLExperts, *HYV4], ids=lambda k: k.__name__)
def test_constants_that_are_changed_on_the_module_are_honoured(kind):
    module = make(kind, swiglu_limit=0.5)
    changes = [{"limit": 0.25, "swiglu_limit": 0.25}, {"limit": 1.5, "alpha": 0.7, "swiglu_limit": 1, "swiglu_alpha": 3}]
    for change in changes:
        for name, value in change.items():
            if hasattr(module, name):
                setattr(module, name, value)
        assert fused_options(module) is not None
        agree(module)


@pytest.mark.parametrize("limit", [torch.tensor(0.5), -0.5, float("inf"), True], ids=repr)
def test_constants_that_the_formula_has_not_are_left_to_the_gate(limit):
    module = make(DeepseekV4Experts)
    module.limit = limit
    assert fused_options(module) is None
    agree(module)


def test_a_limit_of_none_is_an_error_as_in_eager_code():
    module = make(GptOssExperts)
    module.limit = None
    for implementation in ("eager", "grouped_mm", "moekit"):
        with pytest.raises(RuntimeError, match="At least one of 'min' or 'max' must not be None"):
            run(module, implementation, chosen(False), torch.float32)


def test_parametrized_weights_are_used_as_parametrized():
    module = make(Qwen3MoeExperts)
    parametrize.register_parametrization(module, "gate_up_proj", Slope())
    parametrize.register_parametrization(module, "down_proj", Slope())
    assert fused_options(module) is not None
    agree(module)


def test_hooks_on_weights_and_on_the_experts_are_heard():
    module = make(Qwen3MoeExperts)
    module.gate_up_proj.register_hook(lambda grad: grad / 2)
    with hooked(module.register_forward_hook, lambda m, a, out: out * 3):
        agree(module)


def test_a_hooked_activation_sees_what_it_sees_in_grouped_mm():
    module, rows = make(Qwen3MoeExperts), {}
    for implementation in ("grouped_mm", "moekit"):
        with hooked(
            module.act_fn.register_forward_hook, lambda m, a, out, at=implementation: rows.setdefault(at, out.detach())
        ):
            run(module, implementation, chosen(False), torch.float32)
    assert rows["moekit"].shape == rows["grouped_mm"].shape == (2 * T, 24)
    ours, theirs = (rows[name].sort(0).values for name in ("moekit", "grouped_mm"))  # an expert's rows in any order
    assert (ours - theirs).abs().max() < 1e-5


def experts_classes() -> list[type]:
    from importlib import import_module

    from test_hf import decorated_classes

    return [getattr(import_module(module), name) for module, name in decorated_classes()]


def test_every_gate_of_the_installed_release_has_been_read():
    """A release that writes a gate otherwise makes this fail: read it, and enter its digest (or its class here)."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    unfused = {kind.__name__ for kind in experts_classes() if fused_options(make(kind)) is None}
    assert unfused <= {"Inkling2Experts", "Inkling2LoopExperts", "MuseSparkExperts"}
    assert all(digest(gate) in _GATES for gate in (FP8Experts._apply_gate, moe._default_apply_gate))


def test_classes_made_anew_are_free_to_go():
    import gc
    import weakref

    def once() -> weakref.ref:
        class Fresh(Qwen3MoeExperts):
            def _apply_gate(self, gate_up):
                gate, up = gate_up.chunk(2, dim=-1)
                return torch.tanh(gate) * up

        run(make(Fresh), "moekit", chosen(False), torch.float32)
        return weakref.ref(Fresh)

    found = [once() for _ in range(3)]
    gc.collect()
    assert all(kind() is None for kind in found)
