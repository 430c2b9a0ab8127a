"""The ``torch.library`` namespace ``moekit``: one call defines an operator.

An operator is a schema, a readable reference in PyTorch, a fake kernel (shapes and dtypes only, for tracing) and,
where it has a gradient, what to save and how to go back. Kernels of other backends are found by name at the call
(:mod:`moekit._backend`), so they can be added without touching an operator or its callers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekit import _backend

_LIBRARY = torch.library.Library("moekit", "DEF")
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    save: Callable | None = None,
    backward: Callable | None = None,
) -> Any:
    """Define ``torch.ops.moekit.<name>`` and return it.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``.
        reference: the operator in plain PyTorch; its arguments are the schema's.
        fake: the same arguments to empty outputs, for tracing.
        save: ``save(ctx, args, outputs)`` keeps what backward needs.
        backward: ``backward(ctx, needs, *grads)`` to a tuple with a gradient (or None) for each argument;
            ``needs`` says for each argument whether its gradient is wanted.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _with_kernels(name, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"moekit::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.moekit, name).default
    if save is not None and backward is not None:
        _LIBRARY.impl(name, _with_autograd(name, op, save, backward), "Autograd", with_keyset=True)
    return op


def _with_kernels(name: str, reference: Callable) -> Callable:
    """The operator below autograd: the chosen backend's kernel, or the reference for what it leaves."""

    def run(*args: Any) -> Any:
        kernel = _backend.kernel(name, _first_tensor(args))
        if kernel is not None:
            outputs = kernel(*args)
            if outputs is not NotImplemented:
                return outputs
        return reference(*args)

    return run


def _with_autograd(name: str, op: Any, save: Callable, backward: Callable) -> Callable:
    """The operator at the autograd key. Leaner than ``register_autograd`` (about 7 us a call less)."""

    def forward_node(ctx: Any, keyset: Any, *args: Any) -> Any:
        outputs = op.redispatch(keyset & _BELOW_AUTOGRAD, *args)
        # Backward may run in a thread of the autograd engine, where the context variable has its default.
        ctx.backend = _backend.current()
        save(ctx, args, outputs)
        return outputs

    def backward_node(ctx: Any, *grads: Tensor | None) -> tuple:
        if all(grad is None for grad in grads):  # where ``save`` turned materialised gradients off
            return (None,) * len(ctx.needs_input_grad)
        with _backend.backend(ctx.backend):
            return (None, *backward(ctx, ctx.needs_input_grad[1:], *grads))

    title = "".join(part.capitalize() for part in name.split("_"))
    node = type(
        f"Moekit{title}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward_node), "backward": staticmethod(backward_node)},
    )

    def run(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return node.apply(keyset, *args)
        return op.redispatch(keyset & _BELOW_AUTOGRAD, *args)

    return run


def _first_tensor(args: tuple) -> Tensor:
    return next(arg for arg in args if isinstance(arg, Tensor))


def require_reference(op: str, tensor: Tensor) -> None:
    """Refuse a double backward of what a kernel computed: only the reference is differentiable twice.

    float64 runs on the reference whatever the backend, so it always passes.
    """
    if tensor.dtype is not torch.float64 and _backend.kernel(op, tensor) is not None:
        raise RuntimeError(
            f"moekit.{op}: double backward exists on the 'torch' backend only; run the forward inside "
            "`with moekit.backend('torch'):`"
        )


def differentiate(reference: Callable, args: tuple, needs: tuple, grads: tuple) -> tuple:
    """The gradients of ``reference(*args)``'s outputs, for each argument that ``needs`` one.

    Outputs that the reference left empty (nobody wanted them) do not require a gradient and are passed over.
    """
    with torch.enable_grad():
        leaves = [
            arg.detach().requires_grad_(need) if isinstance(arg, Tensor) else arg
            for arg, need in zip(args, needs, strict=True)
        ]
        outputs = reference(*leaves)
    reached = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    sources = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    if not reached:
        return (None,) * len(needs)
    found = iter(torch.autograd.grad([out for out, _ in reached], sources, [grad for _, grad in reached], allow_unused=True))
    return tuple(next(found) if need else None for need in needs)
