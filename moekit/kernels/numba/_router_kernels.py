"""The router: scores, top-k selection and weights of a token in one go, and the way back.

Selection compares 64-bit keys: a score's bits in an order that integers have too, and below them the expert, lowest
first. No two keys are equal, so ties go to the lowest expert; the largest of E keys is a vector reduction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from moekit.kernels.numba._activations import exp, sigmoid
from moekit.kernels.numba._bits import bits_of, plus, read_f32, read_i64, read_u8, write_f32, write_i64, zero
from moekit.kernels.numba._elements import SIZES, load, store
from moekit.kernels.numba._jit import INLINE, inline, kernel

SOFTMAX, PRE_SOFTMAX, SIGMOID, ROOT_SOFTPLUS = range(4)
# Scores of a logit alone, divided by the sum of the chosen ones.
_OWN = (SIGMOID, ROOT_SOFTPLUS)
# Keeps a token whose scores are all zero from dividing by zero.
_NORMALISER_EPS = np.float32(1e-20)

_F = np.float32
_ONE, _HALF, _TWO, _ZERO = _F(1.0), _F(0.5), _F(2.0), _F(0.0)
_LOWEST = np.finfo(_F).min
# Below this softplus(x) is exp(x), and its square root is taken as exp(x / 2), which underflows much later.
_FAR = _F(-40.0)
# log(1 + t) = 2 * artanh(z), z = t / (2 + t): its series up to z**15, for t up to 1 good to 2e-9.
_L1, _L3, _L5, _L7, _L9, _L11, _L13, _L15 = (_F(2 / n) for n in range(1, 16, 2))
_TAKEN = np.int64(-(2**63))  # below every key
_LOW = np.int64(0xFFFFFFFF)
# Vector loops look how far apart two arrays begin, and go element by element where one might reach into the other: sums
# would have another order, depending on the allocator. So every array is so long that no other begins near it.
_APART = 256


@inline
def scratch(count):
    """Room for ``count`` numbers."""
    return np.empty(count + _APART, np.float32)


@inline
def key_of(score, index):
    """NaN below minus infinity, and one zero for both."""
    bits = np.int32(bits_of(score))
    if bits == np.int32(-(2**31)):
        bits = np.int32(0)
    ordered = bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)
    if score != score:
        ordered = np.int32(-(2**31))
    return (np.int64(ordered) << np.int64(32)) | (_LOW - np.int64(index))


@inline
def take_best(keys, begin, end):
    """The index of the largest key in ``[begin, end)``, which is then out of the running."""
    best = _TAKEN
    for i in range(begin, end):
        best = max(best, keys[i])
    index = _LOW - (best & _LOW)
    keys[index] = _TAKEN
    return index


@inline
def decay(x):
    """``exp(x)`` for x up to 0, down to exactly 0."""
    return exp(x) if x >= _F(-88.0) else (_ZERO if x < _F(-88.0) else x)


@inline
def _log_of_one_plus(t):
    """``log(1 + t)`` for t in [0, 1]."""
    z = t / (_TWO + t)
    w = z * z
    return z * (_L1 + w * (_L3 + w * (_L5 + w * (_L7 + w * (_L9 + w * (_L11 + w * (_L13 + w * _L15)))))))


@inline
def _root_softplus(x):
    near = math.sqrt((x if x > _ZERO else _ZERO) + _log_of_one_plus(decay(-abs(x))))
    return decay(x * _HALF) if x < _FAR else near


@inline
def _root_softplus_slope(x, score):
    return score * _HALF if x < _FAR else sigmoid(x) / (_TWO * score)


@inline
def _sigmoid_slope(x, score):
    return score * sigmoid(-x)


@inline
def _as_it_is(x):
    return x


@inline
def _softmax_slope(x, score):
    return score


_SCORE = {SOFTMAX: _as_it_is, PRE_SOFTMAX: _as_it_is, SIGMOID: sigmoid, ROOT_SOFTPLUS: _root_softplus}
_SLOPE = {
    SOFTMAX: _softmax_slope,
    PRE_SOFTMAX: _softmax_slope,
    SIGMOID: _sigmoid_slope,
    ROOT_SOFTPLUS: _root_softplus_slope,
}


def own_score(scoring: int, x: Any) -> Any:
    """The score of a logit alone; with softmax, which needs others, the logit. For kernels only."""
    raise NotImplementedError


def score_slope(scoring: int, x: Any, score: Any) -> Any:
    """What a gradient of the score has to be multiplied by, after the normalisation. For kernels only."""
    raise NotImplementedError


@overload(own_score, prefer_literal=True, jit_options=INLINE)
def _own_score(scoring, x):
    if isinstance(scoring, types.IntegerLiteral):
        function = _SCORE[scoring.literal_value]
        return lambda scoring, x: function(x)


@overload(score_slope, prefer_literal=True, jit_options=INLINE)
def _score_slope(scoring, x, score):
    if isinstance(scoring, types.IntegerLiteral):
        function = _SLOPE[scoring.literal_value]
        return lambda scoring, x, score: function(x, score)


@inline
def soften(values, count):
    """Replace ``values[:count]`` by their softmax."""
    largest = values[0]
    for i in range(count):
        largest = values[i] if values[i] > largest else largest
    total = _ZERO
    for i in range(count):
        values[i] = decay(values[i] - largest)
        total = plus(total, values[i])
    for i in range(count):
        values[i] /= total


@inline
def keep_groups(keys, scores, experts, groups, group_topk, best, group_keys):
    """Leave only the keys of the ``group_topk`` groups with the highest sum of their ``best`` highest scores."""
    size = experts // groups
    for group in range(groups):
        begin = group * size
        total = _ZERO
        for _ in range(best):
            total += scores[take_best(keys, begin, begin + size)]
        group_keys[group] = key_of(total, group)
        for expert in range(begin, begin + size):
            keys[expert] = _TAKEN
    for _ in range(group_topk):
        begin = take_best(group_keys, 0, groups) * size
        for expert in range(begin, begin + size):
            keys[expert] = key_of(scores[expert], expert)


@inline
def normaliser_of(total, epsilon):
    """What weights are divided by; nothing for an ``epsilon`` below 0."""
    return total + epsilon if epsilon >= _ZERO else _ONE


@functools.cache
def router_kernel(element: int, scoring: int, has_bias: bool, grouped: bool, by_logits: bool) -> Callable:
    """Weights ``[T, K]`` and experts ``[T, K]``, chosen by scores or ``by_logits``; zeros in ``link [E]``."""
    size, own = SIZES[element], scoring in _OWN

    @kernel(element, scoring, has_bias, grouped, by_logits)
    def route(
        start: int, stop: int, logits: int, bias: int, experts: int, slots: int,
        groups: int, group_topk: int, group_best: int, epsilon: float, scale: float, weights: int, indices: int,
        link: int,
    ):  # fmt: skip
        if start == 0:
            zero(link, experts * 4)
        values, scores = scratch(experts), scratch(experts)
        keys, group_keys = np.empty(experts + _APART, np.int64), np.empty(max(groups, 1) + _APART, np.int64)
        chosen = scratch(slots)
        for token in range(start, stop):
            row = logits + token * experts * size
            for expert in range(experts):
                values[expert] = load(element, row, expert)
                scores[expert] = values[expert]
            if scoring == PRE_SOFTMAX:
                soften(values, experts)
            if own and not by_logits:
                for expert in range(experts):
                    values[expert] = own_score(scoring, values[expert])
            for expert in range(experts):
                score = scores[expert] if by_logits else values[expert]
                if has_bias:
                    score += read_f32(bias, expert)
                scores[expert] = score
                keys[expert] = key_of(score, expert)
            if grouped:
                keep_groups(keys, scores, experts, groups, group_topk, group_best, group_keys)
            total = _ZERO
            for slot in range(slots):
                expert = take_best(keys, 0, experts)
                write_i64(indices, token * slots + slot, expert)
                value = values[expert]
                if own and by_logits:
                    value = own_score(scoring, value)
                chosen[slot] = value
            if scoring == SOFTMAX:
                soften(chosen, slots)
            for slot in range(slots):
                total += chosen[slot]
            normaliser = normaliser_of(total, epsilon)
            for slot in range(slots):
                store(element, weights, token * slots + slot, chosen[slot] / normaliser * scale)

    return route


@functools.cache
def weigh_kernel(element: int, scoring: int) -> Callable:
    """Weights ``[T, K]`` of given experts ``[T, K]``, 0 for -1; ``wrong`` as in :func:`router_backward_kernel`."""
    size = SIZES[element]

    @kernel(element, scoring)
    def weigh(
        start: int, stop: int, logits: int, indices: int, experts: int, slots: int, epsilon: float, scale: float,
        weights: int, wrong: int,
    ):  # fmt: skip
        values, chosen = scratch(experts), scratch(slots)
        for token in range(start, stop):
            row, picks = logits + token * experts * size, indices + token * slots * 8
            if scoring == PRE_SOFTMAX:
                for expert in range(experts):
                    values[expert] = load(element, row, expert)
                soften(values, experts)
            for slot in range(slots):
                expert = read_i64(picks, slot)
                inside = 0 <= expert < experts
                if not inside and expert != -1:
                    write_i64(wrong, 0, 1)
                chosen[slot] = _LOWEST
                if inside:
                    value = values[expert] if scoring == PRE_SOFTMAX else load(element, row, expert)
                    chosen[slot] = own_score(scoring, value)
            if scoring == SOFTMAX:
                soften(chosen, slots)
            total = _ZERO
            for slot in range(slots):
                if not 0 <= read_i64(picks, slot) < experts:
                    chosen[slot] = _ZERO
                total += chosen[slot]
            normaliser = normaliser_of(total, epsilon)
            for slot in range(slots):
                inside = 0 <= read_i64(picks, slot) < experts  # a token of no expert has no sum to be divided by
                store(element, weights, token * slots + slot, chosen[slot] / normaliser * scale if inside else _ZERO)

    return weigh


# --- sums of scores, for the losses ---------------------------------------------------------------------------------

SUMMED = 256  # tokens of a partial sum: as many whatever the number of threads


@inline
def score_all(scoring, own, values, scores, experts):
    """The scores of one token's logits, not divided by their sum yet, which is returned."""
    total = _ZERO
    largest = values[0]
    for expert in range(experts):
        largest = values[expert] if values[expert] > largest else largest
    for expert in range(experts):
        scores[expert] = own_score(scoring, values[expert]) if own else decay(values[expert] - largest)
        total = plus(total, scores[expert])
    return total + _NORMALISER_EPS if own else total


