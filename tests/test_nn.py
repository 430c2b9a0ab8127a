"""moekit.nn: its modules against loops in float64, and what modules have to stand: casts, checkpoints, compilers, copies."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import moekit
from moekit.nn import Experts, MoE, Router, SharedExpert
from moekit.ops.counts import accumulate

H, I, E, K, T = 16, 12, 6, 2, 10


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (T,)), H, generator=generator, dtype=torch.float64).to(dtype)


def build(seed: int = 0, **options) -> MoE:
    torch.manual_seed(seed)
    layer = MoE.build(H, I, E, K, **options)
    with torch.no_grad():
        for value in [*layer.parameters(), *layer.buffers()]:
            if value.is_floating_point():
                value.normal_(std=0.5)
    return layer


# --- values ---------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: x.relu().square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.5 * x),
}


def weigh(router: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The choice and the weights ``[T, K]`` of a router of this file's variants, in float64."""
    options = router.options
    if options["multiplier"] is not None:
        logits = logits * options["multiplier"]
    scores = logits.sigmoid() if options["score"] == "sigmoid" else logits.softmax(1)
    compared = logits if options["select_by"] == "logits" else scores
    if router.expert_bias is not None:
        compared = compared + router.expert_bias
    indices = compared.detach().topk(router.k, 1).indices
    weights = scores.gather(1, indices)
    if options["normalise"] is not False:  # a softmax of the chosen is the same as this
        weights = weights / weights.sum(1, keepdim=True)
    if router.expert_scale is not None:
        weights = weights * router.expert_scale[indices]
    return indices, weights * (1 if options["scale"] is None else options["scale"])


def gated(options: dict, projected: Tensor) -> Tensor:
    if options["layout"] == "ungated":
        return ACTIVATIONS[options["activation"]](projected)
    parts = (projected[..., 0::2], projected[..., 1::2]) if options["layout"] == "interleaved" else projected.chunk(2, -1)
    gate, up = parts
    if options["clamp"] is not None:
        gate, up = gate.clamp(max=options["clamp"]), up.clamp(-options["clamp"], options["clamp"])
    return ACTIVATIONS[options["activation"]](gate) * (up + options["linear_offset"])


def reference(layer: MoE, x: Tensor) -> Tensor:
    """The layer, a token and an expert at a time."""
    router, experts, shared = layer.router, layer.experts, layer.shared
    logits = x @ router.weight.T + (0 if router.bias is None else router.bias)
    indices, weights = weigh(router, logits)
    rows = []
    for token, chosen, shares in zip(x, indices.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for expert, share in zip(chosen, shares, strict=True):
            if expert >= experts.num_experts:
                total = total + share * token
                continue
            out = experts.gate_up[expert] @ token
            out = gated(experts.options, out if experts.gate_up_bias is None else out + experts.gate_up_bias[expert])
            out = experts.down[expert] @ out
            total = total + share * (out if experts.down_bias is None else out + experts.down_bias[expert])
        if shared is not None:
            out = shared.gate_up @ token
            out = shared.down @ gated(shared.options, out if shared.gate_up_bias is None else out + shared.gate_up_bias)
            out = out if shared.down_bias is None else out + shared.down_bias
            total = total + (out if shared.gate is None else torch.sigmoid(shared.gate @ token) * out)
        rows.append(total)
    return torch.stack(rows)


VARIANTS = {
    "plain": {},
    "of the chosen": {"select_by": "logits", "logit_bias": True, "bias": True, "layout": "interleaved",
                      "activation": "quick_gelu", "alpha": 1.5, "clamp": 0.7, "linear_offset": 1.0},
    "deepseek": {"score": "sigmoid", "expert_bias": True, "scale": 2.5, "shared_intermediate": 8},
    "qwen2": {"normalise": False, "shared_intermediate": 20, "shared_gate": True},
    "null": {"null_experts": 3, "normalise": False, "expert_bias": True, "save": "all"},
    "ungated": {"layout": "ungated", "activation": "relu2", "shared_intermediate": 8, "bias": True, "shared_gate": True},
    "scaled": {"expert_scale": True, "multiplier": 0.7, "activation": "gelu_tanh", "weight_after_down": True},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(name, dtype):
    layer, x = build(**VARIANTS[name]).double(), tokens(dtype=torch.float64)
    ours = copy.deepcopy(layer).to(dtype)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    results = []
    for each, forward, precision in ((layer, reference, torch.float64), (ours, MoE.__call__, dtype)):
        inputs = x.detach().to(precision).requires_grad_()
        out = forward(each, inputs)
        (out * tokens(seed=1, dtype=precision)).sum().backward()
        results.append({"out": out.detach(), "x": inputs.grad, **{n: p.grad for n, p in each.named_parameters()}})
    for key, expected in results[0].items():
        assert expected.abs().max() > 1e-3, key
        torch.testing.assert_close(results[1][key], expected.to(dtype), msg=lambda m, k=key: f"{k}: {m}", **tolerance)


def test_any_leading_shape():
    layer = build()
    x = tokens(2, 3, 4)
    flat = layer(x.reshape(-1, H))
    for shape in ((2, 3, 4), (6, 4), (24,)):
        torch.testing.assert_close(layer(x.view(*shape, H)), flat.view(*shape, H), rtol=0, atol=0)
    one = layer(x[0, 0, 0])  # one token, without a dimension of tokens
    assert one.shape == (H,)
    torch.testing.assert_close(one, flat[0])
    assert layer(x[:0]).shape == (0, 3, 4, H)


# --- the router in float32 ------------------------------------------------------------------------------------------

CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "to a tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_router_stays_in_float32(cast):
    layer = build(expert_bias=True, logit_bias=True, expert_scale=True)
    before = copy.deepcopy(layer.router.state_dict())
    CASTS[cast](layer)
    assert layer.experts.gate_up.dtype.itemsize == 2
    after = layer.router.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype is torch.float32 for name, value in before.items())
    x = tokens(dtype=layer.experts.gate_up.dtype)
    logits = layer.router(x).scored.logits
    expected = functional.linear(x.float(), before["weight"], before["bias"])
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert layer(x).dtype is x.dtype
    layer.double()
    assert {value.dtype for value in layer.router.state_dict().values()} == {torch.float64}
    assert {value.device.type for value in layer.to("meta").router.state_dict().values()} == {"meta"}


def test_autocast_leaves_logits_alone():
    layer, x = build(), tokens()
    plain = layer.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.router(x).scored.logits, plain.scored.logits)
        out = layer(x)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.1)


