"""The machine and what is installed on it."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import moekit

# What a bug report needs, by what it is for.
PACKAGES = (
    *("torch", "numba", "numpy", "triton", "transformers", "peft"),
    *("accelerate", "bitsandbytes", "torchao", "liger-kernel", "megatron-core", "nemo-automodel"),
    *("typer", "rich", "matplotlib"),
)
# Extra: what it brings, and a package that says whether it is there.
EXTRAS = {
    "cpu": ("kernels for CPUs, several times as fast as the reference", "numba"),
    "cli": ("the demo and the other commands, tables and pictures", "typer"),
    "hf": ("Transformers' models with moekit's experts", "transformers"),
}
_INSTRUCTIONS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
_INSTRUCTIONS += ("asimd", "bf16", "sve", "sve2", "sme")


def versions() -> dict[str, str | None]:
    """moekit, Python, the system, and each package's version; None: not installed."""
    system = " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip()
    found: dict[str, str | None] = {"moekit": moekit.__version__, "python": platform.python_version(), "system": system}
    return found | {name: version_of(name) for name in PACKAGES}


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def floors() -> dict[str, str]:
    """The oldest version of each package that moekit's own metadata allows; none where moekit is not installed."""
    try:
        required = metadata.requires("moekit") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)>=([\d.]+)", line) for line in required)
    return {match[1]: match[2] for match in found if match and match[1] in PACKAGES}


def too_old(version: str, floor: str) -> bool:
    """Whether a version is below another, by their leading numbers."""
    numbers = [[int(number) for number in re.findall(r"\d+", text.partition("+")[0])] for text in (version, floor)]
    return numbers[0][: len(numbers[1])] < numbers[1]


def torch_build() -> str:
    """What this torch was built for."""
    import torch

    parts = [f"CUDA {torch.version.cuda}"] if torch.version.cuda else []
    parts += [f"ROCm {torch.version.hip}"] if torch.version.hip else []
    parts += ["CPU"] if not parts else []
    known = {"OpenMP": torch.backends.openmp, "MKL": torch.backends.mkl, "oneDNN": torch.backends.mkldnn}
    return ", ".join([*parts, *(name for name, backend in known.items() if backend.is_available())])


def cpu() -> dict[str, Any]:
    """Model, cores that this process may use, memory, instruction sets and load; needs nothing but Python."""
    return {
        "model": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory_bytes("MemTotal") / 2**30, 1) or None,
        "instructions": _instructions(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def threads() -> dict[str, Any]:
    """The threads and the vectors that torch uses."""
    import torch

    return {"threads": torch.get_num_threads(), "vectors": torch.backends.cpu.get_cpu_capability()}


def gpus() -> list[dict[str, Any]]:
    """Name, memory and architecture of each GPU that torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        has = torch.cuda.get_device_properties(index)
        kind = has.gcnArchName if torch.version.hip else f"sm_{has.major}{has.minor}"
        found.append({"name": has.name, "memory_gib": round(has.total_memory / 2**30, 1), "architecture": kind})
    return found


def cpu_model() -> str:
    """The processor's name, as the system has it."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _instructions() -> list[str]:
    flags = next((line.split(":", 1)[1] for line in _lines("/proc/cpuinfo") if line.startswith(("flags", "Features"))), "")
    there = set(flags.split())
    return [name for name in _INSTRUCTIONS if name in there]


def memory_bytes(field: str) -> int:
    """A field of /proc/meminfo in bytes, 0 where there is none."""
    lines = (line for line in _lines("/proc/meminfo") if line.startswith(f"{field}:"))
    return next((int(line.split()[1]) * 1024 for line in lines), 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
