"""The auxiliary loss's way into the gradients: the drop-in MoEAuxLossAutoScaler and the native aux_loss."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
from _by_hand import leaf
from _reference import assert_same, draw
from torch import nn
from torch.utils.checkpoint import checkpoint

import moekit
from moekit.moe_utils import MoEAuxLossAutoScaler

pytestmark = pytest.mark.usefixtures("fresh_scale")
ops = torch.ops.moekit

# The forms a scale may have, and its value.
SCALES = {
    "none": (None, 1.0),
    "int": (3, 3.0),
    "float": (0.3, 0.3),
    "zero": (0.0, 0.0),
    "tensor": (torch.tensor(2.5), 2.5),
    "tensor_1": (torch.tensor([2.5]), 2.5),
    "double": (torch.tensor(0.3, dtype=torch.float64), 0.3),
    "bf16": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "wants_grad": (torch.tensor(2.5, requires_grad=True), 2.5),
}
every_scale = pytest.mark.parametrize("name", SCALES)
both_checkpoints = pytest.mark.parametrize("use_reentrant", [False, True])


@pytest.fixture
def fresh_scale():
    """The process-wide scale is None, and None again after the test."""
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is None
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def set_scale(scale) -> None:
    MoEAuxLossAutoScaler.main_loss_backward_scale = scale


def attach(output, loss, scale=1.0):
    """The drop-in with the arguments of the native function."""
    set_scale(scale)
    return MoEAuxLossAutoScaler.apply(output, loss)


both_forms = pytest.mark.parametrize("form", [moekit.aux_loss, attach], ids=["native", "drop_in"])


# --- both forms -----------------------------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)])
def test_the_output_passes_and_the_loss_gets_the_scale(form, dtype, loss_dtype, shape):
    output, loss = leaf(draw(0, 4, 3, dtype=dtype)), leaf(draw(1, *shape, dtype=loss_dtype))
    attached = form(output, loss, 0.25)
    assert_same(attached.detach(), output.detach())
    grad = draw(2, 4, 3, dtype=dtype)
    attached.backward(grad)
    assert_same(output.grad, grad)
    assert_same(loss.grad, torch.full(shape, 0.25, dtype=loss_dtype))


@both_forms
def test_no_tokens(form):
    output, loss = torch.zeros(0, 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    attached = form(output, loss, 3.0)
    assert attached.shape == (0, 3)
    attached.sum().backward()
    assert output.grad.shape == (0, 3)
    assert_same(loss.grad, torch.tensor(3.0))


@both_forms
def test_poisoned_memory(form, poisoned):
    loss = leaf(draw(0, 5))
    form(leaf(draw(1, 2)), loss, 3.0).sum().backward()
    assert_same(loss.grad, torch.full((5,), 3.0, dtype=torch.float64))


@both_forms
def test_expanded_gradient_and_strided_tensors(form):
    output, loss = leaf(draw(0, 4, 6).T), leaf(draw(1, 3, 4)[:, ::2])
    attached = form(output, loss, 2.0)
    assert_same(attached.detach(), output.detach())
    attached.sum().backward()
    assert_same(output.grad, torch.ones(6, 4, dtype=torch.float64))
    assert_same(loss.grad, torch.full((3, 2), 2.0, dtype=torch.float64))


@both_forms
def test_the_gradient_is_the_main_losss_and_the_scaled_losss(form):
    """A router's weights under a main and an auxiliary loss: the sum of both gradients, by hand."""
    x, router = draw(0, 5, 3), leaf(draw(1, 3, 4))
    probs = (x @ router).softmax(1)
    attached = form(probs.square(), probs.mean(0).square().sum(), 7.0)
    attached.sum().backward()
    twin = leaf(router)
    probs = (x @ twin).softmax(1)
    (probs.square().sum() + 7.0 * probs.mean(0).square().sum()).backward()
    torch.testing.assert_close(router.grad, twin.grad, rtol=1e-13, atol=1e-14)


@both_forms
def test_retain_graph(form):
    output, loss = leaf(draw(0, 3)), leaf(draw(1, 2))
    attached = form(output, loss, 5.0)
    first = torch.autograd.grad(attached.sum(), (output, loss), retain_graph=True)
    second = torch.autograd.grad(attached.sum(), (output, loss))
    for a, b, value in zip(first, second, (1.0, 5.0), strict=True):
        assert_same(a, torch.full_like(a, value))
        assert_same(b, a)


