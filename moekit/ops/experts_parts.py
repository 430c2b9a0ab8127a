"""What the forward and the backward of the experts share: their arguments, and the routing in row order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import _backend, _check
from moekit.ops import glu, tables
from moekit.ops._segments import expert_of_row, sum_by_index
from moekit.ops.gemm import within
from moekit.ops.products import DIFFERENTIABLE, INVARIANT, PLAIN, Products
from moekit.ops.projection import Projection
from moekit.ops.unpack import FOUR_BITS, Stored

WEIGHTS = "Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias"
_FACTORS = "Tensor? gate_up_a, Tensor? gate_up_b, Tensor? down_a, Tensor? down_b"
_TABLES = "Tensor order, Tensor inverse, Tensor offsets"
# Not lists: the vmap of batched gradients takes none.
SCALES = ", ".join(f"Tensor? {name}_{part}" for name in ("gate_up", "down") for part in ("scale", "nested", "offset"))
ARGUMENTS = f"Tensor x, {WEIGHTS}, {_FACTORS}, {_TABLES}, {SCALES}, Tensor? seeds"
STORAGE = (  # torch.jit.trace takes no lists of strings or bools
    "bool transposed, str gate_up_format, str down_format, int[] blocks, bool gate_up_turned, bool down_turned"
)
_CHOICES = "bool weight_after_down, str save, bool batch_invariant"
CONSTANTS = f"{glu.CONSTANTS}, {STORAGE}, float[] gate_up_lora, float[] down_lora, {_CHOICES}"


class Arguments(NamedTuple):
    """The tensors that the operators take."""

    x: Any  # None in the backward, where it serves nothing
    weights: Tensor
    gate_up: Tensor  # or the codes of a packed one, as down
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate_up_a: Tensor | None
    gate_up_b: Tensor | None
    down_a: Tensor | None
    down_b: Tensor | None
    order: Tensor
    inverse: Tensor
    offsets: Tensor
    gate_up_scale: Tensor | None  # of packed weights, and the two more of double quantisation
    gate_up_nested: Tensor | None
    gate_up_offset: Tensor | None
    down_scale: Tensor | None
    down_nested: Tensor | None
    down_offset: Tensor | None
    seeds: Tensor | None  # of what adapters drop: one a weight

    def factors(self) -> tuple[Any, Any, Any, Any]:
        """Those of the adapters."""
        return self.gate_up_a, self.gate_up_b, self.down_a, self.down_b

    def scales(self, which: int) -> list[Tensor]:
        """Those of gate_up (0) or down (1)."""
        both = (
            (self.gate_up_scale, self.gate_up_nested, self.gate_up_offset),
            (self.down_scale, self.down_nested, self.down_offset),
        )
        return [scale for scale in both[which] if scale is not None]


NUM_ARGUMENTS = len(Arguments._fields)


class Wanted(NamedTuple):
    """One entry for each argument with a gradient, the first ones: whether it is wanted, or the gradient itself."""

    x: Any
    weights: Any
    gate_up: Any
    down: Any
    gate_up_bias: Any
    down_bias: Any
    gate_up_a: Any
    gate_up_b: Any
    down_a: Any
    down_b: Any

    @property
    def projected(self) -> bool:
        """Whether the gradient of the gate/up projection serves one that is wanted."""
        return bool(self.x or self.gate_up or self.gate_up_a or self.gate_up_b)

    @property
    def act(self) -> bool:
        """Whether the activation serves a gradient that is wanted."""
        return bool(self.down or self.down_a or self.down_b)

    @property
    def before_gate(self) -> bool:
        """Whether what is kept of the gate serves anything."""
        return bool(self.projected or self.act or self.weights or self.gate_up_bias)


class Options(NamedTuple):
    """The last arguments of the operators."""

    spec: glu.Glu
    transposed: bool
    gate_up_format: str  # empty if dense
    down_format: str
    blocks: list[int]  # the rows and columns of a block of each
    gate_up_turned: bool  # packed as [E, in, out]
    down_turned: bool
    gate_up_lora: list[float]  # the rank, scale and dropout of each adapter
    down_lora: list[float]
    weight_after_down: bool
    save: str
    batch_invariant: bool

    @staticmethod
    def of(constants: tuple) -> Options:
        """From the operators' arguments."""
        return Options(glu.Glu(*constants[:7]), *constants[7:])

    @property
    def formats(self) -> tuple[str, str]:
        """Of gate_up and down."""
        return self.gate_up_format, self.down_format

    @property
    def turned(self) -> tuple[bool, bool]:
        """Whether gate_up and down are packed as ``[E, in, out]``."""
        return self.gate_up_turned, self.down_turned

    def constants(self) -> tuple:
        """As the operators' arguments."""
        return (*self.spec, *self[1:])

    def products(self) -> Products:
        """Those that are no operators."""
        return INVARIANT if self.batch_invariant else PLAIN

    def projections(self, given: Arguments, products: Products) -> tuple[Projection, Projection]:
        """The two weights with their adapters."""
        seeds = (None, None) if given.seeds is None else (given.seeds[0], given.seeds[1])
        adapters = ((*given.factors()[:2], self.gate_up_lora), (*given.factors()[2:], self.down_lora))
        weights = [self.weight(which, given) for which in range(2)]
        weights = [weight.checked("experts") if isinstance(weight, Stored) else weight for weight in weights]
        gate_up, down = (
            Projection(weights[which], self.turned[which], *adapters[which], seeds[which], products) for which in range(2)
        )
        return gate_up, down

    def weight(self, which: int, given: Arguments) -> Tensor | Stored:
        """The matrices ``[E, in, out]`` of gate_up (0) or down (1), or what is packed."""
        value = (given.gate_up, given.down)[which]
        if self.formats[which]:
            return Stored(
                value, given.scales(which), self.formats[which], (self.blocks[2 * which], self.blocks[2 * which + 1])
            )
        return value if self.transposed else value.mT

    def width(self, given: Arguments) -> int:
        """The outputs of gate_up."""
        weight = self.weight(0, given)
        return weight.shape[1 if isinstance(weight, Stored) and not self.turned[0] else 2]

    def shapes(self, given: Any) -> list[list[int]]:
        """``[E, in, out]`` of both weights in any order, from the shapes of the arguments."""
        return [
            [*shape[:2], shape[2] * (2 if form in FOUR_BITS else 1)]
            for shape, form in zip((given.gate_up, given.down), self.formats, strict=True)
        ]

    def packed(self, given: Arguments) -> dict[str, Any]:
        """The arguments that belong to packed weights."""
        names = [
            f"{name}{part}"
            for name, form in zip(("gate_up", "down"), self.formats, strict=True)
            for part in ("", "_scale", "_nested", "_offset")
            if form
        ]
        return {name: getattr(given, name) for name in names}

    def stored(self, inputs: Any, outputs: Any) -> tuple[Any, Any]:
        """The factors of a weight's gradient, in the order in which the weight is stored."""
        return (inputs, outputs) if self.transposed else (outputs, inputs)


