"""moekit.monitor: counts as by hand under everything that runs a forward again, and figures as by their formulas."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _layers import LAYERS, REENTRANT, E, H, K, Net, T, inputs, net, perturbed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import moekit
from moekit import monitor as monitoring

N = 4


def by_hand(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """``[E]`` of each layer, by a loop over tokens."""
    found = [torch.zeros(E, dtype=torch.int64) for _ in range(LAYERS)]
    model = copy.deepcopy(model)
    for batch in batches:
        with torch.no_grad():
            model(batch)
        for counts, layer in zip(found, model.layers, strict=True):
            for token in layer.router.indices.tolist():
                for expert in token:
                    counts[expert] += expert >= 0
    return found


def assert_counts(monitor: monitoring.Monitor, wanted: list[Tensor], **options: bool) -> None:
    found = monitor.counts(**options)
    assert tuple(found) == monitor.names == tuple(f"layers.{i}.router" for i in range(LAYERS))
    assert all(map(torch.equal, found.values(), wanted)) and all(counts.sum() for counts in wanted)


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("summed", [False, True])
def test_a_forward_counts_once(summed: bool, reentrant: bool | None):
    model, batches = net(), inputs(N)
    wanted = by_hand(model, batches)
    model.reentrant = reentrant
    monitor, total = monitoring.attach(model), torch.zeros((), dtype=torch.float64)
    for batch in batches:  # micro-batches
        loss = model(batch.clone().requires_grad_()).square().mean()
        if summed:
            total = total + loss
        else:
            loss.backward()
    if summed:
        total.backward()
    assert_counts(monitor, wanted)
    assert monitor.stats()["tokens"] == N * T


def test_selective_checkpointing_gets_its_own_results_back():
    """It hands out results by their order, so a recomputation must issue what the first forward did."""
    model, (x,) = net(), inputs(1)
    wanted, grads = by_hand(model, [x]), []
    saved = [torch.ops.aten.mm.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.logsumexp.default]

    def policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    for watched in (False, True):
        model.zero_grad()
        monitor = monitoring.attach(model) if watched else None
        out = x
        for layer in model.layers:
            contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
            out = out + checkpoint(layer, out, use_reentrant=False, context_fn=contexts)
        out.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *grads)) and monitor is not None
    assert_counts(monitor, wanted)


@pytest.mark.parametrize("how, reentrant", [("whole", None), ("whole", False), ("layers", False), ("layers", True)])
def test_compiled(how: str, reentrant: bool | None):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, batches = net(), inputs(2)
    wanted = by_hand(model, batches)
    model.reentrant = reentrant
    monitor = monitoring.attach(model)
    options, graphs = {"fullgraph": True, "backend": "aot_eager"}, []
    root = torch.compile(model, **options) if how == "whole" else model
    for layer in model.layers if how == "layers" else []:
        layer.compile(**options)
    # The router's attributes are what needs it, not the monitor.
    if not hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        pytest.skip("this release of PyTorch does not checkpoint what leaves attributes behind in compiled code")
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        for batch in batches:
            root(batch.clone().requires_grad_()).square().mean().backward()
            monitor.step()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert_counts(monitor, wanted)
    assert all(torch.equal(line.sum(0), counts) for line, counts in zip(monitor.history().values(), wanted, strict=True))


def test_evaluation_is_kept_apart():
    model, (x, y) = net(), inputs(2)
    trained, evaluated = by_hand(model, [x]), by_hand(model, [y])
    without, both = monitoring.attach(model), monitoring.attach(model, evaluation=True)
    model(x)
    model.eval()
    model(y)
    assert_counts(without, trained)
    assert_counts(both, trained)
    assert_counts(both, evaluated, evaluation=True)
    with pytest.raises(ValueError, match="evaluation=True"):
        without.counts(evaluation=True)
    both.read(evaluation=True)
    assert not any(counts.any() for counts in both.counts(evaluation=True).values())
    assert_counts(both, trained)


def test_inference_mode_may_come_first():
    model, (x, y) = net(), inputs(2)
    monitor = monitoring.attach(model, evaluation=True)
    for _ in range(2):
        with torch.inference_mode():
            model(x)
        model.eval()
    model(y)
    model.train()
    model(y)
    monitor.step()
    assert monitor.read()["tokens"] == 2 * T and monitor.read(evaluation=True)["tokens"] == 2 * T


def test_no_value_is_read_in_a_step():
    with FakeTensorMode():  # whose tensors have none
        model = Net()
        monitor = monitoring.attach(model, history=4)
        for _ in range(5):
            model(torch.zeros(T, H)).sum().backward()
            monitor.step()
        monitor.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("reentrant", REENTRANT)
def test_nothing_waits_for_a_gpu(reentrant: bool | None):
    # In bfloat16: for float32 PyTorch's grouped product waits itself.
    model = net().bfloat16().cuda()
    batches = [batch.bfloat16().cuda().requires_grad_() for batch in inputs(2)]
    monitor, replay = monitoring.attach(model), moekit.Replay(model)
    with replay.record() as choices:
        for batch in batches:
            model(batch)
    monitor.reset()
    model.reentrant = reentrant
    torch.cuda.set_sync_debug_mode("error")
    try:
        with replay.play(choices):
            losses = [model(batch).square().mean() for batch in batches]
        (losses[0] + losses[1]).backward()
        monitor.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chosen = [torch.cat(layer).long().flatten().bincount(minlength=E).cpu() for layer in zip(*choices.passes, strict=True)]
    assert_counts(monitor, chosen)


def test_padding_and_capacity():
    model, (x,) = net(capacity=1), inputs(1)
    padding = torch.tensor([False, True, False, False, True, False])
    monitor = monitoring.attach(model)
    model(x, padding_mask=padding)
    for layer, (name, counts) in zip(model.layers, monitor.counts().items(), strict=True):
        indices = layer.router.indices[~padding].flatten().tolist()
        stats = monitor.stats()
        assert stats[f"{name}/tokens"] == 4 and counts.tolist() == [indices.count(expert) for expert in range(E)]
        assert stats[f"{name}/dropped_share"] == indices.count(-1) / (4 * K)
    assert monitor.stats()["dropped_share"] > 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_the_figures_are_their_formulas(score: str):
    model, batches = net(score=score), inputs(3)
    monitor = monitoring.attach(model)
    for batch in batches:
        model(batch)
    stats, first = monitor.stats(), "layers.0.router"
    weight = model.layers[0].router.weight.detach()
    logits = torch.cat(batches) @ weight.mT
    probs = {
        "softmax": lambda x: x.softmax(1),
        "sigmoid": lambda x: x.sigmoid() / x.sigmoid().sum(1, keepdim=True),
        "sqrtsoftplus": lambda x: x.exp().log1p().sqrt() / x.exp().log1p().sqrt().sum(1, keepdim=True),
    }[score](logits)
    load = monitor.counts()[first].double()
    share = load[load > 0] / load.sum()
    wanted = {
        "tokens": 3 * T,
        "load_max_over_mean": load.max() / load.mean(),
        "load_cv": ((load - load.mean()) ** 2).mean().sqrt() / load.mean(),
        "load_entropy": -(share * share.log()).sum() / math.log(E),
        "dead_experts": (load == 0).sum(),
        "dropped_share": 0.0,
        "router_entropy": -(probs * probs.log()).sum(1).mean(),
        "router_z": logits.exp().sum(1).log().square().mean(),
    }
    assert tuple(wanted) == tuple(monitoring.FIGURES)
    assert {name: stats[f"{first}/{name}"] for name in wanted} == pytest.approx({n: float(v) for n, v in wanted.items()})
    assert all(type(value) is float for value in stats.values())
    worst = max(stats[f"{name}/load_max_over_mean"] for name in monitor.names)
    assert stats["worst_load_max_over_mean"] == worst
    assert stats["dead_experts"] == sum(stats[f"{name}/dead_experts"] for name in monitor.names)
    assert stats["router_z"] == pytest.approx(sum(stats[f"{name}/router_z"] for name in monitor.names) / LAYERS)
    assert monitor.stats(layers=False).keys() == {*wanted, "worst_load_max_over_mean"}


def test_reading_begins_anew_and_nan_does_not_stay():
    model, (x, y) = net(), inputs(2)
    monitor = monitoring.attach(model)
    assert math.isnan(monitor.read()["load_cv"]) and monitor.read()["tokens"] == 0
    model.layers[0](x.fill_(math.nan))
    assert math.isnan(monitor.read()["layers.0.router/router_z"])
    model(y)
    assert_counts(monitor, by_hand(model, [y]))
    assert not math.isnan(monitor.stats()["router_z"])
    monitor.reset()
    assert monitor.stats()["tokens"] == 0


def test_history_reaches_back_to_the_beginning():
    model, batches = net(), inputs(11)
    monitor = monitoring.attach(model, history=4)
    each = [by_hand(model, [batch])[0] for batch in batches]
    for batch in batches:
        model(batch)
        monitor.step()
        monitor.read()  # which the history is independent of
    found = monitor.history()["layers.0.router"]
    assert found.tolist() == [sum(each[i : i + 4]).tolist() for i in (0, 4)]  # and an interval that is open yet
    with pytest.raises(ValueError, match="even"):
        monitoring.attach(model, history=3)
    with pytest.raises(ValueError, match="history"):
        monitoring.attach(model, history=0).history()


@pytest.mark.parametrize("steps", [0, 3])
def test_table_and_heatmap(steps: int, tmp_path: Path):
    pytest.importorskip("matplotlib")
    from rich.console import Console

    model, batches = net(), inputs(4)
    monitor = monitoring.attach(model)
    with pytest.raises(ValueError, match="a forward at least"):
        monitor.heatmap(tmp_path / "none.png")
    for place, batch in enumerate(batches):
        model(batch)
        if place < steps:
            monitor.step()
    console = Console(file=io.StringIO(), width=140)
    console.print(monitor.table())
    text = console.file.getvalue()
    assert all(name in text for name in monitor.names) and text.count("24") >= 3 and "max/mean" in text
    monitor.heatmap(tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_multiples_of_the_mean():
    from moekit.monitor._show import relative

    timeline = torch.tensor([[1, 3, 0, 0, 7, 7], [0, 0, 0, 0, 0, 0]])
    assert relative(timeline)[0].tolist() == [1.0, 3.0, 0.0, 0.0] and relative(timeline)[1].isnan().all()


def test_nothing_is_left_in_the_model():
    model, (x,) = net(), inputs(1)
    keys = model.state_dict().keys()
    with monitoring.attach(model) as monitor:
        model(x)
        assert model.state_dict().keys() == keys
        copy.deepcopy(model)(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        torch.load(file, weights_only=False)(x)
        assert monitor.stats()["tokens"] == T
    model(x)
    assert monitor.stats()["tokens"] == T
    assert not any(module._forward_hooks for module in model.modules())
    assert "2 routers: layers.0.router" in repr(monitor)


def test_what_is_no_model_of_experts():
    with pytest.raises(ValueError, match=r"moekit\.nn\.Router"):
        monitoring.attach(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        monitoring.attach("model")


def test_counting_sees_what_replay_made_of_the_choice():
    model, (x,) = net(), inputs(1)
    other = perturbed(model)
    monitor = monitoring.attach(model)
    with moekit.Replay(other).record() as choices:
        other(x)
    with moekit.Replay(model).play(choices):
        model(x)
    found = [counts.tolist() for counts in monitor.counts().values()]
    assert found == [one.long().flatten().bincount(minlength=E).tolist() for one in choices.passes[0]]


def test_totals_move_with_the_model_and_begin_on_a_real_device():
    from moekit._routers import Seen
    from moekit.monitor._totals import Totals
    from moekit.routing import Scored

    totals = Totals(history=2, expected=(7, torch.device("cpu")))  # of which the first forward knows better
    for device in ("meta", "cpu", "cpu"):
        indices = torch.tensor([[0, 1], [2, -1]]).to(device)
        totals.add(Seen(indices, None, Scored(torch.zeros(2, 3, device=device), "softmax", None)))
    counts, sums = totals.since_read()
    assert counts.tolist() == [2, 2, 2, 2, 4] and sums.tolist() == pytest.approx([4 * math.log(3), 4 * math.log(3) ** 2])


SCRIPT = """
import sys, torch, torch.distributed as dist
sys.path[:0] = {paths!r}
from _layers import inputs, net
import moekit
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{file}", rank=rank, world_size=2)
model, batches = net(), inputs(4)
monitor = moekit.monitor.attach(model, group=dist.group.WORLD)
for step in range(2):
    model(batches[2 * step + rank])
    monitor.step()
