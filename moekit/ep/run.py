"""Experts on several ranks, as a function of tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moekit import _check
from moekit.ep.dispatcher import Dispatcher, Overlapping
from moekit.routing import Routing

_OP = "ep.run"


def run(
    dispatcher: Dispatcher,
    tokens: Tensor,
    routing: Routing,
    experts: Callable[[Tensor, Routing], Tensor],
    beside: Callable[[], Tensor] | None = None,
) -> Tensor:
    """The routed experts' output, and that of what runs beside the exchange.

    Args:
        dispatcher: brings the tokens to their experts.
        tokens: ``[T, H]``.
        routing: of these tokens over all experts, with weights.
        experts: this rank's: ``rows [N, H]`` and their routing over its experts to ``[N, H]``, weighted and summed. It is
            called once, by a dispatcher that works in rounds once a round, and in backward again.
        beside: a shared expert, say, that runs while the rows travel, and whose result ``[T, H]`` is added.

    Returns:
        ``[T, H]``.

    Raises:
        TypeError: no dispatcher.
        ValueError: what ran beside gave another shape.
    """
    if not isinstance(dispatcher, Dispatcher):
        wanted = "a moekit.ep.Dispatcher, with dispatch and combine"
        raise _check.wrong_type(_OP, "dispatcher", wanted, type(dispatcher).__name__)
    if isinstance(dispatcher, Overlapping):
        started = dispatcher.start(tokens, routing)
        shared = None if beside is None else beside()
        out = started.through(experts)
    else:
        rows, local, handle = dispatcher.dispatch(tokens, routing)
        shared = None if beside is None else beside()
        out = dispatcher.combine(experts(rows, local), handle)
    if shared is None:
        return out
    _check.shape(_OP, "what beside gives", shared, out.shape, "[tokens, H]")
    return out + shared