class Rows(NamedTuple):
    """The routing of one call in row order."""

    tables: tuple[Tensor, Tensor, Tensor]
    weights: Tensor
    offsets: Tensor
    inverse: Tensor

    @staticmethod
    def of(given: Arguments, products: Products) -> Rows:
        """Of the routing among the arguments; in one launch where a kernel can, and nobody differentiates it."""
        order, inverse, offsets = given.order, given.inverse, given.offsets
        _check.tensor_dim("experts", "inverse", inverse, 2)
        _check.shape("experts", "weights", given.weights, inverse.shape, "[tokens, topk], as inverse")
        _check.rows_end("experts", order, offsets)
        kernel = _backend.kernel("row_order", order) if products is not DIFFERENTIABLE else None
        found = NotImplemented if kernel is None else kernel(order, given.weights, offsets, *inverse.shape)
        if found is NotImplemented:
            token, starts = tables.row_tables(order, *inverse.shape)
            found = token, starts, tables.take(given.weights, order), within(offsets, len(order))
        token, starts, weights, ends = found
        return Rows((token, starts, inverse.reshape(-1)), weights, ends, inverse)

    @staticmethod
    def of_choice(given: Arguments, indices: Tensor, num_experts: int, products: Products) -> Rows:
        """Of a router's choice, where the arguments have its weights and no tables yet."""
        kernel = _backend.kernel("choice_rows", indices)
        found = NotImplemented if kernel is None else kernel(indices, given.weights, num_experts)
        if found is NotImplemented:
            _, offsets, order, inverse = tables.route_indices(indices, num_experts)
            return Rows.of(given._replace(order=order, inverse=inverse, offsets=offsets), products)
        token, starts, weights, ends, inverse = found
        return Rows((token, starts, inverse.reshape(-1)), weights, ends, inverse)

    def slots(self) -> Tensor:
        """Where each row's weight stands in a flat ``[T, E]`` matrix, -1 for none."""
        token = self.tables[0]
        return tables.row_slots(token, expert_of_row(self.offsets, token.shape[0]), self.offsets.shape[0])

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The routing weights as a matrix ``[T, E]``, added in ``dtype``."""
        num_tokens, num_experts = self.inverse.shape[0], self.offsets.shape[0]
        return sum_by_index(self.weights.to(dtype), self.slots(), num_tokens * num_experts).view(num_tokens, num_experts)
