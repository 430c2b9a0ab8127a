"""Trying the main operators: are their values right, and how do they stand against a copy of the same bytes?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moekit
from moekit import _backend
from moekit.bench import moved

_DTYPE = torch.bfloat16
_STEP = 2.0**-7  # from one bfloat16 to the next, relative to the value; Triton's interpreter rounds down, not to the nearest
# Rows are moved as they are; experts round between their products.
_BOUNDS = {"permute": 0.0, "experts": 2 * _STEP}
_SMALL = (48, 64, 32, 8, 2)  # tokens, hidden, intermediate, experts, experts a token
_SIZES = (2048, 768, 128, 8)  # of Qwen3-30B-A3B's layer
_TOKENS = {True: 1024, False: 16384}  # on a CPU or not
_SECONDS, _LEAST, _MOST = 0.8, 3, 40  # of measuring, and turns


class Layer(NamedTuple):
    """Inputs of one layer's operators."""

    logits: Tensor
    indices: Tensor
    weights: Tensor
    tokens: Tensor
    rows: Tensor
    gate_up: Tensor
    grad: Tensor
    matrices: tuple[Tensor, Tensor]

    @classmethod
    def draw(cls, sizes: tuple[int, int, int, int, int], *, matrices: bool) -> Layer:
        """Random ones on the CPU, always the same; the matrices of experts only if asked for."""
        T, H, I, E, K = sizes
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = _DTYPE) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

        logits = normal(T, E, dtype=torch.float32)
        weights, indices = logits.softmax(-1).topk(K)
        shapes = ((E, 2 * I, H), (E, H, I)) if matrices else ((0,), (0,))
        gate_up, down = (normal(*shape) / shape[-1] ** 0.5 if matrices else normal(0) for shape in shapes)
        return cls(
            logits, indices, weights, normal(T, H), normal(T * K, H), normal(T * K, 2 * I), normal(T * K, I), (gate_up, down)
        )

    def to(self, *args: Any) -> Layer:
        """On another device, or the floating ones in another dtype."""
        wide = torch.float64 in args

        def there(tensor: Tensor) -> Tensor:
            return tensor if wide and not tensor.is_floating_point() else tensor.to(*args)

        gate_up, down = self.matrices
        return Layer(*(there(tensor) for tensor in self[:-1]), matrices=(there(gate_up), there(down)))


def parity() -> Iterator[dict[str, Any]]:
    """Each main operator on each backend and device here, against the reference in float64 of the same inputs.

    The error is the largest, relative to the largest value. Results are bfloat16: one step of it is allowed.
    """
    layer = Layer.draw(_SMALL, matrices=True)
    with moekit.backend("torch"):
        wanted = {name: call() for name, call in _calls(layer.to(torch.float64)).items()}
    for device in devices():
        there = layer.to(device)
        for name in ("torch", *_backend.BACKENDS):
            if _backend.serves(name, device) and _backend.why_not(name) is None:
                yield from _compared(name, device, there, wanted)


