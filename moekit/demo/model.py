"""The language model of the demo: a byte-level decoder whose feed-forward layers are mixtures of SwiGLU experts.

:class:`MoE` is moekit's layer, :class:`LoopMoE` is the same layer in plain PyTorch, one expert after another.
Both have the same parameters and, up to the order of float32 sums, the same outputs and gradients.

Sources: SwiGLU, arXiv 2002.05202; load-balancing loss, Switch Transformer, arXiv 2101.03961; rotary position
embeddings, arXiv 2104.09864; normalised queries and keys, arXiv 2302.05442.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moekit.nn
from moekit.demo.config import Config

BYTE_VALUES = 256
# A router that begins collapsed: the spread of its logits, and what the experts that take everything are ahead by.
_COLLAPSED_STD = 0.1
_COLLAPSED_BIAS = 0.5


class MoE(moekit.nn.MoE):
    """The layer of :mod:`moekit.nn` in the sizes of the demo: a top-k mixture of SwiGLU experts, ``[T, H]`` to ``[T, H]``.

    Attributes:
        indices: ``[T, K]``, the experts of each token in the last forward pass.
        load: ``[E]`` int64, tokens of each expert in that pass.
        extra_loss: what the caller has to add to its loss; here 0, because the loss travels with the output.
    """

    def __init__(self, config: Config) -> None:
        by_bias, collapsed = config.balance == "bias", config.collapsed > 0
        options: dict[str, Any] = {"select_by": "logits", "expert_bias": by_bias, "logit_bias": collapsed}
        router = moekit.nn.Router(config.hidden, config.experts, config.topk, **options)
        experts = moekit.nn.Experts(config.experts, config.hidden, config.intermediate)
        super().__init__(router, experts, balance_coeff=config.balance_coeff if config.balance == "loss" else 0.0)
        for weight in (router.weight, experts.gate_up, experts.down):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        if router.bias is not None:
            _collapse(router.weight, router.bias, config.collapsed)
        self.indices = torch.zeros(0, config.topk, dtype=torch.int64)
        self.load = torch.zeros(config.experts, dtype=torch.int64)
        self.extra_loss: Tensor | float = 0.0

    def forward(self, x_TH: Tensor) -> Tensor:
        """Route every token to its experts and sum what they make of it."""
        out_TH = super().forward(x_TH)
        indices, load = self.router.indices, self.router.tokens_per_expert
        if indices is not None and load is not None:
            self.indices, self.load = indices, load
        return out_TH


@torch.no_grad()
def _collapse(weight: Tensor, bias: Tensor, experts: int) -> None:
    """Make a router that sends every token to its first experts: small weights, and a bias far above what they give."""
    weight.mul_(_COLLAPSED_STD)
    bias[:experts] = _COLLAPSED_BIAS


class LoopMoE(MoE):
    """The same layer in plain PyTorch: a loop over the experts, each gathering its tokens and adding its outputs.

    Attributes:
        given: ``[T, K]`` experts to use in the next forward pass in place of the router's choice, or None.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.topk = config.topk
        self.given: Tensor | None = None

    def forward(self, x_TH: Tensor) -> Tensor:
        """Route every token to its experts and sum what they make of it."""
        logits_TE = F.linear(x_TH, self.router.weight, self.router.bias)
        compared_TE = logits_TE if self.router.expert_bias is None else logits_TE + self.router.expert_bias
        self.indices = compared_TE.topk(self.topk, dim=-1).indices
        indices_TK = self.indices if self.given is None else self.given
        weights_TK = logits_TE.gather(1, indices_TK).softmax(-1)
        out_TH = torch.zeros_like(x_TH)
        # unbind has one gradient for all experts; indexing each expert would make a full-sized one every time
        for expert, (w_in, w_out) in enumerate(zip(self.experts.gate_up.unbind(), self.experts.down.unbind(), strict=True)):
            token, slot = torch.where(indices_TK == expert)
            gate, up = F.linear(x_TH[token], w_in).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, w_out)
            out_TH = out_TH.index_add(0, token, rows * weights_TK[token, slot].unsqueeze(1))
        self.load = torch.bincount(indices_TK.flatten(), minlength=logits_TE.shape[1])
        if self.training and self.router.expert_counts is not None:
            self.router.expert_counts += self.load
        share_E = self.load / indices_TK.numel()
        balance = len(share_E) * (share_E * logits_TE.softmax(-1).mean(0)).sum()
        self.extra_loss = self.balance_coeff * balance
        return out_TH


