"""Grouped matrix products: one matrix an expert, one block of rows an expert.

The products are PyTorch's, but for few rows an expert (decoding) on a CPU: there :func:`grouped_rows` has a kernel that
reads each matrix once, at the speed of memory. ``torch.nn.functional.grouped_mm`` has conditions (16-byte strides, no
float64, ...) and, on a CPU, is a loop of ``mm`` inside; here is the form without conditions. In :func:`grouped_rows` rows
at or past the last offset, which belong to no expert, are left as they are: whoever reads them masks them.
:func:`grouped_linear` is the differentiable form and makes them zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops import _library

_ALIGNMENT = 16  # bytes
_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


def grouped_rows(rows: Tensor, matrices: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply each expert's rows by its matrix.

    Args:
        rows: ``[R, K]``, expert by expert.
        matrices: ``[E, K, N]``, in the dtype of ``rows``, any strides.
        offsets: ``[E]`` int32, cumulative row ends.
        out: ``[R, N]`` to write into, or None.

    Returns:
        ``[R, N]``; rows at or past ``offsets[-1]`` hold anything.
    """
    _check_offsets(offsets, matrices.shape[0])
    kernel = _backend.kernel("grouped_rows", rows)
    product = NotImplemented if kernel is None else kernel(rows, matrices, offsets, out)
    if product is not NotImplemented:
        return product
    if _looped(rows):
        out = rows.new_empty(rows.shape[0], matrices.shape[2]) if out is None else out
        for expert, block in _blocks(offsets, rows.shape[0]):
            torch.mm(rows[block], matrices[expert], out=out[block])
        return out
    width = matrices.shape[2]
    if not matrices.shape[0]:
        return rows.new_empty(rows.shape[0], width)
    product = torch.nn.functional.grouped_mm(_aligned(rows, 1), _aligned(matrices, 1, 2), offs=offsets)
    return product if product.shape[1] == width else product[:, :width].contiguous()


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """The products ``left[block].T @ right[block]`` of each expert's rows: the gradient of its matrix.

    Args:
        left: ``[R, M]``.
        right: ``[R, N]``, in the same dtype.
        offsets: ``[E]`` int32, cumulative row ends.

    Returns:
        ``[E, M, N]``; zero for an expert without rows.
    """
    num_experts, height, width = offsets.shape[0], left.shape[1], right.shape[1]
    if _looped(left):
        out = left.new_empty(num_experts, height, width)
        filled = set()
        for expert, block in _blocks(offsets, left.shape[0]):
            torch.mm(left[block].T, right[block], out=out[expert])
            filled.add(expert)
        for expert in set(range(num_experts)) - filled:
            out[expert].zero_()
        return out
    if not num_experts:
        return left.new_empty(0, height, width)
    product = torch.nn.functional.grouped_mm(_aligned(left, 1).T, _aligned(right, 1), offs=offsets)
    return product if product.shape[1:] == (height, width) else product[:, :height, :width].contiguous()


class Products(NamedTuple):
    """The two products as :func:`grouped_rows` and :func:`grouped_outer` have them: as they are, or as operators."""

    rows: Callable[..., Tensor]
    outer: Callable[..., Tensor]


def _check_offsets(offsets: Tensor, num_experts: int | None = None) -> None:
    """One integer an expert; their values are for whoever reads them."""
    if offsets.dtype not in (torch.int32, torch.int64):
        _check.integer("grouped_linear", "offsets", offsets)
    if num_experts is None:
        _check.tensor_dim("grouped_linear", "offsets", offsets, 1)
    elif offsets.shape != (num_experts,):
        _check.shape("grouped_linear", "offsets", offsets, (num_experts,), "[experts]")


def _looped(rows: Tensor) -> bool:
    """Whether to run expert by expert: on a CPU nothing is lost by it; elsewhere it costs a sync for the offsets."""
    return rows.device.type == "cpu" or rows.dtype not in (torch.bfloat16, torch.float16, torch.float32)


