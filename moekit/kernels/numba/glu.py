"""Launchers of the gated activations: ``glu``, ``glu_fp8``, ``glu_backward``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import _check
from moekit.kernels.numba import _activations, _glu_kernels
from moekit.kernels.numba._elements import E4M3, KINDS, NONE, SIZES
from moekit.kernels.numba._launch import INDICES, Nonsense, address, dense, streams
from moekit.kernels.numba._threads import run

_LAYOUTS = {
    "concatenated": _glu_kernels.CONCATENATED,
    "interleaved": _glu_kernels.INTERLEAVED,
    "ungated": _glu_kernels.UNGATED,
}
# "sigmoid" with a cubic term has kernels of its own.
_ACTIVATIONS = {
    "sigmoid": _activations.SIGMOID,
    "gelu": _activations.GELU,
    "relu": _activations.RELU,
    "relu2": _activations.RELU2,
}
# Rows at a time between the two passes of glu_fp8: what the first has read is then still in the second-level cache.
_CACHED_BYTES = 1 << 19


class _Spec(NamedTuple):
    """The operator's constants, as the kernels take them."""

    kind: int
    order: int
    layout: int
    halves: int
    constants: tuple[float, float, float, float]


def _spec(act: str, c1: float, c3: float, offset: float, clamp: float | None, clamp_after_bias: bool, layout: str) -> _Spec:
    kind = _check.known("the numba kernels", "activation", act, _ACTIVATIONS)
    if kind == _activations.SIGMOID and c3:
        kind = _activations.CUBIC
    order = _glu_kernels.NO_CLAMP
    if clamp is not None:
        order = _glu_kernels.CLAMP_AFTER_BIAS if clamp_after_bias else _glu_kernels.CLAMP_BEFORE_BIAS
    halves = 1 if layout == "ungated" else 2
    where = _check.known("the numba kernels", "layout", layout, _LAYOUTS)
    return _Spec(kind, order, where, halves, (c1, c3, offset, clamp or 0.0))


def _leaves(
    y: Tensor, weights: Tensor | None, bias: Tensor | None, offsets: Tensor | None, scale: Tensor | None = None
) -> bool:
    """Whether the reference has to do it, or to refuse it: float64 anywhere, no experts at all, or sizes that do not fit."""
    if offsets is not None and (offsets.numel() == 0 or offsets.dtype not in INDICES or offsets.dim() != 1):
        return True
    if bias is not None and (bias.dtype is torch.float64 or not _one_for_all(y, bias, offsets)):
        return True
    if weights is not None and (weights.dtype is torch.float64 or weights.numel() != y.shape[0]):
        return True
    return scale is not None and (scale.dtype is torch.float64 or scale.numel() != y.shape[0])


def _one_for_all(y: Tensor, bias: Tensor, offsets: Tensor | None) -> bool:
    """Whether there is a bias for all rows, for each row or for each expert."""
    if bias.shape[-1] != y.shape[1]:
        return False
    return (bias.dim() == 1 and offsets is None) or len(bias) == len(y if offsets is None else offsets)


def _length(offsets: Tensor | None) -> int:
    return 0 if offsets is None else len(offsets)


def _bias_arguments(bias: Tensor | None, features: int) -> tuple[Tensor | None, int, int]:
    """The bias as a dense tensor, its kind and the bytes from one row of it to the next."""
    if bias is None:
        return None, NONE, 0
    bias = dense(bias, None if bias.dtype in KINDS and bias.dtype is not torch.float8_e4m3fn else torch.float32)
    kind = KINDS[bias.dtype]
    return bias, kind, features * SIZES[kind] if bias.dim() == 2 else 0


def glu(y: Tensor, weights: Tensor | None, bias: Tensor | None, offsets: Tensor | None, *constants: Any) -> Any:
    """See :func:`moekit.ops.glu.glu_reference`."""
    return _forward(y, weights, bias, offsets, constants, keep=False)


def glu_fp8(y: Tensor, weights: Tensor | None, bias: Tensor | None, offsets: Tensor | None, *constants: Any) -> Any:
    """:func:`glu`, and y as float8 with a scale a row."""
    return _forward(y, weights, bias, offsets, constants, keep=True)