@functools.cache
def score_sums_kernel(element: int, scoring: int) -> Callable:
    """Sums ``[blocks, E]`` of the tokens' scores, which sum to one each; padding (a mask with an address) is left out."""
    size, own = SIZES[element], scoring in _OWN

    @kernel(element, scoring)
    def score_sums(start: int, stop: int, logits: int, mask: int, tokens: int, experts: int, sums: int):
        values, scores = scratch(experts), scratch(experts)
        added = scratch(experts)
        for block in range(start, stop):
            for expert in range(experts):
                added[expert] = _ZERO
            for token in range(block * SUMMED, min((block + 1) * SUMMED, tokens)):
                if mask != 0 and read_u8(mask, token) != 0:
                    continue
                for expert in range(experts):
                    values[expert] = load(element, logits + token * experts * size, expert)
                share = _ONE / score_all(scoring, own, values, scores, experts)
                for expert in range(experts):
                    added[expert] += scores[expert] * share
            for expert in range(experts):
                write_f32(sums, block * experts + expert, added[expert])

    return score_sums


# --- the way back ---------------------------------------------------------------------------------------------------


@inline
def sums_gradient(scoring, own, sums_grad, values, scores, share, dense, experts):
    """Add to ``dense [E]`` the gradient of a token's logits from that of the sums of scores."""
    mean = _ZERO
    for expert in range(experts):
        mean = plus(mean, scores[expert] * read_f32(sums_grad, expert))
    mean *= share
    for expert in range(experts):
        slope = score_slope(scoring, values[expert], scores[expert]) if own else scores[expert]
        dense[expert] += (read_f32(sums_grad, expert) - mean) * share * slope


