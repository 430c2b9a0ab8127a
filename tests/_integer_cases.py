"""Every operator and public function that reads integers from a tensor, and nonsense to put there."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import moekit
from moekit import Routing, moe_utils
from moekit.ops import experts as _experts  # noqa: F401  (defines the operators)
from moekit.ops import grouped_linear, topk  # noqa: F401

OPS = torch.ops.moekit
INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
# Arguments of operators that hold no integers; a tensor of any other name is one of integers and has to be tried below.
NO_INTEGERS = {
    *("x", "y", "grad", "rows", "left", "right", "tokens", "values", "weights", "bias", "scale", "logits", "matrices"),
    *("gate_up", "down", "gate_up_bias", "down_bias", "expert_bias", "projected", "kept_rows", "kept_act", "output", "loss"),
    *(
        "grad_sums",
        "link",
        "padding_mask",
        "nested",
        "offset",
        "gate_up_nested",
        "gate_up_offset",
        "down_nested",
        "down_offset",
    ),
    *("total", "counts"),  # of accumulate: added, in place; never addresses
    *("gate_up_a", "gate_up_b", "down_a", "down_b", "low", "seeds"),
    *("codes", "scales", "gate_up_scale", "down_scale"),  # any bit pattern is a number
}
_GLU = ("sigmoid", 1.0, 0.0, 0.0, None, True, "concatenated")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The letters of the docs."""

    tokens: int
    topk: int
    experts: int
    hidden: int
    inner: int

    @property
    def rows(self) -> int:
        return self.tokens * self.topk


SMALL = (Sizes(6, 2, 4, 8, 6), Sizes(5, 3, 7, 13, 5), Sizes(1, 1, 1, 4, 4), Sizes(16, 2, 3, 20, 33), Sizes(3, 4, 5, 72, 8))
LARGE = Sizes(600, 4, 16, 128, 96)  # enough to be shared among threads


class Make:
    """Right arguments of one case."""

    def __init__(self, sizes: Sizes, rng: random.Random) -> None:
        self.sizes, self._rng = sizes, rng
        self._generator = torch.Generator().manual_seed(rng.randrange(2**31))
        self.dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16))
        scores = torch.rand(sizes.tokens, sizes.experts, generator=self._generator)
        indices = scores.argsort(1)[:, : sizes.topk].to(rng.choice((torch.int32, torch.int64)))
        self.indices = indices.masked_fill(torch.rand(indices.shape, generator=self._generator) < 0.2, -1)
        with moekit.backend("torch"):
            self.routing = Routing.from_topk(self.indices, self.floats(*indices.shape), num_experts=sizes.experts)
            self.row_token, self.token_offsets, self.token_rows = self.routing.row_tables()[:3]

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype or self.dtype)

    def weights(self) -> Tensor:
        """By row or by slot."""
        shape = self._rng.choice(((self.sizes.rows,), (self.sizes.tokens, self.sizes.topk)))
        return self.floats(*shape, dtype=torch.float32)

    def optional(self, value: Any) -> Any:
        return self._rng.choice((None, value))

    def of_rows(self) -> dict[str, Tensor]:
        wide = self._rng.random() < 0.3
        row_token = self.row_token.long() if wide else self.row_token
        return {"row_token": row_token, "token_offsets": self.token_offsets, "token_rows": self.token_rows}

    def of_routing(self) -> dict[str, Tensor]:
        routing = self.routing
        return {"order": routing.order, "inverse": routing.inverse, "offsets": routing.offsets}

    def offsets(self) -> Tensor:
        return self.routing.offsets.to(self._rng.choice((torch.int32, torch.int32, torch.int64)))

    def expert_weights(self) -> dict[str, Tensor]:
        s = self.sizes
        return {"gate_up": self.floats(s.experts, 2 * s.inner, s.hidden), "down": self.floats(s.experts, s.hidden, s.inner)}

    def bias(self) -> Tensor | None:
        return self.optional(self.floats(self.sizes.experts, 2 * self.sizes.inner))