def _forward(
    y: Tensor, weights: Tensor | None, bias: Tensor | None, offsets: Tensor | None, constants: tuple, *, keep: bool
) -> Any:
    element = KINDS.get(y.dtype, E4M3)
    if element == E4M3 or _leaves(y, weights, bias, offsets):
        return NotImplemented
    spec = _spec(*constants)
    y, weights, offsets = dense(y), dense(weights, torch.float32), dense(offsets, torch.int64)
    rows, features = y.shape
    width = features // spec.halves
    bias, bias_kind, bias_step = _bias_arguments(bias, features)
    out = torch.empty((rows, width), dtype=y.dtype)
    kernel = _glu_kernels.forward_kernel(element, bias_kind, spec.kind, spec.order, spec.layout)
    args = (
        rows, y.data_ptr(), address(weights), address(bias), bias_step, address(offsets), _length(offsets),
        out.data_ptr(), width, *spec.constants, streams(out, width * SIZES[element]),
    )  # fmt: skip
    if not keep:
        return out if _ran(kernel, rows, y.nbytes + out.nbytes, *args) else NotImplemented
    kept, scales = torch.empty(y.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, dtype=torch.float32)
    keeping = _glu_kernels.store_fp8_kernel(element)
    kept_args = (y.data_ptr(), kept.data_ptr(), scales.data_ptr(), features)
    block = max(1, _CACHED_BYTES // max(1, features * SIZES[element]))

    def both(start: int, stop: int) -> None:
        for first in range(start, stop, block):
            last = min(first + block, stop)
            kernel(first, last, *args)
            keeping(first, last, *kept_args)

    return (out, kept, scales) if _ran(both, rows, y.nbytes + out.nbytes + kept.nbytes) else NotImplemented


def _ran(kernel: Callable, rows: int, *args: Any, **options: Any) -> bool:
    """Run a kernel; False if it found offsets that cannot be."""
    try:
        run(kernel, rows, *args, **options)
    except Nonsense:
        return False
    return True


def glu_backward(
    grad: Tensor,
    y: Tensor,
    scale: Tensor | None,
    weights: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor | None,
    *constants: Any,
) -> Any:
    """See :func:`moekit.ops.glu.glu_backward_reference`."""
    element, grad_kind = KINDS.get(y.dtype), KINDS.get(grad.dtype, E4M3)
    if element is None or grad_kind == E4M3 or (element == E4M3) != (scale is not None):
        return NotImplemented
    if _leaves(y, weights, bias, offsets, scale) or grad.shape[0] != y.shape[0]:
        return NotImplemented
    want_y, want_weights, want_bias, want_out = constants[-1]
    spec = _spec(*constants[:-1])
    dtype = grad.dtype if scale is not None else y.dtype
    grad, y, scale, offsets = dense(grad), dense(y), dense(scale), dense(offsets, torch.int64)
    rows, features = y.shape
    width = features // spec.halves
    if grad.shape[1] != width:
        return NotImplemented
    ready, bias_kind, bias_step = _bias_arguments(bias, features)
    scaled = dense(weights, torch.float32)

    dy = torch.empty(y.shape if want_y else 0, dtype=dtype)
    want_weights = want_weights and weights is not None
    dweights = torch.empty(rows, dtype=torch.float32) if want_weights else torch.empty(0, dtype=grad.dtype)
    again = torch.empty((rows, width) if want_out else 0, dtype=dtype)
    want_bias = want_bias and bias is not None
    dbias, bias_sum = _bias_gradient(bias, ready, rows, offsets) if want_bias else (grad.new_empty(0), _glu_kernels.NO_SUM)
    kernel = _glu_kernels.backward_kernel(
        element, grad_kind, bias_kind, spec.kind, spec.order, spec.layout, bias_sum, bool(want_out)
    )
    ran = _ran(
        kernel, rows, grad.nbytes + y.nbytes + dy.nbytes + again.nbytes,
        rows, grad.data_ptr(), y.data_ptr(), address(scale), address(scaled), address(ready), bias_step,
        address(offsets), _length(offsets),
        dy.data_ptr(), dweights.data_ptr(), dbias.data_ptr(), again.data_ptr(), width, *spec.constants,
        streams(dy, width * SIZES[KINDS[dtype]]) if want_y else 0,
        block=_glu_kernels.BLOCK if bias_sum == _glu_kernels.SUM_ROWS else 1,
    )  # fmt: skip
    if not ran:
        return NotImplemented
    if bias_sum == _glu_kernels.SUM_ROWS and bias is not None:
        dbias = _sum_blocks(dbias, bias, offsets, rows)
    return (
        dy,
        dweights.to(weights.dtype) if want_weights and weights is not None else dweights,
        dbias.to(bias.dtype) if want_bias and bias is not None else dbias,
        again,
    )


def _bias_gradient(bias: Tensor | None, ready: Tensor | None, rows: int, offsets: Tensor | None) -> tuple[Tensor, int]:
    """Where a kernel writes the bias gradient: its rows as they are, or a float32 sum for each block of rows."""
    if bias is None or ready is None:
        return torch.empty(0, dtype=torch.float32), _glu_kernels.NO_SUM
    if bias.dim() == 2 and offsets is None:
        return torch.empty(ready.shape, dtype=ready.dtype), _glu_kernels.KEEP_ROWS
    blocks = -(-rows // _glu_kernels.BLOCK) + (1 if offsets is None else len(offsets))
    return torch.empty((blocks, bias.shape[-1]), dtype=torch.float32), _glu_kernels.SUM_ROWS


def _sum_blocks(sums: Tensor, bias: Tensor, offsets: Tensor | None, rows: int) -> Tensor:
    out = torch.empty(bias.shape, dtype=torch.float32)
    experts, features = 1 if offsets is None else len(offsets), bias.shape[-1]
    kernel = _glu_kernels.sum_blocks_kernel()
    run(kernel, experts, sums.nbytes, sums.data_ptr(), address(offsets), rows, features, out.data_ptr())
    return out
