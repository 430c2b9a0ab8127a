"""Attach an auxiliary loss to a tensor, so that its gradient flows with the main loss's.

The output passes through unchanged; in backward the auxiliary loss receives ``ones * scale``. The scale is read when
backward runs, by an operator of its own, so that a compiled graph reads it then as well.

Source: Megatron-core's and Switch Transformer's (arXiv 2101.03961) training of router losses.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import _library


def aux_loss(output: Tensor, loss: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return ``output``, with ``loss`` attached: backward adds ``scale * d loss`` to the gradients.

    Args:
        output: any tensor on the way to the main loss, such as the layer's output.
        loss: the auxiliary loss, any shape (a scalar as a rule), any floating dtype.
        scale: what multiplies the loss's gradient, such as a gradient scaler's scale. A tensor is read when backward
            runs, so writing into it in between takes effect; it is never written. Each call has its own.

    Returns:
        A tensor with the values of ``output``. **Use it**: if it is discarded the loss never reaches the router,
        and a warning says so.

    Raises:
        TypeError: a loss that is not floating.
        ValueError: a scale that is not a scalar.
    """
    _check.tensor("aux_loss", "output", output)
    _check.floating("aux_loss", "loss", loss)
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise _check.fail("aux_loss", "scale", "a scalar", f"shape {list(scale.shape)}")
    else:
        scale = _check.real("aux_loss", "scale", scale)
    attached = AttachAuxLoss.apply(output, loss, scale)
    if loss.requires_grad and attached.requires_grad and not torch.compiler.is_compiling():
        _warn_if_discarded(attached, loss)
    return attached


class AttachAuxLoss(torch.autograd.Function):
    """The autograd node: saves no tensor, so recomputation under activation checkpointing has nothing to compare."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        """``output``, unchanged."""
        ctx.loss_shape, ctx.loss_dtype, ctx.scale = loss.shape, loss.dtype, scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """``grad`` for the output, ``scale`` for the loss."""
        return grad, scaled_ones(grad, ctx.loss_shape, ctx.loss_dtype, ctx.scale), None


def scaled_ones(grad: Tensor, shape: torch.Size, dtype: torch.dtype, scale: float | Tensor | None) -> Tensor:
    """``ones(shape) * scale`` on the device of ``grad``, in ``dtype``; a scale of None is 1."""
    ones = torch.ones(shape, dtype=dtype, device=grad.device)
    if scale is None:
        return ones
    if isinstance(scale, Tensor):
        scale = scale.detach().reshape(()).to(grad.device, non_blocking=True)
    return (ones * scale).to(dtype)


def _warn_if_discarded(attached: Tensor, loss: Tensor) -> None:
    """Warn when ``attached`` dies unused.

    A tensor that took part in a computation leaves its node behind in the graph. When one instruction frees both, while
    the loss is still at hand, nobody used the tensor.
    """
    fate = {"loss": weakref.ref(loss)}
    weakref.finalize(attached, _tensor_died, fate).atexit = False
    weakref.finalize(attached.grad_fn, _node_died, fate).atexit = False


def _tensor_died(fate: dict[str, Any]) -> None:
    fate["instruction"] = _freeing_instruction()


def _node_died(fate: dict[str, Any]) -> None:
    if fate.get("instruction") == _freeing_instruction() and fate["loss"]() is not None:
        warnings.warn(
            "moekit.aux_loss: the returned tensor was discarded, so the auxiliary loss has no effect; "
            "write `output = moekit.aux_loss(output, loss)`",
            stacklevel=4,
        )


def _freeing_instruction() -> tuple[int, int]:
    """The frame and instruction that run a finalizer: three frames up, past weakref's own."""
    frame = sys._getframe(3)
    return id(frame), frame.f_lasti


class MoEAuxLossAutoScaler(torch.autograd.Function):
    """Pass the output through and scale the auxiliary loss's gradient by a process-wide factor.

    The drop-in form of :func:`aux_loss`, with Megatron-core's names. ``main_loss_backward_scale`` is read when backward
    runs (in a compiled graph too) and never written there: None means 1; a Python number or a tensor of one element
    on any device is taken as it is.
    """

    main_loss_backward_scale: float | Tensor | None = None

    @staticmethod
    def forward(ctx: Any, output: Tensor, aux_loss: Tensor) -> Tensor:
        """Return ``output`` unchanged; ``aux_loss`` (any shape) joins its graph."""
        ctx.loss_shape, ctx.loss_dtype = aux_loss.shape, aux_loss.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """``(grad_output, ones_like(aux_loss) * main_loss_backward_scale)``."""
        return grad_output, _aux_loss_grad(grad_output, ctx.loss_shape, ctx.loss_dtype)

    @staticmethod
    def set_loss_scale(scale: float | Tensor) -> None:
        """Set the factor to a number or a tensor of one element, which is copied and never written."""
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale.detach().clone() if isinstance(scale, Tensor) else scale


def _aux_loss_grad_reference(grad: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return scaled_ones(grad, torch.Size(shape), dtype, MoEAuxLossAutoScaler.main_loss_backward_scale)


def _aux_loss_grad_fake(grad: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return grad.new_empty(shape, dtype=dtype)


# An operator, so that a compiled graph looks the factor up when it runs instead of baking in today's.
_aux_loss_grad = _library.define(
    "aux_loss_grad(Tensor grad, SymInt[] shape, ScalarType dtype) -> Tensor",
    reference=_aux_loss_grad_reference,
    fake=_aux_loss_grad_fake,
)
