"""Grouped products: each expert's rows by its matrix, dense or packed, with a low-rank update in the same sum.

One kernel, whose programs take tiles in turn until none is left; how many tiles there are it finds out from the offsets, so
that nothing waits for the host. Packed weights are unpacked in registers on their way into the product: each to float32,
times its scale, rounded to the rows' dtype, so that results are those of unpacking first.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.kernels.triton import _launch, _packed
from moekit.kernels.triton._packed import load_tile, scale_tile, weight_tile

_GROUP = 8  # blocks of rows that share what is in the L2 cache of a matrix


class Blocks(NamedTuple):
    """How a product is cut: rows, columns and depth of a tile, warps, stages of its pipeline, programs a multiprocessor.

    ``turned`` computes the transpose of a tile: the weights are then the operand that comes from registers, which is where
    packed ones are made.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int
    turned: bool = False
    registers: int | None = None


# By kind: weights of two bytes; packed; the same for few rows an expert, where reading the weights is all that counts.
_BLOCKS = {
    "dense": Blocks(128, 128, 64, 8, 3, 2),
    "packed": Blocks(128, 128, 64, 8, 3, 2, turned=True),
    "few": Blocks(16, 64, 128, 4, 4, 4, turned=True),
    "exact": Blocks(64, 64, 32, 4, 2, 2),  # float32
    "low_rank": Blocks(64, 128, 16, 4, 1, 4),
}
_BLOCKS_OF_ARCH: dict[str, dict[str, Blocks]] = {}
# Rows an expert on average up to which packed weights are multiplied as they are.
_FEW, _PACKED = 16, 16


def blocks(kind: str, arch: str) -> Blocks:
    """The configuration of a kind of product on an architecture."""
    return _BLOCKS_OF_ARCH.get(arch, {}).get(kind, _BLOCKS[kind])


def packed_kind(num_rows: int, num_experts: int, dtype: torch.dtype, arch: str) -> str | None:
    """How to multiply by packed weights; None: not at all, as unpacking them first is faster."""
    if num_rows > _PACKED * num_experts:
        return None
    if dtype is torch.float32:
        return "exact"
    return "few" if num_rows <= _FEW * num_experts else "packed"


# --- tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _ends(offsets, first, num_experts, num_rows, BLOCK_E: tl.constexpr):
    """Where the rows of experts ``first`` onwards end: within the rows and ascending, whatever the offsets are."""
    expert = first + tl.arange(0, BLOCK_E)
    end = tl.load(offsets + expert, mask=(expert >= 0) & (tl.arange(0, BLOCK_E) < num_experts), other=0)
    # In range before it is cut to 32 bits, which could make any number of it.
    return tl.associative_scan(tl.minimum(tl.maximum(end, 0), num_rows).to(tl.int32), 0, _larger)


