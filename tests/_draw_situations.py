"""What the differential test draws: the axes, their weights, and which values go together."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from _draw_classes import ACTIVATIONS, OWN, REPLACED, SENTINELS, Situation, traits, transformers_classes
from _draw_modes import CHECKPOINTS, FUNCTIONAL, MODES
from _draw_modules import DTYPES
from _draw_patches import PATCHES

CRAMPED = ("sentinels", "all_sentinels", "duplicates", "one_expert")  # routings in which K may exceed E

Axis = dict[Any, float]


def spread(names: Any, share: float) -> Axis:
    """The names with the same weight each."""
    return dict.fromkeys(names, share / len(names))


def axes() -> dict[str, Axis | Callable[[random.Random], Any]]:
    """Each key of a situation with the weights of its values, or how to draw one."""
    special = [name for name in transformers_classes() if "special" in traits(name)]
    return {
        "class": {**spread([*transformers_classes()], 40), **spread(special, 40), **spread([*OWN], 20)},
        "act": {"default": 60, **spread(ACTIVATIONS, 15), **spread([*REPLACED], 25)},
        "patch": {"none": 50, **spread([*PATCHES], 50)},
        "dtype": {
            "float32": 42,
            "bfloat16": 28,
            "float16": 8,
            "float64": 8,
            "mixed_other": 6,
            "mixed_down": 4,
            "mixed_up": 4,
        },
        "hidden_dtype": {"same": 90, **spread([*DTYPES], 10)},
        "router_dtype": {"same": 55, "float32": 40, "float64": 5},
        "frozen": {"none": 76, "all": 6, "odd": 6, "up_proj": 4, "down": 4, "bias": 4},
        "weight_layout": {"plain": 76, "transposed": 8, "sliced": 8, "shifted": 8},
        "input_layout": {"plain": 76, "transposed": 8, "sliced": 8, "expanded": 8},
        "mode": {**dict.fromkeys(MODES, 3.5), "backward": 50},
        "needs": {"all": 70, "x": 12, "weights": 10, "none": 8},
        "autocast": {"none": 90, "bfloat16": 8, "float16": 2},
        "execution": {
            "eager": 72,
            **dict.fromkeys(CHECKPOINTS, 6),
            "deepcopy": 4,
            "pickle": 3,
            "state_dict": 3,
            "functional": 3,
            "meta": 2,
            "trace": 0.7,
            "compile": 0.5,
        },
        "routing": {
            "random": 52,
            "no_sentinels": 8,
            **({"sentinels": 20, "all_sentinels": 5} if SENTINELS else {}),
            "one_expert": 7,
            "duplicates": 8,
        },
        "index_dtype": {"int64": 92, "int32": 8},
        "save": {"recompute": 60, "all": 25, "fp8": 15},
        "backend": {"auto": 60, "torch": 40},
        "train": {True: 50, False: 50},
        "warm": {True: 25, False: 75},
        "again": {True: 10, False: 90},
        "poison": {"none": 95, "token": 5},
        "scale": {1.0: 82, 0.1: 8, 4.0: 8, 30.0: 2},
        "E": dict.fromkeys(range(2, 7), 1),
        "K": dict.fromkeys(range(1, 5), 1),
        "T": {0: 3, 1: 7, **spread(range(2, 13), 90)},
        "H": dict.fromkeys(range(8, 33), 1),
        "I": dict.fromkeys(range(4, 33), 1),
        "values": lambda rng: rng.getrandbits(30),
    }


_AXES: dict[str, Any] = {}


def draw(rng: random.Random, only: dict[str, str]) -> Situation:
    """A situation; ``only`` fixes some of its keys."""
    if not _AXES:
        _AXES.update(axes())
    if unknown := set(only) - set(_AXES):
        raise ValueError(f"unknown keys {sorted(unknown)}; there are {', '.join(_AXES)}")
    situation = {}
    for key, axis in _AXES.items():
        drawn = axis(rng) if callable(axis) else rng.choices([*axis], axis.values())[0]
        situation[key] = type(drawn)(only[key]) if key in only and type(drawn) is not bool else drawn
        if key in only and type(drawn) is bool:
            situation[key] = only[key] == "True"
    settle(situation, only)
    return situation


def settle(s: Situation, only: dict[str, str]) -> None:
    """Give up what does not go together, but nothing that was asked for."""

    def give_up(key: str, value: Any, when: bool) -> None:
        if when and key not in only:
            s[key] = value

    of = traits(s["class"])
    give_up("act", "default", "act_fn" not in of)
    # Kernels are compiled for a dtype, an activation and a set of gradients, a second each: here in common ones only.
    common = (s["act"], s["needs"], s["frozen"]) == ("default", "all", "none") and s["dtype"] in ("float32", "bfloat16")
    give_up("backend", "torch", not common)
    give_up("patch", "none", s["patch"] != "none" and not _applies(s, of))
    give_up("dtype", "bfloat16", s["dtype"] == "mixed_other" and not {"bias", "norm"} & of)
    main = s["dtype"] if s["dtype"] in DTYPES else "bfloat16"
    give_up("hidden_dtype", main, s["hidden_dtype"] == "same")
    give_up("router_dtype", s["hidden_dtype"], s["router_dtype"] == "same")
    mixed = s["dtype"] not in DTYPES or s["hidden_dtype"] != main
    for size in "HI":  # only grouped_mm mixes dtypes, and it wants strides of 16 bytes
        give_up(size, max(8, s[size] // 8 * 8), mixed)
    give_up("frozen", "none", s["frozen"] == "bias" and "bias" not in of)
    give_up("K", min(s["K"], s["E"]), s["routing"] not in CRAMPED)
    # Forward mode needs dense leaves; PEFT's wrapper and PyTorch's backward hooks stand no transform.
    give_up("input_layout", "plain", s["input_layout"] == "expanded" and s["mode"] in ("func_jvp", "dual"))
    transformed = s["mode"] in FUNCTIONAL
    give_up("mode", "backward", transformed and (s["patch"] == "lora" or "backward" in s["patch"]))
    give_up("needs", "x", transformed and s["needs"] == "none" and s["frozen"] != "none")
    give_up("T", max(1, s["T"]), s["mode"] == "jacrev")
    low = {"float16", "bfloat16", "mixed_other", "mixed_down", "mixed_up"} & {s["dtype"], s["hidden_dtype"]}
    give_up("autocast", "none", s["autocast"] != "none" and bool(low - {s["autocast"]}))
    execution, mode = s["execution"], s["mode"]
    give_up("mode", "backward", execution in ("meta", "trace", "compile") and mode not in ("backward", "no_grad"))
    reentrant = execution == "checkpoint_reentrant" and mode in ("partial", "batched", "double")  # it refuses autograd.grad
    give_up("execution", "checkpoint", reentrant)
    give_up("execution", "eager", s["mode"] in FUNCTIONAL and execution in (*CHECKPOINTS, "functional"))
    give_up("execution", "eager", execution == "trace" and "backward" in s["patch"])
    give_up("execution", "eager", execution == "pickle" and (s["patch"] != "none" or s["act"] == "lambda"))
    give_up("execution", "eager", s["patch"] == "lora" and execution not in ("eager", *CHECKPOINTS))
    give_up("execution", "eager", s["patch"] == "functional_silu" and execution == "state_dict")
    give_up("execution", "eager", s["patch"] == "weight_is_tensor" and execution in ("deepcopy", "meta", "trace"))


def _applies(s: Situation, of: frozenset[str]) -> bool:
    """Whether the patch finds what it patches."""
    needed = PATCHES[s["patch"]][0]
    if needed == "act" and s["act"] in REPLACED:
        act = REPLACED[s["act"]]()
        return hasattr(act, "register_forward_hook") and s["patch"] != "act_class_forward"
    return not needed or needed in of
