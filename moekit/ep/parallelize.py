"""Expert parallelism of layers and of whole models: whose experts are sharded, over which ranks, what others leave alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moekit import _check
from moekit.ep import placement
from moekit.ep._agree import agree
from moekit.ep._ranks import one_dimensional
from moekit.ep.choose import dispatcher as dispatcher_of
from moekit.ep.ddp import hide_sharded, send
from moekit.ep.dispatcher import Dispatcher
from moekit.ep.gradients import Reduction
from moekit.ep.placement import Sharding
from moekit.nn.moe import MoE

_OP = "ep.parallelize"


@dataclass(frozen=True)
class Parallelized:
    """What :func:`parallelize` did; ``print`` it.

    Attributes:
        layers: names of the layers.
        parameters: names of the parameters that are sharded now.
        experts: of all layers together.
        ranks: N.
        dispatchers: the classes in use.
    """

    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    experts: int
    ranks: int
    dispatchers: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(name or "(the model itself)" for name in self.layers)
        each = f"{self.experts // self.ranks} of {self.experts} experts on each of {self.ranks} ranks"
        return f"{len(self.layers)} layers, {each}, by {', '.join(self.dispatchers)}: {names}"


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    dispatcher: str | Dispatcher = "auto",
    data_parallel: DeviceMesh | None = None,
    reduction: str = "mean",
    broadcast_from: int | None = None,
    **options: Any,
) -> Parallelized:
    """Shard the experts of all :class:`moekit.nn.MoE` layers of a model over the ranks of a mesh, in place.

    Call it before the optimiser is made, and before DDP or ``fully_shard``. Other parameters stay as they are. DDP around
    the model, or around a part of it, is told to leave the experts alone; around more than the model, it refuses them.
    No weight is sent but by ``broadcast_from``: each rank keeps its slice of what it has, so that the ranks of ``mesh`` need
    not have drawn the same numbers for the experts. (Those of ``data_parallel`` do: their copies are never compared.)

    Args:
        model: with a layer at least, none of which is parallel already.
        mesh: N ranks, one dimension. Each has batches of its own.
        dispatcher: the ``kind`` of :func:`moekit.ep.dispatcher`, or a dispatcher for all layers.
        data_parallel: ranks that have the same experts as this one and other batches: the other dimension of a 2-D mesh.
            Their gradients of experts are averaged in every backward. None if there are none, and if FSDP2 shards the
            experts over that dimension, which then averages them.
        reduction: ``"mean"``: each rank's loss is a mean over its own tokens, and gradients are averaged over ranks, as DDP
            and FSDP2 do it to other parameters; ``"sum"``: losses add up, and so do gradients.
        broadcast_from: the rank of the mesh (in the first row of ``data_parallel``) from which all parameters and buffers of
            the model are sent to the others first; None: nothing is sent.
        **options: of :func:`moekit.ep.dispatcher`.

    Returns:
        what was done.

    Raises:
        ValueError: no such layer, one that is parallel already, experts that are no multiple of the ranks, an option that
            would have no effect; models that differ between ranks, on all of them. Nothing has been changed then.
        TypeError: things of other kinds.
    """
    if not isinstance(model, nn.Module):
        raise _check.wrong_type(_OP, "model", "a torch.nn.Module", type(model).__name__)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    group = one_dimensional(_OP, "mesh", mesh).get_group()
    reduced = Reduction.of(_OP, mesh, data_parallel, reduction)
    agree(_OP, group, layers=tuple(layers), reduction=reduction, options=options, **_facts(layers))
    if not layers:
        wanted = "one with moekit.nn.MoE layers (for models of Transformers: moekit.hf)"
        raise _check.fail(_OP, "model", wanted, f"a {type(model).__name__} without any")
    for name, layer in layers.items():
        _check_layer(_OP, name or "model", layer, mesh)
    made = [_dispatcher(mesh, layer, dispatcher, options) for layer in layers.values()]
    if broadcast_from is not None:
        _broadcast(model, [(mesh, broadcast_from), *([] if data_parallel is None else [(data_parallel, 0)])])
    placement.shard_together([layer.experts for layer in layers.values()], Sharding(mesh, reduced))
    for layer, one in zip(layers.values(), made, strict=True):
        layer.dispatcher = one
    names = hide_sharded(model)
    experts = sum(layer.experts.num_experts for layer in layers.values())
    kinds = tuple(dict.fromkeys(type(one).__name__ for one in made))
    return Parallelized(tuple(layers), names, experts, mesh.size(), kinds)


def shard_layer(op: str, layer: MoE, mesh: DeviceMesh, dispatcher: str | Dispatcher) -> None:
    """What ``MoE(ep_mesh=mesh)`` does."""
    agree(op, one_dimensional(op, "ep_mesh", mesh).get_group(), **_facts({"": layer}))
    _check_layer(op, "experts", layer, mesh)
    layer.dispatcher = _dispatcher(mesh, layer, dispatcher, {})
    placement.shard_together([layer.experts], Sharding(mesh, Reduction(mesh)))


def _facts(layers: dict[str, MoE]) -> dict[str, Any]:
    """What has to be the same on all ranks."""
    facts: dict[str, Any] = {}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        facts |= {f"{prefix}k": layer.router.k, f"{prefix}router.options": layer.router.options}
        facts |= {f"{prefix}experts.options": layer.experts.options}
        facts |= {prefix + key: (tuple(value.shape), value.dtype) for key, value in layer.state_dict().items()}
    return facts


def _check_layer(op: str, name: str, layer: MoE, mesh: DeviceMesh) -> None:
    if layer.dispatcher is not None or any(map(_check.sharded, layer.experts.parameters())):
        raise _check.fail(op, name, "not sharded yet", "one that is")
    if layer.experts.num_experts % mesh.size():
        wanted = f"of a number of experts that is a multiple of the {mesh.size()} ranks"
        raise _check.fail(op, name, wanted, layer.experts.num_experts)
    if layer.router.options["overflow"] == "pad":
        raise _check.unused(op, "overflow", "pad", "under expert parallelism, where the rows of a rank are others")


def _dispatcher(mesh: DeviceMesh, layer: MoE, kind: str | Dispatcher, options: dict[str, Any]) -> Dispatcher:
    if isinstance(kind, str):
        return dispatcher_of(mesh, layer.experts.num_experts, layer.router.k, kind, **options)
    if options:
        raise _check.unused(_OP, ", ".join(options), "...", "with a dispatcher that is made")
    if not isinstance(kind, Dispatcher):
        raise _check.wrong_type(_OP, "dispatcher", "a moekit.ep.Dispatcher, or the name of a kind", type(kind).__name__)
    return kind


def _broadcast(model: nn.Module, sources: list[tuple[DeviceMesh, int]]) -> None:
    tensors: dict[int, Tensor] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    for mesh, source in sources:
        for tensor in tensors.values():
            send(tensor, mesh.get_group(), source)
