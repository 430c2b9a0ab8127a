"""What ``torch.compile`` leaves as it is: it compiles what comes before such a call, and what comes after."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(method: Callable[P, R]) -> Callable[P, R]:
    """``method``, which no compiler looks into: rows that are on their way are nothing that it knows."""

    @functools.cache
    def disabled() -> Any:
        return torch.compiler.disable(method)

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # nobody compiles, and to load it takes seconds
            return method(*args, **kwargs)
        return disabled()(*args, **kwargs)

    return call
