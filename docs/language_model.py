"""Define, train, watch, save and load a Mixture-of-Experts language model: python docs/language_model.py [STEPS]."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moekit.monitor
import moekit.nn

HIDDEN, CONTEXT, BATCH, LAYERS = 64, 64, 16, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, 4, bias=False, batch_first=True)
        # As DeepSeek-V3: sigmoid scores, a bias that balances, a shared expert. The last option attaches its loss.
        options = {"score": "sigmoid", "expert_bias": True, "sequence_balance_coeff": 1e-4}
        self.moe = moekit.nn.MoE.build(HIDDEN, 64, num_experts=8, k=2, shared_intermediate=64, **options)

    def forward(self, x: Tensor) -> Tensor:
        mask, y = nn.Transformer.generate_square_subsequent_mask(x.shape[1]), self.attention_norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.moe(self.moe_norm(x))


class LanguageModel(nn.Sequential):
    def __init__(self) -> None:
        blocks = (Block() for _ in range(LAYERS))
        super().__init__(nn.Embedding(256, HIDDEN), *blocks, nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256))

    def loss(self, windows: Tensor) -> Tensor:
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def main(steps: int = 200, file: str = "language_model.pt") -> tuple[list[float], LanguageModel, LanguageModel]:
    torch.manual_seed(0)
    text = b"".join(path.read_bytes() for path in sorted(Path(moekit.nn.__file__).parents[1].rglob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    model = LanguageModel()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    routers = [module for module in model.modules() if isinstance(module, moekit.nn.Router)]
    monitor = moekit.monitor.attach(model)  # counts on the device; only what is read is waited for
    losses = []
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1))
        loss = model.loss(data[starts + torch.arange(CONTEXT + 1)].long())
        loss.backward()  # of the experts' losses as well: they travel with the layers' outputs
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        for router in routers:
            router.update_bias(rate=1e-2)
        if step % 20 == 0:
            load = monitor.read(layers=False)
            print(f"step {step:4}  loss {losses[-1]:.3f}  busiest expert {load['load_max_over_mean']:.2f} times the mean")
    torch.save(model.state_dict(), file)
    with torch.device("meta"):
        again = LanguageModel()
    again.load_state_dict(torch.load(file), assign=True)
    return losses, model.eval(), again.eval()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