@both_forms
def test_double_backward_adds_nothing(form):
    """The loss's gradient is a constant; the output's is the incoming one."""
    output, loss = leaf(draw(0, 3)), leaf(draw(1, 2))
    attached = form(output, loss, 5.0)
    doutput, dloss = torch.autograd.grad(attached.pow(3).sum(), (output, loss), create_graph=True)
    assert_same(dloss.detach(), torch.full((2,), 5.0, dtype=torch.float64))
    assert not dloss.requires_grad
    (second,) = torch.autograd.grad(doutput.sum(), output)
    torch.testing.assert_close(second, 6 * output.detach())


@both_forms
def test_gradients_nobody_needs(form):
    output, loss = leaf(draw(0, 3)), draw(1, 2)
    form(output, loss).sum().backward()
    assert_same(output.grad, torch.ones(3, dtype=torch.float64))
    assert loss.grad is None
    output, loss = draw(0, 3), leaf(draw(1, 2))
    form(output, loss, 2.0).sum().backward()
    assert output.grad is None
    assert_same(loss.grad, torch.full((2,), 2.0, dtype=torch.float64))


@both_forms
@both_checkpoints
@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [4, 0])
def test_activation_checkpointing(form, use_reentrant, loss_dtype, tokens):
    def layer(x, router):
        probs = (x @ router).softmax(1)
        return form(probs @ router.T, probs.square().sum().to(loss_dtype), 0.5)

    results = []
    for checkpointed in (False, True):
        x, router = leaf(draw(0, tokens, 3).bfloat16()), leaf(draw(1, 3, 2).bfloat16())
        out = checkpoint(layer, x, router, use_reentrant=use_reentrant) if checkpointed else layer(x, router)
        out.sum().backward()
        results.append((out.detach(), x.grad, router.grad))
    for plain, recomputed in zip(*results, strict=True):
        assert plain.any() or not tokens
        assert_same(recomputed, plain)


@both_forms
def test_no_tensor_survives(form):
    output, loss = leaf(draw(0, 1000)), leaf(draw(1, 5))
    scale = torch.tensor(2.0)
    attached = form(output, loss, scale)
    attached.square().sum().backward()
    seen = [weakref.ref(t) for t in (output, loss, attached, output.grad, loss.grad)]
    del output, loss, attached
    gc.collect()
    assert [ref() for ref in seen] == [None] * 5
    scale_seen = weakref.ref(scale)
    set_scale(None)
    del scale
    gc.collect()
    assert scale_seen() is None


# --- the drop-in ----------------------------------------------------------------------------------------------------


@every_scale
def test_every_form_of_scale_and_the_attribute_is_never_written(name):
    scale, value = SCALES[name]
    set_scale(scale)
    loss = torch.ones(2, requires_grad=True)
    attached = MoEAuxLossAutoScaler.apply(torch.ones(3, requires_grad=True), loss)
    for _ in range(2):
        attached.sum().backward(retain_graph=True)
        assert MoEAuxLossAutoScaler.main_loss_backward_scale is scale
    assert_same(loss.grad, 2 * torch.full((2,), value))
    if isinstance(scale, torch.Tensor):
        assert scale.grad is None and scale.numel() == 1 and float(scale.detach()) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("scale", [4.0, torch.tensor(4.0)], ids=["float", "tensor"])
def test_the_scale_is_read_at_backward(scale):
    set_scale(100.0)
    loss = torch.ones((), requires_grad=True)
    attached = MoEAuxLossAutoScaler.apply(torch.ones(3), loss)
    set_scale(scale)
    attached.sum().backward(retain_graph=True)
    assert_same(loss.grad, torch.tensor(4.0))
    loss.grad = None
    if isinstance(scale, torch.Tensor):
        scale.fill_(9.0)
    else:
        set_scale(9.0)
    attached.sum().backward()
    assert_same(loss.grad, torch.tensor(9.0))


def test_set_loss_scale_takes_numbers_and_tensors():
    for scale, value in ((2, 2.0), (0.5, 0.5), (torch.tensor(3.0), 3.0), (torch.tensor([4.0]), 4.0)):
        MoEAuxLossAutoScaler.set_loss_scale(scale)
        loss = torch.ones((), requires_grad=True)
        MoEAuxLossAutoScaler.apply(torch.ones(3), loss).sum().backward()
        assert_same(loss.grad, torch.tensor(value))


def test_set_loss_scale_never_mutates_or_aliases_the_callers_tensor():
    mine = torch.tensor(2.0, requires_grad=True)
    MoEAuxLossAutoScaler.set_loss_scale(mine)
    held = MoEAuxLossAutoScaler.main_loss_backward_scale
    assert held is not mine and held.data_ptr() != mine.data_ptr() and not held.requires_grad
    MoEAuxLossAutoScaler.set_loss_scale(5.0)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(7.0))
    assert float(mine.detach()) == 2.0 and mine._version == 0
    with torch.no_grad():
        mine.fill_(11.0)
    assert float(MoEAuxLossAutoScaler.main_loss_backward_scale) == 7.0


