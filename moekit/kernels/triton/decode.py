"""Products of few rows an expert by packed weights, as in decoding.

What counts here is how many instructions a code takes, so codes of four bits become float16 eight at a time: bytes of a
table of 16 are chosen by permutations of bytes (where that is an instruction), on a word of codes at once. Two kernels:

- sums of products in registers, row by row, where most experts have one row. A block's products are summed before they meet
  its scale, so weights are not rounded to the rows' dtype, unlike where they are unpacked first;
- matrix instructions for more rows, of which an operand is unpacked in registers, two values in each.

Both sum in float32, in an order that depends on neither the other rows nor the offsets. The table of nf4 is rounded: for
sums to float16, which is 1/8 of what rounding weights to bfloat16 loses, for matrix instructions to the rows' dtype. That
is all that is rounded, as scales follow; the values of the other formats are exact.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit import _codes
from moekit.kernels.triton import _launch, _packed
from moekit.kernels.triton._activation import decode_e4m3
from moekit.kernels.triton._packed import _powers_of_two

# Rows an expert on average up to which sums are faster than matrix instructions, and these than those of larger tiles.
_SUMS, _DOTS = {"nf4": 0.75, "int8": 0.75, "mxfp4": 1.5, "fp8": 1.5}, 16
_ROWS = 16  # of a tile of matrix instructions
_BYTES = 16  # of codes that a thread reads at once


class Cut(NamedTuple):
    """How a product is cut: features of a tile, codes of each (in bytes), warps and stages of a pipeline.

    Of sums: features whose codes a thread reads at once, and its bytes of each.
    """

    columns: int
    bytes: int
    warps: int
    stages: int = 1
    registers: int | None = None


_CUTS = {"sums": Cut(4, _BYTES, 1), "dots": Cut(64, 64, 4, 3)}
_CUTS_OF_ARCH: dict[str, dict[str, Cut]] = {"9": {"sums": Cut(8, _BYTES, 1)}}


# --- codes to values ------------------------------------------------------------------------------------------------


def _lookup(planes: str, first: str, second: str, *, wide: bool) -> str:
    """PTX from eight codes in a word, $8, to eight values, $0 to $7, by a table of 16 bits an entry in $9 to $16.

    Of the table a plane, low bytes ("l") and high ones ("h"), has four registers; a plane that is left out is zero.
    ``first`` and ``second`` say which bytes make the first and the last two of four values. They are float32 if ``wide``,
    from a table of float16; else what the table holds.
    """
    lines = [
        ".reg .b32 x, s, a, b, l, h, p;",
        ".reg .b16 u, v;",
        # A permutation chooses from eight bytes by three bits of a code; a second one between two results, by the fourth.
        "and.b32 x, $8, 0x77777777;",
        "shr.u32 s, $8, 1;",
        "and.b32 s, s, 0x44444444;",
        "or.b32 s, s, 0x32103210;",
        "mov.b32 l, 0;",
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 x, x, 16;", "shr.u32 s, s, 16;"]
        for plane in planes:
            t = 9 if plane == "l" else 13
            lines += [
                f"prmt.b32 a, ${t}, ${t + 1}, x;",
                f"prmt.b32 b, ${t + 2}, ${t + 3}, x;",
                f"prmt.b32 {plane}, a, b, s;",
            ]
        for pair, choice in enumerate((first, second)):
            outputs = [f"${4 * half + 2 * pair + place}" for place in range(2)]
            lines.append(f"prmt.b32 p, l, h, {choice};")
            if wide:
                lines += ["mov.b32 {u, v}, p;", f"cvt.f32.f16 {outputs[0]}, u;", f"cvt.f32.f16 {outputs[1]}, v;"]
            else:
                lines.append(f"mov.b32 {{{outputs[0]}, {outputs[1]}}}, p;")
    return "{\n" + "\n".join(lines) + "\n}"


# The first value of a byte of nf4 is in the high half.
_NF4: tl.constexpr = tl.constexpr(_lookup("lh", "0x4051", "0x6273", wide=True))
_MXFP4: tl.constexpr = tl.constexpr(_lookup("h", "0x5140", "0x7362", wide=True))
_NF4_HALVES: tl.constexpr = tl.constexpr(_lookup("lh", "0x4051", "0x6273", wide=False))
_MXFP4_HALVES: tl.constexpr = tl.constexpr(_lookup("lh", "0x5140", "0x7362", wide=False))
_OPERANDS: tl.constexpr = tl.constexpr(",".join(["=f"] * 8 + ["r"] * 9))
_OPERANDS_HALVES: tl.constexpr = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 9))
_LANE: tl.constexpr = tl.constexpr("{ .reg .b32 l; mov.u32 l, %laneid; and.b32 $0, l, $1; }")


@functools.cache
def _values(form: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The 16 values of a format, rounded to ``dtype``: float32 ``[16]``."""
    return _codes.table(form, torch.device("cpu")).to(dtype).float().to(device)