@dataclasses.dataclass(frozen=True)
class Target:
    """A function, how to make right arguments for it, and which of them hold integers."""

    name: str
    build: Callable[[Make], dict[str, Any]]
    call: Callable[..., Any]
    integers: tuple[str, ...]


TARGETS: dict[str, Target] = {}


def target(name: str, integers: str, call: Callable | None = None) -> Callable[[Callable], Callable]:
    """Add what ``build`` makes arguments for: an operator, whose order they are in, or ``call``, by name."""

    def add(build: Callable[[Make], dict[str, Any]]) -> Callable:
        if call is None:
            function = getattr(OPS, name.removeprefix("ops.")).default
            TARGETS[name] = Target(name, build, lambda **arguments: function(*arguments.values()), tuple(integers.split()))
        else:
            TARGETS[name] = Target(name, build, call, tuple(integers.split()))
        return build

    return add


# --- the operators --------------------------------------------------------------------------------------------------

target("ops.route_indices", "indices")(lambda m: {"indices": m.indices, "num_experts": m.sizes.experts})
target("ops.rows_of_tokens", "row_token")(lambda m: {"row_token": m.of_rows()["row_token"], "num_tokens": m.sizes.tokens})
target("ops.row_tables", "order")(lambda m: {"order": m.routing.order, "num_tokens": m.sizes.tokens, "topk": m.sizes.topk})
for _name in ("route_map", "map_to_indices"):
    target(f"ops.{_name}", "routing_map")(lambda m: {"routing_map": m.routing.to_map()[0].int(), "size": None})
target("ops.route_capacity", "routing_map")(lambda m: {"routing_map": m.routing.to_map()[0].int(), "capacity": 3})


@target("ops.pad_rows", "offsets order inverse")
def _(m: Make) -> dict[str, Any]:
    found = m.of_routing()
    return {"offsets": found["offsets"], "order": found["order"], "inverse": found["inverse"], "multiple": 4}


def _chunks(m: Make) -> tuple[Tensor, Tensor]:
    sizes = m.routing.tokens_per_expert
    return sizes, torch.randperm(sizes.shape[0], generator=m._generator)


@target("ops.sort_chunk_rows", "split_sizes sorted_idxs")
def _(m: Make) -> dict[str, Any]:
    sizes, order = _chunks(m)
    total = int(sizes.sum())
    return {"split_sizes": sizes, "sorted_idxs": order, "num_in": total, "num_out": m.optional(total)}


@target("ops.take", "index back")
def _(m: Make) -> dict[str, Any]:
    return {"values": m.weights().view(m.sizes.tokens, -1), "index": m.routing.order, "back": m.routing.inverse}


target("ops.put", "index")(lambda m: {"values": m.weights(), "index": m.routing.inverse, "size": m.sizes.rows})
target("ops.permute", "row_token token_offsets token_rows")(
    lambda m: {"tokens": m.floats(m.sizes.tokens, m.sizes.hidden), **m.of_rows()}
)


@target("ops.unpermute", "row_token token_offsets token_rows")
def _(m: Make) -> dict[str, Any]:
    return {"rows": m.floats(m.sizes.rows, m.sizes.hidden), "weights": m.optional(m.weights()), **m.of_rows()}


@target("ops.unpermute_backward", "row_token token_offsets token_rows")
def _(m: Make) -> dict[str, Any]:
    grad, rows = m.floats(m.sizes.tokens, m.sizes.hidden), m.floats(m.sizes.rows, m.sizes.hidden)
    return {"grad": grad, "rows": rows, "weights": m.weights(), **m.of_rows(), "wanted": [True, True]}


def _glu_inputs(m: Make) -> dict[str, Any]:
    weights = m.optional(m.floats(m.sizes.rows, dtype=torch.float32))
    return {"y": m.floats(m.sizes.rows, 2 * m.sizes.inner), "weights": weights, "bias": m.bias(), "offsets": m.offsets()}


