"""Compile every kernel to machine code on a machine without a GPU, and read the result.

    python -m moekit.kernels.triton.offline                         # every configuration for every architecture
    python -m moekit.kernels.triton.offline --arch sm_90 --match glu
    python -m moekit.kernels.triton.offline --write docs/performance/machine_code.md  # the table there

The launchers run on meta tensors of real sizes and their launches are caught, so what is compiled is what a GPU would get:
argument types, alignment, constants and configuration. Registers and spills come from the machine code, the width of
memory accesses and the order of asynchronous matrix instructions from the assembly.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from moekit.kernels.triton import KERNELS, _launch
from moekit.kernels.triton._cases import Case, cases

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
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
# What a launch gives to the compiler alone.
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")
_WRITE_LITTLE = ("sum_chunks", "slot_gate", "slot_down")  # kernels that read tiles and write a few numbers of each


@dataclasses.dataclass(frozen=True)
class Launch:
    """One caught launch: a kernel and the arguments it was given."""

    kernel: Any
    args: tuple
    constants: dict[str, Any]
    options: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the machine code of one kernel uses; accesses count instructions by their bytes."""

    case: str
    kernel: str
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    racing: bool = False

    def faults(self, aligned: bool) -> list[str]:
        """What is wrong with it: spilled registers, a race, or no 16-byte accesses where rows are ``aligned``."""
        wide = ("loads",) if self.kernel in _WRITE_LITTLE else ("loads", "stores")
        narrow = [what for what in wide if max(getattr(self, what), default=0) < 16]
        found = [f"{self.spills} bytes of registers spilled"] if self.spills else []
        found += ["registers are written that a matrix instruction may still read"] if self.racing else []
        return found + [f"{what} of less than 16 bytes" for what in narrow if aligned]


@contextlib.contextmanager
def catch_launches(target: GPUTarget) -> Iterator[list[Launch]]:
    """Inside the ``with`` block launches are listed instead of run, configured as on ``target``."""
    caught: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in _OPTIONS if name in constants}
        if target.backend != "cuda":
            options.pop("maxnreg", None)
        caught.append(Launch(self, args, constants, options))

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
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{_POINTERS[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, GluonDescriptor):
            kind = f"tensordesc<{_POINTERS[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
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


def source_of(launch: Launch) -> ASTSource:
    """What the compiler takes a launch as."""
    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    return kind(launch.kernel, *_specialise(launch))


def compile_case(case: Case, target: GPUTarget) -> list[Report]:
    """Compile the launches of one case to machine code and read them."""
    with catch_launches(target) as launches:
        KERNELS[case.op](*case.args)
    return [_compile(launch, case.name, target) for launch in launches]


def _compile(launch: Launch, case: str, target: GPUTarget) -> Report:
    compiled = triton.compile(source_of(launch), target=target, options=launch.options)
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    if target.backend == "cuda":
        registers, spills = _resources(compiled.asm["cubin"])
        loads, stores = _cuda_accesses(assembly)
        racing = _races(assembly)
    else:
        registers = int(_first(r"\.vgpr_count:\s+(\d+)", assembly))
        spills = int(_first(r"\.vgpr_spill_count:\s+(\d+)", assembly))
        loads, stores = _hip_accesses(assembly)
        racing = False
    kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    return Report(case, kernel, registers, spills, compiled.metadata.shared, loads, stores, racing)


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


def _races(ptx: str) -> bool:
    """Whether sm_90's matrix instructions that take an operand from registers run on while a loop makes the next one.

    Triton splits such a product and waits for its first part alone before the others' registers are written again.
    """
    from_registers = re.search(r"\bwgmma\.mma_async\S* \{[^}]*\}, *\{", ptx)
    return from_registers is not None and re.search(r"\bwgmma\.wait_group\.sync\.aligned\s+[1-9]", ptx) is not None


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


def compile_all(arch: str, match: str = "", shown_only: bool = False) -> tuple[list[Report], list[str], str]:
    """Reports of the cases to be shown, what is wrong anywhere, and a summary of all that was compiled."""
    shown, faults, all_reports = [], [], []
    for case in cases(lambda case: match in case.name and (case.shown or not shown_only)):
        reports = compile_case(case, TARGETS[arch])
        all_reports += reports
        shown += reports if case.shown else []
        faults += [f"{arch} {case.name}, {r.kernel}: {fault}" for r in reports for fault in r.faults(case.aligned)]
    most = max((report.registers for report in all_reports), default=0)
    spilled = sum(report.spills > 0 for report in all_reports)
    return shown, faults, f"{arch}: {len(all_reports)} programs, at most {most} registers, {spilled} with spills"


def table(reports: dict[str, list[Report]]) -> str:
    """Markdown: a line a kernel, and for each architecture registers, spills, shared memory and accesses."""
    lines = [
        "| case, kernel | architecture | registers | spills | shared, bytes | loads | stores |",
        "|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, str, int], dict[str, Report]] = {}  # not every architecture has every kernel
    for arch, rows in reports.items():
        launches: Counter = Counter()
        for r in rows:
            launches[r.case, r.kernel] += 1
            found.setdefault((r.case, r.kernel, launches[r.case, r.kernel]), {})[arch] = r
    for of_arch in found.values():
        for at, (arch, r) in enumerate(of_arch.items()):
            name = "" if at else f"{r.case}, `{r.kernel}`"
            cells = (name, arch, r.registers, r.spills, r.shared, accesses(r.loads), accesses(r.stores))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    """Put ``text`` between the markers in a page."""
    begin, end = "<!-- kernels: begin -->\n", "<!-- kernels: end -->"
    head, rest = path.read_text().split(begin)
    path.write_text(f"{head}{begin}\n{text}\n\n{end}{rest.split(end)[1]}")


def main() -> int:
    """Compile, print the table, and fail on spills, races or narrow accesses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--match", default="", help="only cases with this in their name")
    parser.add_argument("--shown", action="store_true", help="only the cases of the table")
    parser.add_argument("--write", type=Path, help="a page to put the table into")
    options = parser.parse_args()
    count = len(options.arch)
    with ProcessPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        results = list(pool.map(compile_all, options.arch, [options.match] * count, [options.shown] * count))
    reports = {arch: shown for arch, (shown, _, _) in zip(options.arch, results, strict=True)}
    text = "\n\n".join([*(f"- {summary}" for _, _, summary in results), table(reports)]).replace("\n\n- ", "\n- ")
    print(text)
    if options.write is not None:
        _write(options.write, text)
    faults = [fault for _, found, _ in results for fault in found]
    print("\n".join(faults), file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