def test_gradients_of_bfloat16_tokens_are_as_precise_as_they():
    layer = build().bfloat16()
    x = tokens(dtype=torch.bfloat16).requires_grad_()
    weights = layer.router(x).weights
    (weights[:, 0] * torch.arange(T)).sum().backward()
    exact = copy.deepcopy(layer.router).double()
    inputs = x.detach().double().requires_grad_()
    (exact(inputs).weights[:, 0] * torch.arange(T)).sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, exact.weight.grad.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), inputs.grad, rtol=2**-8, atol=1e-6)


# --- choices from outside -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"select_by": "logits"}, {"score": "sigmoid", "select_by": "logits"},
                                     {"num_groups": 3, "group_topk": 2, "expert_bias": True}])  # fmt: skip
def test_a_given_choice(options):
    router, x = build(**options).router, tokens()
    own = router(x)
    assert torch.equal(router.indices, own.indices) and not router.indices.requires_grad
    assert torch.equal(router.tokens_per_expert, own.tokens_per_expert)
    router.given = own.indices
    replayed = router(x)
    torch.testing.assert_close(replayed.weights, own.weights)
    other = (own.indices + 1) % E
    explicit = router(x, indices=other)  # wins over what is given
    assert torch.equal(explicit.indices, other) and torch.equal(router.indices, other)
    router.given = None
    assert torch.equal(router(x).indices, own.indices)
    explicit.weights.square().sum().backward()
    assert router.weight.grad.abs().max() > 1e-4


def test_the_layer_takes_a_choice_in_the_shape_of_its_tokens():
    layer, x = build(), tokens(2, 5)
    indices = torch.randint(E, (2, 5, K), generator=torch.Generator().manual_seed(1))
    indices[..., 1] = (indices[..., 0] + 1) % E
    out = layer(x, indices=indices)
    assert torch.equal(layer.router.indices, indices.view(-1, K))
    layer.router.given = indices.view(-1, K)
    torch.testing.assert_close(layer(x), out, rtol=0, atol=0)


