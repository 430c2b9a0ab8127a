"""A drawn situation made real: its module with parameters, and its inputs."""

from __future__ import annotations

import copy
import pickle
import zlib
from typing import Any

import torch
from _draw_classes import REPLACED, Situation, class_of, settings
from _draw_patches import PATCHES, Case
from torch import Tensor
from transformers.activations import ACT2CLS

# --- parameters and inputs ---------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def values(situation: Situation, name: str, shape: tuple[int, ...], stream: str = "") -> Tensor:
    """Standard normal numbers that depend on nothing but the draw and the name."""
    seed = zlib.crc32(f"{situation['values']} {name} {stream}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded(case: Case, value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """In the drawn dtype; in the exact case the same number in float64, moved by about the noise's share."""
    value = value.to(dtype)
    if not case.exact:
        return value
    value = value.double()
    return value * (1 + case.noise * values(case.situation, name, value.shape, f"{case.noise}")) if case.noise else value


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "transposed" and value.dim() >= 2:
        return value.mT.contiguous().mT
    if layout == "sliced" and value.dim():
        room = value.new_full([size + 2 for size in value.shape], 7)
        room = room[tuple(slice(1, -1) for _ in value.shape)]
        return room.copy_(value)
    if layout == "shifted":
        return value.new_empty(value.numel() + 1)[1:].copy_(value.flatten()).view(value.shape)
    return value


def parameter_dtype(situation: Situation, name: str, value: Tensor) -> torch.dtype:
    dtype = situation["dtype"]
    if dtype in DTYPES:
        return DTYPES[dtype]
    wide = {"mixed_other": value.dim() != 3, "mixed_down": "down" in name, "mixed_up": "up_proj" in name}
    return torch.float32 if wide[dtype] else torch.bfloat16


def fill(case: Case) -> None:
    """Every parameter and buffer in its dtype and layout; some frozen."""
    situation, frozen = case.situation, case.situation["frozen"]
    named = {**dict(case.module.named_parameters()), **case.extra}
    for number, (name, parameter) in enumerate(named.items()):
        shape = tuple(parameter.shape)
        size = shape[1 if case.experts.is_transposed else 2] if len(shape) == 3 else 8
        value = values(situation, name, shape)
        value = value * 1.2 / size**0.5 if len(shape) > 1 and "bias" not in name else 0.5 * value
        value = 0.8 + 0.2 * value.tanh() if len(shape) < 2 else value
        value = rounded(case, value, parameter_dtype(situation, name, parameter), name)
        parameter.data = laid_out(value, situation["weight_layout"])
        if name in case.extra or frozen != "none":
            parameter.requires_grad_(not (frozen == "all" or frozen in name or (frozen == "odd" and number % 2)))
    for name, buffer in case.module.named_buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(torch.float64 if case.exact else parameter_dtype(situation, name, buffer))


def build(situation: Situation, exact: bool = False, noise: float = 0.0) -> Case:
    """The module of a situation; the exact one is in float64, with the same values."""
    act = situation["act"]
    config = settings(*(situation[key] for key in "EHI"), act if act in ACT2CLS else None)
    case = Case(situation, exact, noise, class_of(situation["class"])(config))
    case.module._is_expert_parallel = situation["routing"] in ("sentinels", "all_sentinels", "no_sentinels")
    if situation["warm"] and not exact:
        warm_up(case.module, situation["H"])
    if act in REPLACED:
        del case.module.act_fn  # a module's place takes no function
        case.module.act_fn = REPLACED[act]()
    if situation["patch"] != "none":
        PATCHES[situation["patch"]][1](case)
    fill(case)
    case.module.train(situation["train"])
    return case


def warm_up(module: Any, hidden: int) -> None:
    """A call before anything is patched: what is remembered from it must not outlive the patch."""
    module.config._experts_implementation = "moekit"
    with torch.no_grad():
        module(torch.zeros(2, hidden), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


def inputs(case: Case) -> dict[str, Tensor]:
    """Tokens, routing weights and indices, a gradient of the output and directions for derivatives, of B samples."""
    s = case.situation
    shape = (3, s["T"], s["H"])
    dtype = DTYPES[s["hidden_dtype"]]
    x = rounded(case, s["scale"] * values(s, "x", shape), dtype, "x")
    if s["poison"] == "token":
        x[:, :1] = float("nan")
    indices, raw = indices_of(s), values(s, "weights", (3, s["T"], s["K"])).sigmoid()
    if s["routing"] == "sentinels" and s["values"] % 2:
        raw = raw.masked_fill(indices == s["E"], 0.0)
    weights = rounded(case, raw, DTYPES[s["router_dtype"]], "weights")
    cotangent = rounded(case, values(s, "cotangent", shape), dtype, "cotangent")
    if s["input_layout"] == "expanded":
        x, cotangent = x[:, :, :1].expand(shape), cotangent[:, :1, :1].expand(shape)
    found = {"x": x, "weights": weights, "indices": indices, "cotangent": cotangent}
    return {name: laid_out(value, s["input_layout"]) for name, value in found.items()}


def indices_of(s: Situation) -> Tensor:
    """``[B, T, K]``, the samples routed differently."""
    T, E, K = (s[key] for key in "TEK")
    order = values(s, "order", (3, T, max(E, K))).argsort(-1)[..., :K]
    kind = s["routing"]
    if kind == "sentinels":  # of more ranks than one: what is not here is E
        order = torch.where((order < E) & (values(s, "here", order.shape) < 0.8), order, E)
    elif kind == "all_sentinels":
        order = torch.full_like(order, E)
    elif kind == "one_expert":
        order = torch.full_like(order, s["values"] % E)
    elif kind == "duplicates":
        order = order % max(1, E // 2)
    else:
        order = order % E
    return order.to(torch.int32 if s["index_dtype"] == "int32" else torch.int64)


def changed(case: Case, execution: str) -> None:
    """Put a copy, or the module on another device, in the place of the module."""
    if execution == "meta":
        case.module.to("meta")
    elif execution == "deepcopy":
        case.module = copy.deepcopy(case.module)
    elif execution == "pickle":
        case.module = pickle.loads(pickle.dumps(case.module))
    elif execution == "state_dict":
        other = build(case.situation, case.exact)
        for parameter in other.module.parameters():
            parameter.data.zero_()
        other.module.load_state_dict(case.module.state_dict())
        case.module, case.calls, case.extra = other.module, other.calls, {**case.extra, **other.extra}
        case.undo.extend(other.undo)
