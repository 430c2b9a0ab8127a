"""What a monitor adds up for one router, on the router's device: nothing here waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

import moekit.ops.counts  # noqa: F401 - which defines the operator
from moekit._routers import Seen
from moekit.ops import tables
from moekit.ops.topk import token_scores

EXTRA = 2  # what counts hold after the [E] slots of each expert: slots of none, and tokens
NUM_SUMS = 2  # the sums over tokens of the router's entropy, and of the squared logsumexp of its logits
_SINCE_READ, _SINCE_STEP = 0, 1


class Totals:
    """Running sums of one router, and their history; None as long as it is not known for how many experts.

    Attributes:
        counts: ``[2, E + 2]`` int64, since the last reading and since the last interval was closed.
        sums: ``[2]`` floating point, since the last reading.
        past: ``[history, E + 2]`` int64, the counts of closed intervals.
    """

    def __init__(self, history: int, expected: tuple[int, torch.device] | None = None) -> None:
        """Sums of E experts on a device, as it is ``expected``: code that is compiled is then compiled once."""
        self.counts: Tensor | None = None
        self.sums: Tensor | None = None
        self.past: Tensor | None = None
        self._history = history
        if expected is not None:
            self._make(*expected)

    def _make(self, num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
        self.counts = torch.zeros(2, num_experts + EXTRA, dtype=torch.int64, device=device)
        self.sums = torch.zeros(NUM_SUMS, dtype=_wide(device), device=device)
        self.past = self.counts.new_zeros(self._history, num_experts + EXTRA) if self._history else None
        return self.counts, self.sums

    def add(self, seen: Seen) -> None:
        """Add a forward, unless it is one that a backward computes again.

        Which it is, the operator finds out: a forward has to issue the same operations both times, or selective
        checkpointing would hand out results of others. It finds out at each run, in compiled code as well.
        """
        with torch.no_grad():
            with torch.inference_mode(False):  # a total that begins there could be written to nowhere else
                counts, sums = self._ready(seen.scored.logits)
            torch.ops.moekit.accumulate(counts, _tally(seen))
            torch.ops.moekit.accumulate(sums, _score_sums(seen))

    def _ready(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        device, num_experts, counts, sums = logits.device, logits.shape[1], self.counts, self.sums
        if counts is None or sums is None or counts.is_meta or counts.shape[1] != num_experts + EXTRA:
            return self._make(num_experts, device)
        if counts.device == device:
            return counts, sums
        self.counts, self.sums = counts.to(device), sums.to(device, _wide(device))  # the model has moved
        self.past = None if self.past is None else self.past.to(device)
        return self.counts, self.sums

    def close(self, place: int) -> None:
        """Put the counts since the last interval into the history at ``place``."""
        if self.counts is not None and self.past is not None:
            self.past[place].copy_(self.counts[_SINCE_STEP])
            self.counts[_SINCE_STEP].zero_()

    def halve(self) -> None:
        """Join each two neighbours of a history that is full."""
        if self.past is not None:
            half = self._history // 2
            self.past[:half] = self.past.view(half, 2, -1).sum(1)
            self.past[half:].zero_()

    def clear(self) -> None:
        """Begin a new reading."""
        if self.counts is not None and self.sums is not None:
            self.counts[_SINCE_READ].zero_()
            self.sums.zero_()

    def since_read(self) -> list[Tensor]:
        """``[E + 2]`` and ``[2]``; nothing where nothing is known."""
        return [] if self.counts is None or self.sums is None else [self.counts[_SINCE_READ], self.sums]

    def timeline(self, length: int) -> list[Tensor]:
        """``[length + 1, E + 2]``: the closed intervals and the open one; nothing where nothing is known."""
        if self.counts is None or self.past is None:
            return []
        return [torch.cat([self.past[:length], self.counts[_SINCE_STEP:]])]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _tally(seen: Seen) -> Tensor:
    """``[E + 2]``: slots of each expert, slots of none but padding's, tokens but padding."""
    indices, found, padding = seen.indices, seen.counts, seen.scored.padding_mask
    if found is None:
        found = tables.route_indices(indices, seen.scored.logits.shape[1])[0]
    none = indices < 0
    if padding is None:
        tokens = found.new_full((1,), indices.shape[0])
    else:
        none, tokens = none & ~padding.unsqueeze(1), (~padding).sum().view(1)
    return torch.cat([found, none.sum().view(1), tokens])


def _score_sums(seen: Seen) -> Tensor:
    """The sums over tokens of the entropy of the scores, in nats, and of the squared logsumexp of the logits."""
    logits, score, padding, _ = seen.scored
    logits = logits.detach()
    entropy = torch.special.entr(token_scores(logits, score, padding)).sum(1)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(1).square()
    if padding is not None:
        z = z.masked_fill(padding, 0)
    return torch.stack([entropy, z]).sum(1, dtype=_wide(logits.device))
