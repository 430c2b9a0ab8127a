"""Take LoRA training steps with whole models whose experts are packed, and weigh them: Qwen3-30B-A3B and gpt-oss-20b.

::

    python benchmarks/whole_model.py [--models qwen3 gpt-oss] [--tokens 4096] [--json FILE] [--peers DIR]
    python benchmarks/whole_model.py --tiny --device cpu --tokens 256    # no GPU: to try the script itself

The models are Transformers' own, of the checkpoints' configurations, with random weights. They are built part by part, and a
layer's experts are packed as soon as they exist, so that the dense model never does. Every expert has an adapter of PEFT, of
rank 8 on both weights, in bfloat16 like its gradient and AdamW's two moments; each layer is checkpointed. The same
batch is learned over and over. ``peak`` is the most that PyTorch's allocator had in use from the first weight on.

What is expected of the peak, in GiB:

======================================  =============  ===========
part                                    Qwen3-30B-A3B  gpt-oss-20b
======================================  =============  ===========
experts, packed                                 13.93         9.45
all other weights                                2.87         3.36
adapters and their moments                       1.76         0.49
checkpoints: each layer's input                  0.75         0.53
one layer again, and its backward                0.85         1.00
sum                                              20.2         14.8
limit                                              24           16
======================================  =============  ===========

Gradients (0.59 and 0.16) come as checkpoints go, and the logits of 512 tokens (0.75 and 0.96 with their gradient) go before
the layers come again: neither counts beside the larger one. Of a layer counts what has a row for each expert of a token
(of 2048 and 2 x 768 columns, or 2880 and 2 x 2880), 128 MiB that weights are unpacked in, and attention.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moekit.hf

RANK = 8
CHUNK = 512  # tokens whose logits exist at a time
GIB = 2**30


class Target(NamedTuple):
    """A model, how its experts are packed, and what it should fit in."""

    name: str
    config: str  # the class
    values: dict[str, Any]
    tiny: dict[str, Any]
    packing: dict[str, Any]  # of moekit.hf.pack
    attention: str  # on a GPU; each is the one that keeps no [tokens, tokens]
    limit: float  # GiB


QWEN3 = {
    **{"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "max_position_embeddings": 40960},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
GPT_OSS = {
    **{"vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 24, "max_position_embeddings": 131072},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "sliding_window": 128},
    **{"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880},
}
TINY = {
    **{"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
TARGETS = {
    "qwen3": Target(
        *("Qwen3-30B-A3B", "Qwen3MoeConfig", QWEN3, {**TINY, "num_experts": 8, "moe_intermediate_size": 64}),
        *({"format": "nf4", "double_quant": True}, "sdpa", 24.0),
    ),
    "gpt-oss": Target(
        *("gpt-oss-20b", "GptOssConfig", GPT_OSS, {**TINY, "num_local_experts": 8, "intermediate_size": 64}),
        *({"format": "mxfp4"}, "flex_attention", 16.0),
    ),
}


# --- the model --------------------------------------------------------------------------------------------------------


def build(target: Target, options: argparse.Namespace) -> Any:
    """The model with packed experts; of the dense ones, those of one layer exist at a time."""
    values = target.values | (target.tiny if options.tiny else {})
    if options.layers:
        values["num_hidden_layers"] = options.layers
    config = getattr(transformers, target.config)(**values)
    attention = options.attention or (target.attention if options.device == "cuda" else "eager")
    ways = {"attn_implementation": attention, "experts_implementation": "moekit"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **ways)
    inner = model.model
    for part in (inner.embed_tokens, *inner.layers, inner.norm, inner.rotary_emb, model.lm_head):
        for module in part.modules():
            module.to_empty(device=options.device, recurse=False)
            model._init_weights(module)
        if part in inner.layers:
            moekit.hf.pack(part, **target.packing)
    return model


def adapt(model: Any, device: str) -> list[nn.Parameter]:
    """Freeze the model and put adapters on its experts; the factors."""
    from peft import LoraConfig, get_peft_model

    weights = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_parameters=weights, target_modules=[])
    with torch.device(device):
        get_peft_model(model, config, autocast_adapter_dtype=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """The mean cross entropy of each next token of ``tokens [1, T + 1]``; the logits of all never exist together."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[0]
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, wanted in zip(hidden.split(CHUNK), tokens[0, 1:].split(CHUNK), strict=True):
        total = total + checkpoint(_sum_of_losses, rows, model.lm_head.weight, wanted, use_reentrant=False)
    return total / hidden.shape[0]


