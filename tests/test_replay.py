"""moekit.Replay: the recorded choices, today's weights, and each pass with its own in backward."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy
import pytest
import torch
from _layers import LAYERS, REENTRANT, E, H, K, Net, T, causal, checkpointed, gradients, ids, inputs, net, perturbed, qwen3
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import moekit
from moekit import Choices, Replay
from moekit.hf._replayed import weights_of
from moekit.hf.routers import spec_of

N = 4  # micro-batches


def recorded(model: nn.Module, batches: list[Tensor]) -> Choices:
    with Replay(model).record() as choices, torch.no_grad():
        for batch in batches:
            model(batch)
    return choices


def by_hand(model: Net, batches: list[Tensor], choices: Choices) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and gradients with the choices as an argument of each layer, in float64."""
    model.zero_grad()
    losses = []
    for batch, one in zip(batches, choices.passes, strict=True):
        x = batch
        for layer, indices in zip(model.layers, one, strict=True):
            x = x + layer(x, indices=indices.long())
        loss = x.square().mean()
        loss.backward()
        losses.append(loss.item())
    return losses, gradients(model)


def replayed(model: Net, batches: list[Tensor], choices: Choices, summed: bool) -> tuple[list[float], dict[str, Tensor]]:
    """The same through Replay; ``summed``: all forwards come before one backward, which is after the block."""
    replay, root = Replay(model), model
    model.zero_grad()
    losses = []
    with replay.play(choices):
        for batch in batches:
            losses.append(root(batch.clone().requires_grad_()).square().mean())
            if not summed:
                losses[-1].backward()
    if summed:
        torch.stack(losses).sum().backward()
    replay.remove()
    return [loss.item() for loss in losses], gradients(model)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == wanted.keys() and all(grad.any() for name, grad in wanted.items() if "router" in name)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, **(tolerance or {"rtol": 1e-12, "atol": 1e-14}), msg=name)


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("summed", [False, True])
def test_each_pass_goes_forward_and_backward_with_its_own_choices(summed: bool, reentrant: bool | None):
    model, batches = net(), inputs(N)
    choices = recorded(perturbed(model), batches)
    wanted = by_hand(model, batches, choices)
    own = recorded(model, batches)
    assert not numpy.array_equal(own.to_array(), choices.to_array())
    model.reentrant = reentrant
    losses, grads = replayed(model, batches, choices, summed)
    assert losses == pytest.approx(wanted[0], rel=1e-13)
    assert_same(grads, wanted[1])


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_own_choices_change_no_bit(backend: str, reentrant: bool | None):
    model, batches = net().float(), inputs(2, torch.float32)
    choices, losses = recorded(model, batches), []
    model.reentrant = reentrant
    for batch in batches:
        losses.append(model(batch.clone().requires_grad_()).square().mean())
        losses[-1].backward()
    wanted = gradients(model)
    assert all(grad.any() for grad in wanted.values())
    found, grads = replayed(model, batches, choices, summed=False)
    assert found == [loss.item() for loss in losses]
    assert all(torch.equal(grads[name], grad) for name, grad in wanted.items())


def test_the_router_has_the_gradient_of_the_plain_formula():
    model, (x,) = net(), inputs(1)
    router = model.layers[0].router
    indices = torch.rand(T, E, generator=torch.Generator().manual_seed(5)).argsort(1)[:, :K]
    with Replay(router).play(Choices([(indices.to(torch.int16),)])):
        found = router(x).weights
    scores = (x @ router.weight.mT).softmax(1).gather(1, indices)
    wanted = scores / scores.sum(1, keepdim=True)
    factors = torch.linspace(-1, 1, T * K, dtype=torch.float64).view(T, K)
    grads = [torch.autograd.grad((weights * factors).sum(), router.weight)[0] for weights in (found, wanted)]
    assert grads[1].abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_after_the_block_routers_choose_by_themselves():
    model, batches = net(), inputs(2)
    choices, own = recorded(perturbed(model), batches), recorded(model, batches)
    replay = Replay(model)
    before = model(batches[1])
    with replay.play(choices[:1]):
        loss = model(batches[0]).sum()
    assert torch.equal(model(batches[1]), before)
    loss.backward()
    assert torch.equal(model(batches[1]), before)
    with replay.record() as again:
        model(batches[1])
    assert all(map(torch.equal, again.passes[0], own.passes[1]))


