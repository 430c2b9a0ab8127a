"""Break moekit on purpose, one way at a time, and show that the suite notices: ``make mutants``.

Each mutant is a run of part of the suite in a process of its own, in which this file is a pytest plugin that swaps the
broken piece in. Operators are broken at the seam where kernels come in, so that every caller meets it. The first row
runs the same machinery with nothing broken: it must pass.

``python tests/mutants.py [PART OF A NAME ...]`` runs only those. The exit status is 1 if a mutant survives.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = "MOEKIT_TEST_MUTANT"
CONTROL = "nothing"
# The reference cases of the smallest size, and the quickest tests of what they leave out.
GOLDEN = [case["id"] for case in json.loads((ROOT / "tests/golden/cases.json").read_text())]
SELECTION = (
    *(f"tests/test_golden.py::test_golden[torch-{id}]" for id in GOLDEN if "-0" in id and "wide" not in id),
    "tests/test_glu.py::test_rows_past_the_last_offset_are_zero",
    "tests/test_glu.py::test_interleaved_is_concatenated_with_converted_weights",
    "tests/test_glu.py::test_value_and_gradients",
    "tests/test_glu.py::test_clamp_passes_the_gradient_at_its_boundary",
    "tests/test_glu_operators.py::test_float8_rows",
    "tests/test_glu_operators.py::test_float8_gradients_are_close_at_any_scale",
    "tests/test_aux_loss.py::test_linear_in_its_scale",
    "tests/test_lora.py::test_values_and_gradients",
    "tests/test_lora.py::test_dropout_is_seeded_and_the_same_in_backward",
    "tests/test_lora.py::test_merge",
    "tests/test_packed.py::test_nf4_at_the_middle_between_two_values",
    "tests/test_experts_invariant.py::test_float64_and_the_reference[torch]",
    "tests/test_ep_scale.py::test_needed_is_what_counting_gives",
    "tests/test_plan.py::test_bytes_of_every_way_on_a_gpu",
    "tests/test_ep_faults.py::test_a_table_of_what_differs",
    "tests/test_ep_faults.py::test_who_has_not_reported_in",
)

# Of what runs on several ranks, each of which is broken.
RANKS = (
    "tests/test_ep.py::test_ranks_equal_one[2]",
    "tests/test_ep_options.py",
    "tests/test_ep_calls.py",
    "tests/test_ep_adapters.py",
    "tests/test_ep_layer.py::test_the_layer_on_two_ranks",
)


# --- how to break ---------------------------------------------------------------------------------------------------


def operator(name: str, change: Callable[..., Any]) -> Callable[[], None]:
    """``change(run, *args)`` takes the place of the operator ``moekit::name``; ``run`` is the operator itself."""

    def apply() -> None:
        import torch

        from moekit import _backend

        find, running = _backend.kernel, []

        def run(*args: Any) -> Any:
            running.append(name)
            try:
                return getattr(torch.ops.moekit, name).default(*args)
            finally:
                running.pop()

        def kernel(op: str, tensor: Any) -> Callable | None:
            if op != name or running or tensor.device.type == "meta":
                return find(op, tensor)
            return lambda *args: change(run, *args)

        _backend.kernel = kernel

    return apply


def attribute(module: str, name: str, change: Callable[[Any], Any]) -> Callable[[], None]:
    """``change(found)`` takes the place of what ``moekit.<module>`` looks up by ``name`` when it runs."""

    def apply() -> None:
        owner = importlib.import_module(f"moekit.{module}")
        setattr(owner, name, change(getattr(owner, name)))

    return apply


def with_argument(at: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """The operator, given another argument."""
    return lambda run, *args: run(*args[:at], change(args[at]), *args[at + 1 :])


def with_result(at: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """The operator, with another result among several."""

    def broken(run: Callable, *args: Any) -> tuple:
        results = list(run(*args))
        results[at] = change(results[at])
        return tuple(results)

    return broken


def swap_halves(y: Any) -> Any:
    """``[gate | up]`` to ``[up | gate]``."""
    return y.roll(y.shape[-1] // 2, -1)


def without_last_expert(routing_map: Any) -> Any:
    """The map, with nobody routed to the last expert."""
    routed = routing_map.clone()
    routed[:, -1:] = 0
    return routed


def one_row_on(rows: Any) -> Any:
    """A table of rows, each entry in its neighbour's place."""
    return rows.roll(1, 0)


def method(name: str, change: Callable[..., Any]) -> Callable[[], None]:
    """``change(original, self, *args)`` takes the place of a method of the experts' projections."""

    def changed(kind: Any) -> Any:
        original = getattr(kind, name)
        return type(kind.__name__, (kind,), {name: lambda self, *args, **named: change(original, self, *args, **named)})

    return attribute("ops.experts_parts", "Projection", changed)


