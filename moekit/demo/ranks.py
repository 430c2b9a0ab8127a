"""Who trains the demo together: this process alone, or all that ``torchrun`` has started, the experts shared among them.

Ranks draw the same batch and take a share each, so that a run of several is the run of one, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import get_node_local_rank

from moekit.demo import DemoError


class Alone:
    """One process: its batch is the batch.

    Attributes:
        rank: 0 is the one that prints.
        count: how many there are.
        group: of processes; None of one.
    """

    rank = 0
    count = 1
    group: Any = None

    def spread(self, model: Any) -> tuple[nn.Module, str]:
        """Share out the experts; gives what to call in training, and what was done in words."""
        return model, "one process"

    def share(self, windows: Tensor) -> Tensor:
        """This rank's of some windows."""
        return windows

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        return value

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        """Scale the gradients of all ranks down to a total norm."""
        nn.utils.clip_grad_norm_(parameters, max_norm)


class Together(Alone):
    """The ranks of the default group."""

    def __init__(self) -> None:
        self.rank, self.count, self.group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD

    def spread(self, model: Any) -> tuple[nn.Module, str]:
        """The experts by moekit, all other parameters by DDP."""
        import moekit.ep

        place = model.head.weight.device
        if model.layers[0].experts.num_experts % self.count:
            wanted = f"a multiple of the {self.count} processes"
            raise DemoError(f"setting 'experts': expected {wanted}, got {model.layers[0].experts.num_experts}")
        done = moekit.ep.parallelize(model, dist.device_mesh.init_device_mesh(place.type, (self.count,)))
        for layer in model.layers:
            layer.balance_group = self.group  # the loss of the whole batch, as of one process
        return nn.parallel.DistributedDataParallel(model), f"{self.count} processes ({dist.get_backend()}), {done}"

    def share(self, windows: Tensor) -> Tensor:
        """Every so manieth, from this rank's number on."""
        return windows[self.rank :: self.count]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        value = value.clone()
        dist.all_reduce(value)
        return value

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        """Scale the gradients of all ranks down to a total norm."""
        import moekit.ep

        moekit.ep.clip_grad_norm_(parameters, max_norm)


@contextmanager
def joined(device: str) -> Iterator[tuple[Alone, str]]:
    """Join the others that ``torchrun`` has started, if it has; gives the device of this process as well."""
    if dist.is_initialized():
        yield Together(), device
        return
    if not dist.is_torchelastic_launched():
        yield Alone(), device
        return
    cuda = device.split(":")[0] == "cuda"
    if cuda:
        device = f"cuda:{get_node_local_rank()}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Together(), device
    finally:
        dist.destroy_process_group()
