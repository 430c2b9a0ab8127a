"""Expert-parallel layers in training: ranks, with DDP and FSDP2 around them, equal one process with the whole batch."""

from __future__ import annotations

import copy
import dataclasses
import re
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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
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

    spread: Callable[..., nn.Module]
    world: int
    micro: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of parallelize


def mesh_of(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("ep",) if len(sizes) == 1 else ("dp", "ep"))


def ep_with_ddp(built: Model, **options: Any) -> nn.Module:
    moekit.ep.parallelize(built, mesh_of(dist.get_world_size()), **options)
    return DistributedDataParallel(built)


def ep_with_fsdp2(built: Model, **options: Any) -> nn.Module:
    mesh = mesh_of(dist.get_world_size())
    moekit.ep.parallelize(built, mesh, **options)
    return fully_shard(built, mesh=mesh, ignored_params={p for _, p in moekit.ep.expert_parameters(built)})


def ep_and_dp_with_ddp(built: Model, **options: Any) -> nn.Module:
    mesh = mesh_of(2, 2)
    moekit.ep.parallelize(built, mesh["ep"], data_parallel=mesh["dp"], **options)
    return DistributedDataParallel(built)


def ep_and_dp_with_fsdp2(built: Model, **options: Any) -> nn.Module:
    mesh = mesh_of(2, 2)
    moekit.ep.parallelize(built, mesh["ep"], **options)
    for layer in built.layers:
        fully_shard(layer.experts, mesh=mesh["dp"])
    return fully_shard(built, mesh=mesh)


# With few rows at a time, replicas may take different numbers of rounds: their gradients meet once all the same.
LAYOUTS = {
    "EP=2, DDP": Layout(ep_with_ddp, 2),
    "EP=2, FSDP2": Layout(ep_with_fsdp2, 2, options={"dispatcher": "all_gather"}),
    "EP=4, DDP": Layout(ep_with_ddp, 4),
    "EP=4, FSDP2, accumulated": Layout(ep_with_fsdp2, 4, micro=2, options={"redispatch": True, "dispatcher": "all_to_all"}),
    "EP=2 x DP=2, DDP, accumulated": Layout(
        ep_and_dp_with_ddp, 4, micro=2, options={"max_rows": 9, "dispatcher": "all_to_all"}
    ),
    "EP=2 x DP=2, FSDP2": Layout(ep_and_dp_with_fsdp2, 4, options={"max_rows": 18, "dispatcher": "all_to_all"}),
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
    called = layout.spread(built, **layout.options)
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


# --- the layer's features, on two ranks -------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases, shared": {"bias": True, "shared_intermediate": 8, "shared_gate": False},
    "null experts": {"null_experts": 3, "shared_intermediate": 8},
    "losses": {"balance_coeff": 0.1, "sequence_balance_coeff": 0.1, "z_coeff": 0.1},
    "loss-free balancing": {"score": "sigmoid", "expert_bias": True},
    "weights after": {"weight_after_down": True, "layout": "ungated", "activation": "relu2"},
    "capacity": {"capacity": 2},
}
SENT = (5, 0)  # tokens of each rank, in sequences of five