def test_no_value_is_read():
    with FakeTensorMode():  # whose tensors have none
        model = Net()
        x, replay = torch.zeros(T, H, requires_grad=True), Replay(model)
        with replay.record() as choices:
            model(x)
        model.reentrant = False
        with replay.play(choices):
            model(x).sum().backward()


def test_recorded_in_inference_mode_and_played_in_torch_func():
    model, (x,) = net(), inputs(1)
    with torch.inference_mode(), Replay(other := perturbed(model)).record() as choices:
        other(x)
    wanted = by_hand(model, [x], choices)[1]
    parameters = dict(model.named_parameters())
    with Replay(model).play(choices):
        found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().mean())(parameters)
    assert_same({name: grad for name, grad in found.items() if name in wanted}, wanted)


def test_a_failed_forward_leaves_nothing_behind():
    model, (x, y) = net(), inputs(2)
    choices, before = recorded(perturbed(model), [x]), model(y)
    replay = Replay(model)
    with pytest.raises(ValueError, match="shape"), replay.play(choices):
        model(x[:3])
    assert torch.equal(model(y), before) and all(layer.router.given is None for layer in model.layers)


def test_recording_while_playing_records_what_is_played():
    model, batches = net(), inputs(2)
    choices, replay = recorded(perturbed(model), batches), Replay(model)
    with replay.play(choices), replay.record() as again:
        for batch in batches:
            model(batch)
    assert numpy.array_equal(again.to_array(), choices.to_array()) and again.num_tokens == [T, T]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_in_the_middle_of_another_pass(reentrant: bool):
    model, (x, y) = net(), inputs(2)
    choices = recorded(perturbed(model), [x, y])
    wanted = by_hand(model, [x, y], choices)[1]
    model.zero_grad()
    model.reentrant = reentrant
    replay, losses = Replay(model), []
    hook = model.layers[1].register_forward_pre_hook(lambda *_: losses.pop().backward() if losses else None)
    with replay.play(choices):
        losses.append(model(x.clone().requires_grad_()).square().mean())
        second = model(y.clone().requires_grad_()).square().mean()
    hook.remove()
    second.backward()
    assert_same(gradients(model), wanted)


def test_a_backward_after_a_pass_that_failed():
    model, (x, y) = net(), inputs(2)
    choices = recorded(perturbed(model), [x, y])
    wanted = by_hand(model, [x], choices[:1])[1]
    model.zero_grad()
    model.reentrant = False
    with Replay(model).play(choices):
        loss = model(x).square().mean()
        with pytest.raises(ValueError, match="shape"):
            model(y[:1])
        loss.backward()
    assert_same(gradients(model), wanted)


