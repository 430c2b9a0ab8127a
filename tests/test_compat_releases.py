"""install() on releases that differ: what is replaced, by which form, what is left alone, and what is said."""

from __future__ import annotations

import pytest
import torch
from _reference import assert_same, draw
from _releases import (
    BIAS,
    FIVE_VALUES,
    MOVE,
    NINE,
    PAIR,
    ROUTER,
    SIX,
    TARGET,
    THREE_VALUES,
    example,
    is_replaced,
    permute,
    releases,
    said,
    unpermute,
)

from moekit import compat, moe_utils


@pytest.fixture
def release(monkeypatch):
    yield from releases(monkeypatch)


# --- which form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "returns", "values"),
    [
        (SIX, THREE_VALUES, 3),
        (NINE, FIVE_VALUES, 5),
        (f"{SIX}, tokens_per_expert=None, align_size=-1", FIVE_VALUES, 5),  # 0.17
        (SIX, "rows, row_probs, index, None, None", 5),  # what comes back decides, not the parameters
        (NINE, THREE_VALUES, 3),
        (f"{NINE}, future=None", FIVE_VALUES, 5),
    ],
)
def test_permute_returns_as_many_values_as_the_release(release, parameters, returns, values):
    module = release(MOVE, permute(parameters, returns), unpermute())
    tokens, routing_map, probs = example()
    wanted = module.permute(tokens, routing_map, probs, 6)
    with compat.install() as done:
        assert is_replaced(done, "permute") and is_replaced(done, "unpermute") and not done.left_alone
        module.seen.clear()
        found = module.permute(tokens, routing_map, probs, 6)
        assert module.seen == [] and len(found) == values == len(wanted)
        for actual, expected in zip(found, wanted, strict=True):
            assert (actual is None) == (expected is None)
            if expected is not None:
                assert_same(actual, expected)
        module.permute(tokens, routing_map, probs, 6, fused=True)
        assert module.seen == []


@pytest.mark.parametrize(
    ("returns", "reason"),
    [
        ("rows, row_probs, index, None", "returns 4 values"),
        ("rows, row_probs, index.flip(0)", "computes something else"),
        ("rows, row_probs.unsqueeze(1), index", r"returns the shape \[8, 1\]"),
        ("rows, None, index", "returns nothing as value 2"),
    ],
)
def test_returns_that_nobody_knows_are_left_alone_with_their_counterpart(release, returns, reason):
    module = release(MOVE, permute(SIX, returns), unpermute())
    before = dict(vars(module))
    with compat.install() as done:
        assert done.names == [] and dict(vars(module)) == before
        assert set(done.left_alone) == {f"{TARGET}.permute", f"{TARGET}.unpermute"}
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(done.left_alone[f"{TARGET}.permute"])
        assert "goes with permute" in done.left_alone[f"{TARGET}.unpermute"]
        assert all(f"{name}: {why}" in repr(done) for name, why in done.left_alone.items())


def test_an_unpermute_of_another_meaning_takes_permute_along(release):
    module = release(MOVE, permute(SIX, THREE_VALUES), unpermute(extra="permuted_tokens = permuted_tokens / 2"))
    with compat.install() as done:
        assert done.names == [] and "goes with unpermute" in done.left_alone[f"{TARGET}.permute"]
        assert "computes something else" in done.left_alone[f"{TARGET}.unpermute"]
    assert module.seen  # it was tried


def test_other_meanings_are_left_alone(release):
    """The same name and parameters: halves the other way round, a loss of another scale, another class."""
    release("""
        def swiglu(y):
            up, gate = y.chunk(2, -1)
            return torch.nn.functional.silu(gate) * up

        def geglu(y):
            gate, up = y.chunk(2, -1)
            return torch.nn.functional.gelu(gate, approximate="tanh") * up

        def z_loss_func(logits, z_loss_coeff, padding_mask=None):
            return logits.logsumexp(-1).square().sum() * z_loss_coeff

        def group_limited_topk(scores, topk):
            raise NotImplementedError

        class MoEAuxLossAutoScaler(torch.autograd.Function):
            main_loss_backward_scale = None

            @staticmethod
            def forward(ctx, output, aux_loss, weight):
                return output
    """)
    with compat.install() as done:
        assert done.names == [f"{TARGET}.geglu"]
        missing = "group_topk, num_experts, num_groups, num_tokens"
        assert said(done.left_alone) == {
            "MoEAuxLossAutoScaler": "its forward takes (output, aux_loss, weight), moekit's (output, aux_loss)",
            "group_limited_topk": f"it has no parameter {missing}, which moekit's needs",
            "swiglu": "it computes something else on a small example",
            "z_loss_func": "it computes something else on a small example",
        }