def layer(**options: Any) -> moekit.nn.MoE:
    torch.manual_seed(1)
    return moekit.nn.MoE.build(HIDDEN, 8, EXPERTS, 2, dtype=torch.float64, **options)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def as_alone(made: moekit.nn.MoE, other: moekit.nn.MoE, **given: Tensor) -> None:
    """A layer and its parallel twin: outputs, losses, gradients of this rank's input and of all parameters."""
    rank, inputs = dist.get_rank(), draw(2, 2, 5, HIDDEN)
    found = {}
    for one, ranks in ((made, (0, 1)), (other, (rank,))):  # a batch after the other: what is of a batch stays of a batch
        x, outs, losses = inputs.clone().requires_grad_(), {}, {}
        for each in ranks:
            outs[each] = one(x[each], **{name: value[each] for name, value in given.items()})
            losses[each] = dict(one.losses)
        torch.stack([out.square().sum() for out in outs.values()]).sum().backward()
        grads = {name: whole(p.grad) for name, p in one.named_parameters() if p.requires_grad}
        found[one] = outs[rank].detach(), x.grad[rank], losses[rank], grads
    for wanted, value in zip(found[made][:3], found[other][:3], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    for name, grad in found[made][3].items():
        summed = found[other][3][name]
        if name.startswith("experts."):
            summed = 2 * summed  # from the mean over two batches
        else:
            dist.all_reduce(summed)
        torch.testing.assert_close(summed, grad, rtol=1e-12, atol=1e-12)


def packed(mesh: DeviceMesh) -> None:
    """Experts that were packed before they are shared out, those of another rank."""
    made = layer(bias=True)
    for name in ("gate_up", "down"):
        weight = moekit.pack(getattr(made.experts, name).detach().float(), "nf4")
        setattr(made.experts, name, nn.Parameter(weight, requires_grad=False))
    other = copy.deepcopy(made)
    if dist.get_rank() == 0:
        for name in ("gate_up", "down"):
            different = moekit.pack(torch.zeros(getattr(made.experts, name).shape), "nf4")
            setattr(other.experts, name, nn.Parameter(different, requires_grad=False))
    moekit.ep.parallelize(other, mesh, broadcast_from=1)
    as_alone(made, other)


def features() -> dict[str, Any]:
    mesh, rank = mesh_of(2), dist.get_rank()
    found: dict[str, Any] = {}
    for options in OPTIONS.values():
        made = layer(**options)
        other = copy.deepcopy(made)
        moekit.ep.parallelize(other, mesh)
        as_alone(made, other)
    made, other = layer(shared_intermediate=8), layer(shared_intermediate=8, ep_mesh=mesh, dispatcher="auto")
    as_alone(made, other, padding_mask=torch.arange(20).view(2, 2, 5) % 3 == 0)
    as_alone(made, other, indices=torch.arange(40).view(2, 2, 5, 2) % EXPERTS)
    packed(mesh)
    found["repr"] = repr(other)
    for each in (made, other):
        each.zero_grad()
    twin = copy.deepcopy(other)
    assert twin.dispatcher is other.dispatcher and twin.experts.gate_up is not other.experts.gate_up
    as_alone(copy.deepcopy(made), twin)
    # A rank without tokens takes part, and has a gradient for every parameter.
    other(draw(SENT[rank], HIDDEN)).sum().backward()
    assert all(p.grad is not None for p in other.parameters())
    shared_between_layers(mesh)
    replayed_and_watched(made, other)
    states(made, other, mesh)
    found["errors"] = errors(made, other, mesh)
    return found


class Tied(nn.Module):
    """A layer that has the experts of another, and one that has only a weight of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = layer(), layer(), layer()
        self.second.experts = self.first.experts
        self.third.experts.down = self.first.experts.down

    def forward(self, x: Tensor) -> Tensor:
        return self.third(x + self.second(x + self.first(x)))


def shared_between_layers(mesh: DeviceMesh) -> None:
    alone, other = Tied(), Tied()
    moekit.ep.parallelize(other, mesh)
    x = draw(2, 5, HIDDEN)
    alone(x).square().sum().backward()
    other(x[dist.get_rank()]).square().sum().backward()
    wanted = {name: p.grad for name, p in alone.named_parameters() if ".experts." in name}
    found = {name: 2 * whole(p.grad) for name, p in other.named_parameters() if ".experts." in name}
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    assert list(found) == ["first.experts.gate_up", "first.experts.down", "third.experts.gate_up"]


def replayed_and_watched(made: moekit.nn.MoE, other: moekit.nn.MoE) -> None:
    x = draw(6, HIDDEN)
    with moekit.monitor.attach(other) as monitor:
        replay = moekit.Replay(other)
        with replay.record() as choices:
            first = other(x)
        other.router.weight.data.neg_()
        with replay.play(choices):
            again = other(x)
        other.router.weight.data.neg_()
        assert not torch.equal(first, again) and torch.equal(other.router.indices, choices.passes[0][0])
        assert sum(counts.sum() for counts in monitor.counts().values()) == 2 * x.shape[0] * 2


def states(made: moekit.nn.MoE, other: moekit.nn.MoE, mesh: DeviceMesh) -> None:
    """What a state dict of ranks and one of a single process load into, and a model without storage at first."""
    fresh = moekit.nn.MoE.build(
        HIDDEN, 8, EXPERTS, 2, shared_intermediate=8, dtype=torch.float64, device="meta", ep_mesh=mesh
    )
    fresh.to_empty(device="cpu")
    torch.manual_seed(1)
    fresh.reset_parameters()
    for name, value in made.state_dict().items():
        assert torch.equal(whole(fresh.state_dict()[name]), value)
    for state in (made.state_dict(), other.state_dict()):
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        fresh.load_state_dict(state)
        assert torch.equal(whole(fresh.experts.down), made.experts.down)
    summed_and_clipped(made, mesh)
    different = layer()
    with torch.no_grad():
        for parameter in different.parameters():
            parameter.fill_(dist.get_rank())
    report = moekit.ep.parallelize(different, mesh, broadcast_from=1)
    assert report.parameters == ("experts.gate_up", "experts.down") and report.ranks == 2
    assert all((whole(parameter) == 1).all() for parameter in different.parameters())


def summed_and_clipped(made: moekit.nn.MoE, mesh: DeviceMesh) -> None:
    """Losses that add up, as their gradients do; norms of all orders, by one process and by ranks."""
    alone, other = copy.deepcopy(made), copy.deepcopy(made)
    moekit.ep.parallelize(other, mesh, reduction="sum")
    x = draw(2, 5, HIDDEN)
    for norm_type in (2.0, 1.0, 3.0, float("inf")):
        alone.zero_grad()
        other.zero_grad()
        alone(x).square().sum().backward()
        other(x[dist.get_rank()]).square().sum().backward()
        for name, parameter in other.named_parameters():
            if not name.startswith("experts."):
                dist.all_reduce(parameter.grad)
        wanted = nn.utils.clip_grad_norm_(alone.parameters(), 0.1, norm_type)
        norm = moekit.ep.clip_grad_norm_(other.parameters(), 0.1, norm_type)
        torch.testing.assert_close(norm, wanted, rtol=1e-12, atol=0)
        for (name, mine), grad in zip(other.named_parameters(), (p.grad for p in alone.parameters()), strict=True):
            torch.testing.assert_close(whole(mine.grad), grad, rtol=1e-11, atol=1e-14, msg=name)
    other.experts.down.grad = None if dist.get_rank() else other.experts.down.grad * float("nan")
    with pytest.raises(RuntimeError, match=r"total norm of order 2\.0 is nan"):
        moekit.ep.clip_grad_norm_(other.parameters(), 1.0, error_if_nonfinite=True)


def errors(made: moekit.nn.MoE, other: moekit.nn.MoE, mesh: DeviceMesh) -> dict[str, str]:
    """What each refusal says."""
    x, two_d, rank = draw(4, HIDDEN), mesh_of(1, 2), dist.get_rank()
    routing = other.router(x)
    placed = lambda placement: DTensor.from_local(other.experts.down.to_local(), mesh, (placement,))  # noqa: E731
    asked = {
        "no layer": lambda: moekit.ep.parallelize(nn.Linear(2, 2), mesh),
        "twice": lambda: moekit.ep.parallelize(other, mesh),
        "2-D": lambda: moekit.ep.parallelize(made, two_d),
        "no mesh": lambda: moekit.nn.MoE.build(HIDDEN, 8, EXPERTS, 2, ep_mesh=dist.group.WORLD),
        "uneven": lambda: moekit.nn.MoE.build(HIDDEN, 8, 5, 2, ep_mesh=mesh),
        "dispatcher alone": lambda: moekit.nn.MoE.build(HIDDEN, 8, EXPERTS, 2, dispatcher="auto"),
        "pad": lambda: layer(capacity=2, overflow="pad", ep_mesh=mesh),
        "reduction": lambda: moekit.ep.parallelize(made, mesh, reduction="max"),
        "same ranks": lambda: moekit.ep.parallelize(layer(), mesh, data_parallel=mesh),
        "different models": lambda: moekit.ep.parallelize(nn.Sequential(*(layer() for _ in range(1 + rank))), mesh),
        "different sizes": lambda: moekit.nn.MoE.build(HIDDEN, 8, EXPERTS - rank, 2, ep_mesh=mesh),
        "norm": lambda: moekit.ep.clip_grad_norm_(other.parameters(), 1.0, float("-inf")),
        "operator": lambda: moekit.experts(x, routing, other.experts.gate_up, other.experts.down),
        "Shard(1)": lambda: moekit.ep.part(placed(Shard(1))),
        "Partial": lambda: moekit.ep.part(placed(Partial())),
        "2-D weight": lambda: moekit.ep.part(DTensor.from_local(x, two_d, (Shard(1), Shard(0)))),
        "DDP around more": lambda: DistributedDataParallel(nn.Sequential(other)),
        "to_transformers": lambda: other.to_transformers(nn.Linear(2, 2)),
        "shard twice": lambda: moekit.ep.shard(other.experts.down, mesh),
    }
    said = {}
    for name, ask in asked.items():
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            ask()
        said[name] = f"{caught.type.__name__}: {caught.value}"
    assert torch.equal(moekit.ep.part(placed(Replicate())), other.experts.down.to_local())
    assert made.dispatcher is None and not isinstance(made.experts.down, DTensor)
    return said


SAID = {
    "no layer": "ValueError: moekit.ep.parallelize: model must be one with moekit.nn.MoE layers (for models of Transformers",
    "twice": "ValueError: moekit.ep.parallelize: model must be not sharded yet, got one that is",
    "2-D": "ValueError: moekit.ep.parallelize: mesh must be of one dimension (a part of it: mesh['ep'])",
    "no mesh": "TypeError: moekit.nn.MoE: ep_mesh must be a torch.distributed.DeviceMesh of one dimension, got ProcessGroup",
    "uneven": "ValueError: moekit.nn.MoE: experts must be of a number of experts that is a multiple of the 2 ranks, got 5",
    "dispatcher alone": "ValueError: moekit.nn.MoE: dispatcher='auto' has no effect without ep_mesh",
    "pad": "ValueError: moekit.nn.MoE: overflow='pad' has no effect under expert parallelism",
    "reduction": "ValueError: moekit.ep.parallelize: reduction must be one of 'mean', 'sum', got 'max'",
    "same ranks": "ValueError: moekit.ep.parallelize: data_parallel must be of ranks that do not share these experts",
    "different models": "ValueError: moekit.ep.parallelize: the ranks of a group must be given the same, got",
    "different sizes": "ValueError: moekit.nn.MoE: the ranks of a group must be given the same, got",
    "norm": "ValueError: moekit.ep.clip_grad_norm_: norm_type must be above 0, got -inf",
    "operator": "TypeError: moekit.experts: gate_up must be a plain tensor of float64",
    "Shard(1)": "ValueError: moekit.ep.part: weight must be Shard(0), a part of the experts, or Replicate(), all of them",
    "Partial": "ValueError: moekit.ep.part: weight must be Shard(0)",
    "2-D weight": "ValueError: moekit.ep.part: weight must be Shard(0)",
    "DDP around more": "RuntimeError: ",
    "to_transformers": "ValueError: moekit.nn.MoE.to_transformers: the layer must be of one process",
    "shard twice": "TypeError: moekit.ep.shard: weight must be a plain tensor, which is sharded once, got a DTensor",
}
HINTS = {
    "different models": "layers: ('0',) on rank 0; ('0', '1') on rank 1",
    "different sizes": "experts.down: ((8, 16, 8), torch.float32) on rank 0; ((7, 16, 8), torch.float32) on rank 1",
    "operator": "moekit.ep.part(weight) is what this rank has",
    "Shard(1)": "shard whole experts",
    "Partial": "redistribute(placements=[Shard(0)])",
    "2-D weight": "FSDP2 gathers its dimension when the module that fully_shard was given is called",
}


def test_the_layer_on_two_ranks(tmp_path: Path):
    for found in on_ranks(features, 2, tmp_path):
        assert "dispatcher=AllToAll" in found["repr"] and "ranks=2" in found["repr"]
        assert found["errors"].keys() == SAID.keys()
        for name, said in found["errors"].items():
            assert said.startswith(SAID[name]) and HINTS.get(name, "") in said, said


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "expert_parallel.md"


def follow_the_page(code: str) -> None:
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})


def test_the_page_runs_on_four_ranks(tmp_path: Path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 7
    on_ranks(follow_the_page, 4, tmp_path, "\n".join(blocks))