def test_two_passes_at_once_on_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Each device's part of backward goes at its own pace, so neither pass's choices can be the ones that are given."""
    from moekit import replay as module

    model, batches = net(), inputs(2)
    choices = recorded(model, batches)
    monkeypatch.setattr(module._Slot, "device", property(lambda slot: slot.name))
    replay = Replay(model)
    with replay.play(choices):
        losses = [model(batch).sum() for batch in batches]
    losses[0].backward(retain_graph=True)
    losses[1].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward for each pass"):
        (losses[0] + losses[1]).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_records_nothing(reentrant: bool):
    model, batches = net(), inputs(2)
    model.reentrant = reentrant
    with Replay(model).record() as choices:
        for batch in batches:
            model(batch.clone().requires_grad_()).sum().backward()
    assert len(choices) == 2 and choices.num_tokens == [T, T]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_is_checkpointed_as_a_whole(reentrant: bool):
    model, batches = net(), inputs(2)
    choices = recorded(perturbed(model), batches)
    wanted = by_hand(model, batches, choices)[1]
    model.zero_grad()
    replay = Replay(model)
    with replay.play(choices):
        losses = [
            checkpoint(model, batch.clone().requires_grad_(), use_reentrant=reentrant).square().mean() for batch in batches
        ]
    if reentrant:  # whose output does not tell of the pass it came from
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            losses[0].backward()
        return
    torch.stack(losses).sum().backward()
    assert_same(gradients(model), wanted)


class Output(nn.Module):
    """What a model returns, in a form of ``kind``."""

    def __init__(self, model: nn.Module, kind: Callable) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor):
        return self.kind(self.model(x))


class Sealed:
    def __init__(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize(
    "kind, value",
    [(lambda x: {"a": [None, x]}, lambda out: out["a"][1]), (lambda x: (x, Sealed(x)), lambda out: out[0])],
)
def test_outputs_in_containers(kind: Callable, value: Callable):
    inner, batches = net(), inputs(2)
    choices = recorded(perturbed(inner), batches)
    wanted = by_hand(inner, batches, choices)[1]
    inner.zero_grad()
    inner.reentrant = False
    model = Output(inner, kind)
    with Replay(model).play(Choices(choices.passes)):
        losses = [value(model(batch)).square().mean() for batch in batches]
    torch.stack(losses).sum().backward()
    assert_same(gradients(inner), wanted)


def test_an_output_that_cannot_be_looked_into_is_refused():
    inner, (x,) = net(), inputs(1)
    model = Output(inner, Sealed)
    choices = Choices(recorded(inner, [x]).passes)
    with pytest.raises(TypeError, match="Sealed"), Replay(model).play(choices):
        model(x)


# --- choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint8", "uint16"])
@pytest.mark.parametrize("make", [lambda array: array, torch.from_numpy])
def test_arrays_of_engines(dtype: str, make: Callable):
    array = numpy.arange(T * 3 * K).reshape(T, 3, K).astype(dtype)
    array.flags.writeable = make is torch.from_numpy  # as one that came in a message is not
    choices = Choices.from_array(make(array))
    assert choices.passes[0][0].dtype is torch.int16 and choices.nbytes == 2 * array.size and choices.num_layers == 3
    assert numpy.array_equal(choices.to_array(), array)
    assert numpy.array_equal(Choices.from_array(make(array), layers=range(1, 3)).to_array(), array[:, 1:])
    named = Choices.from_array(make(array), layers={"b": 2, "a": 0}, tokens=[2, T - 2])
    assert named.names == ("b", "a") and named.num_tokens == [2, T - 2]
    assert numpy.array_equal(named.to_array(), array[:, [2, 0]]) and numpy.array_equal(
        named[1].to_array(), array[2:, [2, 0]]
    )


def test_large_numbers_are_kept():
    array = numpy.full((1, 1, 2), 40_000, dtype=numpy.uint16)
    choices = Choices.from_array(array)
    assert choices.to_array().tolist() == array.tolist() and choices.nbytes == 8


@pytest.mark.parametrize(
    "array, options, error, text",
    [
        (numpy.zeros((2, 3)), {}, ValueError, "3-D"),
        (numpy.zeros((2, 3, 4)), {}, TypeError, "of integers"),
        (torch.zeros(2, 3, 4, dtype=torch.bool), {}, TypeError, "of integers"),
        (numpy.full((2, 3, 4), -2), {}, ValueError, "index -2"),
        (numpy.full((2, 3, 4), -2, dtype="int16"), {}, ValueError, "index -2"),
        (numpy.zeros((2, 3, 4), dtype=int), {"layers": [3]}, ValueError, "columns of the 3"),
        (numpy.zeros((2, 3, 4), dtype=int), {"tokens": [1, 2]}, ValueError, "adding up to 2"),
    ],
)
def test_bad_arrays(array, options: dict, error: type, text: str):
    with pytest.raises(error, match=text):
        Choices.from_array(array, **options)


def test_choices_are_a_sequence_and_a_file(tmp_path):
    model, batches = net(), inputs(3)
    choices = recorded(model, batches)
    assert "3 passes" in repr(choices) and len(choices[1:]) == 2 and [len(one) for one in choices] == [1, 1, 1]
    joined = choices[:1] + choices[1:]
    choices.save(tmp_path / "choices.pt")
    for other in (joined, Choices.load(tmp_path / "choices.pt"), choices.to("cpu")):
        assert other.names == choices.names and numpy.array_equal(other.to_array(), choices.to_array())
        assert other.num_tokens == choices.num_tokens
    assert numpy.array_equal(choices.split([T * 3]).to_array(), choices.to_array())
    with pytest.raises(ValueError, match="same routers"):
        choices + Choices(choices.passes)
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"Choices\.save"):
        Choices.load(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="every layer"):
        Choices([(torch.zeros(2, 1, dtype=torch.int16), torch.zeros(2, 2, dtype=torch.int16))]).to_array()


@pytest.mark.parametrize(
    "one, names, error, text",
    [
        ((torch.zeros(2, 1, dtype=torch.int16), torch.zeros(3, 1, dtype=torch.int16)), None, ValueError, r"\[2, 1\], got"),
        ((torch.zeros(2, dtype=torch.int16),), None, ValueError, "2-D tensor"),
        ((torch.zeros(2, 1),), None, TypeError, "of integers"),
        ((), None, ValueError, "of some layers"),
        ((torch.zeros(2, 1, dtype=torch.int16),), ("a", "b"), ValueError, "of 2 layers, got 1"),
    ],
)
def test_passes_that_are_none(one: tuple, names: tuple | None, error: type, text: str):
    with pytest.raises(error, match=text):
        Choices([one], names)


def test_choices_go_by_name_where_they_have_the_same():
    model, (x,) = net(), inputs(1)
    choices = recorded(perturbed(model), [x])
    turned = Choices([choices.passes[0][::-1]], choices.names[::-1])
    wanted = by_hand(model, [x], choices)[0]
    assert replayed(model, [x], turned, False)[0] == pytest.approx(wanted, rel=1e-13)


# --- errors ---------------------------------------------------------------------------------------------------------


def play(model: nn.Module, choices: object, batches: list[Tensor]) -> None:
    with Replay(model).play(choices):
        for batch in batches:
            model(batch)


@pytest.mark.parametrize(
    "change, passes, error, text",
    [
        (lambda c: c, 1, RuntimeError, "1 of 2 entries"),
        (lambda c: c, 3, RuntimeError, "there are 2 entries"),
        (lambda c: c.to_array(), 2, TypeError, r"ndarray \(an array\? use Choices.from_array"),
        (lambda c: Choices([one[:1] for one in c.passes]), 2, ValueError, "2 routers, got 1 layers .*layers="),
        (lambda c: Choices(c.passes, ("a", "b")), 2, ValueError, "got a, b"),
        (
            lambda c: Choices([tuple(x[1:] for x in one) for one in c.passes]),
            2,
            ValueError,
            r"pass 1 .* \[6, 2\], got .*\[5, 2\]",
        ),
        (lambda c: Choices([tuple(x[:, 1:] for x in one) for one in c.passes]), 2, ValueError, r"\[6, 2\], got .*\[6, 1\]"),
        (lambda c: Choices([tuple(x + E for x in one) for one in c.passes]), 2, ValueError, "below 8"),
        (lambda c: Choices([tuple(x - E for x in one) for one in c.passes]), 2, ValueError, "-1 .none."),
    ],
)
def test_choices_that_do_not_fit(change: Callable, passes: int, error: type, text: str):
    model, batches = net(), inputs(3)
    with pytest.raises(error, match=text):
        play(model, change(recorded(model, batches[:2])), batches[:passes])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.never = net().layers[0], net().layers[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_what_a_recording_cannot_tell_is_refused():
    (x,), model = inputs(1), Twice()
    with pytest.raises(RuntimeError, match=r"layer\.router' ran twice"), Replay(model).record():
        model(x)
    model = net()
    with pytest.raises(RuntimeError, match=r"did not run in this pass: layers\.1"), Replay(model).record():
        model.layers.forward = None
        model.forward = model.layers[0].forward
        model(x)
    with pytest.raises(RuntimeError, match="no pass was seen"), Replay(model).record():
        pass


def test_blocks_do_not_nest():
    model, (x,) = net(), inputs(1)
    replay = Replay(model)
    with replay.record() as choices:
        model(x)
        with pytest.raises(RuntimeError, match="recording already"), replay.record():
            pass
    with replay.play(choices):
        model(x)
        with pytest.raises(RuntimeError, match="playing already"), replay.play(choices):
            pass


def test_models_without_routers_and_other_objects():
    with pytest.raises(ValueError, match=r"moekit\.nn\.Router"):
        Replay(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        Replay(3)


def test_somebody_elses_choice_is_not_overwritten():
    model, (x,) = net(), inputs(1)
    choices = recorded(model, [x])
    model.layers[1].router.given = choices.passes[0][1].long()
    with pytest.raises(RuntimeError, match="somebody else"):
        play(model, choices, [x])


def test_copies_and_files_of_a_model_do_not_record():
    model, (x,) = net(), inputs(1)
    with Replay(model).record() as choices:
        model(x)
        copy.deepcopy(model)(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        torch.load(file, weights_only=False)(x)
    assert len(choices) == 1
    assert not any("replay" in name.lower() for name in model.state_dict())


def test_an_entry_lives_as_long_as_its_graph():
    import weakref

    model, (x,) = net(), inputs(1)
    choices = recorded(model, [x])
    entry = weakref.ref(choices.passes[0][0])
    replay = Replay(model)
    with replay.play(choices):
        loss = model(x).sum()
    del choices
    assert entry() is not None
    loss.backward()
    del loss
    assert entry() is None


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "layers", "in place"])
def test_compiled(how: str):
    torch._dynamo.reset()
    model, batches = net(), inputs(3)
    choices = recorded(perturbed(model), batches)
    wanted = by_hand(model, batches, choices)[1]
    model.zero_grad()
    options = {"backend": "aot_eager", "fullgraph": how != "in place"}
    root = torch.compile(model, **options) if how == "whole" else model
    replay = Replay(root)
    assert replay.names == ("layers.0.router", "layers.1.router")
    for module in model.layers if how == "layers" else [model] if how == "in place" else []:
        module.compile(**options)
    root(batches[0])
    torch._dynamo.utils.counters.clear()
    with replay.play(choices):
        losses = [root(batch).square().mean() for batch in batches]
    torch.stack(losses).sum().backward()
    # One graph for each thing that is compiled: none for a pass.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (LAYERS if how == "layers" else 1)
    assert_same(gradients(model), wanted)
    with replay.record() as again:
        root(batches[0])
    assert numpy.array_equal(again.to_array(), recorded(model, batches[:1]).to_array())


def test_code_that_was_compiled_before_is_noticed():
    torch._dynamo.reset()
    model, (x,) = net(), inputs(1)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    model(x)
    with pytest.raises(RuntimeError, match=r"did not run in this pass.*before code"), Replay(model).record():
        model(x)


# --- Transformers ---------------------------------------------------------------------------------------------------


def trained(model: nn.Module, batches: list[Tensor], choices: list[Choices] | None) -> tuple[list, list, dict]:
    """Three steps: losses, the choices of each, the last gradients."""
    optimizer, replay = torch.optim.SGD(model.parameters(), lr=0.05), moekit.hf.replay(model)
    losses, found = [], []
    for place, batch in enumerate(batches):
        optimizer.zero_grad()
        with replay.record() as own:
            if choices is None:
                loss = model(batch, labels=batch).loss
            else:
                with replay.play(choices[place]):
                    loss = model(batch, labels=batch).loss
        loss.backward()
        losses.append(loss.item())
        found.append(own)
        optimizer.step()
    return losses, found, gradients(model)


@pytest.mark.parametrize("checkpointing", REENTRANT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_trained_on_its_own_choices_changes_no_bit(dtype: torch.dtype, checkpointing: bool | None):
    model = qwen3().to(dtype)
    if checkpointing is not None:
        checkpointed(model, checkpointing)
    losses, choices, grads = trained(copy.deepcopy(model), ids(3), None)
    again, same, found = trained(model, ids(3), choices)
    assert again == losses and len(set(losses)) == 3
    assert all(numpy.array_equal(a.to_array(), b.to_array()) for a, b in zip(choices, same, strict=True))
    assert all(grad.any() for name, grad in grads.items() if "mlp.gate." in name)
    assert grads.keys() == found.keys() and all(torch.equal(found[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("checkpointing", REENTRANT)
@pytest.mark.parametrize("summed", [False, True])
def test_transformers_with_the_choices_of_another(summed: bool, checkpointing: bool | None):
    model, batches = qwen3(), ids(2)
    choices = recorded(perturbed(model), batches)
    assert not numpy.array_equal(choices.to_array(), recorded(model, batches).to_array())
    wanted = plain(model, batches, choices)
    model.zero_grad()
    if checkpointing is not None:
        checkpointed(model, checkpointing)
    replay, losses = Replay(model), []
    with replay.play(choices):
        for batch in batches:
            losses.append(model(batch, labels=batch, use_cache=False).loss)
            if not summed:
                losses[-1].backward()
    if summed:
        torch.stack(losses).sum().backward()
    gates = [name for name in wanted if "mlp.gate." in name]
    assert len(gates) == LAYERS and all(wanted[name].abs().max() > 1e-4 for name in gates)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-5 * float(wanted[name].abs().max()), msg=name)


def plain(model: nn.Module, batches: list[Tensor], choices: Choices) -> dict[str, Tensor]:
    """Gradients with the routers' formula written out at the recorded indices, differentiated by autograd."""
    place = {layer.mlp.gate: number for number, layer in enumerate(model.model.layers)}
    for batch, one in zip(batches, choices.passes, strict=True):

        def formula(gate, args, output, one=one):
            indices = one[place[gate]].long()
            scores = (args[0].reshape(-1, H) @ gate.weight.mT).softmax(-1).gather(1, indices)
            return output[0], scores / scores.sum(1, keepdim=True), indices

        hooks = [gate.register_forward_hook(formula) for gate in place]
        model(batch, labels=batch).loss.backward()
        for hook in hooks:
            hook.remove()
    return gradients(model)


