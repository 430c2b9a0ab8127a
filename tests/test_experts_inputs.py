"""What moekit.experts takes and what it refuses: dtypes, storage, routings, more slots than experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import moekit
from moekit import Routing

pytestmark = pytest.mark.usefixtures("backend")

T, E, K, H, I = 11, 5, 2, 16, 6
SAVES = ["recompute", "fp8", "all"]


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, indices, weights, gate_up, down."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    return draw(T, H), indices, draw(T, K).abs(), draw(E, 2 * I, H), draw(E, H, I)


@pytest.mark.parametrize("save", SAVES)
def test_float32_biases_are_not_rounded(save):
    """A bias that bfloat16 cannot hold moves the result by itself, not by its rounded value."""
    x, indices, weights, *_ = inputs()
    x = x.to(torch.bfloat16)
    gate_up, down = torch.zeros(E, 12, 16, dtype=torch.bfloat16), torch.zeros(E, 16, 6, dtype=torch.bfloat16)
    bias = torch.full((E, 16), 1 + 2**-9, requires_grad=True)
    out = moekit.experts(x, (indices, torch.full_like(weights, 128.0)), gate_up, down, down_bias=bias, save=save)
    assert torch.equal(out.float(), torch.full((T, 16), 2 * 128 * (1 + 2**-9)).to(torch.bfloat16).float())
    out.float().sum().backward()
    assert bias.grad.dtype is torch.float32 and bias.grad.sum() == T * 16 * 256


@pytest.mark.parametrize("save", SAVES)
def test_more_slots_than_experts_in_every_mode(save):
    """Sentinels of both kinds (-1, and E and above) weigh nothing: the same as every expert with its weight, or 0."""
    local, topk = 2, 7
    generator = torch.Generator().manual_seed(3)
    gate_up, down = torch.randn(local, 12, 16, generator=generator), torch.randn(local, 16, 6, generator=generator)
    for tokens in (9, 1):
        indices = torch.stack([torch.randperm(14, generator=generator)[:topk] for _ in range(tokens)])
        indices[:, 0] = 1  # one at least, and no expert twice
        indices[:, 1:][indices[:, 1:] == 1] = 9
        indices[indices == 9] = -1
        weights = torch.rand(tokens, topk, generator=generator)
        x = torch.randn(tokens, 16, generator=generator)
        dense = torch.stack([torch.where(indices == expert, weights, 0).sum(1) for expert in range(local)], 1)
        every = torch.arange(local).expand(tokens, local)
        found = []
        for chosen_experts, given in ((indices, weights), (every, dense)):
            leaves = [value.clone().requires_grad_() for value in (x, gate_up, down)]
            out = moekit.experts(leaves[0], (chosen_experts, given), *leaves[1:], save=save)
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() <= (1e-5 if save != "fp8" else 0.05) * theirs.norm()


def test_a_token_with_more_experts_than_there_are_is_refused():
    weights = torch.ones(2, 3)
    Routing.from_topk(torch.tensor([[0, 1, -1], [-1, -1, -1]]), weights, num_experts=2)
    with pytest.raises(ValueError, match=r"Routing.from_topk: indices must be at most num_experts \(2\) a token, got 3"):
        Routing.from_topk(torch.tensor([[0, 1, -1], [0, 1, 1]]), weights, num_experts=2)
    with pytest.raises(ValueError, match=r"Routing.from_topk: indices must be -1 \(none\) or below 2"):
        Routing.from_topk(torch.tensor([[0, 1, -1], [0, 2, -1]]), weights, num_experts=2)


# --- mistakes -------------------------------------------------------------------------------------------------------

X, INDICES, WEIGHTS, GATE_UP, DOWN = inputs()
ROUTINGS = {
    "swapped": ((WEIGHTS, INDICES), r"\(indices .*, weights .*\), in this order, got \(torch.float32, torch.int64\)"),
    "a tensor": (INDICES, r"a Routing or \(indices .*, got Tensor"),
    "an array": (INDICES.numpy(), r"a Routing or \(indices .*, got ndarray"),
    "arrays": ((INDICES.numpy(), WEIGHTS.numpy()), r"got \(ndarray, ndarray\)"),
    "three": ((INDICES, WEIGHTS, WEIGHTS), r"got \(torch.int64, torch.float32, torch.float32\)"),
    "indices of floats": ((INDICES.float(), WEIGHTS), r"an int32 or int64 tensor, got torch.float32"),
    "nothing": (None, "got NoneType"),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_what_is_no_routing_is_named(name):
    routing, message = ROUTINGS[name]
    with pytest.raises(TypeError, match=rf"moekit.experts: (routing|indices) must be .*{message}"):
        moekit.experts(X, routing, GATE_UP, DOWN)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_that_are_stored_the_other_way_round(transposed):
    stored = (GATE_UP, DOWN) if transposed else (GATE_UP.mT.contiguous(), DOWN.mT.contiguous())
    with pytest.raises(ValueError, match=rf"moekit.experts: gate_up must be of shape .*pass transposed={not transposed}"):
        moekit.experts(X, (INDICES, WEIGHTS), *stored, transposed=transposed)
    with pytest.raises(ValueError, match=r"gate_up must be of shape .* with 4 inputs, got shape \[5, 1., 1.\]$"):
        moekit.experts(X[:, :4], (INDICES, WEIGHTS), *stored, transposed=transposed)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            {"activation": "swiglu"},
            "activation must be one of 'silu', 'quick_gelu', 'gelu_tanh', 'gelu', 'relu', 'relu2', got",
        ),
        ({"layout": "stacked"}, "layout must be one of 'concatenated', 'interleaved', 'ungated', got 'stacked'"),
        ({"clamp": -1.0}, "clamp must be None or at least 0"),
        (
            {"down_bias": torch.zeros(E, H, dtype=torch.float16)},
            "down_bias must be of the dtype of hidden_states .* or float32",
        ),
        ({"gate_up_bias": torch.zeros(E, H)}, r"gate_up_bias must be of shape \[experts, out\] = \[5, 12\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_experts(argument, message):
    with pytest.raises(ValueError, match=rf"moekit.experts: {message}"):
        moekit.experts(X, (INDICES, WEIGHTS), GATE_UP, DOWN, **argument)


@pytest.mark.parametrize("name", ["hidden_states", "gate_up", "down"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64], ids=str)
def test_dtypes_that_nothing_is_computed_in(name, dtype):
    arguments = {"hidden_states": X, "gate_up": GATE_UP, "down": DOWN}
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(TypeError, match=rf"moekit.experts: {name} must be a floating-point tensor .*, got {dtype}"):
        moekit.experts(routing=(INDICES, WEIGHTS), **arguments)
    with pytest.raises(TypeError, match=rf"moekit.experts: {name} must be a tensor, got ndarray"):
        moekit.experts(routing=(INDICES, WEIGHTS), **{**arguments, name: np.zeros(3)})