def _sum_of_losses(rows: Tensor, head: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, head).float(), wanted, reduction="sum")


# --- measuring --------------------------------------------------------------------------------------------------------


def peak_of(device: str) -> float:
    """GiB: what was allocated at most; of a CPU's process, what was resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def parts_of(model: Any, factors: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, float]:
    """GiB of what is there between two steps."""
    packed = [weight for weight in model.parameters() if isinstance(weight, moekit.PackedExperts)]
    other = [weight for weight in model.parameters() if not isinstance(weight, moekit.PackedExperts)]
    moments = [value for state in optimiser.state.values() for value in state.values() if value.dim()]
    adapters = sum(factor.nbytes for factor in factors)
    sizes = {
        "experts": sum(weight.bytes for weight in packed),
        "other weights": sum(weight.nbytes for weight in other) - adapters,
        "adapters": adapters,
        "moments": sum(moment.nbytes for moment in moments),
    }
    return {name: size / GIB for name, size in sizes.items()}


def train(step: Callable[[], Tensor], steps: int, device: str) -> tuple[list[float], list[float]]:
    """Losses, and seconds a step; the first one compiles."""
    losses, seconds = [], []
    for number in range(steps):
        start = time.perf_counter()
        losses.append(step().item())
        seconds.append(time.perf_counter() - start)
        print(f"  step {number}: loss {losses[-1]:.4f}, {seconds[-1]:.2f} s, peak {peak_of(device):.2f} GiB", flush=True)
    return losses, seconds


def measure(target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """Build, train, and say what it took."""
    device = options.device
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    start = time.perf_counter()
    model = build(target, options)
    building = {"seconds": time.perf_counter() - start, "peak GiB": peak_of(device)}
    print(f"{target.name}, {target.packing['format']}: built in {building['seconds']:.0f} s", flush=True)
    factors = adapt(model, device)
    optimiser = torch.optim.AdamW(factors, lr=options.rate, weight_decay=0.0, fused=True)
    tokens = torch.randint(model.config.vocab_size, (1, options.tokens + 1), device=device)

    def step() -> Tensor:
        loss = loss_of(model, tokens)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    losses, seconds = train(step, options.steps, device)
    typical = statistics.median(seconds[1:])
    row = {"model": target.name, **target.packing, "layers": model.config.num_hidden_layers, "tokens": options.tokens}
    row |= {"attention": model.config._attn_implementation, "peak GiB": peak_of(device), "limit GiB": target.limit}
    if device == "cuda":
        row["reserved GiB"] = torch.cuda.max_memory_reserved() / GIB
    row |= {"seconds a step": typical, "tokens/s": options.tokens / typical, "losses": losses, "building": building}
    return row | {"parts GiB": parts_of(model, factors, optimiser)}


def show(row: dict[str, Any]) -> None:
    """The figures in a few lines."""
    print(f"  peak {row['peak GiB']:.2f} GiB of {row['limit GiB']:.0f}", end="")
    print(f" ({row['reserved GiB']:.2f} reserved)" if "reserved GiB" in row else " (resident)", end="")
    print(f", {row['seconds a step']:.3f} s a step, {row['tokens/s']:,.0f} tokens/s")
    print("  " + ", ".join(f"{name} {size:.3f} GiB" for name, size in row["parts GiB"].items()))
    print(f"  loss {row['losses'][0]:.4f} -> {row['losses'][-1]:.4f} in {len(row['losses'])} steps", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure each model; the exit status says whether all stayed below their limits and learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, help="all unless given")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW's learning rate")
    parser.add_argument("--attention", help="Transformers' name of another implementation")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--peers", type=Path, help="a directory to look for PEFT in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.peers:
        sys.path.append(str(options.peers))
    moekit.hf.register()
    rows = []
    for name in options.models:
        rows.append(measure(TARGETS[name], options))
        show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["peak GiB"] > row["limit GiB"] or row["losses"][-1] >= row["losses"][0] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