found, history = monitor.stats(), monitor.history()
monitor.remove()
alone = moekit.monitor.attach(model)
for step in range(2):
    model(batches[2 * step])
    model(batches[2 * step + 1])
    alone.step()
wanted = alone.stats()
assert found["tokens"] == 24 and all(abs(found[name] - wanted[name]) < 1e-12 for name in wanted), (found, wanted)
assert all(torch.equal(line, history[name]) for name, line in alone.history().items())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_several_processes(tmp_path: Path):
    tests = Path(__file__).parent
    script = SCRIPT.format(paths=[str(tests), str(tests.parent)], file=tmp_path / "meeting")
    runs = [subprocess.Popen([sys.executable, "-c", script, str(rank)]) for rank in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]


def test_all_that_is_read_is_summed_over_the_group(monkeypatch: pytest.MonkeyPatch):
    """In place of a second process, one that has seen the same."""
    model, (x,) = net(), inputs(1)
    group, asked = object(), []

    def doubled(counts: Tensor, among: object) -> Tensor:
        asked.append((among, counts.dtype))
        return 2 * counts

    monkeypatch.setattr(monitoring, "summed_over", doubled)
    monitor, alone = monitoring.attach(model, group=group), monitoring.attach(model)
    model(x)
    found, wanted = monitor.stats(), alone.stats()
    assert asked == [(group, torch.float64), (group, torch.int64)]  # and one call for each dtype
    assert found == {**wanted, **{name: 2 * value for name, value in wanted.items() if name.endswith("tokens")}}