@functools.cache
def _planes(form: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The low bytes of the 16 values in a ``dtype`` of two bytes, then the high ones: int32 ``[8]``."""
    halves = _values(form, torch.device("cpu"), dtype).to(dtype).view(torch.uint8).view(16, 2)
    return halves.T.contiguous().view(torch.int32).flatten().to(device)


@triton.jit
def registers(table, zero, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """The table of a format of four bits."""
    if FORMAT != "nf4" and FORMAT != "mxfp4":
        t = (zero,)
    elif ASM:
        # Registers of a thread: the compiler would keep what all threads have in others, and copy it for each use.
        z = tl.inline_asm_elementwise(_LANE, "=r,r", [zero], tl.int32, is_pure=True, pack=1)
        t = (
            tl.load(table) ^ z, tl.load(table + 1) ^ z, tl.load(table + 2) ^ z, tl.load(table + 3) ^ z,
            tl.load(table + 4) ^ z, tl.load(table + 5) ^ z, tl.load(table + 6) ^ z, tl.load(table + 7) ^ z,
        )  # fmt: skip
    else:
        t = (tl.load(table + tl.arange(0, 16)),)
    return t


@triton.jit
def _chosen(word, place: tl.constexpr, table):
    """The value of one of a word's eight codes, from the lowest."""
    code = (word >> (4 * place)) & 15
    return tl.reshape(tl.gather(table, tl.reshape(code, (code.shape[0] * code.shape[1],)), 0), code.shape)


@triton.jit
def _eight(word, t, FORMAT: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """The values of words of eight codes, in their order, unscaled, in DTYPE: ``[A, B] -> [A, 8 B]``."""
    FIRST: tl.constexpr = 1 if FORMAT == "nf4" else 0  # where of the first byte's two places the first value is
    if ASM and tl.float32 != DTYPE:
        v = tl.inline_asm_elementwise(
            _NF4_HALVES if FORMAT == "nf4" else _MXFP4_HALVES, _OPERANDS_HALVES,
            [word, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]], (tl.int16,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    elif ASM:
        v = tl.inline_asm_elementwise(
            _NF4 if FORMAT == "nf4" else _MXFP4, _OPERANDS, [word, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]],
            (tl.float32,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        v = (
            _chosen(word, 0 ^ FIRST, t[0]), _chosen(word, 1 ^ FIRST, t[0]), _chosen(word, 2 ^ FIRST, t[0]),
            _chosen(word, 3 ^ FIRST, t[0]), _chosen(word, 4 ^ FIRST, t[0]), _chosen(word, 5 ^ FIRST, t[0]),
            _chosen(word, 6 ^ FIRST, t[0]), _chosen(word, 7 ^ FIRST, t[0]),
        )  # fmt: skip
    even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
    odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
    value = tl.reshape(tl.join(even, odd), (word.shape[0], 8 * word.shape[1]))
    return value.to(DTYPE, bitcast=True) if value.dtype == tl.int16 else value.to(DTYPE)


@triton.jit
def _tile(base, first, stop, t, BLOCK: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """BLOCK elements from ``first`` of each feature's codes, as unscaled values in DTYPE."""
    FLOAT8: tl.constexpr = FORMAT == "fp8" and base.dtype.element_ty != tl.uint8
    place = first + tl.arange(0, BLOCK)
    code = tl.load(base + place[None, :], mask=(place < stop)[None, :], other=0.0 if FLOAT8 else 0)
    if FORMAT == "nf4" or FORMAT == "mxfp4":
        value = _eight(code, t, FORMAT, ASM, DTYPE)
    elif FORMAT == "fp8" and not FLOAT8:
        value = decode_e4m3(code).to(DTYPE)
    else:
        value = code.to(tl.float32).to(DTYPE)
    return value


@triton.jit
def _scales(
    scales, dynamic, nested, shift, above, first, groups, one,
    BLOCK_G: tl.constexpr, SIZE: tl.constexpr, FORMAT: tl.constexpr, SHARE_B: tl.constexpr,
):  # fmt: skip
    """The scales of BLOCK_G groups of SIZE codes in float32, 0 past the last."""
    group = first + tl.arange(0, BLOCK_G)
    # By ``one``, of which the compiler does not know what it is: it would have a thread read those that others need.
    place, mask = above + (group * SIZE // SHARE_B * one)[None, :], (group < groups)[None, :]
    scale = tl.load(scales + place, mask=mask, other=0.0)
    if FORMAT == "nf4" and scale.dtype == tl.uint8:
        outer = tl.load(nested + place // 256, mask=mask, other=0.0)
        scale = tl.load(dynamic + scale.to(tl.int32)) * outer + tl.load(shift)
    elif scale.dtype == tl.uint8:
        scale = _powers_of_two(scale)
    return scale.to(tl.float32)


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _expert_of(offsets, row, num_rows, num_experts, BLOCK_E: tl.constexpr):
    """A row's expert (``num_experts``: none has it), and where this one's rows begin and end, whatever the offsets are."""
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets + e, mask=e < num_experts, other=0)
    # In range before they are cut to 32 bits, which could make any numbers of them.
    ends = tl.minimum(tl.maximum(ends, 0), num_rows).to(tl.int32)
    before = ends <= row
    expert = tl.sum((before & (e < num_experts)).to(tl.int32), 0)
    return expert, tl.max(tl.where(before, ends, 0), 0), tl.min(tl.where(before, num_rows, ends), 0)


@triton.jit
def _sum_of_groups(product, GROUPS: tl.constexpr):
    """Sums of so many equal parts of each row: ``[A, B] -> [A, GROUPS]``."""
    WORDS: tl.constexpr = product.shape[1] // 8
    even, odd = tl.split(tl.reshape(product, (product.shape[0], WORDS, 2, 2, 2)))
    p0, p2 = tl.split(even)
    p1, p3 = tl.split(odd)
    p0, p4 = tl.split(p0)
    p1, p5 = tl.split(p1)
    p2, p6 = tl.split(p2)
    p3, p7 = tl.split(p3)
    # One after another, each a multiplication and an addition in one instruction; tl.sum would add in a tree.
    total = p0 + p1 + p2 + p3 + p4 + p5 + p6 + p7
    return tl.sum(tl.reshape(total, (product.shape[0], GROUPS, WORDS // GROUPS)), 2)


@triton.jit
def _origins(codes, expert, n, width, stride, stride_s, scale_columns, SHARE_A: tl.constexpr):
    """Where the codes of an expert's features begin, ``[N, 1]``, and their scales."""
    base = codes + (expert.to(tl.int64) * width + n)[:, None] * stride
    return base, expert.to(tl.int64) * stride_s + (n // SHARE_A)[:, None] * scale_columns


@triton.jit
def sums_of_codes(
    x, codes, scales, t, dynamic, nested, shift, expert, n, first, width, depth, groups, stride_s, scale_columns, one,
    FORMAT: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, ASM: tl.constexpr,
    BLOCK_G: tl.constexpr, SIZE: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """A row times an expert's features ``n [N]``, summed over SIZE codes each: BLOCK_G groups from ``first`` on, ``[N, G]``.

    There are ``groups`` to a feature, of LOADS elements each; ``t`` is what :func:`registers` gives. In float32.
    """
    base, above = _origins(codes, expert, n, width, groups * LOADS, stride_s, scale_columns, SHARE_A)
    tile = _tile(base, first * LOADS, groups * LOADS, t, BLOCK_G * LOADS, FORMAT, ASM, tl.float32)
    scale = _scales(scales, dynamic, nested, shift, above, first, groups, one, BLOCK_G, SIZE, FORMAT, SHARE_B)
    k = first * SIZE + tl.arange(0, BLOCK_G * SIZE)
    row = tl.load(x + k, mask=k < depth, other=0).to(tl.float32)
    if FORMAT == "int8":
        scale *= 0.007874015748031496  # 1 / 127
    return _sum_of_groups(tile * row[None, :], BLOCK_G) * scale


@triton.jit(do_not_specialize=["num_rows", "num_experts", "one"])
def _sums_kernel(
    rows, codes, scales, table, dynamic, nested, shift, offsets, out,
    num_rows, num_experts, depth, width, groups, column_blocks, stride_rows, stride_out, stride_s, scale_columns, one,
    FORMAT: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, ASM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, SIZE: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """A program for each row and block of features."""
    row = tl.program_id(0) // column_blocks
    column = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, _, _ = _expert_of(offsets, row, num_rows, num_experts, BLOCK_E)
    if expert < num_experts:
        x, n = rows + row.to(tl.int64) * stride_rows, tl.minimum(column, width - 1)
        t = registers(table, one - 1, FORMAT, ASM)
        total = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
        for first in range(0, groups, BLOCK_G):
            total += sums_of_codes(
                x, codes, scales, t, dynamic, nested, shift, expert, n, first, width, depth, groups, stride_s, scale_columns,
                one, FORMAT, SHARE_A, SHARE_B, ASM, BLOCK_G, SIZE, LOADS,
            )  # fmt: skip
        value = tl.sum(total, 1)
        place = out + row.to(tl.int64) * stride_out + column
        tl.store(place, value.to(out.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "one"])
def _dots_kernel(
    rows, codes, scales, table, dynamic, nested, shift, offsets, out,
    num_rows, num_experts, depth, width, groups, column_blocks, stride_rows, stride_out, stride_s, scale_columns, one,
    FORMAT: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, ASM: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, SIZE: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """A program for each row and block of features; of every ROWS rows of an expert the first one's does all.

    It takes BLOCK_G groups of SIZE codes to a product, PARTS products at a time. A product whose codes have one scale is
    multiplied by it; where they have SCALES, the codes are.
    """
    DTYPE: tl.constexpr = rows.dtype.element_ty
    # Scales of mxfp4 are powers of two, by which bfloat16 is exact, where there is arithmetic in it; float16 has not all.
    WIDE: tl.constexpr = DTYPE if ASM and tl.bfloat16 == DTYPE else tl.float32
    row = tl.program_id(0) // column_blocks
    column = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, begin, end = _expert_of(offsets, row, num_rows, num_experts, BLOCK_E)
    if (expert < num_experts) & ((row - begin) % ROWS == 0):
        n = tl.minimum(column, width - 1)
        base, above = _origins(codes, expert, n, width, groups * LOADS, stride_s, scale_columns, SHARE_A)
        t = registers(table, one - 1, FORMAT, ASM)
        r = row + tl.arange(0, ROWS)
        total = tl.zeros([BLOCK_N, ROWS], tl.float32)
        for first in range(0, groups, BLOCK_G * PARTS):
            for part in tl.static_range(PARTS):
                group = first + part * BLOCK_G
                k = group * SIZE + tl.arange(0, BLOCK_G * SIZE)
                address = rows + r.to(tl.int64)[:, None] * stride_rows + k[None, :]
                x = tl.load(address, mask=(r < end)[:, None] & (k < depth)[None, :], other=0)
                tile = _tile(base, group * LOADS, groups * LOADS, t, BLOCK_G * LOADS, FORMAT, ASM, DTYPE)
                scale = _scales(scales, dynamic, nested, shift, above, group, groups, one, SCALES, SIZE, FORMAT, SHARE_B)
                if SCALES == 1:
                    total += tl.dot(tile, tl.trans(x), input_precision="ieee") * scale
                else:
                    tile = tl.reshape(tile.to(WIDE), (BLOCK_N, SCALES, SIZE)) * scale.to(WIDE)[:, :, None]
                    tile = tl.reshape(tile, (BLOCK_N, SCALES * SIZE)).to(DTYPE)
                    total = tl.dot(tile, tl.trans(x), total, input_precision="ieee")
        if FORMAT == "int8":
            total *= 0.007874015748031496  # 1 / 127
        place = out + r.to(tl.int64)[:, None] * stride_out + column[None, :]
        tl.store(place, tl.trans(total).to(DTYPE), mask=(r < end)[:, None] & (column < width)[None, :])


# --- launcher -------------------------------------------------------------------------------------------------------


def packed_rows_few(rows: Tensor, stored: Any, offsets: Tensor, out: Tensor | None = None) -> Any:
    """``packed_rows`` for few rows an expert: each expert's rows by its packed ``[out, in]``, along ``in``."""
    num_experts, width, _ = stored.shape
    few = rows.shape[0] <= _DOTS * num_experts and rows.dtype in (torch.bfloat16, torch.float16)
    known = offsets.dtype in (torch.int32, torch.int64) and reads(stored)
    if not (few and known) or (out is not None and (out.stride(1) != 1 or out.dtype is not rows.dtype)):
        return NotImplemented
    kind = "sums" if rows.shape[0] <= _SUMS[stored.format] * num_experts else "dots"
    if kind == "dots" and stored.format == "fp8":  # 1.3 times as long as the kernel of more rows
        return NotImplemented
    out = rows.new_empty(rows.shape[0], width) if out is None else out
    cut = _CUTS_OF_ARCH.get(_launch.arch(rows.device).name, {}).get(kind, _CUTS[kind])
    if kind == "dots" and stored.format not in _packed.HALVES:
        cut = cut._replace(bytes=2 * cut.bytes)
    return product(rows, stored, offsets, out, kind, cut)


def _codes_at_once(form: str) -> int:
    """Those that a thread reads at once."""
    return _BYTES * (2 if form in _packed.HALVES else 1)


class Codes(NamedTuple):
    """A packed stack as these kernels take it."""

    tensors: tuple[Tensor | None, ...]  # codes, scales, table, and what undoes double quantisation
    groups: int  # of codes that a thread reads at once, to a feature
    strides: tuple[int, int]  # of an expert and of a row of scales
    constants: dict[str, Any]

    @staticmethod
    def of(stored: Any, device: torch.device, dtype: torch.dtype) -> Codes:
        """With a table of values in ``dtype``."""
        codes, scales, table, *nested = _packed.parts(stored)
        size, loads, asm = _codes_at_once(stored.format), _BYTES, False
        if stored.format in _packed.HALVES:
            loads, asm = _BYTES // 4, _launch.arch(device).name.isdecimal()
            codes, table = codes.view(torch.int32), (_planes if asm else _values)(stored.format, device, dtype)
        constants = _packed.constants(stored, size)
        del constants["UNIT"]
        constants |= {"ASM": asm, "SIZE": size, "LOADS": loads}
        return Codes((codes, scales, table, *nested), stored.shape[2] // size, _packed.sizes(stored)[2:], constants)


def reads(stored: Any) -> bool:
    """Whether these kernels read a packed stack: whole loads, from aligned addresses, of codes that have one scale each."""
    at_once = _codes_at_once(stored.format)
    whole = stored.shape[2] % at_once == 0 and stored.codes.storage_offset() % _BYTES == 0
    return whole and _packed.reads(stored) and _packed.constants(stored, at_once)["UNIT"] == at_once


def product(rows: Tensor, stored: Any, offsets: Tensor, out: Tensor, kind: str, cut: Cut) -> Tensor:
    """Launch one of the kernels: "sums" or "dots"."""
    num_experts, width, depth = stored.shape
    rows, warp_size = _launch.rows_of(rows), _launch.arch(rows.device).warp_size
    codes = Codes.of(stored, rows.device, torch.float16 if kind == "sums" else rows.dtype)
    constants, columns = dict(codes.constants), cut.columns
    if kind == "sums":
        block_g = threads_along(codes.groups, warp_size)
        columns = cut.columns * cut.warps * warp_size // block_g
    else:
        scale_groups = constants["SHARE_B"] // constants["SIZE"]
        # What has one scale; or two of mxfp4, as products of depth 32 take as long as of 64.
        block_g = 2 if stored.format == "mxfp4" else min(scale_groups, cut.bytes // _BYTES)
        parts, scales_of = cut.bytes // _BYTES // block_g, max(block_g // scale_groups, 1)
        constants |= {"ROWS": _ROWS, "PARTS": parts, "SCALES": scales_of, "num_stages": cut.stages}
    column_blocks = _launch.blocks(width, columns)
    _launch.launch(
        _sums_kernel if kind == "sums" else _dots_kernel, (rows.shape[0] * column_blocks,),
        rows, *codes.tensors, offsets.contiguous(), out,
        rows.shape[0], num_experts, depth, width, codes.groups, column_blocks, rows.stride(0), out.stride(0),
        *codes.strides, 1, **constants, BLOCK_N=columns, BLOCK_G=block_g, BLOCK_E=_launch.power_of_two(num_experts),
        enable_fp_fusion=kind == "sums", config=cut,
    )  # fmt: skip
    return out


def threads_along(groups: int, threads: int, used: int = 8) -> int:
    """Threads of a warp side by side along the codes of a feature: as many as leave at most one idle for each ``used``."""
    count = min(threads, _launch.power_of_two(groups))
    while count > 4 and _launch.blocks(groups, count) * count * used > groups * (used + 1):
        count //= 2
    return count
