"""Whoever else computes the routed expert MLP on a GPU, as functions of the inputs of ``gpu_experts.py``.

Each is made only when it is asked for: a package that is missing raises ModuleNotFoundError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Data = dict[str, Tensor]
Run = Callable[[Data], Tensor]


def transformers_(data: Data) -> Run:
    """The ``grouped_mm`` implementation of Transformers."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    class Experts(torch.nn.Module):
        has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, False
        num_experts, config = len(data["gate_up"]), None

        def _apply_gate(self, y: Tensor) -> Tensor:
            gate, up = y.chunk(2, -1)
            return F.silu(gate) * up

    experts = Experts()
    object.__setattr__(experts, "gate_up_proj", data["gate_up"])
    object.__setattr__(experts, "down_proj", data["down"])
    return lambda d: grouped_mm_experts_forward(experts, d["x"], d["indices"], d["weights"])


def scattermoe(data: Data) -> Run:
    """ScatterMoE's gated MLP, whose second half is the gate; its parameters are the other weights' memory, turned."""
    from scattermoe.mlp import GLUMLP

    experts, twice, hidden = data["gate_up"].shape
    mlp = GLUMLP(hidden, twice // 2, experts, data["indices"].shape[1], activation=torch.nn.SiLU())
    mlp.to("cuda", torch.bfloat16)
    with torch.no_grad():
        mlp.experts.weight.data = torch.cat(data["gate_up"].chunk(2, 1)[::-1], 1)
        mlp.output_experts.weight.data = data["down"].detach().clone()
    data["scattermoe"] = [mlp.experts.weight, mlp.output_experts.weight]  # type: ignore[assignment]
    return lambda d: mlp(d["x"], d["weights"], d["indices"])


def liger(data: Data) -> Run:
    """Liger-Kernel's fused MoE."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    indices = data["indices"].int()
    return lambda d: LigerFusedMoEFunction.apply(d["x"], d["gate_up"], d["down"], indices, d["weights"])


def sonicmoe(data: Data) -> Run:
    """SonicMoE; its tuner compiles about a hundred kernels, for minutes, and keeps them in ``QUACK_CACHE_DIR``."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    tokens, topk = data["indices"].shape
    token = torch.arange(tokens, device="cuda", dtype=torch.int32).repeat_interleave(topk)
    expert, experts = data["indices"].reshape(-1).int(), len(data["gate_up"])

    def run(d: Data) -> Tensor:
        weights, gate_up, down = d["weights"].reshape(-1), d["gate_up"].permute(1, 2, 0), d["down"].permute(1, 2, 0)
        how = (torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU, not torch.is_grad_enabled(), True)
        return moe_general_routing_inputs(d["x"], weights, token, expert, gate_up, None, down, None, experts, *how)[0]

    return run


PEERS: dict[str, Callable[[Data], Any]] = {
    "Transformers": transformers_,
    "ScatterMoE": scattermoe,
    "Liger": liger,
    "SonicMoE": sonicmoe,
}