def test_padding_goes_nowhere():
    layer = build(expert_bias=True, shared_intermediate=8, balance_coeff=0.1, z_coeff=0.1)
    x, mask = tokens(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    dirty = x.masked_fill(mask.unsqueeze(-1), 1e3)
    out = layer(x, padding_mask=mask)
    assert layer.router.expert_counts.sum() == 8 * K
    torch.testing.assert_close(out[mask], layer.shared(x[mask]))
    losses = layer.losses
    again = layer(dirty, padding_mask=mask)
    torch.testing.assert_close(again[~mask], out[~mask])
    assert losses.keys() == layer.losses.keys() == {"balance", "z"}
    for name, loss in losses.items():
        torch.testing.assert_close(layer.losses[name], loss)


# --- the bias that balances -------------------------------------------------------------------------------------------


def counted(layer: MoE) -> list[int]:
    return layer.router.expert_counts.tolist()


def test_counts_are_of_training_forwards_and_survive_accumulation():
    layer = build(expert_bias=True)
    layer.eval()
    layer(tokens())
    assert counted(layer) == [0] * E
    layer.train()
    expected = torch.zeros(E, dtype=torch.int64)
    for seed in range(3):
        layer(tokens(seed=seed)).sum().backward()
        expected += layer.router.indices.flatten().bincount(minlength=E)
    assert counted(layer) == expected.tolist() and expected.sum() == 3 * T * K
    bias = layer.router.expert_bias.clone()
    layer.router.update_bias(0.25)
    mean = expected.double().mean()
    torch.testing.assert_close(layer.router.expert_bias, bias + 0.25 * (mean - expected).sign().float())
    assert counted(layer) == [0] * E


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once(reentrant):
    layer, x = build(expert_bias=True, balance_coeff=0.1), tokens().requires_grad_()
    layer(x).square().sum().backward()
    expected, grad, router_grad = counted(layer), x.grad.clone(), layer.router.weight.grad.clone()
    layer.router.update_bias(0.0)
    x.grad = layer.router.weight.grad = None
    for _ in range(2):
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert counted(layer) == [2 * count for count in expected]
    torch.testing.assert_close(x.grad, 2 * grad)
    torch.testing.assert_close(layer.router.weight.grad, 2 * router_grad)


def test_the_bias_balances():
    """Loads that one direction of the tokens makes uneven become even by the bias alone."""
    layer = build(expert_bias=True, score="sigmoid").router
    layer.reset_parameters()
    x = tokens(512) + 2 * layer.weight.detach()[0]
    for _ in range(400):
        layer(x)
        layer.update_bias(2e-3)
    load = layer(x).tokens_per_expert.double()
    unbiased = moekit.route(x @ layer.weight.T, K, score="sigmoid").tokens_per_expert.double()
    assert unbiased.max() / unbiased.mean() > 1.5
    assert load.max() / load.mean() < 1.1


def test_loading_a_state_forgets_counts():
    layer, other = build(expert_bias=True), build(seed=1, expert_bias=True)
    layer(tokens())
    layer.load_state_dict(other.state_dict())
    assert counted(layer) == [0] * E and torch.equal(layer.router.expert_bias, other.router.expert_bias)


def test_counts_go_where_the_layer_goes_and_are_each_process_own():
    layer = build(expert_bias=True)
    assert "router.expert_counts" not in dict(layer.named_buffers())  # DistributedDataParallel broadcasts buffers
    layer(tokens())
    before = counted(layer)
    assert layer.half().router.expert_counts.dtype is torch.int64 and counted(layer) == before
    assert layer.to("meta").router.expert_counts.is_meta


def test_update_bias_needs_a_bias():
    with pytest.raises(ValueError, match=r"nn.Router.update_bias: the router must be made with expert_bias=True"):
        build().router.update_bias()


def test_accumulate_operator():
    total, counts = torch.tensor([1, 2]), torch.tensor([3, 4])
    torch.library.opcheck(torch.ops.moekit.accumulate.default, (total.clone(), counts))
    accumulate(total, counts)
    assert total.tolist() == [4, 6]
    with pytest.raises(ValueError, match="accumulate: counts must be of shape total's"):
        accumulate(total, counts[:1])
    with pytest.raises(TypeError, match="accumulate: total must be an int32 or int64"):
        accumulate(total.float(), counts)


# --- losses and jitter ------------------------------------------------------------------------------------------------


def test_losses_are_attached_in_training():
    coefficients = {"balance_coeff": 0.3, "sequence_balance_coeff": 0.2, "z_coeff": 0.1}
    layer, x = build(score="sigmoid", expert_bias=True, **coefficients), tokens(2, 5)
    layer.loss_scale = 4.0
    layer(x).sum().backward()
    found = layer.router.weight.grad.clone()
    routing = layer.router(x.view(-1, H))
    extra = {
        "balance": moekit.balance_loss(routing, 0.3),
        "sequence_balance": moekit.sequence_balance_loss(routing, 0.2, sequences=2),
        "z": moekit.z_loss(routing, 0.1),
    }
    for name, loss in extra.items():
        torch.testing.assert_close(layer.losses[name], loss.detach())
        assert loss > 0.01
    layer.zero_grad()
    layer.eval()
    out = layer(x)
    (out.sum() + 4 * sum(extra.values())).backward()
    torch.testing.assert_close(found, layer.router.weight.grad)
    layer.zero_grad()
    layer(x).sum().backward()
    assert (found - layer.router.weight.grad).abs().max() > 1e-3


def test_packed_sequences():
    layer, x = build(sequence_balance_coeff=0.2), tokens()
    layer(x, sequences=torch.tensor([0, 3, T]))
    routing = layer.router(x)
    expected = moekit.sequence_balance_loss(routing, 0.2, sequences=torch.tensor([0, 3, T]))
    torch.testing.assert_close(layer.losses["sequence_balance"], expected.detach())


def test_jitter_is_the_routers_alone_and_of_training():
    layer, x = build(jitter=0.3), tokens()
    layer.eval()
    out, logits = layer(x), layer.router(x).scored.logits
    layer.train()
    torch.manual_seed(5)
    noisy = layer.router(x).scored.logits
    torch.manual_seed(5)
    assert torch.equal(layer.router(x).scored.logits, noisy)
    bound = 0.3 * x.abs() @ layer.router.weight.detach().abs().T
    assert ((noisy - logits).abs() <= bound + 1e-6).all() and (noisy - logits).abs().max() > 1e-2
    layer.router.given = layer.eval().router(x).indices
    layer.train()
    torch.manual_seed(6)
    weights = layer.router(x).weights
    torch.manual_seed(6)
    given = (layer.router.given, weights)
    torch.testing.assert_close(layer(x), moekit.experts(x, given, layer.experts.gate_up, layer.experts.down))
    assert not torch.equal(layer(x), out)


# --- compilers, transforms, shards ------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["deepseek", "qwen2", "null"])
def test_compiles_in_one_graph(name):
    layer = build(**VARIANTS[name], balance_coeff=0.1)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = tokens(2, 5, seed=seed)
        outs = [each(x) for each in (plain, compiled)]
        for out in outs:
            out.square().sum().backward()
        torch.testing.assert_close(outs[1], outs[0])
        assert torch.equal(layer.router.indices, plain.router.indices)
    for (key, ours), theirs in zip(layer.named_parameters(), plain.parameters(), strict=True):
        bound = 2e-6 * float(theirs.grad.abs().max())  # sums in another order
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=bound, msg=lambda m, k=key: f"{k}: {m}")
    if layer.router.expert_counts is not None:
        assert counted(layer) == counted(plain) and sum(counted(layer)) == 2 * T * K
    torch.testing.assert_close(layer.losses["balance"], plain.losses["balance"])


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_any_number_of_tokens():
    layer = build(score="sigmoid", balance_coeff=0.1, z_coeff=0.1, shared_intermediate=8)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 5), (3, 7), (4, 11)):
        with torch.compiler.set_stance("default" if shape == (2, 5) else "fail_on_recompile"):
            out = compiled(tokens(*shape))
        torch.testing.assert_close(out, plain(tokens(*shape)))


