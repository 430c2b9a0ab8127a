"""A small model of moekit's layers, and one of Transformers: what the tests of replay and monitor share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekit.nn import MoE

T, H, E, K, LAYERS = 6, 16, 8, 2, 2
REENTRANT = [None, False, True]  # no checkpointing, and both kinds


class Net(nn.Module):
    """Layers with a residual, each under activation checkpointing if asked for."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoE.build(H, 8, num_experts=E, k=K, **options) for _ in range(LAYERS))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor, **options: object) -> Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                x = x + layer(x, **options)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.reentrant, **options)
        return x


def net(**options: object) -> Net:
    torch.manual_seed(0)
    return Net(**options).double()


def perturbed(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """A copy with other weights, which chooses otherwise."""
    generator, other = torch.Generator().manual_seed(1), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return other


def inputs(number: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(T, H, generator=generator, dtype=dtype) for _ in range(number)]


def causal(name: str, **settings: object):
    """A model of Transformers with random weights, in training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": H, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": K}
    others = {"vocab_size": 32, "max_position_embeddings": 64, "initializer_range": 0.3}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **heads, **others, **settings})).train()


def qwen3():
    """Qwen3-MoE, whose router is that of most."""
    return causal("qwen3_moe", num_experts=E, norm_topk_prob=True)


def checkpointed(model: nn.Module, reentrant: bool) -> None:
    """Have a model of Transformers checkpoint its layers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


def ids(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 32, (2, 5), generator=generator) for _ in range(number)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.clone() for name, grad in found.items()}
