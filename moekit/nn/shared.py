"""The expert that every token goes through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moekit import _check
from moekit.nn.experts import draw_uniform, gate_options, said_gate
from moekit.ops.glu import glu

_OP = "nn.SharedExpert"


class SharedExpert(nn.Module):
    """A gated MLP for every token (DeepSeekMoE, arXiv 2401.06066), its gated activation as of :func:`moekit.glu`.

    Args:
        hidden: H.
        intermediate: I.
        activation: this and the following down to ``layout`` as in :func:`moekit.nn.Experts`.
        alpha: as there.
        linear_offset: as there.
        clamp: as there.
        layout: as there.
        bias: have ``gate_up_bias`` and ``down_bias``.
        gate: multiply the output by ``sigmoid(gate . x)``, one number a token (Qwen2-MoE).
        dtype: of the parameters.
        device: of the parameters.

    Attributes:
        gate_up: ``[2I, H]`` (``[I, H]`` if ``layout="ungated"``).
        down: ``[H, I]``.
        gate_up_bias: ``[2I]`` or None.
        down_bias: ``[H]`` or None.
        gate: ``[1, H]`` or None.

    Raises:
        ValueError: sizes or options that do not fit together, or an option that would have no effect.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate: Tensor | None

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        activation: str = "silu",
        alpha: float | None = None,
        linear_offset: float = 0.0,
        clamp: float | None = None,
        layout: str = "concatenated",
        bias: bool = False,
        gate: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.hidden = _check.positive(_OP, "hidden", hidden)
        self.intermediate = _check.positive(_OP, "intermediate", intermediate)
        self.options = gate_options(_OP, activation, alpha, linear_offset, clamp, layout)
        width = self.intermediate * (1 if layout == "ungated" else 2)
        made = {"dtype": dtype, "device": device}
        self.gate_up = nn.Parameter(torch.empty(width, self.hidden, **made))
        self.down = nn.Parameter(torch.empty(self.hidden, self.intermediate, **made))
        for name, shape, wanted in (
            ("gate_up_bias", (width,), bias),
            ("down_bias", (self.hidden,), bias),
            ("gate", (1, self.hidden), gate),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **made)) if wanted else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights as ``nn.Linear`` does; biases 0."""
        draw_uniform(self.gate_up, self.gate_up_bias)
        draw_uniform(self.down, self.down_bias)
        if self.gate is not None:
            draw_uniform(self.gate, None)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``, in the dtype of ``x`` (of autocast, where it is on)."""
        projected = functional.linear(x, self.gate_up)
        share = None if self.gate is None else torch.sigmoid(functional.linear(x, self.gate))
        after = self.down_bias is not None  # the bias is multiplied too, so the product comes last
        clamped = self.options["clamp"] is not None
        weights = None if after else share
        act = glu(projected, weights, bias=self.gate_up_bias, clamp_after_bias=clamped, **self.options)
        out = functional.linear(act, self.down, self.down_bias)
        return out * share if after and share is not None else out

    def extra_repr(self) -> str:
        """Sizes, and the options that are not the default."""
        said = [f"hidden={self.hidden}", f"intermediate={self.intermediate}", *said_gate(self.options)]
        return ", ".join(said + ["bias=True"] * (self.down_bias is not None) + ["gate=True"] * (self.gate is not None))