def test_exports():
    layer, x = build(score="sigmoid", expert_bias=True, shared_intermediate=8).eval(), tokens(2, 5)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("inside", [True, False])
def test_compiled_and_checkpointed_counts_once(inside):
    layer, x = build(expert_bias=True), tokens()
    if inside and not hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        pytest.skip("this release of PyTorch does not checkpoint what leaves attributes behind in compiled code")
    if inside:
        setting = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
        model = torch.compile(Checkpointed(layer), fullgraph=True, backend="aot_eager")
    else:
        setting = contextlib.nullcontext()
        model = Checkpointed(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    with setting:
        model(x).square().sum().backward()
    assert counted(layer) == layer.router.indices.flatten().bincount(minlength=E).tolist()
    assert layer.router.weight.grad.abs().max() > 1e-3


def test_functional_gradients():
    layer, x = build(expert_bias=True).double(), tokens(dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name], parameter.grad)
    assert sum(counted(layer)) == 2 * T * K


@pytest.fixture
def mesh(tmp_path):
    """One gloo rank."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # on any module whose output is a view
@pytest.mark.parametrize("narrow", [False, True])
def test_fully_sharded(mesh, narrow):
    """Parameters become shards and are whole again within the layer; the router's stay in float32."""
    fsdp, world = pytest.importorskip("torch.distributed.fsdp"), torch.distributed.group.WORLD
    layer = build(expert_bias=True, balance_coeff=0.1, shared_intermediate=8)
    plain, x = copy.deepcopy(layer), tokens()
    layer.balance_group = world
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16 if narrow else None)
    fsdp.fully_shard(layer.router, mesh=mesh)
    fsdp.fully_shard(layer, mesh=mesh, mp_policy=policy)
    if narrow:
        plain, x = plain.bfloat16(), x.bfloat16()
    for each in (plain, layer):
        each(x).float().square().sum().backward()
    tolerance = {"rtol": 2**-7, "atol": 2**-7} if narrow else {}
    for name in ("experts.down", "experts.gate_up", "shared.down", "router.weight"):
        found, expected = (dict(each.named_parameters())[name].grad for each in (layer, plain))
        assert name != "router.weight" or found.dtype is torch.float32
        torch.testing.assert_close(found.full_tensor(), expected.to(found.dtype), **tolerance)
    layer.router.update_bias(group=world)
    plain.router.update_bias()
    assert torch.equal(layer.router.expert_bias, plain.router.expert_bias)


