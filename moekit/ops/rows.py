"""Row movement: permute copies each token's row to its experts, unpermute sums a token's rows.

The two are each other's gradient. Both work from three tables (:mod:`moekit.ops.tables`): ``row_token [S]``, the token
of each row (-1 for none), and its inverse ``token_offsets [T + 1]``, ``token_rows [S]``, the rows of each token. With
the inverse at hand a sum is a gather: each token adds its rows in ascending order, in float32 (float64 for float64),
and rounds once, so the bits are the same every run and no promoted copy of the rows is made. Weights are given by row,
``[S]``, or by slot, ``[T, K]``: then ``token_rows`` has the row of each slot, as a :class:`~moekit.Routing` does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moekit import _check
from moekit.ops import _library, tables
from moekit.ops._segments import sum_by_index
from moekit.routing import Routing, require


def permute(tokens: Tensor, routing: Routing) -> Tensor:
    """Copy each token's row once for every expert it is routed to, expert by expert.

    Args:
        tokens: ``[T, H]``, any dtype.
        routing: where the tokens go.

    Returns:
        ``[R, H]`` in the dtype of ``tokens``; rows at or past ``routing.offsets[-1]`` and padding rows are zero.

    Raises:
        ValueError: the number of tokens or the device differs from the routing's.
        TypeError: something else than a routing.

    Examples:
        >>> import torch, moekit
        >>> routing = moekit.Routing.from_topk(torch.tensor([[0, 2], [0, 1]]), num_experts=3)
        >>> moekit.permute(torch.tensor([[1.0], [2.0]]), routing).flatten().tolist()
        [1.0, 2.0, 2.0, 1.0]
    """
    require("permute", routing)
    _check.tensor_dim("permute", "tokens", tokens, 2)
    if tokens.shape[0] != routing.num_tokens:
        raise _check.fail("permute", "tokens", f"the routing's {routing.num_tokens} tokens", f"shape {list(tokens.shape)}")
    _check.same_device("permute", tokens=tokens, routing=routing.order)
    return move_rows(tokens, *routing.row_tables())


def unpermute(rows: Tensor, routing: Routing, *, weighted: bool = False) -> Tensor:
    """Sum each token's rows, optionally times their routing weights.

    Args:
        rows: ``[R, H]``, as :func:`permute` laid them out.
        routing: where the tokens went.
        weighted: multiply each row by its routing weight (leave it out if the activation applied it already).

    Returns:
        ``[T, H]`` in the dtype of ``rows``. A token with no expert gets zeros.

    Raises:
        ValueError: shapes or devices that do not fit the routing, or ``weighted`` without routing weights.
        TypeError: something else than a routing.

    Examples:
        >>> import torch, moekit
        >>> weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        >>> routing = moekit.Routing.from_topk(torch.tensor([[0, 2], [0, 1]]), weights, num_experts=3)
        >>> rows = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
        >>> moekit.unpermute(rows, routing).flatten().tolist()
        [9.0, 6.0]
        >>> moekit.unpermute(rows, routing, weighted=True).flatten().tolist()
        [2.75, 3.0]
    """
    require("unpermute", routing)
    _check.tensor_dim("unpermute", "rows", rows, 2)
    if rows.shape[0] != routing.num_rows:
        raise _check.fail("unpermute", "rows", f"the routing's {routing.num_rows} rows", f"shape {list(rows.shape)}")
    _check.same_device("unpermute", rows=rows, routing=routing.order)
    if weighted and routing.weights is None:
        raise _check.fail("unpermute", "routing", "built with weights, if weighted", "none")
    return sum_rows(rows, routing.weights if weighted else None, *routing.row_tables())


def sort_chunks(
    rows: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Cut ``rows`` into chunks and put them into another order.

    Args:
        rows: ``[S, ...]``, any dtype.
        split_sizes: integers ``[C]`` that sum to S, on the device of ``rows`` or on the CPU.
        sorted_idxs: integers, the chunks in their new order. As many as there are chunks must be a permutation; any
            other number costs a device-to-host sync on a GPU.
        probs: ``[S, ...]`` moved alike, or None.

    Returns:
        ``(rows, probs)`` in the new order.

    Raises:
        ValueError: sizes that do not sum to S, a chunk number out of range (checked on a CPU).
        TypeError: sizes or chunk numbers that are not integers.
    """
    _check.tensor("sort_chunks", "input", rows)
    if rows.dim() == 0:
        raise _check.fail("sort_chunks", "input", "a tensor of rows", "shape []")
    for name, value in (("split_sizes", split_sizes), ("sorted_idxs", sorted_idxs)):
        _check.tensor_dim("sort_chunks", name, value, 1)
        _check.integer("sort_chunks", name, value)
    _check.same_device("sort_chunks", input=rows, probs=probs)
    _check.same_device("sort_chunks", split_sizes=split_sizes, sorted_idxs=sorted_idxs)
    if split_sizes.device.type != "cpu":
        _check.same_device("sort_chunks", input=rows, split_sizes=split_sizes)
    if probs is not None and probs.shape[:1] != rows.shape[:1]:
        raise _check.fail("sort_chunks", "probs", f"of {rows.shape[0]} rows", f"shape {list(probs.shape)}")
    num_rows = rows.shape[0]
    # With as many chunks out as in, the size is known; tables on the CPU are read anyway.
    is_permutation = sorted_idxs.shape[0] == split_sizes.shape[0] and split_sizes.device.type != "cpu"
    source = tables.sort_chunk_rows(split_sizes, sorted_idxs, num_rows, num_rows if is_permutation else None)
    source = source.to(rows.device, non_blocking=True)
    found = (source, *tables.rows_of_tokens(source, num_rows))
    return _move_chunks(rows, *found), None if probs is None else _move_chunks(probs, *found)