@triton.jit
def _experts(offsets, first, num_experts, num_rows, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Of each expert of a slice: first row, last row, and the blocks of rows up to and with its own."""
    before = tl.zeros([], tl.int32)
    if first > 0:
        before = tl.minimum(tl.maximum(tl.load(offsets + first - 1), 0), num_rows).to(tl.int32)
    end = tl.maximum(_ends(offsets, first, num_experts, num_rows, BLOCK_E), before)
    begin = tl.maximum(_ends(offsets, first - 1, num_experts, num_rows, BLOCK_E), before)
    row_blocks = tl.where(tl.arange(0, BLOCK_E) < num_experts, (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    return begin, end, tl.cumsum(row_blocks, 0)


@triton.jit
def _tile(tile, begin, end, through, column_blocks, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr):
    """Of a tile: its expert in the slice, its first row, the end of the expert's rows, and its block of columns.

    Tiles go expert by expert, and within one by groups of GROUP blocks of rows, so that neighbours in time share operands.
    """
    last = through * column_blocks
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    own = tl.arange(0, BLOCK_E) == expert
    begin = tl.sum(tl.where(own, begin, 0), 0)
    end = tl.sum(tl.where(own, end, 0), 0)
    inner = tile - tl.max(tl.where(last <= tile, last, 0), 0)
    row_blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
    group = inner // (GROUP * column_blocks)
    size = tl.minimum(row_blocks - group * GROUP, GROUP)
    inner -= group * GROUP * column_blocks
    return expert, begin + (group * GROUP + inner % size) * BLOCK_M, end, inner // size


@triton.jit
def _low_rank(total, low, factors, expert, row, column, width, rank, stride_low, stride_fe, stride_fr, stride_fn,
              RANK: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Add ``low[row] @ factors[expert]`` to a tile, or to its transpose."""
    r = tl.arange(0, RANK)
    left = tl.load(low + row.to(tl.int64)[:, None] * stride_low + r[None, :], mask=(r < rank)[None, :], other=0)
    address = factors + expert.to(tl.int64) * stride_fe + r[:, None] * stride_fr + column[None, :] * stride_fn
    right = tl.load(address, mask=(r < rank)[:, None] & (column < width)[None, :], other=0)
    if TURNED:
        total = tl.dot(tl.trans(right), tl.trans(left), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_rows", "first", "num_experts"])
def _grouped_kernel(
    rows, codes, scales, table, dynamic, nested, shift, low, factors, offsets, out,
    num_rows, first, num_experts, depth, width, column_blocks, stride_rows, stride_out,
    stride_e, stride_a, stride_s, scale_columns, rank, stride_low, stride_fe, stride_fr, stride_fn,
    FORMAT: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, UNIT: tl.constexpr,
    BACK: tl.constexpr, TURNED: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many-th tile ``[BLOCK_M, BLOCK_N]`` of the rows of the experts from ``first`` on.

    ``codes`` holds these experts' matrices as ``[N, K]``, or with BACK as ``[K, N]``. Rows of a tile that are not its
    expert's are read as some other row, and so are columns of an ``[N, K]`` past the last: they are not written.
    """
    DTYPE: tl.constexpr = rows.dtype.element_ty
    BLOCK_B: tl.constexpr = BLOCK_N if BACK else BLOCK_K
    height, across = (depth, width) if BACK else (width, depth)
    begins, ends, through = _experts(offsets, first, num_experts, num_rows, BLOCK_M, BLOCK_E)
    tiles = tl.max(through, 0) * column_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, top, end, block = _tile(tile, begins, ends, through, column_blocks, BLOCK_M, BLOCK_E, GROUP)
        row = tl.minimum(top + tl.arange(0, BLOCK_M), end - 1)
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        address = rows + row.to(tl.int64)[:, None] * stride_rows
        if BACK:
            a, b = tl.arange(0, BLOCK_K), block * BLOCK_N
        else:
            a, b = tl.minimum(column, width - 1), 0
        scale = scale_tile(
            scales, dynamic, nested, shift, expert, a, b, height, stride_s, scale_columns,
            BLOCK_B, FORMAT, SHARE_A, SHARE_B, UNIT,
        )  # fmt: skip
        total = tl.zeros([BLOCK_N, BLOCK_M] if TURNED else [BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = load_tile(address + k[None, :], row < end, k < depth, False, not EVEN_K)
            w = weight_tile(
                codes, table, scale, expert, a + (start if BACK else 0), b + (0 if BACK else start), height, across,
                stride_e, stride_a, BLOCK_B, BACK and not EVEN_K, not EVEN_N if BACK else not EVEN_K, FORMAT, DTYPE,
            )  # fmt: skip
            # Those of the next tile already: the compiler does not bring such small loads forward.
            scale = scale_tile(
                scales, dynamic, nested, shift, expert, a + (start + BLOCK_K if BACK else 0),
                b + (0 if BACK else start + BLOCK_K), height, stride_s, scale_columns,
                BLOCK_B, FORMAT, SHARE_A, SHARE_B, UNIT,
            )  # fmt: skip
            if TURNED:
                total = tl.dot(tl.trans(w) if BACK else w, tl.trans(x), total, input_precision="ieee")
            else:
                total = tl.dot(x, w if BACK else tl.trans(w), total, input_precision="ieee")
        if RANK > 0:
            total = _low_rank(total, low, factors, first + expert, row, column, width, rank, stride_low, stride_fe, stride_fr,
                              stride_fn, RANK, TURNED)  # fmt: skip
        value = tl.trans(total) if TURNED else total
        row = top + tl.arange(0, BLOCK_M)
        place = out + row.to(tl.int64)[:, None] * stride_out + column[None, :]
        tl.store(place, value.to(DTYPE), mask=(row < end)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _low_rank_kernel(
    low, factors, offsets, out, num_rows, num_experts, width, column_blocks, stride_out, rank, stride_low,
    stride_fe, stride_fr, stride_fn,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Each program adds to every so many-th tile ``[BLOCK_M, BLOCK_N]`` of ``out``."""
    begins, ends, through = _experts(offsets, 0, num_experts, num_rows, BLOCK_M, BLOCK_E)
    tiles = tl.max(through, 0) * column_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, top, end, block = _tile(tile, begins, ends, through, column_blocks, BLOCK_M, BLOCK_E, GROUP)
        row, column = top + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
        place = out + row.to(tl.int64)[:, None] * stride_out + column[None, :]
        mask = (row < end)[:, None] & (column < width)[None, :]
        before = tl.load(place, mask=mask, other=0).to(tl.float32)
        update = _low_rank(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), low, factors, expert, tl.minimum(row, end - 1), column, width, rank,
            stride_low, stride_fe, stride_fr, stride_fn, RANK, False,
        )  # fmt: skip
        tl.store(place, (before + update).to(out.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------------------------------


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of one that is not there, as many as an H100 has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _grid(cut: Blocks, num_rows: int, num_experts: int, column_blocks: int, device: torch.device) -> tuple[int]:
    """Programs: no more than there can be tiles, as every expert with rows may have a block that is not full."""
    experts = min(num_experts, num_rows)
    row_blocks = experts + (num_rows - experts) // cut.rows
    return (min(row_blocks * column_blocks, cut.programs * _processors(device)),)


def _fits(rows: Tensor, offsets: Tensor, *others: Tensor) -> bool:
    same = all(t.dtype is rows.dtype for t in others)
    return _launch.computes(rows) and same and offsets.dtype in (torch.int32, torch.int64) and offsets.dim() == 1


def _update(low: Tensor | None, factors: Tensor | None) -> tuple[tuple, tuple, int]:
    """The tensors, sizes and padded rank of a low-rank update, or of none."""
    if low is None or factors is None:
        return (None, None), (0, 0, 0, 0, 0), 0
    low, rank = _launch.rows_of(low), low.shape[1]
    return (low, factors), (rank, low.stride(0), *factors.stride()), max(_launch.power_of_two(rank), 16)


def product(
    rows: Tensor,
    weights: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    offsets: Tensor,
    first: int,
    num_experts: int,
    out: Tensor,
    cut: Blocks,
    constants: dict[str, Any],
    back: bool,
    low: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """Launch the one kernel: ``out[r] = rows[r] @ matrix of its expert``, of the experts ``first`` to ``first + num_experts``.

    ``weights`` and ``sizes`` are what ``_packed.parts`` and ``_packed.sizes`` give.
    """
    rows = _launch.rows_of(rows)
    (num_rows, depth), width = rows.shape, out.shape[1]
    column_blocks = _launch.blocks(width, cut.columns)
    tensors, strides, rank = _update(low, factors)
    _launch.launch(
        _grouped_kernel, _grid(cut, num_rows, num_experts, column_blocks, out.device),
        rows, *weights, *tensors, offsets.contiguous(), out,
        num_rows, first, num_experts, depth, width, column_blocks, rows.stride(0), out.stride(0), *sizes, *strides,
        **constants, BACK=back, TURNED=cut.turned, RANK=rank,
        BLOCK_M=cut.rows, BLOCK_N=cut.columns, BLOCK_K=cut.depth, BLOCK_E=_launch.power_of_two(num_experts), GROUP=_GROUP,
        EVEN_K=depth % cut.depth == 0, EVEN_N=width % cut.columns == 0,
        num_stages=cut.stages, enable_fp_fusion=False, config=cut,
    )  # fmt: skip
    return out


def packed_rows(rows: Tensor, stored: Any, offsets: Tensor, out: Tensor | None, back: bool) -> Any:
    """``packed_rows``: each expert's rows by its packed ``[out, in]``, along ``in``, or with ``back`` along ``out``."""
    num_experts, height, width = stored.shape
    kind = packed_kind(rows.shape[0], num_experts, rows.dtype, _launch.arch(rows.device).name)
    if kind is None or not _fits(rows, offsets) or not _packed.reads(stored):
        return NotImplemented
    out = rows.new_empty(rows.shape[0], width if back else height) if out is None else out
    cut = blocks(kind, _launch.arch(rows.device).name)
    constants = _packed.constants(stored, cut.columns if back else cut.depth)
    return product(rows, _packed.parts(stored), _packed.sizes(stored), offsets, 0, num_experts, out, cut, constants, back)


def _dense(matrices: Tensor) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], bool]:
    """Matrices ``[n, K, N]`` as the kernel takes them: which of the two dimensions is adjacent says how they are stored."""
    if 1 not in matrices.stride()[1:]:
        matrices = matrices.contiguous()
    back = matrices.stride(2) == 1
    return (matrices, *(None,) * 5), (matrices.stride(0), matrices.stride(1 if back else 2), 0, 0), back


_PLAIN = {"FORMAT": "dense", "SHARE_A": 1, "SHARE_B": 1, "UNIT": 1}


def grouped_slice(rows: Tensor, matrices: Tensor, offsets: Tensor, first: int, out: Tensor) -> Any:
    """The rows of experts ``first`` to ``first + n`` by matrices ``[n, K, N]``, into their rows of ``out [R, N]`` alone."""
    if not _fits(rows, offsets, matrices, out):
        return NotImplemented
    cut = blocks("exact" if rows.dtype is torch.float32 else "dense", _launch.arch(rows.device).name)
    weights, sizes, back = _dense(matrices)
    return product(rows, weights, sizes, offsets, first, matrices.shape[0], out, cut, _PLAIN, back)


def low_rank_update(out: Tensor, low: Tensor, factors: Tensor, offsets: Tensor) -> Any:
    """``out[r] += low[r] @ factors[e]`` of each expert's rows, in place: ``low [R, r]``, ``factors [E, r, N]``."""
    if not _fits(out, offsets, low, factors):
        return NotImplemented
    cut = blocks("low_rank", _launch.arch(out.device).name)
    (num_rows, width), num_experts = out.shape, factors.shape[0]
    column_blocks = _launch.blocks(width, cut.columns)
    tensors, (rank, *strides), padded = _update(low, factors)
    _launch.launch(
        _low_rank_kernel, _grid(cut, num_rows, num_experts, column_blocks, out.device),
        *tensors, offsets.contiguous(), out, num_rows, num_experts, width, column_blocks, out.stride(0), rank, *strides,
        RANK=padded, BLOCK_M=cut.rows, BLOCK_N=cut.columns, BLOCK_E=_launch.power_of_two(num_experts), GROUP=_GROUP,
        num_stages=cut.stages, enable_fp_fusion=False, config=cut,
    )  # fmt: skip
    return out
