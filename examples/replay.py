"""Reinforcement learning on the experts that the rollout chose: ``moekit.Replay`` and ``moekit.Choices``.

::

    python examples/replay.py                       # a tiny random model learns to write lower-case letters
    python examples/replay.py --no-replay           # the same, the trainer's routers choosing by themselves
    python examples/replay.py --steps 100 --device cuda

An inference engine computes routers a little differently from a trainer, so that tokens meet other experts in training than
those that produced them (R3, arXiv 2510.11370). Here the engine is a copy of the model in bfloat16, asked with ``generate``.
It returns what vLLM and SGLang do: tokens, their log-probabilities, and ``routed_experts``, ``[tokens, layers, K]``.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from rich.progress import track
from torch import Tensor

import moekit
import moekit.hf

PROMPTS, SAMPLES, PROMPT, NEW = 4, 8, 8, 24  # prompts, samples of each, tokens of a prompt, new tokens
SETTLED = 2.0  # importance weights above are cut


class Rollout(NamedTuple):
    """What an engine returns: B sequences of C tokens, the last N of them sampled."""

    tokens: Tensor  # [B, C]
    log_probs: Tensor  # [B, N]
    routed_experts: list[np.ndarray]  # for each sequence [C - 1, layers, K]: the last token was sampled and never ran


class Step(NamedTuple):
    """Mean reward; share of choices that the trainer makes otherwise; mean difference of log-probabilities, both ways."""

    reward: float
    other_choices: float
    without_replay: float
    with_replay: float


def tiny_model(device: str) -> Any:
    """A random model whose tokens are bytes."""
    config = transformers.Qwen3MoeConfig(
        **{"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 64},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2},
        **{"num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    )
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moekit")
    model.generation_config = transformers.GenerationConfig(do_sample=True, top_k=0, top_p=1.0, pad_token_id=0)
    return model.to(device).eval()  # as the engine: nothing is dropped or jittered


@torch.no_grad()
def roll_out(model: Any, prompts: Tensor) -> Rollout:
    """Sample from today's weights as an engine has them."""
    engine = copy.deepcopy(model).to(torch.bfloat16)
    replay = moekit.Replay(engine)
    with replay.record() as choices:  # a pass for the prompts, then one for each token but the last
        lengths = {"attention_mask": torch.ones_like(prompts), "min_new_tokens": NEW, "max_new_tokens": NEW}
        out = engine.generate(prompts, **lengths, output_logits=True, return_dict_in_generate=True)
    passes = [torch.stack(layers, 1).unflatten(0, (len(prompts), -1)) for layers in choices.passes]
    routed = torch.cat(passes, 1).cpu().numpy()
    logits = torch.stack(out.logits, 1).float()
    return Rollout(out.sequences, log_probs_of(logits, out.sequences[:, -NEW:]), list(routed))


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of ``tokens [B, N]`` under ``logits [B, N, V]``."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def log_probs(model: Any, rollout: Rollout) -> Tensor:
    """Those of the sampled tokens, by the trainer's model: one pass over all sequences."""
    return log_probs_of(model(rollout.tokens[:, :-1], use_cache=False).logits[:, -NEW:], rollout.tokens[:, -NEW:])


def reward_of(rollout: Rollout) -> Tensor:
    """``[B]``: the share of lower-case letters among the new tokens."""
    new = rollout.tokens[:, -NEW:]
    return ((new >= ord("a")) & (new <= ord("z"))).float().mean(1)


def train_step(model: Any, replay: moekit.Replay, optimiser: torch.optim.Optimizer, prompts: Tensor, play: bool) -> Step:
    """A rollout, and a step on it."""
    rollout = roll_out(model, prompts.repeat_interleave(SAMPLES, 0))
    # The sequences one after the other, as the trainer's pass has them.
    choices = moekit.Choices.from_array(np.concatenate(rollout.routed_experts)).to(prompts.device)
    with torch.no_grad(), replay.record() as own:
        without = log_probs(model, rollout)
    with replay.play(choices):
        replayed = log_probs(model, rollout)
    now = replayed if play else log_probs(model, rollout)
    reward = reward_of(rollout)
    grouped = reward.view(-1, SAMPLES)  # GRPO: a sample against the others of its prompt
    advantage = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    weight = (now.detach() - rollout.log_probs).exp().clamp(max=SETTLED)  # what the engine's numbers are off by
    (-(weight * advantage * now).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    ours, theirs = own.to_array(), choices.to_array()
    same = (ours[..., None] == theirs[..., None, :]).any(-1)  # in whatever order
    off = [(found.detach() - rollout.log_probs).abs().mean().item() for found in (without, replayed)]
    return Step(reward.mean().item(), 1 - float(same.mean()), *off)


def main(arguments: list[str] | None = None) -> list[Step]:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-replay", action="store_true", help="train on the choices of the trainer's routers")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)  # a second thread costs products of this size more than it brings
    moekit.hf.register()
    model = tiny_model(options.device)
    replay = moekit.Replay(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    prompts = torch.randint(256, (PROMPTS, PROMPT), device=options.device)
    print("step  reward  other choices  log-probabilities off by: without replay    with")
    steps = []
    for step in track(range(1, options.steps + 1), "training"):
        steps.append(found := train_step(model, replay, optimiser, prompts, not options.no_replay))
        if step == 1 or step % max(1, options.steps // 10) == 0:
            off = f"{found.without_replay:40.4f}  {found.with_replay:.4f}"
            print(f"{step:4}  {found.reward:6.3f}  {found.other_choices:13.1%}  {off}")
    return steps


if __name__ == "__main__":
    moekit.keep_pages()  # on a CPU: fresh results cost no page faults then
    main()