def devices() -> list[str]:
    """The types of device that this process has."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu", *([found.type] if found is not None else [])]


def _compared(backend: str, device: str, layer: Layer, wanted: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    for operator, call in _calls(layer).items():
        record: dict[str, Any] = {"device": device, "backend": backend, "operator": operator, "error": None, "failed": None}
        record["bound"] = _BOUNDS.get(operator, _STEP)
        try:
            with moekit.backend(backend):
                found = call().cpu().double()
            error = float((found - wanted[operator]).abs().max() / wanted[operator].abs().max())
            if math.isfinite(error):
                record["error"] = error
            else:  # JSON has no such number
                record["failed"] = f"off by {error} of the largest value"
        except Exception as problem:  # whatever a kernel's compiler has to say
            record["failed"] = _one_line(problem)
        yield {**record, "ok": record["error"] is not None and record["error"] <= record["bound"]}


def _calls(x: Layer) -> dict[str, Callable[[], Tensor]]:
    """The operators, prepared: what runs is one each. Backward is of a forward by the same backend."""
    num_experts = x.logits.shape[1]

    def routing() -> moekit.Routing:
        return moekit.Routing.from_topk(x.indices, x.weights, num_experts=num_experts)

    def glu_backward() -> Tensor:
        gate_up = x.gate_up.clone().requires_grad_()
        out = moekit.glu(gate_up, routing().row_weights())
        return torch.autograd.grad(out, gate_up, x.grad)[0]

    return {
        "route": lambda: moekit.topk_router(x.logits, x.indices.shape[1])[0],
        "permute": lambda: moekit.permute(x.tokens, routing()),
        "unpermute": lambda: moekit.unpermute(x.rows, routing(), weighted=True),
        "glu": lambda: moekit.glu(x.gate_up, routing().row_weights()),
        "glu backward": glu_backward,
        "experts": lambda: moekit.experts(x.tokens, (x.indices, x.weights), *x.matrices),
    }


# --- rates ------------------------------------------------------------------------------------------------------------


def rates(device: str) -> dict[str, Any]:
    """How many GB/s a copy moves, and each main operator's bytes over its time over that: 1 is as fast as a copy."""
    T, H, I, E, K = sizes = (_TOKENS[device == "cpu"], *_SIZES)
    layer = Layer.draw(sizes, matrices=False).to(device)
    rows, size = T * K, _DTYPE.itemsize
    floors = {
        "route": moved.route(T, E, K),
        "permute": moved.permute(T, rows, H, size),
        "unpermute": moved.unpermute(T, rows, H, size),
        "glu": moved.glu(rows, I, size),
        "glu backward": moved.glu_backward(rows, I, size),
    }
    source = layer.gate_up.detach().clone()
    target = torch.empty_like(source)
    took = medians({"copy": lambda: target.copy_(source), **_prepared(layer)}, device)
    copy = 2 * source.nbytes / took.pop("copy")
    found = {name: {"ms": each * 1e3, "share": floors[name] / each / copy} for name, each in took.items()}
    return {"copy_gb_per_s": copy / 1e9, "shape": dict(zip("THIEK", sizes, strict=True)), "operators": found}


def _prepared(x: Layer) -> dict[str, Callable[[], Any]]:
    routing = moekit.Routing.from_topk(x.indices, x.weights, num_experts=x.logits.shape[1])
    row_weights = routing.row_weights()
    gate_up = x.gate_up.requires_grad_()
    out = moekit.glu(gate_up, row_weights)
    grad = x.grad

    def without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(call)

    return {
        "route": without_gradients(lambda: moekit.topk_router(x.logits, x.indices.shape[1])),
        "permute": without_gradients(lambda: moekit.permute(x.tokens, routing)),
        "unpermute": without_gradients(lambda: moekit.unpermute(x.rows, routing, weighted=True)),
        "glu": without_gradients(lambda: moekit.glu(gate_up, row_weights)),
        "glu backward": lambda: torch.autograd.grad(out, gate_up, grad, retain_graph=True),
    }


def medians(calls: Mapping[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """The median seconds of each call, taking turns, after one to warm up; on a GPU, of several that are queued together."""
    wait, at_once = ((lambda: None), 1) if device == "cpu" else (torch.accelerator.synchronize, 10)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent, turn = 0.0, 0
    while turn <= _LEAST or (spent < _SECONDS and turn <= _MOST):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(at_once):
                call()
            wait()
            took = time.perf_counter() - start
            if turn:  # the first compiles
                samples[name].append(took / at_once)
                spent += took
        turn += 1
    return {name: statistics.median(found) for name, found in samples.items()}


def fresh_pages() -> dict[str, float]:
    """What writing 64 MiB takes, in ms: to fresh memory, as every large result is, and to the same memory again."""
    size = 1 << 26
    target = torch.empty(size, dtype=torch.uint8)
    calls = {"fresh_ms": lambda: torch.empty(size, dtype=torch.uint8).fill_(1), "again_ms": lambda: target.fill_(1)}
    return {name: took * 1e3 for name, took in medians(calls, "cpu").items()}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
