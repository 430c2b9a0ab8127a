"""``torch.compile``, activation checkpointing, autocast and CUDA graphs with ``moekit.nn``; how to see that nothing breaks.

::

    python examples/compile_and_graphs.py                          # graphs run as they are: no compiler is needed
    python examples/compile_and_graphs.py --backend inductor       # compiled to C++, which takes a minute on a laptop
    python examples/compile_and_graphs.py --device cuda            # inductor, and a CUDA graph
    TORCH_LOGS=graph_breaks,recompiles python examples/compile_and_graphs.py    # what PyTorch itself has to say

Each way to run a training step is compared with the plain one: results, bytes kept for backward, time.
"""

from __future__ import annotations

import argparse
import copy
import timeit
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moekit
import moekit.nn

HIDDEN, LAYERS = 128, 3
Step = Callable[[Tensor], list[Tensor]]  # from a batch to the output and the gradients of the parameters
console = Console(highlight=False, markup=False)


class Model(nn.Module):
    """Experts beside residuals. Layers that are checkpointed keep their input alone, and compute the rest again."""

    def __init__(self) -> None:
        super().__init__()
        options = {"num_experts": 8, "k": 2, "shared_intermediate": 64, "balance_coeff": 0.01}
        self.layers = nn.ModuleList(moekit.nn.MoE.build(HIDDEN, 128, **options) for _ in range(LAYERS))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H]`` to the same."""
        for layer in self.layers:
            y = nn.functional.rms_norm(x, (HIDDEN,))
            x = x + (checkpoint(layer, y, use_reentrant=False) if self.checkpointed else layer(y))
        return x


def step_of(model: Model, autocast: bool = False) -> Step:
    """Forward and backward."""
    parameters = list(model.parameters())

    def step(x: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):  # routers compute in float32 all the same
            out = model(x)
        return [out.detach(), *torch.autograd.grad(out.square().mean(), parameters)]

    return step


def graphed(step: Step, x: Tensor) -> Step:
    """The step as a CUDA graph, which is possible as no operator waits for the GPU."""
    static, stream, graph = x.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and memory is found before the capture
            step(static)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = step(static)

    def replay(x: Tensor) -> list[Tensor]:
        static.copy_(x)
        graph.replay()
        return found

    return replay


def measure(step: Step, x: Tensor, plain: list[Tensor]) -> tuple[float, float, int, float]:
    """How far output and gradients are from the plain step's; bytes kept for backward (0 of a CUDA graph); seconds."""
    kept = {}

    def count(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        found = step(x)
    output, gradients = off_by(found[:1], plain[:1]), off_by(found[1:], plain[1:])
    seconds = timeit.repeat(lambda: step(x)[0].sum().item(), number=1, repeat=5)  # .item() waits for a GPU
    return output, gradients, sum(kept.values()), min(seconds)


def off_by(found: list[Tensor], plain: list[Tensor]) -> float:
    """The norm of all differences as a share of the norm of all values."""
    differences = torch.stack([(one - other).norm() for one, other in zip(found, plain, strict=True)])
    return (differences.norm() / torch.stack([other.norm() for other in plain]).norm()).item()


def run(options: argparse.Namespace) -> dict[str, tuple[float, float, int, float]]:
    """All ways, one after the other."""
    torch.manual_seed(0)
    model = Model().to(options.device)
    x = torch.randn(4, 128, HIDDEN, device=options.device)
    report = torch._dynamo.explain(model)(x)
    console.print(f"torch._dynamo.explain: {report.graph_count} graph, {report.graph_break_count} breaks")
    compiled = copy.deepcopy(model)
    for layer in compiled.layers:  # compiled once for all; checkpointing stays outside
        layer.compile(fullgraph=True, backend=options.backend)  # a break would be an error
    ways = {"plain": step_of(model), "compiled": step_of(compiled), "autocast": step_of(model, autocast=True)}
    if options.device == "cuda":
        ways["CUDA graph"] = graphed(ways["plain"], torch.randn_like(x))
    else:
        console.print("no CUDA graph without a GPU")
    true = [tensor.clone() for tensor in ways["plain"](x)]
    results = {name: measure(step, x, true) for name, step in ways.items()}
    ways["compiled"](x[:, :96])  # another length compiles once more, with sizes that are symbols: any will do then
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (128, 96, 57, 3):
            ways["compiled"](x[:, :length])
    console.print("compiled for 2 lengths; the third and fourth compiled nothing")
    model.checkpointed = compiled.checkpointed = True
    return results | {f"{name}, checkpointed": measure(ways[name], x, true) for name in ("plain", "compiled")}


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float, int, float]]:
    """Read the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="of torch.compile; inductor on a GPU, else aot_eager")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    options.backend = options.backend or ("inductor" if options.device == "cuda" else "aot_eager")
    if options.device == "cpu":
        torch.set_num_threads(1)  # a second thread costs products of this size more than it brings
    results = run(options)
    table = Table("step", "output differs", "gradients", "KiB kept", "ms", box=None)
    for name, (output, gradients, kept, seconds) in results.items():
        table.add_row(name, f"{output:.1e}", f"{gradients:.1e}", f"{kept / 2**10:,.0f}", f"{1e3 * seconds:.1f}")
    console.print(table)
    return results


if __name__ == "__main__":
    moekit.keep_pages()  # on a CPU: fresh results cost no page faults then
    main()
