"""Grouped matrix products: one matrix an expert, one block of rows an expert.

Products have kernels for few rows an expert (decoding) on a CPU, at the speed of memory, and for GPUs, with a low-rank
update in the same sum. All others are PyTorch's. ``torch.nn.functional.grouped_mm`` has conditions (16-byte strides, no
float64, ...) and on a CPU is a loop of ``mm`` inside. So it is on a GPU in any dtype but bfloat16, and before sm_90 in that,
too: a loop that waits for the offsets, which on NVIDIA's from sm_80 on is left to float64 alone. Here is the form without
conditions. Rows at or past the last offset, which belong to no expert, hold anything: whoever reads them masks them.
:mod:`moekit.ops.grouped_linear` has the differentiable form, which makes them zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops._segments import expert_of_row
from moekit.ops.gathered import Gathered, block_of, together

_ALIGNMENT = 16  # bytes
_FEW = 4  # rows an expert, as many as there are kernels for on a CPU
_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


def grouped_rows(
    rows: Tensor | Gathered,
    matrices: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    low: Tensor | None = None,
    factors: Tensor | None = None,
    *,
    invariant: bool = False,
) -> Tensor:
    """Multiply each expert's rows by its matrix; with ``low``, add those of ``low`` by its factors.

    Args:
        rows: ``[R, K]``, expert by expert; or where they are to be found.
        matrices: ``[E, K, N]``, in the dtype of ``rows``, any strides.
        offsets: ``[E]`` int32, cumulative row ends.
        out: ``[R, N]`` that may be written into, or None.
        low: ``[R, r]`` of a small rank r, in the same dtype, or None. Where a kernel can, both products are one sum.
        factors: ``[E, r, N]``, with ``low``.
        invariant: a row's result has the same bits whatever other rows there are, and wherever it stands. A library chooses
            tiles, and with them the order of a sum, by the number of rows; kernels then take the same for any number: on a
            GPU a tile of fixed sizes, on a CPU sums that no other row takes part in. Without a kernel (float64, the
            ``torch`` backend) each row is a product of its own.

    Returns:
        ``[R, N]``; rows at or past ``offsets[-1]`` hold anything.
    """
    check_offsets(offsets, matrices.shape[0])
    if isinstance(rows, Gathered):
        if low is None and out is None and not invariant:
            found = _gathered_rows(rows, matrices, offsets)
            if found is not None:
                return found
        rows = rows.together()
    check_depth(rows, matrices.shape[1])
    kernel = _backend.kernel("grouped_rows", rows)
    product = NotImplemented if kernel is None else kernel(rows, matrices, offsets, out, low, factors, invariant)
    if product is not NotImplemented:
        return product
    if low is not None and factors is not None:
        product = grouped_rows(rows, matrices, offsets, out, invariant=invariant)
        return grouped_add(product, low, factors, offsets, invariant=invariant)
    if invariant:
        return row_by_row(rows, matrices, offsets, rows.new_empty(len(rows), matrices.shape[2]) if out is None else out)
    if looped(rows):
        out = rows.new_empty(rows.shape[0], matrices.shape[2]) if out is None else out
        for expert, block in blocks(offsets, rows.shape[0]):
            torch.mm(rows[block], matrices[expert], out=out[block])
        return out
    width = matrices.shape[2]
    if not matrices.shape[0]:
        return rows.new_empty(rows.shape[0], width)
    product = torch.nn.functional.grouped_mm(_aligned(rows, 1), _aligned(matrices, 1, 2), offs=offsets)
    return product if product.shape[1] == width else product[:, :width].contiguous()


def _gathered_rows(rows: Gathered, matrices: Tensor, offsets: Tensor) -> Tensor | None:
    """The product of rows as they are found, where none of them is brought together with those of another expert.

    None for what is better off with all of them: few rows, and a GPU whose kernels cannot do without.
    """
    tokens, num_rows = rows.tokens, rows.index.shape[0]
    kernel = _backend.kernel("gathered_rows", tokens)
    product = NotImplemented if kernel is None else kernel(tokens, rows.index, matrices, offsets)
    if product is not NotImplemented:
        return product
    if not looped(tokens) or num_rows <= _FEW * matrices.shape[0]:
        return None
    check_depth(tokens, matrices.shape[1])
    out = tokens.new_empty(num_rows, matrices.shape[2])
    for expert, block in blocks(offsets, num_rows):
        torch.mm(rows.block(block), matrices[expert], out=out[block])
    return out


def grouped_outer(left: Tensor | Gathered, right: Tensor | Gathered, offsets: Tensor) -> Tensor:
    """The products ``left[block].T @ right[block]`` of each expert's rows: the gradient of its matrix.

    Args:
        left: ``[R, M]``; either side may also say where its rows are to be found.
        right: ``[R, N]``, in the same dtype.
        offsets: ``[E]`` int32, cumulative row ends.

    Returns:
        ``[E, M, N]``; zero for an expert without rows.
    """
    wide_left, wide_right = (x.tokens if isinstance(x, Gathered) else x for x in (left, right))
    num_rows, others = (len(x.index if isinstance(x, Gathered) else x) for x in (left, right))
    if num_rows != others:
        raise _check.fail("grouped_outer", "right", f"of {num_rows} rows, as left", f"{others} rows")
    num_experts, height, width = offsets.shape[0], wide_left.shape[1], wide_right.shape[1]
    if looped(wide_left):
        out = wide_left.new_empty(num_experts, height, width)
        filled = set()
        for expert, block in blocks(offsets, num_rows):
            torch.mm(block_of(left, block).T, block_of(right, block), out=out[expert])
            filled.add(expert)
        for expert in set(range(num_experts)) - filled:
            out[expert].zero_()
        return out
    if not num_experts:
        return wide_left.new_empty(0, height, width)
    product = _gathered_outer(left, right, offsets)
    if product is not None:
        return product
    left, right = together(left), together(right)
    kernel = _backend.kernel("grouped_outer", left)
    product = NotImplemented if kernel is None else kernel(left, right, offsets)
    if product is not NotImplemented:
        return product
    product = torch.nn.functional.grouped_mm(_aligned(left, 1).T, _aligned(right, 1), offs=offsets)
    return product if product.shape[1:] == (height, width) else product[:, :height, :width].contiguous()


def _gathered_outer(left: Tensor | Gathered, right: Tensor | Gathered, offsets: Tensor) -> Tensor | None:
    """That product where a kernel takes the rows of one side as they are found, or in parts."""
    if isinstance(left, Gathered) and isinstance(right, Tensor):
        tokens, other, tables, side = left.tokens, right, left.tables, "left"
    elif isinstance(right, Gathered) and isinstance(left, Tensor):
        tokens, other, tables, side = right.tokens, left, right.tables, "right"
    else:
        return None
    kernel = _backend.kernel("gathered_outer", tokens)
    if kernel is None:
        return None
    sides = (tokens, other) if side == "left" else (other, tokens)
    product = kernel(*sides, offsets, tables, side)
    return None if product is NotImplemented else product


def grouped_add(out: Tensor, low: Tensor, factors: Tensor, offsets: Tensor, *, invariant: bool = False) -> Tensor:
    """Add to each expert's rows of ``out`` what :func:`grouped_rows` makes of those of ``low``; returns ``out``.

    Args:
        out: ``[R, N]``, changed in place.
        low: ``[R, r]`` of a small rank r, in the same dtype.
        factors: ``[E, r, N]``.
        offsets: ``[E]`` int32, cumulative row ends.
        invariant: as there.
    """
    check_offsets(offsets, factors.shape[0])
    if invariant:
        return out.add_(grouped_rows(low, factors, offsets, invariant=True))
    kernel = _backend.kernel("grouped_add", out)
    if kernel is not None and kernel(out, low, factors, offsets) is not NotImplemented:
        return out
    if not looped(out):
        return out.add_(grouped_rows(low, factors, offsets))
    for expert, block in blocks(offsets, out.shape[0]):
        out[block].addmm_(low[block], factors[expert])
    return out


def grouped_slice(
    rows: Tensor,
    matrices: Tensor,
    offsets: Tensor,
    first: int,
    out: Tensor,
    low: Tensor | None = None,
    factors: Tensor | None = None,
    *,
    invariant: bool = False,
) -> None:
    """:func:`grouped_rows` for the experts ``first`` and following, as many as there are ``matrices``, into ``out``.

    PyTorch's product begins with the first row: without a kernel, the rows before ``first`` are multiplied by zeros.
    """
    kernel = _backend.kernel("grouped_slice", rows)
    if kernel is not None and kernel(rows, matrices, offsets, first, out, low, factors, invariant) is not NotImplemented:
        return
    stop = first + matrices.shape[0]
    ends = offsets[first:stop] if first == 0 else offsets[first - 1 : stop]
    if first:
        matrices = _after_zeros(matrices)
        factors = None if factors is None else _after_zeros(factors)
    product = grouped_rows(rows, matrices, ends.contiguous(), None, low, factors, invariant=invariant)
    row = torch.arange(rows.shape[0], device=rows.device)
    mine = row < offsets[stop - 1]
    if first:
        mine &= row >= offsets[first - 1]
    torch.where(mine.unsqueeze(1), product, out, out=out)


def row_by_row(rows: Tensor, matrices: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    """Each row from the same place in memory: what a library computes may depend on how its operands are aligned."""
    row, result = rows.new_empty(1, rows.shape[1]), out.new_empty(1, out.shape[1])
    if rows.device.type == "cpu":
        owners = (
            (number, matrices[e]) for e, block in blocks(offsets, len(rows)) for number in range(block.start, block.stop)
        )
    else:  # where it would be a sync to ask which expert that is
        expert = expert_of_row(within(offsets, len(rows)), len(rows)).clamp(max=len(matrices) - 1)
        owners = ((r, matrices.index_select(0, expert[r : r + 1])[0]) for r in range(len(rows) if len(matrices) else 0))
    for number, matrix in owners:
        row.copy_(rows[number])
        out[number] = torch.mm(row, matrix, out=result)[0]
    return out


def _after_zeros(matrices: Tensor) -> Tensor:
    return torch.cat([matrices.new_zeros(1, *matrices.shape[1:]), matrices])


def only_rows_of_experts(rows: Tensor, offsets: Tensor) -> Tensor:
    """``rows`` with zeros from the last offset on; on a CPU they are written into it."""
    if looped(rows):
        end = int(offsets[-1]) if offsets.numel() else 0
        if end < len(rows):
            rows[end:].zero_()
        return rows
    if not offsets.numel():
        return torch.zeros_like(rows)
    inside = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
    return torch.where(inside.unsqueeze(1), rows, 0)


def check_offsets(offsets: Tensor, num_experts: int | None = None) -> None:
    """One integer an expert; their values are for whoever reads them."""
    if offsets.dtype not in (torch.int32, torch.int64):
        _check.integer("grouped_linear", "offsets", offsets)
    if num_experts is None:
        _check.tensor_dim("grouped_linear", "offsets", offsets, 1)
    elif offsets.shape != (num_experts,):
        _check.shape("grouped_linear", "offsets", offsets, (num_experts,), "[experts]")


def check_depth(rows: Tensor, depth: int) -> None:
    """As many columns as are multiplied: kernels would read past them, or take zeros for what is not there."""
    if rows.shape[1] != depth:
        raise _check.fail(
            "grouped_linear", "rows", f"of {depth} columns, as the weight has inputs", f"shape {list(rows.shape)}"
        )


def looped(rows: Tensor) -> bool:
    """Whether to run expert by expert: on a CPU nothing is lost by it; elsewhere it costs a sync for the offsets."""
    return rows.device.type == "cpu" or rows.dtype not in (torch.bfloat16, torch.float16, torch.float32)


def blocks(offsets: Tensor, num_rows: int) -> Iterator[tuple[int, slice]]:
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
    apart = all(stride == 1 or stride % multiple == 0 for stride in matrix.stride()[-2:])
    return matrix if dense and apart and matrix.data_ptr() % _ALIGNMENT == 0 else matrix.contiguous()


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
