"""Gradients of sharded experts: over which ranks they are summed, what divides them, and how they are clipped.

With N ranks that share the experts (``ep``) and D groups of them with batches of their own (``dp``), a step has ``N * D``
batches. The gradient of a dense parameter is found on each rank from one batch; DDP and FSDP2 average it over all ``N * D``.
The gradient of an expert's weight is found on the one rank that has it, already summed over the N batches whose tokens came
there. To be the same average, it has to be divided by N, and averaged over ``dp`` alone. Both happen where the DTensor
becomes this rank's tensor, in every backward and before the gradient is accumulated, so that neither can be forgotten and
gradient accumulation needs no care.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moekit import _check
from moekit.ep._faults import named

REDUCTIONS = ("mean", "sum")
_c10d: Any = torch.ops._c10d_functional


# --- reduction ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduction:
    """What is done to the gradient of a part of the experts.

    Attributes:
        mesh: the ranks whose batches it has seen.
        data_parallel: ranks with the same part, over which it is still to be summed; None: somebody else does it.
        mean: whether it is divided by the number of batches.
    """

    mesh: DeviceMesh
    data_parallel: DeviceMesh | None = None
    mean: bool = True

    @staticmethod
    def of(op: str, mesh: DeviceMesh, data_parallel: DeviceMesh | None, reduction: str) -> Reduction:
        """From arguments of users."""
        _check.one_of(op, "reduction", reduction, REDUCTIONS)
        if data_parallel is not None and (not isinstance(data_parallel, DeviceMesh) or data_parallel.ndim != 1):
            wanted = "a DeviceMesh of one dimension (mesh['dp']) or None"
            raise _check.wrong_type(op, "data_parallel", wanted, data_parallel)
        if data_parallel is not None and len({*mesh.mesh.tolist()} & {*data_parallel.mesh.tolist()}) > 1:
            raise _check.fail(op, "data_parallel", f"of ranks that do not share these experts ({mesh})", data_parallel)
        return Reduction(mesh, data_parallel, reduction == "mean")

    @property
    def factor(self) -> float:
        """What the gradient is multiplied by."""
        replicas = 1 if self.data_parallel is None else self.data_parallel.size()
        return 1 / (self.mesh.size() * replicas) if self.mean else 1.0

    def attach(self, weight: Tensor) -> Tensor:
        """The same tensor, whose gradient will be reduced."""
        made: Any = _Reduced.apply(weight, self)
        return made

    def reduce(self, grad: Tensor) -> Tensor:
        """The gradient to accumulate."""
        grad = grad * self.factor if self.factor != 1 else grad
        if self.data_parallel is None or self.data_parallel.size() == 1:
            return grad
        group = self.data_parallel.get_group()
        with named("ep: gradients of experts over data_parallel", group):
            return _c10d.wait_tensor(_c10d.all_reduce(grad.contiguous(), "sum", group.group_name))


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, reduction: Reduction) -> Tensor:
        ctx.reduction = reduction
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.reduction.reduce(grad), None


# --- clipping -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, of parameters that are sharded over different meshes, and plain ones.

    A plain parameter, and a replica, counts once: after DDP, its gradient is the same on all ranks. All ranks have to call
    it, with their parameters in the same order. There is one sum of one number for each mesh dimension over which parameters
    are sharded, however many there are, and no value is read from a device (unless ``error_if_nonfinite``).

    Args:
        parameters: tensors with or without ``.grad``, DTensors among them.
        max_norm: what the total norm is reduced to, if above.
        norm_type: p of the norm, above 0; ``inf`` is the largest.
        error_if_nonfinite: look at the norm, and raise if it is none.

    Returns:
        the total norm before, a 0-d float32 (float64) tensor, the same on all ranks.

    Raises:
        ValueError: a gradient that is an incomplete sum, or a ``norm_type`` that is not above 0.
        RuntimeError: the total norm is not finite, and ``error_if_nonfinite``.
    """
    found = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm_type, max_norm = float(norm_type), float(max_norm)
    if not norm_type > 0:
        raise _check.fail("ep.clip_grad_norm_", "norm_type", "above 0", norm_type)
    sharded_over: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for parameter in found:  # of all, with a gradient or not: every rank has to find the same groups
        grads = sharded_over.setdefault(_sharding_groups(parameter), [])
        if parameter.grad is not None:
            grads.append(_local(parameter.grad))
    # Of parameters, too: a rank without gradients takes part in the sums, in the dtype of the others.
    wide = torch.float64 if any(parameter.dtype is torch.float64 for parameter in found) else torch.float32
    total = torch.zeros((), dtype=wide, device=found[0].device if found else None)
    for groups, grads in sharded_over.items():
        power = _power(grads, norm_type, total)
        for group in groups:
            power = _over(power, group, norm_type)
        total = torch.maximum(total, power) if math.isinf(norm_type) else total + power
    total = total if math.isinf(norm_type) else total ** (1 / norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(f"moekit.ep.clip_grad_norm_: the total norm of order {norm_type} is {total.item()}, not finite")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as PyTorch's own
    for grad in (grad for grads in sharded_over.values() for grad in grads):
        grad.mul_(factor.to(grad.device))
    return total


def _sharding_groups(parameter: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups over whose ranks a parameter is spread; none of a plain one."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh, groups = parameter.device_mesh, []
    for dim, placement in enumerate(parameter.placements):
        if placement.is_partial():
            raise _check.fail("ep.clip_grad_norm_", "parameters", "sharded or replicated", parameter.placements)
        if not placement.is_replicate():
            groups.append(mesh.get_group(dim))
    return tuple(groups)


def _local(grad: Tensor) -> Tensor:
    if not isinstance(grad, DTensor):
        return grad
    if any(placement.is_partial() for placement in grad.placements):
        raise _check.fail("ep.clip_grad_norm_", "gradients", "complete (redistribute them first)", grad.placements)
    return grad.to_local()


def _power(grads: list[Tensor], norm_type: float, like: Tensor) -> Tensor:
    """The sum of the p-th powers of all elements on this rank, or the largest, in the dtype of ``like``."""
    grads = [grad for grad in grads if grad.numel()]  # the largest of nothing is none
    if not grads:
        return torch.zeros_like(like)
    norms = [torch.linalg.vector_norm(grad, norm_type, dtype=like.dtype).to(like.device) for grad in grads]
    stacked = torch.stack(norms)
    return stacked.amax() if math.isinf(norm_type) else (stacked**norm_type).sum()


def _over(power: Tensor, group: dist.ProcessGroup, norm_type: float) -> Tensor:
    how = "max" if math.isinf(norm_type) else "sum"
    with named("ep.clip_grad_norm_", group):
        return _c10d.wait_tensor(_c10d.all_reduce(power, how, group.group_name))
