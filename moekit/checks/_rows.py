"""Ordinary cases of permute, unpermute and sort_chunks_by_idxs: rows are the same numbers, sums and gradients near."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moekit.checks import _formulas as formulas
from moekit.checks._activations import DTYPES
from moekit.checks._case import Case, compared, draw, transposed
from moekit.checks._compare import close, exact

T, E, H = 10, 4, 8


def routing_map() -> Tensor:
    """``[T, E]``: any number of experts a token, a token of none, an expert of none."""
    found = draw(11, T, E) > 0
    found[3], found[:, 2] = False, False
    return found


def routing() -> dict[str, Tensor]:
    """A map and its probs, which are zero where nothing is routed."""
    found = routing_map()
    return {"routing_map": found, "probs": draw(12, T, E).abs() * found}


def rows_of(found: Tensor, hidden: int = H, **how: Any) -> dict[str, Any]:
    """What unpermute takes: rows, the token of each, and the shape to restore."""
    tokens = torch.tensor([t for t, _ in formulas.pairs_of(found, **how)], dtype=torch.int64)
    return {
        "permuted_tokens": draw(13, len(tokens), hidden),
        "sorted_indices": tokens,
        "restore_shape": (found.shape[0], hidden),
    }


def cases() -> Iterator[Case]:
    """All of them."""
    capacity = {"num_out_tokens": 3 * E, "drop_and_pad": True}
    for name, dtype in DTYPES.items():
        for special, args in {"": {}, ", drop_and_pad": capacity}.items():
            yield from _both(f"{name}{special}", dtype, args)
        sizes = {"split_sizes": torch.tensor([3, 0, 5, 2]), "sorted_idxs": torch.tensor([2, 0, 3, 1])}
        chunks = {"input": draw(14, T, H), **sizes, "probs": draw(15, T)}
        sources = ("input", "probs")
        yield compared("sort_chunks_by_idxs", name, chunks, formulas.sort_chunks, dtype=dtype, sources=sources, bound=exact)
    args = {"tokens": draw(10, T, H), **routing()}
    yield compared(
        "permute",
        "float32, transposed",
        args,
        formulas.permute,
        sources=("tokens", "probs"),
        bound=exact,
        grad_bound=close,
        layout=transposed,
    )


def _both(name: str, dtype: torch.dtype, how: dict[str, Any]) -> Iterator[Case]:
    """Permute and unpermute, without and with probs."""
    known, tokens = routing(), {"tokens": draw(10, T, H)}
    alone = {"routing_map": known["routing_map"]}
    for special, given, sources in (("", alone, ()), (", probs", known, ("probs",))):
        yield compared(
            "permute",
            name + special,
            {**tokens, **given, **how},
            formulas.permute,
            dtype=dtype,
            sources=("tokens", *sources),
            bound=exact,
            grad_bound=close,
        )
        rows = rows_of(known["routing_map"], **how)
        args = {**rows, **(known if sources else {}), "drop_and_pad": bool(how)}
        from_rows = ("permuted_tokens", *sources)
        yield compared("unpermute", name + special, args, formulas.unpermute, dtype=dtype, sources=from_rows)
