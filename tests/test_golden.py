"""The reference cases in ``tests/golden``, in every dtype and memory layout, with and without ``fused``.

Outputs and gradients come in float64 from published implementations (NeMo Automodel 0.7.0, Megatron-core 0.16.1);
inputs are representable in bfloat16 and float16, so that one case serves every dtype.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from _reference import DTYPES, LAYOUTS, assert_accurate, assert_same
from safetensors.torch import load_file

from moekit import moe_utils

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
TENSORS = load_file(GOLDEN / "cases.safetensors")

# What only moves values, so that every dtype has them exactly: (function, output or gradient).
MOVED = {
    ("permute", "permuted_input"),
    ("permute", "permuted_probs"),
    ("permute", "probs"),  # a prob goes to one row, so its gradient is one number
    ("sort_chunks_by_idxs", "output"),
    ("sort_chunks_by_idxs", "permuted_probs"),
    ("sort_chunks_by_idxs", "input"),
    ("sort_chunks_by_idxs", "probs"),
    ("apply_router_token_dropping", "probs"),
}


def tensor(case, reference):
    return TENSORS[f"{case['id']}/{reference.removeprefix('@')}"]


def is_moved(case, name):
    if case["function"] == "unpermute" and "probs" not in case["args"]:
        return name == "permuted_tokens"
    return (case["function"], name) in MOVED


def how_accurate(case):
    """Where the general rule does not hold: in what dtype the work was done, and the size of the terms that cancel."""
    if case["function"] != "topk_routing_with_score_function":
        return {}
    # The published router takes softmax and sigmoid in float32 whatever it is given; its gradient is a difference
    # of products of the upstream gradient and a probability.
    upstream = tensor(case, case["upstream"]["routing_probs"]).double().abs().amax(1, keepdim=True)
    return {"work": torch.float32, "scale": upstream * (case["args"]["scaling_factor"] or 1.0)}


def result_dtype(case, name, dtype):
    """Losses stay in float32."""
    return torch.promote_types(dtype, torch.float32) if name == "loss" else dtype


def arguments(case, dtype, layout):
    """The case's arguments; those with a gradient require one."""
    found = {}
    for name, value in case["args"].items():
        if isinstance(value, str) and value.startswith("@"):
            value = tensor(case, value)
            value = layout(value.to(dtype) if value.is_floating_point() else value)
            value.requires_grad_(name in case.get("grads", {}))
        found[name] = value
    return found


def compare(case, reference, actual, dtype, what):
    name = reference.split(".")[1]
    expected = tensor(case, reference)
    if not expected.is_floating_point() or is_moved(case, name):
        wanted = expected.to(dtype) if expected.is_floating_point() else expected
        assert_same(actual, wanted, f"{what}: {name}")
    else:
        assert actual.dtype is result_dtype(case, name, dtype), f"{what}: {name} is {actual.dtype}"
        assert_accurate(actual, expected.double(), **how_accurate(case), what=f"{what}: {name}")


def check(case, dtype, layout, **fused):
    what = f"{case['id']}, {dtype}, {layout}, {fused}"
    args = arguments(case, dtype, LAYOUTS[layout])
    outputs = getattr(moe_utils, case["function"])(**args, **fused)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == len(case["returns"])
    by_name = {}
    for reference, output in zip(case["returns"], outputs, strict=True):
        if reference is None:
            assert output is None, what
        else:
            by_name[reference.split(".")[1]] = output
            compare(case, reference, output, dtype, what)
    if "grads" not in case:
        return
    upstream = [
        LAYOUTS[layout](tensor(case, reference).to(result_dtype(case, name, dtype)))
        for name, reference in case["upstream"].items()
    ]
    sources = [args[name] for name in case["grads"]]
    gradients = torch.autograd.grad([by_name[name] for name in case["upstream"]], sources, upstream)
    for reference, gradient in zip(case["grads"].values(), gradients, strict=True):
        compare(case, reference, gradient, dtype, f"{what}, gradient")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_golden(case):
    has_fused = "fused" in inspect.signature(getattr(moe_utils, case["function"])).parameters
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for fused in [{"fused": False}, {"fused": True}] if has_fused else [{}]:
                check(case, dtype, layout, **fused)


def test_every_case_is_here():
    assert len(CASES) == 217
    assert len({case["id"] for case in CASES}) == 217
    used = {f"{case['id']}/" for case in CASES}
    assert all(any(name.startswith(prefix) for prefix in used) for name in TENSORS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_what_they_say(layout):
    x = torch.arange(24.0).view(4, 6)
    laid = LAYOUTS[layout](x)
    assert torch.equal(laid, x) and laid.data_ptr() != x.data_ptr()
    assert laid.is_contiguous() == (layout == "contiguous")
    assert (laid.storage_offset() > 0) == (layout == "embedded")
