"""No dispatch: one rank has all experts."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moekit import _check
from moekit.ep._ranks import check, process_group
from moekit.routing import Routing

_OP = "ep.Local"


class Local:
    """All experts on one rank: tokens are rows, and rows are tokens.

    Args:
        group: a group of one rank, or None; no process group is needed.
        num_experts: E.

    Raises:
        ValueError: a group of more ranks.
    """

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None, num_experts: int) -> None:
        if group is not None and process_group(_OP, group).size() != 1:
            raise _check.fail(_OP, "group", "of one rank", f"{process_group(_OP, group).size()} ranks")
        self.num_experts = _check.positive(_OP, "num_experts", num_experts)

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        """As :class:`moekit.ep.Dispatcher` has it."""
        return check(_OP, self.num_experts, tokens, routing), routing, tokens.shape

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """As :class:`moekit.ep.Dispatcher` has it."""
        _check.shape(_OP, "rows", rows, handle, "[tokens, H]")
        return rows
