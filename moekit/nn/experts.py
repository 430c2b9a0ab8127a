"""The routed experts' weights."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moekit import _check
from moekit.ops._activations import make_glu
from moekit.ops.experts import SAVES, experts
from moekit.routing import Routing

_OP = "nn.Experts"
WEIGHTS = ("gate_up", "down", "gate_up_bias", "down_bias")


class Experts(nn.Module):
    """E gated MLPs, of which each token goes through those of its routing: :func:`moekit.experts` with its weights.

    Args:
        num_experts: E.
        hidden: H.
        intermediate: I, the width of one expert.
        activation: this and the following down to ``layout`` as in :func:`moekit.glu`.
        alpha: as there.
        linear_offset: as there.
        clamp: as there; after the bias.
        layout: as there. ``interleaved`` and ``concatenated`` say how gate and up stand in ``gate_up``.
        bias: have ``gate_up_bias`` and ``down_bias``.
        weight_after_down: as in :func:`moekit.experts`.
        save: what to keep for backward, as in :func:`moekit.experts`.
        batch_invariant: as there: a token's output has the same bits in any batch.
        dtype: of the parameters.
        device: of the parameters.

    Attributes:
        gate_up: ``[E, 2I, H]`` (``[E, I, H]`` if ``layout="ungated"``).
        down: ``[E, H, I]``.
        gate_up_bias: ``[E, 2I]`` or None.
        down_bias: ``[E, H]`` or None.
        sharding: under expert parallelism (:mod:`moekit.ep`) the ranks over which these are sharded, as DTensors; else None.

    Raises:
        ValueError: sizes or options that do not fit together, or an option that would have no effect.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    is_transposed = False  # PEFT asks how weights are stored

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        activation: str = "silu",
        alpha: float | None = None,
        linear_offset: float = 0.0,
        clamp: float | None = None,
        layout: str = "concatenated",
        bias: bool = False,
        weight_after_down: bool = False,
        save: str = "recompute",
        batch_invariant: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.num_experts = _check.positive(_OP, "num_experts", num_experts)
        self.hidden = _check.positive(_OP, "hidden", hidden)
        self.intermediate = _check.positive(_OP, "intermediate", intermediate)
        self.options = gate_options(_OP, activation, alpha, linear_offset, clamp, layout)
        _check.one_of(_OP, "save", save, SAVES)
        self.weight_after_down, self.save, self.batch_invariant = weight_after_down, save, batch_invariant
        width = self.intermediate * (1 if layout == "ungated" else 2)
        made = {"dtype": dtype, "device": device}
        self.gate_up = nn.Parameter(torch.empty(self.num_experts, width, self.hidden, **made))
        self.down = nn.Parameter(torch.empty(self.num_experts, self.hidden, self.intermediate, **made))
        for name, size in (("gate_up_bias", width), ("down_bias", self.hidden)):
            value = nn.Parameter(torch.empty(self.num_experts, size, **made)) if bias else None
            self.register_parameter(name, value)
        self.sharding: Any = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights as ``nn.Linear`` does, an expert at a time; biases 0."""
        for weight in (self.gate_up, self.down):
            if _check.sharded(weight):
                _placement().fill(weight, draw_uniform)
            else:
                draw_uniform(weight)
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                bias.zero_()

    def forward(
        self,
        x: Tensor,
        routing: Routing | tuple[Tensor, Tensor],
        exchange: Callable[..., Tensor] | None = None,
        lora: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """``[T, H]`` to ``[T, H]``, in the dtype of ``x``; arguments and errors as of :func:`moekit.experts`.

        Weights that are DTensors are used by their placement (:func:`moekit.ep.part`): a shard over experts is a part, and a
        replica is the whole.

        Args:
            x: ``[T, H]``.
            routing: of ``x``, over all experts with an ``exchange``, else over those of this rank.
            exchange: what brings tokens to their ranks and results back, given ``x``, ``routing`` and the experts of this
                rank as a function: :func:`moekit.ep.run` with its dispatcher. It may call them as often as it likes: weights
                are gathered, and their gradients reduced, once.
            lora: adapters, as :func:`moekit.experts` takes them: PEFT's ``target_parameters`` come here by themselves, after
                :func:`moekit.hf.register`.
        """
        weights = {name: getattr(self, name) for name in WEIGHTS}
        if any(map(_check.sharded, weights.values())):
            weights = _placement().parts_of(_OP, weights, self.sharding)
        others = {name: getattr(self, name) for name in ("weight_after_down", "save", "batch_invariant")}
        mine = functools.partial(experts, **weights, **self.options, **others, lora=lora)
        return mine(x, routing) if exchange is None else exchange(x, routing, mine)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: Any) -> None:
        """Whole stacks, of a checkpoint of one process, are taken as well: each rank keeps its part."""
        if self.sharding is not None:
            whole = {name: state_dict.get(prefix + name) for name in WEIGHTS}
            whole = {
                prefix + name: value for name, value in whole.items() if value is not None and not _check.sharded(value)
            }
            state_dict = {**state_dict, **{name: _placement().shard(v, self.sharding.mesh) for name, v in whole.items()}}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        """Sizes, and the options that are not the default."""
        said = [f"num_experts={self.num_experts}", f"hidden={self.hidden}", f"intermediate={self.intermediate}"]
        said += said_gate(self.options)
        said += ["bias=True"] * (self.down_bias is not None) + ["weight_after_down=True"] * self.weight_after_down
        said += ["batch_invariant=True"] * self.batch_invariant
        said += [] if self.sharding is None else [f"ranks={self.sharding.mesh.size()}"]
        return ", ".join(said + ([] if self.save == "recompute" else [f"save={self.save!r}"]))


def gate_options(
    op: str, activation: str, alpha: float | None, linear_offset: float, clamp: float | None, layout: str
) -> dict[str, Any]:
    """The constants of a gate, looked at, as arguments of :func:`moekit.experts`."""
    options = {"activation": activation, "alpha": alpha, "linear_offset": linear_offset, "clamp": clamp, "layout": layout}
    make_glu(**options, clamp_after_bias=True, op=op)
    return options


def said_gate(gate: dict[str, Any]) -> list[str]:
    """The constants that are not the default, but always the activation."""
    plain = {"alpha": None, "linear_offset": 0.0, "clamp": None, "layout": "concatenated"}
    return [f"{name}={value!r}" for name, value in gate.items() if name not in plain or value != plain[name]]


def _placement() -> Any:
    """By name, for it imports torch.distributed."""
    return importlib.import_module("moekit.ep.placement")


def draw_uniform(weight: Tensor, bias: Tensor | None = None) -> None:
    """Numbers as of ``nn.Linear``, by the size of the last dimension."""
    bound = weight.shape[-1] ** -0.5
    weight.uniform_(-bound, bound)
    if bias is not None:
        bias.zero_()
