"""moekit.hf under the tensor, expert and data parallelism of Transformers, on two gloo ranks: as on one."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moekit.hf

transformers = pytest.importorskip("transformers")

WORLD = 2
LAYOUTS = {
    "tensor parallel": {"tp_size": 2},
    "expert parallel, all-to-all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "expert parallel, all-reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "expert parallel and FSDP2": {"fsdp_size": 2, "ep_size": 2},
    "FSDP2": {"fsdp_size": 2},
}
# Two experts a rank, and top 2 of 4; then one a rank, and top 2 of 2: K above the experts of a rank.
MODELS = {
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 8},
}
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def tokens() -> Tensor:
    return torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(5))


def step(model: torch.nn.Module) -> dict[str, Tensor]:
    """The loss, the logits and the gradients of one step, gathered."""
    model.train()
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    whole = lambda value: value.full_tensor() if hasattr(value, "full_tensor") else value  # noqa: E731
    grads = {name: whole(p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": whole(out.logits).detach(), **grads}


def rank_of(rank: int, folder: str) -> None:
    """What one rank does: every model under every layout, with eager experts and with moekit's."""
    from transformers.distributed import DistributedConfig

    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    moekit.hf.register()
    found = {}
    for kind in MODELS:
        for layout, settings in LAYOUTS.items():
            for implementation in ("grouped_mm", "moekit"):
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    f"{folder}/{kind}",
                    distributed_config=DistributedConfig(**settings),
                    experts_implementation=implementation,
                    dtype=torch.float32,
                )
                found[kind, layout, implementation] = step(model)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_parallel_models_are_as_with_grouped_mm(tmp_path: Path):
    alone = {}
    for kind, settings in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**COMMON, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager", dtype=torch.float32)
        model.save_pretrained(tmp_path / kind)
        alone[kind] = step(model)
    torch.multiprocessing.spawn(rank_of, args=(str(tmp_path),), nprocs=WORLD)
    found = torch.load(tmp_path / "found.pt")
    for (kind, layout, implementation), values in found.items():
        if implementation == "moekit":
            peer = found[kind, layout, "grouped_mm"]
            assert values.keys() == peer.keys()
            for name, value in values.items():
                assert (value - peer[name]).abs().max() <= 1e-5 * peer[name].abs().max() + 1e-7, (kind, layout, name)
            for name in ("loss", "logits"):
                wanted = alone[kind][name]
                assert (values[name] - wanted).abs().max() <= 1e-4 * wanted.abs().max(), (kind, layout, name)
