"""How evenly the experts of a model are loaded, watched while it trains.

::

    monitor = moekit.monitor.attach(model)  # moekit.nn or Transformers
    for batch in batches:
        ...
        optimizer.step()
        monitor.step()  # closes an interval of the history
        if step % 100 == 0:
            log(monitor.read())  # the one place where the device is waited for

Each router's forward is counted on its device, without a wait. A forward that activation checkpointing computes again counts
once; evaluation is kept apart; gradient accumulation needs no care. The model's state dict has nothing of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moekit import _check
from moekit._routers import Found, Hook, find
from moekit.monitor import _show
from moekit.monitor._figures import FIGURES, figures, summary
from moekit.monitor._totals import Totals
from moekit.nn.router import exporting
from moekit.ops.losses import summed_over

if TYPE_CHECKING:
    from rich.table import Table
    from torch.distributed import ProcessGroup

__all__ = ["FIGURES", "Monitor", "attach", "callback"]

_OP = "monitor.attach"
# Releases of Transformers before 5.24 number a rank's experts anew in a hook on the router, where experts are parallel.
_SHARDING = "transformers.integrations.tensor_parallel"


def attach(model: nn.Module, *, evaluation: bool = False, history: int = 256, group: ProcessGroup | None = None) -> Monitor:
    """Watch every router of ``model``.

    Attach before code is compiled: what is compiled already ignores new hooks.

    Args:
        model: with :class:`moekit.nn.Router` or routers of Transformers in it.
        evaluation: count forwards of routers that are in evaluation mode as well, apart from the others.
        history: the most intervals that are kept, an even number; 0 for none. When they are full, each two neighbours are
            joined, so that they always reach back to the beginning. They take ``8 * history * (E + 2)`` bytes a router on
            its device: 13 MB for 48 routers of 128 experts.
        group: processes over which figures are summed when they are read. All of them have to read then.

    Returns:
        the :class:`Monitor`.

    Raises:
        ValueError: no router that can be read, or a history that cannot be halved.
        TypeError: no module.

    Examples:
        >>> import torch, moekit.monitor, moekit.nn
        >>> model = torch.nn.Sequential(moekit.nn.MoE.build(16, 8, num_experts=4, k=2))
        >>> monitor = moekit.monitor.attach(model)
        >>> y = model(torch.randn(5, 16))
        >>> monitor.names, monitor.read(layers=False)["tokens"]
        (('0.router',), 5.0)
    """
    return Monitor(model, evaluation=evaluation, history=history, group=group)


class Monitor:
    """The load of the experts of a model: see :func:`attach`.

    Attributes:
        names: the paths of the routers that are watched, in order.
        unread: the paths of what looks like a router, or like experts without one, and cannot be read.
    """

    def __init__(
        self, model: nn.Module, *, evaluation: bool = False, history: int = 256, group: ProcessGroup | None = None
    ) -> None:
        history = _check.positive(_OP, "history", history, at_least=0)
        if history % 2:
            raise _check.fail(_OP, "history", "even", history)
        routers, self.unread = find(_OP, model)
        self.names = tuple(router.name for router in routers)
        self._counters = [_Counter(router, evaluation, history) for router in routers]
        self._evaluation, self._history, self._group = bool(evaluation), history, group
        self._steps = self._length = 0
        self._span = 1  # steps an interval
        self._hooks = [counter.attach() for counter in self._counters]

    def step(self) -> None:
        """Close an interval of the history, after an optimiser's step as a rule. Nothing waits for the device.

        An interval is a step, or as many as it took to have no more intervals than asked for; without a history, nothing.
        """
        self._steps += 1
        if not self._history or self._steps % self._span:
            return
        with torch.no_grad():
            for counter in self._counters:
                counter.training.close(self._length)
        self._length += 1
        if self._length == self._history:
            for counter in self._counters:
                counter.training.halve()
            self._length, self._span, self._steps = self._history // 2, self._span * 2, 0

    def stats(self, *, layers: bool = True, evaluation: bool = False) -> dict[str, float]:
        """The figures since the last :meth:`read` or :meth:`reset`, of all routers and of each; waits for the device.

        Args:
            layers: include the figures of each router, as ``"<path of the router>/<figure>"``.
            evaluation: the figures of evaluation.

        Returns:
            by name (see ``moekit.monitor.FIGURES``), over all routers: the mean, of ``tokens`` the most and of
            ``dead_experts`` the sum; and ``worst_load_max_over_mean``. NaN where nothing was counted.

        Raises:
            ValueError: evaluation is not counted.
        """
        found = self._layers(evaluation)
        each = {f"{router}/{name}": value for router, one in found.items() for name, value in one.items()}
        return {**summary(found.values()), **(each if layers else {})}

    def read(self, *, layers: bool = True, evaluation: bool = False) -> dict[str, float]:
        """:meth:`stats`, and begin anew."""
        found = self.stats(layers=layers, evaluation=evaluation)
        for counter in self._counters:
            counter.totals(evaluation).clear()
        return found

    def reset(self) -> None:
        """Begin anew: figures of training and of evaluation, not the history."""
        for counter in self._counters:
            for totals in (counter.training, counter.evaluation):
                if totals is not None:
                    totals.clear()

    def counts(self, *, evaluation: bool = False) -> dict[str, Tensor]:
        """``[E]`` int64 on the CPU for each router: the slots of each expert since the last reading.

        A router that was never called may be missing, if its number of experts is not known.
        """
        return {name: found[0][:-2] for name, found in self._since_read(evaluation).items() if found}

    def history(self) -> dict[str, Tensor]:
        """``[intervals, E]`` int64 on the CPU for each router, as in :meth:`counts`: what :meth:`step` closed."""
        return {name: timeline[:-1, :-2] for name, timeline in self._timelines().items()}

    def table(self, *, evaluation: bool = False) -> Table:
        """The figures as a table of rich, to be printed with ``rich.print``."""
        found = self._layers(evaluation)
        return _show.table(found, summary(found.values()), self.unread)

    def heatmap(self, path: str | Path) -> None:
        """Draw the history into a PNG file: for each router the experts over time, as multiples of the mean.

        Raises:
            ValueError: nothing has been counted, or there is no history.
        """
        timelines = self._timelines()
        if not any(timeline.any() for timeline in timelines.values()):
            raise _check.fail("monitor.heatmap", "the history", "of a forward at least (of training)", "none")
        if self._length:
            timelines = {n: t if t[-1].any() else t[:-1] for n, t in timelines.items()}
        _show.heatmap(path, timelines, self._span)

    def watches(self, model: nn.Module) -> bool:
        """Whether the routers that are watched are those of ``model``, wrapped or not."""
        inside = {id(module) for module in model.modules()}
        return all(id(counter.router.module) in inside for counter in self._counters)

    def remove(self) -> None:
        """Take the hooks off the model. What was counted can still be read."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        unread = f"; not read: {', '.join(self.unread)}" if self.unread else ""
        return f"Monitor({len(self.names)} routers: {', '.join(self.names)}{unread})"

    # --- reading ------------------------------------------------------------------------------------------------

    def _layers(self, evaluation: bool) -> dict[str, dict[str, float]]:
        nothing = torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.float32)
        return {name: figures(*(found or nothing)) for name, found in self._since_read(evaluation).items()}

    def _since_read(self, evaluation: bool) -> dict[str, list[Tensor]]:
        if evaluation and not self._evaluation:
            raise _check.fail("monitor", "evaluation", "counted: attach(model, evaluation=True)", evaluation)
        return self._fetch([counter.totals(evaluation).since_read() for counter in self._counters])

    def _timelines(self) -> dict[str, Tensor]:
        if not self._history:
            raise _check.fail("monitor", "history", "above 0 when attaching", 0)
        fetched = self._fetch([counter.training.timeline(self._length) for counter in self._counters])
        return {name: found[0] for name, found in fetched.items() if found}

    def _fetch(self, parts: list[list[Tensor]]) -> dict[str, list[Tensor]]:
        """Tensors of each router on the CPU, summed over the group; one transfer for each device and dtype."""
        if self._group is not None and not all(parts):
            missing = ", ".join(name for name, found in zip(self.names, parts, strict=True) if not found)
            raise _check.fail("monitor", "routers", "run in every process of the group before they are read", missing)
        kinds = {(t.device, t.dtype) for found in parts for t in found}
        here: dict[int, Tensor] = {}
        for kind in sorted(kinds, key=str):
            mine = [t for found in parts for t in found if (t.device, t.dtype) == kind]
            flat = torch.cat([t.reshape(-1) for t in mine])
            flat = flat if self._group is None else summed_over(flat, self._group)
            pieces = flat.cpu().split([t.numel() for t in mine])
            here.update({id(t): piece.view(t.shape) for t, piece in zip(mine, pieces, strict=True)})
        return {name: [here[id(t)] for t in found] for name, found in zip(self.names, parts, strict=True)}


