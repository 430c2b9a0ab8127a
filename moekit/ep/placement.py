"""Experts' weights by their placement: a shard over experts is this rank's part, a replica is the whole.

Weights are DTensors, so that optimisers, checkpoints and FSDP2 know what each rank has; operators take plain tensors. The
way from one to the other is here, and with it what happens to the gradient on the way back (:mod:`moekit.ep.gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moekit import _check
from moekit.ep._ranks import one_dimensional
from moekit.ep.gradients import Reduction

_SHARD_HOW = "moekit.ep.shard(weight, mesh['ep'])"


@dataclass(frozen=True)
class Sharding:
    """How a layer's experts are spread over ranks, and what is done to their gradients.

    Attributes:
        mesh: the ranks that share the experts; one dimension.
        reduction: of gradients.
    """

    mesh: DeviceMesh
    reduction: Reduction

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        return self  # a copy of a layer has the same ranks


@torch.no_grad()
def shard(weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """The part of a stack of experts that this rank has, as a DTensor.

    Nothing is sent: each rank keeps its slice of what it has, so that ranks which hold different numbers do not notice.

    Args:
        weight: ``[E, ...]``: a weight, a bias, a factor of an adapter, or a :class:`moekit.PackedExperts`.
        mesh: N ranks, one dimension.

    Returns:
        A DTensor ``[E, ...]`` with ``Shard(0)``, of which this rank holds ``[E/N, ...]``, a copy; a parameter, and one that
        requires a gradient, if ``weight`` was.

    Raises:
        ValueError: E is no multiple of N. TypeError: no tensor, or one that is sharded already.
    """
    op = "ep.shard"
    _check.tensor(op, "weight", weight)
    if isinstance(weight, DTensor):
        raise _check.wrong_type(op, "weight", "a plain tensor, which is sharded once", f"a DTensor {weight.placements}")
    ranks = one_dimensional(op, "mesh", mesh).size()
    if weight.dim() == 0 or weight.shape[0] == 0 or weight.shape[0] % ranks:
        raise _check.fail(op, "weight", f"of as many experts as a multiple of the {ranks} ranks", list(weight.shape))
    part = weight.detach().split(weight.shape[0] // ranks)[mesh.get_local_rank()].clone()
    made = DTensor.from_local(part, mesh, (Shard(0),), run_check=False)
    return nn.Parameter(made, weight.requires_grad) if isinstance(weight, nn.Parameter) else made


def shard_parameters(module: nn.Module, mesh: DeviceMesh) -> None:
    """:func:`shard` all parameters of a module of one's own that holds experts, adapters' factors among them, in place.

    Its forward takes them by :func:`part`. For :class:`moekit.nn.MoE` there is :func:`moekit.ep.parallelize`.

    Raises:
        ValueError: a parameter whose first dimension is no multiple of the ranks. TypeError: one that is sharded already.
            Nothing has been changed then.
    """
    shard_together([module], Sharding(mesh, Reduction(mesh)))


def shard_together(modules: Sequence[nn.Module], sharding: Sharding) -> None:
    """Shard the parameters of several modules; one that they share, or that has two names, is still one."""
    parts: dict[int, Any] = {}
    made: list[tuple[nn.Module, str, Any]] = []
    for owner in nn.ModuleList(modules).modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in parts:
                parts[id(parameter)] = shard(parameter, sharding.mesh)
            made.append((owner, name, parts[id(parameter)]))
    for owner, name, part in made:
        owner.register_parameter(name, part)
    for module in modules:
        setattr(module, "sharding", sharding)  # noqa: B010 - an attribute that modules do not declare


def part(weight: Tensor, *, data_parallel: DeviceMesh | None = None, reduction: str = "mean") -> Tensor:
    """What this rank has of a weight, for :func:`moekit.experts` and other operators in one's own modules.

    ::

        gate_up, down = moekit.ep.part(self.gate_up), moekit.ep.part(self.down)  # once a forward
        out = moekit.ep.run(dispatcher, x, routing, lambda rows, mine: moekit.experts(rows, mine, gate_up, down))

    The gradient of a part has been summed over the batches of all ranks of the mesh, as it arrives. With
    ``reduction="mean"`` it is divided by their number, which makes it what a gradient is that data parallelism averages.

    Args:
        weight: a DTensor over a mesh of one dimension, ``Shard(0)`` or ``Replicate()``; a plain tensor is given back.
        data_parallel: ranks with the same part and other batches, over which its gradient is reduced in backward. None where
            FSDP2 does that, or where there are none.
        reduction: ``"mean"``: a rank's loss is a mean over its own tokens, and gradients are averaged over ranks, as DDP and
            FSDP2 do; ``"sum"``: losses add up, and so do gradients.

    Returns:
        the local tensor. The gradient of a replica is this rank's own, as that of a plain parameter.

    Raises:
        ValueError: another placement, with what to do about it.
    """
    if not isinstance(weight, DTensor):
        _check.tensor("ep.part", "weight", weight)
        return weight
    return _local("ep.part", "weight", weight, Reduction.of("ep.part", weight.device_mesh, data_parallel, reduction))


def parts_of(op: str, weights: Mapping[str, Tensor | None], sharding: Sharding | None) -> dict[str, Tensor | None]:
    """The local tensors of a module's weights, those that are plain as they are."""
    mesh, reduction = (None, None) if sharding is None else (sharding.mesh, sharding.reduction)
    return {name: None if value is None else _local(op, name, value, reduction, mesh) for name, value in weights.items()}


