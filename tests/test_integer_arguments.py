"""Nonsense in integer tensors: an error or the right result, and no memory outside the tensors is touched.

``fuzz_integers.py`` says how; here each kind of nonsense is tried once on each argument, and the GPU kernels in Triton's
interpreter on a part of that, without the checks that a CPU has.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _guarded import Guard
from _integer_cases import NO_INTEGERS, NONSENSE, OPS, PAIRS, TARGETS
from fuzz_integers import run_on_cpu

import moekit
from moekit import Routing

_OWN = os.environ.get("TRITON_INTERPRET") == "1"  # the suite within the interpreter starts no further children
CHILDREN = pytest.mark.skipif(_OWN or not moekit.available()["numba"], reason="needs the CPU kernels")


@CHILDREN
def test_every_kind_of_nonsense_in_every_argument():
    tally = run_on_cpu(["torch", "numba"], range(len(PAIRS)), seed=0)
    assert tally.draws == len(PAIRS)
    assert not tally.crashes + tally.faults, str(tally)
    assert tally.raised > len(PAIRS) // 3  # that nonsense is drawn at all


@pytest.mark.skipif(_OWN or not moekit.available()["triton"], reason="needs triton")
def test_gpu_kernels_stay_inside_without_checks():
    tally = run_on_cpu(["triton"], range(0, len(PAIRS), 7), seed=1)
    assert not tally.crashes + tally.faults, str(tally)


def test_the_reference_stays_inside_without_checks():
    """As it runs on a GPU, where an index out of range would end the process."""
    tally = run_on_cpu(["torch", "unchecked"], range(0, len(PAIRS), 2), seed=2)
    assert not tally.crashes + tally.faults, str(tally)


def test_no_operator_is_left_out():
    operators = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("moekit::")}
    assert len(operators) > 20
    for name in operators:
        arguments = getattr(OPS, name).default._schema.arguments
        tensors = [a.name for a in arguments if "Tensor" in str(a.type) and a.name not in NO_INTEGERS]
        if tensors:
            assert set(tensors) <= set(TARGETS[f"ops.{name}"].integers), name


def test_guards_notice_both_sides():
    """One number written past the end, or before the beginning, ends a process."""
    script = (
        "import ctypes, sys, torch; from _guarded import Guard;"
        "t = Guard(0, iter([sys.argv[1] == '32'])).tensor((8,), torch.int32); t += 1;"
        "ctypes.c_int32.from_address(t.data_ptr() + int(sys.argv[1])).value = 1"
    )
    for offset, code in ((28, 0), (32, -signal.SIGSEGV), (-4, -signal.SIGSEGV)):
        command = [sys.executable, "-c", script, str(offset)]
        assert subprocess.run(command, cwd=Path(__file__).parent, capture_output=True).returncode == code


def test_guarded_memory_lives_as_long_as_a_tensor_of_it():
    """What is tested may keep a tensor, in a cache say, beyond the test."""
    kept = Guard(0xFF).tensor((5000,), torch.uint8)[1:]
    others = [Guard(0).tensor((5000,), torch.uint8) for _ in range(8)]
    assert (kept == 0xFF).all() and not torch.stack(others).any()
    page = f"{kept.data_ptr() // 4096 * 4096:x}-"
    assert page in Path("/proc/self/maps").read_text()
    del kept
    assert page not in Path("/proc/self/maps").read_text()


# --- the messages ---------------------------------------------------------------------------------------------------

OFFSETS = {"past": [2, 4, 6, 40], "decreasing": [4, 2, 6, 8], "negative": [-1, 2, 4, 6], "huge": [2, 4, 6, 2**40]}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offsets_are_refused(name, dtype):
    offsets = torch.tensor(OFFSETS[name])
    rows, weight = torch.ones(8, 64, dtype=dtype), torch.ones(4, 64, 64, dtype=dtype)
    for call in (
        lambda: moekit.grouped_linear(rows, weight, offsets),
        lambda: moekit.glu(rows, bias=weight[:, 0], offsets=offsets),
        lambda: moekit.glu(rows, offsets=offsets, fp8_store=True),
        lambda: OPS.grouped_outer(rows, rows, offsets),
    ):
        with pytest.raises(ValueError, match=r"offsets must be .* 8"):
            call()


def _routing(**changes: torch.Tensor) -> Routing:
    found = Routing.from_topk(torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.ones(3, 2), num_experts=3)
    return Routing(**{name: changes.get(name, getattr(found, name)) for name in found.__dataclass_fields__})


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "changes",
    [
        {"order": torch.tensor([0, 5, 1, 2, 3, 6], dtype=torch.int32)},
        {"order": torch.tensor([0, 5, 1, 2, 3, -7], dtype=torch.int32)},
        {"order": torch.tensor([0, 0, 1, 2, 3, 4], dtype=torch.int32)},
        {"inverse": torch.tensor([[0, 2], [3, 4], [5, 5]], dtype=torch.int32)},
        {"inverse": torch.tensor([[-1, 2], [3, 4], [5, 1]], dtype=torch.int32)},
        {"inverse": torch.tensor([[0, 2], [3, 4], [6, 1]], dtype=torch.int32)},
    ],
)
def test_hand_made_routings_are_refused(changes):
    routing, x = _routing(**changes), torch.ones(3, 8)
    for call in (
        lambda: moekit.permute(x, routing),
        lambda: moekit.unpermute(torch.ones(6, 8), routing),
        lambda: moekit.experts(x, routing, torch.ones(3, 8, 8), torch.ones(3, 8, 4)),
        lambda: routing.pad_to_multiple(4),
    ):
        with pytest.raises(ValueError, match=r"must be"):
            call()


@pytest.mark.usefixtures("backend")
def test_row_zero_of_token_zero_counts():
    """A table that leaves out this one row is as wrong as one that leaves out another."""
    row_token, starts = torch.tensor([0]), torch.tensor([0, 1], dtype=torch.int32)
    for named, found in ((-1, row_token), (0, row_token - 1)):
        rows = torch.tensor([named], dtype=torch.int32)
        for call in (
            lambda rows=rows, found=found: OPS.permute(torch.ones(1, 8), found, starts, rows),
            lambda rows=rows, found=found: OPS.unpermute(torch.ones(1, 8), None, found, starts, rows),
        ):
            with pytest.raises(ValueError, match=r"token_rows must be"):
                call()


@pytest.mark.usefixtures("backend")
def test_a_table_that_contradicts_itself_is_not_padded():
    """Rows behind the last expert's that have a slot, and an inverse of another order."""
    routing = _routing()
    wrong = (
        (routing.offsets - 1, routing.order, routing.inverse),
        (routing.offsets, routing.order.flip(0), routing.inverse),
        (routing.offsets, routing.order, routing.inverse.flip(0)),
    )
    for offsets, order, inverse in wrong:
        with pytest.raises(ValueError, match=r"(order|inverse) must be"):
            OPS.pad_rows(offsets, order, inverse, 4)


def test_the_kinds_are_there():
    assert {"huge", "past_the_end", "negative", "decreasing", "shuffled", "duplicate", "dtype", "short"} <= set(NONSENSE)
