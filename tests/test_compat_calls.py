"""After install(): which calls moekit answers, and which go back to the framework."""

from __future__ import annotations

import pytest
import torch
from _reference import draw
from _releases import BIAS, PAIR, ROUTER, TARGET, example, is_replaced, releases

from moekit import compat
from moekit import megatron as forms


@pytest.fixture
def release(monkeypatch):
    yield from releases(monkeypatch)


# --- which calls ----------------------------------------------------------------------------------------------------


@pytest.fixture
def router(release):
    module = release(ROUTER)
    with compat.install() as done:
        assert not done.left_alone and len(done.names) == 5
        module.seen.clear()
        yield module


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus", "square"])
@pytest.mark.parametrize("dense", [False, True])
def test_every_score_function_of_the_release_works(router, score_function, dense):
    """One that moekit does not know goes to the framework; the values are right in any case."""
    logits = draw(0, 6, 5, dtype=torch.float32)
    found = router.topk_routing_with_score_function(logits, 2, score_function=score_function, dense_output=dense)
    assert router.seen == ([] if score_function in forms.topk_ops.SCORE_FUNCTIONS else ["topk"])
    compat.uninstall()
    for actual, expected in zip(
        found,
        router.topk_routing_with_score_function(logits, 2, score_function=score_function, dense_output=dense),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus", "cube"])
def test_every_score_function_of_the_auxiliary_loss_works(router, score_function):
    logits = draw(0, 6, 5, dtype=torch.float32)
    found = router.compute_routing_scores_for_aux_loss(logits, 2, score_function)
    assert router.seen == ([] if score_function in forms.topk_ops.SCORE_FUNCTIONS else ["aux"])
    compat.uninstall()
    for actual, expected in zip(found, router.compute_routing_scores_for_aux_loss(logits, 2, score_function), strict=True):
        torch.testing.assert_close(actual, expected)


def test_values_that_moekit_does_not_know_go_to_the_framework(router):
    logits, routing_map = draw(0, 6, 5, dtype=torch.float32), torch.ones(6, 5).bool()
    calls = (
        ("topk", lambda: router.topk_routing_with_score_function(logits, 2, router_replay=object())),
        ("topk", lambda: router.topk_routing_with_score_function(logits, torch.tensor(2))),
        ("topk", lambda: router.topk_routing_with_score_function(logits, 2, scaling_factor=torch.tensor(2.0))),
        ("dropping", lambda: router.apply_router_token_dropping(logits, routing_map, 2, 1.0, "random")),
        ("dropping", lambda: router.apply_router_token_dropping(logits, routing_map, torch.tensor(2), 1.0)),
        ("capacity", lambda: router.get_capacity(torch.tensor(10), 4, 1.25)),
        ("capacity", lambda: router.get_capacity(num_tokens=torch.tensor(10), num_experts=4, capacity_factor=1.25)),
        ("switch", lambda: router.switch_load_balancing_loss_func(logits, logits[0], 6, torch.tensor(2), 5, 0.1)),
        (
            "switch",
            lambda: router.switch_load_balancing_loss_func(logits, logits[0], 6, 2, 5, 0.1, False, routing_map[:, 0]),
        ),
    )
    for name, call in calls:
        router.seen.clear()
        call()
        assert router.seen == [name]
    router.seen.clear()
    assert router.get_capacity(10, 4, 1.25) == 4
    router.apply_router_token_dropping(logits, routing_map, 2, 1.0, "position")
    router.switch_load_balancing_loss_func(logits, logits[0], torch.tensor(6), 2, 5, 0.1)
    assert router.seen == []


def test_a_mistake_is_answered_by_the_framework(router):
    for call in (
        lambda: router.topk_routing_with_score_function(),
        lambda: router.topk_routing_with_score_function(1, 2, logits=1),
        lambda: router.get_capacity(1, 2, 3, 4, 5),
        lambda: router.get_capacity(1, 2, 3, nonsense=4),
    ):
        with pytest.raises(TypeError, match=r"topk_routing|get_capacity|nonsense"):
            call()


def test_the_loss_is_float32_and_said(router):
    probs = draw(0, 6, 5, dtype=torch.bfloat16).abs()
    args = probs, torch.tensor([1, 2, 3, 4, 2]), 6, 2, 5, 0.1
    assert router.switch_load_balancing_loss_func(*args).dtype is torch.float32
    done = compat.install()
    assert "float32" in done.differences[f"{TARGET}.switch_load_balancing_loss_func"]


def test_a_group_is_summed_over_and_none_is_the_frameworks(release, monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, group: tensor.mul_(2))
    module = release(BIAS.format("tokens_per_expert, expert_bias, expert_bias_update_rate, tp_dp_cp_group=None"))
    counts, bias = torch.tensor([1, 3]), torch.zeros(2)
    with compat.install() as done:
        assert is_replaced(done, "get_updated_expert_bias")
        assert module.get_updated_expert_bias(counts, bias, 0.5, "group").tolist() == [0.5, -0.5]
        assert module.seen == [] and counts.tolist() == [1, 3]
        for kwargs in ({}, {"tp_dp_cp_group": None}):
            assert module.get_updated_expert_bias(counts, bias, 0.5, **kwargs) is bias
        assert module.seen == ["bias", "bias"]


def test_a_global_group_is_left_alone(release):
    release(BIAS.format("tokens_per_expert, expert_bias, expert_bias_update_rate"))
    with compat.install() as done:
        assert done.names == []
        assert "global process group" in done.left_alone[f"{TARGET}.get_updated_expert_bias"]


# --- a pair stays together --------------------------------------------------------------------------------------------


def test_the_frameworks_row_id_map_goes_back_to_it(release):
    module = release(*PAIR)
    tokens, routing_map, probs = example()
    with compat.install() as done:
        assert is_replaced(done, "permute") and is_replaced(done, "unpermute")
        module.seen.clear()
        rows, _, index, *_ = module.permute(tokens, routing_map, probs, 6, fused=True, future=1)
        assert index.shape == (4, 7) and index.dtype is torch.int32
        out = module.unpermute(rows, index, tokens.shape, fused=True)  # nothing here tells but the indices
        assert module.seen == ["permute", "unpermute"]
        torch.testing.assert_close(out, tokens * routing_map.sum(1, keepdim=True))


def test_indices_of_moekit_never_reach_the_frameworks_kernel(release):
    module = release(*PAIR)
    tokens, routing_map, probs = example()
    with compat.install():
        rows, _, index, *_ = module.permute(tokens, routing_map, probs, 6, fused=True)
        assert index.dim() == 1
        torch.testing.assert_close(
            module.unpermute(rows, index, tokens.shape, fused=True), tokens * routing_map.sum(1, keepdim=True)
        )
        with pytest.raises(TypeError, match="cannot read their indices"):
            module.unpermute(rows, index, tokens.shape, fused=True, future=1)
        module.seen.clear()
        out = module.unpermute(rows, index, tokens.shape, future=1)  # unfused, both read them
        assert module.seen == ["unpermute"]
        torch.testing.assert_close(out, tokens * routing_map.sum(1, keepdim=True))


def test_padding_and_the_inverse_map_stay_with_moekit(release):
    """The dispatchers' way: fused, with counts and a size; then what came back is handed to unpermute."""
    module = release(*PAIR)
    tokens, routing_map, probs = example()
    counts = routing_map.sum(0)
    with compat.install():
        module.seen.clear()
        rows, row_probs, index, offsets, padded = module.permute(
            tokens, routing_map, probs, 6, True, tokens_per_expert=counts, align_size=4
        )
        assert padded.tolist() == [4, 4, 4] and offsets.tolist() == [0, 2, 5] and rows.shape == (12, 5)
        out = module.unpermute(
            rows * row_probs.unsqueeze(1), index, tokens.shape, probs=None, fused=True, pad_offsets=offsets
        )
        torch.testing.assert_close(out, tokens * probs.sum(1, keepdim=True))
        rows, _, index, inverse, _ = module.permute(tokens, routing_map, probs, 8, return_batch_invariant_inverse_map=True)
        out = module.unpermute(
            rows, index, tokens.shape, probs=probs, routing_map=routing_map, batch_invariant_inverse_map=inverse
        )
        torch.testing.assert_close(out, tokens * probs.sum(1, keepdim=True))
        assert module.seen == []


def test_the_batch_invariant_mode_is_the_frameworks(release):
    module = release(*PAIR, "mode = False\ndef is_batch_invariant_mode_enabled():\n    return mode")
    tokens, routing_map, probs = example()
    with compat.install():
        module.mode = True
        module.seen.clear()
        rows, _, index, *_ = module.permute(tokens, routing_map, probs, 6)
        module.unpermute(rows, index, tokens.shape)
        assert module.seen == ["permute", "unpermute"]
        module.mode = False
        module.permute(tokens, routing_map, probs, 6)
        assert module.seen == ["permute", "unpermute"]


def test_num_out_tokens_is_moekits_and_said(release):
    module = release(*PAIR)
    tokens, routing_map, probs = example()
    with compat.install() as done:
        with pytest.raises(ValueError, match="at least the 6 routed pairs"):
            module.permute(tokens, routing_map, probs, 5)
        for number in (8, torch.tensor(8)):
            rows, row_probs, index, *_ = module.permute(tokens, routing_map, probs, number)
            assert index[6:].tolist() == [-1, -1] and rows[6:].abs().sum() == 0 and row_probs[6:].sum() == 0
        assert module.permute(tokens, routing_map)[0].shape == (6, 5)
        assert "num_out_tokens" in done.differences[f"{TARGET}.permute"]
