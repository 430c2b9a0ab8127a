"""install() and uninstall(), on made-up frameworks in the place of the real ones."""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from _reference import assert_same, draw

from moekit import compat, moe_utils
from moekit import megatron as today

NEMO = "nemo_automodel.components.moe.megatron.moe_utils"
MEGATRON = "megatron.core.transformer.moe.moe_utils"
OURS = ("nemo_automodel", "megatron", "somebody")

# Sources by file. A framework's own functions return their name and what they were given.
FILES = {
    "nemo_automodel/components/moe/megatron/moe_utils.py": """
        import torch

        def permute(tokens, routing_map, probs=None, num_out_tokens=None, fused=False, drop_and_pad=False):
            return "nemo permute"

        def swiglu(y):
            return "nemo swiglu"

        def quick_gelu(y, alpha=1.702):
            return "nemo quick_gelu"

        class MoEAuxLossAutoScaler(torch.autograd.Function):
            main_loss_backward_scale = None

        def own_business():
            return swiglu(1)

        also_swiglu = swiglu
    """,
    "nemo_automodel/components/moe/layers.py": """
        from nemo_automodel.components.moe.megatron import moe_utils
        from nemo_automodel.components.moe.megatron.moe_utils import MoEAuxLossAutoScaler, permute
        from nemo_automodel.components.moe.megatron.moe_utils import swiglu as activation
        TABLE = {"swiglu": activation}
    """,
    "nemo_automodel/late.py": """
        from nemo_automodel.components.moe.megatron.moe_utils import MoEAuxLossAutoScaler, permute
    """,
    "megatron/core/transformer/moe/moe_utils.py": """
        import functools
        import torch

        def permute(tokens, routing_map, probs=None, num_out_tokens=None, fused=False, drop_and_pad=False,
                    tokens_per_expert=None, align_size=-1, future=None):
            return "megatron permute", future

        def unpermute(permuted_tokens, sorted_indices, restore_shape, future=None, probs=None, routing_map=None,
                      fused=False, drop_and_pad=False):
            return "megatron unpermute", future

        def z_loss_func(z_loss_coeff, logits):
            return "megatron z_loss_func"

        def sinkhorn(cost, tol=0.0001, **options):
            return "megatron sinkhorn", options

        def get_capacity(num_tokens, num_experts, capacity_factor, min_capacity=None, *, rounding):
            return "megatron get_capacity", rounding

        def switch_load_balancing_loss_func(probs, tokens_per_expert, total_num_tokens, topk, num_experts,
                                            moe_aux_loss_coeff, fused=False, padding_mask=None):
            return "megatron switch", padding_mask

        def get_updated_expert_bias(tokens_per_expert, expert_bias, expert_bias_update_rate):
            return "megatron bias"

        def compiled(function):
            def call(*args, **kwargs):
                return function(*args, **kwargs)
            call._torchdynamo_orig_callable = function
            return call

        @compiled
        def pad_routing_map(routing_map, pad_multiple, extra=None):
            return "megatron pad_routing_map", extra

        class MoEAuxLossAutoScaler(torch.autograd.Function):
            main_loss_backward_scale = torch.tensor(12.0)
    """,
    "somebody/model.py": """
        from megatron.core.transformer.moe.moe_utils import permute as megatron_permute
        from nemo_automodel.components.moe.megatron.moe_utils import permute
        from moekit.moe_utils import MoEAuxLossAutoScaler, swiglu
        import moekit.moe_utils as ours
    """,
}


