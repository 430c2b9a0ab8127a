"""moekit in the place of NeMo Automodel's and Megatron-core's ``moe_utils``: change an import, or ``install()`` and no code.

::

    python examples/drop_in.py                               # moekit.moe_utils beside plain PyTorch
    pip install --no-deps nemo-automodel megatron-core       # either of them: it is measured as well,
    python examples/drop_in.py                               # and again with moekit in the place of its functions
    python examples/drop_in.py --tokens 16384 --bf16 --device cuda

One layer, written as the frameworks write it, over the functions of one module or another. Errors are to float64.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import timeit
from collections.abc import Callable
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import moekit
import moekit.compat
import moekit.moe_utils

FRAMEWORKS = ("nemo_automodel.components.moe.megatron.moe_utils", "megatron.core.transformer.moe.moe_utils")
HIDDEN, INTERMEDIATE, EXPERTS, TOPK = 256, 128, 16, 4
Layer = Callable[..., Tensor]  # of tokens [T, H], router [H, E], gate_up [E, H, 2I] and down [E, I, H]
console = Console(highlight=False, markup=False)


def route(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """``probs, routing_map``, ``[T, E]`` each, as the frameworks have them. Whatever x is, experts are chosen in float32."""
    scores = (x.to(router.dtype) @ router).softmax(1)
    routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(TOPK, dim=1).indices, True)
    return scores * routing_map, routing_map


def by_module(utils: ModuleType, x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The layer over ``permute`` and ``unpermute`` of ``utils``, and the gated activation of those that have it there."""
    probs, routing_map = route(x, router)
    ends = routing_map.sum(0).cumsum(0, dtype=torch.int32)
    rows, row_probs, order = utils.permute(x, routing_map, probs=probs, num_out_tokens=len(x) * TOPK)[:3]
    hidden = F.grouped_mm(rows, gate_up, offs=ends)
    if hasattr(utils, "weighted_bias_swiglu_impl"):
        hidden = utils.weighted_bias_swiglu_impl(hidden, row_probs.unsqueeze(1))
    else:  # Megatron-core's is in another module
        gate, up = hidden.chunk(2, dim=1)
        hidden = (F.silu(gate) * up * row_probs.unsqueeze(1)).to(hidden.dtype)
    return utils.unpermute(F.grouped_mm(hidden, down, offs=ends), order, x.shape)


def by_experts(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same in moekit's own terms: one operator, which keeps one tensor of row size for backward."""
    probs, routing_map = route(x, router)
    routing = moekit.Routing.from_map(routing_map, probs, topk=TOPK)
    return moekit.experts(x, routing, gate_up.mT, down.mT)  # [E, 2I, H] and [E, H, I]


def by_loop(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same in plain PyTorch, an expert at a time."""
    probs, routing_map = route(x, router)
    out = torch.zeros_like(x)
    for expert, chosen in enumerate(routing_map.T):
        tokens = chosen.nonzero().squeeze(1)
        gate, up = (x[tokens] @ gate_up[expert]).chunk(2, dim=1)
        hidden = F.silu(gate) * up * probs[tokens, expert].unsqueeze(1)
        out = out.index_add(0, tokens, hidden.to(x.dtype) @ down[expert])
    return out


def step(layer: Layer, leaves: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the tokens and of the weights."""
    out = layer(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def measure(layer: Layer, leaves: list[Tensor], exact: list[Tensor]) -> tuple[float, float, int, float]:
    """Largest errors of output and gradients, as shares of the largest value; bytes kept for backward; seconds of a step."""
    kept = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = layer(*leaves)
    del out  # until here no two tensors had one place
    for leaf in leaves:  # is there anyway
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    found = step(layer, leaves)
    errors = [((ours - true).abs().max() / true.abs().max()).item() for ours, true in zip(found, exact, strict=True)]
    seconds = timeit.repeat(lambda: step(layer, leaves)[0].sum().item(), number=1, repeat=10)  # .item() waits for a GPU
    return errors[0], max(errors[1:]), sum(kept.values()), min(seconds)


def run(options: argparse.Namespace) -> dict[str, tuple[float, float, int, float]]:
    """Measure all that is there."""
    torch.manual_seed(0)
    sizes = (options.tokens, HIDDEN), (HIDDEN, EXPERTS), (EXPERTS, HIDDEN, 2 * INTERMEDIATE), (EXPERTS, INTERMEDIATE, HIDDEN)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    dtypes = dtype, torch.float32, dtype, dtype  # the router's weight stays as it is
    leaves = [(torch.randn(size) / HIDDEN**0.5).to(options.device, kind) for size, kind in zip(sizes, dtypes, strict=True)]
    exact = step(by_loop, [leaf.double().requires_grad_() for leaf in leaves])
    measured = functools.partial(measure, leaves=[leaf.requires_grad_() for leaf in leaves], exact=exact)
    results = {"plain PyTorch": measured(by_loop), "moekit.experts": measured(by_experts)}
    results["moekit.moe_utils"] = measured(functools.partial(by_module, moekit.moe_utils))
    for name in FRAMEWORKS:
        short = name.split(".")[0]
        try:
            layer = functools.partial(by_module, importlib.import_module(name))
        except ImportError as error:
            console.print(f"{short} cannot be imported, so it is left out: {error}")
            continue
        results[short] = measured(layer)
        with moekit.compat.install() as done:  # in a program, at its start: moekit.compat.install()
            results[f"{short} after install()"] = measured(layer)
        console.print(f"{short}: install() replaced {sum(one.startswith(name) for one in done.names)} names")
    return results


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float, int, float]]:
    """Read the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--bf16", action="store_true", help="experts and tokens in bfloat16")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)  # a second thread costs products of this size more than it brings
    results = run(options)
    table = Table("functions of", "error", "gradients'", "MiB kept", "ms a step", box=None)
    for name, (error, gradient_error, kept, seconds) in results.items():
        table.add_row(name, f"{error:.1e}", f"{gradient_error:.1e}", f"{kept / 2**20:.2f}", f"{1e3 * seconds:.1f}")
    console.print(table)
    return results


if __name__ == "__main__":
    moekit.keep_pages()  # on a CPU: fresh results cost no page faults then
    main()
