"""moekit.hf against Transformers' own eager code in drawn situations: equal or refused, never different.

``tests/differential.py`` draws, runs and judges; a failure names the command that repeats it.
"""

from __future__ import annotations

import collections
import random

import pytest

import moekit.hf

pytest.importorskip("transformers")
import differential
from _draw_classes import transformers_classes
from _draw_situations import axes, draw

SEED, DRAWS, CHUNKS = 11, 2160, 12
CHUNK = DRAWS // CHUNKS


@pytest.fixture(autouse=True)
def unregistered():
    yield
    moekit.hf.unregister()


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.filterwarnings(
    "ignore::UserWarning:torch",
    "ignore::torch.jit.TracerWarning",
    "ignore::DeprecationWarning:torch",
    "ignore:torch.searchsorted:UserWarning",  # PyTorch's own batching rule hands it a stride that it complains about
    "ignore:Full backward hook is firing:UserWarning",
)
def test_equal_or_refused(chunk):
    kinds, wrong = collections.Counter(), []
    for situation, outcome, command in differential.judged(SEED, range(chunk * CHUNK, (chunk + 1) * CHUNK), {}):
        kinds[outcome.kind] += 1
        if outcome.failed:
            wrong.append(f"{outcome.kind}: {outcome.detail}\n  {command}\n  {situation}")
    assert not wrong, f"{len(wrong)} of {CHUNK} draws, the first of them:\n" + "\n".join(wrong[:3])
    assert kinds["equal"] > 0.8 * CHUNK, f"too few draws are compared: {kinds}"


def test_every_value_of_every_axis_is_drawn():
    drawn = [draw(random.Random(f"{SEED}:{index}"), {}) for index in range(DRAWS)]
    assert len(transformers_classes()) >= 40
    for key, axis in axes().items():
        if not callable(axis):
            wanted = set(axis) - {"same"}
            assert wanted <= {situation[key] for situation in drawn}, key


def plain(index: int, **only: str) -> differential.Outcome:
    fixed = {"class": "MixtralExperts", "act": "default", "patch": "none", "mode": "backward", "execution": "eager"}
    fixed.update({"dtype": "float32", "routing": "random", "T": "6", "save": "recompute", "autocast": "none", **only})
    return differential.judge(draw(random.Random(f"{SEED}:{index}"), fixed))


# --- what it found, and chance might miss ------------------------------------------------------------------------------

FOUND = {
    "a gradient of the gradient, with frozen weights": ({"mode": "double", "needs": "x", "frozen": "all"}, "refused"),
    "float64 routing weights beside a down bias": ({"class": "GptOssExperts", "router_dtype": "float64"}, "equal"),
    "a float64 layer with float32 routing weights": (
        {"class": "GptOssExperts", "dtype": "float64", "router_dtype": "float32", "hidden_dtype": "float64"},
        "equal",
    ),
    "a float64 layer that adds float32 routing weights of one expert": (
        {"class": "GptOssExperts", "dtype": "float64", "hidden_dtype": "float64", "router_dtype": "float32"}
        | {"routing": "one_expert", "K": "2", "scale": "1.0"},
        "equal",
    ),
    "traced without a gradient, run with one": ({"execution": "trace", "needs": "all", "frozen": "all"}, "equal"),
    "vmap under autocast, with float8 kept": ({"mode": "vmap_grad", "autocast": "bfloat16", "save": "fp8"}, "equal"),
}


@pytest.mark.parametrize(("only", "kind"), FOUND.values(), ids=FOUND.keys())
def test_found_before(only, kind):
    outcome = plain(0, **only)
    assert outcome.kind == kind, outcome


# --- what the test would notice ---------------------------------------------------------------------------------------


def scaled(out, *_):
    return out * 1.0001


def detached(out, *_):
    return out.detach()


def wider(out, *_):
    return out.double()


def mixed_up(out, *_):
    return out.roll(1, 0)


def with_another_gradient(out, *_):
    out.register_hook(lambda grad: 0.9999 * grad)
    return out


def writes(out, x, indices, weights):
    indices.clamp_(max=0)
    return out


def crashes(*_):
    raise IndexError("list index out of range")


def refuses(*_):
    raise ValueError("moekit.hf: not today")


@pytest.mark.parametrize(
    ("sabotage", "kind"),
    [
        (scaled, "different"),
        (mixed_up, "different"),
        (with_another_gradient, "different"),
        (detached, "no gradient"),
        (wider, "another shape or dtype"),
        (writes, "wrote into an input"),
        (crashes, "crashed"),
        (refuses, "raised"),
    ],
)
def test_the_comparison_notices(sabotage, kind, monkeypatch):
    honest = moekit.hf.experts_forward

    def forward(module, x, indices, weights, **options):
        return sabotage(honest(module, x, indices, weights, **options), x, indices, weights)

    assert plain(0).kind == "equal"
    monkeypatch.setattr("moekit.hf._register.experts_forward", forward)
    assert plain(0).kind == kind
