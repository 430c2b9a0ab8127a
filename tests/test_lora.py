"""Adapters inside ``moekit.experts``: values and gradients against float64 formulas, what is kept, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moekit
from moekit import Lora

pytestmark = pytest.mark.usefixtures("backend")
E, H, I, T, K, R = 4, 64, 32, 11, 2, 3
FORMATS = (None, "nf4", "mxfp4", "fp8", "int8")
FACTORS = {"gate_up": ((E, R, H), (E, 2 * I, R)), "down": ((E, R, I), (E, H, R))}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(dtype: torch.dtype, format: str | None = None) -> list:
    """gate_up and down, packed or not."""
    dense = [draw(1, E, 2 * I, H, dtype=dtype) / 8, draw(2, E, H, I, dtype=dtype) / 6]
    return dense if format is None else [moekit.pack(weight, format) for weight in dense]


def factors(dtype: torch.dtype, seed: int = 3) -> dict[str, list]:
    return {
        name: [draw(seed + 2 * i + j, *shape, dtype=dtype).requires_grad_() for j, shape in enumerate(shapes)]
        for i, (name, shapes) in enumerate(FACTORS.items())
    }


def routed(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, indices (one slot of no expert, expert 3 without tokens) and routing weights."""
    indices = torch.stack([torch.randperm(E - 1, generator=torch.Generator().manual_seed(t))[:K] for t in range(T)])
    indices[4, 1] = -1
    return draw(9, T, H, dtype=dtype).requires_grad_(), indices, draw(10, T, K, dtype=dtype).requires_grad_()


def dense_of(weight, dtype):
    return weight.unpack(dtype=dtype) if isinstance(weight, moekit.PackedExperts) else weight


def formula(x, indices, routing_weights, gate_up, down, deltas=(0.0, 0.0)):
    """Slot by slot, with whole ``W + scale * B A``."""
    out = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for slot in range(K):
            expert = indices[token, slot]
            if expert < 0:
                continue
            gate, up = ((gate_up + deltas[0])[expert] @ x[token]).chunk(2)
            act = torch.nn.functional.silu(gate) * up
            total = total + routing_weights[token, slot] * ((down + deltas[1])[expert] @ act)
        out.append(total)
    return torch.stack(out)


def leaves_of(x, routing_weights, *named: dict) -> list:
    return [x, routing_weights, *(factor for both in named for pair in both.values() for factor in pair)]


