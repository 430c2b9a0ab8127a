"""How long a step of one layer's experts takes, from what it multiplies, what it moves, and measured rates.

Products take their operations over the rate of a large dense product, and every tensor that a kernel reads or writes takes
its bytes over the rate of a copy, one after the other. Neither is quite so: kernels overlap the two, and grouped products
are slower than one dense product. docs/performance/plan.md has this sum beside measured steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from moekit import _check
from moekit.plan.exchange import B200, GB200, H200, Machine
from moekit.plan.memory import DEVICES, Load, fetches_left, shares_rows, unpacks_on_the_way

_OWN = "as given"
_REACHED = 0.75  # of a link's published speed, where nobody has measured
_16_BITS = ("bfloat16", "float16")


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        name: of it.
        flops: operations of a dense product, of one device.
        bandwidth: bytes of a copy, read and written, of one device; None if not known.
        node: devices that the fast links join.
        inside: bytes of a device to others of its node, in one direction; None without a link.
        between: bytes of a device to other nodes, in one direction; None without a link.
        sources: where each comes from.
        dtypes: of products with this rate; None: of whichever are asked for, as the rate is one's own.
    """

    name: str
    flops: float
    bandwidth: float | None
    node: int
    inside: float | None
    between: float | None
    sources: dict[str, str]
    dtypes: tuple[str, ...] | None = None

    def products_in(self, dtype: str) -> float | None:
        """``flops`` of products in ``dtype``; None where it is not known."""
        return self.flops if self.dtypes is None or dtype in self.dtypes else None

    def unknown_links(self, ranks: int) -> list[str]:
        """Those that so many ranks need and that are not known, of ``inside`` and ``between``."""
        needed = {"inside": self.inside} | ({"between": self.between} if ranks > self.node else {})
        return [name for name, rate in needed.items() if rate is None]

    def machine(self, ranks: int) -> Machine | None:
        """As :mod:`moekit.plan.exchange` takes it; None where a link that so many ranks need is not known."""
        if self.inside is None or self.unknown_links(ranks):
            return None
        between = math.inf if self.between is None else self.between  # nothing goes there
        return Machine(self.name, self.node, self.inside, between, self.flops)


def _published(name: str, machine: Machine) -> Rates:
    sources = {"flops": "60% of the published 16-bit rate"}
    sources |= dict.fromkeys(("inside", "between"), "75% of the published link")
    links = (machine.node, _REACHED * machine.inside, _REACHED * machine.between)
    return Rates(name, machine.flops, None, *links, sources, _16_BITS)


def _h200() -> Rates:
    """Of docs/performance: products and copies from gpu_experts.json, the link from ep_h200.json (four GPUs, 256 MB)."""
    known, measured = _published("H200", H200), "measured (gpu_experts.json)"
    sources = {"flops": measured, "bandwidth": measured, "inside": "measured (ep_h200.json)"}
    return replace(known, flops=784e12, bandwidth=4275e9, inside=166e9, sources=known.sources | sources)


MACHINES = {"H200": _h200(), "B200": _published("B200", B200), "GB200": _published("GB200", GB200)}
"""Rates of published machines, of products in 16 bits."""


def changed(rates: Rates | None, **own: float | None) -> Rates | None:
    """Rates with one's own in the place of some; None if there are none at all.

    Raises:
        ValueError: own rates, but none of products.
    """
    given = {name: value for name, value in own.items() if value is not None}
    if rates is None:
        if not given:
            return None
        if "flops" not in given:
            raise _check.fail("plan", "flops", f"given with {', '.join(given)}, or a machine named or measured", "none")
        rates = Rates(_OWN, given["flops"], None, 8, None, None, {})
    dtypes = None if "flops" in given else rates.dtypes
    return replace(rates, **given, sources=rates.sources | dict.fromkeys(given, _OWN), dtypes=dtypes)


def measured(device: str, dtype: str = "bfloat16") -> Rates:
    """Measure a dense product in ``dtype`` and a copy here, in a second or two.

    Raises:
        ValueError: a device that is not there, or another dtype than ``bfloat16``, ``float16`` and ``float32``.
    """
    import time

    import torch

    _check.one_of("plan", "device", device, DEVICES)
    _check.one_of("plan", "dtype", dtype, (*_16_BITS, "float32"))
    if device == "cuda" and not torch.cuda.is_available():
        raise _check.fail("plan", "measure", "asked for on a machine with a GPU, or with device 'cpu'", "no GPU")
    size, room = (8192, 2**31) if device == "cuda" else (1024, 2**27)
    a = torch.randn(size, size, dtype=torch.float32, device=device).to(getattr(torch, dtype))
    source = torch.zeros(room, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).fill_(1)

    def fastest(call: Callable[[], object]) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    flops, bandwidth = 2 * size**3 / fastest(lambda: a @ a), 2 * room / fastest(lambda: target.copy_(source))
    name = torch.cuda.get_device_name() if device == "cuda" else f"this CPU, {torch.get_num_threads()} threads"
    sources: dict[str, str] = dict.fromkeys(("flops", "bandwidth"), "measured here")
    return Rates(name, flops, bandwidth, 8, None, None, sources, (dtype,))


# --- work -----------------------------------------------------------------------------------------------------------


def operations(load: Load) -> int:
    """Multiplications and additions of a forward and backward."""
    gate_up, down = load.width * load.hidden, load.hidden * load.inner
    total = (3 if load.trained else 2) * (gate_up + down)
    if load.rank:
        a, b, down_a, down_b = (load.rank * n for n in (load.hidden, load.width, load.inner, load.hidden))
        total += 3 * (a + b + down_b) + 4 * down_a
    return 2 * load.rows * total


def traffic(load: Load) -> int:
    """Bytes that kernels read and write in a forward and backward, caches left out.

    Rows are counted where a kernel takes or gives them; in a product each operand is read once.
    """
    hidden, inner = load.row_bytes(load.hidden), load.row_bytes(load.inner)
    width, tokens = load.row_bytes(load.width), 2 * load.tokens * load.hidden * load.itemsize
    forward = hidden + width + inner + (inner + hidden) + hidden
    backward = (hidden + inner) + (inner + 2 * width + inner) + (width + hidden) + hidden
    total, weights = forward + backward + tokens, 2
    if load.trained:
        fetched = fetches_left(load) and not shares_rows(load)  # or brought together
        total += 3 * hidden + width + (1 if fetched else 3) * hidden + inner
        weights = 3
    if load.rank:  # rows brought together in forward, of the gradient, and for the gradient of A; and read by factors
        total += 3 * hidden + 4 * hidden + 3 * hidden + 2 * width + 2 * inner
    elif load.packed:
        total += 2 * hidden + 2 * hidden
    stack = load.experts * (load.width + load.inner) * load.hidden * load.itemsize
    unpacked = load.packed and not unpacks_on_the_way(load)
    return total + weights * stack + (2 * stack if unpacked else 0)
