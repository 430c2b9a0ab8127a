"""What one layer of experts allocates in a training step, as a list of what is made and what goes, in order.

:func:`step` goes through :mod:`moekit.ops.experts_forward` and :mod:`moekit.ops.experts_backward` in their order and notes
in a :class:`Ledger` what they hold; a peak is the largest sum on the way. Experts are taken as evenly loaded, and kernels as
those of CPUs (Numba) or of sm_90 GPUs (Triton and Gluon), weights as stored ``[E, out, in]``: the ``torch`` backend makes
float32 copies of rows that are in neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SAVES = ("recompute", "fp8", "all")
DEVICES = ("cpu", "cuda")
FEW_ROWS = 4  # an expert, up to which a CPU brings all rows together (moekit.ops.gemm)
# Rows an expert up to which a GPU unpacks weights on their way into a product (moekit.kernels.triton._policy).
_ON_THE_WAY, _ON_THE_WAY_OF = 112, {"fp8": 224}
# There, too: past the first a GPU brings rows together before a product, and where a gradient of a weight is within the
# others it does not.
_MOST_PER_MOVE, _LEAST, _NARROW, _MANY, _EXPERTS = 2500, 128, 768, 2048, 128
_WIDE_ROWS = 2048  # columns of which a GPU brings rows together in halves, for that gradient
_INT, _SLOT, _WIDE = 4, 8, 4  # bytes of table entries, of a router's indices and of float32


@dataclass(frozen=True)
class Load:
    """What one call of :func:`moekit.experts` works on.

    Attributes:
        tokens: T, rows of the input.
        rows: R, of all experts: ``T * K`` on one rank.
        hidden: H.
        inner: I.
        experts: E, that are here.
        topk: K.
        gated: whether gate_up is ``[E, 2I, H]``; else ``[E, I, H]``.
        biases: whether gate_up and down have biases.
        itemsize: bytes of an element of tokens, weights, adapters and biases.
        weight_itemsize: bytes of a routing weight.
        trained: whether the weights get gradients.
        rank: r, of an adapter on each weight; 0 for none.
        packed: the format that weights are packed in, or empty.
        save: as of :func:`moekit.experts`.
        device: ``"cpu"`` or ``"cuda"``.
    """

    tokens: int
    rows: int
    hidden: int
    inner: int
    experts: int
    topk: int
    gated: bool = True
    biases: bool = False
    itemsize: int = 2
    weight_itemsize: int = 4
    trained: bool = True
    rank: int = 0
    packed: str = ""
    save: str = "recompute"
    device: str = "cuda"

    @property
    def width(self) -> int:
        """Outputs of gate_up."""
        return 2 * self.inner if self.gated else self.inner

    @property
    def on_gpu(self) -> bool:
        """Whether products are those of a GPU."""
        return self.device == "cuda"

    def row_bytes(self, features: int) -> int:
        """Of ``[R, features]``."""
        return self.rows * features * self.itemsize


class Ledger:
    """What is allocated, by name, and the most that ever was."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.peak, self.at = 0, ""

    @property
    def total(self) -> int:
        """Bytes that are held."""
        return sum(self.held.values())

    def hold(self, what: str, **sizes: int) -> None:
        """Allocate; ``what`` says at which point."""
        self.held |= sizes
        if self.total > self.peak:
            self.peak, self.at = self.total, what

    def drop(self, *names: str) -> None:
        """Let go of what is there of these."""
        for name in names:
            self.held.pop(name, None)

    @contextmanager
    def during(self, what: str, **sizes: int) -> Iterator[None]:
        """Hold for as long as the block takes."""
        self.hold(what, **sizes)
        yield
        self.drop(*sizes)


@dataclass(frozen=True)
class Bytes:
    """What a step of one layer takes beside its parameters, its input and the gradient of its output.

    Attributes:
        kept: for backward: the layer's own, without the input that it refers to.
        peak: the most at a time, output and gradients included.
        peak_at: where that is.
        forward: the most at a time in a forward pass without gradients.
        left: after the step: the gradients of input, routing weights and parameters.
    """

    kept: int
    peak: int
    peak_at: str
    forward: int
    left: int


def step(load: Load) -> Bytes:
    """A forward and backward of one layer; gradients of tokens and routing weights are always wanted."""
    ledger, alone = Ledger(), Ledger()
    _forward(load, alone, keep=False)
    _forward(load, ledger, keep=True)
    kept = ledger.total - ledger.held["output"]
    _backward(load, ledger)
    return Bytes(kept, ledger.peak, ledger.at, alone.peak, ledger.total)


# --- forward --------------------------------------------------------------------------------------------------------


