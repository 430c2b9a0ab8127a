"""A plan: what a model's experts take in memory, on the wire and in time, on one rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moekit import _check
from moekit.plan import exchange, models, rates
from moekit.plan.memory import DEVICES, SAVES, Bytes, Load, step
from moekit.plan.models import Model
from moekit.plan.rates import Rates
from moekit.plan.weights import in_every_format, packed_bytes

_OP = "plan"
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
_MOMENTS = 2  # of AdamW, in the parameters' dtype as torch.optim makes them


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of the whole model.

    Attributes:
        total: all, tied ones once; None if only sizes of experts are known.
        experts: of routed experts.
        expert: of one of them.
        active: all but those of experts that a token does not choose; None as above.
        others: what is no routed expert, by what it is; empty as above.
        adapters: of LoRA on the experts.
    """

    total: int | None
    experts: int
    expert: int
    active: int | None
    others: dict[str, int]
    adapters: int


@dataclass(frozen=True)
class Activations:
    """Bytes of the experts' activations under one ``save``, on one rank.

    Attributes:
        kept: by a layer for backward, without the input it refers to.
        peak: the most that a step of one layer allocates at a time: output and gradients included; parameters, input and
            the output's gradient left out.
        peak_at: where in the step that is.
        all_kept: by all layers, inputs included.
        all_peak: the most in a step of all layers: when backward begins, with all that is kept, or when it ends, with all
            gradients of weights.
    """

    kept: int
    peak: int
    peak_at: str
    all_kept: int
    all_peak: int


@dataclass(frozen=True)
class Exchange:
    """What expert parallelism sends, for tokens that choose evenly.

    Attributes:
        received: rows that a rank receives, its own included.
        messages: bytes that a rank sends to others in one exchange of rows, by how: ``rank`` (:class:`moekit.ep.AllToAll`),
            ``all`` (:class:`moekit.ep.AllGather`), ``slot`` (a row an expert), ``node`` (two hops). A step has four.
        sent: bytes that a rank sends in a step of a layer by :class:`moekit.ep.AllToAll`, by what :func:`moekit.ep.traffic`
            counts.
        seconds: of the four exchanges of a layer by ``rank``; None without the speeds of links.
    """

    received: int
    messages: dict[str, float]
    sent: dict[str, float]
    seconds: float | None


@dataclass(frozen=True)
class Times:
    """Seconds of a forward and backward.

    Attributes:
        products: of a layer, at the rate of a dense product; None if that is not known in the plan's dtype.
        moves: of a layer: bytes that kernels read and write; None if the bandwidth is not known.
        exchange: of a layer; None without expert parallelism or the speeds of links.
        layer: the sum; None if a part of it is not known.
        layers: of all layers; None likewise.
        rates: what they are computed from.
    """

    products: float | None
    moves: float | None
    exchange: float | None
    layer: float | None
    layers: float | None
    rates: Rates


