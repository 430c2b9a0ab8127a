"""An experts implementation for Transformers, one line to switch on.

::

    moekit.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moekit")
    # or, on a model that is loaded already: model.set_experts_implementation("moekit")

Every class that Transformers decorates with ``use_experts_implementation`` works. Experts whose gate is provably moekit's
one formula run fused, as :func:`moekit.experts`; any other gate, and one that somebody hooked or patched, runs through
the model's own ``_apply_gate`` between moekit's permutation and grouped products, and says so once at INFO. What is kept
for backward is set with ``moekit.hf.register(save="fp8")``. FP8 checkpoints run in the bytes they have.

:func:`pack` packs a model's experts in 4 or 8 bits, :func:`load` does so while it reads them, :func:`unpack` undoes it.

LoRA of PEFT on experts (``target_parameters``) reaches :func:`moekit.experts` as its two factors, beside dense weights and
packed ones: :mod:`moekit.hf.peft`.

With ``DistributedConfig(ep_size=..., ep_implementation="moekit")`` moekit brings the tokens to experts on other ranks,
whatever implementation they have: :mod:`moekit.hf.ep`.

:func:`fix_aux_loss` makes a model's auxiliary loss one of what its routers chose; ``moekit.hf.routers.spec_of`` reads a
router as arguments of :func:`moekit.route`.
"""

from __future__ import annotations

from typing import Any

from moekit.hf import routers
from moekit.hf._register import register, unregister
from moekit.hf.aux_loss import fix_aux_loss
from moekit.hf.experts import _said as _said
from moekit.hf.experts import experts_forward
from moekit.hf.fp8 import fp8_experts_forward
from moekit.hf.pack import PackReport, load, pack, unpack

__all__ = [
    "PackReport",
    "experts_forward",
    "fix_aux_loss",
    "fp8_experts_forward",
    "load",
    "pack",
    "register",
    "replay",
    "routers",
    "unpack",
    "unregister",
]


def replay(model: Any) -> Any:
    """Record and replay of the choices of a Transformers model's routers: :class:`moekit.Replay`, of any model."""
    from moekit.replay import Replay

    return Replay(model)
