"""Rows of tokens that are not brought together: where they are, for products that fetch them from there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.ops import rows


class Gathered(NamedTuple):
    """The rows of tokens in the order of their experts: ``tokens[row_token]``, zeros where there is no token.

    A product takes them in place of a tensor ``[R, H]``. What can fetch single rows needs no copy of all of them; the
    others make one for as long as they work.
    """

    tokens: Tensor  # [T, H]
    tables: tuple[Tensor, Tensor, Tensor]  # row_token [R], and its inverse: see moekit.ops.rows

    @property
    def index(self) -> Tensor:
        """The token of each row."""
        return self.tables[0]

    def together(self) -> Tensor:
        """All of them, ``[R, H]``."""
        return rows.move_rows(self.tokens, *self.tables)

    def block(self, block: slice) -> Tensor:
        """Some of them, on a CPU."""
        token = self.index[block]
        known = (token >= 0) & (token < self.tokens.shape[0])
        found = self.tokens.index_select(0, torch.where(known, token, 0))
        return found if bool(known.all()) else found.masked_fill_(~known.unsqueeze(1), 0)


def together(x: Tensor | Gathered) -> Tensor:
    """A tensor as it is, and rows that are not brought together brought together."""
    return x.together() if isinstance(x, Gathered) else x


def block_of(x: Tensor | Gathered, block: slice) -> Tensor:
    """Some rows of either."""
    return x.block(block) if isinstance(x, Gathered) else x[block]
