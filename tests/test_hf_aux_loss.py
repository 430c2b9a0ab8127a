"""moekit.hf.fix_aux_loss: the loss of the actual choice, the model's own where that is right, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent import futures
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moekit.hf
from moekit.hf import fix_aux_loss
from moekit.hf.aux_loss import _under_way
from moekit.hf.routers import spec_of

transformers = pytest.importorskip("transformers")

COEFFICIENT, E, K = 0.3, 8, 2
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "num_experts": E,
    "num_local_experts": E,
    "num_experts_per_tok": K,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "router_aux_loss_coef": COEFFICIENT,
}
MORE = {
    "MiniMaxM2": {"rotary_dim": 4},
    "Ernie4_5_Moe": {"moe_num_experts": E, "moe_k": K},
    "DeepseekV4": {"num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "Flint": {"mlp_only_layers": [0]},
    "JetMoe": {"aux_loss_coef": COEFFICIENT},
    "GptOss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
RIGHT = ["Qwen3Moe", "Mixtral", "Olmoe", "GptOss"]  # softmax, no bias, no groups
NEWEST = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
if NEWEST:
    RIGHT += ["GraniteMoe", "JetMoe"]  # 5.12 records no logits of the first, and each of the second twice
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}
OFF = {
    "MiniMaxM2": "sigmoid",
    "Laguna": "sigmoid",
    "Flint": "sigmoid",
    "DeepseekV4": "sqrtsoftplus",  # all with a bias, but Flint; the logits of a hashed layer are not recorded
    "Ernie4_5_Moe": "softmax",
}


def make(name: str, **settings: Any) -> Any:
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip("not in this release")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **MORE.get(name, {}), **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "correction_bias" in key:
                tensor.copy_(torch.randn(tensor.shape) * 0.4)
            elif tensor.is_floating_point() and ("router" in key or ".gate." in key):
                tensor.copy_(torch.randn(tensor.shape) * 0.7)
    return model.eval()


def batch(seed: int = 1, masked: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 32, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    given = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "output_router_logits": True}
    return {**given, "attention_mask": mask} if masked else given


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 2e-6) -> None:
    assert actual.keys() == expected.keys() and len(expected) > 5
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= bound * largest, name


def routers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if spec_of(module) is not None]


def seen_by(model: nn.Module, call: Callable[[], Any]) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """What ``call()`` returns, and ``(logits, indices)`` of each router whose logits it recorded."""
    found: list[tuple[Tensor, Tensor]] = []

    def look(router: nn.Module, args: tuple, output: Any) -> None:
        spec = spec_of(router)
        assert spec is not None
        logits, _, indices = spec.unpack(output)
        found.append((logits, indices))

    handles = [router.register_forward_hook(look) for router in routers_of(model)]
    output = call()
    for handle in handles:
        handle.remove()
    return output, [choice for choice in found if any(choice[0] is logits for logits in output.router_logits)]


def by_hand(choices: list[tuple[Tensor, Tensor]], score: str, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The loss in float64, and its gradient with respect to the logits of each router."""
    leaves = [logits.detach().double().requires_grad_() for logits, _ in choices]
    kept = torch.ones(len(leaves[0]), dtype=torch.bool) if mask is None else mask.flatten().bool()
    counts, sums = torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for logits, (_, indices) in zip(leaves, choices, strict=True):
        scores = SCORES[score](logits)
        sums = sums + (scores / scores.sum(1, keepdim=True))[kept].sum(0)
        counts = counts + torch.stack([(indices[kept] == expert).sum() for expert in range(E)])
    number = int(kept.sum()) * len(leaves)
    loss = E * (counts / number * (sums / number)).sum()
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", RIGHT)
def test_the_same_where_the_original_is_right(name, masked):
    model = make(name)
    inputs = batch(masked=masked)
    theirs = model(**inputs)
    expected = gradients(model, theirs.loss)
    with fix_aux_loss(model):
        ours = model(**inputs)
        actual = gradients(model, ours.loss)
    assert abs(theirs.aux_loss / K - 1) > 0.01  # not evenly spread
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    close(actual, expected)
    assert list(ours.keys()) == list(theirs.keys())
    assert all(torch.equal(a, b) for a, b in zip(ours.router_logits, theirs.router_logits, strict=True))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", OFF)