@pytest.mark.usefixtures("mesh")
def test_data_parallel_leaves_counts_alone():
    layer = build(expert_bias=True)
    parallel = nn.parallel.DistributedDataParallel(layer)
    for seed in range(2):
        parallel(tokens(seed=seed)).sum().backward()
    assert sum(counted(layer)) == 2 * T * K


# --- what a module is -------------------------------------------------------------------------------------------------


def test_names_in_the_state_dict():
    layer = build(expert_bias=True, logit_bias=True, bias=True, shared_intermediate=8, shared_gate=True, expert_scale=True)
    assert list(layer.state_dict()) == [
        "router.weight", "router.bias", "router.expert_scale", "router.expert_bias",
        "experts.gate_up", "experts.down", "experts.gate_up_bias", "experts.down_bias",
        "shared.gate_up", "shared.down", "shared.gate_up_bias", "shared.down_bias", "shared.gate",
    ]  # fmt: skip
    assert list(build().state_dict()) == ["router.weight", "experts.gate_up", "experts.down"]
    with pytest.raises(RuntimeError, match=r"Missing key.*router.expert_bias"):
        layer.load_state_dict({name: v for name, v in layer.state_dict().items() if name != "router.expert_bias"})
    with pytest.raises(RuntimeError, match=r"size mismatch for experts.down"):
        layer.load_state_dict({**layer.state_dict(), "experts.down": torch.zeros(E, H, I + 1)})


def test_meta_then_empty_then_drawn(poisoned):
    with torch.device("meta"):
        layer = MoE.build(H, I, E, K, expert_bias=True, expert_scale=True, bias=True, shared_intermediate=8)
    assert {value.device.type for value in [*layer.parameters(), *layer.buffers()]} == {"meta"}
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    made = MoE.build(H, I, E, K, expert_bias=True, expert_scale=True, bias=True, shared_intermediate=8)
    for (name, value), other in zip(layer.state_dict().items(), made.state_dict().values(), strict=True):
        assert torch.equal(value, other) and value.isfinite().all(), name
    for weight in (made.router.weight, made.experts.gate_up, made.experts.down, made.shared.down):
        bound = weight.shape[-1] ** -0.5
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert counted(layer) == [0] * E and (made.router.expert_scale == 1).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_on_meta_and_in_fakes(name):
    with torch.device("meta"):
        layer, x = MoE.build(H, I, E, K, balance_coeff=0.1, **VARIANTS[name]), torch.empty(2, 5, H)
    assert layer(x).shape == (2, 5, H) and layer(x).is_meta
    with torch._subclasses.FakeTensorMode():
        fake = MoE.build(H, I, E, K, balance_coeff=0.1, **VARIANTS[name])
        assert fake(torch.empty(2, 5, H)).shape == (2, 5, H)


