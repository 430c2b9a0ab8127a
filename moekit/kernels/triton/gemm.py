"""Grouped products: each expert's rows by its matrix, dense or packed, with a low-rank update in the same sum.

A launch has as many programs as the GPU holds, which take tiles in turn until none is left; how many there are they find
out from the offsets, so that nothing waits for the host. Two kernels: in one the copy engine of sm_90 and later fetches the
operands; in the other threads do, on any architecture, and can unpack weights on their way into the product: each to
float32, times its scale, rounded to the rows' dtype, as by unpacking first.

Descriptors are made on the host and passed by value. Those that a kernel makes for itself need a global allocator of
Triton's, which is one for the process (one thread in newer releases), and memory that a captured graph would have to keep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moekit.kernels.triton import _launch, _packed, _policy, decode
from moekit.kernels.triton._packed import load_tile, scale_tile, weight_tile
from moekit.kernels.triton._policy import Blocks, Shape
from moekit.kernels.triton._ragged import (
    describable,
    describes,
    describes_ragged,
    halves_of,
    leaves_ragged,
    ragged,
    store_ragged,
)
from moekit.kernels.triton._tiles import low_rank, place_of, row_blocks, store
from moekit.kernels.triton.unpack import unpacking

_GROUP = 8  # blocks of rows that share what is in the L2 cache of a matrix
PLAIN = {"ACT": "none", "LAYOUT": "ungated", "CLAMP": "none", "FAST": False}  # no gate behind a product
_MOST_RANKS = 256  # of an update; a product of its own has more


@triton.jit(do_not_specialize=["num_rows", "first", "num_experts"])
def _described_kernel(
    offsets, rows, matrices, low, factors, out, bounded,
    num_rows, first, num_experts, depth, width, column_blocks, stride_out,
    rank, stride_low, stride_fe, stride_fr, stride_fn,
    BACK: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many-th tile ``[BLOCK_M, BLOCK_N]`` of the rows of the experts from ``first`` on.

    ``rows`` and ``matrices`` are descriptors, by which the copy engine fetches blocks and fills zeros past their edges, and
    so is ``bounded`` of ``out``, by which it writes them up to the last row of an expert; None where there can be none.
    """
    slot = tl.arange(0, BLOCK_E)
    begins, ends, through = row_blocks(offsets, first, num_experts, num_rows, slot, BLOCK_M)
    tiles = tl.max(through, 0) * column_blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        expert, top, end, block = place_of(tile, begins, ends, through, slot, column_blocks, BLOCK_M, GROUP)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            x = rows.load([top, start])
            if BACK:
                w = tl.reshape(matrices.load([expert, start, block * BLOCK_N]), (BLOCK_K, BLOCK_N))
            else:
                w = tl.trans(tl.reshape(matrices.load([expert, block * BLOCK_N, start]), (BLOCK_N, BLOCK_K)))
            total = tl.dot(x, w, total)
        row, column = top + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
        if RANK > 0:
            total = low_rank(
                total, low, factors, expert, tl.minimum(row, end - 1), column, width, rank, stride_low,
                stride_fe, stride_fr, stride_fn, RANK, PARTS,
            )  # fmt: skip
        if bounded is None:
            store(out, total, top, column, end, width, stride_out)
        elif HALVES:
            left, right = halves_of(total)
            store_ragged(bounded, top, end, block * BLOCK_N, left)
            store_ragged(bounded, top, end, block * BLOCK_N + BLOCK_N // 2, right)
        else:
            store_ragged(bounded, top, end, block * BLOCK_N, total)


@triton.jit(do_not_specialize=["num_rows", "first", "num_experts"])
def _fetched_kernel(
    rows, codes, scales, table, dynamic, nested, shift, low, factors, offsets, out,
    num_rows, first, num_experts, depth, width, column_blocks, stride_rows, stride_out,
    stride_e, stride_a, stride_s, scale_columns, rank, stride_low, stride_fe, stride_fr, stride_fn,
    FORMAT: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, UNIT: tl.constexpr,
    BACK: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many-th tile ``[BLOCK_M, BLOCK_N]`` of the rows of the experts from ``first`` on.

    ``codes`` holds these experts' matrices as ``[N, K]``, or with BACK as ``[K, N]``. Rows of a tile that are not its
    expert's are read as some other row, and so are columns of an ``[N, K]`` past the last: they are not written.
    """
    DTYPE: tl.constexpr = rows.dtype.element_ty
    BLOCK_B: tl.constexpr = BLOCK_N if BACK else BLOCK_K
    height, across = (depth, width) if BACK else (width, depth)
    slot = tl.arange(0, BLOCK_E)
    begins, ends, through = row_blocks(offsets, first, num_experts, num_rows, slot, BLOCK_M)
    tiles = tl.max(through, 0) * column_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, top, end, block = place_of(tile, begins, ends, through, slot, column_blocks, BLOCK_M, GROUP)
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
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if RANK > 0:  # before the loop, where registers are free
            total = low_rank(
                total, low, factors, expert, row, column, width, rank, stride_low,
                stride_fe, stride_fr, stride_fn, RANK, PARTS,
            )  # fmt: skip
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
            # Weights second, which is never the operand from registers: those Triton's pipeline on sm_90 writes again while
            # matrix instructions may still read them.
            total = tl.dot(x, w if BACK else tl.trans(w), total, input_precision=PRECISION)
        store(out, total, top, column, end, width, stride_out)


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _add_kernel(
    low, factors, offsets, out, num_rows, num_experts, width, column_blocks, stride_out, rank, stride_low,
    stride_fe, stride_fr, stride_fn,
    RANK: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Each program adds to every so many-th tile ``[BLOCK_M, BLOCK_N]`` of ``out``."""
    slot = tl.arange(0, BLOCK_E)
    begins, ends, through = row_blocks(offsets, 0, num_experts, num_rows, slot, BLOCK_M)
    tiles = tl.max(through, 0) * column_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, top, end, block = place_of(tile, begins, ends, through, slot, column_blocks, BLOCK_M, GROUP)
        row, column = top + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
        place = out + row.to(tl.int64)[:, None] * stride_out + column[None, :]
        before = tl.load(place, mask=(row < end)[:, None] & (column < width)[None, :], other=0.0).to(tl.float32)
        total = low_rank(
            before, low, factors, expert, tl.minimum(row, end - 1), column, width, rank, stride_low,
            stride_fe, stride_fr, stride_fn, RANK, PARTS,
        )  # fmt: skip
        store(out, total, top, column, end, width, stride_out)


# --- launchers ------------------------------------------------------------------------------------------------------


class _Update(NamedTuple):
    """``low [R, r]`` times ``factors [E, r, N]``, to be added to a product; or nothing."""

    low: Tensor | None = None
    factors: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The rank, and the strides of rows of ``low`` and of experts, ranks and columns of ``factors``."""
        if self.low is None or self.factors is None:
            return 0, 0, 0, 0, 0
        return self.low.shape[1], self.low.stride(0), *self.factors.stride()

    @property
    def parts(self) -> dict[str, int]:
        """How many ranks are added at a time, and how often; 0 for nothing."""
        if self.low is None:
            return {"RANK": 0, "PARTS": 0}
        rank, most = self.low.shape[1], _policy.ranks_at_a_time(self.low.dtype)
        size = min(max(_launch.power_of_two(rank), 16), most)
        return {"RANK": size, "PARTS": _launch.blocks(rank, size)}


def _update(low: Tensor | None, factors: Tensor | None) -> _Update:
    if low is None or low.shape[1] == 0:
        return _Update()
    return _Update(_launch.rows_of(low), factors)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of one that is not there, as many as an H100 has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def grid(cut: Blocks, shape: Shape, device: torch.device) -> tuple[int]:
    """Programs: no more than there can be tiles, as every expert with rows may have a block that is not full."""
    experts = min(shape.num_experts, shape.num_rows)
    blocks = experts + (shape.num_rows - experts) // cut.rows
    return (min(blocks * _launch.blocks(shape.width, cut.columns), cut.programs * processors(device)),)


def sizes(cut: Blocks, num_experts: int) -> dict[str, int]:
    """The constants that say how a product is cut."""
    return {
        "BLOCK_M": cut.rows,
        "BLOCK_N": cut.columns,
        "BLOCK_E": _launch.power_of_two(num_experts),
        "GROUP": _GROUP,
        "num_stages": cut.stages,
    }


def _fits(rows: Tensor, offsets: Tensor, low: Tensor | None, *others: Tensor | None) -> bool:
    """What the kernels take: floats of one dtype, a list of offsets, and in ``low`` ranks that can be called few."""
    same = all(t is None or t.dtype is rows.dtype for t in (low, *others))
    few = low is None or low.shape[1] <= _MOST_RANKS
    return _launch.computes(rows) and same and few and offsets.dtype in (torch.int32, torch.int64) and offsets.dim() == 1


def _room(rows: Tensor, width: int, out: Tensor | None) -> Tensor | None:
    """``out``, or one of its own; None for one that cannot be written into."""
    if out is None:
        return rows.new_empty(rows.shape[0], width)
    return out if out.stride(1) == 1 or width == 1 else None


def _fetched(
    rows: Tensor,
    weights: tuple[tuple[Tensor | None, ...], tuple[int, ...], dict[str, Any], bool],
    offsets: Tensor,
    first: int,
    shape: Shape,
    out: Tensor,
    cut: Blocks,
    update: _Update,
) -> Tensor:
    """Launch the kernel whose threads fetch; ``weights``: tensors, sizes, constants, and whether they are ``[K, N]``."""
    rows = _launch.rows_of(rows)
    tensors, strides, constants, back = weights
    precision = _launch.precision(rows, along=constants["FORMAT"] == "dense" and not back)
    _launch.launch(
        _fetched_kernel, grid(cut, shape, out.device),
        rows, *tensors, *update, offsets.contiguous(), out,
        shape.num_rows, first, shape.num_experts, shape.depth, shape.width, _launch.blocks(shape.width, cut.columns),
        rows.stride(0), out.stride(0), *strides, *update.sizes,
        **constants, BACK=back, **update.parts, BLOCK_K=cut.depth, PRECISION=precision,
        EVEN_K=shape.depth % cut.depth == 0, EVEN_N=shape.width % cut.columns == 0,
        **sizes(cut, shape.num_experts), enable_fp_fusion=rows.dtype is torch.float32, config=cut,
    )  # fmt: skip
    return out


def _described(
    rows: Tensor, matrices: Tensor, offsets: Tensor, first: int, out: Tensor, cut: Blocks, update: _Update
) -> Tensor:
    """Launch the kernel for which the copy engine fetches."""
    _multiplying(rows, matrices, offsets, out, cut, update)(first, len(matrices), update.factors)
    return out


def _descriptors(rows: Tensor, matrices: Tensor, cut: Blocks) -> tuple[Any, Any, bool]:
    """What tells the copy engine where rows and matrices are, and whether the matrices are stored as they are seen."""
    described, back = of_matrices(matrices, cut)
    return descriptor(cut)(rows, rows.shape, rows.stride(), [cut.rows, cut.depth]), described, back


def of_matrices(matrices: Tensor, cut: Blocks) -> tuple[Any, bool]:
    """A descriptor of ``[E, K, N]``, and whether they are stored so and not as ``[E, N, K]``."""
    back, sizes, strides, box = describes(matrices), [*matrices.shape], [*matrices.stride()], [1, cut.depth, cut.columns]
    if not back:
        for turned in (sizes, strides, box):
            turned[1], turned[2] = turned[2], turned[1]
    return descriptor(cut)(matrices, sizes, strides, box), back


def descriptor(cut: Blocks) -> Callable[..., Any]:
    """What makes a descriptor of a tensor, sizes, strides and a block for the kernel that is to be cut so."""
    if cut.fetchers:
        from moekit.kernels.triton import hopper  # Gluon, for one architecture alone

        return hopper.described
    return TensorDescriptor


def _multiply_specialised(
    rows: Any, matrices: Any, back: bool, offsets: Tensor, out: Tensor, cut: Blocks, shape: Shape,
    first: int, count: int, factors: Tensor | None,
) -> None:  # fmt: skip
    """A product whose warps have parts; there is none with an update, and so are no factors."""
    from moekit.kernels.triton import hopper

    shape = shape._replace(num_experts=count)
    hopper.launch_rows(
        grid(cut, shape, out.device), cut, shape, offsets, rows, None, matrices, (out, None, None), first,
        BACK=back, PAIRED=False, **PLAIN,
    )  # fmt: skip


def _multiplying(
    rows: Tensor, matrices: Tensor, offsets: Tensor, out: Tensor, cut: Blocks, update: _Update
) -> Callable[[int, int, Tensor | None], None]:
    """What multiplies the rows of so many experts from ``first`` on by ``matrices``, with these experts' factors.

    To be had once for many slices, of which each takes the place of the last.
    """
    shape, device, offsets = _shape(rows, matrices), out.device, offsets.contiguous()
    described_rows, described, back = _descriptors(rows, matrices, cut)
    if cut.fetchers:
        return functools.partial(_multiply_specialised, described_rows, described, back, offsets, out, cut, shape)
    bounded = ragged(out, [cut.rows, cut.leaving]) if cut.leaving and describes_ragged(out) else None
    numbers = (shape.depth, shape.width, _launch.blocks(shape.width, cut.columns), out.stride(0), *update.sizes)
    constants = {"BACK": back, **update.parts, "BLOCK_K": cut.depth, "FLAT": cut.flat, **sizes(cut, shape.num_experts)}
    constants["HALVES"] = cut.leaving * 2 == cut.columns

    def multiply(first: int, count: int, factors: Tensor | None) -> None:
        _launch.launch(
            _described_kernel, grid(cut, shape._replace(num_experts=count), device),
            offsets, described_rows, described, update.low, factors, out, bounded, shape.num_rows, first, count, *numbers,
            **constants, config=cut,
        )  # fmt: skip

    return multiply


def _cut(rows: Tensor, shape: Shape, out: Tensor | None, low: Tensor | None) -> Blocks | None:
    """How a product that the copy engine fetches for is cut; ``out`` is one of its own if None."""
    leaves = leaves_ragged(len(rows), rows.dtype, shape.width) if out is None else describes_ragged(out)
    return _policy.described(shape, rows.dtype, _launch.arch(rows.device).name, updated=low is not None, leaves=leaves)


def _shape(rows: Tensor, matrices: Tensor) -> Shape:
    return Shape(rows.shape[0], *matrices.shape)


def even(*tensors: Tensor) -> bool:
    """Whether rows are so far apart that threads can fetch several numbers of each at once, wherever the first one is."""
    return all(stride == 1 or stride % 16 == 0 for x in tensors for stride in x.stride())


def grouped_rows(
    rows: Tensor,
    matrices: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    low: Tensor | None = None,
    factors: Tensor | None = None,
    invariant: bool = False,
) -> Any:
    """See :func:`moekit.ops.gemm.grouped_rows`; where the copy engine can fetch, or PyTorch's product waits for the offsets.

    With ``invariant`` the number of rows decides on nothing, and PyTorch's product, by which it does, is not resorted to.
    """
    shape = _shape(rows, matrices)
    cut_for = shape.of_any_rows() if invariant else shape
    cut = _cut(rows, cut_for, out, low)
    fetched = cut is None or not describable(rows, matrices)
    wanted = invariant or not fetched or _policy.waits(rows.dtype, _launch.arch(rows.device).name)
    if not wanted or not _fits(rows, offsets, low, factors, matrices, out):
        return NotImplemented
    out, update = _room(rows, matrices.shape[2], out), _update(low, factors)
    if out is None:
        return NotImplemented
    if fetched:
        return _fetched_dense(rows, matrices, offsets, 0, out, cut_for, update)
    return _described(rows, matrices, offsets, 0, out, cut, update)


def grouped_slice(
    rows: Tensor,
    matrices: Tensor,
    offsets: Tensor,
    first: int,
    out: Tensor,
    low: Tensor | None = None,
    factors: Tensor | None = None,
    invariant: bool = False,
) -> Any:
    """The rows of experts ``first`` to ``first + n`` by matrices ``[n, K, N]``, into their rows of ``out [R, N]`` alone."""
    if not _fits(rows, offsets, low, factors, matrices, out) or _room(rows, matrices.shape[2], out) is None:
        return NotImplemented
    shape, update = _shape(rows, matrices), _update(low, factors)
    cut_for = shape.of_any_rows() if invariant else shape
    cut = _cut(rows, cut_for, out, low)
    if cut is not None and describable(rows, matrices):
        return _described(rows, matrices, offsets, first, out, cut, update)
    return _fetched_dense(rows, matrices, offsets, first, out, cut_for, update)


def _fetched_dense(
    rows: Tensor, matrices: Tensor, offsets: Tensor, first: int, out: Tensor, cut_for: Shape, update: _Update
) -> Tensor:
    """Launch the kernel whose threads fetch, cut as for ``cut_for``: which side of a matrix is adjacent says its order."""
    if 1 not in matrices.stride()[1:]:
        matrices = matrices.contiguous()
    back = matrices.stride(2) == 1
    sizes = (matrices.stride(0), matrices.stride(1 if back else 2), 0, 0)
    constants = {"FORMAT": "dense", "SHARE_A": 1, "SHARE_B": 1, "UNIT": 1}
    how = {"along": not back, "updated": update.low is not None, "even": even(rows, matrices)}
    cut = _policy.fetched(cut_for, rows.dtype, _launch.arch(rows.device).name, **how)
    weights = ((matrices, *(None,) * 5), sizes, constants, back)
    return _fetched(rows, weights, offsets, first, _shape(rows, matrices), out, cut, update)


def packed_rows(
    rows: Tensor,
    stored: Any,
    offsets: Tensor,
    out: Tensor | None,
    back: bool,
    low: Tensor | None = None,
    factors: Tensor | None = None,
    invariant: bool = False,
) -> Any:
    """See :func:`moekit.ops.packed_products.packed_rows`; where unpacking into memory first is not faster.

    With ``invariant`` weights are unpacked in the product whatever the number of rows, and in tiles of one size, if at all.
    """
    if not back and low is None and not invariant:
        few = decode.packed_rows_few(rows, stored, offsets, out)
        if few is not NotImplemented:
            return few
    num_experts, height, width = stored.shape
    shape = Shape(rows.shape[0], num_experts, *((height, width) if back else (width, height)))
    cut_for = shape.of_any_rows(_policy.FEW) if invariant else shape
    cut = _policy.packed(cut_for, stored.format, rows.dtype, _launch.arch(rows.device).name, back=back)
    if cut is None or not _fits(rows, offsets, low, factors, out) or not _packed.reads(stored):
        return NotImplemented
    out = _room(rows, shape.width, out)
    if out is None:
        return NotImplemented
    constants = _packed.constants(stored, cut.columns if back else cut.depth)
    weights = (_packed.parts(stored), _packed.sizes(stored), constants, back)
    return _fetched(rows, weights, offsets, 0, shape, out, cut, _update(low, factors))


def packed_slices(
    rows: Tensor,
    stored: Any,
    offsets: Tensor,
    out: Tensor,
    back: bool,
    slices: list[tuple[int, int]],
    low: Tensor | None = None,
    factors: Tensor | None = None,
    invariant: bool = False,
) -> Any:
    """Slices of experts unpacked into one workspace, each multiplied before the next: one preparation for all of them."""
    (_, height, width), longest = stored.shape, max(stop - first for first, stop in slices)
    if not _fits(rows, offsets, low, factors, out) or _room(rows, out.shape[1], out) is None or not _packed.reads(stored):
        return NotImplemented
    workspace = rows.new_empty(longest, height, width)
    matrices = workspace if back else workspace.mT
    shape = _shape(rows, matrices).of_any_rows() if invariant else _shape(rows, matrices)
    cut = _cut(rows, shape, out, low)
    if cut is None or not describable(rows, matrices):
        return NotImplemented
    update = _update(low, factors)
    unpack, multiply = unpacking(stored, workspace), _multiplying(rows, matrices, offsets, out, cut, update)
    for first, stop in slices:
        unpack(first, stop, workspace)
        multiply(first, stop - first, None if update.factors is None else update.factors[first:stop])
    return out


def grouped_add(out: Tensor, low: Tensor, factors: Tensor, offsets: Tensor) -> Any:
    """``out[r] += low[r] @ factors[e]`` of each expert's rows, in place: ``low [R, r]``, ``factors [E, r, N]``."""
    if not _fits(out, offsets, low, factors) or _room(out, out.shape[1], out) is None:
        return NotImplemented
    cut, update, shape = _policy.low_rank(out.dtype), _update(low, factors), _shape(low, factors)
    if update.low is None:
        return out
    _launch.launch(
        _add_kernel, grid(cut, shape, out.device),
        *update, offsets.contiguous(), out, shape.num_rows, shape.num_experts, shape.width,
        _launch.blocks(shape.width, cut.columns), out.stride(0), *update.sizes,
        **update.parts, **sizes(cut, shape.num_experts), config=cut,
    )  # fmt: skip
    return out
