"""moekit: everything between a Mixture-of-Experts router and its expert matrix multiplications, in pure Python.

Names load on first use, so ``import moekit`` costs little more than ``import torch``. Letters in shapes: T tokens, E
experts, K experts per token, R rows after permutation, H hidden, I intermediate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekit._backend import available, backend, debug
    from moekit._pages import keep_pages
    from moekit.choices import Choices
    from moekit.ops.aux_loss import aux_loss
    from moekit.ops.balance import balance_loss, sequence_balance_loss
    from moekit.ops.experts import experts
    from moekit.ops.glu import glu
    from moekit.ops.grouped_linear import grouped_linear
    from moekit.ops.lora import Lora
    from moekit.ops.losses import get_capacity, load_balancing_loss, z_loss
    from moekit.ops.route import route
    from moekit.ops.rows import permute, sort_chunks, unpermute
    from moekit.ops.topk import topk_router
    from moekit.packed import PackedExperts, merge, pack
    from moekit.replay import Replay
    from moekit.routing import Routing

__version__ = "0.1.0"

_HOME = {
    "Choices": "moekit.choices",
    "Lora": "moekit.ops.lora",
    "PackedExperts": "moekit.packed",
    "Replay": "moekit.replay",
    "Routing": "moekit.routing",
    "aux_loss": "moekit.ops.aux_loss",
    "available": "moekit._backend",
    "balance_loss": "moekit.ops.balance",
    "backend": "moekit._backend",
    "debug": "moekit._backend",
    "experts": "moekit.ops.experts",
    "get_capacity": "moekit.ops.losses",
    "glu": "moekit.ops.glu",
    "grouped_linear": "moekit.ops.grouped_linear",
    "keep_pages": "moekit._pages",
    "load_balancing_loss": "moekit.ops.losses",
    "merge": "moekit.packed",
    "pack": "moekit.packed",
    "permute": "moekit.ops.rows",
    "route": "moekit.ops.route",
    "sequence_balance_loss": "moekit.ops.balance",
    "sort_chunks": "moekit.ops.rows",
    "topk_router": "moekit.ops.topk",
    "unpermute": "moekit.ops.rows",
    "z_loss": "moekit.ops.losses",
}

__all__ = [
    "Choices",
    "Lora",
    "PackedExperts",
    "Replay",
    "Routing",
    "aux_loss",
    "available",
    "backend",
    "balance_loss",
    "debug",
    "experts",
    "get_capacity",
    "glu",
    "grouped_linear",
    "keep_pages",
    "load_balancing_loss",
    "merge",
    "pack",
    "permute",
    "route",
    "sequence_balance_loss",
    "sort_chunks",
    "topk_router",
    "unpermute",
    "z_loss",
]


_MODULES = ("compat", "ep", "hf", "megatron", "moe_utils", "monitor", "nn", "plan")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"moekit.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'moekit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
