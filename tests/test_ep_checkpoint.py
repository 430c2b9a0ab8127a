"""Checkpoints of expert-parallel models: saved on some ranks, loaded on others, and training goes on as if on one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import moekit
import moekit.ep
import moekit.nn

HIDDEN, EXPERTS, TOPK, CLASSES, PARTS, TOKENS = 16, 8, 2, 8, 4, 12
BEFORE, AFTER = 4, 6  # steps before the checkpoint, and after it


class PackedLora(nn.Module):
    """Experts packed in nf4, trained by adapters: a module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        for name, outputs in (("gate_up", 2 * HIDDEN), ("down", HIDDEN)):
            weight = torch.randn(EXPERTS, outputs, HIDDEN) / HIDDEN**0.5
            self.register_parameter(name, nn.Parameter(moekit.pack(weight, "nf4"), requires_grad=False))
            self.register_parameter(f"{name}_A", nn.Parameter(torch.randn(EXPERTS, 2, HIDDEN) / HIDDEN**0.5))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.zeros(EXPERTS, outputs, 2)))

    def forward(self, x: Tensor, routing: moekit.Routing, dispatcher: Any) -> Tensor:
        part = {name: moekit.ep.part(value) for name, value in self.named_parameters()}
        lora = {name: moekit.Lora(part[f"{name}_A"], part[f"{name}_B"], scale=0.5) for name in ("gate_up", "down")}
        mine = partial(moekit.experts, gate_up=part["gate_up"], down=part["down"], lora=lora)
        return mine(x, routing) if dispatcher is None else moekit.ep.run(dispatcher, x, routing, mine)


class Adapted(nn.Module):
    """Their layer."""

    def __init__(self) -> None:
        super().__init__()
        self.router = moekit.nn.Router(HIDDEN, EXPERTS, TOPK)
        self.experts = PackedLora()
        self.dispatcher: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x), self.dispatcher)


class Model(nn.Module):
    """A mixture layer with a bias of the choice, one of packed experts with adapters, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = moekit.nn.MoE.build(HIDDEN, 8, EXPERTS, TOPK, score="sigmoid", expert_bias=True, bias=True)
        self.adapted = Adapted()
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.moe(x)
        return self.head(x + self.adapted(x))

    def spread(self, mesh: Any) -> None:
        moekit.ep.parallelize(self, mesh)
        moekit.ep.shard_parameters(self.adapted.experts, mesh)
        self.adapted.dispatcher = moekit.ep.AllToAll(mesh.get_group(), EXPERTS)
        moekit.ep.hide_from_ddp(self)


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(PARTS, TOKENS, HIDDEN, generator=g), torch.randint(CLASSES, (PARTS, TOKENS), generator=g)


class Job:
    """A model in training on the ranks there are: expert-parallel with DDP, and over 4 ranks with FSDP2, too."""

    def __init__(self, seed: int, fsdp: bool = False) -> None:
        torch.manual_seed(seed)
        self.model = Model()
        self.called: nn.Module = self.model
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if fsdp:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
            self.model.spread(mesh["ep"])
            for layer in (self.model.moe, self.model.adapted):
                fully_shard(layer.experts, mesh=mesh["dp"])
            fully_shard(self.model, mesh=mesh)
        elif self.ranks > 1:
            self.model.spread(init_device_mesh("cpu", (self.ranks,)))
            self.called = DistributedDataParallel(self.model)
        # Two groups, as a fused optimiser would want them.
        experts = [*self.model.moe.experts.parameters(), *self.model.adapted.experts.parameters()]
        experts = [p for p in experts if p.requires_grad]
        others = [p for p in self.model.parameters() if p.requires_grad and not any(p is one for one in experts)]
        self.optimiser = torch.optim.AdamW([{"params": experts}, {"params": others}], lr=1e-2, eps=1e-6)

    def steps(self, start: int, count: int) -> list[float]:
        losses = []
        for step in range(start, start + count):
            x, y = (each.chunk(self.ranks)[self.rank].flatten(0, 1) for each in batch(step))
            loss = cross_entropy(self.called(x), y)
            loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
            group = dist.group.WORLD if self.ranks > 1 else None
            self.model.moe.router.update_bias(1e-2, group)
            total = loss.detach()
            if self.ranks > 1:
                dist.all_reduce(total)
            losses.append(float(total) / self.ranks)
        return losses

    def save(self, folder: str) -> None:
        model, optimiser = get_state_dict(self.called, self.optimiser)
        dcp.save({"model": model, "optimiser": optimiser}, checkpoint_id=folder)

    def load(self, folder: str) -> None:
        model, optimiser = get_state_dict(self.called, self.optimiser)
        dcp.load({"model": model, "optimiser": optimiser}, checkpoint_id=folder)
        set_state_dict(self.called, self.optimiser, model_state_dict=model, optim_state_dict=optimiser)


def saves(folder: str) -> list[float]:
    job = Job(seed=0)
    losses = job.steps(0, BEFORE)
    job.save(folder)
    return losses + job.steps(BEFORE, AFTER)


def loads(folder: str, fsdp: bool = False) -> list[float]:
    job = Job(seed=1 + (dist.get_rank() if dist.is_initialized() else 0), fsdp=fsdp)
    job.load(folder)
    return job.steps(BEFORE, AFTER)


def on_four(four: str, one: str) -> dict[str, list[float]]:
    """Saves; loads what one process saved; and what it saved itself, into another layout."""
    return {"from 4": saves(four), "1 to 4": loads(one), "4 to 2 x 2": loads(four, fsdp=True)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_fit_any_number_of_ranks(tmp_path: Path):
    one, four = str(tmp_path / "one"), str(tmp_path / "four")
    for name in ("4", "2"):
        (tmp_path / name).mkdir()
    wanted = saves(one)
    found: dict[str, list[Any]] = {"1 to 1": [loads(one)]}
    of_four = on_ranks(on_four, 4, tmp_path / "4", four, one)
    found |= {name: [each[name] for each in of_four] for name in of_four[0]}
    found["4 to 2"] = on_ranks(loads, 2, tmp_path / "2", four)
    found["4 to 1"] = [loads(four)]
    for name, ranks in found.items():
        for losses in ranks:
            assert losses == pytest.approx(wanted if name == "from 4" else wanted[BEFORE:], rel=1e-6), name
