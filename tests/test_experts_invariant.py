"""``moekit.experts(..., batch_invariant=True)``: a token has the same bits in any batch, forward and backward."""

from __future__ import annotations

import pytest
import torch
from _interpreter import INTERPRETED

import moekit
import moekit.nn
from moekit.ops.lora import Lora

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
E, H, I, K = 4, 40, 24, 2
LARGEST = 16384 if GPU else 192 if INTERPRETED else 1024
FORMATS = {"dense": None, "nf4": "nf4", "int8": "int8"}
CASES = {
    "bf16": (torch.bfloat16, {}, "dense", False),
    "fp16, transposed": (torch.float16, {"transposed": True}, "dense", False),
    "fp32, interleaved, clamped, biases": (torch.float32, {"layout": "interleaved", "clamp": 2.0}, "dense", True),
    "bf16, biases, weight after down": (torch.bfloat16, {"weight_after_down": True}, "dense", True),
    "bf16, ungated": (torch.bfloat16, {"layout": "ungated", "activation": "relu2"}, "dense", False),
    "bf16, adapters": (torch.bfloat16, {"lora": 3}, "dense", False),
    "bf16, nf4": (torch.bfloat16, {}, "nf4", False),
    "fp32, int8": (torch.float32, {}, "int8", True),
    "bf16, fp8 kept": (torch.bfloat16, {"save": "fp8"}, "dense", True),
}


class Layer:
    """The experts of one case, and what a batch is drawn from."""

    def __init__(self, case: str) -> None:
        dtype, self.options, form, biased = CASES[case]
        self.options = dict(self.options)
        torch.manual_seed(5)
        hidden, inner = (H, I) if form == "dense" else (128, 64)
        width = inner if self.options.get("layout") == "ungated" else 2 * inner

        def drawn(*shape, scale=0.3, kind=dtype):
            return (torch.randn(shape, device=DEVICE) * scale).to(kind)

        self.gate_up, self.down = drawn(E, width, hidden), drawn(E, hidden, inner)
        rank = self.options.pop("lora", 0)
        if rank:
            factors = [drawn(E, rank, hidden), drawn(E, width, rank), drawn(E, rank, inner), drawn(E, hidden, rank)]
            self.options["lora"] = {"gate_up": Lora(*factors[:2], 0.5), "down": Lora(*factors[2:], 0.5)}
        if self.options.get("transposed"):
            self.gate_up, self.down = self.gate_up.mT.contiguous(), self.down.mT.contiguous()
        if form != "dense":
            self.gate_up, self.down = moekit.pack(self.gate_up, form), moekit.pack(self.down, form)
        if biased:
            self.options |= {"gate_up_bias": drawn(E, width), "down_bias": drawn(E, hidden)}
        self.x, self.grad = drawn(LARGEST, hidden, scale=1.0), drawn(LARGEST, hidden, scale=1.0)
        weights, self.indices = torch.rand(LARGEST, E, device=DEVICE).topk(K, -1)
        self.weights = weights.to(dtype)

    def step(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Output, gradients of the tokens and of their routing weights, for a batch of these tokens in this order."""
        x, p = self.x[tokens].requires_grad_(), self.weights[tokens].requires_grad_()
        options = self.options | {"batch_invariant": True}
        out = moekit.experts(x, (self.indices[tokens], p), self.gate_up, self.down, **options)
        out.backward(self.grad[tokens])
        with torch.no_grad():
            inference = moekit.experts(x, (self.indices[tokens], p), self.gate_up, self.down, **options)
        assert torch.equal(inference, out)
        return out.detach(), x.grad, p.grad


def batches():
    """Token numbers: single ones, some, all, in several orders, some of them twice."""
    generator = torch.Generator().manual_seed(7)
    yield from (torch.tensor([token]) for token in (0, LARGEST - 1))
    for size in (2, 33, LARGEST // 4) if INTERPRETED else (2, 3, 7, 33, 100, LARGEST // 4):
        yield torch.randperm(LARGEST, generator=generator)[:size]
    yield torch.arange(LARGEST).flip(0)
    yield torch.cat([torch.arange(20), torch.arange(10)])


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_any_batch(case):
    layer = Layer(case)
    whole = layer.step(torch.arange(LARGEST, device=DEVICE))
    for tokens in batches():
        tokens = tokens.to(DEVICE)
        for name, part, all_of_them in zip(("out", "x", "weights"), layer.step(tokens), whole, strict=True):
            assert torch.equal(part, all_of_them[tokens]), (name, len(tokens))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_float64_and_the_reference(backend):
    with moekit.backend(backend):
        layer = Layer("fp32, interleaved, clamped, biases")
        layer.x, layer.grad, layer.weights = (t[:64].double() for t in (layer.x, layer.grad, layer.weights))
        layer.gate_up, layer.down = layer.gate_up.double(), layer.down.double()
        layer.options |= {name: layer.options[name].double() for name in ("gate_up_bias", "down_bias")}
        whole = layer.step(torch.arange(64, device=DEVICE))
        for tokens in ([5], [63, 0, 5], list(range(1, 64, 3))):
            tokens = torch.tensor(tokens, device=DEVICE)
            assert all(torch.equal(part, t[tokens]) for part, t in zip(layer.step(tokens), whole, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_products_of_the_batch(case):
    layer = Layer(case)
    tokens = torch.arange(96, device=DEVICE)
    found = layer.step(tokens)
    x, p = layer.x[tokens].requires_grad_(), layer.weights[tokens].requires_grad_()
    out = moekit.experts(x, (layer.indices[tokens], p), layer.gate_up, layer.down, **layer.options)
    out.backward(layer.grad[tokens])
    bound = 2e-6 if layer.x.dtype is torch.float32 else 2e-2
    for mine, plain in zip(found, (out.detach(), x.grad, p.grad), strict=True):
        assert (mine.double() - plain.double()).norm() <= bound * plain.double().norm()


def test_adapters_must_drop_nothing():
    layer = Layer("bf16, adapters")
    lora = {name: given._replace(dropout=0.5) for name, given in layer.options["lora"].items()}
    with pytest.raises(ValueError, match="lora"):
        moekit.experts(layer.x, (layer.indices, layer.weights), layer.gate_up, layer.down, lora=lora, batch_invariant=True)


def test_the_module_has_the_option():
    made = moekit.nn.Experts(E, H, I, batch_invariant=True, dtype=torch.bfloat16, device=DEVICE)
    assert "batch_invariant=True" in repr(made)
    torch.manual_seed(0)
    x, indices = torch.randn(200, H, device=DEVICE).bfloat16(), torch.rand(200, E, device=DEVICE).topk(K).indices
    routing = indices, torch.full((200, K), 0.5, dtype=torch.bfloat16, device=DEVICE)
    alone = made(x[7:8], tuple(part[7:8] for part in routing))
    assert torch.equal(alone, made(x, routing)[7:8]) and alone.abs().max() > 0
