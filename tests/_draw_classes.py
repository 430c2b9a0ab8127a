"""The experts classes of the differential test: Transformers' and users' own, and activations."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2CLS, ACT2FN
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

Situation = dict[str, Any]
FLAGS = ["interleaved", "transposed", "bias", "ungated", "norm", "owngate"]
if "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:  # an older Transformers
    FLAGS.remove("norm")
# Older releases compute with a slot of another rank, relying on a weight of zero: nothing to compare with.
SENTINELS = "sentinel_mask" in inspect.getsource(batched_mm_experts_forward)
CONSTANTS = ("alpha", "limit", "swiglu_alpha", "swiglu_limit")
# xIELU warns at construction and mixes dtypes in a way that its own code refuses.
ACTIVATIONS = sorted(set(ACT2CLS) - {"xielu"})


class Settings(types.SimpleNamespace):
    """A configuration with every field that an experts class asks for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "expert" in name and "size" not in name:
            return self.E
        return self.I if "intermediate" in name else self.H if "hidden" in name else 1.0


def settings(E: int, H: int, I: int, activation: str | None = None) -> Settings:
    named = {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2"}
    if activation:
        named = dict.fromkeys(named, activation)
    given = {"moe_latent_size": None, "swiglu_alpha": 1.702, "swiglu_limit": 0.9, "_experts_implementation": "eager"}
    return Settings(E=E, H=H, I=I, **named, **given)


# --- a user's own experts class, in every layout that the decorator's flags describe --------------------------------


class Norm(nn.Module):
    """A norm after the experts that depends on one row at a time."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, rows: Tensor) -> Tensor:
        return self.weight * rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 0.1)


class Own(nn.Module):
    """Experts as a user would write them, one expert at a time."""

    flags: frozenset[str] = frozenset()

    def __init__(self, config: Settings):
        super().__init__()
        E, H, I = self.num_experts, self.hidden_dim, self.intermediate_dim = config.E, config.H, config.I
        width, name = (I, "up_proj") if "ungated" in self.flags else (2 * I, "gate_up_proj")
        self.transposed, self.first = "transposed" in self.flags, name
        sizes = {name: (width, H), "down_proj": (H, I)}
        for key, (out, into) in sizes.items():
            shape = (E, into, out) if self.transposed else (E, out, into)
            setattr(self, key, nn.Parameter(torch.empty(shape)))
            if "bias" in self.flags:
                setattr(self, f"{key}_bias", nn.Parameter(torch.empty(E, out)))
        if "norm" in self.flags:
            self.post_expert_norm = Norm(H)
        self.act_fn = ACT2FN[config.hidden_act]

    def linear(self, rows: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        out = rows @ (weight if self.transposed else weight.T)
        return out + getattr(self, f"{name}_bias")[expert] if "bias" in self.flags else out

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            rows = self.linear(hidden_states[token], self.first, expert)
            rows = self.act_fn(rows) if "ungated" in self.flags else self._apply_gate(rows)
            rows = self.linear(rows, "down_proj", expert)
            rows = self.post_expert_norm(rows) if "norm" in self.flags else rows
            out.index_add_(0, token, (rows * top_k_weights[token, slot, None]).to(out.dtype))
        return out


def halves(module: Any, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.chunk(2, -1) if module.is_concatenated else (gate_up[..., ::2], gate_up[..., 1::2])


def _own_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = halves(self, gate_up)
    return self.act_fn(gate) * (up + 0.5)


def _own_class(chosen: tuple[str, ...]) -> type:
    flags = frozenset(chosen)
    space = {"flags": flags, "__module__": __name__, **({"_apply_gate": _own_gate} if "owngate" in flags else {})}
    norm = {"has_post_expert_norm": True} if "norm" in flags else {}
    decorate = use_experts_implementation(
        is_concatenated="interleaved" not in flags,
        is_transposed="transposed" in flags,
        has_bias="bias" in flags,
        has_gate="ungated" not in flags,
        **norm,
    )
    made = decorate(type("_".join(("Own", *chosen)), (Own,), space))
    globals()[made.__name__] = made  # where pickle looks for it
    return made


def _every_own_class() -> list[type]:
    subsets = itertools.chain.from_iterable(itertools.combinations(FLAGS, size) for size in range(len(FLAGS) + 1))
    return [_own_class(s) for s in subsets if "ungated" not in s or not {"interleaved", "owngate"} & set(s)]


OWN = {cls.__name__: cls for cls in _every_own_class()}


@functools.cache
def transformers_classes() -> dict[str, type]:
    """Everything that Transformers decorates, found in its source."""
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for match in re.finditer(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found[match[1]] = getattr(module, match[1])
    return found


def class_of(name: str) -> type:
    return OWN[name] if name in OWN else transformers_classes()[name]


@functools.cache
def traits(name: str) -> frozenset[str]:
    """What can be patched in a class, and whether it is anything but the common layout."""
    module = class_of(name)(settings(2, 4, 4))
    act = getattr(module, "act_fn", None)
    has = {"gate": module.has_gate, "bias": module.has_bias, "act_fn": act is not None and _takes_one(act)}
    has["act"] = has["act_fn"] and isinstance(act, nn.Module)
    has["constants"] = any(hasattr(module, constant) for constant in CONSTANTS)
    plain_gate = type(module)._apply_gate.__module__ == "transformers.integrations.moe"
    has["norm"] = getattr(module, "has_post_expert_norm", False)
    flags = (module.is_transposed, module.has_bias, not module.has_gate, has["norm"])
    has["special"] = not plain_gate or any(flags) or not module.is_concatenated
    parts = {type(part) for part in module.modules() if type(part).__module__.startswith("transformers")}
    has["float32 inside"] = any({"float", "float32"} & _names(part) for part in parts)
    return frozenset(key for key, value in has.items() if value)


def _names(kind: type) -> set[str]:
    """What the methods of a class name: its source is a file of thousands of lines to parse."""
    methods = (inspect.unwrap(value) for value in vars(kind).values() if inspect.isfunction(value))
    return {name for method in methods for name in method.__code__.co_names}


def _takes_one(act: Callable) -> bool:
    try:
        return act(torch.ones(1, 2)).shape == (1, 2)
    except TypeError:  # Inkling2's takes the gate and the up half
        return False


# --- activations that users put in the place of the configured one ---------------------------------------------------


class Slope(nn.Module):
    """A learnable slope, as in Swish."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class DoubledSiLU(nn.SiLU):
    """A subclass that overrides."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SameSiLU(nn.SiLU):
    """A subclass that changes nothing."""


def _named(name: str, base: type, **space: Any) -> type:
    made = type(name, (base,), {"__module__": __name__, "__qualname__": name, **space})
    globals()[name] = made
    return made


def silu(x: Tensor) -> Tensor:
    """Not silu, whatever its name says."""
    return x * torch.sigmoid(2 * x)


def square(x: Tensor) -> Tensor:
    return 0.3 * x * x


REPLACED: dict[str, Callable[[], Any]] = {
    "F.silu": lambda: F.silu,
    "torch.relu": lambda: torch.relu,
    "F.gelu": lambda: F.gelu,
    "nn.SiLU": nn.SiLU,
    "nn.SiLU inplace": lambda: nn.SiLU(inplace=True),
    "nn.ReLU inplace": lambda: nn.ReLU(inplace=True),
    "nn.GELU": nn.GELU,
    "nn.GELU tanh": lambda: nn.GELU(approximate="tanh"),
    "nn.Sequential": lambda: nn.Sequential(nn.SiLU(), nn.Tanh()),
    "lambda": lambda: lambda x: 0.5 * torch.tanh(x),
    "function named silu": lambda: silu,
    "function": lambda: square,
    "partial": lambda: functools.partial(F.gelu, approximate="tanh"),
    "slope": Slope,
    "slope named SiLU": _named("SiLU", Slope),
    "slope named SiLUActivation": _named("SiLUActivation", Slope),
    "slope named GELUTanh": _named("GELUTanh", Slope),
    "subclass": DoubledSiLU,
    "subclass, unchanged": SameSiLU,
}
