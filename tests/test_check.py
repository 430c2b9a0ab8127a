"""``moekit check``: moekit passes every case, and each way of being wrong is caught by the case that is for it."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import moekit
from moekit import checks, moe_utils
from moekit.checks import SEAMS, check
from moekit.cli.app import app

GOLDEN = Path(__file__).parent / "golden"
NAMES = moe_utils.__all__
ours = moe_utils


@pytest.fixture(autouse=True)
def _reference():
    """Kernels are compared with the same formulas elsewhere, and take long to compile."""
    with moekit.backend("torch"):
        yield


@pytest.fixture(scope="module")
def report():
    with moekit.backend("torch"):
        return check(moe_utils)


# --- moekit itself --------------------------------------------------------------------------------------------------


def test_moekit_passes_every_case(report):
    assert report.failed == () and report.missing == () and report.signatures == {}
    assert {outcome.function for outcome in report.outcomes} == set(NAMES)
    assert len({(o.function, o.case, o.seam) for o in report.outcomes}) == len(report.outcomes) >= 190
    assert all(math.isfinite(outcome.error) for outcome in report.outcomes)


def test_every_seam_has_cases(report):
    assert {outcome.seam for outcome in report.outcomes} == {None, *SEAMS}
    # The README's table: one row is of the native API alone (a bias per expert), and two are in one seam each.
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    rows = readme.split("# Where the published code falls short\n")[1].split("\n## ")[0].count("\n| ") - 2
    assert len(SEAMS) == rows - 1


def test_the_page_has_every_seam_and_todays_numbers(report):
    page = (Path(__file__).parent.parent / "docs" / "check.md").read_text(encoding="utf-8").replace("`", "")
    rows = dict(re.findall(r"^\| (.+?) \|.*\| ([^|]+) \|$", page, re.MULTILINE))
    for seam, words in SEAMS.items():
        assert rows[words] == f"0 of {len(report.of_seam(seam))}", words
    seams = sum(outcome.seam is not None for outcome in report.outcomes)
    assert rows["**seam cases that fail**"] == f"**0 of {seams}**"
    assert rows["ordinary cases that fail"] == f"0 of {len(report.outcomes) - seams}"


def test_every_differentiable_function_is_differentiated():
    """A module without gradients fails in each of them."""
    none = {"get_capacity", "pad_routing_map", "get_updated_expert_bias", "group_limited_topk", "sinkhorn"}
    differentiable = [n for n in NAMES if n not in none and not n.endswith("_back") and not n[0].isupper()]
    module = SimpleNamespace(**{name: detached(getattr(moe_utils, name)) for name in differentiable})
    found = check(module)
    for name in differentiable:
        assert any("gradient of" in o.what for o in found.of(name) if o.status == "failed"), name


def detached(function):
    def without_gradient(*args, **kwargs):
        found = function(*args, **kwargs)
        return tuple(x if x is None else x.detach() for x in found) if isinstance(found, tuple) else found.detach()

    without_gradient.__signature__ = inspect.signature(function)
    return without_gradient


def test_nothing_is_compared_with_itself():
    """What is expected comes from torch and from these files."""
    for path in Path(checks.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            assert all(n.split(".")[0] != "moekit" or n.startswith("moekit.checks") for n in names), path


def test_golden_cases():
    few = ("swiglu", "permute", "sort_chunks_by_idxs", "apply_router_token_dropping", "z_loss_func")
    found = check(SimpleNamespace(**{name: getattr(moe_utils, name) for name in few}), golden=GOLDEN)
    assert found.failed == () and sum(o.case.startswith("golden") for o in found.outcomes) == 2 * (4 + 15 + 2 + 7 + 2)
    wrong = check(SimpleNamespace(swiglu=lambda y: 1.05 * ours.swiglu(y)), golden=GOLDEN)
    assert len(wrong.failed) == len(wrong.outcomes) == 3 + 8
    with pytest.raises(FileNotFoundError, match="tests/golden"):
        check(moe_utils, golden=GOLDEN.parent)


# --- modules that are wrong in one way ------------------------------------------------------------------------------


def swapped(y):
    return ours.swiglu(torch.cat(y.chunk(2, -1)[::-1], -1))


def impl(input, bias, weights, fp8_input_store=False, linear_offset=0.0, clamp_value=None, alpha=1.702):
    return ours.weighted_bias_quick_geglu_impl(input, bias, weights, fp8_input_store, linear_offset, clamp_value, alpha)


def without_alpha(input, bias, weights, fp8_input_store=False, linear_offset=0.0, clamp_value=None, alpha=1.702):
    return impl(input, bias, weights, fp8_input_store, linear_offset, clamp_value)


def rounded_offset(input, bias, weights, fp8_input_store=False, linear_offset=0.0, clamp_value=None, alpha=1.702):
    offset = float(torch.tensor(linear_offset, dtype=input.dtype))
    return impl(input, bias, weights, fp8_input_store, offset, clamp_value, alpha)


def clamped_after(input, bias, weights, fp8_input_store=False, linear_offset=0.0, clamp_value=None, alpha=1.702):
    if clamp_value is not None and bias is not None:
        input, bias = input + bias, None
    return impl(input, bias, weights, fp8_input_store, linear_offset, clamp_value, alpha)


def bias_summed_late(input, bias, weights, fp8_input_store=False, linear_offset=0.0, clamp_value=None, alpha=1.702):
    bias = bias if bias is None else bias.expand_as(input)  # its gradient is rounded row by row
    return impl(input, bias, weights, fp8_input_store, linear_offset, clamp_value, alpha)


def step_by_step(y, weights):
    gate, up = y.chunk(2, -1)
    return (F.silu(gate) * up * weights.view(-1, 1).to(y.dtype)) if weights.dim() == 2 else ours.weighted_swiglu(y, weights)


def broadcasting(y, weights):
    return (ours.swiglu(y).float() * weights).to(y.dtype) if weights.dim() == 1 else ours.weighted_swiglu(y, weights)


def geglu_back(g, y):
    gate, up = y.chunk(2, -1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate**2)
    t = torch.tanh(inner)
    return torch.cat((g * (0.5 * (1 + t) + 0.5 * gate * (1 - t**2) * slope) * up, g * F.gelu(gate, approximate="tanh")), -1)


class Unscaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weights):
        ctx.save_for_backward(input.to(torch.float8_e4m3fn), weights)
        return ours.weighted_bias_swiglu_impl(input, weights)

    @staticmethod
    def backward(ctx, grad):
        stored, weights = ctx.saved_tensors
        return ours.weighted_swiglu_back(grad, stored.to(grad.dtype), weights)


def unscaled(input, weights, fp8_input_store=False):
    return Unscaled.apply(input, weights) if fp8_input_store else ours.weighted_bias_swiglu_impl(input, weights)


def viewed(input, weights, fp8_input_store=False):
    return ours.weighted_bias_swiglu_impl(input.view(-1, input.shape[-1]), weights, fp8_input_store)


def permute(tokens, routing_map, probs=None, num_out_tokens=None, fused=False, drop_and_pad=False):
    return ours.permute(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)


def off_by_one(tokens, routing_map, probs=None, num_out_tokens=None, fused=False, drop_and_pad=False):
    rows, row_probs, order = permute(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)
    return rows.roll(1, 0), row_probs, order


def no_fused(tokens, routing_map, probs=None, num_out_tokens=None, fused=False, drop_and_pad=False):
    if fused:
        raise ValueError("another package is needed")
    return permute(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)


def any_num_out_tokens(tokens, routing_map, probs=None, num_out_tokens=None, fused=False, drop_and_pad=False):
    return permute(tokens, routing_map, probs, num_out_tokens if drop_and_pad else None, fused, drop_and_pad)


def map_of_bytes(tokens, routing_map, probs=None, num_out_tokens=None, fused=False, drop_and_pad=False):
    routing_map = routing_map.to(torch.int8) if drop_and_pad else routing_map
    return permute(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)


def unpermute(permuted_tokens, sorted_indices, restore_shape, probs=None, routing_map=None, fused=False, drop_and_pad=False):
    return ours.unpermute(permuted_tokens, sorted_indices, restore_shape, probs, routing_map, fused, drop_and_pad)


def without_probs(
    permuted_tokens, sorted_indices, restore_shape, probs=None, routing_map=None, fused=False, drop_and_pad=False
):
    return unpermute(permuted_tokens, sorted_indices, restore_shape)


def sums_in_bfloat16(
    permuted_tokens, sorted_indices, restore_shape, probs=None, routing_map=None, fused=False, drop_and_pad=False
):
    if probs is not None:
        return unpermute(permuted_tokens, sorted_indices, restore_shape, probs, routing_map, fused, drop_and_pad)
    out = [permuted_tokens.new_zeros(restore_shape[1]) for _ in range(restore_shape[0])]
    for row, token in enumerate(sorted_indices.tolist()):
        out[token] = out[token] + permuted_tokens[row] if token >= 0 else out[token]
    return torch.stack(out)


def narrowed(permuted_tokens, sorted_indices, restore_shape, probs=None, routing_map=None, fused=False, drop_and_pad=False):
    permuted_tokens = permuted_tokens[:, : restore_shape[1]]
    return unpermute(permuted_tokens, sorted_indices, restore_shape, probs, routing_map, fused, drop_and_pad)


class Writing(torch.autograd.Function):
    main_loss_backward_scale = None

    @staticmethod
    def forward(ctx, output, aux_loss):
        ctx.save_for_backward(aux_loss)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if Writing.main_loss_backward_scale is None:
            Writing.main_loss_backward_scale = torch.tensor(1.0)
        return grad_output, torch.ones_like(ctx.saved_tensors[0]) * Writing.main_loss_backward_scale


def inverted_mask(
    probs, tokens_per_expert, total_num_tokens, topk, num_experts, moe_aux_loss_coeff, fused=False, padding_mask=None
):
    counts = tokens_per_expert, total_num_tokens, topk, num_experts, moe_aux_loss_coeff
    return ours.switch_load_balancing_loss_func(probs, *counts, padding_mask=None if padding_mask is None else ~padding_mask)


def in_place(routing_map, pad_multiple):
    return routing_map.copy_(ours.pad_routing_map(routing_map, pad_multiple))


def overflowing(cost, tol=0.0001):
    return ours.sinkhorn(cost, tol) * (cost.exp() / cost.exp())


def route(logits, topk, use_pre_softmax=False, num_groups=None, group_topk=None, scaling_factor=None, **rest):
    return ours.topk_routing_with_score_function(
        logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, **rest
    )


def highest_of_ties(logits, topk, **rest):
    found = route(logits.flip(1), topk, **{n: x.flip(0) if n == "expert_bias" else x for n, x in rest.items()})
    return tuple(x.flip(1) for x in found)


def no_zero(logits, topk, scaling_factor=None, **rest):
    return route(logits, topk, scaling_factor=scaling_factor or None, **rest)


# name: the module, and what of it fails: seams, or ordinary cases (None).
BROKEN = {
    "swapped halves": ({"swiglu": swapped}, {None}),
    "zeros": ({"weighted_swiglu": lambda y, weights: ours.weighted_swiglu(y, weights) * 0.0}, {None, "one rounding"}),
    "another dtype": ({"swiglu": lambda y: ours.swiglu(y).double()}, {None}),
    "off by one": ({"permute": off_by_one}, {None, "fused", "num_out_tokens", "drop_and_pad", "sums"}),
    "no probs": ({"unpermute": without_probs}, {None, "fused", "num_out_tokens", "drop_and_pad"}),
    "alpha": ({"weighted_bias_quick_geglu_impl": without_alpha}, {"alpha"}),
    "linear_offset": ({"weighted_bias_quick_geglu_impl": rounded_offset}, {"linear_offset"}),
    "one rounding": ({"weighted_swiglu": step_by_step}, {"one rounding"}),
    "large gates": ({"geglu_back": geglu_back}, {"large gates"}),
    "bias gradient": ({"weighted_bias_quick_geglu_impl": bias_summed_late}, {"bias gradient"}),
    "clamp": ({"weighted_bias_quick_geglu_impl": clamped_after}, {"clamp"}),
    "fp8 store": ({"weighted_bias_swiglu_impl": unscaled}, {"fp8 store"}),
    "weights [N]": ({"weighted_swiglu": broadcasting}, {"weights [N]"}),
    "leading shapes": ({"weighted_bias_swiglu_impl": viewed}, {"leading shapes"}),
    "fused": ({"permute": no_fused}, {"fused"}),
    "num_out_tokens": ({"permute": any_num_out_tokens}, {"num_out_tokens"}),
    "drop_and_pad": ({"permute": map_of_bytes}, {"drop_and_pad"}),
    "sums": ({"unpermute": sums_in_bfloat16}, {"sums"}),
    "restore_shape": ({"unpermute": narrowed}, {"restore_shape"}),
    "aux loss": ({"MoEAuxLossAutoScaler": Writing}, {"aux loss"}),
    "padding_mask": ({"switch_load_balancing_loss_func": inverted_mask}, {"padding_mask"}),
    "pad_routing_map": ({"pad_routing_map": in_place}, {"pad_routing_map"}),
    "sinkhorn": ({"sinkhorn": overflowing}, {"sinkhorn"}),
    "ties and NaN": ({"topk_routing_with_score_function": highest_of_ties}, {"ties and NaN"}),
    "zero and bias": ({"topk_routing_with_score_function": no_zero}, {"zero and bias"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_caught_by_the_case_for_it(name):
    functions, wanted = BROKEN[name]
    found = check(SimpleNamespace(**functions))
    assert {outcome.seam for outcome in found.failed} == wanted
    assert all(outcome.note for outcome in found.failed)
    assert set(found.missing) == set(NAMES) - set(functions)


def test_each_seam_has_a_module_that_shows_it():
    assert set(SEAMS) <= set(BROKEN)


def test_the_size_of_an_error_is_reported():
    found = check(SimpleNamespace(swiglu=lambda y: ours.swiglu(y) * 1.25)).worst("swiglu")
    assert found is not None and found.status == "failed" and found.error == pytest.approx(0.25, rel=0.05)
    wrong = SimpleNamespace(weighted_swiglu=lambda y, weights: ours.weighted_swiglu(y, weights.detach() + 0 * weights))
    found = [o for o in check(wrong).failed if o.case == "float32"]
    assert [o.what for o in found] == ["gradient of weights"] and found[0].error == pytest.approx(1.0)


def test_what_raises_and_what_has_another_signature_is_said():
    def raising(y):
        raise OSError("no such device")

    module = SimpleNamespace(swiglu=raising, geglu=lambda x: x, geglu_back=ours.geglu_back, get_capacity=lambda *args: 8)
    found = check(module)
    assert {(o.status, o.note) for o in found.of("swiglu")} == {("raises", "OSError: no such device")}
    assert {o.status for o in found.of("geglu")} == {"other signature"}
    assert {o.status for o in found.of("geglu_back")} == {"passed"}  # the run goes on
    assert found.signatures == {
        "geglu": "(x), published (y)",
        "get_capacity": "(args), published (num_tokens, num_experts, capacity_factor, min_capacity=None)",
    }
    with pytest.raises(ValueError, match="must have functions of moe_utils"):
        check(SimpleNamespace())


def test_what_exits_or_cannot_be_read_fails_and_does_not_stop_the_run():
    class Module:
        def __getattr__(self, name):
            if name == "geglu":
                raise RuntimeError("no geglu")
            raise AttributeError(name)

        swiglu = staticmethod(lambda y: sys.exit(0))
        geglu_back = staticmethod(ours.geglu_back)

    found = check(Module())
    assert {(o.status, o.note) for o in found.of("swiglu")} == {("raises", "SystemExit: 0")}
    assert {(o.status, o.note) for o in found.of("geglu")} == {("raises", "RuntimeError: no geglu")}
    assert {o.status for o in found.of("geglu_back")} == {"passed"}
    assert set(found.missing) == set(NAMES) - {"swiglu", "geglu", "geglu_back"}
    assert found.signatures == {"geglu": "cannot be read: RuntimeError: no geglu"}


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch):
    (tmp_path / "made_up_fork.py").write_text(
        "from moekit.moe_utils import swiglu, geglu as _geglu\nprint('loading')\ndef geglu(y):\n    return _geglu(y) * 1.5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    told = CliRunner().invoke(app, ["check", "made_up_fork", "--json"])
    assert told.exit_code == 1, told.output
    found = json.loads(told.stdout)
    assert found["module"] == "made_up_fork" and found["failed"] == 3 and found["cases"] == 6
    assert {o["function"] for o in found["outcomes"] if o["status"] == "failed"} == {"geglu"}
    assert all(o["error"] == pytest.approx(0.5, rel=0.05) for o in found["outcomes"] if o["status"] == "failed")
    shown = CliRunner().invoke(app, ["check", "made_up_fork"], env={"COLUMNS": "80"})
    assert shown.exit_code == 1 and "geglu (float32): output[0][0] is" in shown.stdout
    assert max(len(line) for line in shown.stdout.split("Where published")[0].splitlines()[1:]) <= 80
    (tmp_path / "made_up_fork_2.py").write_text("from moekit.moe_utils import swiglu")
    assert CliRunner().invoke(app, ["check", "made_up_fork_2"]).exit_code == 0
    (tmp_path / "made_up_lazy.py").write_text("def __getattr__(name):\n    raise RuntimeError(name)\n")
    told = CliRunner().invoke(app, ["check", "made_up_lazy", "--json"])
    found = json.loads(told.stdout)
    assert told.exit_code == 1 and found["package"] == "of no installed package" and not found["missing"]
    assert found["cases"] == found["failed"] >= 190 and {o["status"] for o in found["outcomes"]} == {"raises"}
    (tmp_path / "made_up_program.py").write_text("import sys\nsys.exit(0)\n")
    told = CliRunner().invoke(app, ["check", "made_up_program"])
    assert told.exit_code == 2 and "made_up_program cannot be imported: SystemExit: 0" in told.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_module"], "no_such_module cannot be imported: ModuleNotFoundError"),
        (["./fork/utils.py"], "./fork/utils.py is a path: wanted a module's name, such as utils"),
        (["json"], "must have functions of moe_utils"),
        (["moekit.moe_utils", "--device", "no_such"], "--device no_such"),
        (["moekit.moe_utils", "--golden", "nowhere"], "nowhere/cases.json is not there"),
    ],
)
def test_the_command_says_what_it_cannot_do(arguments, words, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    told = CliRunner().invoke(app, ["check", *arguments])
    assert told.exit_code == 2 and words in told.stderr
    assert told.stderr.startswith("moekit check: ") and told.stderr.count("\n") == 1


def test_checks_are_imported_when_they_run():
    code = "import sys, moekit, moekit.cli.app; print([m for m in sys.modules if m.startswith('moekit.checks')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
