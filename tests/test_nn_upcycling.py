"""Upcycling: a Mixture-of-Experts layer made of a dense MLP starts out as that MLP, whatever its router says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moekit.nn import MoE, SharedExpert

H, I, T = 16, 24, 40


class MLP(nn.Module):
    """As in Transformers' models, whose code moekit knows."""

    def __init__(self, bias: bool = False, act: nn.Module | None = None):
        super().__init__()
        self.gate_proj = nn.Linear(H, I, bias=bias)
        self.up_proj = nn.Linear(H, I, bias=bias)
        self.down_proj = nn.Linear(I, H, bias=bias)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class Tanh(MLP):
    """Written otherwise, so not known."""

    def forward(self, x):
        gate = functional.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, T // 2, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def drawn(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.double()


def weights(mlp: MLP) -> tuple[Tensor, Tensor, Tensor]:
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight


SIZES = [(4, 2, 1), (8, 8, 1), (8, 2, 2), (12, 4, 4), (16, 8, 4), (8, 8, 8), (3, 1, 1)]  # experts, k, granularity
ROUTERS = {
    "softmax": {},
    "of the chosen": {"select_by": "logits", "logit_bias": True},
    "sigmoid and a bias": {"score": "sigmoid", "expert_bias": True},
}


@pytest.mark.parametrize(("num_experts", "k", "granularity"), SIZES)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_first_output_is_the_dense_one(num_experts, k, granularity, router):
    dense, x = drawn(MLP(bias=True)), tokens()
    layer = MoE.from_dense(dense, num_experts=num_experts, k=k, granularity=granularity, **ROUTERS[router])
    expected = dense(x)
    assert expected.abs().max() > 1
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    if granularity == 1:  # whatever the router says
        layer.router.given = torch.stack([torch.randperm(num_experts)[:k] for _ in range(T)])
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    else:  # as many of each slice
        slices = layer.router.indices % granularity
        assert (functional.one_hot(slices, granularity).sum(1) == k // granularity).all()
        copies = (layer.router.indices // granularity).unique()
        assert len(copies) == num_experts // granularity  # tokens differ in the copies they choose
    assert layer.experts.gate_up.shape == (num_experts, 2 * I // granularity, H)


@pytest.mark.parametrize("granularity", [1, 2])
def test_in_float32_and_in_training(granularity):
    dense, x = drawn(MLP()).float(), tokens(torch.float32)
    layer = MoE.from_dense(dense, num_experts=8, k=4, granularity=granularity, balance_coeff=0.01)
    assert layer.balance_coeff == 0.01
    out = layer(x)
    torch.testing.assert_close(out, dense(x), rtol=1e-5, atol=1e-5)
    before = copy.deepcopy(layer.state_dict())
    (out - tokens(torch.float32).flip(0)).square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    assert all((value != before[name]).any() for name, value in layer.state_dict().items())
    weight = layer.experts.down.detach()  # slices and copies part: no two experts are alike any more
    assert all(not torch.equal(weight[i], weight[j]) for i in range(8) for j in range(i))
    assert layer.losses["balance"] > 0.009
    assert torch.equal(dense.down_proj.weight, drawn(MLP()).float().down_proj.weight)  # it was copied


SOURCES = {
    "weights": lambda: (weights(drawn(MLP())), {"activation": "silu"}, drawn(MLP())),
    "a module that is not known": lambda: (drawn(Tanh(bias=True)), {"activation": "silu"}, drawn(Tanh(bias=True))),
    "gelu": lambda: (drawn(MLP(act=nn.GELU())), {}, drawn(MLP(act=nn.GELU()))),
    "shared": lambda: (drawn(SharedExpert(H, I, clamp=0.5)), {}, drawn(SharedExpert(H, I, clamp=0.5))),
    "interleaved": lambda: (drawn(SharedExpert(H, I, layout="interleaved", bias=True)), {},
                            drawn(SharedExpert(H, I, layout="interleaved", bias=True))),
    "ungated": lambda: (drawn(SharedExpert(H, I, layout="ungated", activation="relu2")), {},
                        drawn(SharedExpert(H, I, layout="ungated", activation="relu2"))),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("granularity", [1, 2])
def test_sources(source, granularity):
    dense, options, function = SOURCES[source]()
    layer = MoE.from_dense(dense, num_experts=4, k=2, granularity=granularity, **options)
    expected = function(tokens())
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(layer(tokens()), expected, rtol=1e-10, atol=1e-10)


def test_a_projection_without_a_gate():
    up, down = torch.randn(I, H, dtype=torch.float64), torch.randn(H, I, dtype=torch.float64)
    layer = MoE.from_dense((None, up, down), activation="relu", num_experts=4, k=2, granularity=2)
    torch.testing.assert_close(layer(tokens()), (tokens() @ up.T).relu() @ down.T, rtol=1e-10, atol=1e-10)


FOUR = {"num_experts": 4, "k": 2}
BAD = {
    "experts": ({"num_experts": 5, "k": 2, "granularity": 2}, ValueError, "num_experts must be a multiple of granularity"),
    "k": ({"num_experts": 4, "k": 3, "granularity": 2}, ValueError, "k must be a multiple of granularity"),
    "width": ({"num_experts": 10, "k": 5, "granularity": 5}, ValueError, "dense must be of an intermediate width that is"),
    "weights that do not sum to one": ({**FOUR, "normalise": False}, ValueError, "normalise must be left out"),
    "scale": ({**FOUR, "scale": 2.0}, ValueError, "scale must be left out"),
    "what the MLP has": ({**FOUR, "dtype": torch.float32}, ValueError, "dtype must be left out"),
    "groups": (
        {"num_experts": 4, "k": 2, "granularity": 2, "num_groups": 2, "group_topk": 1},
        ValueError,
        "num_groups must",
    ),
    "options": ({**FOUR, "colour": "red"}, TypeError, "got colour"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name):
    options, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        MoE.from_dense(drawn(MLP()), **options)


@pytest.mark.parametrize(
    ("dense", "options", "kind", "text"),
    [
        (lambda: weights(MLP()), {}, ValueError, "activation must be given with weights"),
        (lambda: weights(MLP())[:2], {"activation": "silu"}, TypeError, "dense must be a module, or"),
        (lambda: (*weights(MLP())[:2], torch.ones(I, H)), {"activation": "silu"}, ValueError, "dense must be of shape"),
        (lambda: Tanh(), {}, TypeError, "dense must be a module whose code moekit knows"),
        (lambda: MLP(act=nn.Tanh()), {}, TypeError, "dense must be a module whose code moekit knows"),
        (lambda: nn.Linear(H, H), {"activation": "silu"}, TypeError, "a module with nn.Linear gate_proj"),
        (lambda: SharedExpert(H, I, gate=True), {}, ValueError, "dense must be one without a gate"),
        (lambda: SharedExpert(H, I), {"activation": "silu"}, ValueError, "has no effect with a module that says its own"),
        (lambda: MLP(act=nn.GELU()), {"activation": "silu"}, ValueError, "has no effect with a module that says its own"),
    ],
)
def test_bad_sources(dense, options, kind, text):
    with pytest.raises(kind, match=text):
        MoE.from_dense(dense(), **FOUR, **options)
