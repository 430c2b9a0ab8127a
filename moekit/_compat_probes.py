"""Small calls that show what a function of a framework returns, for :mod:`moekit.compat`.

Each makes its arguments anew: some published functions write into theirs. They are chosen so that no decided difference
shows, every release takes them, and neither a GPU nor a process group is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekit import _backend

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _numbers(*shape: int) -> Tensor:
    """Distinct numbers between -1 and 1, without touching the random state."""
    count = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32)
    return (count * 0.7548776662).remainder(1.0).mul(2).sub(1).view(shape)


def _map() -> Tensor:
    return torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 1]]).bool()


def _probs() -> Tensor:
    return _numbers(4, 3).abs() * _map()


_ORDER = (0, 2, 3, 1, 2, 0, 1, 3)  # the tokens of the rows of that map


def _unary(*shape: int) -> Callable[[], _Arguments]:
    return lambda: ((_numbers(*shape),), {})


_GATED = {
    "swiglu": _unary(3, 8),
    "geglu": _unary(3, 8),
    "quick_gelu": _unary(3, 8),
    "quick_geglu": _unary(3, 8),
    **{
        f"{prefix}{name}{suffix}": (lambda args=args: (tuple(_numbers(*shape) for shape in args), {}))
        for name in ("swiglu", "geglu", "quick_geglu")
        for prefix, suffix, args in (
            ("", "_back", ((3, 4), (3, 8))),
            ("weighted_", "", ((3, 8), (3, 1))),
            ("weighted_", "_back", ((3, 4), (3, 8), (3, 1))),
        )
    },
    "weighted_bias_swiglu_impl": lambda: ((_numbers(3, 8), _numbers(3, 1)), {}),
    "weighted_bias_geglu_impl": lambda: ((_numbers(3, 8), _numbers(3, 1)), {}),
    "weighted_bias_quick_geglu": lambda: ((_numbers(3, 8), _numbers(8), _numbers(3, 1)), {}),
    "weighted_bias_quick_geglu_back": lambda: ((_numbers(3, 4), _numbers(3, 8), _numbers(8), _numbers(3, 1)), {}),
    "weighted_bias_quick_geglu_impl": lambda: ((_numbers(3, 8), _numbers(8), _numbers(3, 1)), {}),
}
ARGUMENTS: dict[str, Callable[[], _Arguments]] = {
    **_GATED,
    "permute": lambda: ((_numbers(4, 2), _map(), _probs()), {"num_out_tokens": 8}),
    "unpermute": lambda: ((_numbers(8, 2), torch.tensor(_ORDER), torch.Size((4, 2)), _probs(), _map()), {}),
    "sort_chunks_by_idxs": lambda: ((_numbers(5, 2), torch.tensor([2, 3]), torch.tensor([1, 0]), _numbers(5)), {}),
    "topk_routing_with_score_function": lambda: ((_numbers(4, 6), 2), {"score_function": "sigmoid", "scaling_factor": 2.5}),
    "group_limited_topk": lambda: ((_numbers(4, 6), 2, 4, 6, 3, 2), {}),
    "compute_routing_scores_for_aux_loss": lambda: ((_numbers(4, 6), 2, "sigmoid"), {}),
    "switch_load_balancing_loss_func": lambda: ((_probs(), _map().sum(0), 4, 2, 3, 0.1), {}),
    "z_loss_func": lambda: ((_numbers(4, 6), 0.1), {}),
    "sinkhorn": _unary(4, 6),
    "get_capacity": lambda: ((10, 4, 1.25), {}),
    "apply_router_token_dropping": lambda: ((_probs(), _map(), 2, 0.75), {}),
    "pad_routing_map": lambda: ((_map(), 2), {}),
    "qb_dual_update": lambda: ((_numbers(6, 4), 2, _numbers(4).mul(0.3)), {}),
}


def call(function: Callable, arguments: _Arguments, names: list[str], order: list[str], implied: dict[str, Any]) -> Any:
    """``function`` on the arguments of a probe, on moekit's reference and without compiling anything.

    ``names`` are moekit's parameters: positional arguments go by their names if ``order``, the function's own, differs.
    ``implied`` is given where the probe gives nothing.
    """
    args, kwargs = arguments
    kwargs = {**{key: value for key, value in implied.items() if key not in names[: len(args)]}, **kwargs}
    if order[: len(args)] != names[: len(args)]:
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    with (
        torch.compiler.set_stance("force_eager"),
        _backend.backend("torch"),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
    ):
        return function(*args, **kwargs)


def difference(theirs: Any, ours: Any) -> str | None:
    """What is different between two results; None if nothing is, or if theirs says nothing."""
    their_values, our_values = _values(theirs), _values(ours)
    if their_values is None or our_values is None:
        return None
    if len(their_values) != len(our_values):
        return f"returns {len(their_values)} values, moekit's {len(our_values)}"
    for position, (value, expected) in enumerate(zip(their_values, our_values, strict=True)):
        if (value is None) != (expected is None):
            return f"returns {'nothing' if value is None else 'something'} as value {position + 1}, unlike moekit's"
        if value is None:
            continue
        value, expected = torch.as_tensor(value), torch.as_tensor(expected)
        if value.shape != expected.shape:
            return f"returns the shape {list(value.shape)} where moekit's returns {list(expected.shape)}"
        if not torch.allclose(value.double(), expected.double(), rtol=1e-3, atol=1e-4):
            return "computes something else on a small example"
    return None


def _values(result: Any) -> list[Any] | None:
    values = list(result) if isinstance(result, (tuple, list)) else [result]
    known = all(value is None or isinstance(value, (Tensor, int, float)) for value in values)
    return values if known else None
