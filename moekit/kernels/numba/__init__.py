"""CPU kernels: Numba loops that LLVM turns into vector code for the chip at hand. No compiler, no OpenMP is needed.

**Threads.** Kernels release the GIL and work on a range of rows; torch's own OpenMP threads share the ranges
(:mod:`moekit.kernels.numba._team`), or where these cannot be reached a pool of our own (``_threads``), the calling
thread taking part. ``docs/performance/cpu.md`` has the measurements. Of Numba's own layers ``workqueue`` aborts the process
when two Python threads use it at once, ``omp`` kills a forked child and ``tbb`` needs another package.
Results do not depend on the number of threads: every sum is within a row, within a token, or over blocks of fixed size.

**Memory.** Large outputs are written past the cache (``stream``) and inputs are prefetched ahead. Results are
fresh tensors from PyTorch's allocator: with plain glibc each fresh page of a large one costs a fault, which can take
longer than the kernel; :func:`moekit.keep_pages`, or another malloc, avoids it.
Nothing is written into a saved input, so ``retain_graph`` works; partial sums of bias gradients are the only temporary.

**First use.** A kernel is compiled when it is first needed (0.3 to 2 s), kept in the user's cache
folder (``_cache`` says where, and what is cleared), and loaded from there by later processes (0.2 s for the first, then 4 ms
each); without a writable folder it is compiled in each process. :func:`warmup` compiles the usual ones ahead.

**Numerics.** float32, bfloat16 and float16 inputs, computed in float32 and rounded once. float64 is the reference's.

Files: ``glu``, ``gemm``, ``packed``, ``rows``, ``tables`` and ``router`` launch the operators' kernels in ``_*_kernels``;
``_bits`` holds the intrinsics, ``_units`` and ``_tiles`` those of matrices, ``_elements`` the dtypes, ``_activations`` the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moekit.kernels.numba import gemm, glu, packed, router, rows, tables
from moekit.kernels.numba._warmup import warmup

__all__ = ["KERNELS", "warmup"]

KERNELS: dict[str, Callable[..., Any]] = {
    "grouped_rows": gemm.grouped_rows,
    "packed_rows": packed.packed_rows,
    "unpack": packed.unpack,
    "glu": glu.glu,
    "glu_fp8": glu.glu_fp8,
    "glu_backward": glu.glu_backward,
    "permute": rows.permute,
    "unpermute": rows.unpermute,
    "unpermute_backward": rows.unpermute_backward,
    "route_indices": tables.route_indices,
    "route_map": tables.route_map,
    "map_to_indices": tables.map_to_indices,
    "route_capacity": tables.route_capacity,
    "rows_of_tokens": tables.rows_of_tokens,
    "sort_chunk_rows": tables.sort_chunk_rows,
    "pad_rows": tables.pad_rows,
    "row_tables": tables.row_tables,
    "take": tables.take,
    "put": tables.put,
    "topk_router": router.topk_router,
    "topk_router_backward": router.topk_router_backward,
    "weigh_experts": router.weigh_experts,
    "score_sums": router.score_sums,
}