@inline
def weights_gradient(g, chosen, slots, epsilon):
    """Turn ``g [K]`` of the weights into that of the scores ``chosen [K]``; returns the sum of ``g * chosen``."""
    total, dot = _ZERO, _ZERO
    for slot in range(slots):
        total += chosen[slot]
        dot += g[slot] * chosen[slot]
    if epsilon < _ZERO:
        return dot
    total += epsilon
    mean, dot = dot / total, _ZERO
    for slot in range(slots):
        g[slot] = (g[slot] - mean) / total
        dot += g[slot] * chosen[slot]
    return dot


@functools.cache
def router_backward_kernel(element: int, grad_element: int, scoring: int) -> Callable:
    """The gradient of the logits ``[T, E]`` from that of the weights ``[T, K]`` and that of the sums ``[E]``, if there.

    An index of -1 is no expert. ``wrong`` becomes 1 if one is neither that nor an expert; it is not followed.
    """
    size, own = SIZES[element], scoring in _OWN

    @kernel(element, grad_element, scoring)
    def route_backward(
        start: int, stop: int, grad: int, sums_grad: int, logits: int, indices: int, mask: int, experts: int, slots: int,
        epsilon: float, scale: float, out: int, wrong: int,
    ):  # fmt: skip
        values, scores, dense = scratch(experts), scratch(experts), scratch(experts)
        chosen, g = scratch(slots), scratch(slots)
        for token in range(start, stop):
            row, picks = logits + token * experts * size, indices + token * slots * 8
            if mask != 0 and read_u8(mask, token) != 0:
                zero(out + token * experts * size, experts * size)
                continue
            for expert in range(experts):
                values[expert] = load(element, row, expert)
            share = _ZERO
            if sums_grad != 0 or scoring == PRE_SOFTMAX:
                share = _ONE / score_all(scoring, own, values, scores, experts)
            for slot in range(slots):
                expert = read_i64(picks, slot)
                inside = 0 <= expert < experts
                if not inside and expert != -1:
                    write_i64(wrong, 0, 1)
                chosen[slot] = _LOWEST
                g[slot] = _ZERO
                if inside:
                    chosen[slot] = scores[expert] * share if scoring == PRE_SOFTMAX else own_score(scoring, values[expert])
                    if grad != 0:
                        g[slot] = load(grad_element, grad, token * slots + slot) * scale
            if scoring == SOFTMAX:
                soften(chosen, slots)
            present = 0
            for slot in range(slots):
                if 0 <= read_i64(picks, slot) < experts:
                    present += 1
                else:
                    chosen[slot] = _ZERO
            dot = weights_gradient(g, chosen, slots, epsilon) if present > 0 else _ZERO
            for expert in range(experts):
                dense[expert] = _ZERO
            if sums_grad != 0:
                sums_gradient(scoring, own, sums_grad, values, scores, share, dense, experts)
            if scoring == PRE_SOFTMAX:
                for expert in range(experts):
                    dense[expert] -= scores[expert] * share * dot
            for slot in range(slots):
                expert = read_i64(picks, slot)
                if 0 <= expert < experts:
                    if own:
                        dense[expert] += g[slot] * score_slope(scoring, values[expert], chosen[slot])
                    elif scoring == SOFTMAX:
                        dense[expert] += (g[slot] - dot) * chosen[slot]
                    else:
                        dense[expert] += g[slot] * chosen[slot]
            for expert in range(experts):
                store(element, out + token * experts * size, expert, dense[expert])

    return route_backward
