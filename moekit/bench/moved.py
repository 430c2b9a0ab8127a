"""Bytes that an operator has to move, read and written: ``moekit bench`` and ``moekit doctor`` hold its time against them.

T tokens, K experts a token of E, R = T * K rows, hidden size H, intermediate size I, b bytes an element. Logits, weights of
rows and their gradients are float32, experts int64. The formulas are those of ``docs/performance/gpu.md``.
"""

from __future__ import annotations


def route(T: int, E: int, K: int) -> int:
    """Logits read; weights and experts written."""
    return 4 * T * E + 12 * T * K


def route_backward(T: int, E: int, K: int) -> int:
    """Logits and what was chosen read, the logits' gradient written."""
    return 8 * T * E + 12 * T * K


def permute(T: int, R: int, H: int, b: int) -> int:
    """Tokens on one side, rows on the other; backward is as much."""
    return (T + R) * H * b


def unpermute(T: int, R: int, H: int, b: int) -> int:
    """The same, and the weights of rows."""
    return (T + R) * H * b + 4 * R


def unpermute_backward(T: int, R: int, H: int, b: int) -> int:
    """The tokens' gradient and rows read, the rows' gradient written; weights read, and their gradient written."""
    return (T + 2 * R) * H * b + 8 * R


def glu(R: int, I: int, b: int) -> int:
    """Both halves and the weights of rows read, as much as one half written."""
    return 3 * R * I * b + 4 * R


def glu_backward(R: int, I: int, b: int) -> int:
    """The upstream gradient and both halves read, two halves written; weights read, and their gradient written."""
    return 5 * R * I * b + 8 * R
