"""How grouped products are cut into tiles: pure functions of shapes, dtypes and architecture, from measurements.

None says that another way is faster, and which one the caller knows: :mod:`moekit.ops.gemm`'s for a product of matrices,
unpacking in slices for a packed one. Rows are told by their average an expert, which is all that the host knows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class Blocks(NamedTuple):
    """How a product is cut: rows, columns and depth of a tile, warps, stages of its pipeline, programs a multiprocessor.

    ``flat`` makes one loop of those over tiles and over depth, so that a tile's first loads overlap the last products of
    the one before it. ``leaving`` columns of a tile are written at a time by the copy engine; 0: threads write.
    ``fetchers`` are warps that do nothing but fetch, beside two groups of ``warps`` that multiply; 0: all do all.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int
    flat: bool = False
    registers: int | None = None
    leaving: int = 0
    fetchers: int = 0


class Shape(NamedTuple):
    """A grouped product: ``num_rows`` rows of ``depth`` by matrices ``[num_experts, depth, width]``."""

    num_rows: int
    num_experts: int
    depth: int
    width: int

    @property
    def rows_an_expert(self) -> float:
        """On average."""
        return self.num_rows / max(self.num_experts, 1)

    def of_any_rows(self, rows_an_expert: int = 1024) -> Shape:
        """The same with that many rows an expert: cut by it, a product is cut alike whatever rows there are."""
        return self._replace(num_rows=rows_an_expert * self.num_experts)


_DESCRIBED = ("9", "10")  # what has the copy engine, and shared memory for these tiles
_MOST_PER_MOVE = 2500  # multiplications of a row for each number that it has before or behind a product
_SHORT = 768  # numbers to a sum, so few that a tile is written for as long as it is computed
_MANY = 2048  # rows an expert up to which sums over them were measured
_TWO = Blocks(128, 128, 64, 4, 3, 2, flat=True, leaving=64)  # programs a multiprocessor: one computes while one writes
# Whose warps can have parts: see moekit.kernels.triton.hopper. Gluon may change with every release of Triton, and one that
# these kernels were not compiled with takes the others.
_RELEASES = ("3.6", "3.7", "3.8", "3.9")
_SPECIALISED = "9" if ".".join(triton.__version__.split(".")[:2]) in _RELEASES else ""
_EXPERTS_APART = 128  # of more, what their warps keep does not fit into the registers
APART = Blocks(128, 256, 64, 4, 4, 1, leaving=64, fetchers=1)
APART_GATHERED = APART._replace(fetchers=4)
_SHALLOW_SUM = 2048  # numbers to a sum up to which one group of warps has much to write while the other multiplies
_NARROW = 768  # columns of the other factor, beyond which rows are brought together sooner than fetched so often
_WIDE_ROWS = 2048  # columns, of which a product of half is as fast as of all
_HALVES = (torch.bfloat16, torch.float16)
# Rows an expert up to which packed weights are cut so. With more, unpacking once into memory is faster than for each block
# of rows.
_STEPS = (12, 48, 112)
_MOST_OF_FORM = {"fp8": 224}  # which an instruction turns into numbers
FEW = _STEPS[1]
# Lean in registers; ptxas is told the most of them, as left alone it spills some to use fewer yet.
_LEAN = (
    Blocks(32, 64, 64, 4, 4, 6, registers=255),
    Blocks(64, 128, 64, 4, 3, 3, registers=255),
    Blocks(128, 128, 64, 8, 3, 2, registers=255),
)
# Programs are as many as fit by their registers, or some would begin when others have ended.
_FEW_ROWS, _SHALLOW = Blocks(16, 128, 128, 4, 3, 2), Blocks(64, 128, 64, 4, 3, 2)
_DEEP, _WIDE = Blocks(64, 128, 128, 4, 3, 2), Blocks(128, 256, 64, 8, 3, 1)
_LOOKED_UP = (_FEW_ROWS, Blocks(64, 64, 64, 4, 4, 3), Blocks(128, 128, 128, 8, 3, 1))
# By architecture, format and direction. What spills a register is not among them, faster or not.
_MEASURED = {
    ("9", "nf4", False): _LOOKED_UP,
    ("9", "nf4", True): _LOOKED_UP,
    ("9", "mxfp4", False): (_FEW_ROWS, _SHALLOW._replace(programs=3), _WIDE),
    ("9", "mxfp4", True): (_DEEP, _DEEP, _WIDE),
    ("9", "fp8", False): (_FEW_ROWS._replace(programs=3), _SHALLOW, _WIDE),
    ("9", "fp8", True): (_SHALLOW, _SHALLOW, _WIDE),
    ("9", "int8", False): (_FEW_ROWS, _DEEP, _WIDE),
    ("9", "int8", True): (_DEEP, _DEEP, _WIDE),
}


