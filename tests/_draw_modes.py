"""How the differential test runs a module: the modes of autograd, and the ways to execute a call.

A mode returns ``{name: tensor or None}``: the output and every derivative. The reference runs each sample of a
vectorised mode (vmap, batched gradients) in a loop; what is tried runs it vectorised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from _draw_modules import DTYPES, parameter_dtype, rounded, values
from _draw_patches import Case
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

Results = dict[str, Any]
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
CHECKPOINTS = ("checkpoint", "checkpoint_reentrant")


def executed(case: Case, execution: str, arrays: dict[str, Tensor]) -> Call:
    """The call of the module in the drawn way."""
    if execution in CHECKPOINTS:
        reentrant = execution == "checkpoint_reentrant"
        return lambda *args: checkpoint(case.module, *args, use_reentrant=reentrant)
    if execution == "functional":
        return lambda *args: torch.func.functional_call(case.module, dict(case.module.named_parameters()), args)
    if execution == "compile":
        torch._dynamo.reset()
        return torch.compile(case.module, backend="aot_eager")
    if execution == "trace":
        args = tuple(arrays[name][1] for name in ("x", "indices", "weights"))  # of another sample than the one compared
        return torch.jit.trace(case.module, args, check_trace=False)
    return case.module


class Runner:
    """One module, one implementation, one execution."""

    def __init__(self, case: Case, arrays: dict[str, Tensor], execution: str, vectorised: bool):
        self.case, self.arrays, self.vectorised = case, arrays, vectorised
        self.call = executed(case, execution, arrays)
        self.x, self.indices, self.weights, self.cotangent = (
            arrays[name][0].detach() for name in ("x", "indices", "weights", "cotangent")
        )
        needs = case.situation["needs"]
        self.needs = {"x": needs in ("all", "x"), "weights": needs in ("all", "weights")}

    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient: inputs, parameters and what stands in a parameter's place."""
        self.x, self.weights = (
            t.detach().requires_grad_(self.needs[n]) for n, t in (("x", self.x), ("weights", self.weights))
        )
        named = {"x": self.x, "weights": self.weights, **self.parameters(), **self.case.extra}
        for leaf in named.values():
            leaf.grad = None
        return {name: leaf for name, leaf in named.items() if leaf.requires_grad}

    def parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.case.module.named_parameters() if p.requires_grad}

    def output(self) -> Tensor:
        return self.call(self.x, self.indices, self.weights)

    def function(self, sample: int = 0) -> tuple[Callable, dict[str, Tensor]]:
        """The call as a function of its leaves."""
        indices = self.arrays["indices"][sample].detach()
        point = {name: self.arrays[name][sample].detach() for name, need in self.needs.items() if need}
        fixed = {name: self.arrays[name][sample].detach() for name in ("x", "weights")}
        point.update({name: p.detach() for name, p in self.parameters().items()})

        def function(leaves: dict[str, Tensor], indices: Tensor = indices) -> Tensor:
            given = {**fixed, **{name: leaves[name] for name in ("x", "weights") if name in leaves}}
            parameters = {name: leaf for name, leaf in leaves.items() if name not in given}
            return torch.func.functional_call(self.case.module, parameters, (given["x"], indices, given["weights"]))

        return function, point

    def direction(self, name: str, like: Tensor) -> Tensor:
        situation = self.case.situation
        given = {"x": "hidden_dtype", "weights": "router_dtype"}.get(name)
        dtype = DTYPES[situation[given]] if given else parameter_dtype(situation, name, like)
        return rounded(self.case, values(situation, name, tuple(like.shape), "direction"), dtype, f"to {name}")


def _described(out: Tensor) -> Results:
    flags = {"dtype": out.dtype, "shape": tuple(out.shape), "device": out.device.type, "inference": out.is_inference()}
    return {"out": out.detach(), "requires_grad": out.requires_grad, **flags}


def _named(leaves: dict[str, Tensor], gradients: Any) -> Results:
    return {f"grad of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def backward(runner: Runner, times: int = 1) -> Results:
    leaves = runner.leaves()
    out = runner.output()
    for left in reversed(range(times)):
        if out.requires_grad:
            out.backward(runner.cotangent.to(out.dtype), retain_graph=left > 0)
    return {**_described(out), **_named(leaves, [leaf.grad for leaf in leaves.values()])}


def twice(runner: Runner) -> Results:
    return backward(runner, times=2)


def saved_hooks(runner: Runner) -> Results:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return backward(runner)


def no_grad(runner: Runner) -> Results:
    runner.leaves()
    with torch.no_grad():
        return _described(runner.output())


def inference_mode(runner: Runner) -> Results:
    runner.leaves()
    with torch.inference_mode():
        return _described(runner.output())


def _gradients(out: Tensor, leaves: dict[str, Tensor], cotangent: Tensor, **options: Any) -> tuple:
    if not out.requires_grad or not leaves:
        return (None,) * len(leaves)
    return torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype), allow_unused=True, **options)


def partial(runner: Runner) -> Results:
    """Gradients of every second leaf only."""
    leaves = dict([*runner.leaves().items()][runner.case.situation["values"] % 2 :: 2])
    out = runner.output()
    return {**_described(out), **_named(leaves, _gradients(out, leaves, runner.cotangent))}


def batched(runner: Runner) -> Results:
    leaves = runner.leaves()
    out = runner.output()
    cotangents = runner.arrays["cotangent"]
    if runner.vectorised:
        return {**_described(out), **_named(leaves, _gradients(out, leaves, cotangents, is_grads_batched=True))}
    each = [_gradients(out, leaves, c, retain_graph=True) for c in cotangents]
    return {**_described(out), **_named(leaves, [None if g[0] is None else torch.stack(g) for g in zip(*each, strict=True)])}


