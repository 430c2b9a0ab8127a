"""Made-up releases of Megatron-core: functions of the published signatures, written anew, and how to load them.

Each release is loaded in the place of ``megatron.core.transformer.moe.moe_utils``. ``seen`` lists what was called.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from _reference import draw

from moekit import compat

TARGET = "megatron.core.transformer.moe.moe_utils"

SIX = "tokens, routing_map, probs=None, num_out_tokens=None, fused=False, drop_and_pad=False"
NINE = f"{SIX}, tokens_per_expert=None, align_size=0, return_batch_invariant_inverse_map=False"
SEVEN = "permuted_tokens, sorted_indices, restore_shape, probs=None, routing_map=None, fused=False, drop_and_pad=False"

MOVE = """
    import torch
    seen = []

    def move(tokens, routing_map, probs):
        expert, token = routing_map.T.nonzero(as_tuple=True)
        return tokens[token], None if probs is None else probs[token, expert], token

    def row_id_map(routing_map):
        return torch.cat([routing_map.int(), routing_map.int(), routing_map.sum(1, keepdim=True).int()], 1)

    def add(rows, index, shape, probs=None, routing_map=None):
        if probs is not None:
            rows = rows * probs.T[routing_map.T].unsqueeze(1)
        return torch.zeros(tuple(shape), dtype=rows.dtype).index_add(0, index, rows)
"""


def permute(parameters: str, returns: str, extra: str = "") -> str:
    return f"""
    def permute({parameters}):
        seen.append("permute")
        {extra or "pass"}
        rows, row_probs, index = move(tokens, routing_map, probs)
        return {returns}
    """


def unpermute(parameters: str = SEVEN, extra: str = "") -> str:
    return f"""
    def unpermute({parameters}):
        seen.append("unpermute")
        {extra or "pass"}
        return add(permuted_tokens, sorted_indices, restore_shape, probs, routing_map)
    """


THREE_VALUES = "rows, row_probs, index"
FIVE_VALUES = "rows, row_probs, index, None, tokens_per_expert"


ROUTER = """
    def topk_routing_with_score_function(logits, topk, use_pre_softmax=False, num_groups=None, group_topk=None,
                                         scaling_factor=None, score_function="softmax", expert_bias=None, fused=False,
                                         router_replay=None, dense_output=False, precomputed_indices=None):
        seen.append("topk")
        if score_function == "softmax":
            scores = logits.softmax(-1)
        elif score_function == "sigmoid":
            scores = logits.sigmoid()
        else:
            scores = torch.nn.functional.softplus(logits).sqrt() if score_function == "sqrtsoftplus" else logits.square()
        weights, indices = scores.topk(int(topk))
        weights = weights / weights.sum(-1, keepdim=True) * (1.0 if scaling_factor is None else scaling_factor)
        if dense_output:
            return weights, indices
        return (torch.zeros_like(logits).scatter(1, indices, weights),
                torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True))

    def compute_routing_scores_for_aux_loss(logits, topk, score_function, fused=False, padding_mask=None):
        seen.append("aux")
        scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(),
                  "sqrtsoftplus": torch.nn.functional.softplus(logits).sqrt(), "cube": logits.abs() ** 3}[score_function]
        scores = scores / scores.sum(-1, keepdim=True)
        indices = scores.topk(topk).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True), scores

    def apply_router_token_dropping(routing_probs, routing_map, router_topk, capacity_factor, drop_policy="probs",
                                    pad_to_capacity=False):
        seen.append("dropping")
        if drop_policy == "random":
            return routing_probs, routing_map
        capacity = -(-routing_map.shape[0] * router_topk * capacity_factor // routing_map.shape[1])
        rank = routing_probs.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        kept = routing_map & (rank < capacity)
        return routing_probs * kept, kept

    def get_capacity(num_tokens, num_experts, capacity_factor, min_capacity=None):
        seen.append("capacity")
        import math
        capacity = math.ceil(num_tokens / num_experts * capacity_factor)
        return capacity if min_capacity is None else max(capacity, min_capacity)

    def switch_load_balancing_loss_func(probs, tokens_per_expert, total_num_tokens, topk, num_experts,
                                        moe_aux_loss_coeff, fused=False, padding_mask=None):
        seen.append("switch")
        if padding_mask is not None:
            probs = probs * padding_mask.unsqueeze(-1)
        return (probs.sum(0) * tokens_per_expert).sum() * (
            num_experts * moe_aux_loss_coeff / (topk * total_num_tokens * total_num_tokens))
"""


BIAS = """
    def get_updated_expert_bias({}):
        seen.append("bias")
        return expert_bias
"""


PAIR = (
    MOVE,
    permute(
        f"{NINE}, future=None",
        FIVE_VALUES,
        """if fused:
            rows, row_probs, _ = move(tokens, routing_map, probs)
            return rows, row_probs, row_id_map(routing_map), None, tokens_per_expert""",
    ),
    unpermute(
        f"{SEVEN}, pad_offsets=None, batch_invariant_inverse_map=None, future=None",
        """if fused:
            assert sorted_indices.dim() == 2 and sorted_indices.dtype is torch.int32
            experts = (sorted_indices.shape[1] - 1) // 2
            sorted_indices = sorted_indices[:, :experts].T.nonzero(as_tuple=True)[1]""",
    ),
)


def releases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """For a fixture: a function that loads sources as a release of Megatron-core, with no other framework about."""

    def load(*sources: str) -> ModuleType:
        monkeypatch.setitem(sys.modules, "nemo_automodel", None)
        parts = TARGET.split(".")
        for length in range(1, len(parts)):
            package = ModuleType(".".join(parts[:length]))
            package.__path__ = []
            monkeypatch.setitem(sys.modules, package.__name__, package)
        module = ModuleType(TARGET)
        exec("\n".join(textwrap.dedent(source) for source in ("import torch\nseen = []", *sources)), vars(module))
        monkeypatch.setitem(sys.modules, TARGET, module)
        return module

    yield load
    compat.uninstall()


def example():
    routing_map = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 1, 0]]).bool()
    return draw(0, 4, 5, dtype=torch.float32), routing_map, draw(1, 4, 3, dtype=torch.float32).abs() * routing_map


def said(names: dict[str, str]) -> dict[str, str]:
    return {name.rsplit(".", 1)[1]: text for name, text in names.items()}


def is_replaced(done: compat.Substitution, name: str) -> bool:
    return f"{TARGET}.{name}" in done.names
