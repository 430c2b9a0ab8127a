"""What every launcher shares: the launch itself, its configuration, and the layout of its arguments."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.kernels.triton import _cached

# Anything else (float64, float8, integers in arithmetic) is left to the reference.
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Tile(NamedTuple):
    """How much one program takes on: elements of its main tensor for each of its threads, and its warps.

    ``registers`` limits a thread's (on NVIDIA). Without a limit ptxas saves registers by moving loads down to where
    they are used, behind the arithmetic on earlier ones, and a thread waits for memory several times; with one it does not.
    """

    elements: int
    warps: int
    registers: int | None = None


# 8 elements of bfloat16 are one 16-byte load from each tensor that the kernel reads.
_TILES = {
    "glu": Tile(8, 4),
    "glu_fp8": Tile(16, 16),
    "glu_backward": Tile(8, 4, 88),
    "glu_fp8_backward": Tile(8, 4, 72),
    "glu_bias": Tile(8, 4, 128),
    "permute": Tile(8, 4),
    "unpermute": Tile(16, 1),
    "unpermute_backward": Tile(8, 4),
    "unpack": Tile(32, 2),
}
# Where an architecture (major compute capability, or the name of an AMD one) wants another.
_TILES_OF_ARCH: dict[str, dict[str, Tile]] = {}


class Arch(NamedTuple):
    """A GPU: the major compute capability of an NVIDIA one or the name of an AMD one, and the threads of a warp."""

    name: str
    warp_size: int


@functools.cache  # asking for the properties takes longer than a launch
def arch(device: torch.device) -> Arch:
    """The architecture of ``device``; the interpreter, on a CPU, passes for a GPU of no name."""
    if device.type != "cuda":
        return Arch("", 32)
    properties = torch.cuda.get_device_properties(device)
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else str(properties.major)
    return Arch(name, properties.warp_size)


def tile(kernel: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tile:
    """The configuration of ``kernel`` on the GPU that ``device`` names: as many bytes a thread in every ``dtype``."""
    found = _TILES_OF_ARCH.get(arch(device).name, {}).get(kernel, _TILES[kernel])
    return found._replace(elements=found.elements * 2 // dtype.itemsize)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, config: Tile | None = None, early: bool = False, **constants: Any
) -> None:
    """Run ``kernel`` over ``grid`` on the device and current stream of its first argument; nothing if it is empty.

    ``early``: its programs may start before the launch ahead of it has ended, for whose results they wait themselves.

    Whether a product and an addition may become one instruction, which rounds once, is said at every launch: releases of
    Triton differ in what they do unasked. They may where a kernel does not say otherwise.
    """
    if 0 in grid:
        return
    constants.setdefault("enable_fp_fusion", True)
    constants["num_warps"] = 4 if config is None else config.warps
    if config is not None and config.registers is not None and torch.version.hip is None:
        constants["maxnreg"] = config.registers
    if early:
        constants["launch_pdl"] = True
    device = args[0].device
    if device.type != "cuda":
        kernel[grid](*args, **constants)
    elif device.index == torch.cuda.current_device():
        _cached.launch(kernel, grid, device.index, args, constants)
    else:
        with torch.cuda.device(device):
            _cached.launch(kernel, grid, device.index, args, constants)


def approximates(device: torch.device) -> bool:
    """Whether kernels there may use NVIDIA's approximate instructions, which the interpreter, on a CPU, does not know."""
    return device.type != "cpu" and arch(device).name.isdecimal()


def overlaps(device: torch.device) -> bool:
    """Whether a launch there can start before the one ahead of it has ended: NVIDIA's from sm_90 on."""
    return _since_hopper(device)


def _since_hopper(device: torch.device) -> bool:
    name = arch(device).name
    return name.isdecimal() and int(name) >= 9


def precision(x: Tensor, *, along: bool = False) -> str:
    """How ``tl.dot`` treats float32: as such, or where ``torch.matmul`` may, rounded to TF32.

    Of operands both adjacent ``along`` the sum, tensor cores multiply what TF32 holds of a number and what it leaves: three
    products, whose sum is as exact as that of float32 and twice as fast.
    """
    if x.dtype is not torch.float32 or not approximates(x.device):
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if along else "ieee"


def computes(*tensors: Tensor | None) -> bool:
    """Whether the kernels compute in all of these dtypes."""
    return all(t is None or t.dtype in _FLOATS for t in tensors)


def rows_of(x: Tensor) -> Tensor:
    """``x [N, F]`` with adjacent features; rows may lie anywhere, so this copies only where features are strided."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """``x`` contiguous; None stays None."""
    return x if x is None else x.contiguous()


def float8(x: Tensor) -> Tensor:
    """``x`` in float8 e4m3, as its bits in uint8 where the architecture has no instructions for the type."""
    return x if _since_hopper(x.device) else x.view(torch.uint8)


def words(*tensors: Tensor) -> list[Tensor]:
    """The same rows as integers, of the widest type up to 4 bytes that every row can be cut into: to copy any dtype."""
    tensors = tuple(t if t.stride(1) == 1 else t.contiguous() for t in tensors)
    extents = [extent for t in tensors for extent in (t.shape[1], t.stride(0), t.storage_offset())]
    size = math.gcd(4, *(extent * tensors[0].itemsize for extent in extents))
    word = {4: torch.int32, 2: torch.int16, 1: torch.int8}[size]
    return [t.view(word) for t in tensors]


def multiple(*extents: int) -> int:
    """The largest power of two up to 16 that divides all of these: what addresses can be promised to be multiples of."""
    return math.gcd(16, *extents)


def blocks(extent: int, size: int) -> int:
    """How many blocks of ``size`` cover ``extent``."""
    return -(-extent // size)


def power_of_two(extent: int) -> int:
    """The smallest power of two that is not below ``extent``."""
    return 1 << max(extent - 1, 0).bit_length()


def shape_tile(
    device: torch.device, width: int, config: Tile, *, max_columns: int = 1024, min_rows: int = 1
) -> tuple[int, int]:
    """Rows and columns of a tile for rows of ``width`` elements.

    Columns are the largest power of two that leaves at most an eighth of the lanes idle past the row's end; rows fill up
    what the program is to take on.
    """
    elements = config.elements * config.warps * arch(device).warp_size
    columns = min(power_of_two(width), max_columns, elements // min_rows)
    while columns > 64 and blocks(width, columns) * columns * 8 > width * 9:
        columns //= 2
    return max(elements // columns, 1), columns


def whole_rows(device: torch.device, width: int, config: Tile) -> tuple[int, int, Tile]:
    """Rows and columns of a tile that spans a row of ``width`` elements if ``config.warps`` can, and the warps it takes."""
    threads = config.elements * arch(device).warp_size
    columns = min(power_of_two(width), threads * config.warps)
    warps = min(max(columns // threads, 4), config.warps)
    return max(threads * warps // columns, 1), columns, config._replace(warps=warps)