def test_what_cannot_be_tried_is_known_by_its_parameters(release):
    module = release("def swiglu(y):\n    raise RuntimeError('needs a GPU')")
    x = draw(0, 2, 6)
    with compat.install() as done:
        assert is_replaced(done, "swiglu")
        assert_same(module.swiglu(x), moe_utils.swiglu(x))


def test_another_default_is_kept(release):
    """A call that leaves alpha out means the framework's alpha."""
    module = release("""
        def quick_gelu(y, alpha=1.5):
            return y * torch.sigmoid(alpha * y)
    """)
    x = draw(0, 3, 4)
    with compat.install() as done:
        assert is_replaced(done, "quick_gelu")
        assert_same(module.quick_gelu(x), moe_utils.quick_gelu(x, 1.5))
        assert_same(module.quick_gelu(x, 1.702), moe_utils.quick_gelu(x))


def test_trying_leaves_no_trace(release):
    release(
        MOVE,
        permute(NINE, FIVE_VALUES, "torch.rand(1)"),
        """
        def pad_routing_map(routing_map, pad_multiple):
            free = routing_map == 0
            routing_map[free & (free.cumsum(0) <= -(~free).sum(0) % pad_multiple)] = 1
            return routing_map
        """,
    )
    state = torch.get_rng_state()
    with compat.install() as done:
        assert is_replaced(done, "permute") and is_replaced(done, "pad_routing_map")
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


# --- the scale of the auxiliary loss ---------------------------------------------------------------------------------


def test_a_new_scale_is_heard_where_the_last_one_is_held(release):
    """As a captured CUDA graph holds it. The caller's tensors are neither kept nor written."""
    module = release("""
        class MoEAuxLossAutoScaler(torch.autograd.Function):
            main_loss_backward_scale = None
    """)
    ours = moe_utils.MoEAuxLossAutoScaler
    ours.set_loss_scale(torch.tensor(7.0))
    before = ours.main_loss_backward_scale
    try:
        with compat.install():
            first, second = torch.tensor(2.0), torch.tensor(3.0)
            module.MoEAuxLossAutoScaler.set_loss_scale(first)
            held = ours.main_loss_backward_scale
            assert held is not first
            module.MoEAuxLossAutoScaler.set_loss_scale(second)
            assert ours.main_loss_backward_scale is held and float(held) == 3.0 and float(first) == 2.0
            first.fill_(9.0)
            second.fill_(9.0)
            assert float(held) == 3.0
            given = ours.main_loss_backward_scale = torch.tensor(4.0)  # somebody's own: not ours to write
            module.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(5.0))
            assert float(given) == 4.0 and float(ours.main_loss_backward_scale) == 5.0
            module.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([6.0], dtype=torch.float64))
            assert ours.main_loss_backward_scale.dtype is torch.float64
        assert ours.main_loss_backward_scale is before and float(before) == 7.0
    finally:
        ours.main_loss_backward_scale = None


# --- compiled, and said -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_layer_of_substituted_functions_compiles_in_one_graph(release, fused):
    module = release(*PAIR, ROUTER, "def is_batch_invariant_mode_enabled():\n    return False")

    def layer(tokens, logits):
        probs, routing_map = module.topk_routing_with_score_function(logits, 2, score_function="sigmoid", fused=fused)
        _, scores = module.compute_routing_scores_for_aux_loss(logits, 2, "sigmoid", fused)
        loss = module.switch_load_balancing_loss_func(scores, routing_map.sum(0), tokens.shape[0], 2, 4, 0.1)
        rows, row_probs, index, _, _ = module.permute(tokens, routing_map, probs, num_out_tokens=2 * 6, fused=fused)
        rows = rows.sin() * row_probs.unsqueeze(1)
        return module.unpermute(rows, index, tokens.shape, routing_map=routing_map, fused=fused), loss

    leaves = [draw(seed, 6, width, dtype=torch.float32).requires_grad_() for seed, width in ((0, 5), (1, 4))]
    with compat.install():
        module.seen.clear()
        results = []
        for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            out, loss = function(*leaves)
            results.append((out, loss, *torch.autograd.grad(out.square().sum() + loss, leaves)))
        assert module.seen == []
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_the_result_says_what_was_done(release):
    module = release(*PAIR, ROUTER, BIAS.format("tokens_per_expert, expert_bias, expert_bias_update_rate"))
    done = compat.install()
    text = str(done)
    assert text.splitlines()[0] == f"Substitution({len(done.names)} names)"
    assert set(done.differences) <= set(done.names) and f"{TARGET}.unpermute" in done.differences
    for name, why in {**done.left_alone, **done.differences, **done.missing}.items():
        assert f"  {name}: {why}" in text
    assert list(done.missing) == ["nemo_automodel.components.moe.megatron.moe_utils"]
    again = compat.install()
    assert again.names == [] and again.left_alone == done.left_alone and again.differences == done.differences
    compat.uninstall()
    assert module.get_capacity(10, 4, 1.25) == 4 and module.seen[-1] == "capacity"