def _local(op: str, name: str, weight: Tensor, reduction: Reduction | None, mesh: DeviceMesh | None = None) -> Tensor:
    """The local tensor of a weight, by its placement.

    Args:
        op: whose, for errors.
        name: of the weight.
        weight: a DTensor.
        reduction: of the gradient of a part; None: the mean over the ranks of its mesh.
        mesh: the only one over which it may be a part; any if None.
    """
    if not isinstance(weight, DTensor):
        return weight
    over, placements = weight.device_mesh, weight.placements
    if over.ndim == 1 and placements == (Replicate(),) and mesh is None:
        return weight.to_local()
    if over.ndim == 1 and placements == (Shard(0),) and (mesh is None or over == mesh):
        found = weight.to_local()
        return found if not found.requires_grad else (reduction or Reduction(over)).attach(found)
    wanted = "Shard(0), a part of the experts, over the mesh of the layer"
    if mesh is None:
        wanted = "Shard(0), a part of the experts, or Replicate(), all of them, over a mesh of one dimension"
    raise _check.fail(op, name, wanted, f"{placements} over {over}; {_what_to_do(weight)}")


def _what_to_do(weight: DTensor) -> str:
    if any(placement.is_partial() for placement in weight.placements):
        return "a sum that is not complete: weight.redistribute(placements=[Shard(0)])"
    if weight.device_mesh.ndim > 1:
        return "FSDP2 gathers its dimension when the module that fully_shard was given is called: call that, not its parts"
    if isinstance(weight.placements[0], Shard) and weight.placements[0].dim != 0:
        return f"tensor parallelism of experts is not expert parallelism: shard whole experts, {_SHARD_HOW}"
    return f"shard it as the layer is: {_SHARD_HOW}"


@torch.no_grad()
def fill(weight: DTensor, draw: Callable[[Tensor], Any]) -> None:
    """Fill a stack by ``draw``, an expert at a time, of which each rank keeps what it has.

    All are drawn on every rank: ranks with one seed have together what one rank would have, and no two experts are alike.
    """
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    mine = weight.to_local()
    one = torch.empty(weight.shape[1:], dtype=weight.dtype, device=mine.device)
    inside = tuple(slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))
    for expert in range(weight.shape[0]):
        draw(one)
        if offset[0] <= expert < offset[0] + shape[0]:
            mine[expert - offset[0]].copy_(one[inside])