def _forward(load: Load, ledger: Ledger, *, keep: bool) -> None:
    save = load.save if keep else "nothing"
    tokens = load.tokens * load.hidden * load.itemsize
    ledger.hold("routing tables", tables=_tables(load))
    if not load.on_gpu:
        ledger.hold("routing tables", choice=load.tokens * load.topk * _SLOT)  # indices past the last expert are -1
    ledger.hold("rows of the routing", **_row_order(load))
    _through_gate_up(load, ledger, save)
    if not keep:
        ledger.drop("projected", "low")
    low_down = {"low of down": load.row_bytes(load.rank)} if load.rank else {}
    ledger.hold("down, low", **low_down)
    ledger.hold("down", result=load.row_bytes(load.hidden))
    with ledger.during("down", **_workspace(load, load.hidden * load.inner)):
        pass
    ledger.drop(*low_down)
    if save != "all":
        ledger.drop("activation")
    ledger.hold("unpermute", output=tokens)
    ledger.drop("result")
    if load.biases:
        sums = 2 if load.on_gpu or load.itemsize == _WIDE else 3  # a CPU adds in float32 what it has widened first
        matrix, wide = load.tokens * load.experts * _WIDE, load.tokens * load.hidden * _WIDE
        with ledger.during("down bias", matrix=matrix, sums=sums * wide):
            pass
    ledger.drop("choice", *_row_order(load))


def _through_gate_up(load: Load, ledger: Ledger, save: str) -> None:
    """From tokens to the activation."""
    activation, projected = load.row_bytes(load.inner), load.row_bytes(load.width)
    if _in_one(load, save):
        ledger.hold("gate_up and gate", activation=activation, **({"projected": projected} if save != "nothing" else {}))
        return
    ledger.hold("gathered rows", gathered=load.row_bytes(load.hidden))
    if load.rank:
        low = load.row_bytes(load.rank)
        with ledger.during("gate_up, low", low=low, unscaled=low):
            pass
        ledger.hold("gate_up, low", low=low)
    ledger.hold("gate_up", projected=projected)
    with ledger.during("gate_up", **_workspace(load, load.width * load.hidden)):
        pass
    if save != "all":
        ledger.drop("gathered")
    ledger.hold("gate", activation=activation)
    if save == "fp8":
        ledger.hold("gate", codes=load.rows * load.width, scale=load.rows * _WIDE)
        ledger.drop("codes")
        ledger.held["projected"] = load.rows * load.width


def _in_one(load: Load, save: str) -> bool:
    """Whether a GPU's first product fetches the rows and applies the gate."""
    plain = save in ("nothing", "recompute") and not load.packed and not load.rank
    return load.on_gpu and plain and _fetches(load, load.hidden, load.width)


def _fetches(load: Load, depth: int, width: int) -> bool:
    """Whether a product of a dense weight takes rows from where they are."""
    if not load.on_gpu:
        return load.rows > FEW_ROWS * load.experts
    return load.itemsize == 2 and width > 64 and depth * width <= _MOST_PER_MOVE * (depth + width)


def fetches_left(load: Load) -> bool:
    """Whether down's gradient takes the rows of the output's gradient from where they are.

    GPUs of sm_90 do, of weights stored ``[E, out, in]``; other GPUs and ``transposed`` ones have ``[R, H]`` more there.
    """
    narrow, few = _LEAST <= load.inner <= _NARROW, load.rows <= _MANY * load.experts and load.experts <= _EXPERTS
    return load.on_gpu and not load.rank and load.itemsize == 2 and narrow and few and load.hidden >= _LEAST


def shares_rows(load: Load) -> bool:
    """Whether two products of a GPU's backward share a copy of the rows of the output's gradient."""
    from moekit.ops import experts_backward

    shape = (load.tokens, load.rows, load.experts, load.hidden, load.inner)
    return load.on_gpu and load.trained and load.save != "all" and experts_backward.shares_rows(*shape)


# --- backward -------------------------------------------------------------------------------------------------------


def _backward(load: Load, ledger: Ledger) -> None:
    kept_rows, kept_act = "gathered" in ledger.held, "activation" in ledger.held
    ledger.hold("rows of the routing", **_row_order(load))
    together = load.rank > 0 or shares_rows(load)
    if together:
        ledger.hold("rows of the gradient", grad_rows=load.row_bytes(load.hidden))
    if load.rank:
        ledger.hold("down, high", high_down=load.row_bytes(load.rank))
    _through_gate(load, ledger, kept_act)
    if together:
        _of_down(load, ledger)
    if load.rank:
        ledger.hold("gate_up, high", high=load.row_bytes(load.rank))
    ledger.hold("gradient of rows", moved=load.row_bytes(load.hidden))
    with ledger.during("gradient of rows", **_workspace(load, load.width * load.hidden)):
        pass
    ledger.hold("gradient of tokens", grad_tokens=load.tokens * load.hidden * load.itemsize)
    ledger.drop("moved")
    _of_gate_up(load, ledger, kept_rows)
    if not together:
        _of_down(load, ledger)
    ledger.hold("gradient of routing weights", grad_weights=load.tokens * load.topk * load.weight_itemsize)
    if load.biases and load.trained:
        _of_down_bias(load, ledger)
    ledger.drop("output", "tables", "grad_row_weights", *_row_order(load))


