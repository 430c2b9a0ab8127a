"""The operators' own suites on the Triton kernels, in Triton's interpreter: the same tests that the other backends pass.

One by hand: TRITON_INTERPRET=1 MOEKIT_BACKEND=triton PYTHONPATH=tests python -m pytest -p _interpreter tests/test_rows.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _interpreter import INTERPRETED, run_interpreted

pytest.importorskip("triton")

# Those of the operators that have kernels: in one process, because each starts torch and Triton anew.
SUITES = (
    *("glu", "glu_operators", "moe_utils_activations", "rows", "rows_autograd", "sort_chunks", "tables", "routing"),
    *("topk", "scores", "moe_utils_permute", "moe_utils_permute_autograd", "experts", "experts_inputs"),
    *("experts_topk", "experts_invariant", "opcheck"),
)


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="the kernels run in this process")
def test_the_suites_pass_in_the_interpreter():
    run_interpreted(*(Path(__file__).with_name(f"test_{name}.py") for name in SUITES))
