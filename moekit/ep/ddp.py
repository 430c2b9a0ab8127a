"""What ``DistributedDataParallel`` cannot take: experts that are sharded, and packed ones, whose bytes it cannot send."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moekit import _check
from moekit.ep._agree import agree
from moekit.ep._faults import named
from moekit.ep._ranks import process_group
from moekit.ep.placement import Sharding
from moekit.packed import PackedExperts

_OP = "ep.hide_from_ddp"
_TOLD = "_moekit_hidden_from_ddp"  # of a module: the names that DDP was told of, by kind


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the experts that are sharded, by :func:`parallelize` or by :func:`moekit.ep.shard_parameters`.

    They are what ``fully_shard(..., ignored_params=)`` has to leave where it shards over the same ranks, and what needs a
    group of its own in an optimiser that is fused.
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "sharding", None), Sharding):
            yield from module.named_parameters(name)


def hide_from_ddp(model: nn.Module, group: dist.ProcessGroup | DeviceMesh | None = None) -> tuple[str, ...]:
    """Have ``DistributedDataParallel`` leave sharded and packed experts alone, around ``model`` or around a part of it.

    Without it DDP refuses the model: it sends all ranks what the first one has, and can send neither. Packed experts are
    sent here, as bytes, so that all ranks have the same. Call it just before DDP, on what DDP is given (with PEFT's
    adapters in it, as they change names), and again if that has changed. :func:`parallelize` has told DDP of the experts
    that it sharded, around its model.

    Args:
        model: what DDP will be given.
        group: the ranks that are to have the same packed experts, all of which have to call; None: the default group. In a
            process on its own, without a group, nothing is sent, and nothing is where nothing is packed.

    Returns:
        the names of what DDP leaves alone.

    Raises:
        TypeError: no module, or no group.
        ValueError: packed experts of other names, shapes or formats on some ranks, or without memory (on ``meta``): on all
            ranks, with nothing sent. Or a mesh of more than one dimension.
        RuntimeError: a rank that does not take part, or ``torchrun``'s without ``init_process_group``.
    """
    if not isinstance(model, nn.Module):
        raise _check.wrong_type(_OP, "model", "a torch.nn.Module", type(model).__name__)
    packed, everybody = dict(_packed(model)), dist.group.WORLD if group is None else process_group(_OP, group)
    if packed and everybody is not None:
        _make_equal(packed, everybody)
    elif packed and dist.is_torchelastic_launched():
        raise RuntimeError(f"moekit.{_OP}: to send packed experts call torch.distributed.init_process_group first")
    return (*hide_sharded(model), *hide_packed(model))


def hide_sharded(model: nn.Module) -> tuple[str, ...]:
    """The same of sharded experts alone, for which nothing has to be sent."""
    return _hide(model, "sharded", expert_parameters)


def hide_packed(model: nn.Module) -> tuple[str, ...]:
    """The same of packed ones alone, with nothing sent: for those whose names are others now, or that are not packed now."""
    return _hide(model, "packed", _packed)


def _packed(model: nn.Module) -> Iterator[tuple[str, PackedExperts]]:
    """Names and weights of packed experts, each of which is whole on every rank."""
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if isinstance(value, PackedExperts):
            yield name, value


def _hide(model: nn.Module, kind: str, some: Callable[[nn.Module], Iterable[tuple[str, Any]]]) -> tuple[str, ...]:
    """Tell DDP around ``model``, or around any part of it, of ``some`` of its parameters and buffers; their names.

    What it was told of before, of the same kind, and what others told it, is kept apart.
    """
    for module in model.modules():
        names, told = {name for name, _ in some(module)}, getattr(module, _TOLD, {})
        if names or told.get(kind):
            others = {*getattr(module, "_ddp_params_and_buffers_to_ignore", ())} - told.get(kind, set())
            setattr(module, _TOLD, told | {kind: names})
            ignored = sorted(others | names)
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    return tuple(name for name, _ in some(model))


def _make_equal(weights: Mapping[str, PackedExperts], group: dist.ProcessGroup) -> None:
    """Give all ranks the bytes of the first one; the others' are written over."""
    kinds = {f"weight {name}": _kind(weight) for name, weight in weights.items()}
    agree(_OP, group, weights=len(weights), **kinds)
    for name, weight in weights.items():
        if weight.is_meta:
            raise _check.fail(_OP, name, "in memory", "a weight on meta")
    with named(_OP, group):
        for _, weight in sorted(weights.items()):  # ranks may have registered them in any order
            send(weight, group, 0)


def _kind(weight: PackedExperts) -> tuple:
    stored = weight.stored()
    scales = tuple((tuple(scale.shape), scale.dtype) for scale in stored.scales)
    whole = (weight.format, tuple(weight.shape), weight.dtype, weight.turned, weight.device.type)
    return (*whole, stored.block, scales)


def send(tensor: Tensor, group: dist.ProcessGroup, source: int) -> None:
    """What the rank ``source`` of a group has becomes what all have, in place; packed weights as the bytes that they are."""
    stored = tensor.stored() if isinstance(tensor, PackedExperts) else None
    pieces = [tensor] if stored is None else [stored.codes, *stored.scales]
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        for piece in pieces:
            # Not every backend knows dtypes of one byte, such as float8.
            plain = piece.detach().view(torch.uint8) if stored is not None and piece.itemsize == 1 else piece.detach()
            dist.broadcast(plain, group=group, group_src=source)
