"""The callback of Transformers' Trainer that logs a monitor's figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from moekit import _check

_OP = "monitor.callback"


def callback(trainer: Any, monitor: Any, layers: bool, attach: Callable[..., Any]) -> Any:
    """See :func:`moekit.monitor.callback`; ``attach`` is :func:`moekit.monitor.attach`."""
    import transformers

    if not isinstance(trainer, transformers.Trainer):
        raise _check.wrong_type(_OP, "trainer", "a transformers.Trainer", type(trainer).__name__)

    class MoECallback(transformers.TrainerCallback):
        """Puts the figures of ``monitor`` into what the trainer logs."""

        def __init__(self) -> None:
            self.monitor = monitor if monitor is not None else attach(trainer.model, group=_everybody(trainer))
            self._require_model()

        def _require_model(self) -> None:
            if not self.monitor.watches(trainer.model):
                raise _check.fail(_OP, "monitor", "of the trainer's model", "one of another model")

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if monitor is None and not self.monitor.watches(trainer.model):  # made anew, by the trainer's model_init
                self.monitor.remove()
                self.monitor = attach(trainer.model, group=_everybody(trainer))
            self._require_model()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.monitor.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs is None or "loss" not in logs:  # the summary at the end, or metrics of evaluation
                return
            figures = {f"moe/{name}": value for name, value in self.monitor.read(layers=layers).items()}
            figures = {name: value for name, value in figures.items() if not math.isnan(value)}
            logs.update(figures)
            if state.log_history:
                state.log_history[-1].update(figures)

    made = MoECallback()
    trainer.add_callback(made)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())
    return made


def _everybody(trainer: Any) -> Any:
    """The group of all processes, None if there is one alone."""
    if trainer.args.world_size == 1:
        return None
    from torch.distributed import group

    return group.WORLD
