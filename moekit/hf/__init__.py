"""An experts implementation for Transformers, one line to switch on.

::

    moekit.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moekit")
    # or, on a model that is loaded already: model.set_experts_implementation("moekit")

Every class that Transformers decorates with ``use_experts_implementation`` works. Experts whose gate is provably moekit's
one formula run fused, as :func:`moekit.experts`; any other gate, and one that somebody hooked or patched, runs through
the model's own ``_apply_gate`` between moekit's permutation and grouped products, and says so once at INFO. What is kept
for backward is set with ``moekit.hf.register(save="fp8")``. FP8 checkpoints run with their weights dequantised.

:func:`fix_aux_loss` makes a model's auxiliary loss one of what its routers chose; ``moekit.hf.routers.spec_of`` reads a
router as arguments of :func:`moekit.route`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from moekit import _check
from moekit.hf import gates, peft, routers
from moekit.hf.aux_loss import fix_aux_loss
from moekit.hf.experts import _said as _said
from moekit.hf.experts import experts_forward
from moekit.hf.fp8 import fp8_experts_forward
from moekit.ops.experts import SAVES

__all__ = ["experts_forward", "fix_aux_loss", "fp8_experts_forward", "register", "replay", "routers", "unregister"]

NAME = "moekit"
SUPPORTED = "5.12 to 5.x"


def register(save: str = "recompute") -> None:
    """Put the experts implementation ``"moekit"`` into Transformers' experts interfaces.

    Args:
        save: what the fused experts keep for backward, as in :func:`moekit.experts`.

    Raises:
        ImportError: Transformers is not installed, or a release without an experts interface.
        ValueError: an unknown ``save``.
    """
    _check.one_of("hf.register", "save", save, SAVES)
    plain, fp8 = _interfaces()
    gates.learn_transformers(importlib.import_module("transformers.activations"))
    plain.register(NAME, functools.partial(experts_forward, save=save))
    if fp8 is not None:
        fp8.register(NAME, functools.partial(fp8_experts_forward, save=save))
    peft.hook()


def unregister() -> None:
    """Take the implementation out again; models that use it must be set to another one first."""
    for interface in _interfaces():
        if interface is not None:
            interface._global_mapping.pop(NAME, None)
    peft.unhook()


def replay(model: Any) -> Any:
    """Record and replay of the choices of a Transformers model's routers: :class:`moekit.Replay`, of any model."""
    from moekit.replay import Replay

    return Replay(model)


def _interfaces() -> tuple[Any, Any]:
    """The interface of experts, and the one of FP8 experts (None in a release that has none)."""
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            f"moekit.hf needs Transformers {SUPPORTED} (its experts interface): pip install 'moekit[hf]'"
        ) from error
    from transformers.integrations import finegrained_fp8

    return ExpertsInterface, getattr(finegrained_fp8, "FP8ExpertsInterface", None)
