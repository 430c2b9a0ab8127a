"""What an exchange of tokens between ranks costs, from the sizes of a layer and the speeds of its links: no measurement.

Routing is taken as uniform: each token chooses K of E experts, all choices alike, or first L of G groups of experts and then
K within them (DeepSeek-V3's node-limited routing). Ranks hold equal shares of the experts, in order, and nodes equal runs of
ranks. Times are bytes over speed, the slower of the links inside a node and between nodes, both at work at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

WAYS = ("slot", "rank", "all", "node")


@dataclass(frozen=True)
class Layer:
    """A Mixture-of-Experts layer, and its tokens.

    Attributes:
        name: of the model.
        tokens: T, of a GPU.
        hidden: H.
        inner: I.
        experts: E, of all ranks.
        topk: K.
        groups: G, in which a token may choose ``groups_chosen``; 1: no such limit.
        groups_chosen: L.
        row_bytes: of an element of a row, on the wire.
        weight_bytes: of a routing weight.
    """

    name: str
    tokens: int
    hidden: int
    inner: int
    experts: int
    topk: int
    groups: int = 1
    groups_chosen: int = 1
    row_bytes: int = 2
    weight_bytes: int = 4


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes.

    Attributes:
        name: of the machine.
        node: GPUs that the fast links join.
        inside: bytes/s of a GPU to others of its node, in one direction.
        between: bytes/s of a GPU to other nodes, in one direction.
        flops: floating-point operations/s of a GPU in the experts' products.
    """

    name: str
    node: int
    inside: float
    between: float
    flops: float


QWEN3 = Layer("Qwen3-30B-A3B", 8192, 2048, 768, 128, 8)
DEEPSEEK = Layer("DeepSeek-V3", 4096, 7168, 2048, 256, 8, groups=8, groups_chosen=4)

# In one direction: NVLink 4 has 900 GB/s and NVLink 5 1800 in both (NVIDIA, H200 and GB200 data sheets), InfiniBand NDR 400
# Gb/s and XDR 800 (ConnectX-7 and -8), one adapter a GPU. Dense bf16: 989 and 2250 TFLOP/s, of which products reach 60%.
H200 = Machine("H200, NVLink 4 and NDR", 8, 450e9, 50e9, 0.6 * 989e12)
B200 = Machine("B200, NVLink 5 and XDR", 8, 900e9, 100e9, 0.6 * 2250e12)
GB200 = Machine("GB200 NVL72, NVLink 5 and XDR", 64, 900e9, 100e9, 0.6 * 2250e12)  # 64 of 72, as E is a multiple of them
LAYERS, MACHINES = (QWEN3, DEEPSEEK), (H200, B200, GB200)


def needed(layer: Layer, parts: int) -> float:
    """The probability that a token needs one of ``parts`` equal parts of the experts (a rank's, or a node's)."""
    there, experts = layer.experts // parts, layer.experts
    each, reached = experts // layer.groups, experts // layer.groups * layer.groups_chosen
    if there < each:  # a part of one group, which is among the chosen or not
        return layer.groups_chosen / layer.groups * (1 - comb(reached - there, layer.topk) / comb(reached, layer.topk))
    mine, missed = there // each, 0.0
    for chosen in range(min(mine, layer.groups_chosen) + 1):
        ways = comb(mine, chosen) * comb(layer.groups - mine, layer.groups_chosen - chosen)
        share = ways / comb(layer.groups, layer.groups_chosen)
        missed += share * comb(reached - chosen * each, layer.topk) / comb(reached, layer.topk)
    return 1 - missed


@dataclass(frozen=True)
class Rows:
    """Rows that a token puts on the wire, in one direction.

    Attributes:
        inside: to ranks of the same node.
        between: to ranks of other nodes.
    """

    inside: float
    between: float

    @property
    def total(self) -> float:
        """To other ranks at all."""
        return self.inside + self.between


def rows(layer: Layer, ranks: int, node: int, way: str) -> Rows:
    """Rows of a token.

    Args:
        layer: the layer.
        ranks: N.
        node: ranks of a node.
        way: ``"slot"``: one for each expert that is elsewhere; ``"rank"``: one for each rank (:class:`moekit.ep.AllToAll`);
            ``"all"``: one for every rank (:class:`moekit.ep.AllGather`); ``"node"``: one for each node, where it goes on to
            each rank (two hops, as DeepEP and HybridEP do it).
    """
    here = min(node, ranks)
    each = {"slot": layer.topk / ranks, "rank": needed(layer, ranks), "node": needed(layer, ranks), "all": 1.0}[way]
    if way != "node":
        return Rows((here - 1) * each, (ranks - here) * each)
    nodes = ranks // here
    # A rank hands on what comes to its node by its adapter: as many rows as it would send itself, but for its own.
    return Rows((here - 1) * each * nodes, (nodes - 1) * (needed(layer, nodes) if nodes > 1 else 0.0))


def message(layer: Layer, ranks: int, node: int, way: str) -> float:
    """Bytes of rows from a rank to others in one exchange."""
    return rows(layer, ranks, node, way).total * layer.tokens * layer.hidden * layer.row_bytes


def sent(layer: Layer, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends in a forward and backward of :class:`moekit.ep.AllToAll`, as :func:`moekit.ep.traffic` counts.

    Rows go four times: tokens, results, and the gradients of both. Weights go with the numbers of their experts (int32), and
    their gradients come back. The sizes are three int64 a rank.
    """
    pairs = rows(layer, ranks, ranks, "rank").total * layer.tokens
    return {
        "rows": 4 * pairs * layer.hidden * layer.row_bytes,
        "slots": pairs * layer.topk * (4 + 2 * layer.weight_bytes),
        "sizes": 24.0 * (ranks - 1),
    }


@dataclass(frozen=True)
class Times:
    """Seconds of a layer's forward and backward.

    Attributes:
        exchange: the four exchanges.
        experts: the experts' products.
    """

    exchange: float
    experts: float

    @property
    def ratio(self) -> float:
        """Of the exchange to the products: past 1 no overlap can hide it."""
        return self.exchange / self.experts


def times(layer: Layer, machine: Machine, ranks: int, way: str, efficiency: float = 1.0) -> Times:
    """Seconds of a forward and backward at ``efficiency`` of the published link speeds."""
    wire, row = rows(layer, ranks, machine.node, way), layer.tokens * layer.hidden * layer.row_bytes
    slowest = max(wire.inside * row / machine.inside, wire.between * row / machine.between)
    products = 3 * 3 * 2 * layer.tokens * layer.topk * layer.hidden * layer.inner  # three weights, each three products
    return Times(4 * slowest / efficiency, products / machine.flops)
