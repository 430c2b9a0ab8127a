"""Expert-parallel layers in training: ranks, with DDP and FSDP2 around them, equal one process with the whole batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import moekit
import moekit.ep
import moekit.monitor
import moekit.nn

HIDDEN, EXPERTS, CLASSES, STEPS, PARTS, TOKENS = 16, 8, 12, 20, 4, 12
MAX_NORM = 0.5


class Model(nn.Module):
    """Two mixture layers between linear maps."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"balance_coeff": 0.05, "z_coeff": 0.01, "bias": True}
        self.before = nn.Linear(HIDDEN, HIDDEN)
        self.first = moekit.nn.MoE.build(HIDDEN, 8, EXPERTS, 2, shared_intermediate=8, **options)
        self.second = moekit.nn.MoE.build(HIDDEN, 8, EXPERTS, 3, null_experts=2, **options)
        self.head = nn.Linear(HIDDEN, CLASSES)

    @property
    def layers(self) -> list[moekit.nn.MoE]:
        return [self.first, self.second]

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, x.shape[-1:]))
        return self.head(x)


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """``[PARTS, TOKENS, H]`` and the classes: four parts, of which a rank has as many as the others."""
    g = torch.Generator().manual_seed(step)
    return torch.randn(PARTS, TOKENS, HIDDEN, generator=g), torch.randint(CLASSES, (PARTS, TOKENS), generator=g)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor().detach().clone() if isinstance(value, DTensor) else value.detach().clone()


# --- layouts --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Layout:
    """How the model is spread, what is called in training, and how many micro-batches a step has."""

    spread: Callable[[Model], nn.Module]
    world: int
    micro: int = 1


def mesh_of(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("ep",) if len(sizes) == 1 else ("dp", "ep"))


def ep_with_ddp(built: Model) -> nn.Module:
    moekit.ep.parallelize(built, mesh_of(dist.get_world_size()))
    return DistributedDataParallel(built)


def ep_with_fsdp2(built: Model) -> nn.Module:
    mesh = mesh_of(dist.get_world_size())
    moekit.ep.parallelize(built, mesh)
    return fully_shard(built, mesh=mesh, ignored_params={p for _, p in moekit.ep.expert_parameters(built)})


def ep_and_dp_with_ddp(built: Model) -> nn.Module:
    mesh = mesh_of(2, 2)
    moekit.ep.parallelize(built, mesh["ep"], data_parallel=mesh["dp"])
    return DistributedDataParallel(built)


def ep_and_dp_with_fsdp2(built: Model) -> nn.Module:
    mesh = mesh_of(2, 2)
    moekit.ep.parallelize(built, mesh["ep"])
    for layer in built.layers:
        fully_shard(layer.experts, mesh=mesh["dp"])
    return fully_shard(built, mesh=mesh)


LAYOUTS = {
    "EP=2, DDP": Layout(ep_with_ddp, 2),
    "EP=2, FSDP2": Layout(ep_with_fsdp2, 2),
    "EP=4, DDP": Layout(ep_with_ddp, 4),
    "EP=4, FSDP2, accumulated": Layout(ep_with_fsdp2, 4, micro=2),
    "EP=2 x DP=2, DDP": Layout(ep_and_dp_with_ddp, 4),
    "EP=2 x DP=2, DDP, accumulated": Layout(ep_and_dp_with_ddp, 4, micro=2),
    "EP=2 x DP=2, FSDP2": Layout(ep_and_dp_with_fsdp2, 4),
}


def train(built: Model, called: nn.Module, rank: int, world: int, micro: int) -> dict[str, Any]:
    """20 steps on this rank's share of each batch: losses, total norms, the last gradients, parameters."""
    optimiser = torch.optim.SGD(built.parameters(), lr=0.3, momentum=0.9)
    for layer in built.layers:
        layer.balance_group = dist.group.WORLD if world > 1 else None
        layer.loss_scale = 1 / micro
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        x, y = (each.chunk(world)[rank] for each in batch(step))
        total = torch.zeros(())
        for number, (some, wanted) in enumerate(zip(x.chunk(micro, 1), y.chunk(micro, 1), strict=True)):
            waits = isinstance(called, DistributedDataParallel) and number < micro - 1
            with called.no_sync() if waits else torch.enable_grad():
                loss = cross_entropy(called(some.flatten(0, 1)), wanted.flatten()) / micro
                loss.backward()
            total += loss.detach()
        if world > 1:
            dist.all_reduce(total)
        clip = moekit.ep.clip_grad_norm_ if world > 1 else nn.utils.clip_grad_norm_
        found["losses"].append(float(total) / world)
        found["norms"].append(float(clip(built.parameters(), MAX_NORM)))
        optimiser.step()
        if step == STEPS - 1:
            found["grads"] = {name: whole(p.grad) for name, p in built.named_parameters() if p.grad is not None}
        optimiser.zero_grad()
    return {**found, "parameters": {name: whole(p) for name, p in built.named_parameters()}}


def every_layout(world: int) -> dict[str, Any]:
    return {name: on_layout(name) for name, layout in LAYOUTS.items() if layout.world == world}


def on_layout(name: str) -> dict[str, Any]:
    built, layout = model(), LAYOUTS[name]
    called = layout.spread(built)
    return train(built, called, dist.get_rank(), dist.get_world_size(), layout.micro)


@pytest.fixture(scope="module")
def alone() -> dict[int, dict[str, Any]]:
    """One process with the whole batch, by the number of micro-batches."""
    found = {}
    for micro in (1, 2):
        built = model()
        found[micro] = train(built, built, 0, 1, micro)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_twenty_steps_equal_those_of_one_process(world: int, tmp_path: Path, alone):
    found = on_ranks(every_layout, world, tmp_path, world)
    for rank in range(world):
        for name, each in found[rank].items():
            one = alone[LAYOUTS[name].micro]
            assert each["losses"] == pytest.approx(one["losses"], rel=2e-6), name
            assert each["norms"] == pytest.approx(one["norms"], rel=2e-5), name
            for kind in ("grads", "parameters"):
                assert each[kind].keys() == one[kind].keys()
                for parameter, value in each[kind].items():
                    torch.testing.assert_close(value, one[kind][parameter], rtol=1e-4, atol=2e-6, msg=f"{name} {parameter}")