@dataclass(frozen=True)
class Fit:
    """Bytes on one device beside what it has.

    Attributes:
        capacity: of the device; None if it was not given.
        experts: weights of the experts of this rank.
        others: other parameters.
        training: adapters, moments of AdamW and gradients of other parameters, of what is trained.
        activations: of the experts, by ``save``, their own parameters' gradients included; ``checkpointed``: only inputs of
            layers are kept, and one layer is computed again at a time.
        total: the sum, likewise.
        left: for attention, logits and the rest; negative: it does not fit. Empty without a capacity.
    """

    capacity: int | None
    experts: int
    others: int
    training: int
    activations: dict[str, int]
    total: dict[str, int]
    left: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` has found; everything of one rank, but for ``parameters`` and ``formats``.

    Attributes:
        model: the sizes.
        tokens: T, of a step of this rank.
        ep: R.
        device: whose kernels activations are of.
        dtype: of tokens, adapters, biases and weights that are not packed.
        format: of the experts' weights; empty for ``dtype``.
        double_quant: whether ``nf4`` has its scales in 8 bits.
        lora: r, of an adapter on either weight; 0 for none.
        trained: whether the experts' weights are trained themselves.
        parameters: how many there are.
        formats: bytes of all experts by format; None for one whose blocks they do not fit.
        inputs: bytes of a layer's input, to which backward refers.
        activations: by ``save``.
        exchange: between ranks; None for one rank.
        times: expected; None without rates.
        fit: bytes in all; None where only sizes of experts are known.
    """

    model: Model
    tokens: int
    ep: int
    device: str
    dtype: str
    format: str
    double_quant: bool
    lora: int
    trained: bool
    parameters: Parameters
    formats: dict[str, int | None]
    inputs: int
    activations: dict[str, Activations]
    exchange: Exchange | None
    times: Times | None
    fit: Fit | None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and names, for JSON."""
        return asdict(self)


def plan(
    config: str | Path | Mapping[str, Any] | Model,
    *,
    tokens: int,
    ep: int = 1,
    format: str | None = None,
    double_quant: bool = False,
    lora: int = 0,
    frozen: bool = False,
    device: str = "cuda",
    dtype: str = "bfloat16",
    memory: float | None = None,
    rates: Rates | None = None,
) -> Plan:
    """What a model's experts take in a training step.

    Args:
        config: as :func:`moekit.plan.read` takes it, or a model.
        tokens: T, of a step of one rank.
        ep: R, ranks that share the experts.
        format: ``nf4``, ``mxfp4``, ``fp8`` or ``int8``: experts are packed so, and frozen. None: dense.
        double_quant: scales of ``nf4`` in 8 bits.
        lora: the rank of an adapter on either weight of every expert, whose weights are then frozen; 0: none.
        frozen: the experts' weights are not trained, nor anything beside them.
        device: ``cuda`` or ``cpu``: whose kernels. Backends hold different temporaries.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        memory: GiB of a device, to say what is left of it.
        rates: of a machine, for times: one of :data:`moekit.plan.MACHINES`, or one's own.

    Returns:
        A :class:`Plan`. Experts are taken as evenly loaded.

    Raises:
        ValueError: numbers that are not positive, an ``ep`` that does not divide the experts (or does not share out groups
            of them), an unknown format, device or dtype, experts that do not fit into a format's blocks, or what
            :func:`moekit.plan.read` says of a config.
        FileNotFoundError: a config that is not there.
    """
    model = config if isinstance(config, Model) else models.read(config)
    tokens, ep = _check.positive(_OP, "tokens", tokens), _check.positive(_OP, "ep", ep)
    lora = 0 if lora == 0 else _check.positive(_OP, "lora", lora)
    _check.one_of(_OP, "device", device, DEVICES)
    _check.one_of(_OP, "dtype", dtype, DTYPES)
    if memory is not None and not 0 < memory < math.inf:
        raise _check.fail(_OP, "memory", "a positive number of GiB", memory)
    if memory is not None and model.others is None:
        raise _check.fail(_OP, "memory", "left out where only the sizes of experts are known", memory)
    if double_quant and format is None:
        raise _check.fail(_OP, "double_quant", "given with format='nf4'", "no format")
    _check_ranks(model, ep)
    layer = _layer(model, tokens, DTYPES[dtype])
    load = _load(model, layer, ep, packed=format or "", rank=lora, trained=not (format or lora or frozen), device=device)
    stack = _stack(model, load, format, double_quant)  # refuses unknown formats, and experts that do not fit
    inputs = load.tokens * load.hidden * load.itemsize
    activations = {save: _activations(load, save, model.moe_layers, inputs) for save in SAVES}
    exchanged = _exchange(layer, load, ep, rates) if ep > 1 else None
    return Plan(
        *(model, tokens, ep, device, dtype, format or "", double_quant, lora, load.trained),
        parameters=_parameters(model, lora),
        formats={dtype: _dense_bytes(model, load.itemsize)}
        | in_every_format(lambda name, double: model.moe_layers * _packed_stack(model, load, name, double)),
        inputs=inputs,
        activations=activations,
        exchange=exchanged,
        times=None if rates is None else _times(load, model.moe_layers, exchanged, rates, dtype),
        fit=None if model.others is None else _fit(model, load, stack, activations, inputs, memory),
    )


def _check_ranks(model: Model, ep: int) -> None:
    if model.experts % ep:
        raise _check.fail(_OP, "ep", f"a divisor of the {model.experts} experts", ep)
    here, group = model.experts // ep, model.experts // model.groups
    if here % group and group % here:
        wanted = f"so that ranks hold whole groups of {group} experts, or groups whole ranks"
        raise _check.fail(_OP, "ep", wanted, f"{ep} ({here} experts a rank)")


def _layer(model: Model, tokens: int, itemsize: int) -> exchange.Layer:
    sizes = (tokens, model.hidden, model.inner, model.experts, model.topk, model.groups, model.groups_chosen)
    return exchange.Layer(model.name, *sizes, row_bytes=itemsize)


def _load(model: Model, layer: exchange.Layer, ep: int, **options: Any) -> Load:
    """What a rank's experts work on: with others, the tokens that need one of them, and as many rows as it sends."""
    received = math.ceil(layer.tokens * ep * exchange.needed(layer, ep)) if ep > 1 else layer.tokens
    sizes = (received, layer.tokens * layer.topk, model.hidden, model.inner, model.experts // ep, model.topk)
    return Load(*sizes, model.gated, model.biases, layer.row_bytes, layer.weight_bytes, **options)


def _parameters(model: Model, lora: int) -> Parameters:
    found = (model.parameters, model.experts_parameters, model.expert_parameters, model.active_parameters)
    return Parameters(*found, dict(model.others or {}), model.moe_layers * model.experts * _adapter(model, lora))


def _adapter(model: Model, lora: int) -> int:
    """Parameters of an expert's adapters."""
    _, width, _ = model.gate_up_shape
    return lora * (model.hidden + width + model.inner + model.hidden)


def _dense_bytes(model: Model, itemsize: int) -> int:
    return model.experts_parameters * itemsize


def _packed_stack(model: Model, load: Load, format: str, double_quant: bool, ep: int = 1) -> int:
    """Bytes of a layer's experts of one rank, biases in the dtype of tokens."""
    shapes = ((model.experts // ep, *shape[1:]) for shape in (model.gate_up_shape, model.down_shape))
    biases = model.experts // ep * (model.gate_up_shape[1] + model.hidden) * load.itemsize if model.biases else 0
    return biases + sum(packed_bytes(shape, format, double_quant=double_quant) for shape in shapes)


def _stack(model: Model, load: Load, format: str | None, double_quant: bool) -> int:
    """Bytes of the experts of a layer that this rank has."""
    ep = model.experts // load.experts
    if format is None:
        return load.experts * model.expert_parameters * load.itemsize
    return _packed_stack(model, load, format, double_quant, ep)


def _activations(load: Load, save: str, layers: int, inputs: int) -> Activations:
    found = _step(load, save)
    gradients = _gradients(load)
    others = (layers - 1) * max(found.kept + inputs, gradients)
    return Activations(found.kept, found.peak, found.peak_at, layers * (found.kept + inputs), inputs + found.peak + others)


def _step(load: Load, save: str) -> Bytes:
    return step(Load(**{**asdict(load), "save": save}))


def _gradients(load: Load) -> int:
    """Bytes of the gradients of a layer's experts or adapters."""
    width, bias = load.width, load.width + load.hidden if load.biases else 0
    trained = (width + load.inner) * load.hidden + bias if load.trained else 0
    return load.experts * load.itemsize * (trained + load.rank * (2 * load.hidden + width + load.inner))


def _exchange(layer: exchange.Layer, load: Load, ep: int, speeds: Rates | None) -> Exchange:
    machine = speeds.machine(ep) if speeds is not None else None
    node = min(ep, 8 if speeds is None else speeds.node)
    messages = {way: exchange.message(layer, ep, node, way) for way in exchange.WAYS if way != "node" or ep % node == 0}
    seconds = None if machine is None else exchange.times(layer, machine, ep, "rank").exchange
    return Exchange(load.tokens, messages, exchange.sent(layer, ep), seconds)


def _times(load: Load, layers: int, exchanged: Exchange | None, speeds: Rates, dtype: str) -> Times:
    flops = speeds.products_in(dtype)
    products = None if flops is None else rates.operations(load) / flops
    moves = None if speeds.bandwidth is None else rates.traffic(load) / speeds.bandwidth
    sending = None if exchanged is None else exchanged.seconds
    parts = [part for part in (products, moves, *([] if exchanged is None else [sending])) if part is not None]
    whole = len(parts) == (2 if exchanged is None else 3)
    return Times(products, moves, sending, *((sum(parts), layers * sum(parts)) if whole else (None, None)), speeds)


def _fit(model: Model, load: Load, stack: int, found: dict[str, Activations], inputs: int, memory: float | None) -> Fit:
    layers, others = model.moe_layers, sum((model.others or {}).values()) * load.itemsize
    own = layers * load.experts * load.itemsize * _adapter(model, load.rank)
    trained = layers * _gradients(load) + (others if load.trained else 0)
    training = own + _MOMENTS * trained + (others if load.trained else 0)
    activations = {save: each.all_peak for save, each in found.items()}
    once = min(each.peak for each in found.values())
    activations["checkpointed"] = inputs + once + (layers - 1) * max(inputs, _gradients(load))
    capacity = None if memory is None else int(memory * 2**30)
    total = {save: layers * stack + others + training + size for save, size in activations.items()}
    left = {} if capacity is None else {save: capacity - size for save, size in total.items()}
    return Fit(capacity, layers * stack, others, training, activations, total, left)
