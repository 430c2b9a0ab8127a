"""A language model of one's own with ``moekit.nn``: defined, trained, kept in balance, saved and loaded.

::

    python examples/language_model.py                                # 200 steps on a CPU
    python examples/language_model.py --steps 2000 --device cuda --file model.pt

Its tokens are bytes, its text is the source of Python's standard library, of which a tenth is held out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

import moekit.monitor
import moekit.nn

HIDDEN, CONTEXT, BATCH, LAYERS = 64, 64, 16, 2


class Result(NamedTuple):
    """Held-out losses, nats a byte; the model as it was read back; the busiest expert's load over the mean, in time."""

    before: float
    after: float
    reloaded: float
    model: LanguageModel
    busiest: list[float]


class Block(nn.Module):
    """Attention, then experts in the place of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, 4, bias=False, batch_first=True)
        # As DeepSeek-V3: sigmoid scores, a bias that balances, a shared expert. The last option attaches its loss.
        options = {"score": "sigmoid", "expert_bias": True, "sequence_balance_coeff": 1e-4}
        self.moe = moekit.nn.MoE.build(HIDDEN, 64, num_experts=8, k=2, shared_intermediate=64, **options)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H]`` to the same."""
        y, mask = self.attention_norm(x), nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device)
        x = x + self.attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.moe(self.moe_norm(x))


class LanguageModel(nn.Module):
    """Bytes to logits of the byte after each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(256, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, C]`` to ``[B, C, 256]``."""
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.places.weight[: tokens.shape[1]])))

    def loss(self, windows: Tensor) -> Tensor:
        """Mean over each byte of ``windows [B, C + 1]`` but the first ones."""
        return nn.functional.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def read_text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    cut = len(text) - len(text) // 10
    return text[:cut], text[cut:]


def windows_at(text: Tensor, starts: Tensor, device: str) -> Tensor:
    """``[B, C + 1]``: inputs and the byte after each."""
    return text[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)].long().to(device)


@torch.no_grad()
def evaluate(model: LanguageModel, heldout: Tensor, device: str) -> float:
    """Mean loss of 64 windows, the same ones every time."""
    model.eval()  # nothing is counted for the balance, no loss is attached
    starts = torch.linspace(0, len(heldout) - CONTEXT - 1, 64, dtype=torch.float64).long()
    return model.loss(windows_at(heldout, starts, device)).item()


def train(model: LanguageModel, text: Tensor, steps: int, device: str) -> list[float]:
    """Train; the busiest expert's load over the mean, every tenth of the way."""
    model.train()
    matrices, gains = ([p for p in model.parameters() if (p.dim() > 1) is wide] for wide in (True, False))
    optimiser = torch.optim.AdamW([{"params": matrices}, {"params": gains, "weight_decay": 0.0}], lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=steps)
    routers = [module for module in model.modules() if isinstance(module, moekit.nn.Router)]
    monitor = moekit.monitor.attach(model)  # counts on the device; only what is read is waited for
    generator, busiest = torch.Generator().manual_seed(0), []
    for step in track(range(1, steps + 1), "training"):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)
        loss = model.loss(windows_at(text, starts, device))
        loss.backward()  # of the experts' losses as well: they travel with the layers' outputs
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        for router in routers:
            router.update_bias(rate=1e-2)
        if step % max(1, steps // 10) == 0:
            busiest.append(monitor.read(layers=False)["worst_load_max_over_mean"])
            print(f"step {step:4}  loss {loss.item():.3f}  busiest expert {busiest[-1]:.2f} times the mean")
    return busiest


def main(arguments: list[str] | None = None) -> Result:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--file", type=Path, help="where to save the model; a temporary file unless given")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)  # a second thread costs products of this size more than it brings
    text, heldout = read_text()
    model = LanguageModel().to(options.device)  # routers stay in float32 whatever the dtype
    before = evaluate(model, heldout, options.device)
    busiest = train(model, text, options.steps, options.device)
    after = evaluate(model, heldout, options.device)
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or Path(folder, "model.pt")
        torch.save(model.state_dict(), file)
        again = LanguageModel().to(options.device)
        again.load_state_dict(torch.load(file, map_location=options.device))
    reloaded = evaluate(again, heldout, options.device)
    print(f"Held-out loss before training {before:.4f}, after it {after:.4f}, of the model read back {reloaded:.4f}")
    return Result(before, after, reloaded, again, busiest)


if __name__ == "__main__":
    moekit.keep_pages()  # on a CPU: fresh results cost no page faults then
    main()
