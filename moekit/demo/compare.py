"""What ``--compare`` adds: the plain layer trained beside moekit's, and the figures of the two.

The plain run takes moekit's choice of experts. Where a token's second and third expert tie within float32 rounding, two
correct runs choose differently, and from there on they part as any two runs do whose sums are rounded differently;
with the choice shared, what is left is the layers' arithmetic. How often the plain router's own choice differs is
counted and shown.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from moekit.demo.model import ByteLM, LoopMoE
from moekit.demo.train import Run

# The first steps pay for caches and thread pools.
_WARM_UP_STEPS = 3


def step_together(run: Run, rival: Run) -> int:
    """One step of each, the rival with the run's choice of experts.

    Returns:
        how many times, over tokens and layers, the rival's router on its own would have chosen other experts.
    """
    run.step()
    pairs = list(zip(run.model.layers, rival.model.layers, strict=True))
    for layer, plain in pairs:
        if isinstance(plain, LoopMoE):
            plain.given = layer.indices
    rival.step()
    for _, plain in pairs:
        if isinstance(plain, LoopMoE):
            plain.given = None
    return sum(_differing(layer.indices, plain.indices) for layer, plain in pairs)


def _differing(indices: Tensor, others: Tensor) -> int:
    """Tokens whose sets of experts differ."""
    return int((indices.sort(1).values != others.sort(1).values).any(1).sum())


def saved_for_backward(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass of the layer keeps for its backward pass.

    Counts whole storages, each once, as they are what stays allocated. The layer's parameters and its input ``x``
    exist without it and are not counted.
    """
    x = x.detach().requires_grad_()
    layer.train()
    theirs = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses unique

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    del out
    return sum(storage.nbytes() for storage in kept.values())


@torch.no_grad()
def layer_input(model: ByteLM, windows: Tensor) -> Tensor:
    """``[T, H]``: what the first mixture layer receives for ``windows [B, C]``."""
    caught: list[Tensor] = []
    model.eval()
    handle = model.layers[0].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(windows)
    handle.remove()
    return caught[0]


def step_milliseconds(run: Run) -> float:
    """Median duration of a training step."""
    return 1000 * statistics.median(run.seconds[_WARM_UP_STEPS:] or run.seconds)


def largest_difference(run: Run, other: Run) -> tuple[float, int]:
    """The largest difference of the two runs' losses over the steps that both made, and its step."""
    differences = [abs(a - b) for a, b in zip(run.losses, other.losses, strict=False)]
    largest = max(differences)
    return largest, differences.index(largest) + 1