def _constants(*others: Any) -> dict[str, Any]:
    return {f"constant{i}": value for i, value in enumerate((*_GLU, *others))}


for _name in ("glu", "glu_fp8"):
    target(f"ops.{_name}", "offsets")(lambda m: {**_glu_inputs(m), **_constants()})


@target("ops.glu_backward", "offsets")
def _(m: Make) -> dict[str, Any]:
    inputs = _glu_inputs(m)
    y = inputs.pop("y")
    wanted = [True, inputs["weights"] is not None, inputs["bias"] is not None, True]
    return {"grad": m.floats(m.sizes.rows, m.sizes.inner), "y": y, "scale": None, **inputs, **_constants(wanted)}


@target("ops.grouped_linear", "offsets")
def _(m: Make) -> dict[str, Any]:
    stored = m.floats(m.sizes.experts, m.sizes.inner, m.sizes.hidden)
    matrices = m._rng.choice((stored.mT, stored.mT.contiguous()))
    return {"rows": m.floats(m.sizes.rows, m.sizes.hidden), "matrices": matrices, "offsets": m.offsets()}


@target("ops.grouped_outer", "offsets")
def _(m: Make) -> dict[str, Any]:
    left, right = m.floats(m.sizes.rows, m.sizes.hidden), m.floats(m.sizes.rows, m.sizes.inner)
    return {"left": left, "right": right, "offsets": m.offsets()}


@target("ops.packed_linear", "offsets")
def _(m: Make) -> dict[str, Any]:
    stored = moekit.pack(m.floats(m.sizes.experts, m.sizes.inner, m.sizes.hidden), m._rng.choice(("int8", "fp8"))).stored()
    back = m._rng.random() < 0.5
    rows = m.floats(m.sizes.rows, m.sizes.inner if back else m.sizes.hidden)
    parts = dict(enumerate(grouped_linear.flat(stored)))
    return {"rows": rows, **{f"part{i}": part for i, part in parts.items()}, "offsets": m.offsets(), "back": back}


def _stored_weights(m: Make) -> tuple[dict[str, Any], dict[str, Any], tuple]:
    """Experts' weights, dense or packed, their scales, and the constants that say how they are stored."""
    named: dict[str, Any] = {}
    parts = ("scale", "nested", "offset")
    scales = {f"{name}_{part}": None for name in ("gate_up", "down") for part in parts}
    formats, blocks = ["", ""], [0, 0, 0, 0]
    for which, (name, weight) in enumerate(m.expert_weights().items()):
        named[name] = weight
        if m._rng.random() < 0.3:
            named[name], [scales[f"{name}_scale"]], formats[which], block = moekit.pack(weight, "int8").stored()
            blocks[2 * which : 2 * which + 2] = block
    return named, scales, (False, *formats, blocks, False, False)