def _has_parts(shape: Shape, arch: str) -> bool:
    """Whether a product's warps may fetch or multiply, and not both."""
    return arch == _SPECIALISED and shape.num_experts <= _EXPERTS_APART


def described(shape: Shape, dtype: torch.dtype, arch: str, *, updated: bool = False, leaves: bool = True) -> Blocks | None:
    """Of operands that the copy engine fetches; ``updated`` with a low-rank update, for which one loop is slower.

    ``leaves`` says whether the copy engine can write the result as well.
    """
    if arch not in _DESCRIBED or dtype not in _HALVES:
        return None
    if shape.width <= 64:
        cut = Blocks(128, max(_power_of_two(shape.width), 16), 128, 4, 3, 2, flat=True)
    elif shape.rows_an_expert <= 128:
        cut = Blocks(64, 128, 128, 4, 4, 1, flat=True)
    elif shape.width <= 128:
        cut = Blocks(128, 128, 64, 4, 3, 2)
    elif leaves and _has_parts(shape, arch) and shape.depth <= _SHALLOW_SUM and not updated:
        cut = APART
    elif shape.depth <= _SHORT and not updated:
        cut = _TWO
    else:
        # Beside an update's fourth stage there is no room for a tile on its way out.
        cut = Blocks(128, 256, 64, 8, 4, 1) if updated else Blocks(128, 256, 64, 8, 3, 1, flat=True, leaving=256)
    return cut._replace(flat=cut.flat and not updated)


def _spills_there(shape: Shape, gate: str) -> bool:
    """Whether the registers of sm_100 do not hold a product of fetched rows without spilling some."""
    return gate == "full" or (gate != "" and shape.rows_an_expert <= 128) or shape.depth % 64 != 0


def gathered(shape: Shape, dtype: torch.dtype, arch: str, *, gate: str = "", leaves: bool = True) -> Blocks | None:
    """Of rows that threads fetch one by one, by matrices that the copy engine does; ``gate`` is what comes behind it.

    ``leaves`` says whether the copy engine can write the result.

    An error function does not fit into the registers, nor what is not "plain" (a bias, a clamp) if there is one loop.
    Products are 4% slower by it: more than the copy of the rows takes, if there is much to multiply for each number of them.
    """
    if arch not in _DESCRIBED or dtype not in _HALVES or shape.width <= 64 or gate == "gelu":
        return None
    if shape.depth * shape.width > _MOST_PER_MOVE * (shape.depth + shape.width):
        return None
    if arch == "10" and _spills_there(shape, gate):
        return None
    if shape.rows_an_expert <= 128:
        return Blocks(64, 128, 128, 4, 4, 1, flat=True)
    if leaves and _has_parts(shape, arch):
        return APART_GATHERED
    return Blocks(128, 256, 64, 8, 3, 1, flat=gate in ("", "plain"))


def outer(shape: Shape, dtype: torch.dtype, arch: str, *, gathered: str = "none") -> Blocks | None:
    """Of two factors that the copy engine fetches, to matrices ``[depth, width]`` of a tile or more; of so many rows.

    Of ``gathered``, "left" or "right", threads fetch the rows one by one, again for each block of the other's columns.
    """
    if arch not in _DESCRIBED or dtype not in _HALVES or min(shape.depth, shape.width) < 128:
        return None
    if shape.rows_an_expert > _MANY and not waits(dtype, arch):
        return None
    if gathered != "none":
        fetches = _has_parts(shape, arch) and gathered == "left" and shape.width <= _NARROW
        return APART_GATHERED if fetches else None
    return APART if _has_parts(shape, arch) else Blocks(128, 256, 64, 8, 3, 1, flat=True)