def test_the_actual_choice_where_the_original_is_off(name, masked):
    model = make(name)
    inputs = batch(masked=masked)
    theirs = model(**inputs)
    fix_aux_loss(model)
    ours, choices = seen_by(model, lambda: model(**inputs))
    exact, slopes = by_hand(choices, OFF[name], inputs.get("attention_mask"))
    assert abs(ours.aux_loss / exact - 1) < 1e-6
    assert abs(theirs.aux_loss / exact - 1) > 0.02, (float(theirs.aux_loss), float(exact))
    assert abs(ours.loss - (theirs.loss + COEFFICIENT * (exact - theirs.aux_loss))) < 1e-6
    products = [(logits * slope.float()).sum() for logits, slope in zip(model(**inputs).router_logits, slopes, strict=True)]
    close(gradients(model, ours.aux_loss), gradients(model, torch.stack(products).sum()))


@pytest.mark.parametrize("name", ["MiniMaxM2", "Qwen3Moe"])
def test_the_loss_has_the_gradient_of_its_parts(name):
    """Nothing of the original's gradient is left in the loss."""
    model = make(name)
    fix_aux_loss(model)
    inputs = batch()
    output, parts = model(**inputs), model(**inputs)
    plain = model(**{**inputs, "output_router_logits": False})
    assert plain.aux_loss is None
    assert abs(output.loss - plain.loss - COEFFICIENT * output.aux_loss) < 1e-6
    close(gradients(model, output.loss), gradients(model, plain.loss + COEFFICIENT * parts.aux_loss))


def test_the_coefficient_is_the_models_today():
    model = make("MiniMaxM2")
    fix_aux_loss(model)
    plain = model(**{**batch(), "output_router_logits": False})
    model.router_aux_loss_coef = 2.0
    output = model(**batch())
    assert abs(output.loss - plain.loss - 2 * output.aux_loss) < 1e-5


def test_without_labels_and_as_a_tuple():
    model = make("MiniMaxM2")
    inputs = batch()
    theirs = model(**inputs, return_dict=False)
    fix_aux_loss(model)
    whole = model(**inputs)
    unlabelled = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_router_logits=True)
    assert unlabelled.loss is None and torch.equal(unlabelled.aux_loss, whole.aux_loss)
    by_position = model(inputs["input_ids"], inputs["attention_mask"], output_router_logits=True)
    assert torch.equal(by_position.aux_loss, whole.aux_loss)
    ours = model(**inputs, return_dict=False)
    assert type(ours) is tuple and len(ours) == len(theirs)
    assert torch.equal(ours[0], whole.loss) and torch.equal(ours[1], whole.aux_loss) and torch.equal(ours[2], theirs[2])


def test_half_precision():
    model = make("MiniMaxM2").bfloat16()
    fix_aux_loss(model)
    inputs = batch()
    output, choices = seen_by(model, lambda: model(**inputs))
    exact, _ = by_hand([(logits.float(), indices) for logits, indices in choices], "sigmoid", inputs["attention_mask"])
    assert output.aux_loss.dtype is torch.float32 and abs(output.aux_loss / exact - 1) < 1e-6


def test_a_replayed_choice_is_what_counts():
    """A hook that came later puts other experts into the router's output."""
    model = make("MiniMaxM2")
    fix_aux_loss(model)
    inputs = batch()
    model(**inputs)

    def replay(router: nn.Module, args: tuple, output: Any) -> Any:
        spec = spec_of(router)
        assert spec is not None
        _, weights, indices = spec.unpack(output)
        return spec.pack(output, weights, torch.arange(K).expand_as(indices))

    for router in routers_of(model):
        router.register_forward_hook(replay)
    output, choices = seen_by(model, lambda: model(**inputs))
    assert all((indices == torch.arange(K)).all() for _, indices in choices)
    exact, _ = by_hand(choices, "sigmoid", inputs["attention_mask"])
    assert abs(output.aux_loss / exact - 1) < 1e-6


# --- training -------------------------------------------------------------------------------------------------------


