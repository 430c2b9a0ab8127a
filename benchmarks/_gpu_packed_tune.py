"""Temporary: grouped products and unpacking on an H200; prints a line a measurement, JSON into $OUT. Stops itself in time.

    python benchmarks/_gpu_packed_tune.py                    # on a GPU
    TRITON_INTERPRET=1 python benchmarks/_gpu_packed_tune.py # dry run, tiny, on a CPU
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

BEGIN = time.time()
LIMIT = float(os.environ.get("LIMIT", "465"))
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import grouped_mm
from triton.tools.tensor_descriptor import TensorDescriptor

DRY = not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
if DRY:
    import _interpreter  # noqa: F401
from moekit import _formats
from moekit.kernels.triton import _launch, _packed, gemm, unpack
from moekit.kernels.triton.gemm import Blocks, _experts, _tile

DEVICE = "cpu" if DRY else "cuda"
BF16 = torch.bfloat16
FORMATS = ("nf4", "mxfp4", "fp8", "int8")


class Stored(NamedTuple):
    codes: Tensor
    scales: list
    format: str
    block: tuple

    @property
    def shape(self):
        experts, height, width = self.codes.shape
        return experts, height, width * (2 if self.format in ("nf4", "mxfp4") else 1)


class Shape(NamedTuple):
    name: str
    E: int
    K: int
    H: int
    I: int


SHAPES = {
    "qwen": Shape("qwen", 128, 8, 2048, 768),
    "goss": Shape("goss", 32, 4, 2880, 2880),
}
TOKENS = (4096, 16384)
if DRY:
    SHAPES = {"qwen": Shape("qwen", 4, 2, 64, 32), "goss": Shape("goss", 3, 2, 64, 32)}
    TOKENS = (8,)


# --- data -----------------------------------------------------------------------------------------------------------

EMPTY = False  # compile only: nothing is filled


def bytes_(*shape, high=256, low=0):
    x = torch.empty(shape, dtype=torch.uint8, device=DEVICE)
    return x if EMPTY else x.random_(low, high)


def normal(*shape, scale=1.0, dtype=BF16):
    x = torch.empty(shape, dtype=dtype, device=DEVICE)
    return x if EMPTY else x.normal_(0, scale)


def uniform(*shape):
    x = torch.empty(shape, dtype=torch.float32, device=DEVICE)
    return x if EMPTY else x.uniform_(0.01, 0.03)


def stored(form, E, O, I):
    if form == "nf4":
        return Stored(bytes_(E, O, I // 2), [uniform(E, O * I // 64)], form, (1, 64))
    if form == "mxfp4":
        return Stored(bytes_(E, O, I // 2), [bytes_(E, O, I // 32, low=118, high=123)], form, (1, 32))
    if form == "fp8":
        codes = bytes_(E, O, I, high=120).view(torch.float8_e4m3fn)
        return Stored(codes, [uniform(E, -(-O // 128), -(-I // 128))], form, (128, 128))
    return Stored(bytes_(E, O, I).view(torch.int8), [uniform(E, O)], form, (1, I))


def reference(s, start, stop):
    """The values in float32 arithmetic, rounded once."""
    codes, scale = s.codes[start:stop], s.scales[0][start:stop]
    E, O, I = stop - start, *s.shape[1:]
    if s.format == "nf4":
        table = torch.tensor(_formats.NF4_TABLE, device=codes.device)
        value = torch.stack([table[(codes >> 4).int()], table[(codes & 15).int()]], -1).view(E, -1, 64)
        return (value * scale.view(E, -1, 1)).view(E, O, I).to(BF16)
    if s.format == "mxfp4":
        table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
        table = torch.cat([table, -table])
        value = torch.stack([table[(codes & 15).int()], table[(codes >> 4).int()]], -1).view(E, -1, 32)
        return (value * 2.0 ** (scale.float() - 127).view(E, -1, 1)).view(E, O, I).to(BF16)
    if s.format == "fp8":
        spread = scale.repeat_interleave(128, 1)[:, :O].repeat_interleave(128, 2)[:, :, :I]
        return (codes.float() * spread).to(BF16)
    return (codes.float() * scale[:, :, None] * (1 / 127)).to(BF16)


def offsets_of(E, K, T):
    if EMPTY:
        return torch.empty(E, dtype=torch.int32, device=DEVICE)
    chosen = torch.rand(T, E, device=DEVICE).topk(K, 1).indices.flatten()
    return torch.bincount(chosen, minlength=E).cumsum(0).int()


# --- a variant with descriptors -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "first", "num_experts"])
def _tma_kernel(
    offsets, rows, matrices, out, num_rows, first, num_experts, depth, width, column_blocks, stride_out,
    BACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    begins, ends, through = _experts(offsets, first, num_experts, num_rows, BLOCK_M, BLOCK_E)
    tiles = tl.max(through, 0) * column_blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        expert, top, end, block = _tile(tile, begins, ends, through, column_blocks, BLOCK_M, BLOCK_E, GROUP)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            x = rows.load([top, start])
            if BACK:
                w = tl.reshape(matrices.load([expert, start, block * BLOCK_N]), (BLOCK_K, BLOCK_N))
            else:
                w = tl.trans(tl.reshape(matrices.load([expert, block * BLOCK_N, start]), (BLOCK_N, BLOCK_K)))
            total = tl.dot(x, w, total)
        row, column = top + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
        place = out + row.to(tl.int64)[:, None] * stride_out + column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < width)[None, :])


def tma_slice(rows, matrices, offsets, first, out, cut, flat=False):
    back = matrices.stride(2) == 1
    kept = matrices if back else matrices.mT
    box = [1, cut.depth, cut.columns] if back else [1, cut.columns, cut.depth]
    column_blocks = -(-out.shape[1] // cut.columns)
    experts = matrices.shape[0]
    _launch.launch(
        _tma_kernel, gemm._grid(cut, rows.shape[0], experts, column_blocks, out.device),
        offsets, TensorDescriptor.from_tensor(rows, [cut.rows, cut.depth]), TensorDescriptor.from_tensor(kept, box),
        out, rows.shape[0], first, experts, rows.shape[1], out.shape[1], column_blocks, out.stride(0),
        BACK=back, BLOCK_M=cut.rows, BLOCK_N=cut.columns, BLOCK_K=cut.depth, BLOCK_E=_launch.power_of_two(experts),
        GROUP=gemm._GROUP, FLAT=flat, num_stages=cut.stages, config=cut,
    )  # fmt: skip
    return out


# --- launches of one configuration ----------------------------------------------------------------------------------


def dense_slice(rows, matrices, offsets, first, out, cut):
    weights, sizes, back = gemm._dense(matrices)
    return gemm.product(rows, weights, sizes, offsets, first, matrices.shape[0], out, cut, gemm._PLAIN, back)


def fused(rows, s, offsets, out, back, cut, first=0):
    constants = _packed.constants(s, cut.columns if back else cut.depth)
    return gemm.product(
        rows, _packed.parts(s), _packed.sizes(s), offsets, 0, s.shape[0], out, cut, constants, back
    )  # fmt: skip


def low_rank(out, low, factors, offsets, cut):
    gemm.blocks = lambda kind, arch: cut
    return gemm.low_rank_update(out, low, factors, offsets)


DENSE = [
    Blocks(128, 128, 64, 8, 3, 2),
    Blocks(128, 128, 64, 4, 3, 2),
    Blocks(128, 128, 64, 4, 4, 1),
    Blocks(128, 256, 64, 8, 3, 1),
    Blocks(128, 256, 64, 8, 4, 1),
    Blocks(256, 128, 64, 8, 3, 1),
    Blocks(256, 128, 64, 8, 4, 1),
    Blocks(128, 256, 64, 8, 3, 1, turned=True),
    Blocks(64, 256, 64, 8, 3, 1),
    Blocks(64, 256, 64, 4, 4, 1),
    Blocks(64, 128, 64, 4, 4, 2),
    Blocks(64, 128, 128, 4, 3, 2),
]
TMA = [
    (Blocks(128, 128, 64, 4, 4, 1), False),
    (Blocks(128, 128, 64, 8, 4, 1), False),
    (Blocks(128, 128, 64, 4, 3, 2), False),
    (Blocks(128, 256, 64, 8, 3, 1), False),
    (Blocks(128, 256, 64, 8, 4, 1), False),
    (Blocks(256, 128, 64, 8, 3, 1), False),
    (Blocks(256, 128, 64, 8, 4, 1), False),
    (Blocks(128, 256, 64, 8, 3, 1), True),
    (Blocks(256, 128, 64, 8, 3, 1), True),
]
FUSED = [
    Blocks(128, 128, 64, 8, 3, 2, turned=True),
    Blocks(128, 128, 64, 4, 3, 2, turned=True),
    Blocks(256, 128, 64, 8, 3, 1, turned=True),
    Blocks(128, 256, 64, 8, 3, 1, turned=True),
    Blocks(128, 128, 64, 8, 4, 1, turned=False),
    Blocks(64, 128, 64, 4, 4, 3, turned=True),
    Blocks(64, 256, 64, 8, 3, 2, turned=True),
    Blocks(32, 128, 128, 4, 3, 4, turned=True),
]
FEW = [
    Blocks(16, 64, 128, 4, 4, 4, turned=True),
    Blocks(16, 64, 128, 4, 3, 8, turned=True),
    Blocks(16, 64, 256, 4, 3, 4, turned=True),
    Blocks(16, 64, 64, 4, 6, 8, turned=True),
    Blocks(16, 64, 256, 8, 3, 4, turned=True),
    Blocks(16, 128, 128, 4, 4, 4, turned=True),
    Blocks(16, 128, 128, 8, 4, 3, turned=True),
    Blocks(16, 128, 64, 4, 5, 4, turned=True),
    Blocks(16, 32, 128, 4, 4, 8, turned=False),
    Blocks(16, 32, 256, 4, 3, 6, turned=False),
    Blocks(16, 32, 128, 2, 4, 12, turned=False),
    Blocks(16, 64, 128, 4, 4, 4, turned=False),
    Blocks(16, 64, 256, 4, 3, 4, turned=False),
]
FEW_DENSE = [
    Blocks(16, 64, 128, 4, 4, 4, turned=True),
    Blocks(16, 64, 64, 4, 6, 4, turned=True),
    Blocks(16, 32, 128, 4, 4, 6),
    Blocks(16, 64, 128, 4, 4, 3),
]
LOW_RANK = [
    Blocks(64, 128, 16, 4, 1, 4),
    Blocks(64, 128, 16, 4, 1, 8),
    Blocks(128, 128, 16, 8, 1, 2),
    Blocks(128, 128, 16, 8, 1, 4),
    Blocks(64, 256, 16, 8, 1, 2),
    Blocks(64, 256, 16, 8, 1, 4),
    Blocks(32, 256, 16, 4, 1, 8),
    Blocks(64, 64, 16, 4, 1, 8),
    Blocks(128, 64, 16, 4, 1, 8),
]
TILES = [_launch.Tile(16, 4), _launch.Tile(8, 4), _launch.Tile(16, 8), _launch.Tile(32, 4), _launch.Tile(32, 2)]
if DRY:
    small = [Blocks(16, 32, 32, 4, 2, 1), Blocks(16, 32, 32, 4, 2, 1, turned=True)]
    DENSE, FUSED, FEW, FEW_DENSE, LOW_RANK, TILES = small[:1], small[1:], small[1:], small[:1], small[:1], TILES[:1]
    TMA = [(small[0], False)]
    gemm._processors = lambda device: 2


# --- timing ---------------------------------------------------------------------------------------------------------

FOUND: list[dict] = []
COMPILING = False  # in a worker, which compiles its share of launches and runs none


class OutOfTime(Exception):
    pass


def timed(fn, repeats=9, inner=1):
    """Milliseconds of one call: median over replays of a graph."""
    if DRY:
        begin = time.perf_counter()
        fn()
        return (time.perf_counter() - begin) * 1e3
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            fn()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        times.append((first, last))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times) / inner


def measure(section, what, fn, flops=0.0, moved=0.0, cut: Any = None, calls=1):
    """Time and print; in a worker, compile."""
    if COMPILING:
        try:
            fn()
        except Exception as error:
            print(f"compile {section} {what}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return None
    if time.time() - BEGIN > LIMIT:
        raise OutOfTime
    label = "" if cut is None else short(cut)
    try:
        ms = timed(fn) / calls
    except Exception as error:
        print(f"{section} {what} {label} FAILED {type(error).__name__}: {str(error)[:150]}", flush=True)
        if "CUDA error" in str(error):
            raise OutOfTime from error
        if DRY:
            traceback.print_exc()
        return None
    line = f"{section} {what} {label} {ms * 1e3:.1f}us"
    line += f" {flops / ms / 1e9:.0f}TF" if flops else ""
    line += f" {moved / ms / 1e6:.0f}GB/s" if moved else ""
    print(line, flush=True)
    FOUND.append({"section": section, "what": what, "cut": label, "ms": ms, "flops": flops, "bytes": moved})
    return ms


def short(cut):
    if isinstance(cut, tuple) and not isinstance(cut, Blocks | _launch.Tile):
        return short(cut[0]) + f"/tma{'f' if cut[1] else ''}"
    if isinstance(cut, _launch.Tile):
        return f"tile{cut.elements}w{cut.warps}"
    return f"{cut.rows}x{cut.columns}x{cut.depth}w{cut.warps}s{cut.stages}p{cut.programs}{'T' if cut.turned else ''}"


def best(section, what, variants, flops=0.0, moved=0.0, keep=3, calls=1):
    """The fastest of ``(cut, fn)``."""
    results = []
    for cut, fn in variants:
        ms = measure(section, what, fn, flops, moved, cut, calls)
        if ms is not None:
            results.append((ms, cut))
    results.sort(key=lambda pair: pair[0])
    if results:
        print(f"  best {section} {what}: " + ", ".join(f"{short(c)} {m * 1e3:.1f}us" for m, c in results[:keep]), flush=True)
    return [cut for _, cut in results[:keep]]


# --- sections -------------------------------------------------------------------------------------------------------


def close(found, expected, what):
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-9))
    good = error < 0.01 and not bool(found.isnan().any())
    print(f"check {what}: {'ok' if good else 'WRONG'} {error:.1e}", flush=True)
    FOUND.append({"section": "check", "what": what, "error": error, "ok": good})


def grouped(rows, matrices, offsets):
    return grouped_mm(rows, matrices, offs=offsets)


def check_everything():
    if COMPILING:
        return
    for name in SHAPES:
        shape = SHAPES[name]
        E, O, I, T = (shape.E, 2 * shape.I, shape.H, TOKENS[0] // 8)
        offsets = offsets_of(E, shape.K, T)
        R = T * shape.K
        x, g = normal(R, I), normal(R, O)
        for form in FORMATS:
            s = stored(form, E, O, I)
            w = torch.cat([reference(s, e, e + 1) for e in range(E)])
            found = unpack.unpack(s, 0, E, BF16, None)
            same = bool((found == w).all())
            print(f"check unpack {name} {form}: {'ok' if same else 'WRONG'}", flush=True)
            expected, expected_back = grouped(x, w.mT, offsets), grouped(g, w, offsets)
            cuts = [FUSED[0], FEW[0]] + ([FEW[8], FUSED[4]] if not DRY else [])
            for cut in cuts:
                close(fused(x, s, offsets, torch.empty_like(g), False, cut), expected, f"fused {name} {form} {short(cut)}")
            close(fused(g, s, offsets, torch.empty_like(x), True, cuts[0]), expected_back, f"fused back {name} {form}")
        out = torch.empty_like(g)
        half = E // 2
        for start, stop in ((0, half), (half, E)):
            dense_slice(x, w[start:stop].mT, offsets, start, out, DENSE[0])
        close(out, expected, f"slices {name}")
        close(dense_slice(g, w, offsets, 0, torch.empty_like(x), DENSE[0]), expected_back, f"dense back {name}")
        for variant in TMA[:1] + TMA[3:4] + TMA[7:8]:
            try:
                close(tma_slice(x, w.mT, offsets, 0, torch.empty_like(g), *variant), expected, f"tma {name} {short(variant)}")
                close(tma_slice(g, w, offsets, 0, torch.empty_like(x), *variant), expected_back, f"tma back {name}")
            except Exception as error:
                print(f"check tma {name} {short(variant)} FAILED {type(error).__name__} {str(error)[:200]}", flush=True)
        low, factors = normal(R, 16), normal(E, 16, O, scale=0.1)
        expected = (out.float() + grouped(low, factors, offsets).float()).to(BF16)
        close(low_rank(out.clone(), low, factors, offsets, LOW_RANK[0]), expected, f"low rank {name}")
        weights, sizes, back = gemm._dense(w.mT)
        whole = gemm.product(
            x, weights, sizes, offsets, 0, E, torch.empty_like(g), DENSE[0], gemm._PLAIN, back, low, factors
        )  # fmt: skip
        close(whole, expected, f"product with low rank {name}")


def unpacking():
    for name, form in itertools.product(SHAPES, FORMATS):
        shape = SHAPES[name]
        E, O, I = shape.E, 2 * shape.I, shape.H
        s, out = stored(form, E, O, I), normal(E, O, I)
        moved = out.numel() * 2 + s.codes.numel() + sum(p.numel() * p.itemsize for p in s.scales)

        def call(tile, s=s, E=E, out=out):
            _launch._TILES["unpack"] = tile
            return unpack.unpack(s, 0, E, BF16, out)

        tiles = TILES if name == "qwen" else TILES[:2]
        best("unpack", f"{name} {form}", [(tile, lambda tile=tile: call(tile)) for tile in tiles], moved=moved)


def products(shape):
    """Depth, width and whether back, of the products of a layer that matter most."""
    return {"up": (shape.H, 2 * shape.I, False), "up back": (2 * shape.I, shape.H, True), "down": (shape.I, shape.H, False)}


GOOD: dict[str, list] = {}


def dense():
    for name, (label, (depth, width, back)) in itertools.product(SHAPES, products(SHAPES["qwen"]).items()):
        shape = SHAPES[name]
        depth, width, back = products(shape)[label]
        w = normal(shape.E, depth, width) if back else normal(shape.E, width, depth).mT
        for T in reversed(TOKENS):
            R = T * shape.K
            rows, out, offsets = normal(R, depth, scale=0.1), normal(R, width), offsets_of(shape.E, shape.K, T)
            flops, what = 2.0 * R * depth * width, f"{name} {label} T={T}"
            if not COMPILING:
                measure("dense", what + " torch", lambda: grouped(rows, w, offsets), flops)
            full = label != "down" and TOKENS[-1] == T
            cuts = DENSE if full or COMPILING else GOOD.get(f"{name} {'up' if label == 'down' else label}", DENSE[:3])
            cuts = [cut for cut in cuts if isinstance(cut, Blocks)] or DENSE[:1]
            tmas = TMA if full or COMPILING else GOOD.get(f"tma {name} {'up' if label == 'down' else label}", TMA[:3])
            found = best("dense", what, [(c, lambda c=c: dense_slice(rows, w, offsets, 0, out, c)) for c in cuts], flops)
            found_tma = best("dense", what, [(c, lambda c=c: tma_slice(rows, w, offsets, 0, out, *c)) for c in tmas], flops)
            if full:
                GOOD[f"{name} {label}"], GOOD[f"tma {name} {label}"] = found, found_tma


def decode():
    layers = 2 if DRY else 12
    for name in SHAPES:
        shape = SHAPES[name]
        depth, width = shape.H, 2 * shape.I
        tokens = (1,) if DRY else (1, 4, 16, 64)
        routes = {T: [offsets_of(shape.E, shape.K, T) for _ in range(layers)] for T in tokens}
        inputs = {T: (normal(T * shape.K, depth, scale=0.1), normal(T * shape.K, width)) for T in tokens}
        packed = {form: [stored(form, shape.E, width, depth) for _ in range(layers)] for form in ("nf4", "mxfp4")}
        if not COMPILING:
            wide = [normal(shape.E, width, depth) for _ in range(layers)]
        else:
            wide = [normal(shape.E, width, depth)] * layers
        for T in tokens:
            rows, out = inputs[T]
            touched = (
                1.0
                if COMPILING
                else sum(float((torch.diff(o, prepend=o.new_zeros(1)) > 0).sum()) for o in routes[T]) / layers
            )
            size = touched * depth * width
            what = f"{name} T={T} ({touched:.0f} experts)"

            def every(call, T=T):
                for layer in range(layers):
                    call(layer, routes[T][layer])

            if not COMPILING:
                call = lambda: every(lambda i, o: grouped(rows, wide[i].mT, o))  # noqa: E731
                measure("decode", what + " bf16 torch", call, moved=2 * size, calls=layers)
            best(
                "decode", what + " bf16",
                [(c, lambda c=c: every(lambda i, o: dense_slice(rows, wide[i].mT, o, 0, out, c))) for c in FEW_DENSE],
                moved=2 * size, calls=layers,
            )  # fmt: skip
            for form, weights in packed.items():
                bits = {"nf4": 4.5, "mxfp4": 4.25}[form]
                best(
                    "decode", f"{what} {form}",
                    [(c, lambda c=c: every(lambda i, o: fused(rows, weights[i], o, out, False, c))) for c in FEW],
                    moved=size * bits / 8, calls=layers,
                )  # fmt: skip


def sliced(rows, s, offsets, out, mib, cut, dense_call):
    """Unpack in slices of so many MiB and multiply each."""
    E, O, I = s.shape
    count = min(max(int(mib * 2**20 // (O * I * 2)), 1), E)
    room = torch.empty(count, O, I, dtype=BF16, device=DEVICE)

    def call():
        for start in range(0, E, count):
            stop = min(start + count, E)
            w = unpack.unpack(s, start, stop, BF16, room[: stop - start])
            dense_call(rows, w.mT, offsets, start, out, cut)

    return call


def packed_products():
    """Fused against unpacked in slices, from few rows to many."""
    _launch._TILES["unpack"] = TILES[0]
    for name in SHAPES:
        shape = SHAPES[name]
        depth, width = shape.H, 2 * shape.I
        tokens = TOKENS if DRY else (16384, 4096, 1024, 256, 64)
        kept = {}
        for form in ("nf4", "mxfp4", "fp8"):
            s = stored(form, shape.E, width, depth)
            w = unpack.unpack(s, 0, shape.E, BF16, None) if not COMPILING else normal(shape.E, width, depth)
            for T in tokens:
                R = T * shape.K
                rows, out, offsets = normal(R, depth, scale=0.1), normal(R, width), offsets_of(shape.E, shape.K, T)
                flops, what = 2.0 * R * depth * width, f"{name} {form} T={T}"
                if not COMPILING:
                    measure("packed", what + " bf16 torch", lambda: grouped(rows, w.mT, offsets), flops)
                    measure(
                        "packed", what + " unpack all, torch",
                        lambda: grouped(rows, unpack.unpack(s, 0, shape.E, BF16, w).mT, offsets), flops,
                    )  # fmt: skip
                cuts = (GOOD.get(f"{name} up") or DENSE)[:1]
                tmas = (GOOD.get(f"tma {name} up") or TMA)[:1]
                for mib in (32, 64, 128, 192) if T >= 4096 and form == "nf4" else (64, 192) if T >= 1024 else ():
                    for cut in cuts:
                        call = sliced(rows, s, offsets, out, mib, cut, dense_slice)
                        measure("packed", f"{what} slices {mib} MiB", call, flops, cut=cut)
                    for cut in tmas:
                        tma = lambda r, m, o, f, y, c: tma_slice(r, m, o, f, y, *c)  # noqa: E731
                        call = sliced(rows, s, offsets, out, mib, cut, tma)
                        measure("packed", f"{what} slices {mib} MiB", call, flops, cut=cut)
                cuts = FUSED if form not in kept or T < 1024 else kept[form]
                found = best(
                    "packed", f"{what} fused", [(c, lambda c=c: fused(rows, s, offsets, out, False, c)) for c in cuts], flops
                )
                kept.setdefault(form, found)


def low_ranks():
    for name in SHAPES:
        shape = SHAPES[name]
        for T in TOKENS:
            R, N = T * shape.K, 2 * shape.I
            out, low, factors = normal(R, N), normal(R, 16, scale=0.01), normal(shape.E, N, 16, scale=0.01).mT
            offsets = offsets_of(shape.E, shape.K, T)
            moved = 2.0 * (2 * out.numel() + low.numel() + factors.numel())
            what = f"{name} T={T} N={N} r=16"
            best("low rank", what, [(c, lambda c=c: low_rank(out, low, factors, offsets, c)) for c in LOW_RANK], moved=moved)
            if not COMPILING:
                measure("low rank", what + " torch add", lambda: out.add_(out), moved=3.0 * 2 * out.numel())
            # In the epilogue of the product, against the product alone.
            depth = shape.H
            w, rows = normal(shape.E, N, depth).mT, normal(R, depth, scale=0.1)
            weights, sizes, back = gemm._dense(w)
            for cut in (GOOD.get(f"{name} up") or DENSE)[:2]:

                def call(*update, cut=cut):
                    return gemm.product(
                        rows, weights, sizes, offsets, 0, shape.E, out, cut, gemm._PLAIN, back, *update
                    )  # fmt: skip

                measure("low rank", f"{what} product alone", call, 2.0 * R * depth * N, cut=cut)
                measure("low rank", f"{what} product with it", lambda: call(low, factors), 2.0 * R * depth * N, cut=cut)


SECTIONS = [check_everything, unpacking, dense, decode, packed_products, low_ranks]


def compile_share(share):
    """In a process of its own: compile every n-th launch, into the cache on disk."""
    global EMPTY, COMPILING, DEVICE
    number, of = share
    EMPTY, COMPILING, DEVICE = True, True, "meta"
    _launch.arch = lambda device: _launch.Arch("9", 32)
    seen, counter = set(), itertools.count()

    def warm(kernel, grid, *args, config=None, **constants):
        constants["num_warps"] = 4 if config is None else config.warps
        key = (kernel.__name__, repr(sorted(constants.items())), tuple(
            str(a.dtype) if isinstance(a, Tensor) else (a % 16 == 0, a == 1) if isinstance(a, int) else str(type(a)) for a in args
        ))  # fmt: skip
        if key in seen:
            return
        seen.add(key)
        if next(counter) % of == number:
            kernel.warmup(*args, grid=grid, **constants)

    _launch.launch = warm
    for section in SECTIONS[1:]:
        try:
            section()
        except Exception as error:
            return f"{section.__name__}: {type(error).__name__}: {str(error)[:200]}"
    return None


def main():
    if not DRY:
        torch.manual_seed(0)
        workers = max((os.cpu_count() or 2) - 1, 1)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            waiting = pool.map_async(compile_share, [(i, workers) for i in range(workers)])
            try:
                print("workers:", [said for said in waiting.get(timeout=110) if said], flush=True)
            except multiprocessing.TimeoutError:
                print("workers: not done in time", flush=True)
        print(f"compiled in {time.time() - BEGIN:.0f}s, {torch.cuda.get_device_name()}, triton {triton.__version__}", flush=True)
    try:
        for section in SECTIONS:
            begin = time.time()
            section()
            if not DRY:
                torch.cuda.empty_cache()
            print(f"-- {section.__name__} {time.time() - begin:.0f}s, {time.time() - BEGIN:.0f}s in all", flush=True)
    except OutOfTime:
        print("out of time", flush=True)
    finally:
        folder = Path(os.environ.get("OUT", "benchmarks/out"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "packed_tune.json").write_text(json.dumps(FOUND, indent=0))


if __name__ == "__main__":
    main()
