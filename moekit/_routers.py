"""The routers of a model: where they are, and what a forward of theirs chose.

A router is a :class:`moekit.nn.Router`, or a module of Transformers whose code is known (:mod:`moekit.hf.routers`). What
looks like one and is neither is named, never passed over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekit import _check
from moekit.nn.router import Router
from moekit.routing import Scored

# Parts that wrappers put into the path of a module, and that the names in a checkpoint do not have.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Seen(NamedTuple):
    """What a router chose in a forward, and from what.

    Attributes:
        indices: ``[T, K]``, -1 for none.
        counts: ``[E]``, the slots of each expert, if the router has counted them.
        scored: the logits ``[T, E]``, the name of their score, and the padding.
    """

    indices: Tensor
    counts: Tensor | None
    scored: Scored


@dataclass(frozen=True)
class Found:
    """A router of a model.

    Attributes:
        name: its path in the model, without what wrappers put into it.
        module: the router.
        spec: how to read it (:class:`moekit.hf.routers.RouterSpec`); None for a :class:`moekit.nn.Router`.
    """

    name: str
    module: Any
    spec: Any

    @property
    def expected(self) -> tuple[int, torch.device] | None:
        """E and the device, as they will be in all likelihood; None if there is no telling before the first forward."""
        weight = getattr(self.module, "weight", None)
        return (weight.shape[0], weight.device) if isinstance(weight, Tensor) and weight.dim() == 2 else None

    def seen(self, args: tuple, kwargs: dict[str, Any], output: Any) -> Seen:
        """What a forward chose, from its arguments and its result."""
        if self.spec is None:
            return Seen(output.indices, output.tokens_per_expert, output.scored)
        logits, _, indices = self.spec.unpack(output)
        return Seen(
            indices, None, Scored(logits, self.spec.options(self.module, args, kwargs).get("score", "softmax"), None)
        )


def find(op: str, model: nn.Module) -> tuple[list[Found], list[str]]:
    """The routers of ``model`` in order, and the names of what looks like a router, or has one, and cannot be read.

    Raises:
        TypeError: no module.
        ValueError: there is no router that can be read.
    """
    if not isinstance(model, nn.Module):
        raise _check.wrong_type(op, "model", "a torch.nn.Module", type(model).__name__)
    spec_of = _spec_of()
    found, experts, strange = [], [], []
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    for path, module in model.named_modules():
        parts = path.split(".")[1:] if wrapped else path.split(".")
        name = ".".join(part for part in parts if part not in _WRAPPERS)
        if isinstance(module, Router):
            found.append(Found(name, module, None))
            continue
        spec = spec_of(module)
        if spec is not None:
            found.append(Found(name, module, spec))
        elif hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):  # as Transformers decorates experts
            experts.append(name)
        elif type(module).__module__.startswith("transformers.models.") and "Router" in type(module).__name__:
            strange.append(name)
    names = [router.name for router in found]
    strange = [name for name in strange if not any(_within(other, name) for other in names)]
    unread = strange + [name for name in experts if not _has_router(name, experts, names) and not _beside(name, strange)]
    if not found:
        looks = (
            f"{type(model).__name__}, where these cannot be read: {', '.join(unread)}" if unread else type(model).__name__
        )
        raise _check.fail(op, "model", "one with moekit.nn.Router or routers of Transformers that moekit knows", looks)
    return found, unread


def in_backward() -> bool:
    """Whether a backward is at work in this thread: a forward that runs now is computed again, by checkpointing."""
    return torch._C._current_graph_task_id() != -1


class Hook:
    """A hook of a module that stays behind when the module is copied or pickled: the copy has one that does nothing."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple]:
        return _inert, ()


def _inert() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: Any) -> None:
    return None


def _spec_of() -> Callable[[nn.Module], Any]:
    """``spec_of`` of Transformers' routers, where Transformers has been loaded: without it there are none."""
    if "transformers" not in sys.modules:
        return _do_nothing
    from moekit.hf.routers import spec_of

    return spec_of


def _within(name: str, ancestor: str) -> bool:
    return not ancestor or name == ancestor or name.startswith(ancestor + ".")


def _beside(name: str, others: list[str]) -> bool:
    """Whether one of the others stands in the block of ``name``, or in the layer around it."""
    block = name.rpartition(".")[0]
    return any(_within(other, block) for other in others)


def _has_router(experts: str, all_experts: list[str], routers: list[str]) -> bool:
    """Whether the smallest module around ``experts`` with any router in it has one for each of the experts in it."""
    around = experts
    while around:
        around = around.rpartition(".")[0]
        inside = sum(_within(name, around) for name in routers)
        if inside:
            return inside >= sum(_within(name, around) for name in all_experts)
    return False
