"""Experts shared out over ranks: ``moekit.ep.parallelize``, DDP for the rest, clipping, checkpoints for any number of ranks.

::

    python examples/expert_parallel.py                                      # one process
    torchrun --nproc-per-node 2 examples/expert_parallel.py                 # two over gloo, with 4 of the 8 experts each
    torchrun --nproc-per-node 8 examples/expert_parallel.py --device cuda   # over NCCL
    torchrun --nproc-per-node 2 examples/expert_parallel.py --out FOLDER    # keep the checkpoint
    python examples/expert_parallel.py --resume FOLDER                      # go on from it, with any number of ranks

Ranks take shares of one batch, so that all of these train the same model: losses are equal to rounding.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import get_node_local_rank
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import moekit.ep
import moekit.nn

HIDDEN, CONTEXT, BATCH = 64, 64, 16


class Block(nn.Module):
    """Attention, then experts; the shared one computes while tokens travel."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.moe = moekit.nn.MoE.build(HIDDEN, 64, num_experts=8, k=2, shared_intermediate=64, balance_coeff=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H]`` to the same."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (-1, 16)).transpose(1, 2).chunk(3, dim=1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.moe(self.norms[1](x))


def build(device: str) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    """A model whose experts are shared out over all ranks, and its optimiser."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, HIDDEN), Block(), Block(), nn.Linear(HIDDEN, 256)).to(device)
    moekit.ep.parallelize(model, init_device_mesh(device, (dist.get_world_size(),)))
    for block in model[1:3]:
        block.moe.balance_group = dist.group.WORLD  # the balance loss of the whole batch, not of a rank's share
    experts = dict(moekit.ep.expert_parameters(model))
    others = [parameter for name, parameter in model.named_parameters() if name not in experts]
    # A fused step takes either DTensors, as the experts are, or plain tensors: two groups.
    optimiser = torch.optim.AdamW([{"params": list(experts.values())}, {"params": others}], lr=3e-3, fused=True)
    return DistributedDataParallel(model), optimiser  # which leaves the experts to moekit


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean over each byte of this rank's ``windows [B, C + 1]`` but the first ones."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def over_ranks(loss: Tensor) -> float:
    """The mean over all ranks, whose shares are of one size."""
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.item()


def state_of(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict]:
    """What each rank writes, and fills in as it reads a checkpoint."""
    weights, moments = get_state_dict(model, optimiser)
    return {"model": weights, "optimiser": moments}


def load(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Each rank reads what it needs, whatever number of ranks has written it."""
    state = state_of(model, optimiser)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])


def run(options: argparse.Namespace, folder: Path) -> tuple[list[float], list[float], float, float]:
    """On each rank, once they have joined: losses, norms of gradients, the loss of one more batch, and as reloaded."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    rank, world, losses, norms = dist.get_rank(), dist.get_world_size(), [], []
    model, optimiser = build(options.device)
    if options.resume:
        load(options.resume, model, optimiser)
    starts = torch.randint(len(text) - CONTEXT, (options.steps + 1, BATCH, 1))  # seeded alike: the same on all ranks
    windows = text[starts[:, rank::world] + torch.arange(CONTEXT + 1)].long().to(options.device)
    for batch in track(windows[:-1], "training", disable=rank != 0):
        loss = loss_of(model, batch)
        loss.backward()
        norms.append(moekit.ep.clip_grad_norm_(model.parameters(), 1.0).item())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(over_ranks(loss))
    dcp.save(state_of(model, optimiser), checkpoint_id=folder)
    again, its_optimiser = build(options.device)
    load(folder, again, its_optimiser)
    with torch.no_grad():
        after, reloaded = (over_ranks(loss_of(one.eval(), windows[-1])) for one in (model, again))
    if rank == 0:
        here = sum(parameter.to_local().nbytes for _, parameter in moekit.ep.expert_parameters(model.module))
        print(f"Ranks: {world}, {here:,} bytes of experts on each: loss {losses[0]:.4f} to {losses[-1]:.4f} nats a byte")
        print(f"Loss of another batch {after:.4f}; of the model read back from {folder} {reloaded:.4f}")
    return losses, norms, after, reloaded


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float], float, float]:
    """Read the command line, join the other ranks, run and leave them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the checkpoint; a temporary one unless given")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint to begin with")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a second thread costs products of this size more than it brings
    if cuda := options.device == "cuda":
        torch.cuda.set_device(get_node_local_rank(0))
    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    try:
        if BATCH % dist.get_world_size():
            parser.error(f"the batch of {BATCH} windows cannot be shared by {dist.get_world_size()} processes")
        with tempfile.TemporaryDirectory() as mine:
            folder = [options.out or Path(mine)]
            dist.broadcast_object_list(folder, src=0)  # all ranks write where the first one says
            result = run(options, folder[0])
            dist.barrier()  # nobody reads any more
            return result
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    moekit.keep_pages()  # on a CPU: fresh results cost no page faults then
    main()