def write(root: Path, *files: str) -> None:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(FILES[file]))
        for folder in path.relative_to(root).parents:
            (root / folder / "__init__.py").touch()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to import frameworks from; real ones are out of the way until the end."""
    held = {name: module for name, module in sys.modules.items() if name.split(".")[0] in OURS}
    for name in held:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    scale = moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale
    before = dict(vars(moe_utils))
    yield tmp_path
    compat.uninstall()
    assert moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale is scale
    assert vars(moe_utils) == before
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.modules.update(held)


@pytest.fixture
def frameworks(folder):
    """Both frameworks and a user of them on disk, nothing imported."""
    write(folder, *FILES)


def load(*names: str) -> list[ModuleType]:
    return [importlib.import_module(name) for name in names]


def contents(modules: list[ModuleType]) -> dict[str, int]:
    """Every name of the modules, by identity."""
    return {f"{m.__name__}.{name}": id(value) for m in modules for name, value in vars(m).items()}


ALL = (NEMO, "nemo_automodel.components.moe.layers", MEGATRON, "somebody.model")


def is_ours(function) -> bool:
    return "nemo" not in str(function(draw(0, 2, 6)))


# --- install and uninstall ------------------------------------------------------------------------------------------


def test_install_reaches_every_module_that_holds_a_name(frameworks):
    nemo, layers, megatron, user = load(*ALL)
    done = compat.install()
    x = draw(0, 2, 6)
    expected = moe_utils.swiglu(x)
    for function in (nemo.swiglu, nemo.also_swiglu, layers.activation, layers.moe_utils.swiglu):
        assert_same(function(x), expected)
    args = draw(1, 3, 4), torch.tensor([[1, 0], [0, 1], [1, 1]])
    for function in (nemo.permute, layers.permute, user.permute, megatron.permute, user.megatron_permute):
        for actual, wanted in zip(function(*args)[:3:2], moe_utils.permute(*args)[::2], strict=True):
            assert_same(actual, wanted)
    for module in (nemo, layers, megatron):
        assert module.MoEAuxLossAutoScaler is moe_utils.MoEAuxLossAutoScaler
    assert layers.TABLE["swiglu"](x) == "nemo swiglu"  # inside a container: out of reach
    assert {f"{NEMO}.{n}" for n in ("permute", "swiglu", "also_swiglu", "quick_gelu", "MoEAuxLossAutoScaler")} | {
        f"{layers.__name__}.{n}" for n in ("permute", "activation", "MoEAuxLossAutoScaler")
    } | {"somebody.model.permute", "somebody.model.megatron_permute"} <= set(done.names)
    assert len(done.names) == len(set(done.names)) and repr(done).startswith(f"Substitution({len(done.names)} names)")
    with pytest.raises(TypeError):
        nemo.own_business()  # its swiglu is ours now, and 1 is no tensor


def test_uninstall_restores_exactly(frameworks):
    modules = load(*ALL)
    before = contents(modules)
    installed = compat.install()
    assert contents(modules) != before
    restored = compat.uninstall()
    assert contents(modules) == before
    assert sorted(restored.names) == sorted(installed.names)
    assert modules[0].own_business() == "nemo swiglu"


def test_install_imports_what_is_not_loaded_yet(frameworks):
    assert NEMO not in sys.modules and MEGATRON not in sys.modules
    with compat.install() as done:
        assert done.names
        assert is_ours(importlib.import_module(NEMO).swiglu)
        (layers,) = load("nemo_automodel.components.moe.layers")  # imports names that are ours already
        assert is_ours(layers.activation)
    assert layers.activation(1) == "nemo swiglu" and layers.permute(1, 2) == "nemo permute"
    assert layers.MoEAuxLossAutoScaler is sys.modules[NEMO].MoEAuxLossAutoScaler is not moe_utils.MoEAuxLossAutoScaler


def test_the_context_restores_after_an_exception(frameworks):
    modules = load(*ALL)
    before = contents(modules)
    with pytest.raises(KeyError), compat.install():
        assert is_ours(modules[0].swiglu)
        raise KeyError
    assert contents(modules) == before


def test_uninstall_is_a_context_too(frameworks):
    modules = load(*ALL)
    before = contents(modules)
    compat.install()
    with pytest.raises(KeyError), compat.uninstall():
        assert contents(modules) == before
        raise KeyError
    assert is_ours(modules[0].swiglu) and is_ours(modules[1].activation)
    compat.uninstall()
    assert contents(modules) == before


def test_installing_again_changes_nothing_but_reaches_new_modules(frameworks):
    modules = load(*ALL)
    before = contents(modules)
    theirs = modules[0].permute
    compat.install()
    during = contents(modules)
    assert compat.install().names == []
    assert contents(modules) == during
    newcomer = ModuleType("somebody.newcomer")
    newcomer.permute = newcomer.again = theirs
    sys.modules["somebody.newcomer"] = newcomer
    assert sorted(compat.install().names) == ["somebody.newcomer.again", "somebody.newcomer.permute"]
    assert newcomer.permute is newcomer.again is modules[0].permute is not theirs
    compat.uninstall()
    assert newcomer.permute is newcomer.again is theirs
    assert contents(modules) == before
    assert compat.uninstall().names == []


def test_nested_contexts_leave_what_they_found(frameworks):
    modules = load(*ALL)
    before = contents(modules)
    with compat.install():
        during = contents(modules)
        with compat.install():
            assert contents(modules) == during
        assert contents(modules) == during
        with compat.uninstall():
            assert contents(modules) == before
            with compat.uninstall():
                assert contents(modules) == before
            assert contents(modules) == before
        assert is_ours(modules[0].swiglu)
    assert contents(modules) == before


def test_modules_imported_in_between_are_restored(frameworks):
    load(*ALL)
    compat.install()
    (late,) = load("nemo_automodel.late")
    assert late.MoEAuxLossAutoScaler is moe_utils.MoEAuxLossAutoScaler
    assert late.permute is sys.modules[NEMO].permute
    done = compat.uninstall()
    assert late.permute is sys.modules[NEMO].permute and late.permute(1, 2) == "nemo permute"
    assert late.MoEAuxLossAutoScaler is sys.modules[NEMO].MoEAuxLossAutoScaler is not moe_utils.MoEAuxLossAutoScaler
    assert {"nemo_automodel.late.permute", "nemo_automodel.late.MoEAuxLossAutoScaler"} <= set(done.names)


def test_what_somebody_rebinds_meanwhile_stays(frameworks):
    nemo, layers, _, _ = load(*ALL)
    compat.install()
    nemo.swiglu = mine = object()
    compat.uninstall()
    assert nemo.swiglu is mine
    assert layers.activation(1) == "nemo swiglu"


def test_users_of_moekits_own_names_are_untouched(frameworks):
    user = load(*ALL)[-1]
    for _ in range(2):
        compat.install()
        assert user.swiglu is moe_utils.swiglu and user.ours is moe_utils
        assert user.MoEAuxLossAutoScaler is moe_utils.MoEAuxLossAutoScaler
        compat.uninstall()
        assert user.swiglu is moe_utils.swiglu and user.ours is moe_utils
        assert user.MoEAuxLossAutoScaler is moe_utils.MoEAuxLossAutoScaler


def without(monkeypatch, *packages: str) -> None:
    """Make the import system find no such package, even if it is installed."""
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("present", ["nemo_automodel", "megatron"])
def test_one_framework_is_enough(folder, monkeypatch, present):
    """No warning about the other one: a warning is a failure in this suite."""
    absent = {"nemo_automodel": "megatron", "megatron": "nemo_automodel"}[present]
    without(monkeypatch, absent)
    write(folder, *(file for file in FILES if file.startswith(present) and "late" not in file))
    with compat.install() as done:
        assert {name.split(".")[0] for name in done.names} == {present}
        (cause,) = done.missing.values()
        assert cause.startswith(absent) and cause.endswith("is not installed") and cause in repr(done)


def test_no_framework_at_all_is_said(folder, monkeypatch):
    without(monkeypatch, "nemo_automodel", "megatron")
    with pytest.warns(UserWarning, match="nemo_automodel is not installed; megatron.core is not installed") as said:
        done = compat.install()
    assert done.names == [] and len(done.missing) == 2
    assert said[0].filename == __file__
    assert compat.uninstall().names == []


def test_a_framework_whose_import_fails_is_said(folder):
    """Even if the other one is there: whoever installed both would not notice."""
    write(folder, *(file for file in FILES if file.startswith("megatron")))
    path = folder / "nemo_automodel/components/moe/megatron/moe_utils.py"
    write(folder, "nemo_automodel/components/moe/megatron/moe_utils.py")
    path.write_text("import a_package_that_nobody_has\n")
    with pytest.warns(UserWarning, match=f"{NEMO} cannot be imported: .*a_package_that_nobody_has"):
        done = compat.install()
    assert {name.split(".")[0] for name in done.names} == {"megatron"}
    assert list(done.missing) == [NEMO] and "a_package_that_nobody_has" in repr(done)


@pytest.mark.parametrize("broken", ["raise RuntimeError('no driver')", "from torch import nothing_of_this_name", "1 +"])
def test_an_import_may_fail_in_any_way(folder, monkeypatch, broken):
    without(monkeypatch, "nemo_automodel")
    write(folder, "megatron/core/transformer/moe/moe_utils.py")
    (folder / "megatron/core/transformer/moe/moe_utils.py").write_text(broken)
    wanted = {"r": "RuntimeError: no driver", "f": "nothing_of_this_name", "1": "SyntaxError"}[broken[0]]
    with pytest.warns(UserWarning, match=f"cannot be imported: .*{wanted}"):
        assert compat.install().names == []


def test_a_release_without_the_module_is_said(folder, monkeypatch):
    without(monkeypatch, "megatron")
    (folder / "nemo_automodel").mkdir()
    (folder / "nemo_automodel/__init__.py").touch()
    with pytest.warns(UserWarning, match="cannot be imported: No module named 'nemo_automodel.components'"):
        compat.install()


# --- releases with other signatures ---------------------------------------------------------------------------------


@pytest.fixture
def megatron(frameworks):
    (module,) = load(MEGATRON)
    with compat.install():
        yield module


def test_an_argument_that_only_theirs_knows_goes_there(megatron):
    tokens, routing_map = draw(0, 3, 4), torch.tensor([[1, 0], [0, 1], [1, 1]])
    assert megatron.permute(tokens, routing_map, future=16) == ("megatron permute", 16)
    positional = (tokens, routing_map, None, None, False, False, None, -1, 32)
    assert megatron.permute(*positional) == ("megatron permute", 32)
    ours = moe_utils.permute(tokens, routing_map, num_out_tokens=5)
    for args, kwargs in (
        ((tokens, routing_map), {"num_out_tokens": 5}),
        ((tokens, routing_map, None, 5, True, False, None, -1, None), {}),  # the defaults, spelled out
        ((tokens, routing_map), {"num_out_tokens": 5, "tokens_per_expert": None, "align_size": -1, "future": None}),
    ):
        for actual, wanted in zip(megatron.permute(*args, **kwargs)[:3:2], ours[::2], strict=True):
            assert_same(actual, wanted)


def test_a_parameter_in_between_does_not_shift_the_others(megatron):
    rows, index, probs, routing_map = draw(0, 2, 3), torch.tensor([0, 1]), draw(1, 2, 1), torch.ones(2, 1)
    expected = moe_utils.unpermute(rows, index, (2, 3), probs, routing_map)
    assert_same(megatron.unpermute(rows, index, (2, 3), None, probs, routing_map), expected)
    assert_same(megatron.unpermute(rows, index, (2, 3), probs=probs, routing_map=routing_map), expected)
    assert megatron.unpermute(rows, index, (2, 3), 7) == ("megatron unpermute", 7)


def test_parameters_in_another_order_keep_their_meaning(megatron):
    logits = draw(0, 3, 4)
    assert_same(megatron.z_loss_func(0.5, logits), moe_utils.z_loss_func(logits, 0.5))
    assert_same(megatron.z_loss_func(logits=logits, z_loss_coeff=0.5), moe_utils.z_loss_func(logits, 0.5))


def test_required_and_open_ended_arguments_go_there(megatron):
    assert megatron.get_capacity(8, 2, 1.0, rounding="up") == ("megatron get_capacity", "up")
    with pytest.raises(TypeError, match="rounding"):
        megatron.get_capacity(8, 2, 1.0)
    assert megatron.sinkhorn(draw(0, 3, 4), steps=9) == ("megatron sinkhorn", {"steps": 9})
    assert_same(megatron.sinkhorn(draw(0, 3, 4)), moe_utils.sinkhorn(draw(0, 3, 4)))


def test_the_signature_behind_a_compiling_wrapper_counts(megatron):
    routing_map = torch.tensor([[1, 0], [0, 1], [1, 0]])
    assert_same(megatron.pad_routing_map(routing_map, 3), moe_utils.pad_routing_map(routing_map, 3))
    assert megatron.pad_routing_map(routing_map, 3, extra=1) == ("megatron pad_routing_map", 1)


def test_an_argument_nobody_knows_is_a_type_error(frameworks):
    nemo, _, megatron, _ = load(*ALL)
    with compat.install():
        for call in (lambda: nemo.swiglu(draw(0, 2, 4), wrong=1), lambda: megatron.permute(1, 2, wrong=1)):
            with pytest.raises(TypeError, match="wrong"):
                call()


def test_an_argument_of_another_meaning_goes_there(megatron):
    """Megatron-core's padding_mask is True for what is valid."""
    args = (torch.full((4, 2), 0.5), torch.tensor([2.0, 2.0]), 4, 1, 2, 0.1)
    mask = torch.tensor([True, True, True, False])
    assert megatron.switch_load_balancing_loss_func(*args, padding_mask=mask) == ("megatron switch", mask)
    assert_same(megatron.switch_load_balancing_loss_func(*args), moe_utils.switch_load_balancing_loss_func(*args))