def constant(wrong: dict[float, float]) -> Callable[[Any], Any]:
    """A constant of an activation, replaced if it is one of ``wrong``."""
    return lambda value: next((bad for right, bad in wrong.items() if math.isclose(value, right)), value)


def _plain() -> Any:
    """The products that follow the number of rows."""
    return importlib.import_module("moekit.ops.products").PLAIN


# --- what to break --------------------------------------------------------------------------------------------------

_TANH_CUBIC = 0.044715 * 2 * math.sqrt(2 / math.pi)
_C1, _C3, _OFFSET = 5, 6, 7  # among the arguments of glu; two further in glu_backward

MUTANTS: dict[str, Callable[[], None]] = {
    CONTROL: lambda: None,
    "the output is zero": operator("glu", lambda run, *args: run(*args).zero_()),
    "gate and up are swapped": operator("glu", with_argument(0, swap_halves)),
    "gate and up are swapped in the gradient": operator("glu_backward", with_result(0, swap_halves)),
    "routing weights are not applied": operator("glu", with_argument(1, lambda weights: None)),
    "the weights' gradient is doubled": operator("glu_backward", with_result(1, lambda grad: grad * 2)),
    "1.702 is 1.7": operator("glu", with_argument(_C1, constant({1.702: 1.7}))),
    "1.702 is 1.7 in the gradient": operator("glu_backward", with_argument(_C1 + 2, constant({1.702: 1.7}))),
    "0.044715 is 0.0447": operator("glu", with_argument(_C3, constant({_TANH_CUBIC: _TANH_CUBIC * 0.0447 / 0.044715}))),
    "the offset is forgotten in the gradient": operator("glu_backward", with_argument(_OFFSET + 2, lambda offset: 0.0)),
    "the clamp's gradient passes everywhere": attribute(
        "ops.glu",
        "_halves",
        lambda halves: lambda *args: halves(*args)._replace(gate_inside=None, up_inside=None),
    ),
    "the bias has no gradient": operator("glu_backward", with_result(2, lambda grad: grad.zero_())),
    "rows of no expert are computed": attribute("ops.glu", "_in_range", lambda inside: lambda *args: None),
    "float8 rows have no scale": operator(
        "glu_fp8", lambda run, y, *rest: (run(y, *rest)[0], y.to(run(y, *rest)[1].dtype), run(y, *rest)[2] ** 0)
    ),
    "permute is off by one row": operator("permute", with_argument(1, one_row_on)),
    "unpermute is off by one row": operator("unpermute", with_argument(0, one_row_on)),
    "unpermute does not apply the weights": operator("unpermute", with_argument(1, lambda weights: None)),
    "the last expert is dropped": operator("route_map", with_argument(0, without_last_expert)),
    "chunks stay where they are": operator("sort_chunk_rows", with_argument(1, lambda order: order.sort().values)),
    "router weights are not scaled": operator("topk_router", with_argument(7, lambda factor: None)),
    "the load-balancing loss ignores its coefficient": attribute(
        "ops.losses", "switch_loss", lambda loss: lambda *args: loss(*args[:5], 1.0, *args[6:])
    ),
    "the auxiliary gradient is not scaled": attribute(
        "ops.aux_loss", "scaled_ones", lambda ones: lambda scale, *rest: ones(None, *rest)
    ),
    "adapters are not scaled": method("adapters", lambda run, self: (one._replace(scale=1.0) for one in run(self))),
    "the gradient of A is not scaled": method("raised", lambda run, self, grad, offsets: run(self, grad, offsets) / 0.5),
    "the tokens' gradient leaves the adapters out": method(
        "backward", lambda run, self, grad, offsets, high, out=None: run(self, grad, offsets, None, out)
    ),
    "the gradient of A is one of what was not dropped": method(
        "gradient_of_a", lambda run, self, *args: run(self._replace(seed=None), *args)
    ),
    "B's gradient is one of what was not dropped": method(
        "lower", lambda run, self, rows, offsets: run(self._replace(seed=None), rows, offsets)
    ),
    "the batch chooses the products": attribute("ops.experts_parts", "INVARIANT", lambda invariant: _plain()),
    "nibbles are swapped": attribute("ops.unpack", "_pairs", lambda pairs: lambda *args: pairs(*args).flip(1)),
    "a scale is of the next block": attribute(
        "ops.unpack", "float_scales", lambda scales: lambda *args: scales(*args).roll(1, 1)
    ),
    "every expert has the first one's values": attribute(
        "ops.packed_products",
        "unpack",
        lambda unpack: lambda stored, start, stop, *rest: unpack(stored, 0, stop - start, *rest),
    ),
    "codes are rounded down": attribute(
        "packed.nf4", "_nearest", lambda nearest: lambda values, table: (nearest(values, table).int() - 1).clamp(0).byte()
    ),
    "merging forgets the scale": attribute("packed.merging", "_scales", lambda scales: lambda *args: scales(*args) ** 0),
    "a token may choose an expert twice": attribute(
        "plan.exchange", "needed", lambda needed: lambda layer, parts: 1 - (1 - 1 / parts) ** layer.topk
    ),
    "a plan forgets where weights are unpacked": attribute("plan.memory", "_workspace", lambda workspace: lambda *args: {}),
    "a name that not all ranks know is no difference": attribute(
        "ep._agree",
        "differences",
        lambda run: lambda ranks, given: run(ranks, [{n: f[n] for n in f if n in given[0]} for f in given]),
    ),
    "the second half of the ranks is not asked": attribute(
        "ep._faults", "_absent", lambda absent: lambda store, ranks: absent(store, ranks[: (len(ranks) + 1) // 2])
    ),
}

MUTANTS_OF_RANKS: dict[str, Callable[[], None]] = {
    "results come back to other tokens": attribute(
        "ep._ways", "sum_rows", lambda sum_rows: lambda rows, *rest: sum_rows(rows.roll(1, 0), *rest)
    ),
    "tables of the rows that are sent name others": attribute(
        "ep.all_to_all",
        "_prefix",
        lambda prefix: lambda tables, sizes: (prefix(tables, sizes)[0], tables[1], prefix(tables, sizes)[2].flip(0)),
    ),
    "what is over capacity is not counted": attribute(
        "ep._overflow", "Overflow", lambda kind: setattr(kind, "add", lambda self, dropped: None) or kind
    ),
    "every round is kept for backward": attribute(
        "ep._rounds", "checkpoint", lambda checkpoint: lambda run, *args, **options: run(*args)
    ),
    "received rows are kept, redispatch or not": attribute("ep.all_to_all", "Redispatch", lambda again: lambda *args: None),
    "a part of a token from another rank is forgotten": attribute(
        "ep._ways",
        "Collect",
        lambda kind: type("Collect", (kind,), {"finish": lambda self, pending: kind.finish(self, pending.tril())}),
    ),
    "a slice is put in the place of another": attribute(
        "ep.slices", "_gather", lambda gather: lambda part, *rest: gather(part, *rest).roll(1, 0)
    ),
    "torchtitan's scores are left out": attribute(
        "ep.torchtitan", "unpermute", lambda unpermute: lambda rows, routing, weighted: unpermute(rows, routing)
    ),
    "gradients of experts are not divided by their batches": attribute(
        "ep.gradients", "Reduction", lambda kind: setattr(kind, "factor", property(lambda self: 1.0)) or kind
    ),
    "a norm is of this rank's experts alone": attribute("ep.gradients", "_over", lambda over: lambda power, *rest: power),
    "every rank draws experts of its own": attribute(
        "ep.placement",
        "compute_local_shape_and_global_offset",
        lambda found: lambda *args: (found(*args)[0], (0, *found(*args)[1][1:])),
    ),
}
MUTANTS |= MUTANTS_OF_RANKS


# --- running --------------------------------------------------------------------------------------------------------


def pytest_configure() -> None:
    """As a plugin: break what the environment names."""
    MUTANTS[os.environ[ENVIRONMENT]]()


def failures(name: str, selection: Sequence[str] | None = None) -> list[str]:
    """The tests of ``selection`` that fail with the mutant ``name``; of those that belong to it, if there is none."""
    selection = selection or (RANKS if name in MUTANTS_OF_RANKS else SELECTION)
    environment = {
        **os.environ,
        ENVIRONMENT: name,
        "MOEKIT_BACKEND": "torch",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    options = ("-q", "--tb=no", "-rfE", "-p", "mutants", "-p", "no:cacheprovider", "-p", "no:xdist")
    command = [sys.executable, "-m", "pytest", *options, *selection]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # neither all passed nor some failed
        raise RuntimeError(f"mutant {name!r}: pytest stopped\n{done.stdout}\n{done.stderr}")
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]


def main(parts: Sequence[str]) -> int:
    """Run the mutants whose name contains one of ``parts`` (all without any) and print a table."""
    chosen = [name for name in MUTANTS if name == CONTROL or not parts or any(part in name for part in parts)]
    width, started, survivors = max(map(len, chosen)), time.monotonic(), 0
    print(f"{'broken':{width}}  {'tests that fail':>15}  the first")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, failed in zip(chosen, pool.map(failures, chosen), strict=True):
            verdict = f"{len(failed):15}" if failed or name == CONTROL else f"{'SURVIVED':>15}"
            print(f"{name:{width}}  {verdict}  {failed[0] if failed else ''}", flush=True)
            survivors += bool(failed) == (name == CONTROL)
    caught = f"{len(chosen) - 1 - survivors} of {len(chosen) - 1} mutants caught"
    print(f"\n{caught} in {time.monotonic() - started:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