class Block(nn.Module):
    """Causal self-attention, then a mixture of experts, each behind a norm and added to the residual stream."""

    def __init__(self, config: Config, layer: type[MoE]) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.project = nn.Linear(config.hidden, config.hidden, bias=False)
        self.moe_norm = nn.RMSNorm(config.hidden)
        self.moe = layer(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """``[B, C, H]`` to ``[B, C, H]``."""
        x = x + self._attend(self.attention_norm(x), rotation)
        return x + self.moe(self.moe_norm(x).flatten(0, 1)).view_as(x)

    def _attend(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (_rotate(F.rms_norm(t, t.shape[-1:]), rotation) for t in (query, key))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(out.transpose(1, 2).flatten(-2))


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding: turn each pair of features by an angle that grows with the position."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class ByteLM(nn.Module):
    """Decoder over bytes: ``[B, C]`` int64 to logits ``[B, C, V]`` of the byte that follows each."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config, layer: type[MoE] = MoE) -> None:
        super().__init__()
        self.context = config.context
        self.embedding = nn.Embedding(BYTE_VALUES, config.hidden)
        self.blocks = nn.ModuleList(Block(config, layer) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, BYTE_VALUES, bias=False)
        nn.init.zeros_(self.head.weight)  # the first prediction is uniform: 8 bits per byte
        pairs = config.hidden // config.heads // 2
        angles = torch.outer(torch.arange(config.context), 10_000 ** -(torch.arange(pairs) / pairs))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @property
    def layers(self) -> list[MoE]:
        """The mixture layers, first to last."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def forward(self, windows: Tensor) -> Tensor:
        """Logits of every position's next byte."""
        length = windows.shape[1]
        rotation = (self.cos[:length], self.sin[:length])
        x = self.embedding(windows)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))

    def loss(self, windows: Tensor, called: nn.Module | None = None) -> Tensor:
        """Mean cross-entropy in nats over ``windows [N, C + 1]``, every byte given those before it in its window.

        ``called``: what to call in place of the model, such as the DistributedDataParallel around it.
        """
        logits = (self if called is None else called)(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def load(self) -> Tensor:
        """``[L, E]`` int64: tokens of each layer's experts in the last forward pass."""
        return torch.stack([layer.load for layer in self.layers])

    def set_balance(self, coeff: float) -> None:
        """Set the weight of every layer's load-balancing loss."""
        for layer in self.layers:
            layer.balance_coeff = coeff

    def update_bias(self, rate: float, group: Any = None) -> None:
        """Let every router's bias follow what was chosen since the last time, by all processes of a group."""
        for layer in self.layers:
            layer.router.update_bias(rate, group)


def build_model(config: Config, seed: int, device: torch.device, layer: type[MoE] = MoE) -> ByteLM:
    """A fresh model whose parameters depend on the seed alone, not on ``layer`` or ``device``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ByteLM(config, layer).to(device)


@torch.no_grad()
def sample(model: ByteLM, prompt: bytes, length: int, seed: int, temperature: float = 0.8) -> bytes:
    """Continue the prompt by ``length`` bytes, each drawn from the model's distribution."""
    model.eval()
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(length):
        window = torch.tensor([text[-model.context :]], device=device)
        probs = (model(window)[0, -1] / temperature).softmax(-1).cpu()
        text.append(int(torch.multinomial(probs, 1, generator=generator)))
    return bytes(text)
