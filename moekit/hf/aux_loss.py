"""The auxiliary loss of a model of Transformers, computed from what its routers chose.

With ``output_router_logits``, Transformers' models add ``load_balancing_loss_func(router_logits, ...)`` to their loss. It
takes softmax and top-k of the logits anew, so for a router that scores by a sigmoid, has a selection bias or groups, or
whose choice is replayed, it counts experts that nobody went to. :func:`fix_aux_loss` puts hooks on one model that note
what each router chose and put the loss of that in its place.

Nothing is guessed: a model's loss is known by the statements of its forward and the digest of what they call, its routers
by :func:`moekit.hf.routers.spec_of`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekit import _check
from moekit.hf.gates import digest
from moekit.hf.routers import spec_of
from moekit.ops import tables
from moekit.ops.balance import score_sums
from moekit.routing import Scored

_OP = "hf.fix_aux_loss"
_FIXED = "_moekit_aux_loss"  # the attribute by which a fixed model is known
# load_balancing_loss_func of Transformers 5.24 and 5.12: E * sum_e mean(chosen) * mean(softmax), all layers together.
_KNOWN_LOSSES = ("e8903c45c385c339", "6a91f20d9347ed4e")
_STATEMENT = re.compile(
    r"if output_router_logits:\n"
    r"    aux_loss = load_balancing_loss_func\(outputs\.router_logits, self\.[\w.]+, self\.[\w.]+, attention_mask\)\n"
    r"    if labels is not None:\n"
    r"        loss \+= self\.([\w.]+) \* aux_loss\.to\(loss\.device\)"
)


class _Loss(NamedTuple):
    """The auxiliary loss of a fixed model."""

    routers: tuple[nn.Module, ...]  # whose logits it is of
    coefficient: str  # an attribute of the model


class AuxLossFix:
    """What :func:`fix_aux_loss` did to a model. As a context manager it leaves the model as it was found."""

    def __init__(self, owners: list[nn.Module], fixed: list[nn.Module]) -> None:
        self._owners, self._fixed = owners, fixed

    def remove(self) -> None:
        """Give the model its own loss back; once more does nothing."""
        for owner in self._owners:
            _take_off(owner)

    def __enter__(self) -> AuxLossFix:
        return self

    def __exit__(self, *error: object) -> None:
        for owner in self._fixed:
            _take_off(owner)


def fix_aux_loss(model: nn.Module) -> AuxLossFix:
    """Compute the ``output_router_logits`` loss of this model from what its routers chose.

    ``aux_loss`` becomes ``E * sum_e (c_e / N) * (P_e / N)`` over all routers together, as in Transformers (the loss of the
    Switch Transformer, arXiv 2101.03961, times K): ``c_e`` slots that went to expert e, ``P_e`` the sum of its scores,
    which sum to one a token (a sigmoid's are divided by their sum, as in DeepSeek-V3, arXiv 2412.19437), N tokens times
    routers; tokens where ``attention_mask`` is 0 are left out. ``loss`` changes with it by the model's own coefficient.
    Where the original is right (softmax without bias and groups) both stay what they were, to rounding.

    Only this instance changes. Wrap it (DDP, FSDP, PEFT, Accelerate) before or after; copies of it are fixed too. A model
    that is fixed already stays as it is. Non-reentrant activation checkpointing works; what is recomputed is not noted.

    Args:
        model: a model of Transformers with such a loss, or anything that contains some.

    Returns:
        a handle with ``remove()``, also a context manager.

    Raises:
        ValueError: no such loss in ``model``, a router in it that moekit does not know, or no router at all. Later, by the
            forward: a router that was patched or replaced since, or logits without a graph (reentrant checkpointing).
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise _check.wrong_type(_OP, "model", "a torch.nn.Module", type(model).__name__)
    coefficients = {module: _coefficient(module) for module in model.modules()}
    owners = [module for module, coefficient in coefficients.items() if coefficient is not None]
    if not owners:
        wanted = "one that adds load_balancing_loss_func to its loss as Transformers' causal models do"
        raise _check.fail(_OP, "model", wanted, type(model).__name__)
    new = [owner for owner in owners if _FIXED not in vars(owner)]
    losses = [_Loss(_known_routers(owner), coefficients[owner] or "") for owner in new]  # before the first is touched
    for owner, loss in zip(new, losses, strict=True):
        setattr(owner, _FIXED, loss)
        owner.register_forward_pre_hook(_begin, with_kwargs=True)
        owner.register_forward_hook(_finish, with_kwargs=True, always_call=True)
        for router in loss.routers:
            router.register_forward_hook(_note, with_kwargs=True)
    return AuxLossFix(owners, new)


def _take_off(owner: nn.Module) -> None:
    """Remove every hook that was put there for ``owner``."""
    loss = vars(owner).pop(_FIXED, None)
    for module in (owner, *loss.routers) if loss is not None else ():
        hooks = (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
        pre_hooks = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        for tables_of_hooks in (hooks, pre_hooks):
            for number in [n for n, hook in tables_of_hooks[0].items() if hook in (_begin, _finish, _note)]:
                for table in tables_of_hooks:
                    table.pop(number, None)


# --- what a model is ------------------------------------------------------------------------------------------------


def _coefficient(owner: nn.Module) -> str | None:
    """The attribute of ``owner`` by which its auxiliary loss is multiplied, None where it has no loss of a known form."""
    forward: Any = vars(owner).get("forward", type(owner).forward)
    function = inspect.unwrap(getattr(forward, "__func__", forward))
    if type(function) is not FunctionType or "load_balancing_loss_func" not in function.__code__.co_names:
        return None
    loss = function.__globals__.get("load_balancing_loss_func")
    return _read(function) if type(loss) is FunctionType and digest(loss) in _KNOWN_LOSSES else None


@functools.lru_cache(maxsize=64)
def _read(function: FunctionType) -> str | None:
    """The coefficient in the source of a model's forward, if that is written as Transformers' are."""
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function.__code__))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(definition, ast.FunctionDef):
        return None
    found = [match[1] for statement in definition.body if (match := _STATEMENT.fullmatch(ast.unparse(statement)))]
    nodes = [*ast.walk(definition)]
    stored = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    returned = [node.value for node in nodes if isinstance(node, ast.Return)]
    as_given = "attention_mask" not in stored and "labels" not in stored and stored.count("aux_loss") == 2
    return found[0] if len(found) == 1 and as_given and len(returned) == 1 and _hands_out(returned[0]) else None


