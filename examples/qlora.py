"""Fine-tune a Mixture-of-Experts with its experts in 4 bits: load packed, add LoRA, train, evaluate, save, reload.

::

    python examples/qlora.py                                                  # a tiny random model, on a CPU, in a minute
    python examples/qlora.py --model Qwen/Qwen3-30B-A3B --device cuda --tokens 2048 --batch 1 --rate 2e-4 --steps 300
    python examples/qlora.py --model PATH --data TEXT --out FOLDER --merge    # your text, and a model without an adapter

The text is the source of Python's standard library, or what you have; a tenth of it is held out. Only ``load`` is moekit's:
adapters are made, saved and read back by PEFT, and reach the packed experts without a copy of the weights.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from torch import Tensor

import moekit.hf
from moekit.demo.data import heldout_windows, load_corpus, training_batch

TEXT_BYTES = 4 * 2**20  # tokenised for a real model, at most, of either side


class Result(NamedTuple):
    """Held-out losses (nats a token): before training, after it, of the adapter read back, and merged (None: not asked)."""

    before: float
    after: float
    reloaded: float
    merged: float | None


def save_tiny_model(folder: Path) -> None:
    """A random model whose tokens are bytes, in the place of one that is pretrained."""
    config = transformers.Qwen3MoeConfig(
        **{"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 512},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.1},
        **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)


def load(options: argparse.Namespace) -> Any:
    """The model with packed experts. They are packed as they are read: the dense model is never in memory."""
    return moekit.hf.load(options.model, format=options.format, device_map=options.device)


def add_adapters(model: Any, rank: int) -> PeftModel:
    """LoRA on the weights of all experts, and on attention."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    return get_peft_model(model, config)


def read_text(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Tokens of the training and of the held-out text."""
    corpus = load_corpus(options.data)
    print(f"Text: {corpus.source}, {len(corpus.train):,} bytes, and {len(corpus.heldout):,} held out")
    if options.tiny:
        return corpus.train, corpus.heldout
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    texts = [side[:TEXT_BYTES].numpy().tobytes().decode("utf-8", "replace") for side in (corpus.train, corpus.heldout)]
    train, heldout = (torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return train, heldout


def loss_of(model: PeftModel, batch: Tensor, options: argparse.Namespace) -> Tensor:
    """Mean over each token of ``batch [B, C + 1]`` but the first ones."""
    batch = batch.to(options.device)
    return model(input_ids=batch, labels=batch, use_cache=False).loss


@torch.no_grad()
def evaluate(model: PeftModel, heldout: Tensor, options: argparse.Namespace) -> float:
    """Mean loss of held-out windows, the same ones every time."""
    model.eval()
    windows = heldout_windows(heldout, options.windows, options.tokens)
    losses = [len(batch) * loss_of(model, batch, options).item() for batch in windows.split(options.batch)]
    return sum(losses) / len(windows)


def train(model: PeftModel, tokens: Tensor, options: argparse.Namespace) -> float:
    """Train the adapters; tokens a second."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(factors, lr=options.rate, weight_decay=0.0, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimiser, options.steps // 10, options.steps)
    generator, times = torch.Generator().manual_seed(options.seed), []
    for step in track(range(1, options.steps + 1), "training"):
        loss = loss_of(model, training_batch(tokens, options.batch, options.tokens, generator), options)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step == 1 or step % max(1, options.steps // 10) == 0:
            print(f"step {step:4}/{options.steps}  loss {loss.item():.3f}")
            times.append((step, time.perf_counter()))
    (first, start), (last, end) = times[0], times[-1]  # without the first step, which compiles and allocates
    return (last - first) * options.batch * options.tokens / max(end - start, 1e-9)


def print_sizes(model: PeftModel) -> None:
    """Bytes a part: what is packed, what is not, and what is trained."""
    packed = [weight for weight in model.parameters() if isinstance(weight, moekit.PackedExperts)]
    others = [weight for weight in model.parameters() if not isinstance(weight, moekit.PackedExperts)]
    dense = sum(weight.numel() * weight.element_size() for weight in packed)
    adapters = sum(weight.nbytes for weight in others if weight.requires_grad)
    print(f"  experts   {_size(sum(weight.bytes for weight in packed))} in {packed[0].format}, {_size(dense)} unpacked")
    print(f"  the rest  {_size(sum(weight.nbytes for weight in others) - adapters)}")
    print(f"  adapters  {_size(adapters)}, and three times that for gradients and AdamW")


def peak_memory(device: str) -> str:
    """What was in use at most since the start."""
    if torch.device(device).type == "cuda":
        return f"{_size(torch.cuda.max_memory_allocated(device))} of GPU memory"
    return f"{_size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} of memory, Python and PyTorch included"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def run(options: argparse.Namespace) -> Result:
    """All of it, one after the other."""
    torch.manual_seed(options.seed)
    if options.tiny:
        save_tiny_model(options.model)
    tokens, heldout = read_text(options)
    model = add_adapters(load(options), options.rank)
    print_sizes(model)
    before = evaluate(model, heldout, options)
    print(f"Held-out loss before training: {before:.4f}")
    speed = train(model, tokens, options)
    after = evaluate(model, heldout, options)
    print(f"Held-out loss after training:  {after:.4f} ({speed:,.0f} tokens/s)")
    print(f"Peak: {peak_memory(options.device)}")
    model.save_pretrained(options.out)
    del model  # the GPU need not hold two
    fresh = PeftModel.from_pretrained(load(options), options.out)
    reloaded = evaluate(fresh, heldout, options)
    print(f"Held-out loss of the adapter, read back from {options.out}: {reloaded:.4f}")
    merged = None
    if options.merge:
        whole = fresh.merge_and_unload()  # unpacks an expert, adds the adapter, and packs it again
        merged = evaluate(whole, heldout, options)
        whole.save_pretrained(options.out / "merged")
        print(f"Held-out loss of the model with the adapter merged, {options.out / 'merged'}: {merged:.4f}")
    return Result(before, after, reloaded, merged)


def main(arguments: list[str] | None = None) -> Result:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the hub; a tiny random model unless given")
    parser.add_argument("--format", default="auto", help="auto (the checkpoint's own, or nf4), nf4, mxfp4, fp8 or int8")
    parser.add_argument("--data", type=Path, help="a file or folder of text; Python's own source unless given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a window")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate; about 2e-4 for a pretrained model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the adapter; a temporary one unless given")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the packed weights, too")
    options = parser.parse_args(arguments)
    options.tiny = options.model is None
    if options.tiny:
        torch.set_num_threads(1)  # a second thread costs products of this size more than it brings
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or Path(folder, "tiny")
        options.out = options.out or Path(folder, "adapter")
        return run(options)


if __name__ == "__main__":
    moekit.keep_pages()  # on a CPU: fresh results cost no page faults then
    main()
