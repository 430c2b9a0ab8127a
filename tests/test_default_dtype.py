"""``torch.set_default_dtype``, as models in bfloat16 are built under: no number depends on it, nor where one is written."""

from __future__ import annotations

import random

import pytest
import torch
from _integer_cases import SMALL, TARGETS, Make, tensors
from _reference import draw

import moekit
from moekit import Lora, _codes

DEFAULTS = [torch.bfloat16, torch.float64]


@pytest.fixture(params=DEFAULTS, ids=str)
def default(request):
    """Sets it when it is called."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


def assert_same(found, expected):
    found, expected = list(tensors(found)), list(tensors(expected))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is theirs.dtype
        ours, theirs = (t.float() if t.element_size() == 1 else t for t in (ours, theirs))  # float8 has no equal
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", TARGETS)
def test_operators(name, default):
    target = TARGETS[name]
    made = [target.build(Make(sizes, random.Random(seed))) for seed, sizes in enumerate(SMALL * 2)]
    expected = [target.call(**arguments) for arguments in made]
    default()
    for arguments, result in zip(made, expected, strict=True):
        assert_same(target.call(**arguments), result)


def routed(x, logits, gate_up, down, bias, mask):
    """Losses and gradients of a layer, which go through most backwards."""
    routing = moekit.route(logits, 2, score="sigmoid", padding_mask=mask)
    out = moekit.experts(x, routing, gate_up, down, gate_up_bias=bias)
    losses = [
        moekit.balance_loss(routing, 0.1),
        moekit.sequence_balance_loss(routing, 0.1, sequences=2),
        moekit.z_loss(routing, 0.1),
    ]
    return out, *losses, *torch.autograd.grad(out.float().square().sum() + sum(losses), (x, logits, gate_up, down, bias))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_layer(dtype, default):
    shapes = [(70, 8), (70, 4), (4, 12, 8), (4, 8, 6), (4, 12)]
    given = [draw(seed, *shape, dtype=torch.float64).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    mask = torch.arange(70) % 9 == 1
    expected = routed(*given, mask)
    default()
    assert_same(routed(*given, mask), expected)


@pytest.mark.parametrize(
    ("make", "arguments"), [(_codes.table, ["nf4"]), (_codes.table, ["mxfp4"]), (_codes.dynamic_table, [])]
)
def test_tables_of_codes(make, arguments, default):
    """They are kept, so that the first use in a process decides what all others see: here they are made anew."""
    expected = make(*arguments, torch.device("cpu"))
    default()
    assert_same(make.__wrapped__(*arguments, torch.device("cpu")), expected)


@pytest.mark.parametrize("format", ["nf4", "mxfp4", "fp8", "int8"])
def test_packing(format, default):
    weight = draw(1, 2, 64, 64, dtype=torch.float32)

    def packed():
        made = moekit.pack(weight, format, double_quant=format == "nf4")
        again = moekit.PackedExperts.from_state_dict(made.state_dict("w"), "w")
        return [(*one.stored().scales, one.unpack(dtype=torch.float32)) for one in (made, again)]

    expected = packed()
    default()
    assert_same(packed(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_merging(dtype, default):
    """Scales that no float32 holds."""
    weight, A, B = (draw(seed, *shape, dtype=dtype) for seed, shape in enumerate([(2, 6, 8), (2, 3, 8), (2, 6, 3)]))
    default()
    merged, _ = moekit.merge(weight, Lora(A, B, 0.1))
    exact = weight.double() + 0.1 * B.double() @ A.double()
    assert (merged.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
