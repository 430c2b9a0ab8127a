"""Grouped matrix products with derivatives: a linear layer for each expert's block of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import _library
from moekit.ops.gemm import autocast, check_offsets, grouped_outer, grouped_rows, only_rows_of_experts, within
from moekit.ops.packed_products import packed_rows, three
from moekit.ops.unpack import FOUR_BITS, Stored
from moekit.packed import PackedExperts


def grouped_linear(rows: Tensor, weight: Tensor | PackedExperts, offsets: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply each expert's rows by its weight; differentiable as often as wanted.

    Args:
        rows: ``[R, in]``, expert by expert, floating.
        weight: ``[E, out, in]``, or ``[E, in, out]`` with ``transposed``, in the same dtype; or a
            :class:`moekit.PackedExperts` of that shape, which has no gradient.
        offsets: ``[E]`` int32, cumulative row ends.
        transposed: how the weight is stored.

    Returns:
        ``[R, out]`` in the dtype of ``rows`` (of autocast, where it is on, as a ``torch.nn.functional.linear`` has);
        rows at or past ``offsets[-1]`` are zero, and so are their gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Examples:
        >>> import torch, moekit
        >>> weight = torch.stack([torch.eye(2), 10 * torch.eye(2)])  # two experts
        >>> moekit.grouped_linear(torch.ones(3, 2), weight, torch.tensor([1, 3], dtype=torch.int32)).tolist()
        [[1.0, 1.0], [10.0, 10.0], [10.0, 10.0]]
    """
    op = "grouped_linear"
    _library.announce_flops()
    _check.computable(op, "rows", rows)
    _check.tensor_dim(op, "rows", rows, 2)
    packed = isinstance(weight, PackedExperts)
    if not packed:
        _check.computable(op, "weight", weight)
    _check.tensor_dim(op, "weight", weight, 3)
    rows, weight = (autocast(rows)[0], weight) if packed else autocast(rows, weight)
    matrices = weight if transposed else weight.mT
    _check.integer(op, "offsets", offsets)
    _check.shape(op, "offsets", offsets, matrices.shape[:1], "[experts]")
    if matrices.shape[1] != rows.shape[1] or (weight.dtype != rows.dtype and not packed):
        wanted = f"{rows.dtype} with {rows.shape[1]} inputs"
        raise _check.fail(op, "weight", wanted, f"{weight.dtype} of shape {list(weight.shape)}")
    _check.same_device(op, rows=rows, weight=weight, offsets=offsets)
    offsets = _int32(offsets, rows.shape[0])
    if isinstance(matrices, PackedExperts):
        stored = matrices.stored()
        return packed_linear(rows, *flat(stored), offsets, not matrices.turned)
    return linear_op(rows, matrices, offsets)


def _int32(offsets: Tensor, num_rows: int) -> Tensor:
    """The offsets as products take them: what is past the rows stays past them."""
    if offsets.dtype is torch.int32:
        return offsets
    return offsets.clamp(-1, min(num_rows + 1, 2**31 - 1)).int()


def _linear_reference(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    offsets = within(offsets, rows.shape[0])
    return only_rows_of_experts(grouped_rows(rows, matrices, offsets), offsets)


def _outer_reference(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    check_offsets(offsets)
    for name, factor in (("left", left), ("right", right)):
        _check.tensor_dim("grouped_outer", name, factor, 2)
    if left.dtype is not right.dtype:
        raise _check.wrong_type("grouped_outer", "right", f"of {left.dtype}, as left", right.dtype)
    return grouped_outer(left, right, within(offsets, left.shape[0]))


def _linear_fake(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[2])


def _outer_fake(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


def _save(ctx: Any, args: tuple, outputs: Any) -> None:
    ctx.save_for_backward(*args)


def _linear_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    rows, matrices, offsets = ctx.saved_tensors
    return (
        linear_op(grad, matrices.mT, offsets) if needs[0] else None,
        outer_op(rows, grad, offsets) if needs[1] else None,
        None,
    )


def _outer_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    left, right, offsets = ctx.saved_tensors
    return (
        linear_op(right, grad.mT, offsets) if needs[0] else None,
        linear_op(left, grad, offsets) if needs[1] else None,
        None,
    )


outer_op = _library.define(
    "grouped_outer(Tensor left, Tensor right, Tensor offsets) -> Tensor",
    reference=_outer_reference,
    fake=_outer_fake,
    save=_save,
    backward=_outer_backward,
    tangent=_library.product_rule(lambda *args: outer_op(*args)),
    flops=lambda left, right, offsets, **_: 2 * left[0] * left[1] * right[1],
    kernels=False,  # which would take factors of different rows
)
linear_op = _library.define(
    "grouped_linear(Tensor rows, Tensor matrices, Tensor offsets) -> Tensor",
    reference=_linear_reference,
    fake=_linear_fake,
    save=_save,
    backward=_linear_backward,
    tangent=_library.product_rule(lambda *args: linear_op(*args)),
    flops=lambda rows, matrices, offsets, **_: 2 * rows[0] * rows[1] * matrices[2],
)


# --- packed weights: frozen, rows with a derivative of any order ------------------------------------------------------


def flat(stored: Stored) -> tuple:
    """A packed weight as the operator takes it."""
    return stored.codes, *three(stored.scales), stored.format, stored.block


def _stored(args: tuple) -> Stored:
    codes, *scales, format, block = args[:6]
    return Stored(codes, [scale for scale in scales if scale is not None], format, tuple(block))


def _packed_reference(rows: Tensor, *args: Any) -> Tensor:
    offsets, back = args[-2:]
    offsets = within(offsets, rows.shape[0])
    return only_rows_of_experts(packed_rows(rows, _stored(args).checked("grouped_linear"), offsets, back=back), offsets)


def _packed_fake(rows: Tensor, *args: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], _stored(args).shape[2 if args[-1] else 1])


def _save_packed(ctx: Any, args: tuple, outputs: Any) -> None:
    _, *ctx.stored, offsets, ctx.back = args  # nothing of the weight is kept: it is frozen, and somebody's own
    ctx.versions = _library.versions(ctx.stored[:4])
    ctx.save_for_backward(offsets)


def _packed_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    if _library.versions(ctx.stored[:4]) != ctx.versions:
        raise RuntimeError("moekit.grouped_linear: packed weights were changed after a forward, whose backward needs them")
    found = packed_linear(grad, *ctx.stored, ctx.saved_tensors[0], not ctx.back) if needs[0] else None
    return found, *[None] * (len(needs) - 1)


def _packed_flops(rows: Any, codes: Any, scale: Any, nested: Any, offset: Any, format: str, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * codes[1] * codes[2] * (2 if format in FOUR_BITS else 1)


_STORED = "Tensor codes, Tensor scale, Tensor? nested, Tensor? offset, str format, int[] block"
packed_linear = _library.define(
    f"packed_linear(Tensor rows, {_STORED}, Tensor offsets, bool back) -> Tensor",
    reference=_packed_reference,
    fake=_packed_fake,
    save=_save_packed,
    backward=_packed_backward,
    tangent=lambda args, tangents: packed_linear(tangents[0], *args[1:]),
    flops=_packed_flops,
)
