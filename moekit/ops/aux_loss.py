"""Attach an auxiliary loss to a tensor, so that its gradient flows with the main loss's.

The output passes through unchanged; in backward the auxiliary loss receives ``ones * scale``. The scale is read when
backward runs, by an operator of its own, so that a compiled graph reads it then as well.

Source: Megatron-core's and Switch Transformer's (arXiv 2101.03961) training of router losses.
"""

from __future__ import annotations

import dis
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import _library

_POP_TOP, _CACHE = dis.opmap["POP_TOP"], 0  # caches of the interpreter follow an instruction from Python 3.11 on


def aux_loss(output: Tensor, loss: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return ``output``, with ``loss`` attached: backward adds ``scale * d loss`` to the gradients.

    Args:
        output: any tensor on the way to the main loss, such as the layer's output.
        loss: the auxiliary loss, any shape (a scalar as a rule), any floating dtype.
        scale: what multiplies the loss's gradient, such as a gradient scaler's scale. A tensor is read when backward
            runs, so writing into it in between takes effect (torch 2.10 refuses that in a compiled graph); it is never
            written. Each call has its own.

    Returns:
        A tensor with the values of ``output``. **Use it**: a call whose result is discarded has no effect, and
        a warning says so.

    Raises:
        TypeError: a loss that is not floating.
        ValueError: a scale that is not a scalar.

    Examples:
        >>> import torch, moekit
        >>> w, x = torch.tensor(3.0, requires_grad=True), torch.ones(2)
        >>> y = moekit.aux_loss(w * x, w**2, scale=0.5)  # the values pass through
        >>> y.sum().backward()
        >>> w.grad  # 2 of the output, and half of 2 * 3
        tensor(5.)
    """
    _check.tensor("aux_loss", "output", output)
    _check.floating("aux_loss", "loss", loss)
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise _check.fail("aux_loss", "scale", "a scalar", f"shape {list(scale.shape)}")
    else:
        scale = _check.real("aux_loss", "scale", scale)
    if _library.transformed():
        return _attach(output, loss, *((scale, 1.0) if isinstance(scale, Tensor) else (None, scale)))
    attached = AttachAuxLoss.apply(output, loss, scale)
    wanted = loss.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if wanted and _is_discarded(sys._getframe(1)):
        warnings.warn(
            "moekit.aux_loss: the returned tensor is discarded, so the auxiliary loss has no effect; "
            "write `output = moekit.aux_loss(output, loss)`",
            stacklevel=2,
        )
    return attached


class AttachAuxLoss(torch.autograd.Function):
    """The autograd node: saves no tensor, so recomputation under activation checkpointing has nothing to compare."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        """``output``, unchanged."""
        ctx.like, ctx.scale = (loss.shape, loss.dtype, loss.device), scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """``grad`` for the output, ``scale`` for the loss."""
        if isinstance(ctx.scale, Tensor):
            return grad, _aux_loss_grad(grad, ctx.scale, *ctx.like), None
        return grad, scaled_ones(ctx.scale, *ctx.like), None


def scaled_ones(scale: float | Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``ones(shape) * scale`` in ``dtype`` on ``device``; a scale of None is 1."""
    ones = torch.ones(shape, dtype=dtype, device=device)
    if scale is None:
        return ones
    if isinstance(scale, Tensor):
        scale = scale.detach().reshape(()).to(device, non_blocking=True)
    return (ones * scale).to(dtype)


def _is_discarded(caller: FrameType) -> bool:
    """Whether the call that ``caller`` is in the middle of is a statement by itself, its result popped at once."""
    code, following = caller.f_code.co_code, caller.f_lasti + 2
    while code[following] == _CACHE:
        following += 2
    return code[following] == _POP_TOP


class MoEAuxLossAutoScaler(torch.autograd.Function):
    """Pass the output through and scale the auxiliary loss's gradient by a process-wide factor.

    The drop-in form of :func:`aux_loss`, with Megatron-core's names. ``main_loss_backward_scale`` is read when backward
    runs (in a compiled graph too) and never written there: None means 1; a Python number or a tensor of one element
    on any device is taken as it is.
    """

    main_loss_backward_scale: float | Tensor | None = None
    _copy: Tensor | None = None  # of the last tensor that set_loss_scale was given

    @classmethod
    def apply(cls, *args: Tensor) -> Any:
        """``forward``; within ``torch.func`` and forward-mode AD as an operator, which these know."""
        return _attach(*args, None, None) if _library.transformed() else super().apply(*args)

    @staticmethod
    def forward(ctx: Any, output: Tensor, aux_loss: Tensor) -> Tensor:
        """Return ``output`` unchanged; ``aux_loss`` (any shape) joins its graph."""
        ctx.like = aux_loss.shape, aux_loss.dtype, aux_loss.device
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """``(grad_output, ones_like(aux_loss) * main_loss_backward_scale)``."""
        return grad_output, _aux_loss_grad(grad_output, None, *ctx.like)

    @staticmethod
    def set_loss_scale(scale: float | Tensor) -> None:
        """Set the factor to a number or a tensor of one element, which is copied and never written.

        A tensor is copied into the copy of the last one, if that is of its kind: a captured CUDA graph reads it there.
        """
        cls, scale = MoEAuxLossAutoScaler, _check.factor("MoEAuxLossAutoScaler.set_loss_scale", "scale", scale)
        if isinstance(scale, Tensor):
            held, scale = cls._copy, scale.detach()
            if held is not None and held is cls.main_loss_backward_scale and _alike(held, scale):
                held.copy_(scale)
                return
            scale = cls._copy = scale.clone()
        cls.main_loss_backward_scale = scale


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _aux_loss_grad_reference(
    grad: Tensor, scale: Tensor | None, shape: list[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``ones * scale``, with the process-wide factor of this moment if ``scale`` is None."""
    return scaled_ones(MoEAuxLossAutoScaler.main_loss_backward_scale if scale is None else scale, shape, dtype, device)


def _aux_loss_grad_fake(
    grad: Tensor, scale: Tensor | None, shape: list[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return grad.new_empty(shape, dtype=dtype, device=device)


# An operator that takes the incoming gradient, so that a compiled graph reads the scale when its backward runs: it
# would bake in today's factor otherwise, or multiply in forward.
_aux_loss_grad = _library.define(
    "aux_loss_grad(Tensor grad, Tensor? scale, SymInt[] shape, ScalarType dtype, Device device) -> Tensor",
    reference=_aux_loss_grad_reference,
    fake=_aux_loss_grad_fake,
)


def _attach_reference(output: Tensor, loss: Tensor, scale: Tensor | None, factor: float | None) -> Tensor:
    """A copy of ``output``: the form of the autograd functions above that PyTorch's transforms can take.

    ``loss`` gets the gradient ``scale``, or ``factor`` if that is None, or the process-wide factor if both are.
    """
    return output.clone()


def _attach_fake(output: Tensor, loss: Tensor, scale: Tensor | None, factor: float | None) -> Tensor:
    return torch.empty_like(output)


def _attach_save(ctx: Any, args: tuple, output: Tensor) -> None:
    _, loss, scale, ctx.factor = args
    ctx.like = loss.shape, loss.dtype, loss.device
    ctx.save_for_backward(scale)


def _attach_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    (scale,) = ctx.saved_tensors
    if scale is None and ctx.factor is not None:
        return grad, scaled_ones(ctx.factor, *ctx.like), None, None
    return grad, _aux_loss_grad(grad, scale, *ctx.like), None, None


_attach = _library.define(
    "attach_aux_loss(Tensor output, Tensor loss, Tensor? scale, float? factor) -> Tensor",
    reference=_attach_reference,
    fake=_attach_fake,
    save=_attach_save,
    backward=_attach_backward,
    tangent=lambda args, tangents: None if tangents[0] is None else tangents[0].clone(),
)