def _blocks(offsets: Tensor, num_rows: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with its rows."""
    ends, start = offsets.tolist(), 0
    _check.ends("grouped_linear", ends, num_rows)
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, slice(start, end)
            start = end


def within(offsets: Tensor, num_rows: int) -> Tensor:
    """Offsets as PyTorch's products may follow them: on a GPU, where these do not look, ascending within the rows."""
    return offsets if offsets.device.type == "cpu" else offsets.clamp(0, num_rows).cummax(0).values


def _aligned(matrix: Tensor, *dims: int) -> Tensor:
    """``matrix`` with the sizes ``dims`` padded by zeros so that its strides are multiples of 16 bytes."""
    multiple = _ALIGNMENT // matrix.element_size()
    missing = {dim: -matrix.shape[dim] % multiple for dim in dims}
    if any(missing.values()):
        padding = [size for dim in reversed(range(matrix.dim())) for size in (0, missing.get(dim, 0))]
        return torch.nn.functional.pad(matrix, padding)
    dense = matrix.stride(-1) == 1 or matrix.stride(-2) == 1
    return matrix if dense and matrix.data_ptr() % _ALIGNMENT == 0 else matrix.contiguous()


# --- the differentiable form ----------------------------------------------------------------------------------------


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply each expert's rows by its weight; differentiable as often as wanted.

    Args:
        rows: ``[R, in]``, expert by expert, floating.
        weight: ``[E, out, in]``, or ``[E, in, out]`` with ``transposed``, in the same dtype.
        offsets: ``[E]`` int32, cumulative row ends.
        transposed: how the weight is stored.

    Returns:
        ``[R, out]`` in the dtype of ``rows`` (of autocast, where it is on, as a ``torch.nn.functional.linear`` has);
        rows at or past ``offsets[-1]`` are zero, and so are their gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    op = "grouped_linear"
    _library.announce_flops()
    _check.computable(op, "rows", rows)
    _check.computable(op, "weight", weight)
    _check.tensor_dim(op, "rows", rows, 2)
    _check.tensor_dim(op, "weight", weight, 3)
    rows, weight = autocast(rows, weight)
    matrices = weight if transposed else weight.mT
    _check.integer(op, "offsets", offsets)
    _check.shape(op, "offsets", offsets, matrices.shape[:1], "[experts]")
    if matrices.shape[1] != rows.shape[1] or weight.dtype != rows.dtype:
        wanted = f"{rows.dtype} with {rows.shape[1]} inputs"
        raise _check.fail(op, "weight", wanted, f"{weight.dtype} of shape {list(weight.shape)}")
    _check.same_device(op, rows=rows, weight=weight, offsets=offsets)
    return _grouped_linear(rows, matrices, _int32(offsets, rows.shape[0]))


def _int32(offsets: Tensor, num_rows: int) -> Tensor:
    """The offsets as products take them: what is past the rows stays past them."""
    if offsets.dtype is torch.int32:
        return offsets
    return offsets.clamp(-1, min(num_rows + 1, 2**31 - 1)).int()


def autocast(first: Tensor, *others: Tensor | None) -> list[Any]:
    """What autocast would do to the inputs of a matrix product."""
    tensors = [first, *others]
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or first.dtype is torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.dtype in _AUTOCAST else t for t in tensors]


def _linear_reference(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    offsets = within(offsets, rows.shape[0])
    out = grouped_rows(rows, matrices, offsets)
    if _looped(rows):
        end = int(offsets[-1]) if offsets.numel() else 0
        if end < len(out):
            out[end:].zero_()
        return out
    inside = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
    return torch.where(inside.unsqueeze(1), out, 0)


def _outer_reference(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    _check_offsets(offsets)
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
        _grouped_linear(grad, matrices.mT, offsets) if needs[0] else None,
        _grouped_outer(rows, grad, offsets) if needs[1] else None,
        None,
    )


def _outer_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    left, right, offsets = ctx.saved_tensors
    return (
        _grouped_linear(right, grad.mT, offsets) if needs[0] else None,
        _grouped_linear(left, grad, offsets) if needs[1] else None,
        None,
    )


_grouped_outer = _library.define(
    "grouped_outer(Tensor left, Tensor right, Tensor offsets) -> Tensor",
    reference=_outer_reference,
    fake=_outer_fake,
    save=_save,
    backward=_outer_backward,
    tangent=_library.product_rule(lambda *args: _grouped_outer(*args)),
    flops=lambda left, right, offsets, **_: 2 * left[0] * left[1] * right[1],
)
_grouped_linear = _library.define(
    "grouped_linear(Tensor rows, Tensor matrices, Tensor offsets) -> Tensor",
    reference=_linear_reference,
    fake=_linear_fake,
    save=_save,
    backward=_linear_backward,
    tangent=_library.product_rule(lambda *args: _grouped_linear(*args)),
    flops=lambda rows, matrices, offsets, **_: 2 * rows[0] * rows[1] * matrices[2],
)
PLAIN = Products(grouped_rows, grouped_outer)
DIFFERENTIABLE = Products(lambda rows, matrices, offsets, out=None: _grouped_linear(rows, matrices, offsets), _grouped_outer)
