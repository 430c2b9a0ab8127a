"""A model with ``moekit.nn`` layers under FSDP2 or DDP, in float32 or with bfloat16 products, kept in balance.

::

    python examples/fsdp2.py                                                # one process
    torchrun --nproc-per-node 2 examples/fsdp2.py                           # two, which shard everything (FSDP2)
    torchrun --nproc-per-node 2 examples/fsdp2.py --parallel ddp            # two, which have everything
    torchrun --nproc-per-node 8 examples/fsdp2.py --device cuda --bf16

Ranks take shares of one batch, so that all of these train the same model: losses are equal to rounding.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import get_node_local_rank
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import moekit.nn

HIDDEN, CONTEXT, BATCH = 64, 64, 16


class Block(nn.Module):
    """Attention, then experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.moe = moekit.nn.MoE.build(HIDDEN, 64, num_experts=8, k=2, score="sigmoid", expert_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H]`` to the same."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (-1, 16)).transpose(1, 2).chunk(3, dim=1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.moe(self.norms[1](x))


class LanguageModel(nn.Sequential):
    """Bytes to the loss of the byte after each."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(256, HIDDEN), Block(), Block(), nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256))

    def forward(self, windows: Tensor) -> Tensor:
        """Mean over each byte of ``windows [B, C + 1]`` but the first ones, nats."""
        logits = super().forward(windows[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def spread(model: LanguageModel, options: argparse.Namespace) -> nn.Module:
    """What to call in training."""
    if options.parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(options.device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if options.bf16 else MixedPrecisionPolicy()
    for block in model:
        if isinstance(block, Block):
            fully_shard(block.moe.router, mesh=mesh)  # first, and without the policy: routers compute in float32
            fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train(called: nn.Module, options: argparse.Namespace) -> list[float]:
    """Train on this rank's shares of the batches; the losses over all ranks."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    optimiser = torch.optim.AdamW(called.parameters(), lr=3e-3, fused=True)
    routers = [module for module in called.modules() if isinstance(module, moekit.nn.Router)]
    autocast = options.bf16 and options.parallel == "ddp"  # FSDP2 casts by its policy
    rank, world = dist.get_rank(), dist.get_world_size()
    generator, losses = torch.Generator().manual_seed(0), []  # seeded alike on all ranks: the same batch
    for step in track(range(1, options.steps + 1), "training", disable=rank != 0):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
        windows = text[starts[rank::world] + torch.arange(CONTEXT + 1)].long().to(options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=autocast):
            loss = called(windows)
        loss.backward()
        nn.utils.clip_grad_norm_(called.parameters(), 1.0)  # of DTensors, too: the norm is that of all ranks
        optimiser.step()
        optimiser.zero_grad()
        for router in routers:
            router.update_bias(1e-2, dist.group.WORLD)  # by the counts of all ranks, which take the same step
        mean = loss.detach() / world
        dist.all_reduce(mean)
        losses.append(mean.item())
        if rank == 0 and step % max(1, options.steps // 10) == 0:
            print(f"step {step:4}  loss {losses[-1]:.4f}")
    return losses


def run(options: argparse.Namespace) -> tuple[list[float], int, dict[str, Tensor]]:
    """On each rank, once they have joined: losses, bytes of parameters on this rank, and on rank 0 the whole model."""
    torch.manual_seed(0)  # FSDP2 sends no weights: all ranks have to draw the same
    model = LanguageModel().to(options.device)
    called = spread(model, options)
    start = time.perf_counter()
    losses = train(called, options)
    speed = options.steps * BATCH * CONTEXT / (time.perf_counter() - start)
    here = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    # Whole and under the names of one process, however the model is spread; empty on other ranks than 0.
    state = get_model_state_dict(called, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        print(f"Ranks: {dist.get_world_size()}, {options.parallel}: loss {losses[0]:.4f} to {losses[-1]:.4f} nats a byte")
        print(f"{speed:,.0f} tokens/s; {here:,} of {everything:,} bytes of parameters on this rank")
        LanguageModel().load_state_dict(state)
    return losses, here, state


def main(arguments: list[str] | None = None) -> tuple[list[float], int, dict[str, Tensor]]:
    """Read the command line, join the other ranks, run and leave them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a second thread costs products of this size more than it brings
    if cuda := options.device == "cuda":
        torch.cuda.set_device(get_node_local_rank(0))
    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    try:
        if BATCH % dist.get_world_size():
            parser.error(f"the batch of {BATCH} windows cannot be shared by {dist.get_world_size()} processes")
        return run(options)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    moekit.keep_pages()  # on a CPU: fresh results cost no page faults then
    main()