class _Counter:
    """The hook of one router."""

    def __init__(self, router: Found, evaluation: bool, history: int) -> None:
        self.router = router
        self.training = Totals(history, router.expected)
        self.evaluation = Totals(0, router.expected) if evaluation else None

    def attach(self) -> Any:
        """Behind the hooks that change what the router chose, such as moekit.Replay's; before those that shard it."""
        module = self.router.module
        hook = module.register_forward_hook(Hook(self.count), with_kwargs=True)
        others = [(number, other) for number, other in module._forward_hooks.items() if number != hook.id]
        places = [place for place, (_, other) in enumerate(others) if getattr(other, "__module__", None) == _SHARDING]
        for number, _ in others[places[0] :] if places else []:
            module._forward_hooks.move_to_end(number)
        return hook

    def count(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        totals = self.training if module.training else self.evaluation
        if totals is not None and not exporting():  # a program has no place for them
            totals.add(self.router.seen(args, kwargs, output))

    def totals(self, evaluation: bool) -> Totals:
        found = self.evaluation if evaluation else self.training
        if found is None:
            raise _check.fail("monitor", "evaluation", "counted: attach(model, evaluation=True)", evaluation)
        return found


def callback(trainer: Any, *, monitor: Monitor | None = None, layers: bool = False) -> Any:
    """Have a Transformers ``Trainer`` log the figures wherever it logs to.

    ::

        trainer = Trainer(model, args, ...)
        moekit.monitor.callback(trainer)
        trainer.train()

    At its logging steps the figures since the last ones join the others as ``moe/load_cv`` and so on, of training, summed
    over all processes. An interval of the history is an optimiser's step.

    Args:
        trainer: the ``transformers.Trainer``. The callback becomes the first of its callbacks, since those that report
            have to find the figures in what they are given.
        monitor: of the trainer's model; attached by default.
        layers: log the figures of each router as well.

    Returns:
        the ``transformers.TrainerCallback``, with the monitor in its attribute ``monitor``.

    Raises:
        ImportError: Transformers is not installed.
        ValueError: the monitor of another model.
        TypeError: something else than a trainer.
    """
    from moekit.hf import _trainer

    return _trainer.callback(trainer, monitor, layers, attach)
