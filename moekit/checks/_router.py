"""Ordinary cases of Megatron-core's router functions, and of MoEAuxLossAutoScaler, in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from moekit.checks import _router_formulas as formulas
from moekit.checks._case import Case, compared, draw
from moekit.checks._compare import Difference, compare, exact

T, E, K = 12, 8, 2


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _choices()
    yield from _losses()
    yield from _capacity()


def _choices() -> Iterator[Case]:
    route = partial(compared, "topk_routing_with_score_function", reference=formulas.topk_routing, sources=("logits",))
    base: dict[str, Any] = {"logits": draw(21, T, E), "topk": K}
    groups = {"num_groups": 4, "group_topk": 2}
    bias = {"score_function": "sigmoid", "expert_bias": draw(22, E)}
    yield route("softmax", base)
    yield route("softmax first", {**base, "use_pre_softmax": True, "scaling_factor": 2.5})
    yield route("sigmoid", {**base, "score_function": "sigmoid"})
    yield route("sigmoid, expert_bias", {**base, **bias})
    yield route("sigmoid, expert_bias, groups", {**base, **bias, **groups, "scaling_factor": 2.5})
    limited = {"scores": draw(23, T, E), "topk": 4, "num_tokens": T, "num_experts": E, **groups}
    yield compared("group_limited_topk", "float32", limited, formulas.group_limited_topk)
    for score in ("softmax", "sigmoid"):
        args = {**base, "score_function": score, "padding_mask": torch.arange(T) > 8}
        sources = ("logits",)
        yield compared("compute_routing_scores_for_aux_loss", score, args, formulas.scores_for_aux_loss, sources=sources)


def _losses() -> Iterator[Case]:
    counts = torch.tensor([5, 0, 1, 3, 2, 7, 4, 2])
    balance = {
        "probs": draw(24, T, E).softmax(1).bfloat16().double(),
        "tokens_per_expert": counts,
        "total_num_tokens": T,
        "topk": K,
        "num_experts": E,
        "moe_aux_loss_coeff": 0.01,
    }
    yield compared("switch_load_balancing_loss_func", "float32", balance, formulas.balance_loss, sources=("probs",))
    logits = {"logits": draw(25, T, E), "z_loss_coeff": 0.001}
    yield compared("z_loss_func", "float32", logits, formulas.z_loss, sources=("logits",))
    padded = {**logits, "padding_mask": torch.arange(T) > 8}
    yield compared("z_loss_func", "float32, padding_mask", padded, formulas.z_loss, sources=("logits",))
    yield compared("sinkhorn", "float32", {"cost": draw(26, T, E)}, formulas.sinkhorn)
    update = {"tokens_per_expert": counts, "expert_bias": draw(27, E), "expert_bias_update_rate": 0.001}
    yield compared("get_updated_expert_bias", "float32", update, formulas.updated_bias)
    for name, scale in {"no scale": None, "scale, a tensor": torch.tensor(2.5), "scale, a number": 2.5}.items():
        yield Case("MoEAuxLossAutoScaler", name, partial(scaled, scale=scale))


def scaled(scaler: Any, device: torch.device, scale: Any = None, attach: Any = None) -> list[Difference]:
    """The output and its gradient pass as they are; the loss's gradient is the scale, and 1 without one."""
    output, aux_loss, upstream = draw(28, T, E), draw(29), draw(30, T, E)
    given = [x.float().to(device).requires_grad_() for x in (output, aux_loss)]
    before = scaler.main_loss_backward_scale
    try:
        scaler.main_loss_backward_scale = scale.to(device) if isinstance(scale, torch.Tensor) else scale
        found = (attach or scaler.apply)(*given)
        grads = torch.autograd.grad(found, given, upstream.float().to(device))
        changed = scale is None and scaler.main_loss_backward_scale is not None
    finally:
        scaler.main_loss_backward_scale = before
    expected = torch.tensor(1.0 if scale is None else float(scale), dtype=torch.float64)
    names = ("output", "gradient of output", "gradient of aux_loss")
    values = zip(names, (found, *grads), (output, upstream, expected), strict=True)
    differences = [compare(name, f, e, torch.float32, exact) for name, f, e in values]
    if attach is not None:
        note = "backward wrote main_loss_backward_scale" if changed else ""
        differences.append(Difference("class attribute", math.inf if changed else 0.0, not changed, note))
    return differences


def _capacity() -> Iterator[Case]:
    for args in ((48, 8, 1.25, None), (3, 8, 1.0, 4)):
        names = ["num_tokens", "num_experts", "capacity_factor", "min_capacity"]
        named: dict[str, Any] = dict(zip(names, args, strict=True))
        yield compared("get_capacity", f"{args}", named, formulas.capacity)
    chosen = draw(30, T, E) > 0.5
    dropping = {"routing_probs": draw(31, T, E).abs() * chosen, "routing_map": chosen, "router_topk": K}
    limited = {**dropping, "capacity_factor": 0.75}
    sources = ("routing_probs",)
    yield compared("apply_router_token_dropping", "probs", limited, formulas.token_dropping, sources=sources)
    yield compared(
        "pad_routing_map", "bool", {"routing_map": draw(32, T, E) > 0, "pad_multiple": 4}, formulas.pad_routing_map
    )