OTHERS = {
    "mixtral": {"num_local_experts": E},
    "gpt_oss": {"num_local_experts": E},
    "llama4_text": {"num_local_experts": E, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    "deepseek_v3": {
        "n_routed_experts": E,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_of_transformers_keep_their_bits_too(name: str):
    model, (batch,) = causal(name, **OTHERS[name]), ids(1)
    if not any(map(spec_of, model.modules())):
        pytest.skip("this release of Transformers writes the router otherwise")
    replay, found = Replay(model), []
    with replay.record() as choices:
        found.append(model(batch, labels=batch, use_cache=False).loss)
    with replay.play(choices):
        found.append(model(batch, labels=batch, use_cache=False).loss)
    grads = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in found]
    assert torch.equal(*found) and any(grad is not None and grad.any() for grad in grads[0])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.0},
        {"normalise": False, "scale": 0.5},
        {"select_by": "logits"},
        {"score": "sigmoid", "multiplier": 2.0, "softcap": 3.0},
        {"score": "sqrtsoftplus", "epsilon": 1e-6},
        {"epsilon": 0.0, "expert_scale": torch.linspace(0.5, 1.5, E, dtype=torch.float64)},
    ],
)
def test_weights_of_transformers_choices_are_those_of_route(options: dict):
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).requires_grad_()
    indices = torch.rand(T, E, generator=torch.Generator().manual_seed(7)).argsort(1)[:, :3]
    indices[1, 2] = indices[2, 0] = -1
    factors = torch.linspace(-1, 1, 3 * T, dtype=torch.float64).view(T, 3)
    found, wanted = weights_of(logits, indices, **options), moekit.route(logits, indices=indices, **options).weights
    grads = [torch.autograd.grad((weights * factors).sum(), logits)[0] for weights in (found, wanted)]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-14)
    none = indices.clone()
    none[3] = -1
    weights = weights_of(logits, none, **options)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        (grad,) = torch.autograd.grad((weights_of(logits, none, **options) * factors).sum(), logits)
    assert (
        not weights[3].any()
        and torch.equal(weights[4], found[4])
        and not grad[3].any()
        and torch.equal(grad[4], grads[0][4])
    )


