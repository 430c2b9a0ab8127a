"""From a dense MLP to a Mixture-of-Experts layer that starts out as the same function.

Sparse upcycling (arXiv 2212.05055): every expert is a copy of the dense MLP, and since the weights of a token sum to one,
the first output is the dense one whatever the router says. Granular upcycling (arXiv 2410.07524): the MLP is cut along its
intermediate width into ``granularity`` slices, of each of which there are as many copies; see :func:`from_dense`.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekit import _check
from moekit.nn.moe import MoE
from moekit.nn.shared import SharedExpert

_OP = "nn.MoE.from_dense"
# With these the weights of a token would not sum to one, or not all of it would be computed.
_NOT_AT_THE_START = ("scale", "normalise", "epsilon", "capacity", "null_experts", "shared_intermediate")


class _Dense(NamedTuple):
    """A dense MLP: its gate's constants, and its weights, the halves of the first projection apart."""

    options: dict[str, Any]
    firsts: list[Tensor]  # each [I, H]: gate and up, or up alone
    down: Tensor  # [H, I]
    first_biases: list[Tensor]  # each [I]; none without biases
    down_bias: Tensor | None


def from_dense(
    dense: nn.Module | tuple[Tensor | None, Tensor, Tensor],
    *,
    num_experts: int,
    k: int,
    granularity: int = 1,
    activation: str | None = None,
    **options: Any,
) -> MoE:
    """A layer of copies of a dense MLP whose first output is the MLP's, to rounding.

    With a ``granularity`` of G the intermediate width is cut into G slices. Experts ``c * G`` to ``c * G + G - 1`` are the
    slices of copy ``c``, and they begin with the same row of the router: a token therefore chooses ``k / G`` copies whole,
    each with equal weights, and a factor of G on the weights makes the sum the dense output. From there on the slices learn
    to be chosen apart.

    Args:
        dense: a module with linear maps ``gate_proj``, ``up_proj``, ``down_proj``, a :class:`moekit.nn.SharedExpert` without
            a gate, or the weights ``(gate [I, H], up [I, H], down [H, I])``; a gate of None is no gate.
        num_experts: E, a multiple of G.
        k: experts a token, a multiple of G.
        granularity: G, a divisor of I.
        activation: of weights, and of a module whose code moekit does not know: that it is
            ``down(act(gate(x)) * up(x))`` is then what the caller says. Left out for modules that moekit knows.
        **options: as of :meth:`moekit.nn.MoE.build`, but for those that would make the first output another.

    Returns:
        A layer in the dtype and on the device of the dense weights, which it copies.

    Raises:
        ValueError: sizes that are no multiples, or an option that does not go with it.
        TypeError: a module whose code is not known, without ``activation``.
    """
    mlp = _dense(dense, activation)
    granularity = _check.positive(_OP, "granularity", granularity)
    num_experts, k = _check.positive(_OP, "num_experts", num_experts), _check.positive(_OP, "k", k)
    intermediate, hidden = mlp.firsts[0].shape
    sizes = {"num_experts": num_experts, "k": k, "dense": intermediate}
    for name, size in sizes.items():
        if size % granularity:
            wanted = f"{'of an intermediate width that is ' * (name == 'dense')}a multiple of granularity ({granularity})"
            raise _check.fail(_OP, name, wanted, size)
    ruled_out = (*_NOT_AT_THE_START, *mlp.options, "bias", "dtype", "device", *(("num_groups",) if granularity > 1 else ()))
    for name in ruled_out:
        if name in options:
            raise _check.fail(
                _OP, name, "left out (the dense MLP decides it, or the first output would differ)", options[name]
            )
    if granularity > 1:
        options["scale"] = float(granularity)
    place = {"dtype": mlp.down.dtype, "device": mlp.down.device}
    made = {**options, **mlp.options, **place, "bias": mlp.down_bias is not None}
    layer = MoE.build(hidden, intermediate // granularity, num_experts, k, **made)
    _fill(layer, mlp, granularity)
    return layer


@torch.no_grad()
def _fill(layer: MoE, mlp: _Dense, granularity: int) -> None:
    """Write the slices into the experts, and the same row of the router to all slices of a copy."""
    copies = layer.experts.num_experts // granularity
    gate_up = torch.cat([first.unflatten(0, (granularity, -1)) for first in mlp.firsts], 1)  # [G, 2I/G, H]
    down = mlp.down.unflatten(1, (granularity, -1)).movedim(1, 0)  # [G, H, I/G]
    layer.experts.gate_up.copy_(gate_up.repeat(copies, 1, 1))
    layer.experts.down.copy_(down.repeat(copies, 1, 1))
    if layer.experts.gate_up_bias is not None and layer.experts.down_bias is not None and mlp.down_bias is not None:
        biases = torch.cat([bias.unflatten(0, (granularity, -1)) for bias in mlp.first_biases], 1)
        layer.experts.gate_up_bias.copy_(biases.repeat(copies, 1))
        layer.experts.down_bias.copy_(mlp.down_bias / granularity)  # each of the slices adds its share
    first_rows = layer.router.weight[::granularity].clone()
    layer.router.weight.copy_(first_rows.repeat_interleave(granularity, 0))


def _dense(dense: Any, activation: str | None) -> _Dense:
    if isinstance(dense, SharedExpert):
        return _of_shared(dense, activation)
    if isinstance(dense, nn.Module):
        return _of_module(dense, activation)
    if not isinstance(dense, tuple) or len(dense) != 3:
        wanted = "a module, or (gate [I, H] or None, up [I, H], down [H, I])"
        raise _check.wrong_type(_OP, "dense", wanted, type(dense).__name__)
    if activation is None:
        raise _check.fail(_OP, "activation", "given with weights", None)
    gate, up, down = dense
    firsts = [up] if gate is None else [gate, up]
    for first in firsts:
        _check.computable(_OP, "dense", first)
        _check.tensor_dim(_OP, "dense", first, 2)
        _check.shape(_OP, "dense", first, up.shape, "[intermediate, hidden]")
    _check.shape(_OP, "dense", down, tuple(reversed(up.shape)), "[hidden, intermediate]")
    layout = {"layout": "ungated"} if gate is None else {}
    return _Dense({"activation": activation, **layout}, firsts, down, [], None)


def _of_module(dense: nn.Module, activation: str | None) -> _Dense:
    blocks = importlib.import_module("moekit.hf.blocks")
    try:
        options, slots = blocks.mlp(dense)
    except TypeError as error:
        if activation is None:
            wanted = "a module whose code moekit knows, or down(act(gate(x)) * up(x)) and the activation said"
            raise _check.wrong_type(_OP, "dense", wanted, type(dense).__name__) from error
        return _as_said(dense, activation)
    if activation is not None:
        raise _check.unused(_OP, "activation", activation, "with a module that says its own")
    parts = {slot.name.removeprefix("shared."): slot.parts for slot in slots}
    firsts = _halves(list(parts["gate_up"]), options)
    biases = _halves(list(parts.get("gate_up_bias", ())), options)
    options.pop("bias")
    return _Dense(options, firsts, parts["down"][0], biases, parts["down_bias"][0] if biases else None)


def _as_said(dense: nn.Module, activation: str) -> _Dense:
    """A module of which the caller says that it is ``down(act(gate(x)) * up(x))``."""
    maps: list[Any] = [getattr(dense, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(each, nn.Linear) for each in maps):
        raise _check.wrong_type(_OP, "dense", "a module with nn.Linear gate_proj, up_proj, down_proj", type(dense).__name__)
    biases = [each.bias for each in maps]
    if any((bias is None) != (biases[0] is None) for bias in biases):
        raise _check.fail(_OP, "dense", "one with three biases or none", [bias is not None for bias in biases])
    weights = [each.weight for each in maps]
    found = _dense(tuple(weights), activation)
    return found if biases[0] is None else found._replace(first_biases=biases[:2], down_bias=biases[2])


def _of_shared(dense: SharedExpert, activation: str | None) -> _Dense:
    if activation is not None:
        raise _check.unused(_OP, "activation", activation, "with a module that says its own")
    if dense.gate is not None:
        raise _check.fail(_OP, "dense", "one without a gate (which the experts would not have)", "one with gate=True")
    options = {name: value for name, value in dense.options.items() if value is not None}
    firsts = _halves([dense.gate_up], options)
    biases = [] if dense.gate_up_bias is None else _halves([dense.gate_up_bias], options)
    if options["layout"] == "interleaved":
        options["layout"] = "concatenated"
    return _Dense(options, firsts, dense.down, biases, dense.down_bias)


def _halves(parts: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Gate and up apart, whichever way they are stored; the one there is without a gate."""
    layout = options.get("layout", "concatenated")
    if layout == "ungated" or len(parts) != 1:
        return parts
    return [parts[0][0::2], parts[0][1::2]] if layout == "interleaved" else list(parts[0].chunk(2))
