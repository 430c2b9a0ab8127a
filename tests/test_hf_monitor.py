"""moekit.monitor on Transformers' routers, and in its Trainer's logs."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from _layers import LAYERS, REENTRANT, E, H, K, checkpointed, ids, qwen3
from torch import Tensor, nn

import moekit
from moekit import monitor as monitoring

NAMES = tuple(f"model.layers.{i}.mlp.gate" for i in range(LAYERS))


def by_hand(model: nn.Module, batches: list[Tensor]) -> list[list[int]]:
    """Slots of each expert of each layer, from what the routers return."""
    seen: list[list[int]] = [[0] * E for _ in range(LAYERS)]
    hooks = []
    for counts, layer in zip(seen, model.model.layers, strict=True):

        def count(module, args, output, counts=counts):
            for expert in output[2].flatten().tolist():
                counts[expert] += 1

        hooks.append(layer.mlp.gate.register_forward_hook(count))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_counts(reentrant: bool | None):
    model, batches = qwen3(), ids(4)
    wanted = by_hand(model, batches)
    if reentrant is not None:
        checkpointed(model, reentrant)
    monitor = monitoring.attach(model, evaluation=True)
    for batch in batches:
        model(batch, labels=batch, use_cache=False).loss.backward()
    assert monitor.names == NAMES and [counts.tolist() for counts in monitor.counts().values()] == wanted
    model.eval()
    model(batches[0])
    assert [counts.tolist() for counts in monitor.counts(evaluation=True).values()] == by_hand(model, batches[:1])
    assert [counts.tolist() for counts in monitor.counts().values()] == wanted


def test_figures():
    model, (batch,) = qwen3(), ids(1)
    monitor = monitoring.attach(model)
    logits = [value.detach() for value in model(batch, output_router_logits=True).router_logits]
    stats = monitor.stats()
    for name, value in zip(NAMES, logits, strict=True):
        probs = value.double().softmax(1)
        assert stats[f"{name}/router_entropy"] == pytest.approx(float(-(probs * probs.log()).sum(1).mean()), rel=1e-6)
        assert stats[f"{name}/router_z"] == pytest.approx(float(value.double().logsumexp(1).square().mean()), rel=1e-6)
    assert stats["tokens"] == batch.numel() and stats["dropped_share"] == 0


def test_layers_compiled():
    torch._dynamo.reset()
    model, batches = qwen3(), ids(3)
    wanted = by_hand(model, batches[1:])
    monitor = monitoring.attach(model)
    for layer in model.model.layers:
        layer.mlp.compile(backend="aot_eager")
    model(batches[0])
    monitor.reset()
    for batch in batches[1:]:
        model(batch, labels=batch).loss.backward()
    assert [counts.tolist() for counts in monitor.counts().values()] == wanted


def test_a_rank_counts_before_its_experts_are_numbered_anew():
    """As releases of Transformers do where experts are parallel, by a hook."""
    model, (batch,) = qwen3(), ids(1)
    wanted, order = by_hand(model, [batch]), []

    def shard(module, args, output):
        order.append("shard")
        return output[0], output[1] * 0, output[2] * 0

    shard.__module__ = "transformers.integrations.tensor_parallel"
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(shard)
    gate.register_forward_hook(lambda module, args, output: order.append(bool(output[2].any())))
    monitor = monitoring.attach(model)
    model(batch)
    assert next(iter(monitor.counts().values())).tolist() == wanted[0] and order == ["shard", False]


def test_a_program_that_is_exported_has_no_totals():
    gate = qwen3().model.layers[0].mlp.gate
    monitor = monitoring.attach(gate)
    x = torch.randn(3, H)
    program = torch.export.export(gate, (x,)).module()
    assert torch.equal(program(x)[2], gate(x)[2]) and monitor.stats()["tokens"] == 3


def test_replayed_choices_are_counted_whichever_came_first():
    model, (batch, other) = qwen3(), ids(2)
    replay = None
    with moekit.hf.replay(model).record() as choices:
        model(other)
    wanted = by_hand(model, [other])
    before = monitoring.attach(model)
    replay = moekit.hf.replay(model)
    after = monitoring.attach(model)
    with replay.play(choices):
        model(batch)
    for monitor in (before, after):
        assert [counts.tolist() for counts in monitor.counts().values()] == wanted


def test_a_router_that_cannot_be_read_is_named():
    model, (batch,) = qwen3(), ids(1)
    gate = model.model.layers[1].mlp.gate
    gate.forward = type(gate).forward.__get__(gate)
    monitor = monitoring.attach(model)
    assert monitor.names == NAMES[:1] and any(name.startswith("model.layers.1.mlp") for name in monitor.unread)
    assert "not read: model.layers.1.mlp" in repr(monitor)
    model(batch)
    assert "not read" in [*monitor.table().columns[1].cells]
    first = model.model.layers[0].mlp.gate
    first.forward = type(first).forward.__get__(first)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp"):
        monitoring.attach(model)


# --- Trainer --------------------------------------------------------------------------------------------------------


def trainer_of(folder: Path, **settings: object):
    import transformers

    class Reporter(transformers.TrainerCallback):
        """As Transformers' own that report: it writes down what is in the logs when its turn comes."""

        def __init__(self) -> None:
            self.logs: list[dict] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(dict(logs))

    data = [{"input_ids": row, "labels": row} for batch in ids(8) for row in batch]
    common = {"logging_steps": 2, "max_steps": 4, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    source = {"model_init": settings.pop("model_init")} if "model_init" in settings else {"model": settings.pop("model")}
    args = transformers.TrainingArguments(folder, **{"report_to": "none", **common, **batches, **settings})
    reporter = Reporter()
    data_of = {"train_dataset": data, "eval_dataset": data[:2]}
    trainer = transformers.Trainer(args=args, callbacks=[reporter], **data_of, **source)
    return trainer, reporter


@pytest.mark.parametrize("made_by_trainer", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_logs_the_figures(tmp_path: Path, checkpointing: bool, made_by_trainer: bool, capsys):
    def model() -> nn.Module:
        made = qwen3()
        if checkpointing:
            checkpointed(made, reentrant=False)
        return made

    source = {"model_init": model} if made_by_trainer else {"model": model()}
    trainer, reporter = trainer_of(tmp_path, eval_strategy="steps", eval_steps=2, **source)
    callback = moekit.monitor.callback(trainer)
    trainer.train()
    with_loss = [logs for logs in reporter.logs if "loss" in logs]
    assert len(with_loss) == 2
    for logs in with_loss:  # 2 steps of 2 micro-batches of 2 sequences of 5 tokens
        assert logs["moe/tokens"] == 2 * 2 * 2 * 5 and 1 <= logs["moe/load_max_over_mean"] <= E / K
    assert not any("moe/tokens" in logs for logs in reporter.logs if "loss" not in logs)
    kept = [entry["moe/tokens"] for entry in trainer.state.log_history if "moe/tokens" in entry]
    assert kept == [40.0, 40.0]
    assert [line.shape for line in callback.monitor.history().values()] == [(4, E)] * LAYERS
    assert all(line.sum(1).tolist() == [20 * K] * 4 for line in callback.monitor.history().values())
    assert callback.monitor.watches(trainer.model)


def test_figures_of_each_layer_and_a_monitor_of_ones_own(tmp_path: Path, capsys):
    model = qwen3()
    trainer, reporter = trainer_of(tmp_path, model=model)
    monitor = monitoring.attach(model, history=0)
    callback = moekit.monitor.callback(trainer, monitor=monitor, layers=True)
    trainer.train()
    assert callback.monitor is monitor
    assert all(f"moe/{name}/load_cv" in reporter.logs[0] for name in NAMES)
    with pytest.raises(ValueError, match="the trainer's model"):
        moekit.monitor.callback(trainer, monitor=monitoring.attach(qwen3()))
    with pytest.raises(TypeError, match=r"transformers\.Trainer"):
        moekit.monitor.callback(model)


def test_transformers_own_callback_of_tensorboard_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """With a stand-in for the writer alone, as TensorBoard need not be installed."""
    from transformers.integrations import integration_utils

    written: dict[str, list[tuple[int, float]]] = {}

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.log_dir = log_dir

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.setdefault(name, []).append((step, value))

        def add_text(self, *_: object) -> None: ...

        flush = close = add_hparams = lambda self, *_, **__: None

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    trainer, reporter = trainer_of(tmp_path, model=qwen3(), report_to="tensorboard")
    moekit.monitor.callback(trainer)
    trainer.train()
    for name in ("load_max_over_mean", "router_z", "tokens"):
        logged = [logs[f"moe/{name}"] for logs in reporter.logs if "loss" in logs]
        assert written[f"train/moe/{name}"] == [(2, logged[0]), (4, logged[1])]


def test_tensorboard_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer, reporter = trainer_of(tmp_path, model=qwen3(), report_to="tensorboard")
    moekit.monitor.callback(trainer)
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("load_max_over_mean", "router_z", "tokens"):
        found = [event.value for event in events.Scalars(f"train/moe/{name}")]
        assert found == pytest.approx([logs[f"moe/{name}"] for logs in reporter.logs if "loss" in logs])
        assert len(found) == 2