def test_transformers_with_slots_of_no_expert():
    model, (batch,) = qwen3(), ids(1)
    array = recorded(model, [batch]).to_array()
    array[-1] = -1  # the last token that an engine sampled
    array[0, 0, 1] = -1
    seen = []
    with Replay(model).play(Choices.from_array(array)):
        gate = model.model.layers[0].mlp.gate
        gate.register_forward_hook(lambda module, args, output: seen.append(output))
        model(batch, labels=batch).loss.backward()
    _, weights, indices = seen[0]
    assert torch.equal(weights == 0, torch.from_numpy(array[:, 0] < 0)) and indices.min() >= 0
    assert indices[0, 0] == array[0, 0, 0] != indices[0, 1] and weights[0, 0] == 1
    assert all(grad.isfinite().all() for grad in gradients(model).values()) and gradients(model)


def test_the_fixed_loss_of_transformers_is_of_the_choice_that_is_replayed():
    model, (batch,) = qwen3(), ids(1)
    choices = recorded(perturbed(model), [batch])
    moekit.hf.fix_aux_loss(model)
    with Replay(model).play(choices), torch.no_grad():
        out = model(batch, labels=batch, output_router_logits=True)
    tokens = LAYERS * batch.numel()
    counts = torch.cat(choices.passes[0]).long().flatten().bincount(minlength=E)
    wanted = E * (counts / tokens * torch.cat(out.router_logits).softmax(1).mean(0)).sum()
    torch.testing.assert_close(out.aux_loss, wanted, rtol=1e-6, atol=0)


def test_an_index_that_nobody_looked_at_goes_nowhere(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, where looking would be a wait."""
    model, (batch,) = qwen3(), ids(1)
    array = recorded(model, [batch]).to_array()
    found = []
    monkeypatch.setattr("moekit._backend.checks_values", lambda tensor: False)
    for nonsense in (-1, 12345):
        array[2, :, 0] = nonsense
        with Replay(model).play(Choices.from_array(array)), torch.no_grad():
            found.append(model(batch).logits)
    assert torch.equal(*found) and found[0].isfinite().all()


def test_transformers_experts_without_a_router_that_can_be_read():
    model = qwen3()
    gate = model.model.layers[1].mlp.gate
    gate.forward = type(gate).forward.__get__(gate)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp"):
        Replay(model)