def _expert_inputs(m: Make) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and the constants of the experts, dense or packed, with adapters or without."""
    s = m.sizes
    named: dict[str, Any] = {"x": m.floats(s.tokens, s.hidden), "weights": m.floats(s.tokens, s.topk)}
    stored, scales, storage = _stored_weights(m)
    named |= stored
    biases = {"gate_up_bias": m.bias(), "down_bias": m.optional(m.floats(s.experts, s.hidden))}
    shapes = {
        **{"gate_up_a": (s.experts, 3, s.hidden), "gate_up_b": (s.experts, 2 * s.inner, 3)},
        **{"down_a": (s.experts, 3, s.inner), "down_b": (s.experts, s.hidden, 3)},
    }
    rank = m._rng.random() < 0.3
    factors = {name: m.floats(*shape) if rank else None for name, shape in shapes.items()}
    lora = [3.0, 0.5, 0.0] if rank else []
    constants = _constants(*storage, lora, lora)
    return {**named, **biases, **factors, **m.of_routing(), **scales, "seeds": None}, constants


@target("ops.experts", "order inverse offsets", lambda **a: OPS.experts(*a.values())[0])  # the rest may hold anything
def _(m: Make) -> dict[str, Any]:
    inputs, constants = _expert_inputs(m)
    save = m._rng.choice(("nothing", "recompute", "fp8", "all"))
    return {**inputs, **constants, "weight_after_down": m._rng.random() < 0.5, "save": save, "batch_invariant": False}


@target("ops.experts_topk", "indices")
def _(m: Make) -> dict[str, Any]:
    s, biases = m.sizes, {"gate_up_bias": m.bias(), "down_bias": m.optional(m.floats(m.sizes.experts, m.sizes.hidden))}
    inputs = {"x": m.floats(s.tokens, s.hidden), "indices": m.indices, "weights": m.floats(s.tokens, s.topk)}
    stored, scales, storage = _stored_weights(m)
    return {**inputs, **stored, **biases, **scales, **_constants(*storage, m._rng.random() < 0.5)}


@target("ops.experts_backward", "order inverse offsets")
def _(m: Make) -> dict[str, Any]:
    inputs, constants = _expert_inputs(m)
    constants |= {"weight_after_down": False, "save": "recompute", "batch_invariant": False}
    with moekit.backend("torch"):
        _, *kept = OPS.experts(*inputs.values(), *constants.values())
    kept = [t.float().nan_to_num(0, 0, 0).to(t.dtype) for t in kept]  # rows of no expert hold anything
    named = dict(zip(("projected", "scale", "kept_rows", "kept_act", "low"), kept, strict=True))
    wanted = [value is not None and value.is_floating_point() for value in list(inputs.values())[:10]]
    return {"grad": m.floats(m.sizes.tokens, m.sizes.hidden), **inputs, **named, **constants, "wanted": wanted}


@target("ops.topk_router_backward", "indices")
def _(m: Make) -> dict[str, Any]:
    logits = m.floats(m.sizes.tokens, m.sizes.experts)
    grad, score = m.floats(m.sizes.tokens, m.sizes.topk), m._rng.choice(("softmax", "sigmoid"))
    indices = logits.float().argsort(1, descending=True)[:, : m.sizes.topk]
    scoring = {"score": score, "pre_softmax": False, "epsilon": m._rng.choice((None, 1e-6)), "scaling": None}
    sums = m._rng.choice((None, logits.float().sum(0)))
    return {"grad": grad, "grad_sums": sums, "logits": logits, "indices": indices, "mask": None, **scoring}


@target("ops.weigh_experts", "indices")
def _(m: Make) -> dict[str, Any]:
    logits = m.floats(m.sizes.tokens, m.sizes.experts)
    indices = logits.float().argsort(1, descending=True)[:, : m.sizes.topk]
    scoring = {"score": m._rng.choice(("softmax", "sigmoid")), "pre_softmax": False, "epsilon": None, "scaling": 2.0}
    return {"logits": logits, "indices": indices, "mask": None, **scoring}


# --- the public functions -------------------------------------------------------------------------------------------

_FIELDS = "indices tokens_per_expert offsets order inverse"


def _fields(m: Make) -> dict[str, Any]:
    return {field.name: getattr(m.routing, field.name) for field in dataclasses.fields(Routing)}


target("Routing.from_topk", "indices", Routing.from_topk)(lambda m: {"indices": m.indices, "num_experts": m.sizes.experts})
target("Routing.from_map", "routing_map", Routing.from_map)(lambda m: {"routing_map": m.routing.to_map()[0].int()})
target("Routing.pad_to_multiple", _FIELDS, lambda **fields: Routing(**fields).pad_to_multiple(8).order)(_fields)
target("Routing.row_weights", _FIELDS, lambda **fields: Routing(**fields).row_weights())(_fields)
target("permute", _FIELDS, lambda tokens, **fields: moekit.permute(tokens, Routing(**fields)))(
    lambda m: {"tokens": m.floats(m.sizes.tokens, m.sizes.hidden), **_fields(m)}
)
target("unpermute", _FIELDS, lambda rows, **fields: moekit.unpermute(rows, Routing(**fields), weighted=True))(
    lambda m: {"rows": m.floats(m.sizes.rows, m.sizes.hidden), **_fields(m)}
)


@target("moe_utils.unpermute", "sorted_indices", lambda shape, **a: moe_utils.unpermute(restore_shape=shape, **a))
def _(m: Make) -> dict[str, Any]:
    shape = (m.sizes.tokens, m.sizes.hidden)
    return {"shape": shape, "permuted_tokens": m.floats(m.sizes.rows, m.sizes.hidden), "sorted_indices": m.row_token.long()}


@target("moe_utils.permute", "routing_map", moe_utils.permute)
def _(m: Make) -> dict[str, Any]:
    return {"tokens": m.floats(m.sizes.tokens, m.sizes.hidden), "routing_map": m.routing.to_map()[0].int()}


for _name, _sort in (("sort_chunks", moekit.sort_chunks), ("moe_utils.sort_chunks_by_idxs", moe_utils.sort_chunks_by_idxs)):

    @target(_name, "split_sizes sorted_idxs", lambda rows, _sort=_sort, **others: _sort(rows, **others)[0])
    def _(m: Make) -> dict[str, Any]:
        sizes, order = _chunks(m)
        return {"rows": m.floats(int(sizes.sum()), m.sizes.hidden), "split_sizes": sizes, "sorted_idxs": order}


target("glu", "offsets", moekit.glu)(_glu_inputs)


@target("grouped_linear", "offsets", moekit.grouped_linear)
def _(m: Make) -> dict[str, Any]:
    weight = m.floats(m.sizes.experts, m.sizes.inner, m.sizes.hidden)
    return {"rows": m.floats(m.sizes.rows, m.sizes.hidden), "weight": weight, "offsets": m.offsets()}


def _run_experts(x: Tensor, gate_up: Tensor, down: Tensor, **fields: Tensor) -> Any:
    return moekit.experts(x, Routing(**fields), gate_up, down)


@target("experts", _FIELDS, _run_experts)
def _(m: Make) -> dict[str, Any]:
    return {"x": m.floats(m.sizes.tokens, m.sizes.hidden), **m.expert_weights(), **_fields(m)}


@target("experts of a pair", "indices", lambda x, indices, weights, **w: moekit.experts(x, (indices, weights), **w))
def _(m: Make) -> dict[str, Any]:
    x, weights = m.floats(m.sizes.tokens, m.sizes.hidden), m.floats(m.sizes.tokens, m.sizes.topk)
    return {"x": x, "indices": m.indices, "weights": weights, **m.expert_weights()}


# --- nonsense -------------------------------------------------------------------------------------------------------

NONSENSE: dict[str, Callable[[Tensor, random.Random], Tensor]] = {}


def nonsense(make: Callable[[Tensor, random.Random], Tensor]) -> Callable:
    """``make(table, rng)`` puts something wrong in the place of a right table."""
    NONSENSE[make.__name__.lstrip("_")] = make
    return make


def _with(table: Tensor, rng: random.Random, values: tuple[int, ...]) -> Tensor:
    """One entry replaced."""
    limits = torch.iinfo(table.dtype)
    fitting = [value for value in values if limits.min <= value <= limits.max]
    changed = table.clone()
    if table.numel():
        changed.view(-1)[rng.randrange(table.numel())] = rng.choice(fitting)
    return changed


@nonsense
def _nothing(table: Tensor, rng: random.Random) -> Tensor:
    return table


@nonsense
def _huge(table: Tensor, rng: random.Random) -> Tensor:
    return _with(table, rng, (10**6, 10**9, INT32.max, INT32.max - 1, 2**31, 2**40, INT64.max, INT64.max - 7))


@nonsense
def _past_the_end(table: Tensor, rng: random.Random) -> Tensor:
    top = int(table.max()) if table.numel() else 0
    return _with(table, rng, (top + 1, top + 2, table.numel(), table.numel() + 1, 2 * table.numel()))


@nonsense
def _negative(table: Tensor, rng: random.Random) -> Tensor:
    return _with(table, rng, (-1, -2, -table.numel(), -(10**6), INT32.min, INT32.min + 1, -(2**40), INT64.min))


@nonsense
def _wraps(table: Tensor, rng: random.Random) -> Tensor:
    """Right if only the low 32 bits were read."""
    return table.long() + rng.choice((2**32, -(2**32), 2**33))


@nonsense
def _decreasing(table: Tensor, rng: random.Random) -> Tensor:
    return table.reshape(-1).flip(0).view(table.shape)


@nonsense
def _shuffled(table: Tensor, rng: random.Random) -> Tensor:
    places = list(range(table.numel()))
    rng.shuffle(places)
    return table.reshape(-1)[torch.tensor(places, dtype=torch.int64)].view(table.shape)


@nonsense
def _duplicate(table: Tensor, rng: random.Random) -> Tensor:
    changed = table.clone()
    if table.numel():
        flat = changed.view(-1)
        flat[rng.randrange(table.numel())] = flat[rng.randrange(table.numel())].item()
    return changed


@nonsense
def _constant(table: Tensor, rng: random.Random) -> Tensor:
    return torch.full_like(table, rng.choice((0, 1, -1, -2, 7, INT32.max, INT32.min)))


@nonsense
def _random(table: Tensor, rng: random.Random) -> Tensor:
    numbers = [rng.randint(-3, 2 * table.numel() + 2) for _ in range(table.numel())]
    return torch.tensor(numbers, dtype=table.dtype).view(table.shape)


@nonsense
def _dtype(table: Tensor, rng: random.Random) -> Tensor:
    others = (torch.float32, torch.float64, torch.bool, torch.int8, torch.uint8, torch.int16, torch.bfloat16)
    return table.to(rng.choice(others))


@nonsense
def _other_width(table: Tensor, rng: random.Random) -> Tensor:
    return table.long() if table.dtype is torch.int32 else table.int()


@nonsense
def _short(table: Tensor, rng: random.Random) -> Tensor:
    return table[rng.choice((slice(None, -1), slice(1, None), slice(0, 0)))].clone()


@nonsense
def _long(table: Tensor, rng: random.Random) -> Tensor:
    return torch.cat([table, *[table[-1:]] * rng.choice((1, 1, 5))])


@nonsense
def _strided(table: Tensor, rng: random.Random) -> Tensor:
    return table.repeat_interleave(2, -1)[..., ::2] if table.numel() else table


@nonsense
def _dimensions(table: Tensor, rng: random.Random) -> Tensor:
    return rng.choice((table.unsqueeze(0), table.unsqueeze(-1), table.reshape(-1)))


# --- cases ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One call with one argument (sometimes two) made nonsense of."""

    title: str
    target: Target
    arguments: dict[str, Any]


PAIRS = [(t, argument, kind) for t in TARGETS.values() for argument in t.integers for kind in NONSENSE]


def case(index: int, seed: int = 0) -> Case:
    """The case of a number: ``len(PAIRS)`` in a row try every kind on every argument of every function."""
    rng = random.Random(f"{seed} {index}")
    found, argument, kind = PAIRS[index % len(PAIRS)]
    large = index >= len(PAIRS) and rng.random() < 0.03
    arguments = found.build(Make(LARGE if large else rng.choice(SMALL), rng))
    changes = {argument: kind}
    if rng.random() < 0.15:
        changes.setdefault(rng.choice(found.integers), rng.choice(list(NONSENSE)))
    for name, change in changes.items():
        arguments[name] = NONSENSE[change](arguments[name], rng)
    title = ", ".join(f"{name} {change}: {_shown(arguments[name])}" for name, change in changes.items())
    return Case(f"{index} {found.name} {title}", found, arguments)


def _shown(value: Tensor) -> str:
    values = value.flatten()[:24].tolist()
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {values}"


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a result, or of arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Routing):
        yield from tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: map_tensors(change, item) for name, item in value.items()}
    return [map_tensors(change, item) for item in value] if isinstance(value, list) else value
