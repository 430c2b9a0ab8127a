"""Fine-tune the experts of a Transformers model with its Trainer and PEFT's LoRA; moekit computes the experts.

::

    python examples/trainer_lora.py                                  # a tiny random model, on a CPU
    python examples/trainer_lora.py --model PATH --device cuda --bf16 --tokens 1024 --rate 2e-4 --steps 300

moekit's part is ``register()``, ``experts_implementation="moekit"`` and a callback that logs the experts' load. ``qlora.py``
does the same with experts in 4 bits, in a loop of its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import moekit.hf
import moekit.monitor

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]  # parameters, not modules: [E, 2I, H] and [E, H, I]


class Result(NamedTuple):
    """Held-out losses, nats a token; the largest difference to Transformers' own experts."""

    before: float
    after: float
    reloaded: float
    difference: float


def save_tiny_model(folder: Path) -> None:
    """A random model whose tokens are bytes, in the place of one that is pretrained."""
    config = transformers.Qwen3MoeConfig(
        **{"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 512},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.1},
        **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)


def load(options: argparse.Namespace) -> Any:
    """The model, whose experts run by moekit."""
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    how = {"experts_implementation": "moekit", "dtype": dtype, "device_map": options.device}
    return transformers.AutoModelForCausalLM.from_pretrained(options.model, **how)


def read_text(options: argparse.Namespace) -> Tensor:
    """Tokens of the source of Python's standard library."""
    text = b"".join(file.read_bytes() for file in sorted(Path(os.__file__).parent.glob("*.py")))
    if options.tiny:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    return torch.tensor(tokenizer(text.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"])


def windows_of(tokens: Tensor, length: int) -> list[dict[str, Tensor]]:
    """Stretches of a text that do not overlap, as the Trainer wants them."""
    rows = tokens[: len(tokens) // length * length].long().view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


@torch.no_grad()
def difference_to_eager(model: Any, tokens: Tensor) -> float:
    """Largest difference of logits to those of Transformers' own loop over experts."""
    logits = {}
    for implementation in ("eager", "moekit"):
        model.set_experts_implementation(implementation)
        logits[implementation] = model(tokens.to(model.device)).logits
    return (logits["eager"] - logits["moekit"]).abs().max().item()


def run(options: argparse.Namespace) -> Result:
    """All of it, one after the other."""
    transformers.set_seed(0)
    moekit.hf.register()
    if options.tiny:
        save_tiny_model(options.model)
    tokens, model = read_text(options), load(options)
    heldout = tokens[-len(tokens) // 10 :][: 32 * options.tokens]
    difference = difference_to_eager(model, heldout[None, : options.tokens].long())
    print(f"Logits differ from those of experts_implementation='eager' by {difference:.1e} at most")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapters = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=attention, target_parameters=EXPERTS)
    model = get_peft_model(model, adapters)
    model.print_trainable_parameters()
    arguments = transformers.TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        logging_steps=max(1, options.steps // 10),
        gradient_checkpointing=not options.tiny,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=options.bf16,
        use_cpu=options.device == "cpu",
        save_strategy="no",
        report_to="none",
    )
    windows = {"train_dataset": windows_of(tokens[: -len(tokens) // 10], options.tokens)}
    windows["eval_dataset"] = windows_of(heldout, options.tokens)
    trainer = transformers.Trainer(model, arguments, **windows)
    moekit.monitor.callback(trainer)  # logs moe/load_max_over_mean and so on beside the loss
    before = trainer.evaluate()["eval_loss"]
    speed = trainer.train().metrics["train_samples_per_second"] * options.tokens
    after = trainer.evaluate()["eval_loss"]
    print(f"Held-out loss before training: {before:.4f}, after: {after:.4f} ({speed:,.0f} tokens/s)")
    trainer.save_model()  # the adapters alone
    again = PeftModel.from_pretrained(load(options), options.out)
    reloaded = transformers.Trainer(again, arguments, **windows).evaluate()["eval_loss"]
    print(f"Held-out loss of the adapters read back from {options.out}: {reloaded:.4f}")
    return Result(before, after, reloaded, difference)


def main(arguments: list[str] | None = None) -> Result:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the hub; a tiny random model unless given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="weights and products in bfloat16")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a window")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate; about 2e-4 for a pretrained model")
    parser.add_argument("--out", type=Path, help="folder for the adapters; a temporary one unless given")
    options = parser.parse_args(arguments)
    options.tiny = options.model is None
    if options.tiny:
        torch.set_num_threads(1)  # a second thread costs products of this size more than it brings
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or Path(folder, "tiny")
        options.out = options.out or Path(folder, "adapters")
        return run(options)


if __name__ == "__main__":
    moekit.keep_pages()  # on a CPU: fresh results cost no page faults then
    main()