def column_halves(columns: int) -> list[slice]:
    """What is brought together of rows for a product at a time: of many columns half, to a whole number of tiles."""
    first = -(-columns // 512) * 256
    return [slice(0, first), slice(first, columns)] if columns >= _WIDE_ROWS else [slice(0, columns)]


def waits(dtype: torch.dtype, arch: str) -> bool:
    """Whether PyTorch's grouped product is a loop over experts, before which the host waits for the offsets."""
    # The loop stays before sm_80, for which Triton compiles moekit's products to code that spills thousands of bytes.
    return arch.isdecimal() and int(arch) >= 8 and not (arch in _DESCRIBED and dtype is torch.bfloat16)


def plain(dtype: torch.dtype) -> Blocks:
    """Of operands that threads fetch, on any architecture."""
    return Blocks(128, 128, 64, 8, 3, 2) if dtype in _HALVES else Blocks(64, 64, 16, 4, 3, 2)


def fetched(shape: Shape, dtype: torch.dtype, arch: str, *, along: bool, updated: bool, even: bool) -> Blocks:
    """The same for so many rows an expert, and matrices adjacent ``along`` the sum or across it.

    There are no registers for larger tiles of float32 beside an ``updated`` product's factors, and of anything beside the
    addresses of rows that are not ``even``: no multiples of 16 apart, and so fetched number by number.
    """
    if not even:
        return _uneven(dtype)
    if dtype in _HALVES:
        cuts = (*_LEAN[:2], plain(dtype))
    elif updated:
        return plain(dtype)._replace(stages=2 if arch == "10" else 3)  # with a third, registers of sm_100 spill
    else:
        wide = Blocks(64, 128, 32, 4, 3, 2) if along and arch in _DESCRIBED else Blocks(64, 64, 32, 4, 3, 3)
        cuts = (Blocks(16, 64, 32, 4, 3, 4), Blocks(32, 64, 32, 4, 3, 4), wide)
    return next((cut for step, cut in zip(_STEPS, cuts, strict=True) if shape.rows_an_expert <= step), cuts[-1])


def _uneven(dtype: torch.dtype) -> Blocks:
    return Blocks(64, 64, 32, 4, 2, 3) if dtype in _HALVES else Blocks(64, 64, 16, 8, 3, 2)


def fetched_outer(dtype: torch.dtype, *, even: bool) -> Blocks:
    """Of both factors of a weight's gradient."""
    if not even:
        return _uneven(dtype)
    return plain(dtype) if dtype in _HALVES else Blocks(64, 128, 16, 4, 3, 2)


def packed(shape: Shape, form: str, dtype: torch.dtype, arch: str, *, back: bool) -> Blocks | None:
    """Of packed weights that are unpacked on their way into the product, along ``in`` or (``back``) along ``out``."""
    rows = shape.rows_an_expert
    if rows > _MOST_OF_FORM.get(form, _STEPS[-1]):
        return None
    if dtype not in _HALVES:
        return plain(dtype)
    cuts = _MEASURED.get((arch, form, back), _LEAN)
    return next((cut for step, cut in zip(_STEPS, cuts, strict=True) if rows <= step), cuts[-1])


def low_rank(dtype: torch.dtype) -> Blocks:
    """Of an update alone, which takes as long as the rows that it changes take to be read and written."""
    return Blocks(64, 256, 16, 8, 1, 2) if dtype in _HALVES else Blocks(32, 32, 16, 4, 1, 8)


def ranks_at_a_time(dtype: torch.dtype) -> int:
    """Of an update: more of float32, which has no tensor cores, would not fit into the registers."""
    return 64 if dtype in _HALVES else 16


def slots_apart(num_tokens: int, topk: int, num_experts: int) -> bool:
    """Whether few of so few slots have one expert, whose weights would be read for each: on average 12% of them."""
    return num_tokens == 1 or num_tokens * topk * 4 <= num_experts


def slot_gate(dtype: torch.dtype, *, along: bool) -> Blocks:
    """Of a slot's gate and up, whose numbers are adjacent ``along`` the sum or across it.

    Along it one warp a program, twelve a multiprocessor by their registers: a layer of Qwen3 has none that waits.
    """
    size = dtype.itemsize
    if along:
        return Blocks(1, 8, 256 // size, 1, 1, 12, registers=168)
    return Blocks(1, 128 // size, 128, 4, 1, 3, registers=168)


def slot_down(topk: int, depth: int, dtype: torch.dtype, *, along: bool) -> Blocks:
    """Of a token's outputs, ``rows`` experts at a time; longer sums make up for tiles that take longer to be fetched."""
    experts, size = min(_power_of_two(topk), 4), dtype.itemsize
    if not along:
        return Blocks(experts, 32 // size, 128, 8, 1, 2, registers=128)
    if depth < 2048:
        return Blocks(experts, 4 // experts, 512 // size, 1, 1, 12, registers=168)
    return Blocks(min(experts, 2), 2, 2048 // size, 2, 1, 6, registers=168)


def slot_packed(num_tokens: int, along: int, threads: int, arch: str, *, adds: bool) -> Blocks:
    """Of packed weights, of whose features ``along`` of a warp's threads read 16 bytes each.

    A program that ``adds`` over a token's experts takes ``rows`` of them at once, of few features where there is one token
    and so few programs. The others take one expert.
    """
    if not adds:
        experts, each, registers = 1, 4, 128
    elif arch != "9":
        experts, each, registers = 2, 2, 128
    else:
        experts, each, registers = (4, 2, 184) if num_tokens == 1 else (2, 4, 168)
    return Blocks(experts, each * (threads // along), along, 1, 1, 12, registers=registers)


def _power_of_two(extent: int) -> int:
    return 1 << max(extent - 1, 0).bit_length()
