"""Grouped products for sm_90 in Gluon, whose warps have parts: some fetch operands, two groups of four multiply.

What they fetch waits in a ring of stages in shared memory. A stage has a barrier that opens when it is full and one that
opens when it has been used; nothing else holds warps up, so that one group writes its half of a tile while the other, half a
tile or less behind, keeps the tensor cores busy. (In Triton's own pipeline all warps of a program go through it together.)

The copy engine fetches by descriptors, as in :mod:`~moekit.kernels.triton.gemm`; rows of tokens that are fetched by their
numbers are copied by threads. Sums go over the same steps in the same order as there, and have the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moekit.kernels.triton import _launch
from moekit.kernels.triton._halves import through_gate
from moekit.kernels.triton._policy import Blocks, Shape
from moekit.kernels.triton._ragged import halves_of, ragged, rows_at
from moekit.kernels.triton._tiles import rows_of_experts

if hasattr(tma, "async_load"):  # in newer releases of Triton
    fetch, fetch_each, leave = tma.async_load, async_copy.async_load, tma.async_store
else:
    fetch, leave = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    fetch_each = async_copy.async_copy_global_to_shared

GROUPS = gl.constexpr(2)  # of warps that multiply, each half of a tile's rows
# Of a thread, by the warps that fetch: of the other group that multiplies, and of those; the first group has the rest.
REGISTERS = {1: (224, 40), 4: (216, 64)}
_GROUP = 8  # blocks of rows that share what is in the L2 cache of a matrix
_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


# --- the ring -------------------------------------------------------------------------------------------------------


@gluon.jit
def ring(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers of every stage: that it is full, at which so many arrive, and that it is free, both groups having used it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(free.index(stage), count=GROUPS)
    fence_async_shared()
    return full, free


@gluon.jit
def await_full(full, turn, STAGES: gl.constexpr):
    """Wait for the stage of a turn to be full."""
    mbarrier.wait(full.index(turn % STAGES), (turn // STAGES) & 1)


@gluon.jit
def await_free(free, turn, STAGES: gl.constexpr):
    """Wait for the stage of a turn to have been used; before there was anything in it, it has been."""
    mbarrier.wait(free.index(turn % STAGES), ((turn // STAGES) & 1) ^ 1)


@gluon.jit
def release(free, turn, some, STAGES: gl.constexpr):
    """Say that the stage of the turn before has been used, if there was ``some`` turn before."""
    mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES), pred=some)


@gluon.jit
def experts(BLOCK_E: gl.constexpr, WARPS: gl.constexpr = 1):
    """Numbers of experts, shared out among so many warps; within one, what is summed over them needs no barrier."""
    return gl.arange(0, BLOCK_E, gl.BlockedLayout([max(BLOCK_E // 32 // WARPS, 1)], [32], [gl.num_warps()], [0]))


# --- products of rows by matrices -----------------------------------------------------------------------------------


@gluon.jit
def _pieces(begin, end, slot, num_experts, column_blocks, BLOCK_M: gl.constexpr):
    """Of each expert: the blocks of rows that both groups have a part in, and the pieces of work up to and with its own.

    Where rows for one group alone are left, two blocks of columns are one piece: all pieces take about as long, and programs
    that take every so many-th have as much to do as any other.
    """
    both = (end - begin + BLOCK_M // GROUPS - 1) // BLOCK_M
    pieces = both * column_blocks + gl.where(end - begin > both * BLOCK_M, (column_blocks + 1) // 2, 0)
    return both, tl.cumsum(gl.where(slot < num_experts, pieces, 0), 0)


@gluon.jit
def _place_of(piece, begin, end, both, through, slot, column_blocks, BLOCK_M: gl.constexpr, GROUP: gl.constexpr):
    """Of a piece: its expert in the slice, its first row, the end of the expert's rows, first block of columns and the end.

    Pieces go expert by expert, and within one by groups of GROUP blocks of rows, so that neighbours in time share operands.
    """
    expert = gl.sum((through <= piece).to(gl.int32), 0)
    own = slot == expert
    begin = gl.sum(gl.where(own, begin, 0), 0)
    end = gl.sum(gl.where(own, end, 0), 0)
    both = gl.sum(gl.where(own, both, 0), 0)
    inner = piece - gl.max(gl.where(through <= piece, through, 0), 0)
    group = inner // (GROUP * column_blocks)
    within = inner - group * GROUP * column_blocks
    size = gl.maximum(gl.minimum(both - group * GROUP, GROUP), 1)
    left = inner - both * column_blocks  # of the rows for one group
    block = gl.where(left < 0, within // size, left * 2)
    top = begin + gl.where(left < 0, group * GROUP + within % size, both) * BLOCK_M
    return expert, top, end, block, gl.where(left < 0, block + 1, gl.minimum(block + 2, column_blocks))


@gluon.jit
def _fetch_rows(
    offsets, rows, index, matrices, a, b, full, free, num_rows, num_tokens, first, num_experts, depth, column_blocks,
    copies_apart, BACK: gl.constexpr, PAIRED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, BLOCK_E: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warps that fetch, for each tile and step, rows (those that ``index`` names, if there is one) and a matrix.

    Tokens are ``copies_apart`` copies of 8 elements apart: the compiler would not know that 8 divides a stride in elements.
    """
    slot = experts(BLOCK_E, gl.num_warps())  # which leaves registers to the others
    begins, ends = rows_of_experts(offsets, first, num_experts, num_rows, slot)
    both, through = _pieces(begins, ends, slot, num_experts, column_blocks, BLOCK_M)
    each: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, each))
    of_copy = k // 8 * 8  # one copy is in or out as a whole: rows are whole ones
    turn = 0
    for piece in range(gl.program_id(0), gl.max(through, 0), gl.num_programs(0)):
        expert, top, end, block, stop = _place_of(piece, begins, ends, both, through, slot, column_blocks, BLOCK_M, GROUP)
        if index is not None:
            row = top + gl.arange(0, BLOCK_M, gl.SliceLayout(1, each))
            token = gl.load(index + row, mask=row < end, other=-1)
            known = (token >= 0) & (token < num_tokens)
            address = rows + gl.where(known, token, 0).to(gl.int64)[:, None] * (copies_apart * 8) + k[None, :]
        for column in range(block * BLOCK_N, stop * BLOCK_N, BLOCK_N):
            for start in range(0, depth, BLOCK_K):
                stage = turn % STAGES
                await_free(free, turn, STAGES)
                ready = full.index(stage)
                if index is None:
                    mbarrier.expect(ready, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
                    fetch(rows, [top, start], ready, a.index(stage))
                else:
                    mbarrier.expect(ready, BLOCK_N * BLOCK_K * 2)
                    fetch_each(a.index(stage), address + start, known[:, None] & (start + of_copy < depth)[None, :])
                    async_copy.mbarrier_arrive(ready, increment_count=False)
                if PAIRED:
                    fetch(matrices, [expert, 0, column // 2, start], ready, b.index(stage))
                elif BACK:
                    fetch(matrices, [expert, start, column], ready, b.index(stage))
                else:
                    fetch(matrices, [expert, column, start], ready, b.index(stage))
                turn += 1


@gluon.jit
def _multiply_rows(
    offsets, weights, bias, out, out_up, act, a, b, full, free, staging, num_rows, first, num_experts, depth, inner,
    column_blocks, stride_bias, c1, c3, linear_offset, clamp,
    WHICH: gl.constexpr, FENCED: gl.constexpr, BACK: gl.constexpr, PAIRED: gl.constexpr, ACT: gl.constexpr,
    LAYOUT: gl.constexpr, CLAMP: gl.constexpr, FAST: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, BLOCK_E: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One group of warps that multiply: its half of every tile's rows, which may have none that are the expert's."""
    OWN: gl.constexpr = BLOCK_M // GROUPS
    # Parts that half a tile with its gate is written in; those of a whole one are even, so that the buffers alternate.
    HALF: gl.constexpr = BLOCK_N // 2 // staging.shape[-1]
    WRITTEN: gl.constexpr = (0 if out is None else HALF) + (HALF if LAYOUT == "ungated" else HALF // 2)
    slot = experts(BLOCK_E)
    begins, ends = rows_of_experts(offsets, first, num_experts, num_rows, slot)
    both, through = _pieces(begins, ends, slot, num_experts, column_blocks, BLOCK_M)
    turn = 0
    for piece in range(gl.program_id(0), gl.max(through, 0), gl.num_programs(0)):
        expert, top, end, first_block, stop = _place_of(
            piece, begins, ends, both, through, slot, column_blocks, BLOCK_M, GROUP
        )  # fmt: skip
        row = top + OWN * WHICH
        for block in range(first_block, stop):
            if row < end:
                total = gl.zeros([OWN, BLOCK_N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
                for start in range(0, depth, BLOCK_K):
                    await_full(full, turn, STAGES)
                    if FENCED:  # for the tensor cores to see what threads have copied
                        fence_async_shared()
                    x = a.index(turn % STAGES).slice(OWN * WHICH, OWN)
                    if BACK:
                        w = b.index(turn % STAGES).reshape((BLOCK_K, BLOCK_N))
                    else:
                        w = b.index(turn % STAGES).reshape((BLOCK_N, BLOCK_K)).permute((1, 0))
                    total = warpgroup_mma_wait(1, deps=(warpgroup_mma(x, w, total, is_async=True),))
                    release(free, turn, start > 0, STAGES)
                    turn += 1
                total = warpgroup_mma_wait(0, deps=(total,))
                release(free, turn, True, STAGES)
                if ACT == "none":
                    write(out, total.to(out.dtype), rows_at(row, end), block * BLOCK_N, staging, 0)
                else:  # in halves, for which there are registers
                    tiles = _gates_and_ups(_rounded(total, act.dtype), LAYOUT, PAIRED)
                    _gate(
                        tiles[0], tiles[1], tiles[2], weights, bias, out, out_up, act, expert, row, block * 2, end, inner,
                        staging, stride_bias, c1, c3, linear_offset, clamp, 0, ACT, LAYOUT, CLAMP, FAST,
                    )  # fmt: skip
                    _gate(
                        tiles[3], tiles[4], tiles[5], weights, bias, out, out_up, act, expert, row, block * 2 + 1, end,
                        inner, staging, stride_bias, c1, c3, linear_offset, clamp, WRITTEN, ACT, LAYOUT, CLAMP, FAST,
                    )  # fmt: skip
            else:
                for _start in range(0, depth, BLOCK_K):
                    await_full(full, turn, STAGES)
                    turn += 1
                    release(free, turn, True, STAGES)
    tma.store_wait(0)


@gluon.jit
def write(out, tile, place, column, staging, AT: gl.constexpr):
    """Hand a tile to the copy engine for ``place`` and ``column`` of ``out``, in parts from two buffers in turn.

    ``AT`` is the first part's buffer. One is free when all parts but the last one handed over have been read.
    """
    PART: gl.constexpr = staging.shape[-1]
    if tile.shape[1] > PART:
        HALF: gl.constexpr = tile.shape[1] // 2
        left, right = halves_of(tile)
        write(out, left, place, column, staging, AT)
        write(out, right, place, column + HALF, staging, AT + HALF // PART)
    else:
        part = staging.index(AT % 2)
        tma.store_wait(1)
        part.reshape((tile.shape[0], PART)).store(tile)
        fence_async_shared()
        leave(out, [place[0], place[1], place[2], column], part)


@gluon.jit
def _rounded(tile, DTYPE: gl.constexpr):
    """A tile in 16 bits, two numbers in one instruction: one by one, as they are used later, it would take longer."""
    if DTYPE == gl.bfloat16:  # noqa: SIM300
        rounded = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [tile], gl.bfloat16, True, 2)
    else:
        rounded = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [tile], gl.float16, True, 2)
    return rounded


@gluon.jit
def _gates_and_ups(tile, LAYOUT: gl.constexpr, PAIRED: gl.constexpr):
    """Gate, up, and both in the order in which they are stored, of the first half of a tile's features and of the second.

    PAIRED: all gates of the tile come first. What is not asked for is the gate once more.
    """
    left, right = halves_of(tile)
    if LAYOUT == "ungated":
        tiles = left, left, left, right, right, right
    elif PAIRED:
        first_gate, then_gate = halves_of(left)
        first_up, then_up = halves_of(right)
        if LAYOUT == "interleaved":
            tiles = (
                first_gate,
                first_up,
                _alternating(first_gate, first_up),
                then_gate,
                then_up,
                _alternating(then_gate, then_up),
            )
        else:
            tiles = first_gate, first_up, first_gate, then_gate, then_up, then_gate
    else:
        first_gate, first_up = gl.split(gl.reshape(left, (left.shape[0], left.shape[1] // 2, 2)))
        then_gate, then_up = gl.split(gl.reshape(right, (left.shape[0], left.shape[1] // 2, 2)))
        tiles = first_gate, first_up, left, then_gate, then_up, right
    return tiles


@gluon.jit
def _alternating(gate, up):
    """Columns of both in turn."""
    return gl.reshape(gl.join(gate, up), (gate.shape[0], 2 * gate.shape[1]))


@gluon.jit
def _gate(
    gate, up, both, weights, bias, out, out_up, act, expert, row, block, end, inner, staging, stride_bias,
    c1, c3, linear_offset, clamp,
    AT: gl.constexpr, ACT: gl.constexpr, LAYOUT: gl.constexpr, CLAMP: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    """Write a block of gates and ups, rounded already, as they are and through the gate; the first part from buffer AT."""
    COLUMNS: gl.constexpr = gate.shape[1]
    PARTS: gl.constexpr = COLUMNS // staging.shape[-1]
    NEXT: gl.constexpr = AT + (0 if out is None else PARTS if LAYOUT == "ungated" else 2 * PARTS)
    place = rows_at(row, end)
    if out is not None:
        if LAYOUT == "interleaved":
            write(out, both, place, block * COLUMNS * 2, staging, AT)
        else:
            write(out, gate, place, block * COLUMNS, staging, AT)
            if LAYOUT == "concatenated":
                write(out_up, up, place, block * COLUMNS, staging, AT + PARTS)
    value = _through(
        gate, up, weights, bias, expert, row, block * COLUMNS, end, inner, stride_bias, c1, c3, linear_offset, clamp,
        act.dtype, ACT, LAYOUT, CLAMP, FAST,
    )  # fmt: skip
    write(act, value, place, block * COLUMNS, staging, NEXT)


@gluon.jit
def _through(
    gate, up, weights, bias, expert, row, column, end, inner, stride_bias, c1, c3, linear_offset, clamp,
    DTYPE: gl.constexpr, ACT: gl.constexpr, LAYOUT: gl.constexpr, CLAMP: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    """What comes through the gate of rows ``row`` on and columns ``column`` on, rounded; with a bias in parts, to fit."""
    COLUMNS: gl.constexpr = gate.shape[1]
    if bias is not None and COLUMNS > 16:
        HALF: gl.constexpr = COLUMNS // 2
        left_gate, right_gate = halves_of(gate)
        left_up, right_up = halves_of(up)
        left = _through(
            left_gate, left_up, weights, bias, expert, row, column, end, inner, stride_bias, c1, c3, linear_offset, clamp,
            DTYPE, ACT, LAYOUT, CLAMP, FAST,
        )  # fmt: skip
        right = _through(
            right_gate, right_up, weights, bias, expert, row, column + HALF, end, inner, stride_bias, c1, c3, linear_offset,
            clamp, DTYPE, ACT, LAYOUT, CLAMP, FAST,
        )  # fmt: skip
        value = gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), (gate.shape[0], COLUMNS))
    else:
        of_row = row + gl.arange(0, gate.shape[0], gl.SliceLayout(1, gate.type.layout))
        of_column = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, gate.type.layout))
        value = through_gate(
            gate, up, weights, bias, expert, of_row, of_column, end, inner, stride_bias, c1, c3, linear_offset, clamp,
            ACT, LAYOUT, CLAMP, FAST,
        ).to(DTYPE)  # fmt: skip
    return value


@gluon.jit(do_not_specialize=["num_rows", "num_tokens", "first", "num_experts"])
def _rows_kernel(
    offsets, rows, index, matrices, weights, bias, out, out_up, act,
    num_rows, num_tokens, first, num_experts, depth, inner, column_blocks, copies_apart, stride_bias,
    c1, c3, linear_offset, clamp,
    BACK: gl.constexpr, PAIRED: gl.constexpr, ACT: gl.constexpr, LAYOUT: gl.constexpr, CLAMP: gl.constexpr,
    FAST: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_E: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, FETCHERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Each program takes every so many-th tile ``[BLOCK_M, BLOCK_N]``; with ACT of pairs of gate and up."""
    INDEXED: gl.constexpr = index is not None
    leaving = out if act is None else act
    a = gl.allocate_shared_memory(
        leaving.dtype, [STAGES, BLOCK_M, BLOCK_K], gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], leaving.dtype)
    )
    b = gl.allocate_shared_memory(leaving.dtype, [STAGES] + matrices.block_type.shape, matrices.layout)  # noqa: RUF005
    own = gl.allocate_shared_memory(leaving.dtype, [2] + leaving.block_type.shape, leaving.layout)  # noqa: RUF005
    others = gl.allocate_shared_memory(leaving.dtype, [2] + leaving.block_type.shape, leaving.layout)  # noqa: RUF005
    full, free = ring(STAGES, 1 + 32 * FETCHERS if INDEXED else 1)
    ONE: gl.constexpr = 0
    OTHER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply_rows, (
                offsets, weights, bias, out, out_up, act, a, b, full, free, own, num_rows, first, num_experts,
                depth, inner, column_blocks, stride_bias, c1, c3, linear_offset, clamp,
                ONE, INDEXED, BACK, PAIRED, ACT, LAYOUT, CLAMP, FAST, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, GROUP, STAGES,
            )),
            (_multiply_rows, (
                offsets, weights, bias, out, out_up, act, a, b, full, free, others, num_rows, first, num_experts,
                depth, inner, column_blocks, stride_bias, c1, c3, linear_offset, clamp,
                OTHER, INDEXED, BACK, PAIRED, ACT, LAYOUT, CLAMP, FAST, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, GROUP, STAGES,
            )),
            (_fetch_rows, (
                offsets, rows, index, matrices, a, b, full, free, num_rows, num_tokens, first, num_experts, depth,
                column_blocks, copies_apart, BACK, PAIRED, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, GROUP, STAGES,
            )),
        ],
        [4, FETCHERS],
        REGISTERS,
    )  # fmt: skip