def double(runner: Runner) -> Results:
    """The gradient of a directional derivative of the gradient."""
    leaves = runner.leaves()
    out = runner.output()
    first = _gradients(out, leaves, runner.cotangent, create_graph=True)
    terms = [
        (g * runner.direction(n, g)).sum() for n, g in zip(leaves, first, strict=True) if g is not None and g.requires_grad
    ]
    total = torch.stack([term.double() for term in terms]).sum() if terms else out.new_zeros(())
    second = _gradients(total, leaves, torch.ones(()))
    again = {f"second {name}": gradient for name, gradient in _named(leaves, second).items()}
    return {**_described(out), **_named(leaves, first), **again}


def func_grad(runner: Runner) -> Results:
    function, point = runner.function()

    def loss(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out = function(leaves)
        return (out * runner.cotangent.to(out.dtype)).sum(), out

    gradients, out = torch.func.grad(loss, has_aux=True)(point)
    return {"out": out, **_named(point, gradients.values())}


def func_vjp(runner: Runner) -> Results:
    function, point = runner.function()
    out, pull = torch.func.vjp(function, point)
    return {"out": out, **_named(point, pull(runner.cotangent.to(out.dtype))[0].values())}


def func_jvp(runner: Runner) -> Results:
    function, point = runner.function()
    tangents = {name: runner.direction(name, leaf) for name, leaf in point.items()}
    out, tangent = torch.func.jvp(function, (point,), (tangents,))
    return {"out": out, "tangent": tangent}


def dual(runner: Runner) -> Results:
    function, point = runner.function()
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(leaf, runner.direction(n, leaf)) for n, leaf in point.items()}
        out, tangent = forward_ad.unpack_dual(function(duals))
        return {"out": out.clone(), "tangent": None if tangent is None else tangent.clone()}


def _each(runner: Runner, one: Callable, batch: dict[str, Tensor], indices: Tensor) -> Any:
    """``one(leaves, indices, cotangent)`` of each sample: in a loop, or at once."""
    cotangents = runner.arrays["cotangent"]
    if runner.vectorised:
        return torch.func.vmap(one)(batch, indices, cotangents)
    results = [one({n: leaf[i] for n, leaf in batch.items()}, indices[i], cotangents[i]) for i in range(len(indices))]
    return torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *results)


def _samples(runner: Runner) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of every sample; one routing for all of them in every second draw."""
    indices = runner.arrays["indices"].detach()
    if runner.case.situation["values"] % 2:
        indices = indices[:1].expand(indices.shape)
    return {name: runner.arrays[name].detach() for name, need in runner.needs.items() if need}, indices


def vmap(runner: Runner) -> Results:
    function, point = runner.function()
    batch, indices = _samples(runner)
    return {"out": _each(runner, lambda leaves, i, _: function({**point, **leaves}, i), batch, indices)}


def vmap_grad(runner: Runner) -> Results:
    """Per-sample gradients."""
    function, point = runner.function()
    batch, indices = _samples(runner)

    def gradients(leaves: dict[str, Tensor], indices: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        def loss(point: dict[str, Tensor]) -> Tensor:
            out = function(point, indices)
            return (out * cotangent.to(out.dtype)).sum()

        return torch.func.grad(loss)({**point, **leaves})

    found = _each(runner, gradients, batch, indices)
    return _named(found, found.values())


def ensemble(runner: Runner) -> Results:
    """Several sets of parameters at once."""
    function, point = runner.function()
    _, indices = _samples(runner)
    batch = {name: torch.stack([leaf, leaf * 0.5, leaf * -0.25]) for name, leaf in point.items()}
    return {"out": _each(runner, lambda leaves, i, _: function(leaves, i), batch, indices)}


def jacrev(runner: Runner) -> Results:
    function, point = runner.function()
    if not point:
        return {"out": function(point)}
    name = "weights" if "weights" in point else next(iter(point))

    def of_one(leaf: Tensor) -> Tensor:
        return function({**point, name: leaf})[:2, :3]

    if runner.vectorised:
        return {f"jacobian of {name}": torch.func.jacrev(of_one)(point[name])}
    return {f"jacobian of {name}": torch.autograd.functional.jacobian(of_one, point[name])}


# Through torch.func and forward-mode AD, which take the call as a function of its leaves.
FUNCTIONAL = {f.__name__: f for f in (func_grad, func_vjp, func_jvp, dual, vmap, vmap_grad, ensemble, jacrev)}
PLAIN = {f.__name__: f for f in (backward, twice, saved_hooks, no_grad, inference_mode, partial, batched, double)}
MODES: dict[str, Callable[[Runner], Results]] = {**PLAIN, **FUNCTIONAL}


def run(case: Case, arrays: dict[str, Tensor], implementation: str, execution: str, vectorised: bool) -> Results:
    """Everything that the drawn mode computes."""
    case.experts.config._experts_implementation = implementation
    case.calls.clear()
    situation = case.situation
    autocast = contextlib.nullcontext()
    if situation["autocast"] != "none" and not case.exact:
        autocast = torch.autocast("cpu", dtype=getattr(torch, situation["autocast"]))
    with autocast:
        results = MODES[situation["mode"]](Runner(case, arrays, execution, vectorised))
    results["calls"] = len(case.calls)
    return results
