"""One batch that several ranks hold: each takes a slice of its tokens, and all get the whole back.

The ranks of a tensor-parallel group have the same tokens. If each sent all of them to the experts, every expert would see
them as often as there are ranks::

    rank 0   tokens 0 1 2 3 4  -> slice 0 1 2 --- experts ---> slice 0 1 2 -> tokens 0 1 2 3 4
    rank 1   tokens 0 1 2 3 4  -> slice 3 4   --- experts ---> slice 3 4   -> tokens 0 1 2 3 4

What follows computes the same on all ranks, so the gradient of the whole is on each of them already: that of :func:`whole`
is the rank's slice of it, and that of :func:`mine` brings the slices together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.ep._ways import Message


def mine(tokens: Tensor, group: dist.ProcessGroup, what: str = "rows") -> Tensor:
    """This rank's slice.

    Args:
        tokens: ``[T, ...]``, the same on all ranks.
        group: the ranks.
        what: what they are counted as by :func:`moekit.ep.traffic`, ``"rows"`` or ``"slots"``.

    Returns:
        ``[n, ...]``: slices are equal but for the last ones, which may be shorter or empty. Differentiable.
    """
    part: Any = _Mine.apply(tokens, Message(what, "ep.slices", group))
    return part


def whole(part: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """The tokens of all slices.

    Args:
        part: ``[n, ...]``, this rank's slice.
        num_tokens: T.
        group: the ranks.

    Returns:
        ``[T, ...]``, the same on all ranks. Differentiable.
    """
    tokens: Any = _Whole.apply(part, num_tokens, Message("rows", "ep.slices", group))
    return tokens


def _slice(tokens: Tensor, group: dist.ProcessGroup) -> Tensor:
    each = -(-tokens.shape[0] // group.size())
    return tokens[group.rank() * each : (group.rank() + 1) * each].contiguous()


def _gather(part: Tensor, num_tokens: int, message: Message) -> Tensor:
    each = -(-num_tokens // message.group.size())
    sent = part.new_zeros(each, *part.shape[1:])
    sent[: part.shape[0]] = part
    return message.wait(message.all_gather(sent))[:num_tokens]  # what fills the last slices up is at the end


class _Mine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, message: Message) -> Tensor:
        ctx.num_tokens, ctx.message = tokens.shape[0], message
        return _slice(tokens, message.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _gather(grad, ctx.num_tokens, ctx.message), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, num_tokens: int, message: Message) -> Tensor:
        ctx.group = message.group
        return _gather(part, num_tokens, message)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _slice(grad, ctx.group), None, None
