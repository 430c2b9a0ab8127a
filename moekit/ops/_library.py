"""The ``torch.library`` namespace ``moekit``: one call defines an operator.

An operator is a schema, a readable reference in PyTorch, a fake kernel (shapes and dtypes only, for tracing) and,
where it has a gradient, what to save and how to go back. Kernels of other backends are found by name at the call
(:mod:`moekit._backend`), so they can be added without touching an operator or its callers.

What PyTorch's transforms do to an operator is decided here, once for all of them:

- reverse mode (autograd, ``torch.func.grad``, ``vjp``, ``jacrev``): its own backward, on every level;
- forward mode (``torch.func.jvp``, ``jacfwd``, dual numbers): the reference runs, as PyTorch can differentiate it;
- ``torch.vmap`` (per-sample gradients, ``is_grads_batched``): one call for each sample, the results stacked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from moekit import _backend

_LIBRARY = torch.library.Library("moekit", "DEF")
_C: Any = torch._C  # of which type checkers know a part
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_FLOPS: dict[Any, Callable] = {}
_PLAIN: dict[Any, Callable] = {}


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    save: Callable | None = None,
    backward: Callable | None = None,
    composed: Callable | None = None,
    tangent: Callable | None = None,
    flops: Callable | None = None,
    kernels: bool = True,
) -> Any:
    """Define ``torch.ops.moekit.<name>`` and return it.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``.
        reference: the operator in plain PyTorch; its arguments are the schema's.
        fake: the same arguments to empty outputs, for tracing.
        save: ``save(ctx, args, outputs)`` keeps what backward needs.
        backward: ``backward(ctx, needs, *grads)`` to a tuple with a gradient (or None) for each argument;
            ``needs`` says for each argument whether its gradient is wanted.
        composed: what forward-mode differentiation runs in place of a ``reference`` that is not made of
            differentiable operations.
        tangent: or ``tangent(args, tangents)``, the output's tangent from those of the arguments (None: zero).
        flops: the shapes of the arguments (``None`` and other arguments as they are) to floating-point operations.
        kernels: whether those of the backends take the schema's arguments; otherwise ``reference`` looks for them itself.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    op = getattr(torch.ops.moekit, name).default
    below = _with_kernels(name, reference, _first_tensor(op)) if kernels else reference
    _LIBRARY.impl(name, below, "CompositeExplicitAutograd")
    _PLAIN[op] = below
    torch.library.register_fake(f"moekit::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"moekit::{name}", _sample_by_sample(op), lib=_LIBRARY)
    if flops is not None:
        _FLOPS[op.overloadpacket] = flops
    if save is not None and backward is not None:
        derivatives = _with_autograd(name, op, save, backward, composed or reference, tangent)
        _LIBRARY.impl(name, derivatives, "Autograd", with_keyset=True)
    else:  # its results have no derivative: tables of integers, and constants
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return op


def plain(op: Any) -> Callable:
    """What an operator runs below autograd, as a function: operators that call it need not go through the dispatcher."""
    return _PLAIN[op]


def _with_kernels(name: str, reference: Callable, first: int) -> Callable:
    """The operator below autograd: the backend's kernel for argument ``first``, or the reference for what it leaves."""

    def run(*args: Any) -> Any:
        kernel = _backend.kernel(name, args[first])
        if kernel is not None:
            outputs = kernel(*args)
            if outputs is not NotImplemented:
                return outputs
        return reference(*args)

    return run


def _with_autograd(
    name: str, op: Any, save: Callable, backward: Callable, composed: Callable, tangent: Callable | None
) -> Callable:
    """The operator at the autograd key. Leaner than ``register_autograd`` (about 7 us a call less)."""

    def forward_node(ctx: Any, keyset: Any, *args: Any) -> Any:
        with _next_level() if in_transforms() else nullcontext():
            outputs = op.redispatch(keyset & _BELOW_AUTOGRAD, *args)
        # Backward may run in a thread of the autograd engine, where the context variable has its default.
        ctx.backend = _backend.current()
        save(ctx, args, outputs)
        if tangent is not None and _within_levels():
            ctx.inputs = args
        return outputs

    def backward_node(ctx: Any, *grads: Tensor | None) -> tuple:
        if all(grad is None for grad in grads):  # where ``save`` turned materialised gradients off
            return (None,) * len(ctx.needs_input_grad)
        with _backend.backend(ctx.backend):
            return (None, *backward(ctx, ctx.needs_input_grad[1:], *grads))

    def tangent_node(ctx: Any, _: Any, *tangents: Tensor | None) -> Tensor | None:
        inputs = [forward_ad.unpack_dual(arg, level=0).primal if isinstance(arg, Tensor) else arg for arg in ctx.inputs]
        del ctx.inputs
        with _next_level() if in_transforms() else nullcontext():
            return tangent and tangent(inputs, tangents)

    title = "".join(part.capitalize() for part in name.split("_"))
    methods = {"forward": forward_node, "backward": backward_node, "jvp": tangent_node}
    node: Any = type(f"Moekit{title}", (_SingleLevelFunction,), {key: staticmethod(f) for key, f in methods.items()})

    def run(keyset: Any, *args: Any) -> Any:
        dual = _within_levels() and any(map(_has_tangent, _tensors(args)))
        if dual and tangent is None:
            return composed(*args)
        if dual or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return apply_in_transforms(node, keyset, *args) if in_transforms() else node.apply(keyset, *args)
        return op.redispatch(keyset & _BELOW_AUTOGRAD, *args)

    return run


in_transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transform of ``torch.func`` is at work."""


def runs_plainly(*tensors: Tensor) -> bool:
    """Whether what is called now computes, and nothing but that: no compiler, transform, mode or trace looks on.

    In the backward of batched gradients (``is_grads_batched``) only the tensors say that there is a transform, and with
    shapes alone (on ``meta``, in a subclass) only they say that there is nothing to compute.
    """
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing()
    return not watched and not _within_levels() and all(map(_holds_numbers, tensors))


def _holds_numbers(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type != "meta" and not is_legacy_batchedtensor(tensor)


def negated(*tensors: Tensor | None) -> bool:
    """Whether one is a view that the dispatcher negates on the way to an operator, which kernels do not see."""
    return any(tensor is not None and tensor.is_neg() for tensor in tensors)


def versions(tensors: Iterable[Tensor | None]) -> list[int]:
    """How often each has been written to: what a node that keeps them by itself compares in its backward."""
    return [t._version for t in tensors if t is not None and not t.is_inference()]


def owns_what_it_saves() -> bool:
    """Whether a node may keep tensors by itself, and not in autograd's care: nobody has asked to see what is saved."""
    return runs_plainly() and _C._autograd._top_saved_tensors_default_hooks(True) is None


def goes_again() -> bool:
    """Whether the backward that is at work may be run again (``retain_graph``)."""
    return _C._autograd._get_current_graph_task_keep_graph()


def transformed() -> bool:
    """Whether a function that is called now may have to do with ``torch.func`` or with dual numbers."""
    return not torch.compiler.is_compiling() and _within_levels()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a call on these will be differentiated; in a transform, a compiler or a trace, which hide it, perhaps."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    if _within_levels():
        return True
    if not torch.is_grad_enabled():
        return False
    return torch._C._is_tracing() or any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _within_levels() -> bool:
    """Whether ``torch.func`` is at work or dual numbers may be about."""
    return in_transforms() or forward_ad._current_level >= 0


@contextmanager
def _next_level() -> Iterator[None]:
    """Let the next level record what it wants to: PyTorch turns that off inside a function's forward and tangent."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def apply_in_transforms(node: Any, *args: Any) -> Any:
    """``node.apply`` within the level of ``torch.func`` that is at work, below which forward finds the next one.

    The dispatcher has taken care of the level: the arguments belong to it, and what ``forward`` calls below the autograd
    key goes on to the next. All that ``torch.autograd.Function`` asks for, a context that is set up apart, is for
    functions that are called above the dispatcher.
    """
    with enable_single_level_autograd_function():
        return node.apply(*args)


def _stacked(outputs: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, also under autocast, which knows no float8."""
    dtype = outputs[0].dtype
    if dtype is torch.float8_e4m3fn:
        return torch.stack([output.view(torch.uint8) for output in outputs]).view(dtype)
    return torch.stack(tuple(outputs))


def _sample_by_sample(op: Any) -> Callable:
    """The batching rule: a call for each sample. Its tables differ from the others', so there is nothing to share."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        flat, spec = _pytree.tree_flatten(args)
        dims = _pytree.tree_leaves(in_dims, is_leaf=lambda dim: dim is None)
        calls = []
        for i in range(info.batch_size):
            sample = [arg if dim is None else arg.select(dim, i) for arg, dim in zip(flat, dims, strict=True)]
            calls.append(op(*_pytree.tree_unflatten(sample, spec)))
        if isinstance(calls[0], Tensor):
            return _stacked(calls), 0
        return tuple(_stacked(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

    return rule


def _tensors(args: Iterable) -> list[Tensor]:
    """The tensors among the arguments of an operator, those in lists included."""
    return [leaf for leaf in _pytree.tree_leaves(args) if isinstance(leaf, Tensor)]


def _has_tangent(tensor: Tensor) -> bool:
    # The one level there is: compiled code enters it without telling ``forward_ad``.
    return forward_ad.unpack_dual(tensor, level=0).tangent is not None


def _first_tensor(op: Any) -> int:
    """The place of the first argument that is always a tensor."""
    return next(place for place, arg in enumerate(op._schema.arguments) if isinstance(arg.type, torch.TensorType))


def announce_flops() -> None:
    """Give the formulas to the ``FlopCounterMode`` that is watching, if any is: before the first operator it could count.

    Not at definition, because the module of PyTorch that they are registered in loads triton.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    for operator, formula in _FLOPS.items():
        if operator not in counting.flop_registry:
            counting.register_flop_formula(operator)(formula)
    modes: list[Any] = _get_current_dispatch_mode_stack()
    for mode in modes:
        if isinstance(mode, counting._FlopCounterMode):
            mode.counter.flop_registry.update({operator: counting.flop_registry[operator] for operator in _FLOPS})


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
    """The gradients of ``reference(*args)``'s outputs, for each argument that ``needs`` one; differentiable themselves."""
    places = [place for place, need in enumerate(needs) if need]

    def of_needed(*values: Tensor) -> tuple:
        whole = list(args)
        for place, value in zip(places, values, strict=True):
            whole[place] = value
        return tuple(reference(*whole))

    pull_back = torch.func.vjp(of_needed, *(args[place] for place in places))[1]
    found = iter(pull_back(tuple(grads)))
    return tuple(next(found) if need else None for need in needs)


def product_rule(product: Callable) -> Callable:
    """The ``tangent`` of an operator that is linear in each of its first two arguments."""

    def tangent(args: list, tangents: tuple) -> Tensor:
        (left, right, *others), (d_left, d_right, *_) = args, tangents
        terms = [] if d_left is None else [product(d_left, right, *others)]
        terms += [] if d_right is None else [product(left, d_right, *others)]
        return sum(terms[1:], terms[0])

    return tangent
