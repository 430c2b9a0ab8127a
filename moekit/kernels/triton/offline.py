"""Compile every kernel to machine code on a machine without a GPU, and read the result.

    python -m moekit.kernels.triton.offline                 # the table, for every architecture
    python -m moekit.kernels.triton.offline --arch sm_90 --case glu

The launchers run on meta tensors of real sizes and their launches are caught, so what is compiled is what a GPU would get:
argument types, alignment, constants and configuration. Registers and spills come from the machine code, the width of
memory accesses from the assembly.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moekit.kernels.triton import _launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One caught launch: a kernel and the arguments it was given."""

    kernel: Any
    args: tuple
    constants: dict[str, Any]
    warps: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What the machine code of one kernel uses; accesses count instructions by their bytes."""

    kernel: str
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]


@contextlib.contextmanager
def catch_launches(target: GPUTarget) -> Iterator[list[Launch]]:
    """Inside the ``with`` block launches are listed instead of run, configured as on ``target``."""
    caught: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, num_warps: int, **constants: Any) -> None:
        caught.append(Launch(self, args, constants, num_warps))

    arch = _launch.Arch(str(target.arch)[:-1] if target.backend == "cuda" else str(target.arch), target.warp_size)
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(_launch, "arch", lambda device: arch):
        yield caught


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple, list]]:
    """Signature, constants and attributes as Triton derives them from a call's arguments."""
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    for index, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        aligned = False
        if isinstance(value, Tensor):
            kind, aligned = "*" + _POINTERS[value.dtype], value.storage_offset() * value.itemsize % 16 == 0
        elif value is None or parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            kind, constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        signature[parameter.name] = kind
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, target: GPUTarget) -> Report:
    """Compile one launch to machine code and read it."""
    source = ASTSource(launch.kernel, *_specialise(launch))
    compiled = triton.compile(source, target=target, options={"num_warps": launch.warps})
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    if target.backend == "cuda":
        registers, spills = _resources(compiled.asm["cubin"])
        loads, stores = _cuda_accesses(assembly)
    else:
        registers = int(_first(r"\.vgpr_count:\s+(\d+)", assembly))
        spills = int(_first(r"\.vgpr_spill_count:\s+(\d+)", assembly))
        loads, stores = _hip_accesses(assembly)
    return Report(launch.kernel.__name__.strip("_"), registers, spills, compiled.metadata.shared, loads, stores)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output")
    return found.group(1)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory (what registers are spilled to), of a kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    function = usage[usage.index("Function") :]
    return int(_first(r"REG:(\d+)", function)), sum(int(_first(rf"{kind}:(\d+)", function)) for kind in ("STACK", "LOCAL"))


def _cuda_accesses(ptx: str) -> tuple[dict[int, int], dict[int, int]]:
    found: tuple[Counter, Counter] = (Counter(), Counter())
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx):
        found[kind == "st"][int(vector or 1) * int(bits) // 8] += 1
    return dict(found[0]), dict(found[1])


def _hip_accesses(assembly: str) -> tuple[dict[int, int], dict[int, int]]:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "sshort": 2, "byte": 1}
    sizes |= {"ubyte": 1, "sbyte": 1}
    found: tuple[Counter, Counter] = (Counter(), Counter())
    for kind, size in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(dwordx?\d?|[us]?short|[us]?byte)", assembly):
        found[kind == "store"][sizes[size]] += 1
    return dict(found[0]), dict(found[1])


def accesses(counts: dict[int, int]) -> str:
    """``"16x3 4x1"``: widths in bytes and how many instructions have them, widest first."""
    return " ".join(f"{width}x{count}" for width, count in sorted(counts.items(), reverse=True)) or "-"