def assert_near(found, wanted, tolerance: float) -> None:
    """Relative to the largest number of a tensor, as sums are rounded: what cancels to a small one has the same error."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.abs().max() > 0.1
        assert (ours.to(theirs) - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_values_and_gradients(format, dtype, tolerance, transposed):
    gate_up, down = weights(dtype, format)
    (x, indices, p), pairs = routed(dtype), factors(dtype)
    lora = {"gate_up": Lora(*pairs["gate_up"], 0.5), "down": Lora(*pairs["down"], 2.0)}
    given = (gate_up.mT, down.mT) if transposed else (gate_up, down)
    out = moekit.experts(x, (indices, p), *given, lora=lora, transposed=transposed)
    leaves = leaves_of(x, p, pairs)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    deltas = [scale * wide[i + 1] @ wide[i] for i, scale in ((2, 0.5), (4, 2.0))]
    expected = formula(wide[0], indices, wide[1], dense_of(gate_up, dtype).double(), dense_of(down, dtype).double(), deltas)
    direction = draw(20, T, H)
    found = torch.autograd.grad(out, leaves, direction.to(dtype))
    assert_near((out, *found), (expected, *torch.autograd.grad(expected, wide, direction)), tolerance)
    assert not any(grad[3].any() for grad in found[2:])  # an expert without tokens


def test_several_adapters_are_their_sum():
    gate_up, down = weights(torch.float64, "nf4")
    (x, indices, p), first, second = routed(torch.float64), factors(torch.float64), factors(torch.float64, 30)
    lora = {name: [Lora(*first[name], 0.5), Lora(*second[name], -3.0)] for name in FACTORS}
    out = moekit.experts(x, (indices, p), gate_up, down, lora=lora)
    deltas = [0.5 * first[name][1] @ first[name][0] - 3.0 * second[name][1] @ second[name][0] for name in FACTORS]
    expected = formula(x, indices, p, gate_up.unpack(), down.unpack(), deltas)
    leaves, direction = leaves_of(x, p, first, second), draw(20, T, H)
    found, wanted = (torch.autograd.grad(y, leaves, direction) for y in (out, expected))
    assert_near((out, *found), (expected, *wanted), 1e-13)


@pytest.mark.parametrize("save", ["recompute", "all", "fp8"])
@pytest.mark.parametrize("options", [{"weight_after_down": True}, {"layout": "interleaved", "clamp": 2.0}])
def test_beside_other_options(save, options):
    """What a dense weight with the sum in it gives."""
    (x, indices, p), pairs = routed(torch.float64), factors(torch.float64)
    dense, lora = weights(torch.float64), {name: Lora(*pairs[name], 0.5) for name in FACTORS}
    biases = {"gate_up_bias": draw(40, E, 2 * I), "down_bias": draw(41, E, H)}
    sums = [w + 0.5 * pairs[name][1] @ pairs[name][0] for w, name in zip(dense, FACTORS, strict=True)]
    leaves, direction = leaves_of(x, p, pairs), draw(20, T, H)
    out = moekit.experts(x, (indices, p), *dense, lora=lora, save=save, **biases, **options)
    expected = moekit.experts(x, (indices, p), *sums, save=save, **biases, **options)
    assert_near([out], [expected], 1e-12)
    found, wanted = (torch.autograd.grad(y, leaves, direction) for y in (out, expected))
    assert_near(
        found, wanted, 2**-4 if save == "fp8" else 1e-12
    )  # in float8, the rounding of two nearly equal numbers may differ


@pytest.mark.parametrize("wanted", [("gate_up", 0), ("gate_up", 1), ("down", 0), ("down", 1)])
def test_one_gradient_alone(wanted):
    gate_up, down = weights(torch.float64)
    (x, indices, p), pairs = routed(torch.float64), factors(torch.float64)
    lora = {name: Lora(*pairs[name], 0.5) for name in FACTORS}
    all_of_them = torch.autograd.grad(moekit.experts(x, (indices, p), gate_up, down, lora=lora).sum(), pairs[wanted[0]])
    frozen = {name: Lora(pairs[name][0].detach(), pairs[name][1].detach(), 0.5) for name in FACTORS}
    pair = [factor.detach() for factor in pairs[wanted[0]]]
    pair[wanted[1]].requires_grad_()
    frozen[wanted[0]] = Lora(*pair, 0.5)
    out = moekit.experts(x.detach(), (indices, p.detach()), gate_up, down, lora=frozen)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), pair[wanted[1]])[0], all_of_them[wanted[1]])


def test_forward_mode_and_batched_gradients():
    gate_up, down = weights(torch.float64, "nf4")
    (x, indices, p), pairs = routed(torch.float64), factors(torch.float64)
    leaves = [leaf.detach() for leaf in leaves_of(x, p, pairs)]

    def run(x, p, *factors):
        lora = {"gate_up": Lora(factors[0], factors[1], 0.5), "down": Lora(factors[2], factors[3], 2.0)}
        return moekit.experts(x, (indices, p), gate_up, down, lora=lora)

    tangents = tuple(draw(50 + i, *leaf.shape) for i, leaf in enumerate(leaves))
    tangent = torch.func.jvp(run, tuple(leaves), tangents)[1]
    direction = draw(60, T, H)
    pulled = torch.func.vjp(run, *leaves)[1](direction)
    along = sum((grad * t).sum() for grad, t in zip(pulled, tangents, strict=True))
    torch.testing.assert_close((tangent * direction).sum(), along, rtol=1e-10, atol=1e-10)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = run(*leaves)
    batched = torch.autograd.grad(out, leaves, torch.stack([direction, -direction]), is_grads_batched=True)
    for both, one in zip(batched, pulled, strict=True):
        torch.testing.assert_close(both, torch.stack([one, -one]))


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropping(seed: int, dropout: float, gate_up, down, x, indices, p, pairs):
    torch.manual_seed(seed)
    return moekit.experts(x, (indices, p), gate_up, down, lora={n: Lora(*pairs[n], 0.5, dropout) for n in FACTORS})


def test_dropout_is_seeded_and_the_same_in_backward():
    gate_up, down = weights(torch.float64)
    (x, indices, p), pairs = routed(torch.float64), factors(torch.float64)
    args = (gate_up, down, x, indices, p, pairs)
    out = dropping(0, 0.5, *args)
    assert torch.equal(out, dropping(0, 0.5, *args))
    assert not torch.equal(out, dropping(1, 0.5, *args))
    # The function is linear in each B: the gradient says what it says only if backward drops what forward has dropped.
    for name in FACTORS:
        factor, step = pairs[name][1], draw(70, *pairs[name][1].shape)
        moved = {**pairs, name: [pairs[name][0], factor + 1e-3 * step]}
        if name == "down":
            change = (dropping(0, 0.5, *args[:-1], moved) - out).sum() / 1e-3
            torch.testing.assert_close(
                change, (torch.autograd.grad(out.sum(), factor)[0] * step).sum(), rtol=1e-8, atol=1e-8
            )
    for leaf in leaves_of(x, p, pairs):  # central differences in a random direction
        step = draw(71, *leaf.shape)
        (grad,) = torch.autograd.grad(dropping(0, 0.5, *args).sum(), leaf)
        with torch.no_grad():
            leaf.add_(step, alpha=1e-5)
            above = dropping(0, 0.5, *args).sum()
            leaf.sub_(step, alpha=2e-5)
            below = dropping(0, 0.5, *args).sum()
            leaf.add_(step, alpha=1e-5)
        torch.testing.assert_close((above - below) / 2e-5, (grad * step).sum(), rtol=1e-6, atol=1e-7)


def test_dropout_keeps_the_mean_and_drops_the_share():
    x = torch.ones(4096, 8)
    gate_up, down = torch.zeros(1, 16, 8), torch.eye(8)[None]
    A, B = torch.eye(8)[None], torch.cat([torch.eye(8), torch.eye(8)])[None]
    indices, p = torch.zeros(4096, 1, dtype=torch.long), torch.ones(4096, 1)
    torch.manual_seed(0)
    lora = {"gate_up": Lora(A, B, 1.0, 0.25)}
    out = moekit.experts(x, (indices, p), gate_up, down, lora=lora, activation="relu")
    assert set(out.unique().tolist()) == {0.0, out.max().item()}
    assert abs(out.max().item() - (1 / 0.75) ** 2) < 1e-6
    assert abs((out == 0).float().mean().item() - 0.25) < 0.01


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_drops_the_same(use_reentrant):
    gate_up, down = weights(torch.float64, "int8")
    (x, indices, p), pairs = routed(torch.float64), factors(torch.float64)
    lora = {n: Lora(*pairs[n], 0.5, 0.5) for n in FACTORS}
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        run = lambda x: moekit.experts(x, (indices, p), gate_up, down, lora=lora)  # noqa: E731
        out = checkpoint(run, x, use_reentrant=use_reentrant) if recompute else run(x)
        leaves = leaves_of(x, p, pairs)
        for leaf in leaves:
            leaf.grad = None
        out.sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


# --- memory -------------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The largest floating tensors of a stack's shape that come into being."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            stack = isinstance(tensor, torch.Tensor) and tensor.dim() == 3 and tensor.shape[0] == E
            if stack and tensor.is_floating_point() and set(tensor.shape[1:]) in ({2 * I, H}, {H, I}):
                self.seen.append((str(func), tuple(tensor.shape)))
        return out


@pytest.mark.parametrize("format", FORMATS)
def test_no_stack_is_ever_made(format):
    gate_up, down = weights(torch.float32, format)
    (x, indices, p), pairs = routed(torch.float32), factors(torch.float32)
    with Watch() as watch:
        out = moekit.experts(x, (indices, p), gate_up, down, lora={n: Lora(*pairs[n]) for n in FACTORS})
        out.sum().backward()
    assert pairs["gate_up"][0].grad is not None
    assert not watch.seen


@pytest.mark.parametrize("format", [None, "nf4"])
def test_kept_for_backward_is_the_dense_step_and_one_product(format):
    """``[R, r]`` of gate_up; nothing of the packed weights."""

    def kept(lora, *given):
        x, indices, p = routed(torch.float32)
        own, found = {w.data_ptr() for w in (x, p, *given) if type(w) is torch.Tensor}, []
        own |= {factor.data_ptr() for pair in (lora or {}).values() for factor in pair[:2]}

        def note(tensor):
            if tensor.numel() and tensor.data_ptr() not in own:
                found.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            moekit.experts(x, (indices, p), *given, lora=lora)
        return sum(found)

    pairs = factors(torch.float32)
    lora = {n: Lora(*pairs[n]) for n in FACTORS}
    assert kept(lora, *weights(torch.float32, format)) == kept(None, *weights(torch.float32)) + T * K * R * 4


# --- bad input ----------------------------------------------------------------------------------------------------------


def given(**changed):
    pairs = factors(torch.float32)
    lora = {"gate_up": Lora(*pairs["gate_up"]), "down": Lora(*pairs["down"])}
    gate_up, down = weights(torch.float32)
    arguments = {"gate_up": gate_up, "down": down, "lora": lora}
    return arguments | changed


A, B = torch.zeros(E, R, H), torch.zeros(E, 2 * I, R)
BAD = {
    "no dict": ({"lora": [Lora(A, B)]}, TypeError, "lora must be a dict of 'gate_up' and 'down', got list"),
    "unknown weight": ({"lora": {"up": Lora(A, B)}}, ValueError, "lora must be one of 'gate_up', 'down', got 'up'"),
    "a pair": ({"lora": {"gate_up": (A, B)}}, TypeError, r"lora\['gate_up'\]\[0\] must be a moekit.Lora .*, got Tensor"),
    "2-D": ({"lora": {"gate_up": Lora(A[0], B)}}, ValueError, r"lora\['gate_up'\].A must be a 3-D tensor"),
    "rank": (
        {"lora": {"gate_up": Lora(A, B[:, :, :2])}},
        ValueError,
        r"lora\['gate_up'\].B must be of shape .* \[4, 64, 3\]",
    ),
    "no rank": ({"lora": {"gate_up": Lora(A[:, :0], B[:, :, :0])}}, ValueError, "rank of .* must be at least 1, got 0"),
    "inputs": ({"lora": {"gate_up": Lora(A[:, :, :5], B)}}, ValueError, r"A must be of shape .*, got shape \[4, 3, 5\]"),
    "other weight's": ({"lora": {"down": Lora(A, B)}}, ValueError, r"lora\['down'\].A must be of shape .* \[4, 3, 32\]"),
    "experts": ({"lora": {"gate_up": [Lora(A, B), Lora(A[:2], B[:2])]}}, ValueError, r"lora\['gate_up'\]\[1\].A must be"),
    "integers": ({"lora": {"gate_up": Lora(A.int(), B)}}, TypeError, "A must be a floating-point tensor"),
    "scale": ({"lora": {"gate_up": Lora(A, B, float("inf"))}}, ValueError, "scale must be finite, got inf"),
    "scale type": ({"lora": {"gate_up": Lora(A, B, "2")}}, TypeError, "scale must be a number, got str"),
    "dropout": ({"lora": {"gate_up": Lora(A, B, 1.0, 1.0)}}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
    "device": ({"lora": {"gate_up": Lora(A.to("meta"), B)}}, ValueError, "must be on the device of hidden_states"),
    "trained": ({"gate_up": weights(torch.float32)[0].requires_grad_()}, ValueError, "gate_up must be frozen .* adapter"),
}


@pytest.mark.reference_only("what is checked before any backend")
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, error, message = BAD[name]
    x, indices, p = routed(torch.float32)
    with pytest.raises(error, match=message):
        moekit.experts(x, (indices, p), **given(**changed))


@pytest.mark.reference_only("no operator")
def test_scales_of_alpha():
    assert Lora.of_alpha(A, B, 6.0).scale == 2.0
    assert Lora.of_alpha(A, B, 6.0, rank_stabilised=True).scale == pytest.approx(6 / 3**0.5)
    assert Lora.of_alpha(A, B, 6.0, dropout=0.1).dropout == 0.1


# --- merging ------------------------------------------------------------------------------------------------------------


@pytest.mark.reference_only("packs and unpacks; no backend differs")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_merge(format, transposed):
    weight = weights(torch.float32, format)[0]
    pairs, others = (tuple(f.detach() for f in factors(torch.float32, seed)["gate_up"]) for seed in (3, 30))
    lora = [Lora(*pairs, 0.25), Lora(*others, -0.5)]
    merged, lost = moekit.merge(weight.mT if transposed else weight, lora, transposed=transposed)
    exact = dense_of(weight, torch.float64) + sum(one.scale * one.B.double() @ one.A.double() for one in lora)
    values = dense_of(merged, torch.float64)
    values = values.mT if transposed else values
    assert lost == pytest.approx(float((values - exact).norm() / exact.norm()), rel=1e-3, abs=1e-7)
    assert lost < {None: 1e-7, "nf4": 0.12, "mxfp4": 0.15, "fp8": 0.04, "int8": 0.02}[format]
    assert type(merged) is type(weight) and merged.dtype == weight.dtype and not merged.requires_grad
    if format:
        again = moekit.pack(exact.float(), format)
        assert merged.format == format and merged.turned == transposed
        off = (values - again.unpack(dtype=torch.float64)).abs() > 1e-6 * values.abs().max()
        assert off.float().mean() < 1e-3  # a sum in float32 may be on the other side of a code's limit


@pytest.mark.reference_only("no operator")
def test_merge_keeps_double_quantisation_and_refuses_what_does_not_fit():
    weight, pairs = moekit.pack(weights(torch.float32)[0], "nf4", double_quant=True), factors(torch.float32)
    merged, _ = moekit.merge(weight, Lora(*pairs["gate_up"], 0.1))
    assert len(merged.stored().scales) == 3
    with pytest.raises(ValueError, match=r"lora\['weight'\].A must be of shape"):
        moekit.merge(weight, Lora(*pairs["down"]))
    with pytest.raises(TypeError, match="weight must be a floating-point tensor"):
        moekit.merge(torch.zeros(2, 3, 4, dtype=torch.int8), Lora(*pairs["down"]))