def _through_gate(load: Load, ledger: Ledger, kept_act: bool) -> None:
    """The gradient of the activation, and back through the gate."""
    inner = load.row_bytes(load.inner)
    ledger.hold("gradient of the activation", grad_act=inner)
    with ledger.during("gradient of the activation", **_workspace(load, load.hidden * load.inner), **_rows_of_grad(load)):
        pass
    again = (load.trained or load.rank) and not kept_act
    over = again and load.on_gpu  # a GPU's kernel writes it over its gradient
    ledger.hold(
        "gate, backward",
        grad_projected=load.row_bytes(load.width),
        grad_row_weights=load.rows * load.weight_itemsize,
        **({"activation": inner} if again and not over else {}),
        **({"grad_gate_up_bias": load.experts * load.width * load.itemsize} if load.biases and load.trained else {}),
    )
    ledger.drop("grad_act", "projected", "scale")
    if over:
        ledger.hold("gate, backward", activation=inner)


def _rows_of_grad(load: Load) -> dict[str, int]:
    """Rows of the output's gradient, for the product that needs them."""
    if load.rank or shares_rows(load):
        return {}
    if load.packed or not _fetches(load, load.hidden, load.inner):
        return {"fetched": load.row_bytes(load.hidden)}
    return {} if load.on_gpu else {"fetched": _of_an_expert(load)}


def _of_gate_up(load: Load, ledger: Ledger, kept_rows: bool) -> None:
    def gathered(factor: int) -> dict[str, int]:
        return {} if kept_rows else _brought_together(load, factor)

    if load.rank:
        ledger.hold("gate_up B", grad_b=load.experts * load.width * load.rank * load.itemsize)
        with ledger.during(
            "gate_up A", **gathered(load.rank), grad_a=load.experts * load.rank * load.hidden * load.itemsize
        ):
            pass
        ledger.hold("gate_up A", grad_a=load.experts * load.rank * load.hidden * load.itemsize)
    if load.trained:
        ledger.hold("gradient of gate_up", grad_gate_up=load.experts * load.width * load.hidden * load.itemsize)
        with ledger.during("gradient of gate_up", **gathered(load.width)):
            pass
    ledger.drop("grad_projected", "low", "high", "gathered")


def _of_down(load: Load, ledger: Ledger) -> None:
    if load.rank:
        ledger.hold("down A", grad_down_a=load.experts * load.rank * load.inner * load.itemsize)
        low = load.row_bytes(load.rank)
        with ledger.during("down B", low=2 * low, grad_down_b=load.experts * load.hidden * load.rank * load.itemsize):
            pass
        ledger.hold("down B", grad_down_b=load.experts * load.hidden * load.rank * load.itemsize)
    if load.trained:
        ledger.hold("gradient of down", grad_down=load.experts * load.hidden * load.inner * load.itemsize)
        there = load.rank > 0 or shares_rows(load) or fetches_left(load)
        with ledger.during("gradient of down", **({} if there else _brought_together(load, load.inner))):
            pass
    ledger.drop("grad_rows", "high_down", "activation")


def _of_down_bias(load: Load, ledger: Ledger) -> None:
    ledger.hold("gradient of the down bias", grad_down_bias=load.experts * load.hidden * load.itemsize)
    wide, matrix = load.tokens * load.hidden * _WIDE, load.tokens * load.experts * _WIDE
    with ledger.during("gradient of the down bias", wide=wide, matrix=matrix):
        pass


# --- parts ----------------------------------------------------------------------------------------------------------


def _tables(load: Load) -> int:
    """Order and inverse, both with room for every slot of the tokens, and offsets."""
    return _INT * (2 * load.tokens * load.topk + load.experts)


def _row_order(load: Load) -> dict[str, int]:
    """The token and the weight of each row, and where each token's rows are."""
    return {
        "row_token": load.rows * _INT + (load.tokens + 1) * _INT + load.experts * _INT,
        "row_weights": load.rows * load.weight_itemsize,
    }


def _of_an_expert(load: Load) -> int:
    """Rows of one expert, which is all that a CPU brings together."""
    return -(-load.rows // load.experts) * load.hidden * load.itemsize


def _brought_together(load: Load, factor: int) -> dict[str, int]:
    """Rows for the gradient of a weight, whose other factor has so many columns: PyTorch's product takes all of them."""
    if not load.on_gpu:
        return {"fetched": _of_an_expert(load)}
    ours = load.rows <= _MANY * load.experts and min(load.hidden, factor) >= _LEAST
    halves = load.hidden >= _WIDE_ROWS and (ours or load.itemsize == _WIDE)
    return {"fetched": load.row_bytes(-(-load.hidden // 512) * 256 if halves else load.hidden)}


def unpacks_on_the_way(load: Load) -> bool:
    """Whether packed weights never lie unpacked in memory."""
    most = _ON_THE_WAY_OF.get(load.packed, _ON_THE_WAY)
    return bool(load.packed) and load.on_gpu and load.rows <= most * load.experts


def _workspace(load: Load, values: int) -> dict[str, int]:
    """Where packed weights of ``values`` an expert are unpacked: a slice of experts on a GPU, one of them on a CPU."""
    if not load.packed:
        return {}
    size = values * load.itemsize
    if not load.on_gpu:
        return {"workspace": size}
    if unpacks_on_the_way(load):
        return {}
    from moekit.ops.packed_products import slices

    return {"workspace": max((stop - first for first, stop in slices(load.experts, size)), default=0) * size}
