"""Which dispatcher."""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moekit import _check
from moekit.ep._ranks import process_group
from moekit.ep.all_gather import AllGather
from moekit.ep.all_to_all import AllToAll
from moekit.ep.dispatcher import Dispatcher
from moekit.ep.local import Local

KINDS = {"all_to_all": AllToAll, "all_gather": AllGather, "local": Local}
WORTH_IT = 0.2  # the least part of the rows that the exchange of deduplicated rows has to save


def choose(ranks: int, topk: int) -> str:
    """The kind of dispatcher that moves the fewest rows at the least effort.

    With uniform routing a token of K experts on N ranks misses a rank with the probability ``(1 - 1/N)^K`` (a little less,
    for no expert is chosen twice). It goes to ``(N - 1) (1 - (1 - 1/N)^K)`` others if it goes where it is needed, and to
    ``N - 1`` if it goes everywhere: the former saves ``(1 - 1/N)^K`` of the rows, and is chosen where that is a fifth or
    more. It has the host do more before rows can travel, and wait for their sizes: on four H200s a tenth fewer rows took
    longer (docs/performance/scale.md).

    Args:
        ranks: N.
        topk: K.

    Returns:
        ``"local"`` of one rank, else ``"all_to_all"`` or ``"all_gather"``.
    """
    if ranks == 1:
        return "local"
    return "all_to_all" if (1 - 1 / ranks) ** topk >= WORTH_IT else "all_gather"


def dispatcher(
    group: dist.ProcessGroup | DeviceMesh | None, num_experts: int, topk: int, kind: str = "auto", **options: Any
) -> Dispatcher:
    """The dispatcher of a layer.

    Args:
        group: the ranks that share the experts: a process group, or a mesh of one dimension; None for this one alone.
        num_experts: E, of all ranks.
        topk: K, the experts of a token.
        kind: ``"all_to_all"`` (:class:`moekit.ep.AllToAll`), ``"all_gather"`` (:class:`moekit.ep.AllGather`), ``"local"``
            (:class:`moekit.ep.Local`), or ``"auto"``: what :func:`choose` says, unless only another kind has the options.
        **options: of that kind.

    Raises:
        ValueError: an unknown kind, or an option that it does not have.
    """
    op = "ep.dispatcher"
    _check.one_of(op, "kind", kind, ("auto", *KINDS))
    topk, chosen = _check.positive(op, "topk", topk), kind
    if kind == "auto":
        ranks = 1 if group is None else process_group(op, group).size()
        chosen = choose(ranks, topk)
        taking = [other for other in KINDS if {*options} <= {*_options(other)}]
        if chosen not in taking and taking and group is not None:
            chosen = taking[0]
    for name, value in options.items():
        having = [other for other in KINDS if name in _options(other)]
        if chosen not in having:
            because = f"with kind={chosen!r}" + (f", chosen for {topk} experts a token" if kind == "auto" else "")
            because += f" (kind={having[0]!r} has it)" if having else ""
            raise _check.unused(op, name, value, because)
    return KINDS[chosen](group, num_experts, **options)


def _options(kind: str) -> list[str]:
    return [p.name for p in inspect.signature(KINDS[kind]).parameters.values() if p.kind is p.KEYWORD_ONLY]