def test_what_depends_on_their_global_state_is_left_alone(megatron):
    assert megatron.get_updated_expert_bias(1, 2, 3) == "megatron bias"


def test_replacements_look_like_the_functions_they_run(megatron):
    assert inspect.getdoc(megatron.permute) == inspect.getdoc(today.permute)
    assert megatron.permute.__name__ == "permute"


# --- the scale ------------------------------------------------------------------------------------------------------


def test_the_scale_is_carried_over_and_ours_comes_back(frameworks):
    nemo, _, megatron, _ = load(*ALL)
    theirs = megatron.MoEAuxLossAutoScaler
    ours = moe_utils.MoEAuxLossAutoScaler
    ours.main_loss_backward_scale = 3.0
    try:
        with compat.install():
            assert ours.main_loss_backward_scale is theirs.main_loss_backward_scale
            loss = torch.ones((), requires_grad=True)
            megatron.MoEAuxLossAutoScaler.apply(torch.ones(2), loss).sum().backward()
            assert float(loss.grad) == 12.0
            nemo.MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(5.0)  # a trainer's new scale
            assert float(megatron.MoEAuxLossAutoScaler.main_loss_backward_scale) == 5.0
        assert ours.main_loss_backward_scale == 3.0
        assert float(theirs.main_loss_backward_scale) == 12.0 and theirs is megatron.MoEAuxLossAutoScaler
    finally:
        ours.main_loss_backward_scale = None


