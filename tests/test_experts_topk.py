"""The expert MLP from a router's choice without gradients: the operator that makes its own tables, or none."""

from __future__ import annotations

import pytest
import torch
from _reference import draw
from torch import Tensor

import moekit
from moekit.ops.experts_topk import operator
from moekit.ops.glu import make_glu

pytestmark = pytest.mark.usefixtures("backend")

# Tokens, choices of each, experts: few tokens go choice by choice where there is a kernel for that, the others by tables.
SIZES = {
    **{"few": (3, 2, 32), "many": (9, 3, 5), "two tiles": (50, 3, 4), "one expert": (5, 1, 1)},
    **{"no token": (0, 2, 4), "no choice": (4, 0, 4), "as many slots as a tile": (64, 2, 3)},
}
HIDDEN, INNER = 16, 8
SPEC = make_glu("silu", alpha=None, op="test")
DENSE = (*(None,) * 6, *SPEC, False, "", "", [0, 0, 0, 0], False, False)  # between biases and weight_after_down


def case(name: str, dtype: torch.dtype = torch.float32, *, weights: torch.dtype | None = None) -> list[Tensor]:
    """Tokens, choices (some of no expert), weights, matrices and biases; choices and weights lie across."""
    tokens, topk, experts = SIZES[name]
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(-1, experts + 2, (topk, tokens), generator=generator).T
    given = draw(2, topk, tokens).abs().to(weights or dtype).T
    shapes = ((experts, 2 * INNER, HIDDEN), (experts, HIDDEN, INNER), (experts, 2 * INNER), (experts, HIDDEN))
    stored = [draw(3 + place, *shape, scale=0.5).to(dtype) for place, shape in enumerate(shapes)]
    return [draw(9, tokens, HIDDEN).to(dtype), indices, given, *stored]


def exactly(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
    """In float64, expert by expert."""
    x, weights, gate_up, down, first, second = (t.double() for t in (x, weights, gate_up, down, *biases))
    out = torch.zeros_like(x)
    for expert in range(len(down)):
        gate, up = (x @ gate_up[expert].T + first[expert]).chunk(2, 1)
        result = (torch.nn.functional.silu(gate) * up) @ down[expert].T + second[expert]
        out += result * ((indices == expert) * weights).sum(1, keepdim=True)
    return out


def close(found: Tensor, expected: Tensor, roundings: int = 4) -> bool:
    """Of the dtype, in parts of the largest number."""
    largest = expected.abs().max() if expected.numel() else torch.zeros(())
    return found.shape == expected.shape and bool(
        ((found - expected).abs() <= roundings * torch.finfo(found.dtype).eps * largest).all()
    )


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_without_gradients(name, after):
    x, indices, weights, gate_up, down, first, second = given = case(name)
    expected = exactly(*given)
    biases = {"gate_up_bias": first, "down_bias": second}
    assert expected.any() or not expected.numel() or name == "no choice"
    assert close(moekit.experts(x, (indices, weights), gate_up, down, weight_after_down=after, **biases), expected, 16)
    assert close(operator(x, indices, weights, gate_up, down, first, second, *DENSE, after), expected, 16)


@pytest.mark.parametrize("of_weights", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_in_any_dtype(of_weights):
    x, indices, weights, gate_up, down, first, second = given = case("two tiles", torch.bfloat16, weights=of_weights)
    out = moekit.experts(x, (indices.int(), weights), gate_up, down, gate_up_bias=first, down_bias=second)
    assert out.dtype is torch.bfloat16 and close(out.double(), exactly(*given), 2**46)  # of 53 bits: 2 ** -7 of the largest


def test_it_says_that_it_has_no_gradient():
    x, indices, weights, *others = case("many")
    for needs in (x, weights, others[0]):
        needs.requires_grad_()
        with pytest.raises(RuntimeError, match="experts_topk has no gradient"):
            operator(x, indices, weights, *others, *DENSE, False)
        with torch.no_grad():
            assert not operator(x, indices, weights, *others, *DENSE, False).requires_grad
        needs.requires_grad_(False)


NEGATED = ["x", "weights", "gate_up", "grad"]


@pytest.mark.parametrize("name", NEGATED)
def test_views_that_are_negated_on_reading(name):
    """Such as the imaginary part of a conjugate: their memory has the other sign, which no kernel knows of."""
    x, indices, weights, gate_up, down, *_ = case("many")
    given = {"x": x, "weights": weights.contiguous(), "gate_up": gate_up, "grad": draw(11, *x.shape).float()}

    def computed(negated: str) -> list[Tensor]:
        leaves = {key: value.clone().requires_grad_(key != "grad") for key, value in given.items()}
        seen = {key: torch._neg_view(-leaf) if key == negated else leaf for key, leaf in leaves.items()}
        assert not negated or seen[negated].is_neg()
        out = moekit.experts(seen["x"], (indices, seen["weights"]), seen["gate_up"], down)
        out.backward(seen["grad"])
        with torch.no_grad():
            again = moekit.experts(seen["x"], (indices, seen["weights"]), seen["gate_up"], down)
        return [out.detach(), again, *(leaves[key].grad for key in ("x", "weights", "gate_up"))]

    for found, expected in zip(computed(name), computed(""), strict=True):
        assert found.any() and torch.equal(found, expected)


@pytest.mark.parametrize("which", [0, 1])
def test_scales_of_other_weights_are_refused(which):
    x, indices, weights = draw(1, 3, 64), torch.tensor([[0], [1], [3]]), torch.ones(3, 1)
    stored = [moekit.pack(draw(2 + i, 4, *sides), "nf4").stored() for i, sides in enumerate(((128, 64), (64, 64)))]
    scales = [[part.scales[0], None, None] for part in stored]
    scales[which][0] = scales[which][0][:, :-1]
    storage = (False, "nf4", "nf4", [1, 64, 1, 64], False, False)
    codes = (part.codes for part in stored)
    with pytest.raises(ValueError, match="experts: scale must be of shape as nf4 has"):
        operator(x, indices, weights, *codes, None, None, *scales[0], *scales[1], *SPEC, *storage, False)