def _move_chunks(x: Tensor, *found: Tensor) -> Tensor:
    moved = move_rows(x.reshape(x.shape[0], math.prod(x.shape[1:])), *found)
    return moved.view(moved.shape[0], *x.shape[1:])


# --- the operators --------------------------------------------------------------------------------------------------


def _dtype(tensor: Tensor, *others: Tensor | None) -> torch.dtype:
    """What to add in: integers without weights in themselves, anything else in float32 or float64."""
    dtypes = {t.dtype for t in (tensor, *others) if t is not None}
    if not any(dtype.is_floating_point for dtype in dtypes):
        return tensor.dtype
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _gather(tokens: Tensor, row_token: Tensor) -> Tensor:
    """``tokens[row_token]``, zero rows where there is no token."""
    if tokens.shape[0] == 0:
        return tokens.new_zeros(row_token.shape[0], tokens.shape[1])
    zero = tokens.new_zeros(())  # a plain 0 would turn bool into int64
    known = (row_token >= 0) & (row_token < tokens.shape[0])
    return torch.where(known.unsqueeze(1), tokens.index_select(0, torch.where(known, row_token, 0)), zero)


def _weights_of_rows(weights: Tensor, token_rows: Tensor, num_rows: int) -> Tensor:
    """Weights ``[S]`` by row as they are, and ``[T, K]`` by slot in row order: ``token_rows`` has the row of each slot."""
    return weights if weights.dim() == 1 else tables.put(weights, token_rows.view_as(weights), num_rows)