def test_no_scale_of_theirs_keeps_ours(folder):
    write(folder, *(file for file in FILES if file.startswith("nemo")))
    (folder / "megatron").mkdir()
    (folder / "megatron/__init__.py").touch()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = 3.0
    try:
        with compat.install() as done:
            assert done.names
            assert moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale == 3.0
        assert moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale == 3.0
    finally:
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None


# --- the real ones, where they are installed ------------------------------------------------------------------------
# In an environment that has one, or with a checkout on PYTHONPATH. tests/frameworks.py runs their own tests.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [NEMO, MEGATRON])
def test_the_real_framework(target):
    module = pytest.importorskip(target, exc_type=ImportError)
    before = dict(vars(module))
    x = draw(0, 5, 8, dtype=torch.float32)
    routing_map = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0]]).bool()
    theirs = module.permute(x, routing_map, num_out_tokens=6)
    with compat.install() as done:
        assert {f"{target}.permute", f"{target}.unpermute"} <= set(done.names)
        assert {name.rsplit(".", 1)[1] for name in done.left_alone} <= {"get_updated_expert_bias"}
        for fused in (False, True):
            ours = module.permute(x, routing_map, num_out_tokens=6, fused=fused)
            assert len(ours) == len(theirs)
            assert_same(ours[0], theirs[0])
            assert_same(ours[2], theirs[2])
        assert_same(module.unpermute(ours[0], ours[2], x.shape), x * routing_map.sum(1, keepdim=True))
    assert all(vars(module)[name] is value for name, value in before.items())