def test_the_loss_may_live_on_another_device():
    loss = torch.zeros(3, device="meta", requires_grad=True)
    MoEAuxLossAutoScaler.apply(leaf(draw(0, 2)), loss).sum().backward()
    assert loss.grad.shape == (3,) and loss.grad.device.type == "meta"


def test_the_scale_holds_for_every_thread():
    """It is process-wide, as the published one: backward in another thread reads it too."""
    set_scale(6.0)
    losses = [torch.zeros((), requires_grad=True) for _ in range(8)]

    def work(loss):
        MoEAuxLossAutoScaler.apply(torch.ones(3), loss).sum().backward()

    threads = [threading.Thread(target=work, args=(loss,)) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [float(loss.grad) for loss in losses] == [6.0] * 8


# --- the native form ------------------------------------------------------------------------------------------------


@every_scale
def test_native_scales(name):
    scale, value = SCALES[name]
    if scale is None:
        with pytest.raises(TypeError, match="aux_loss: scale must be a number, got NoneType"):
            moekit.aux_loss(torch.ones(3), torch.ones(2), scale)
        return
    loss = torch.ones(2, requires_grad=True)
    moekit.aux_loss(torch.ones(3, requires_grad=True), loss, scale).sum().backward()
    assert_same(loss.grad, torch.full((2,), value))
    if isinstance(scale, torch.Tensor):
        assert scale.grad is None


@pytest.mark.parametrize("scale", [-2.0, 0.0, 0.125, 1.0, 3.0, 1e4])
def test_linear_in_its_scale(scale):
    x, router = draw(0, 5, 3), draw(1, 3, 4)

    def gradient(scale):
        w = leaf(router)
        probs = (x @ w).softmax(1)
        moekit.aux_loss(torch.zeros(5, 4), probs.square().mean(), scale).sum().backward()
        return w.grad

    assert gradient(1.0).abs().max() > 1e-3
    torch.testing.assert_close(gradient(scale), scale * gradient(1.0), rtol=1e-12, atol=0)


def test_a_tensor_scale_is_read_at_backward_and_never_written():
    scale, loss = torch.tensor(2.0), torch.ones((), requires_grad=True)
    attached = moekit.aux_loss(torch.ones(3), loss, scale)
    scale.fill_(8.0)
    attached.sum().backward()
    assert_same(loss.grad, torch.tensor(8.0))
    assert float(scale) == 8.0 and scale._version == 1


def test_the_native_scale_is_not_the_process_wide_one():
    set_scale(1000.0)
    loss = torch.ones((), requires_grad=True)
    moekit.aux_loss(torch.ones(3), loss, 2.0).sum().backward()
    assert_same(loss.grad, torch.tensor(2.0))
    assert MoEAuxLossAutoScaler.main_loss_backward_scale == 1000.0


class Layer(nn.Module):
    """A router with an auxiliary loss that it also keeps for logging, as frameworks do."""

    def __init__(self, seed: int, scale) -> None:
        super().__init__()
        self.router = nn.Parameter(draw(seed, 3, 4))
        self.scale, self.last_loss = scale, None

    def forward(self, x):
        probs = (x @ self.router).softmax(1)
        self.last_loss = probs.square().sum()
        return moekit.aux_loss(probs @ self.router.T, self.last_loss, self.scale)


def test_two_models_with_different_scales_interleaved():
    x = draw(9, 5, 3)

    def alone(seed, scale):
        layer = Layer(seed, scale)
        layer(x).sum().backward()
        return layer.router.grad

    expected = [alone(0, 0.5), alone(1, 32.0)]
    layers = [Layer(0, 0.5), Layer(1, torch.tensor(32.0, dtype=torch.float64))]
    outputs = [layer(x) for layer in layers]  # both forwards before any backward
    layers[1].scale = layers[0].scale = 1e9  # later calls have their own
    for layer, output, wanted in reversed([*zip(layers, outputs, expected, strict=True)]):
        output.sum().backward()
        assert_same(layer.router.grad, wanted)
    assert not torch.equal(expected[0], alone(0, 32.0))


@pytest.mark.filterwarnings("error")
def test_no_warning_in_normal_use():
    layers, x = [Layer(0, 1.0), Layer(1, 1.0)], draw(9, 5, 3)
    for layer in layers:
        layer(x).sum().backward()
    outputs = [layer(x) for layer in layers]
    sum(out.sum() for out in outputs).backward()
    del outputs
    for out in (layer(x) for layer in layers):
        out.square().sum().backward()
    nested = layers[1](layers[0](x) * layers[0](x)).square()
    nested.sum().backward()
    del nested
    gc.collect()


@pytest.mark.filterwarnings("error")
def test_no_warning_in_an_evaluation_under_grad():
    """Without backward, used by operations that keep the tensor and by ones that do not."""
    layer, x = Layer(0, 1.0), draw(9, 5, 3)
    for use in (
        lambda y: y.sum().item(),
        lambda y: y.square().sum().item(),
        lambda y: (y * y).detach(),
        lambda y: (y @ layer.router).sum(),
        lambda y: nn.functional.linear(y, layer.router.T).argmax(),
        lambda y: y.detach(),
        lambda y: None,
    ):
        use(layer(x))
        output = layer(x)
        use(output)
        del output
    layer(x)
    with torch.no_grad():
        moekit.aux_loss(x, layer.last_loss)
    moekit.aux_loss(x, layer.last_loss.detach())  # nothing to lose
    gc.collect()


@pytest.mark.parametrize("statement", ["moekit.aux_loss(x, loss)", "aux_loss(x, loss=loss, scale=2.0)", "aux_loss(*args)"])
def test_a_discarded_result_warns(statement):
    code = compile(f"def run(x, loss, args, aux_loss, moekit):\n    {statement}\n    return x", "model.py", "exec")
    space: dict = {}
    exec(code, space)
    x, loss = leaf(draw(0, 3)), leaf(draw(1, 2)).sum()
    with pytest.warns(UserWarning, match=r"moekit\.aux_loss: the returned tensor is discarded") as caught:
        space["run"](x, loss, (x, loss), moekit.aux_loss, moekit)
    assert [(w.filename, w.lineno) for w in caught] == [("model.py", 2)]


def test_a_discarded_result_warns_at_the_top_of_a_script():
    code = """if True:
        import torch, moekit
        loss = torch.ones((), requires_grad=True)
        moekit.aux_loss(loss * 1, loss)
        used = moekit.aux_loss(loss * 1, loss)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.count("UserWarning: moekit.aux_loss: the returned tensor is discarded") == 1
    assert "<string>:4:" in result.stderr


def test_refusals():
    x = torch.ones(3)
    with pytest.raises(TypeError, match=r"aux_loss: loss must be a floating-point tensor, got torch\.int64"):
        moekit.aux_loss(x, torch.tensor(1))
    with pytest.raises(TypeError, match="aux_loss: loss must be a tensor, got float"):
        moekit.aux_loss(x, 1.0)
    with pytest.raises(TypeError, match="aux_loss: output must be a tensor, got list"):
        moekit.aux_loss([1.0], x)
    with pytest.raises(ValueError, match=r"aux_loss: scale must be a scalar, got shape \[2\]"):
        moekit.aux_loss(x, x, torch.ones(2))
    with pytest.raises(TypeError, match="aux_loss: scale must be a number, got str"):
        moekit.aux_loss(x, x, "1")


# --- the operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (0,)])
@pytest.mark.parametrize("scale", [None, torch.tensor(2.0)], ids=["process", "own"])
@pytest.mark.parametrize("grad", [torch.ones(4, 3), torch.ones(3, 4).T, torch.ones(0, 3)], ids=["plain", "strided", "empty"])
def test_opcheck(shape, scale, grad):
    args = (grad, scale, shape, torch.bfloat16, torch.device("cpu"))
    torch.library.opcheck(ops.aux_loss_grad.default, args)


def test_the_gradient_is_new_memory():
    loss, one = torch.ones((), requires_grad=True), torch.ones(())
    moekit.aux_loss(torch.ones(()), loss, one).backward()
    loss.grad.fill_(5.0)
    assert float(one) == 1.0
    set_scale(one)
    loss.grad = None
    MoEAuxLossAutoScaler.apply(torch.ones(()), loss).backward()
    loss.grad.fill_(5.0)
    assert float(one) == 1.0


def test_the_drop_in_never_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoEAuxLossAutoScaler.apply(torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True))


@pytest.mark.parametrize(("scale", "factor"), [(torch.tensor(2.0), None), (None, 3.0), (None, None)])
def test_opcheck_of_the_operator_for_transforms(scale, factor):
    output, loss = torch.ones(2, 3, requires_grad=True), torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    torch.library.opcheck(ops.attach_aux_loss.default, (output, loss, scale, factor))