def checkpointed(model: Any, **settings: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


def test_activation_checkpointing():
    model = make("MiniMaxM2").train()
    fix_aux_loss(model)
    inputs = batch()
    output = model(**inputs)
    expected = gradients(model, output.loss)
    checkpointed(model, use_reentrant=False)
    again = model(**inputs)
    assert torch.equal(again.aux_loss, output.aux_loss)
    close(gradients(model, again.loss), expected)
    assert not _under_way.forwards


def test_reentrant_checkpointing_is_refused():
    """Its logits have no graph: the loss would train no router, and not say so."""
    model = make("MiniMaxM2").train()
    fix_aux_loss(model)
    checkpointed(model, use_reentrant=True)
    with pytest.raises(ValueError, match=r"moekit\.hf\.fix_aux_loss: activation checkpointing must be non-reentrant"):
        model(**batch())
    with torch.no_grad():
        assert model(**batch()).aux_loss > 0


def test_accumulation():
    model = make("MiniMaxM2").train()
    fix_aux_loss(model)
    each = [gradients(model, model(**batch(seed)).loss) for seed in (1, 2)]
    model.zero_grad()
    outputs = [model(**batch(seed)) for seed in (1, 2)]  # both forwards before the first backward
    for output in outputs:
        output.loss.backward()
    total = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    close(total, {name: each[0][name] + each[1][name] for name in each[0]})


def test_distributed_data_parallel(tmp_path):
    model = make("MiniMaxM2").train()
    inputs = batch()
    with fix_aux_loss(model):
        expected = gradients(model, model(**inputs).loss)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with fix_aux_loss(wrapped):
            actual = gradients(model, wrapped(**inputs).loss)
    finally:
        torch.distributed.destroy_process_group()
    close(actual, expected)


def test_a_forward_that_accelerate_wraps():
    """It converts every output to float32, router logits too: new tensors."""
    accelerate = pytest.importorskip("accelerate")
    model = make("MiniMaxM2")
    theirs = model(**batch()).aux_loss
    fix_aux_loss(model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer's, of a test before
    try:
        wrapped = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        output = wrapped(**batch())
        assert vars(wrapped)["forward"] and output.router_logits[0].dtype is torch.float32
        assert 0.05 < abs(output.aux_loss - theirs) / theirs < 0.15  # 0.11 in float32
        fix_aux_loss(wrapped).remove()
        assert abs(wrapped(**batch()).aux_loss / theirs - 1) < 0.01
        with fix_aux_loss(wrapped):
            assert torch.equal(wrapped(**batch()).aux_loss, output.aux_loss)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_threads_do_not_see_each_other():
    model = make("MiniMaxM2")
    fix_aux_loss(model)
    with torch.no_grad():
        expected = [float(model(**batch(seed)).aux_loss) for seed in range(6)]
    with futures.ThreadPoolExecutor(3) as pool:
        assert [*pool.map(lambda seed: float(model(**batch(seed)).aux_loss.detach()), range(6))] == expected


def test_a_model_of_text_and_images():
    """Its coefficient is its text's, and the routers are one model further down."""
    kind = getattr(transformers, "Qwen3VLMoeForConditionalGeneration", None)
    if kind is None or not NEWEST:
        pytest.skip("written otherwise in this release")
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    text = {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    model = kind(transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)).eval()
    theirs = model(**batch())
    fix_aux_loss(model)
    ours = model(**batch())
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-6, atol=0)
    model.config.text_config.router_aux_loss_coef = 0.0
    plain = model(**batch())
    assert abs(ours.loss - plain.loss - COEFFICIENT * ours.aux_loss) < 1e-6
    assert len(routers_of(model)) == len(ours.router_logits) == 2


# --- one instance, and back -----------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[Any]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    names += ("_forward_hooks_always_called",)
    return [list(getattr(module, name)) for module in model.modules() for name in names]


def test_idempotent_and_removable():
    model, other = make("MiniMaxM2"), make("MiniMaxM2")
    theirs = model(**batch())
    before = hooks_of(model)
    attributes = set(vars(model))
    handle = fix_aux_loss(model)
    ours = model(**batch())
    hooks = hooks_of(model)
    with fix_aux_loss(model):  # as found: fixed
        assert hooks_of(model) == hooks
    assert torch.equal(model(**batch()).loss, ours.loss) and not torch.equal(ours.loss, theirs.loss)
    assert torch.equal(other(**batch()).loss, theirs.loss)
    handle.remove()
    handle.remove()
    assert hooks_of(model) == before and set(vars(model)) == attributes
    assert torch.equal(model(**batch()).loss, theirs.loss)
    fix_aux_loss(model)
    fix_aux_loss(model).remove()
    assert hooks_of(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fixed_too(copied):
    model = make("MiniMaxM2")
    theirs = make("MiniMaxM2")(**batch()).loss
    fix_aux_loss(model)
    twin = copied(model)
    with torch.no_grad():
        for router in routers_of(twin):
            router.weight.mul_(1.5)
    output, choices = seen_by(twin, lambda: twin(**batch()))
    exact, _ = by_hand(choices, "sigmoid", batch()["attention_mask"])
    assert abs(output.aux_loss / exact - 1) < 1e-6
    fix_aux_loss(twin).remove()
    assert abs(twin(**batch()).aux_loss / exact - 1) > 0.01
    assert not torch.equal(model(**batch()).loss, theirs)  # the first stays fixed


def test_a_forward_that_fails_leaves_nothing():
    model = make("MiniMaxM2")
    fix_aux_loss(model)
    expected = model(**batch()).loss
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch())
    handle.remove()
    assert not _under_way.forwards
    assert torch.equal(model(**batch()).loss, expected) and not _under_way.forwards


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_has_no_such_loss_is_refused():
    with pytest.raises(TypeError, match=r"moekit\.hf\.fix_aux_loss: model must be a torch\.nn\.Module, got str"):
        fix_aux_loss("model")  # type: ignore[arg-type]
    for model in (nn.Linear(2, 2), make("Qwen3Moe").model, make("DeepseekV3", q_lora_rank=8, n_group=1, topk_group=1)):
        with pytest.raises(
            ValueError, match=r"model must be one that adds load_balancing_loss_func .* got " + type(model).__name__
        ):
            fix_aux_loss(model)


def test_unknown_routers_are_named():
    model = make("Phimoe")
    with pytest.raises(ValueError, match=r"got PhimoeForCausalLM\.model\.layers\.0\.\w+\.router, a PhimoeTopKRouter"):
        fix_aux_loss(model)
    model = make("Qwen3Moe")
    routers_of(model)[1].forward = lambda hidden_states: None
    before = hooks_of(model)
    with pytest.raises(ValueError, match=r"got Qwen3MoeForCausalLM\.model\.layers\.1\.mlp\.gate, a Qwen3MoeTopKRouter"):
        fix_aux_loss(model)
    assert hooks_of(model) == before
    with pytest.raises(ValueError, match="must be one with routers, got Qwen3MoeForCausalLM without one"):
        fix_aux_loss(make("Qwen3Moe", mlp_only_layers=[0, 1]))


def test_routers_that_change_later_are_refused():
    model = make("Qwen3Moe")
    fix_aux_loss(model)
    router = routers_of(model)[1]
    forward = router.forward
    router.forward = lambda hidden_states: forward(hidden_states)
    with pytest.raises(ValueError, match="a router must be as it was when the model was fixed, got a patched Qwen3MoeTopK"):
        model(**batch())
    del router.forward
    model.model.layers[1].mlp.gate = make("Qwen3Moe").model.layers[1].mlp.gate
    with pytest.raises(ValueError, match="the routers must be those of Qwen3MoeForCausalLM when it was fixed"):
        model(**batch())


def test_another_loss_is_refused(monkeypatch):
    model = make("Qwen3Moe")
    module = __import__(type(model).__module__, fromlist=["_"])
    monkeypatch.setattr(module, "load_balancing_loss_func", lambda *args: torch.zeros(()))
    with pytest.raises(ValueError, match="must be one that adds load_balancing_loss_func"):
        fix_aux_loss(model)


def test_public():
    assert moekit.hf.fix_aux_loss is fix_aux_loss