# --- launchers ------------------------------------------------------------------------------------------------------


@functools.cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a block lies in shared memory for the copy engine and the tensor cores."""
    return gl.NVMMASharedLayout.get_default_for(list(box), _ELEMENTS[dtype])


def described(x: Tensor, sizes: Sequence[int], strides: Sequence[int], box: list[int]) -> TensorDescriptor:
    """A descriptor of blocks ``box`` of ``x``."""
    return TensorDescriptor(x, list(sizes), list(strides), box, _layout(tuple(box), x.dtype))


def shares(cut: Blocks, num_experts: int) -> dict[str, Any]:
    """The constants that say how a product is cut, and what its warps have of the registers."""
    return {
        "BLOCK_M": cut.rows,
        "BLOCK_N": cut.columns,
        "BLOCK_K": cut.depth,
        "BLOCK_E": _launch.power_of_two(num_experts),
        "GROUP": _GROUP,
        "STAGES": cut.stages,
        "FETCHERS": cut.fetchers,
        "REGISTERS": REGISTERS[cut.fetchers],
    }


def launch_rows(
    grid: tuple[int],
    cut: Blocks,
    shape: Shape,
    offsets: Tensor,
    rows: Tensor | TensorDescriptor,
    index: Tensor | None,
    matrices: TensorDescriptor,
    out: tuple[Tensor | None, Tensor | None, Tensor | None],
    first: int = 0,
    gate: tuple[Any, ...] = (None, None, 0.0, None, 0.0, 0.0),
    **constants: Any,
) -> None:
    """Launch the product of rows, or of the tokens that ``index`` names, by ``matrices``.

    ``out``: of products, or of gate and of up where these are apart, and of what comes through the gate. ``gate``: routing
    weights, bias, and its numbers.
    """
    weights, bias, *numbers = gate
    box = [cut.rows // GROUPS.value, cut.leaving]
    leaving = [None if x is None else ragged(x, box, described) for x in out]
    tokens = rows if isinstance(rows, Tensor) else None
    _launch.launch(
        _rows_kernel, grid,
        offsets, rows, index, matrices, weights, bias, *leaving,
        shape.num_rows, 0 if tokens is None else len(tokens), first, shape.num_experts, shape.depth,
        shape.width if constants["LAYOUT"] == "ungated" else shape.width // 2, _launch.blocks(shape.width, cut.columns),
        0 if tokens is None else tokens.stride(0) // 8, 0 if bias is None else bias.stride(0), *numbers,
        **constants, **shares(cut, shape.num_experts), config=cut,
    )  # fmt: skip
