"""``moekit.route`` and the losses of its choice, against formulas in float64 that share no code with it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import moekit
from moekit import Routing, _check

pytestmark = pytest.mark.usefixtures("backend")
T, E, K = 13, 8, 3


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SCORES = {
    "softmax": lambda x: x.softmax(1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
}


def formula(
    logits, k, *, score="softmax", select_by="scores", bias=None, num_groups=1, group_topk=1, group_best=2,
    normalise=True, epsilon=1e-20, scale=1.0, multiplier=1.0, softcap=None, expert_scale=None, indices=None,
):  # fmt: skip
    """``(weights, indices)`` in float64, by the definitions."""
    logits = logits.double() * multiplier
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    scores = logits if score == "softmax" and select_by == "logits" else SCORES[score](logits)
    if indices is None:
        compared = (logits if select_by == "logits" else scores).detach()
        compared = compared if bias is None else compared + bias.double()
        grouped = compared.view(len(logits), num_groups, -1)
        best = grouped.topk(min(group_best, grouped.shape[2]), dim=2).values.sum(2).topk(group_topk, dim=1).indices
        outside = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(1, best, False)
        compared = grouped.masked_fill(outside.unsqueeze(2), -torch.inf).flatten(1)
        indices = compared.sort(dim=1, descending=True, stable=True).indices[:, :k]
    absent = indices < 0
    weights = scores.gather(1, indices.clamp(min=0))
    if score == "softmax" and select_by == "logits":
        weights = weights.masked_fill(absent, -1e300).softmax(1)
    weights = weights.masked_fill(absent, 0)
    if normalise and not (score == "softmax" and select_by == "logits"):
        weights = weights / (weights.sum(1, keepdim=True) + epsilon).masked_fill(absent.all(1, keepdim=True), 1.0)
    if expert_scale is not None:
        weights = weights * expert_scale.double()[indices.clamp(min=0)]
    return weights * scale, indices


GROUPS = {"num_groups": 4, "group_topk": 2}
OPTIONS = [
    *({"score": score, "select_by": by} for score, by in itertools.product(SCORES, ("scores", "logits"))),
    *({"score": score, "normalise": False, "scale": 2.5} for score in SCORES),
    *({"score": score, "bias": draw(E, seed=5), **GROUPS} for score in SCORES),
    {"score": "softmax", "group_best": 1, **GROUPS},
    {"score": "sigmoid", "select_by": "logits", "bias": draw(E, seed=5), "epsilon": 1e-6},
    {"score": "sigmoid", "multiplier": 1.5, "softcap": 0.8, "scale": 0.0},
    {"score": "softmax", "softcap": 2.0, "expert_scale": draw(E, seed=6).abs()},
]


def label(options):
    return " ".join(f"{key}={value if not isinstance(value, torch.Tensor) else '...'}" for key, value in options.items())


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choice_weights_and_gradients(options, dtype):
    logits = draw(T, E, seed=1, dtype=dtype).requires_grad_()
    grad = draw(T, K, seed=2, dtype=dtype)
    routing = moekit.route(logits, K, **options)
    exact = logits.detach().double().requires_grad_()
    weights, indices = formula(exact, K, **options)
    assert routing.indices.equal(indices) and routing.weights.dtype in (dtype, torch.float32)
    bound = {"rtol": 2e-6, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 2**-8, "atol": 2**-9}
    torch.testing.assert_close(routing.weights.double(), weights, **bound)
    found = torch.autograd.grad(routing.weights, logits, grad.to(routing.weights.dtype))[0]
    expected = torch.autograd.grad(weights, exact, grad.double())[0]
    bound = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2**-6, "atol": 2**-7}
    torch.testing.assert_close(found.double(), expected, **bound)
    _check.routing_tables("route", routing.order, routing.inverse, routing.offsets)


WEIGHED = [{"score": score, **options} for score in SCORES for options in ({}, {"normalise": False}, {"epsilon": 0.0})]


@pytest.mark.parametrize("options", WEIGHED, ids=label)
def test_given_indices(options):
    """Recorded ones: some of no expert, a token of none at all, and an expert twice, whose gradients add up."""
    indices = torch.stack([draw(E, seed=seed).argsort()[:K] for seed in range(T)])
    indices[2, 1], indices[4], indices[6] = -1, -1, torch.tensor([5, 1, 5])
    logits = draw(T, E, seed=1).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    grad = draw(T, K, seed=2)
    for given in (indices, indices.int()):
        routing = moekit.route(logits, indices=given, scale=1.5, **options)
        weights, _ = formula(exact, K, indices=indices, scale=1.5, **options)
        torch.testing.assert_close(routing.weights.double(), weights, rtol=2e-6, atol=1e-7)
        found, expected = (
            torch.autograd.grad(routing.weights, logits, grad),
            torch.autograd.grad(weights, exact, grad.double()),
        )
        torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-6)


def test_the_softmax_of_given_experts():
    indices = torch.tensor([[0, 3, -1]]).expand(T, 3)
    logits = draw(T, E, seed=1)
    routing = moekit.route(logits, indices=indices, select_by="logits")
    torch.testing.assert_close(routing.weights[:, :2], logits[:, [0, 3]].softmax(1))
    assert not routing.weights[:, 2].any()


def test_the_scale_of_an_expert_learns():
    logits, scale = draw(T, E, seed=1), draw(E, seed=3).requires_grad_()
    weights, indices = formula(logits, K)
    routing = moekit.route(logits, K, expert_scale=scale)
    (found,) = torch.autograd.grad(routing.weights.sum(), scale)
    torch.testing.assert_close(found.double(), torch.zeros(E).double().index_add(0, indices.flatten(), weights.flatten()))


def test_ties_nan_and_infinities():
    logits = draw(6, E, seed=1)
    logits[0], logits[1, 2], logits[2], logits[3, 5] = 1.0, float("nan"), float("nan"), float("-inf")
    for options in OPTIONS:
        routing = moekit.route(logits, K, **options)
        assert ((routing.indices >= 0) & (routing.indices < E)).all()
        assert all(len(set(row)) == K for row in routing.indices.tolist())
        assert routing.weights[4:].isfinite().all()
    assert moekit.route(logits, K).indices[0].tolist() == [0, 1, 2]


def test_padding_is_nowhere():
    mask = torch.arange(T) % 3 == 1
    logits = draw(T, E, seed=1)
    plain = logits[~mask].clone().requires_grad_()
    padded = logits.masked_fill(mask.unsqueeze(1), float("nan")).requires_grad_()
    for options in ({}, {"score": "sigmoid", "bias": draw(E, seed=5)}, {"select_by": "logits"}):
        found, expected = moekit.route(padded, K, padding_mask=mask, **options), moekit.route(plain, K, **options)
        assert found.tokens_per_expert.equal(expected.tokens_per_expert)
        assert (found.indices[mask] == -1).all() and not found.weights[mask].any()
        assert found.indices[~mask].equal(expected.indices) and found.weights[~mask].equal(expected.weights)
        losses = [
            moekit.balance_loss(routing, 0.7) + moekit.z_loss(routing, 0.3) + routing.weights.square().sum()
            for routing in (found, expected)
        ]
        torch.testing.assert_close(*losses)
        grads = torch.autograd.grad(losses[0], padded)[0], torch.autograd.grad(losses[1], plain)[0]
        torch.testing.assert_close(grads[0][~mask], grads[1])
        assert not grads[0][mask].any()


# --- capacity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["weights", "position"])
@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_capacity(by, capacity):
    logits = draw(T, E, seed=1)
    whole = moekit.route(logits, K)
    limited = moekit.route(logits, K, capacity=capacity, capacity_by=by)
    padded = moekit.route(logits, K, capacity=capacity, capacity_by=by, overflow="pad")
    for expert in range(E):
        takers = (whole.indices == expert).nonzero().tolist()
        if by == "weights":
            takers.sort(key=lambda place: (-float(whole.weights[tuple(place)]), place))
        kept = {tuple(place) for place in takers[:capacity]}
        assert kept == {tuple(place) for place in (limited.indices == expert).nonzero().tolist()}
        rows = padded.order[expert * capacity : (expert + 1) * capacity].tolist()
        assert rows == [*(t * K + k for t, k in sorted(kept)), *[-1] * (capacity - len(kept))]
    assert limited.weights.equal(whole.weights.masked_fill(limited.indices < 0, 0))
    assert padded.num_rows == E * capacity and padded.offsets.tolist() == [capacity * (e + 1) for e in range(E)]
    assert padded.tokens_per_expert.equal(limited.tokens_per_expert)
    x = draw(T, 4, seed=3)
    for routing in (limited, padded):
        rows = moekit.permute(x, routing)
        torch.testing.assert_close(
            moekit.unpermute(rows, routing, weighted=True), x * limited.weights.sum(1, keepdim=True), rtol=1e-5, atol=1e-6
        )


def test_too_many_are_an_error_if_wanted():
    logits = draw(T, E, seed=1)
    most = int(moekit.route(logits, K).tokens_per_expert.max())
    moekit.route(logits, K, capacity=most, overflow="raise")
    with pytest.raises(ValueError, match=rf"route: capacity must be enough for every expert .* has {most} tokens"):
        moekit.route(logits, K, capacity=most - 1, overflow="raise")


# --- losses of the choice -------------------------------------------------------------------------------------------


def normalised(logits, score):
    scores = SCORES[score](logits.double())
    return scores / scores.sum(1, keepdim=True)


def switch(logits, indices, score, coeff):
    counts = torch.bincount(indices.flatten(), minlength=E).double()
    return coeff * E * ((counts / indices.numel()) * normalised(logits, score).mean(0)).sum()


@pytest.mark.parametrize("score", SCORES)
def test_balance_loss(score):
    """Of what was chosen: with a bias, another than the logits would choose."""
    logits, bias = draw(T, E, seed=1).requires_grad_(), draw(E, seed=5) * 3
    routing = moekit.route(logits, K, score=score, bias=bias)
    plain = moekit.route(logits, K, score=score)
    exact = logits.detach().double().requires_grad_()
    expected = switch(exact, routing.indices, score, 0.3)
    found = moekit.balance_loss(routing, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert abs(float(moekit.balance_loss(plain, 0.3).detach()) - float(expected.detach())) > 1e-3
    grads = torch.autograd.grad(found + routing.weights.square().sum(), logits)[0]
    weights, _ = formula(exact, K, score=score, indices=routing.indices)
    torch.testing.assert_close(
        grads.double(), torch.autograd.grad(expected + weights.square().sum(), exact)[0], rtol=1e-5, atol=1e-7
    )
    even = Routing.from_topk(torch.arange(E).view(1, E), num_experts=E)
    even = moekit.route(torch.zeros(1, E), indices=even.indices, score=score)
    torch.testing.assert_close(moekit.balance_loss(even, 0.3), torch.tensor(0.3))


def test_parts_add_up_to_the_whole():
    logits = draw(12, E, seed=1).requires_grad_()
    whole = moekit.route(logits, K)
    total = moekit.balance_loss(whole, 1.0)
    parts = [moekit.route(part, K) for part in logits.split([5, 1, 6])]
    losses = [moekit.balance_loss(part, 1.0, counts=whole.tokens_per_expert, num_tokens=12) for part in parts]
    torch.testing.assert_close(sum(losses), total)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (sum(losses), total)))


@pytest.mark.parametrize("score", SCORES)
def test_sequence_balance_loss(score):
    logits = draw(12, E, seed=1).requires_grad_()
    routing = moekit.route(logits, K, score=score)
    for lengths, sequences in (((4, 4, 4), 3), ((5, 1, 6), torch.tensor([0, 5, 6, 12]))):
        parts = zip(logits.detach().split(list(lengths)), routing.indices.split(list(lengths)), strict=True)
        expected = sum(switch(part, indices, score, 0.3) for part, indices in parts) / len(lengths)
        found = moekit.sequence_balance_loss(routing, 0.3, sequences=sequences)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert torch.autograd.grad(found, logits)[0].any()


def test_z_loss_of_a_routing():
    logits = draw(T, E, seed=1)
    routing = moekit.route(logits, K, multiplier=2.0)
    torch.testing.assert_close(moekit.z_loss(routing, 0.1), 0.1 * (2 * logits).logsumexp(1).square().mean())


def test_no_token():
    routing = moekit.route(torch.empty(0, E, requires_grad=True), K)
    for loss in (moekit.balance_loss(routing, 1.0), moekit.sequence_balance_loss(routing, 1.0, sequences=2)):
        assert loss == 0 and loss.grad_fn is not None


# --- derivatives and graphs -----------------------------------------------------------------------------------------


@pytest.mark.reference_only("float64 is computed by the reference on every backend")
@pytest.mark.parametrize("options", OPTIONS[::3], ids=label)
def test_gradcheck(options, backend):
    def both(logits):
        routing = moekit.route(logits, K, **options)
        return routing.weights, moekit.balance_loss(routing, 1.0), moekit.sequence_balance_loss(routing, 1.0, sequences=1)

    logits = draw(3, E, seed=1, dtype=torch.float64).requires_grad_()
    assert gradcheck(both, (logits,), check_forward_ad=True)


def test_compiles_in_one_graph():
    def layer(logits, mask):
        routing = moekit.route(logits, K, padding_mask=mask, score="sigmoid", **GROUPS)
        return routing.weights.sum() + moekit.balance_loss(routing, 0.1), routing.indices

    mask = torch.arange(T) == 4
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    logits = draw(T, E, seed=1).requires_grad_()
    for run in (compiled, layer):
        loss, indices = run(logits, mask)
        results = (loss.detach(), indices, torch.autograd.grad(loss, logits)[0])
        if run is compiled:
            kept = results
    for one, other in zip(kept, results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


# --- errors ---------------------------------------------------------------------------------------------------------

LOGITS = torch.zeros(2, E)
WRONG = [
    ({}, "k must be given, or indices"),
    ({"k": 9}, "k must be at most the number of experts"),
    ({"k": 2, "score": "tanh"}, "score must be one of 'softmax', 'sigmoid', 'sqrtsoftplus'"),
    ({"k": 2, "select_by": "luck"}, "select_by must be one of"),
    ({"k": 2, "select_by": "logits", "normalise": True}, "normalise=True has no effect"),
    ({"k": 2, "select_by": "logits", "epsilon": 1e-6}, "epsilon=1e-06 has no effect"),
    ({"k": 2, "normalise": False, "epsilon": 1e-6}, "epsilon=1e-06 has no effect"),
    ({"k": 2, "epsilon": -1.0}, "epsilon must be at least 0"),
    ({"k": 2, "softcap": 0.0}, "softcap must be above 0"),
    ({"k": 2, "num_groups": 2}, "num_groups=2 has no effect without group_topk"),
    ({"k": 2, "group_best": 2}, "group_best=2 has no effect"),
    ({"k": 2, "num_groups": 8, "group_topk": 4}, "group_best must be at most the 1 experts"),
    ({"k": 2, "bias": torch.zeros(3)}, "bias must be of shape"),
    ({"k": 2, "bias": torch.zeros(E).int()}, "bias must be a floating-point tensor"),
    ({"k": 2, "indices": torch.zeros(2, 2).long()}, "k=2 has no effect where indices are given"),
    ({"indices": torch.zeros(2, 2).long(), "bias": torch.zeros(E)}, "bias='...' has no effect"),
    ({"indices": torch.zeros(2, 2).long(), "score": "sigmoid", "select_by": "logits"}, "select_by='logits' has no effect"),
    ({"indices": torch.full((2, 2), E)}, "indices must be -1"),
    ({"indices": torch.zeros(3, 2).long()}, "indices must be of shape"),
    ({"k": 2, "padding_mask": torch.zeros(2)}, "padding_mask must be a bool tensor"),
    ({"k": 2, "padding_mask": torch.zeros(3).bool()}, "padding_mask must be of shape"),
    ({"k": 2, "overflow": "pad"}, "overflow='pad' has no effect without capacity"),
    ({"k": 2, "capacity": 0}, "capacity must be at least 1"),
    ({"k": 2, "capacity": 3, "capacity_by": "age"}, "capacity_by must be one of"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_errors(options, message):
    with pytest.raises((ValueError, TypeError), match=f"route: {message}".replace("(", r"\(")):
        moekit.route(LOGITS, **options)


def test_losses_want_to_know_what_was_chosen_from():
    routing = Routing.from_topk(torch.zeros(2, 1).long(), num_experts=E)
    for call in (
        lambda: moekit.balance_loss(routing, 1.0),
        lambda: moekit.sequence_balance_loss(routing, 1.0, sequences=1),
        lambda: moekit.z_loss(routing, 1.0),
        lambda: moekit.balance_loss(moekit.route(LOGITS, 1), 1.0, num_tokens=3),
        lambda: moekit.sequence_balance_loss(moekit.route(LOGITS, 1), 1.0, sequences=3),
    ):
        with pytest.raises(ValueError, match=r"moekit\.\w+loss: \w+"):
            call()
    with pytest.raises(TypeError, match=r"balance_loss: routing must be a moekit\.Routing"):
        moekit.balance_loss(LOGITS, 1.0)
