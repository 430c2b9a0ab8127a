"""Small models of Transformers with packed experts, and what tells two of them apart."""

from __future__ import annotations

import torch
from test_hf import COMMON
from torch import Tensor, nn

from moekit.packed import PackedExperts

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def causal(kind: str, **settings: object) -> nn.Module:
    """A model in bfloat16, of sizes that every format takes."""
    import transformers

    config = {**COMMON, "intermediate_size": 64, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "head_dim": 8}
    config |= {"num_experts": 4, "num_local_experts": 4} | settings
    made = getattr(transformers, f"{kind}Config")(**config)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()


def packed_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, PackedExperts)]


def parts(weight: PackedExperts) -> list[Tensor]:
    stored = weight.stored()
    return [part if part.dim() == 0 else part.contiguous().view(torch.uint8) for part in (stored.codes, *stored.scales)]


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """The same parameters, bit for bit, packed in the same way."""
    pairs = list(zip(ours.named_parameters(), theirs.named_parameters(), strict=True))
    for (name, mine), (other_name, other) in pairs:
        assert (name, type(mine), mine.dtype, mine.shape) == (other_name, type(other), other.dtype, other.shape)
        if isinstance(mine, PackedExperts):
            assert mine.stored()[2:] == other.stored()[2:] and mine.turned == other.turned, name
            assert all(map(torch.equal, parts(mine), parts(other))), name
        else:
            assert torch.equal(mine, other), name
