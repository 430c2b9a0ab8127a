"""Gradients of weights for sm_90 in Gluon: :mod:`~moekit.kernels.triton.outer` with warps that have parts.

One of the two factors may be rows of tokens that the fetching warps copy from where they are, so that nobody has to bring
them together first. See :mod:`~moekit.kernels.triton.hopper` for the ring that operands wait in.
"""

from __future__ import annotations

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

from moekit.kernels.triton import _launch
from moekit.kernels.triton._policy import Blocks, Shape
from moekit.kernels.triton._ragged import ragged, rows_at
from moekit.kernels.triton._tiles import place_in, rows_of_experts
from moekit.kernels.triton.hopper import (
    GROUPS,
    await_free,
    await_full,
    described,
    experts,
    fetch,
    fetch_each,
    release,
    ring,
    shares,
    write,
)


@gluon.jit
def _fetch_both(
    offsets, left, right, index, a, b, full, free, num_rows, num_experts, num_tokens, width, copies_apart,
    blocks_m, blocks_n,
    INDEXED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_E: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warps that fetch, for each tile and step, BLOCK_K rows of both factors; zeros past those of the expert."""
    slot = experts(BLOCK_E, gl.num_warps())  # which leaves registers to the others
    begins, ends = rows_of_experts(offsets, 0, num_experts, num_rows, slot)
    COLUMNS: gl.constexpr = BLOCK_M if INDEXED == "left" else BLOCK_N
    each: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [gl.num_warps(), 1], [1, 0])
    step = gl.arange(0, BLOCK_K, gl.SliceLayout(1, each))
    turn = 0
    for tile in range(gl.program_id(0), num_experts * blocks_m * blocks_n, gl.num_programs(0)):
        _expert, begin, end, m, n = place_in(tile, begins, ends, slot, blocks_m, blocks_n, BLOCK_M, BLOCK_N, GROUP)
        if INDEXED != "none":
            across = gl.arange(0, COLUMNS, gl.SliceLayout(0, each))
            column = (m if INDEXED == "left" else n) + across
            inside = ((m if INDEXED == "left" else n) + across // 8 * 8 < width)[None, :]  # one copy is in or out as a whole
            token = gl.load(index + begin + step, mask=begin + step < end, other=-1)
        for row in range(begin, end, BLOCK_K):
            around, until, at = rows_at(row, end)
            stage = turn % STAGES
            await_free(free, turn, STAGES)
            ready = full.index(stage)
            if INDEXED == "none":
                mbarrier.expect(ready, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            else:
                mbarrier.expect(ready, (BLOCK_N if INDEXED == "left" else BLOCK_M) * BLOCK_K * 2)
                known = (token >= 0) & (token < num_tokens)
                tokens = left if INDEXED == "left" else right
                place = tokens + gl.where(known, token, 0).to(gl.int64)[:, None] * (copies_apart * 8) + column[None, :]
                buffer = (a if INDEXED == "left" else b).index(stage).reshape((BLOCK_K, COLUMNS))
                fetch_each(buffer, place, known[:, None] & inside)
                async_copy.mbarrier_arrive(ready, increment_count=False)
                later = row + BLOCK_K + step
                token = gl.load(index + later, mask=later < end, other=-1)  # those of the next step, ahead of it
            if INDEXED != "left":
                fetch(left, [around, until, at, m], ready, a.index(stage))
            if INDEXED != "right":
                fetch(right, [around, until, at, n], ready, b.index(stage))
            turn += 1


@gluon.jit
def _multiply_both(
    offsets, out, a, b, full, free, staging, num_rows, num_experts, height, blocks_m, blocks_n,
    WHICH: gl.constexpr, FENCED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    BLOCK_E: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One group of warps that multiply: its half of every tile's rows, which may all be past the matrix."""
    OWN: gl.constexpr = BLOCK_M // GROUPS
    slot = experts(BLOCK_E)
    begins, ends = rows_of_experts(offsets, 0, num_experts, num_rows, slot)
    turn = 0
    for tile in range(gl.program_id(0), num_experts * blocks_m * blocks_n, gl.num_programs(0)):
        expert, begin, end, m, n = place_in(tile, begins, ends, slot, blocks_m, blocks_n, BLOCK_M, BLOCK_N, GROUP)
        if m + OWN * WHICH < height:
            total = gl.zeros([OWN, BLOCK_N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
            for row in range(begin, end, BLOCK_K):
                await_full(full, turn, STAGES)
                if FENCED:  # for the tensor cores to see what threads have copied
                    fence_async_shared()
                x = a.index(turn % STAGES).reshape((BLOCK_K, BLOCK_M)).slice(OWN * WHICH, OWN, 1).permute((1, 0))
                w = b.index(turn % STAGES).reshape((BLOCK_K, BLOCK_N))
                total = warpgroup_mma_wait(1, deps=(warpgroup_mma(x, w, total, is_async=True),))
                release(free, turn, row > begin, STAGES)
                turn += 1
            total = warpgroup_mma_wait(0, deps=(total,))
            release(free, turn, begin < end, STAGES)
            nothing = expert * 0
            write(out, total.to(out.dtype), (nothing, expert, m + OWN * WHICH), n, staging, 0)
        else:
            for _row in range(begin, end, BLOCK_K):
                await_full(full, turn, STAGES)
                turn += 1
                release(free, turn, True, STAGES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "num_experts", "num_tokens"])
def _outer_kernel(
    offsets, left, right, index, out, num_rows, num_experts, num_tokens, height, width, copies_apart, blocks_m, blocks_n,
    INDEXED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_E: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, FETCHERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Each program takes every so many-th tile ``[BLOCK_M, BLOCK_N]`` of ``out [1, E, M, N]``.

    The factor that is INDEXED is a tensor of tokens with ``width`` columns, all else descriptors.
    """
    in_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, BLOCK_K, BLOCK_M], out.dtype)
    in_columns: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, BLOCK_K, BLOCK_N], out.dtype)
    a = gl.allocate_shared_memory(out.dtype, [STAGES, 1, 1, BLOCK_K, BLOCK_M], in_rows)
    b = gl.allocate_shared_memory(out.dtype, [STAGES, 1, 1, BLOCK_K, BLOCK_N], in_columns)
    own = gl.allocate_shared_memory(out.dtype, [2] + out.block_type.shape, out.layout)  # noqa: RUF005
    others = gl.allocate_shared_memory(out.dtype, [2] + out.block_type.shape, out.layout)  # noqa: RUF005
    FENCED: gl.constexpr = INDEXED != "none"
    full, free = ring(STAGES, 1 + 32 * FETCHERS if FENCED else 1)
    ONE: gl.constexpr = 0
    OTHER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply_both, (
                offsets, out, a, b, full, free, own, num_rows, num_experts, height, blocks_m, blocks_n,
                ONE, FENCED, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, GROUP, STAGES,
            )),
            (_multiply_both, (
                offsets, out, a, b, full, free, others, num_rows, num_experts, height, blocks_m, blocks_n,
                OTHER, FENCED, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, GROUP, STAGES,
            )),
            (_fetch_both, (
                offsets, left, right, index, a, b, full, free, num_rows, num_experts, num_tokens, width, copies_apart,
                blocks_m, blocks_n, INDEXED, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, GROUP, STAGES,
            )),
        ],
        [4, FETCHERS],
        REGISTERS,
    )  # fmt: skip


def launch_outer(
    cut: Blocks,
    shape: Shape,
    offsets: Tensor,
    left: Tensor,
    right: Tensor,
    index: Tensor | None,
    side: str,
    out: Tensor,
    programs: int,
) -> None:
    """Launch the product of two factors, of which ``side``, "left" or "right", are the tokens that ``index`` names."""
    tokens = {"left": left, "right": right, "none": None}[side]
    blocks_m, blocks_n = _launch.blocks(shape.depth, cut.rows), _launch.blocks(shape.width, cut.columns)
    box = [1, 1, cut.rows // GROUPS.value, cut.leaving]
    _launch.launch(
        _outer_kernel, (min(shape.num_experts * blocks_m * blocks_n, programs),),
        offsets, left if side == "left" else ragged(left, [cut.depth, cut.rows], described),
        right if side == "right" else ragged(right, [cut.depth, cut.columns], described), index,
        described(out, (1, *out.shape), (out.numel(), *out.stride()), box), shape.num_rows, shape.num_experts,
        0 if tokens is None else len(tokens), shape.depth, 0 if tokens is None else tokens.shape[1],
        0 if tokens is None else tokens.stride(0) // 8, blocks_m, blocks_n,
        INDEXED=side, **shares(cut, shape.num_experts), config=cut,
    )  # fmt: skip