def test_assigning_to_a_module_on_meta():
    state = build(expert_bias=True).state_dict()
    with torch.device("meta"):
        layer = MoE.build(H, I, E, K, expert_bias=True)
    layer.load_state_dict(state, assign=True)
    layer(tokens())
    assert sum(counted(layer)) == T * K


@pytest.mark.parametrize("make", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(make):
    layer, x = build(expert_bias=True, shared_intermediate=8, balance_coeff=0.1), tokens()
    out = layer(x)
    twin = make(layer)
    assert twin.router.indices is None and layer.router.indices is not None
    torch.testing.assert_close(twin(x), out, rtol=0, atol=0)
    assert counted(twin) == [2 * count for count in counted(layer)]


def test_what_it_prints():
    layer = MoE.build(8, 4, 4, 2, score="sigmoid", expert_bias=True, scale=2.5, clamp=7.0, shared_intermediate=6,
                      balance_coeff=0.1, null_experts=1)  # fmt: skip
    assert repr(layer).split("\n") == [
        "MoE(",
        "  balance_coeff=0.1, null_experts=1",
        "  (router): Router(hidden=8, num_experts=5, k=2, score='sigmoid', scale=2.5, expert_bias=True)",
        "  (experts): Experts(num_experts=4, hidden=8, intermediate=4, activation='silu', clamp=7.0)",
        "  (shared): SharedExpert(hidden=8, intermediate=6, activation='silu', clamp=7.0)",
        ")",
    ]


# --- errors -----------------------------------------------------------------------------------------------------------

X = tokens()
BAD = {
    "k": (lambda: Router(H, 4, 5), ValueError, "nn.Router: k must be at most the number of experts (4), got 5"),
    "option": (lambda: Router(H, 4, 2, score="argmax"), ValueError, "route: score must be one of"),
    "unused": (lambda: Router(H, 4, 2, group_topk=1), ValueError, "group"),
    "jitter": (lambda: Router(H, 4, 2, jitter=0.0), ValueError, "nn.Router: jitter must be above 0 and below 1"),
    "dtype": (lambda: Router(H, 4, 2, dtype=torch.bfloat16), ValueError, "dtype must be float32 or float64"),
    "tokens": (lambda: Router(H + 1, 4, 2)(X), ValueError, "nn.Router: x must be of shape [tokens, 17]"),
    "integers": (lambda: Router(H, 4, 2)(X.long()), TypeError, "nn.Router: x must be a floating-point tensor"),
    "save": (lambda: Experts(4, H, I, save="none"), ValueError, "nn.Experts: save must be one of"),
    "alpha": (lambda: Experts(4, H, I, alpha=1.0), ValueError, "nn.Experts: alpha=1.0 has no effect"),
    "width": (lambda: Experts(4, H, 0), ValueError, "nn.Experts: intermediate must be at least 1"),
    "shared": (lambda: SharedExpert(H, I, activation="x"), ValueError, "nn.SharedExpert: activation must be one of"),
    "parts": (lambda: MoE(Router(H, 4, 2), Experts(5, H, I)), ValueError, "router must be of 5 experts"),
    "hidden": (lambda: MoE(Router(H + 2, 4, 2), Experts(4, H, I)), ValueError, "router must be of hidden size 16"),
    "kind": (lambda: MoE(nn.Linear(H, 4), Experts(4, H, I)), TypeError, "router must be a moekit.nn.Router"),
    "coefficient": (lambda: build(z_coeff=-1), ValueError, "z_coeff must be at least 0"),
    "pad": (lambda: build(null_experts=1, capacity=4, overflow="pad"), ValueError, "has no effect with null experts"),
    "name": (lambda: build(colour="red"), TypeError, "got colour"),
    "gate": (lambda: build(shared_gate=True), ValueError, "has no effect without shared_intermediate"),
    "sequences": (lambda: build()(X, sequences=2), ValueError, "has no effect without sequence_balance_coeff"),
    "shape": (lambda: build()(X[:, 1:]), ValueError, "nn.MoE: x must be of shape [..., 16]"),
    "mask": (lambda: build()(X, padding_mask=torch.zeros(3, dtype=torch.bool)), ValueError, "nn.MoE: padding_mask"),
    "indices": (lambda: build()(X, indices=torch.zeros(3, 2, dtype=torch.int64)), ValueError, "nn.MoE: indices"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, kind, text = BAD[name]
    with pytest.raises(kind) as error:
        call()
    assert text in str(error.value)
