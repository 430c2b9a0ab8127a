"""One model in training, and what it leaves behind: losses, step times, held-out measurements with expert loads."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.demo import DemoError
from moekit.demo.config import Config
from moekit.demo.data import Corpus, bits, heldout_windows, training_batch
from moekit.demo.model import ByteLM
from moekit.demo.ranks import Alone

# The cosine ends here, as a share of the highest learning rate.
_FINAL_RATE = 0.05
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Measurement:
    """The held-out windows after some steps: bits per byte and ``load [L, E]``, tokens of each layer's experts."""

    step: int
    bits_per_byte: float
    load: Tensor


class Run:
    """One model, its optimiser and its own stream of batches: two runs of one seed see the same batches.

    Attributes:
        ranks: who trains together.
        layout: how the model is spread over them, in words.
        losses: training loss of each step, bits per byte.
        seconds: duration of each step.
        measurements: of the held-out windows, in order.
        load: ``[L, E]``, tokens of each layer's experts in the last step's batch.
    """

    def __init__(self, model: ByteLM, config: Config, corpus: Corpus, seed: int, ranks: Alone | None = None) -> None:
        self.model, self.config, self.corpus = model, config, corpus
        self.device = model.head.weight.device
        self.ranks = Alone() if ranks is None else ranks
        if config.batch % self.ranks.count:
            raise DemoError(f"setting 'batch': expected a multiple of the {self.ranks.count} processes, got {config.batch}")
        self._called, self.layout = self.ranks.spread(model)
        self.windows = heldout_windows(corpus.heldout, config.heldout_windows, config.context)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.measurements: list[Measurement] = []
        self.load = model.load()
        self._batches = torch.Generator().manual_seed(seed)
        # Experts have a group of their own, for a fused step takes either DTensors, as they may be, or plain tensors.
        experts = {p for layer in model.layers for p in layer.experts.parameters()}
        decayed = [p for p in model.parameters() if p.dim() > 1 and p not in experts]
        gains = [p for p in model.parameters() if p.dim() == 1]
        self._optimiser = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": [*experts], "weight_decay": config.weight_decay},
                {"params": gains, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    @property
    def tokens_per_second(self) -> float:
        """Of the last steps, measurements not counted."""
        recent = self.seconds[-50:]
        return len(recent) * self.config.batch * self.config.context / sum(recent) if recent else 0.0

    def next_batch(self) -> Tensor:
        """``[B, C + 1]`` windows of the training text, of which each rank has its share."""
        batch = training_batch(self.corpus.train, self.config.batch, self.config.context, self._batches)
        return self.ranks.share(batch).to(self.device)

    def step(self) -> None:
        """Train on the next batch.

        Raises:
            DemoError: the loss is no longer finite.
        """
        start = time.perf_counter()
        number = len(self.losses)
        balanced = number >= self.config.unbalanced_steps
        by = self.config.balance if balanced else "none"
        self.model.train()
        self.model.set_balance(self.config.balance_coeff if by == "loss" else 0.0)
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(self.config, number)
        loss = self.model.loss(self.next_batch(), self._called)
        (loss + sum(layer.extra_loss for layer in self.model.layers)).backward()
        self.ranks.clip(self.model.parameters(), _MAX_GRAD_NORM)
        self._optimiser.step()
        self._optimiser.zero_grad()
        if self.config.balance == "bias":  # counts are cleared from the first step on
            self.model.update_bias(self.config.bias_rate if by == "bias" else 0.0, self.ranks.group)
        self.losses.append(bits(self.ranks.sum(loss.detach()).item() / self.ranks.count))
        self.load = self.ranks.sum(self.model.load())
        self.seconds.append(time.perf_counter() - start)
        if not math.isfinite(self.losses[-1]):
            raise DemoError(f"the loss is {self.losses[-1]} after step {number + 1}: try a lower learning_rate")

    @torch.no_grad()
    def measure(self) -> None:
        """Record bits per byte and expert load on the held-out windows."""
        self.model.eval()
        total, load = torch.zeros((), dtype=torch.float64, device=self.device), torch.zeros_like(self.load)
        for windows in self.windows.split(self.config.batch):
            mine = self.ranks.share(windows)
            loss = self.model.loss(mine.to(self.device))  # by a rank without windows, too, whose experts have work
            total += bits(loss.item()) * len(mine) if len(mine) else 0.0
            load = load + self.model.load()
        mean = self.ranks.sum(total).item() / len(self.windows)
        self.measurements.append(Measurement(len(self.losses), mean, self.ranks.sum(load).cpu()))


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (_FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2)


def measured_steps(config: Config) -> set[int]:
    """Steps after which the held-out windows are measured: evenly spaced, and where balancing starts."""
    even = {round(config.steps * i / config.measurements) for i in range(1, config.measurements + 1)}
    return even | {config.unbalanced_steps}
