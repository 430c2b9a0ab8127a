"""What torchrun starts for test_examples.py: the examples of several ranks; each rank keeps what they give.

::

    torchrun --nproc-per-node 2 tests/_examples_on_ranks.py FOLDER
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moekit

EXAMPLES = Path(__file__).parents[1] / "examples"
EXPERT_PARALLEL = ["--steps", "4"]
FSDP2 = [["--steps", "4"], ["--steps", "4", "--parallel", "ddp"], ["--steps", "4", "--bf16"]]


def main(folder: Path) -> None:
    expert_parallel, fsdp2 = (runpy.run_path(str(EXAMPLES / f"{name}.py")) for name in ("expert_parallel", "fsdp2"))
    rank, world, found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), {}
    with moekit.backend("torch"):  # nothing to compile
        found["expert_parallel"] = expert_parallel["main"]([*EXPERT_PARALLEL, "--out", str(folder / "checkpoint")])
        # Those whom torchrun starts can meet there once; for the others they meet in a file.
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
        for arguments in FSDP2:
            found[" ".join(arguments)] = fsdp2["run"](options(arguments))
        dist.destroy_process_group()
    torch.save(found, folder / f"rank{rank}.pt")


def options(arguments: list[str]) -> Any:
    """As fsdp2.py reads them."""
    parallel = "ddp" if "ddp" in arguments else "fsdp"
    return argparse.Namespace(parallel=parallel, bf16="--bf16" in arguments, steps=int(arguments[1]), device="cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