def _permute_reference(tokens: Tensor, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Tensor:
    _check.row_tables("permute", row_token, token_offsets, token_rows, tokens.shape[0])
    return _gather(tokens, row_token)


def _permute_fake(tokens: Tensor, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Tensor:
    return tokens.new_empty(row_token.shape[0], tokens.shape[1])


def _permute_save(ctx: Any, args: tuple, outputs: Any) -> None:
    ctx.save_for_backward(*args[1:])


def _permute_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    return sum_rows(grad, None, *ctx.saved_tensors), None, None, None


def _check_rows(rows: Tensor, weights: Tensor | None, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> None:
    _check.row_tables("unpermute", row_token, token_offsets, token_rows, token_offsets.shape[0] - 1)
    _check.shape("unpermute", "row_token", row_token, rows.shape[:1], "[rows]")
    if (
        weights is not None
        and weights.shape != row_token.shape
        and (weights.dim() != 2 or weights.numel() != len(token_rows))
    ):
        wanted = f"one a row, of shape {list(row_token.shape)}, or one a slot, {len(token_rows)} in all"
        raise _check.fail("unpermute", "weights", wanted, f"shape {list(weights.shape)}")


def _unpermute_reference(
    rows: Tensor, weights: Tensor | None, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor
) -> Tensor:
    _check_rows(rows, weights, row_token, token_offsets, token_rows)
    dtype = _dtype(rows, weights)
    values = rows.to(dtype)
    if weights is not None:
        values = values * _weights_of_rows(weights, token_rows, rows.shape[0]).to(dtype).unsqueeze(1)
    return sum_by_index(values, row_token, token_offsets.shape[0] - 1).to(rows.dtype)


def _unpermute_fake(
    rows: Tensor, weights: Tensor | None, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor
) -> Tensor:
    return rows.new_empty(token_offsets.shape[0] - 1, rows.shape[1])


def _unpermute_save(ctx: Any, args: tuple, outputs: Any) -> None:
    rows, weights, *found = args
    ctx.save_for_backward(None if weights is None else rows, weights, *found)


def _unpermute_backward(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    rows, weights, *found = ctx.saved_tensors
    if weights is None:
        return move_rows(grad, *found), None, None, None, None
    wanted = list(needs[:2])
    grads = _unpermute_weighted_backward(grad, rows, weights, *found, wanted)
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None, None)


def _weighted_backward_reference(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor,
    row_token: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """``(drows [S, H], dweights)``, the latter as the weights are; those that ``wanted`` leaves out are empty."""
    _check_rows(rows, weights, row_token, token_offsets, token_rows)
    _check.shape("unpermute", "grad", grad, (token_offsets.shape[0] - 1, rows.shape[1]), "[tokens, features]")
    dtype = _dtype(rows, weights, grad)
    g = _gather(grad, row_token).to(dtype)
    drows, dweights = grad.new_empty(0), grad.new_empty(0)
    if wanted[0]:
        drows = (g * _weights_of_rows(weights, token_rows, rows.shape[0]).to(dtype).unsqueeze(1)).to(rows.dtype)
    if wanted[1]:
        dweights = torch.where(row_token >= 0, (g * rows.to(dtype)).sum(1), 0).to(weights.dtype)
        if weights.dim() == 2:
            dweights = tables.take(dweights, token_rows.view_as(weights))
    return drows, dweights


def _weighted_backward_fake(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor,
    row_token: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if wanted[0] else grad.new_empty(0),
        weights.new_empty(weights.shape) if wanted[1] else grad.new_empty(0),
    )


def _weighted_backward_save(ctx: Any, args: tuple, outputs: Any) -> None:
    *tensors, ctx.wanted = args
    ctx.save_for_backward(*tensors)


def _weighted_double_backward(ctx: Any, needs: tuple, *grads: Tensor) -> tuple:
    _library.require_reference("unpermute", ctx.saved_tensors[0])
    args = (*ctx.saved_tensors, ctx.wanted)
    return _library.differentiate(_weighted_backward_reference, args, needs, grads)


_TABLES = "Tensor row_token, Tensor token_offsets, Tensor token_rows"

move_rows = _library.define(
    f"permute(Tensor tokens, {_TABLES}) -> Tensor",
    reference=_permute_reference,
    fake=_permute_fake,
    save=_permute_save,
    backward=_permute_backward,
)
sum_rows = _library.define(
    f"unpermute(Tensor rows, Tensor? weights, {_TABLES}) -> Tensor",
    reference=_unpermute_reference,
    fake=_unpermute_fake,
    save=_unpermute_save,
    backward=_unpermute_backward,
)
_unpermute_weighted_backward = _library.define(
    f"unpermute_backward(Tensor grad, Tensor rows, Tensor weights, {_TABLES}, bool[] wanted) -> (Tensor, Tensor)",
    reference=_weighted_backward_reference,
    fake=_weighted_backward_fake,
    save=_weighted_backward_save,
    backward=_weighted_double_backward,
)
