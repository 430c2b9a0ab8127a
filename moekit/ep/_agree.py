"""What all ranks of a group have to be given alike: compared where it is given, and not met by an exchange that hangs."""

from __future__ import annotations

import socket
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from moekit.ep._faults import named, remember_hosts

_ABSENT = "nothing"  # what a rank has under a name that only others know


def agree(op: str, group: dist.ProcessGroup, **facts: Any) -> None:
    """All ranks of ``group`` call ``op`` with the same facts; a collective, so all of them must call.

    Args:
        op: the operation, as errors name it.
        group: the ranks.
        **facts: numbers, names, dtypes, shapes, or tuples of them: what compares by value, and can be pickled.

    Raises:
        ValueError: on every rank, with what each of them has of that which differs.
        RuntimeError: a rank that does not take part.
    """
    if group.size() == 1:
        return
    mine = ({"operation": op, **facts}, socket.gethostname())
    found: list[Any] = [None] * group.size()
    with named(op, group):
        dist.all_gather_object(found, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    remember_hosts(dict(zip(ranks, (host for _, host in found), strict=True)))
    different = differences(ranks, [given for given, _ in found])
    if different:
        raise ValueError(f"moekit.{op}: the ranks of a group must be given the same, got\n{different}")


class Once:
    """:func:`agree`, the first time only: for those who never read what others say.

    Args:
        op: as there, like ``group``.
        group: the ranks.
    """

    def __init__(self, op: str, group: dist.ProcessGroup) -> None:
        self.op, self.group, self.done = op, group, False

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Compare them, if none were compared before."""
        if not self.done:
            agree(self.op, self.group, **facts)
            self.done = True


def mark(facts: Mapping[str, Any]) -> int:
    """A number by which ranks see whether they have the same facts."""
    return zlib.crc32(repr(facts).encode())


def differences(ranks: Sequence[int], given: Sequence[Mapping[str, Any]]) -> str:
    """A table of that which is not the same for all: a line a name, its values, and whose they are; empty if all agree."""
    lines = []
    for name in dict.fromkeys(name for facts in given for name in facts):
        holders: dict[str, list[int]] = {}
        for rank, facts in zip(ranks, given, strict=True):
            holders.setdefault(repr(facts[name]) if name in facts else _ABSENT, []).append(rank)
        if len(holders) > 1:
            lines.append(f"  {name}: " + "; ".join(f"{value} on {spans(of)}" for value, of in holders.items()))
    return "\n".join(lines)


def spans(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 5``, from ranks in order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
