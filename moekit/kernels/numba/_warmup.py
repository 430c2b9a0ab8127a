"""Compiling the usual kernels ahead of their first use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from moekit.kernels.numba import (
    _activations,
    _gemm_kernels,
    _glu_kernels,
    _packed_kernels,
    _router_kernels,
    _row_kernels,
    _table_kernels,
    _team,
    _units,
)
from moekit.kernels.numba._elements import BF16, E4M3, F16, F32, NONE

_ELEMENTS = (F32, BF16, F16)
_PACKED = (_units.NF4, _units.NESTED, _units.MXFP4, _units.FP8, _units.INT8)


def warmup(progress: Callable[[int, int], None] | None = None) -> int:
    """Compile the kernels of the usual layers, or load them if they are on disk already.

    These are the operators in each dtype, with the gated activations unclamped and without a bias, their float8 store,
    and the clamped ones with a bias an expert (gpt-oss), packed weights unpacked and multiplied with. Rarer combinations
    compile when they are first used.

    Args:
        progress: called with the number of kernels done and the number in all, before the first and after each.

    Returns:
        the number of kernels.
    """
    jobs = list(_usual())
    if progress is not None:
        progress(0, len(jobs))
    for done, compile_one in enumerate(jobs, start=1):
        _team.native(compile_one())
        if progress is not None:
            progress(done, len(jobs))
    return len(jobs)


def _usual() -> Iterator[Callable[[], Any]]:
    for element in _ELEMENTS:
        yield from _usual_glu(element)
        yield lambda element=element: _gemm_kernels.by_feature_kernel(element)
        yield lambda element=element: _gemm_kernels.by_input_kernel(element)
        for format in _PACKED:
            yield lambda element=element, format=format: _packed_kernels.unpack_kernel(element, format)
            yield lambda element=element, format=format: _gemm_kernels.by_feature_kernel(element, format)
        yield lambda element=element: _row_kernels.unpermute_kernel(element)
        yield lambda element=element: _row_kernels.unpermute_backward_kernel(element, element, True, True)
        for scoring in (
            _router_kernels.SOFTMAX,
            _router_kernels.PRE_SOFTMAX,
            _router_kernels.SIGMOID,
            _router_kernels.ROOT_SOFTPLUS,
        ):
            yield lambda element=element, scoring=scoring: _router_kernels.router_backward_kernel(element, element, scoring)
            yield lambda element=element, scoring=scoring: _router_kernels.weigh_kernel(element, scoring)
            if scoring != _router_kernels.PRE_SOFTMAX:
                yield lambda element=element, scoring=scoring: _router_kernels.score_sums_kernel(element, scoring)
            for has_bias, grouped in itertools.product((False, True), repeat=2):
                by_logits = scoring == _router_kernels.SOFTMAX or not (has_bias or grouped)
                yield lambda args=(element, scoring, has_bias, grouped, by_logits): _router_kernels.router_kernel(*args)
    yield _row_kernels.permute_kernel
    for wide in (False, True):
        yield lambda wide=wide: _table_kernels.count_keys_kernel(wide)
        yield lambda wide=wide: _table_kernels.place_keys_kernel(wide)
    yield _table_kernels.total_kernel
    yield _table_kernels.total_by_expert_kernel
    yield _table_kernels.chunk_rows_kernel
    yield _table_kernels.pad_rows_kernel
    yield _table_kernels.row_tables_kernel
    for size, wide in itertools.product((2, 4), (False, True)):
        yield lambda args=(size, wide): _table_kernels.take_kernel(*args)
        yield lambda args=(size, wide): _table_kernels.put_kernel(*args)
    for by_map in (
        _table_kernels.count_map_kernel,
        _table_kernels.place_map_kernel,
        _table_kernels.widest_kernel,
        _table_kernels.list_map_kernel,
        _table_kernels.capacity_kernel,
    ):
        yield lambda by_map=by_map: by_map(1)  # bool


def _usual_glu(element: int) -> Iterator[Callable[[], Any]]:
    no_clamp, whole = _glu_kernels.NO_CLAMP, _glu_kernels.CONCATENATED
    for kind in (_activations.SIGMOID, _activations.CUBIC, _activations.GELU, _activations.RELU, _activations.RELU2):
        yield lambda kind=kind: _glu_kernels.forward_kernel(element, NONE, kind, no_clamp, whole)
        for stored in (element, E4M3):
            yield lambda kind=kind, stored=stored: _glu_kernels.backward_kernel(
                stored, element, NONE, kind, no_clamp, whole, _glu_kernels.NO_SUM, False
            )
    clamped = (_activations.SIGMOID, _glu_kernels.CLAMP_AFTER_BIAS, _glu_kernels.INTERLEAVED)
    yield lambda: _glu_kernels.forward_kernel(element, element, *clamped)
    yield lambda: _glu_kernels.backward_kernel(element, element, element, *clamped, _glu_kernels.SUM_ROWS, False)
    yield lambda: _glu_kernels.store_fp8_kernel(element)
    yield _glu_kernels.sum_blocks_kernel
