"""``moekit doctor``."""

from __future__ import annotations

from importlib import metadata

from rich.console import Console
from rich.table import Table


def doctor() -> None:
    """Report versions, devices and backends: what to put into a bug report."""
    import platform

    import torch

    import moekit
    from moekit import _backend

    table = Table(show_header=False, box=None)
    table.add_row("moekit", moekit.__version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "numba", "triton", "transformers"):
        table.add_row(package, _version(package))
    table.add_row("threads", str(torch.get_num_threads()))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(devices) or "none")
    asked_for, problem = _backend.default()
    table.add_row("MOEKIT_BACKEND", f"{asked_for} (the default)" if problem is None else f"invalid: {problem}")
    for name, present in moekit.available().items():
        table.add_row(f"backend {name}", "available" if present else "not installed")
    Console().print(table)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
