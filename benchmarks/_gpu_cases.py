"""The cases of the GPU benchmark: layer shapes, operations, and who else computes them."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

INTERPRET = "--interpret" in sys.argv
if INTERPRET:  # read when triton and moekit are imported
    os.environ |= {"TRITON_INTERPRET": "1", "MOEKIT_BACKEND": "triton"}

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import moekit  # noqa: E402
from moekit import Routing  # noqa: E402
from moekit.ops import rows as row_ops  # noqa: E402

DEVICE = "cpu" if INTERPRET else "cuda"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """One Mixture-of-Experts layer: T tokens, H hidden, I intermediate, E experts, K experts a token."""

    name: str
    T: int
    H: int
    I: int
    E: int
    K: int

    @property
    def R(self) -> int:
        """Rows after permutation."""
        return self.T * self.K


SHAPES = [
    Shape("Qwen3-30B-A3B", 16384, 2048, 768, 128, 8),
    Shape("Mixtral-8x7B", 16384, 4096, 14336, 8, 2),
    Shape("DeepSeek-V3", 4096, 7168, 2048, 256, 8),
]
TINY = [Shape("tiny", 12, 32, 24, 4, 2)]


@dataclass
class Case:
    """One operation on one shape: how to draw its inputs, what must move, and who computes it.

    ``contenders`` map names to functions of the inputs; the first is moekit's. ``reference`` is another on the same
    inputs. Gradients are taken for the inputs whose number is in ``gradients``.
    """

    name: str
    draw: Callable[[], list[Tensor]]
    contenders: dict[str, Callable[..., Any]]
    reference: Callable[..., Any]
    forward_bytes: int
    backward_bytes: int = 0
    gradients: tuple[int, ...] = ()
    short: bool = False  # so short that launches dominate: replayed from a graph
    sets: int = 2


# --- the cases --------------------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def route(shape: Shape) -> Routing:
    """A random routing, somewhat unbalanced: a few experts are twice as popular as others."""
    popularity = torch.linspace(0.0, 0.7, shape.E, device=DEVICE)
    logits = torch.randn(shape.T, shape.E, device=DEVICE) + popularity
    weights, indices = moekit.topk_router(logits, shape.K)
    return Routing.from_topk(indices, weights, num_experts=shape.E)


def glu_cases(s: Shape) -> Iterator[Case]:
    def eager(y: Tensor, p: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return (F.silu(gate) * up * p.unsqueeze(-1)).to(y.dtype)

    def wide(y: Tensor, p: Tensor) -> Tensor:
        return eager(y.float(), p).to(y.dtype)

    contenders = {"moekit": lambda y, p: moekit.glu(y, p), "eager": eager, "compile": eager, **peers("glu", s)}
    forward, backward = 3 * s.R * s.I * 2 + 4 * s.R, 5 * s.R * s.I * 2 + 8 * s.R
    draw = lambda: [normal(s.R, 2 * s.I), torch.rand(s.R, device=DEVICE)]  # noqa: E731
    yield Case("weighted swiglu", draw, contenders, wide, forward, backward, (0, 1))
    fp8 = {"moekit": lambda y, p: moekit.glu(y, p, fp8_store=True)}
    both = s.R * s.I * (3 * 2 + 2)
    yield Case("weighted swiglu, float8 store", draw, fp8, wide, both, both, (0, 1))


def row_cases(s: Shape) -> Iterator[Case]:
    routing = route(s)
    row_token, *tables = routing.row_tables()
    moved = (s.T + s.R) * s.H * 2
    index = row_token.long()

    def gather(x: Tensor) -> Tensor:
        return x.index_select(0, index)

    def scatter(rows: Tensor) -> Tensor:
        return torch.zeros(s.T, s.H, dtype=rows.dtype, device=DEVICE).index_add(0, index, rows)

    def weighted(rows: Tensor, p: Tensor) -> Tensor:
        return scatter((rows * p.unsqueeze(-1)).to(rows.dtype))

    ours = {"moekit": lambda x: row_ops.move_rows(x, row_token, *tables)}
    draw_rows = functools.partial(normal, s.R, s.H)
    yield Case("permute", lambda: [normal(s.T, s.H)], ours | both_ways(gather), gather, moved, moved, (0,))
    ours = {"moekit": lambda x: row_ops.sum_rows(x, None, row_token, *tables)}
    wide = lambda rows: scatter(rows.float())  # noqa: E731
    yield Case("unpermute", lambda: [draw_rows()], ours | both_ways(scatter), wide, moved, moved, (0,))
    ours = {"moekit": lambda x, p: row_ops.sum_rows(x, p, row_token, *tables)}
    wide_weighted = lambda rows, p: weighted(rows.float(), p)  # noqa: E731
    back = (s.T + 2 * s.R) * s.H * 2 + 8 * s.R
    draw = lambda: [draw_rows(), torch.rand(s.R, device=DEVICE)]  # noqa: E731
    yield Case("unpermute weighted", draw, ours | both_ways(weighted), wide_weighted, moved + 4 * s.R, back, (0, 1))

    def ours_by_slot(rows: Tensor, w: Tensor) -> Tensor:
        return row_ops.sum_rows(rows, w, row_token, *tables)

    def eager_by_slot(rows: Tensor, w: Tensor) -> Tensor:
        return weighted(rows, w.flatten()[routing.order])

    wide_by_slot = lambda rows, w: eager_by_slot(rows.float(), w)  # noqa: E731
    contenders = {"moekit": ours_by_slot, "eager": eager_by_slot, **peers("unpermute by slot", s, routing.inverse)}
    draw = lambda: [draw_rows(), torch.rand(s.T, s.K, device=DEVICE)]  # noqa: E731
    yield Case("unpermute with top-k weights", draw, contenders, wide_by_slot, moved + 4 * s.R, back, (0, 1))


def both_ways(function: Callable) -> dict[str, Callable]:
    return {"eager": function, "compile": function}


def drop_in_cases(s: Shape) -> Iterator[Case]:
    """permute and unpermute from a map, as NeMo Automodel and Megatron-core call them: tables included."""
    from moekit import moe_utils

    routing_map, probs = (t for t in route(s).to_map())
    moved = (s.T + s.R) * s.H * 2

    def ours(x: Tensor) -> Tensor:
        return moe_utils.permute(x, routing_map, num_out_tokens=s.R)[0]

    def eager(x: Tensor) -> Tensor:
        tokens = torch.arange(s.T, device=DEVICE).expand(s.E, s.T).masked_select(routing_map.T)
        return x.index_select(0, tokens)

    draw = lambda: [normal(s.T, s.H)]  # noqa: E731
    contenders = {"moekit": ours, "eager": eager, **peers("permute", s, routing_map)}
    yield Case("permute from a map", draw, contenders, eager, moved + s.T * s.E, moved, (0,))
    order = moe_utils.permute(normal(s.T, s.H), routing_map, num_out_tokens=s.R)[2]

    def back(rows: Tensor) -> Tensor:
        return moe_utils.unpermute(rows, order, (s.T, s.H), probs=probs, routing_map=routing_map)

    def back_eager(rows: Tensor) -> Tensor:
        p = probs.T.masked_select(routing_map.T).unsqueeze(-1)
        return torch.zeros(s.T, s.H, device=DEVICE).index_add(0, order, rows.float() * p)

    contenders = {"moekit": back, "eager": back_eager, **peers("unpermute", s, routing_map, probs, order)}
    yield Case("unpermute with probs from a map", lambda: [normal(s.R, s.H)], contenders, back_eager, moved, moved, (0,))


def small_cases(s: Shape) -> Iterator[Case]:
    """Router and tables, and the tables together with permute."""

    def chosen(logits: Tensor) -> Tensor:
        return torch.topk(logits, s.K).values.softmax(-1)

    ours = {"moekit": lambda x: moekit.topk_router(x, s.K)[0], "eager": chosen, "compile": chosen, **peers("top-k", s)}
    draw_logits = lambda: [normal(s.T, s.E, dtype=torch.float32)]  # noqa: E731
    sizes = (4 * s.T * s.E + 12 * s.R, 8 * s.T * s.E)
    yield Case("top-k router", draw_logits, ours, chosen, *sizes, (0,), short=True)

    def eager_order(indices: Tensor) -> Tensor:
        return indices.flatten().sort(stable=True).indices.int()

    ours = {"moekit": lambda i: Routing.from_topk(i, num_experts=s.E).order, "eager": eager_order}
    draw_indices = lambda: [torch.rand(s.T, s.E, device=DEVICE).topk(s.K).indices]  # noqa: E731
    yield Case("routing tables", draw_indices, ours, eager_order, 16 * s.R, short=True)

    def both(x: Tensor, indices: Tensor) -> Tensor:
        return moekit.permute(x, Routing.from_topk(indices, num_experts=s.E))

    def eager_both(x: Tensor, indices: Tensor) -> Tensor:
        return x.index_select(0, eager_order(indices) // s.K)

    draw = lambda: [normal(s.T, s.H), *draw_indices()]  # noqa: E731
    contenders = {"moekit": both, "eager": eager_both, **peers("tables and permute", s)}
    yield Case("routing tables and permute", draw, contenders, eager_both, (s.T + s.R) * s.H * 2 + 16 * s.R, short=True)


def peers(op: str, s: Shape, *given: Tensor) -> dict[str, Callable]:
    """What other packages call this operation, where they can be imported."""
    found: dict[str, Callable] = {}
    nemo = load("nemo_automodel.components.moe.megatron.moe_utils")
    megatron = load("megatron.core.transformer.moe.moe_utils")
    if op == "glu":
        fused = load("megatron.core.fusions.fused_bias_swiglu")
        if nemo:
            found["nemo"] = lambda y, p: nemo.weighted_bias_swiglu_impl(y, p.unsqueeze(-1))
        if fused:
            found["megatron"] = lambda y, p: fused.weighted_bias_swiglu_impl(y, None, p.unsqueeze(-1))
        liger = load("liger_kernel.ops.swiglu")
        if liger:  # has no weights: they are one more product
            halves = lambda y: (half.contiguous() for half in y.chunk(2, -1))  # noqa: E731
            silu = lambda y: liger.LigerSiLUMulFunction.apply(*halves(y))  # noqa: E731
            found["liger"] = lambda y, p: (silu(y) * p.unsqueeze(-1)).to(y.dtype)
    moe_ops = load("moe_ops")
    if moe_ops and op == "top-k":
        found["moe-ops"] = lambda x: moe_ops.fused_topk_softmax(x, s.K)[0]
    if moe_ops and op == "tables and permute":  # the order of an expert's rows is not fixed there, hence its "error"
        found["moe-ops"] = lambda x, i: moe_ops.permute(x, i, 0, s.E)[0]
    if moe_ops and op == "unpermute by slot":
        slots = given[0].T.contiguous().flatten()
        found["moe-ops"] = lambda rows, w: moe_ops.unpermute(rows, slots, w, s.T, s.K)
    for name, module in (("nemo", nemo), ("megatron", megatron)):
        if module and op == "permute":
            found[name] = lambda x, m=module: m.permute(x, given[0], num_out_tokens=s.R)[0]
        if module and op == "unpermute":
            routing_map, probs, order = given
            call = functools.partial(module.unpermute, probs=probs, routing_map=routing_map)
            found[name] = lambda x, call=call, order=order: call(x, order, (s.T, s.H))
    return found


@functools.cache
def load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer may fail in any way
        print(f"  no {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150])
        return None
