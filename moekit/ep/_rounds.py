"""Rounds: an exchange in parts, of which no rank receives more rows at a time than it has room for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moekit import _backend, _check
from moekit.ep._eager import eager
from moekit.ep._ranks import Shares
from moekit.ep._started import Experts, send
from moekit.ep._ways import Uneven
from moekit.ops import tables
from moekit.ops._segments import expert_of_row
from moekit.ops.rows import move_rows, sum_rows
from moekit.routing import Routing


def rounds(counts: Sequence[Sequence[int]], max_rows: int) -> int:
    """The fewest rounds in which no rank receives more than ``max_rows`` at a time.

    Args:
        counts: of each rank, the rows that it has for each rank.
        max_rows: at least the number of ranks, for a round may bring a row of each.
    """
    sent_to = [*zip(*counts, strict=True)]

    def fits(number: int) -> bool:
        return all(sum(-(-rows // number) for rows in column) <= max_rows for column in sent_to)

    return bisect_left(range(1, max((1, *map(max, sent_to)))), True, key=fits) + 1


def parts(rows: Sequence[int], number: int) -> list[list[int]]:
    """How many of the rows of each rank go in each round: all rounds but the last ones have equally many."""
    return [[max(min(-(-n // number), n - r * -(-n // number)), 0) for n in rows] for r in range(number)]


class Rounds:
    """A dispatch in rounds, none of which has begun.

    Rows go round by round, and by rank within a round. They come back into the order of the routing before they are
    summed, once, so that neither sums nor gradients know of the rounds::

        rows by rank     a a a a a b b c c c c
        in 3 rounds      a a b c c | a a b c c | a

    Args:
        shares: of the experts.
        max_rows: for the error.
        tokens: ``[T, H]``.
        weights: ``[T, K]``.
        numbers: ``[T, K]``, of the experts.
        ranks: the tokens' routing over ranks.
        there: of each round, how many rows go to each rank.
        back: of each round, how many come from each rank.
    """

    def __init__(
        self,
        shares: Shares,
        max_rows: int,
        tokens: Tensor,
        weights: Tensor,
        numbers: Tensor,
        ranks: Routing,
        there: list[list[int]],
        back: list[list[int]],
    ) -> None:
        self.shares, self.max_rows = shares, max_rows
        self.tokens, self.weights, self.numbers, self.ranks = tokens, weights, numbers, ranks
        self.there, self.back = there, back

    def finish(self) -> NoReturn:
        """There is no dispatch without the experts."""
        wanted = "enough for what each rank receives, unless moekit.ep.run (or start(...).through) runs the experts"
        raise _check.fail(self.shares.op, "max_rows", wanted, f"{self.max_rows}, which takes {len(self.there)} rounds")

    @eager
    def through(self, experts: Experts) -> Tensor:
        """The experts' results, ``[T, H]``."""
        found, order = self.ranks.row_tables(), self._by_round()
        rows, weights, numbers = (
            _in_order(move_rows(given, *found), order).split([sum(sizes) for sizes in self.there])
            for given in (self.tokens, self.weights, self.numbers)
        )
        sent, tokens = [*rows], found[0][order].split([len(part) for part in rows])
        del rows
        wanted, given, backend = sent[0].requires_grad, self.tokens.detach(), _backend.current()

        def rows_of(number: int) -> Tensor:
            """The rows to send; in backward, where they are gone, from the tokens."""
            part, sent[number] = sent[number], None
            return given.index_select(0, tokens[number]).requires_grad_(wanted) if part is None else part

        def one(number: int) -> Tensor:
            way = partial(Uneven, send=self.there[number], receive=self.back[number])
            with _backend.backend(backend):  # also in backward, wherever that is
                return send(self.shares, way, rows_of(number), weights[number], numbers[number]).through(experts)

        # A checkpoint keeps the arguments of what it runs again: there are none of row size.
        out = [checkpoint(one, number, use_reentrant=False) for number in range(len(self.there))]
        return sum_rows(_in_order(torch.cat(out), order.argsort()), None, *found)

    def _by_round(self) -> Tensor:
        """The row of the routing that stands in each place of the rounds, ``[S]``."""
        counts, ranks = self.ranks.tokens_per_expert, self.ranks.num_experts
        rank = expert_of_row(self.ranks.offsets, self.ranks.num_rows)
        place = torch.arange(self.ranks.num_rows, device=rank.device) - (self.ranks.offsets - counts)[rank]
        round_ = place // -(-counts // len(self.there))[rank]
        return (round_ * ranks + rank).argsort(stable=True)


def _in_order(rows: Tensor, order: Tensor) -> Tensor:
    return move_rows(rows, order, *tables.rows_of_tokens(order, rows.shape[0]))