def _hands_out(returned: ast.expr | None) -> bool:
    """Whether the output has ``loss=loss`` and ``aux_loss=aux_loss``."""
    keywords = {k.arg: ast.unparse(k.value) for k in returned.keywords} if isinstance(returned, ast.Call) else {}
    return keywords.get("loss") == "loss" and keywords.get("aux_loss") == "aux_loss"


def _known_routers(owner: nn.Module) -> tuple[nn.Module, ...]:
    """The modules whose logits the loss of ``owner`` is of, each a router that is known."""
    found = [*_recorded(owner, type(owner).__name__, _recorders(owner))]
    if not found:
        raise _check.fail(_OP, "model", "one with routers", f"{type(owner).__name__} without one")
    for name, module in found:
        if spec_of(module) is None:
            wanted = "one whose routers moekit knows (moekit.hf.routers)"
            raise _check.fail(_OP, "model", wanted, f"{name}, a {type(module).__name__}")
    return tuple(module for _, module in found)


def _recorders(module: nn.Module) -> list[Any]:
    recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
    return recorders if isinstance(recorders, list) else [recorders]


def _recorded(module: nn.Module, name: str, recorders: list[Any]) -> Iterator[tuple[str, nn.Module]]:
    """What Transformers records as router logits: as its own walk, each model in a model has recorders of its own."""
    from transformers import PreTrainedModel

    for child_name, child in module.named_children():
        inner = _recorders(child) if isinstance(child, PreTrainedModel) else recorders
        yield from _recorded(child, f"{name}.{child_name}", inner)
    for recorder in recorders:
        kind, layer = getattr(recorder, "target_class", recorder), getattr(recorder, "layer_name", None)
        if isinstance(kind, type) and isinstance(module, kind) and (layer is None or f".{layer.strip('.')}." in f"{name}."):
            yield name, module


# --- hooks: functions, so that a copied or saved model has them too -------------------------------------------------


class _Note(NamedTuple):
    """What a router chose in this forward."""

    logits: Tensor  # [T, E]
    indices: Tensor  # [T, K]
    score: str
    trained: bool


class _Forward(NamedTuple):
    """The forward of a model that is under way."""

    owner: nn.Module
    as_tuple: bool
    notes: list[_Note]


class _UnderWay(threading.local):
    """Of each thread: a backward that recomputes in a thread of its own finds nothing here."""

    def __init__(self) -> None:
        self.forwards: list[_Forward] = []


_under_way = _UnderWay()


