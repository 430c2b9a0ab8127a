"""install() on releases that differ: what is replaced, by which form, what goes back to the framework, and what is said.

The releases here are made up: functions of the published signatures, written anew. Each is loaded in the place of
``megatron.core.transformer.moe.moe_utils``.
"""

from __future__ import annotations

import sys
import textwrap
from types import ModuleType

import pytest
import torch
from _reference import assert_same, draw

from moekit import compat, moe_utils
from moekit import megatron as forms

TARGET = "megatron.core.transformer.moe.moe_utils"

SIX = "tokens, routing_map, probs=None, num_out_tokens=None, fused=False, drop_and_pad=False"
NINE = f"{SIX}, tokens_per_expert=None, align_size=0, return_batch_invariant_inverse_map=False"
SEVEN = "permuted_tokens, sorted_indices, restore_shape, probs=None, routing_map=None, fused=False, drop_and_pad=False"

MOVE = """
    import torch
    seen = []

    def move(tokens, routing_map, probs):
        expert, token = routing_map.T.nonzero(as_tuple=True)
        return tokens[token], None if probs is None else probs[token, expert], token

    def row_id_map(routing_map):
        return torch.cat([routing_map.int(), routing_map.int(), routing_map.sum(1, keepdim=True).int()], 1)

    def add(rows, index, shape, probs=None, routing_map=None):
        if probs is not None:
            rows = rows * probs.T[routing_map.T].unsqueeze(1)
        return torch.zeros(tuple(shape), dtype=rows.dtype).index_add(0, index, rows)
"""


def permute(parameters: str, returns: str, extra: str = "") -> str:
    return f"""
    def permute({parameters}):
        seen.append("permute")
        {extra or "pass"}
        rows, row_probs, index = move(tokens, routing_map, probs)
        return {returns}
    """


def unpermute(parameters: str = SEVEN, extra: str = "") -> str:
    return f"""
    def unpermute({parameters}):
        seen.append("unpermute")
        {extra or "pass"}
        return add(permuted_tokens, sorted_indices, restore_shape, probs, routing_map)
    """


THREE_VALUES = "rows, row_probs, index"
FIVE_VALUES = "rows, row_probs, index, None, tokens_per_expert"


@pytest.fixture
def release(monkeypatch):
    """Load sources as a release of Megatron-core, with no other framework about."""

    def load(*sources: str) -> ModuleType:
        monkeypatch.setitem(sys.modules, "nemo_automodel", None)
        parts = TARGET.split(".")
        for length in range(1, len(parts)):
            package = ModuleType(".".join(parts[:length]))
            package.__path__ = []
            monkeypatch.setitem(sys.modules, package.__name__, package)
        module = ModuleType(TARGET)
        exec("\n".join(textwrap.dedent(source) for source in ("import torch\nseen = []", *sources)), vars(module))
        monkeypatch.setitem(sys.modules, TARGET, module)
        return module

    yield load
    compat.uninstall()


def example():
    routing_map = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 1, 0]]).bool()
    return draw(0, 4, 5, dtype=torch.float32), routing_map, draw(1, 4, 3, dtype=torch.float32).abs() * routing_map


def said(names: dict[str, str]) -> dict[str, str]:
    return {name.rsplit(".", 1)[1]: text for name, text in names.items()}


def is_replaced(done: compat.Substitution, name: str) -> bool:
    return f"{TARGET}.{name}" in done.names


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


# --- which calls ----------------------------------------------------------------------------------------------------

ROUTER = """
    def topk_routing_with_score_function(logits, topk, use_pre_softmax=False, num_groups=None, group_topk=None,
                                         scaling_factor=None, score_function="softmax", expert_bias=None, fused=False,
                                         router_replay=None, dense_output=False, precomputed_indices=None):
        seen.append("topk")
        if score_function == "softmax":
            scores = logits.softmax(-1)
        elif score_function == "sigmoid":
            scores = logits.sigmoid()
        else:
            scores = torch.nn.functional.softplus(logits).sqrt() if score_function == "sqrtsoftplus" else logits.square()
        weights, indices = scores.topk(int(topk))
        weights = weights / weights.sum(-1, keepdim=True) * (1.0 if scaling_factor is None else scaling_factor)
        if dense_output:
            return weights, indices
        return (torch.zeros_like(logits).scatter(1, indices, weights),
                torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True))

    def compute_routing_scores_for_aux_loss(logits, topk, score_function, fused=False, padding_mask=None):
        seen.append("aux")
        scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(),
                  "sqrtsoftplus": torch.nn.functional.softplus(logits).sqrt(), "cube": logits.abs() ** 3}[score_function]
        scores = scores / scores.sum(-1, keepdim=True)
        indices = scores.topk(topk).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True), scores

    def apply_router_token_dropping(routing_probs, routing_map, router_topk, capacity_factor, drop_policy="probs",
                                    pad_to_capacity=False):
        seen.append("dropping")
        if drop_policy == "random":
            return routing_probs, routing_map
        capacity = -(-routing_map.shape[0] * router_topk * capacity_factor // routing_map.shape[1])
        rank = routing_probs.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        kept = routing_map & (rank < capacity)
        return routing_probs * kept, kept

    def get_capacity(num_tokens, num_experts, capacity_factor, min_capacity=None):
        seen.append("capacity")
        import math
        capacity = math.ceil(num_tokens / num_experts * capacity_factor)
        return capacity if min_capacity is None else max(capacity, min_capacity)

    def switch_load_balancing_loss_func(probs, tokens_per_expert, total_num_tokens, topk, num_experts,
                                        moe_aux_loss_coeff, fused=False, padding_mask=None):
        seen.append("switch")
        if padding_mask is not None:
            probs = probs * padding_mask.unsqueeze(-1)
        return (probs.sum(0) * tokens_per_expert).sum() * (
            num_experts * moe_aux_loss_coeff / (topk * total_num_tokens * total_num_tokens))
"""


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


BIAS = """
    def get_updated_expert_bias({}):
        seen.append("bias")
        return expert_bias
"""


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

PAIR = (
    MOVE,
    permute(
        f"{NINE}, future=None",
        FIVE_VALUES,
        """if fused:
            rows, row_probs, _ = move(tokens, routing_map, probs)
            return rows, row_probs, row_id_map(routing_map), None, tokens_per_expert""",
    ),
    unpermute(
        f"{SEVEN}, pad_offsets=None, batch_invariant_inverse_map=None, future=None",
        """if fused:
            assert sorted_indices.dim() == 2 and sorted_indices.dtype is torch.int32
            experts = (sorted_indices.shape[1] - 1) // 2
            sorted_indices = sorted_indices[:, :experts].T.nonzero(as_tuple=True)[1]""",
    ),
)


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
