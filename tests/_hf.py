"""Small experts modules of Transformers, and one step through them: what the tests of moekit.hf share."""

from __future__ import annotations

import importlib
import types

import torch
from torch import Tensor

T, K, E = 11, 2, 5
NAMED = {
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "mlp_hidden_act": "relu2",
    "moe_latent_size": None,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 0.5,
}


class Settings(types.SimpleNamespace):
    """A configuration that has every field an experts class asks for, small and plausible."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in NAMED:
            return NAMED[name]
        if "expert" in name and "size" not in name:
            return E
        return 24 if "intermediate" in name else 16 if "hidden" in name else 1.0


def experts_class(model: str, name: str) -> list[type]:
    """An experts class of Transformers, in a list that is empty where the installed release has not got it."""
    try:
        return [getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)]
    except ModuleNotFoundError:
        return []


def make(kind: type, **settings: object) -> torch.nn.Module:
    """An experts module of the class ``kind`` with weights that give outputs of about one."""
    module = kind(Settings(_experts_implementation="eager", **settings))
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def run(
    module: torch.nn.Module, implementation: str, indices: Tensor, dtype: torch.dtype, *, absent: Tensor | None = None
) -> dict[str, Tensor]:
    """Output and every gradient of one forward and backward; ``absent`` slots, by default those past E, weigh nothing."""
    absent = indices >= E if absent is None else absent
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, module.down_proj.shape[2 if module.is_transposed else 1], generator=generator).to(dtype)
    weights = torch.rand(T, K, generator=generator).masked_fill(absent, 0.0)
    x.requires_grad_(), weights.requires_grad_()
    module.config._experts_implementation = implementation
    module.zero_grad()
    out = module(x, indices, weights.to(dtype))
    out.float().square().sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **grads}


def chosen(sentinels: bool) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    if sentinels:
        indices[2, 0], indices[3] = E, E
    return indices