def _begin(owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    for router in vars(owner)[_FIXED].routers:
        _move_to_end(router)
    asked = kwargs.get("return_dict")
    as_tuple = not (getattr(getattr(owner, "config", None), "return_dict", True) if asked is None else asked)
    # One that an interrupt left behind goes.
    _under_way.forwards[:] = [forward for forward in _under_way.forwards if forward.owner is not owner]
    _under_way.forwards.append(_Forward(owner, as_tuple, []))
    return args, {**kwargs, "return_dict": True} if as_tuple else kwargs


def _move_to_end(router: nn.Module) -> None:
    """A hook that came later may put another choice into the output (a replay): it has to come before."""
    hooks = router._forward_hooks
    if hooks and next(reversed(hooks.values())) is not _note:
        for number in [number for number, hook in hooks.items() if hook is _note]:
            hooks[number] = hooks.pop(number)


def _note(router: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    if not _under_way.forwards:  # recomputed, or called by itself
        return
    spec = spec_of(router)
    if spec is None:
        raise _check.fail(_OP, "a router", "as it was when the model was fixed", f"a patched {type(router).__name__}")
    logits, _, indices = spec.unpack(output)
    score = spec.options(router, args, kwargs).get("score", "softmax")
    trained = any(parameter.requires_grad for parameter in router.parameters())
    _under_way.forwards[-1].notes.append(_Note(logits, indices, score, trained))


def _finish(owner: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    while _under_way.forwards:
        forward = _under_way.forwards.pop()
        if forward.owner is owner:
            break
    else:
        return output
    if output is None:  # the forward failed
        return None
    theirs = output.aux_loss
    if isinstance(theirs, Tensor):
        _check_notes(owner, forward.notes, output)
        mask = _argument(owner, args, kwargs, "attention_mask")
        ours = loss_of_choices(forward.notes, mask).to(theirs)
        output["aux_loss"] = ours
        if _argument(owner, args, kwargs, "labels") is not None:
            # Theirs is taken out again: its gradients cancel where they meet, at the loss itself, and are 0 beyond.
            coefficient: Any = functools.reduce(getattr, vars(owner)[_FIXED].coefficient.split("."), owner)
            output["loss"] = output.loss + (coefficient * (ours - theirs)).to(output.loss.device)
    return output.to_tuple() if forward.as_tuple else output


def _check_notes(owner: nn.Module, notes: list[_Note], output: Any) -> None:
    recorded = getattr(output, "router_logits", None)
    routers = len(vars(owner)[_FIXED].routers)
    if len(notes) < routers or (recorded is not None and len(notes) != len(recorded)):
        wanted = f"those of {type(owner).__name__} when it was fixed ({routers})"
        raise _check.fail(_OP, "the routers", wanted, f"{len(notes)} choices of them; fix the model again")
    if torch.is_grad_enabled() and any(note.trained and not note.logits.requires_grad for note in notes):
        wanted = 'non-reentrant (gradient_checkpointing_kwargs={"use_reentrant": False})'
        raise _check.fail(_OP, "activation checkpointing", wanted, "logits without a graph")


def _argument(owner: nn.Module, args: tuple, kwargs: dict[str, Any], name: str) -> Any:
    """The argument ``name`` of the owner's forward, by name or by position."""
    if name in kwargs:
        return kwargs[name]
    names = [*_parameters(inspect.unwrap(type(owner).forward))]
    position = names.index(name) - 1
    return args[position] if position < len(args) else None


@functools.lru_cache(maxsize=64)
def _parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


# --- the loss -------------------------------------------------------------------------------------------------------


def loss_of_choices(notes: list[_Note], attention_mask: Tensor | None) -> Tensor:
    """The loss of all routers together, 0-d, on the device of the first, differentiable with respect to their logits.

    Args:
        notes: what the routers chose, of one number of experts.
        attention_mask: T numbers of whatever shape, 0 for tokens to leave out; None for none.
    """
    device, experts = notes[0].logits.device, notes[0].logits.shape[1]
    counts: list[Tensor] = []
    sums: list[Tensor] = []
    for logits, indices, score, _ in notes:
        padding = None
        if attention_mask is not None:
            padding = attention_mask.reshape(-1).to(logits.device) == 0
            indices = indices.masked_fill(padding.unsqueeze(1), -1)
        counts.append(tables.route_indices(indices, experts)[0].to(device))
        sums.append(score_sums(Scored(logits, score, padding)).to(device))
    tokens = sum(note.logits.shape[0] for note in notes)
    number: Any = tokens if attention_mask is None else (attention_mask != 0).sum().to(device) * len(notes)
    scores = torch.stack(sums).sum(0)
    return (torch.stack(counts).sum(0).to(scores.dtype) / number * (scores / number)).sum() * experts
