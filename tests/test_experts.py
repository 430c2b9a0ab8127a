"""moekit.experts against a loop over tokens, and what it keeps for backward."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from _interpreter import RUNS
from _memory import peak_bytes, saved_bytes
from _reference import OPCHECKS, assert_accurate, draw, opcheck, transposed, value_and_grads
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moekit
from moekit import Routing, experts
from moekit.ops import experts_backward
from moekit.ops.gemm import grouped_outer, grouped_rows
from moekit.ops.packed_products import packed_rows

pytestmark = pytest.mark.usefixtures("backend")

SIZES = T, E, K, H, I = 11, 5, 3, 10, 6
SMALL = 4, 3, 2, 3, 2  # gradcheck computes the layer twice for each element
ACTS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: torch.relu(x).square(),
}


def loop(
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    indices: Tensor,
    activation: str = "silu",
    layout: str = "concatenated",
    transposed: bool = False,
    clamp: float | None = None,
    linear_offset: float = 0.0,
) -> Tensor:
    """The layer, one token and one expert at a time."""
    out = [x[t] * 0 for t in range(x.shape[0])]
    for t, k in itertools.product(range(x.shape[0]), range(indices.shape[1])):
        e = int(indices[t, k])
        if not 0 <= e < gate_up.shape[0]:
            continue
        first, second = (gate_up[e], down[e]) if transposed else (gate_up[e].T, down[e].T)
        h = x[t] @ first
        h = h if gate_up_bias is None else h + gate_up_bias[e]
        if layout == "ungated":
            act = ACTS[activation](h)
        else:
            gate, up = (h[0::2], h[1::2]) if layout == "interleaved" else h.chunk(2)
            if clamp is not None:
                gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
            act = ACTS[activation](gate) * (up + linear_offset)
        y = act @ second
        out[t] = out[t] + weights[t, k] * (y if down_bias is None else y + down_bias[e])
    return torch.stack(out) if out else x * 0


def make(
    *,
    layout: str = "concatenated",
    transposed: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, ...] = SIZES,
) -> dict[str, Tensor | None]:
    T, E, K, H, I = sizes
    width = I if layout == "ungated" else 2 * I
    shapes = {"gate_up": (E, H, width), "down": (E, I, H)}
    if not transposed:
        shapes = {name: (e, n, k) for name, (e, k, n) in shapes.items()}
    return {
        "x": draw(1, T, H, dtype=dtype),
        "weights": draw(2, T, K, dtype=dtype).abs(),
        "gate_up": draw(3, *shapes["gate_up"], dtype=dtype, scale=0.5),
        "down": draw(4, *shapes["down"], dtype=dtype, scale=0.5),
        "gate_up_bias": draw(5, E, width, dtype=dtype) if bias else None,
        "down_bias": draw(6, E, H, dtype=dtype) if bias else None,
    }


def choose(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> Tensor:
    T, E, K, *_ = sizes
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])


def ours(indices: Tensor, **options):
    def run(x, weights, gate_up, down, gate_up_bias=None, down_bias=None):
        return experts(x, (indices, weights), gate_up, down, gate_up_bias=gate_up_bias, down_bias=down_bias, **options)

    return run


def agrees(indices: Tensor, inputs: dict[str, Tensor | None], options: dict, save: str = "recompute", **more) -> None:
    rows = inputs["x"].shape[0]
    grad = draw(9, rows, H)
    exact = {name: None if v is None else v.double() for name, v in inputs.items()}
    expected = value_and_grads(lambda **i: loop(**i, indices=indices, **options), exact, grad)
    actual = value_and_grads(ours(indices, save=save, **options, **more), inputs, grad.to(inputs["x"].dtype))
    largest = 4.0 * expected[0].abs().max().item() if rows else 1.0
    # Two matrix products lie between input and output, so an error is a share of the terms' size, not of the sum.
    roundings = 8 if inputs["x"].dtype in (torch.bfloat16, torch.float16) else 0
    eps = torch.finfo(inputs["x"].dtype).eps
    for name, value in {"out": expected[0], **expected[1]}.items():
        got = actual[0] if name == "out" else actual[1][name]
        scale = max(float(value.abs().max()) if value.numel() else 0.0, 1e-3 * largest)
        if roundings:
            assert (got.double() - value).abs().max() <= roundings * eps * scale, name
        else:
            assert_accurate(got, value, scale=8 * scale, what=name)


FORMS = [
    ("concatenated", {"activation": "silu"}),
    ("interleaved", {"activation": "quick_gelu", "clamp": 0.75, "linear_offset": 1.0}),
    ("concatenated", {"activation": "gelu_tanh"}),
    ("ungated", {"activation": "relu2"}),
]


@pytest.mark.parametrize("save", ["recompute", "all"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("layout", "options"), FORMS)
def test_equals_the_loop(layout, options, is_transposed, bias, save):
    options = {**options, "layout": layout, "transposed": is_transposed}
    for dtype, after in ((torch.float64, False), (torch.float32, False), (torch.bfloat16, True)):
        inputs = make(layout=layout, transposed=is_transposed, bias=bias, dtype=dtype)
        agrees(choose(), inputs, options, save, weight_after_down=after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_keeps_the_output_and_nearly_the_gradients(dtype):
    inputs, indices, grad = make(dtype=dtype), choose(), draw(9, T, H, dtype=dtype)
    exact = value_and_grads(ours(indices), inputs, grad)
    stored = value_and_grads(ours(indices, save="fp8"), inputs, grad)
    assert torch.equal(stored[0], exact[0])
    for name, value in exact[1].items():
        error = (stored[1][name].double() - value.double()).norm() / value.double().norm()
        assert 0 < error < 0.15, (name, error)  # an element of e4m3 is off by up to 2**-4


def test_no_tokens():
    inputs = {**make(dtype=torch.float32), "x": torch.empty(0, H), "weights": torch.empty(0, K)}
    out, grads = value_and_grads(ours(torch.empty(0, K, dtype=torch.int64)), inputs, torch.empty(0, H))
    assert out.shape == (0, H)
    for name, grad in grads.items():
        assert grad.shape == inputs[name].shape
        assert not grad.any(), name


def test_an_empty_expert_has_zero_gradients(poisoned):
    indices = choose().masked_fill(choose() == 2, -1)
    inputs = make(dtype=torch.float32, bias=True)
    _, grads = value_and_grads(ours(indices), inputs, draw(9, T, H, dtype=torch.float32))
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        assert not grads[name][2].any(), name
        assert grads[name][[0, 1, 3, 4]].abs().flatten(1).sum(1).gt(0).all(), name


def test_no_token_routed_anywhere(poisoned):
    inputs = make(dtype=torch.float32, bias=True)
    out, grads = value_and_grads(ours(torch.full((T, K), -1)), inputs, draw(9, T, H, dtype=torch.float32))
    assert not out.any()
    assert all(grad is not None and not grad.any() for grad in grads.values())


@pytest.mark.parametrize("indices", [torch.zeros(T, 1), torch.arange(E).expand(T, E), torch.tensor([[4, 0]])])
def test_shapes_at_the_edge(indices):
    indices = indices.long()
    rows, k = indices.shape
    inputs = make()
    inputs.update(x=draw(1, rows, H), weights=draw(2, rows, k).abs())
    agrees(indices, inputs, {})


def test_rows_past_the_last_offset_never_matter(poisoned):
    indices = choose()
    indices[3:9] = -1
    indices[1, 0] = E + 4  # another rank's expert
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for _ in range(2):
            agrees(indices, make(dtype=dtype, bias=True), {})


def test_sentinel_weights_get_zero_gradients():
    indices = choose()
    indices[2, 1], indices[4, 0] = -1, E
    _, grads = value_and_grads(ours(indices), make(), draw(9, T, H))
    assert grads["weights"][2, 1] == 0 and grads["weights"][4, 0] == 0
    assert grads["weights"].ne(0).sum() == T * K - 2


def test_the_same_expert_twice_counts_twice():
    indices = choose()
    indices[0] = torch.tensor([1, 1, 3])
    agrees(indices, make(bias=True), {})


def test_strided_inputs():
    inputs = {name: transposed(v) if v is not None else None for name, v in make(dtype=torch.float32).items()}
    agrees(choose(), inputs, {})


def test_expanded_gradient():
    leaves = {n: v.requires_grad_() for n, v in make(dtype=torch.float32).items() if v is not None}
    ours(choose())(**leaves).sum().backward()
    _, expected = value_and_grads(ours(choose()), make(dtype=torch.float32), torch.ones(T, H))
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]), name


def test_converted_weights_agree():
    plain = make(bias=True)
    paired = dict(plain)
    for name, dim in (("gate_up", 1), ("gate_up_bias", 1)):
        gate, up = plain[name].chunk(2, dim)
        paired[name] = torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)
    a = ours(choose())(**plain)
    b = ours(choose(), layout="interleaved")(**paired)
    assert_accurate(b, a, what="interleaved")


def test_mixed_devices():
    inputs = make(dtype=torch.float32)
    inputs["down"] = inputs["down"].to("meta")
    with pytest.raises(ValueError, match=r"experts: down must be on the device of hidden_states \(cpu\), got meta"):
        ours(choose())(**inputs)


def test_weights_keep_their_dtype():
    inputs = {**make(dtype=torch.bfloat16), "weights": draw(2, T, K, dtype=torch.float32)}
    out, grads = value_and_grads(ours(choose()), inputs, draw(9, T, H, dtype=torch.bfloat16))
    assert out.dtype is torch.bfloat16
    assert grads["weights"].dtype is torch.float32


def test_autocast():
    inputs = make(dtype=torch.float32, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = value_and_grads(ours(choose()), inputs, draw(9, T, H, dtype=torch.bfloat16))
    assert out.dtype is torch.bfloat16
    assert all(grads[name].dtype is torch.float32 for name in inputs)
    expected = loop(**{n: v.double() for n, v in inputs.items()}, indices=choose())
    assert (out.double() - expected).norm() / expected.norm() < 2**-7


@pytest.mark.reference_only("float64 is computed by the reference on every backend")
@pytest.mark.parametrize(("layout", "options"), FORMS)
def test_gradcheck(layout, options, backend):
    inputs = [v.requires_grad_() for v in make(layout=layout, bias=True, sizes=SMALL).values() if v is not None]
    assert torch.autograd.gradcheck(ours(choose(sizes=SMALL), layout=layout, **options), inputs)


def test_double_backward_raises():
    inputs = [v.requires_grad_() for v in make().values() if v is not None]
    (grad,) = torch.autograd.grad(ours(choose())(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward does not exist.*'torch' backend"):
        grad.sum().backward()


def test_30_two_backwards_agree_and_leave_everything_alone():
    inputs = make(dtype=torch.float32, bias=True)
    leaves = {n: v.requires_grad_() for n, v in inputs.items()}
    before = {n: v.detach().clone() for n, v in leaves.items()}
    out = ours(choose())(**leaves)
    first = torch.autograd.grad(out.square().sum(), list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(before[n], v) for n, v in leaves.items())
    with pytest.raises(RuntimeError, match="second time"):
        out.square().sum().backward()


@pytest.mark.not_interpreted
@pytest.mark.parametrize("save", ["recompute", "fp8", "all"])
@moekit.backend("auto")  # the reference's gate makes float32 copies of all rows
def test_what_has_served_goes_before_the_end_of_backward(save):
    tokens, topk, hidden, inner, experts = 512, 4, 128, 32, 4
    rows = tokens * topk
    shapes = {"x": (tokens, hidden), "gate_up": (experts, 2 * inner, hidden), "down": (experts, hidden, inner)}
    leaves = {
        name: draw(place, *shape, dtype=torch.float32).requires_grad_() for place, (name, shape) in enumerate(shapes.items())
    }
    weights, indices = torch.rand(tokens, experts).topk(topk, -1)
    grad = torch.ones(tokens, hidden)

    def step() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        moekit.experts(leaves["x"], (indices, weights), leaves["gate_up"], leaves["down"], save=save).backward(grad)

    step()
    # The output, the gradient of x, one [R, H], one [R, 2I] and one [R, I]; and what does not grow with rows that are wide.
    bound = 4 * (2 * tokens * hidden + rows * (hidden + 2 * inner + inner)) + 64 * rows + 4 * 3 * experts * hidden * inner
    assert peak_bytes(step) <= bound + (4 * rows * hidden if save == "all" else 0)


@pytest.mark.parametrize("save", ["recompute", "all"])
def test_rows_that_two_products_share_change_nothing(save, monkeypatch):
    base, indices = make(dtype=torch.float32, bias=True), choose()

    def gradients() -> list[Tensor]:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in base.items()}
        return list(torch.autograd.grad(ours(indices, save=save)(**leaves).square().sum(), list(leaves.values())))

    expected, asked = gradients(), []
    monkeypatch.setattr(experts_backward, "looped", lambda grad: False)  # as on a GPU
    monkeypatch.setattr(experts_backward, "shares_rows", lambda *shape: not asked.append(shape))
    for found, value in zip(gradients(), expected, strict=True):
        assert torch.equal(found, value)
    assert asked == ([] if save == "all" else [(T, T * K, E, H, I)])  # beside what that keeps there is no room


@pytest.mark.parametrize(
    ("tokens", "topk", "hidden", "inner", "experts", "shared"),
    [
        (16384, 8, 2048, 768, 128, True),  # Qwen3-30B-A3B
        (8192, 8, 2048, 768, 128, False),  # more than the activation's: down's gradient, beside gate_up's
        (65536, 8, 2048, 768, 128, False),  # a copy beside what the gate's backward takes and makes
        (16384, 8, 1536, 768, 128, False),  # rows of x all at once
        (24576, 8, 1536, 256, 128, False),  # quick without
        (16384, 8, 2048, 1024, 64, True),  # OLMoE
        (16384, 4, 2880, 2880, 32, True),  # gpt-oss
        (0, 1, 64, 1024, 4, False),
    ],
)
def test_where_two_products_share_rows(tokens, topk, hidden, inner, experts, shared):
    assert experts_backward.shares_rows(tokens, tokens * topk, experts, hidden, inner) is shared


def saved(run, inputs: dict[str, Tensor | None]) -> int:
    """Bytes kept for backward, without the inputs' own."""
    own = [value for value in inputs.values() if value is not None]
    return sum(saved_bytes(functools.partial(run, **inputs), own).values())


@pytest.mark.parametrize(("save", "row_bytes"), [("recompute", 2 * I * 4), ("fp8", 2 * I + 4)])
def test_saved_bytes_are_the_projection_and_the_tables(save, row_bytes):
    inputs = {n: v.requires_grad_() for n, v in make(dtype=torch.float32).items() if v is not None}
    tables = 4 * (T * K + T * K + E)  # order, inverse, offsets
    indices = choose()
    assert saved(ours(indices, save=save), inputs) == T * K * row_bytes + tables


def test_frozen_inputs_cost_nothing():
    base = make(dtype=torch.float32, bias=True)
    names = list(base)
    _, expected = value_and_grads(ours(choose()), base, torch.ones(T, H))
    for wanted in [*([name] for name in names), ["x", "weights"], ["gate_up", "down"], names]:
        leaves = {n: v.detach().clone().requires_grad_(n in wanted) for n, v in base.items()}
        ours(choose())(**leaves).sum().backward()
        for name in names:
            if name in wanted:
                # Not bit for bit: a kernel that has less to do may add up a row in another order.
                assert_accurate(leaves[name].grad, expected[name].double(), what=f"{name} of {wanted}")
            else:
                assert leaves[name].grad is None, (name, wanted)
    only = {n: v.detach().clone().requires_grad_(n == "down_bias") for n, v in base.items()}
    assert saved(ours(choose()), only) < 4 * T * K * I


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_the_gradient_of_routing_weights_is_rounded_once(backend):
    """It has a part from the activation and one from the bias of down."""
    sizes = (60, E, K, H, I)
    inputs, indices, grad = make(bias=True, sizes=sizes), choose(sizes=sizes), draw(9, 60, H)
    short = inputs["weights"].half()
    _, wanted = value_and_grads(lambda **i: loop(**i, indices=indices), inputs | {"weights": short.double()}, grad)
    with moekit.backend(backend):
        _, found = value_and_grads(ours(indices), inputs | {"weights": short}, grad)
    assert torch.equal(found["weights"], wanted["weights"].half())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("rows", [T, 0])
def test_checkpoint(use_reentrant, rows):
    inputs = make(dtype=torch.float32)
    inputs.update(x=inputs["x"][:rows], weights=inputs["weights"][:rows])
    run = ours(choose()[:rows])
    expected = value_and_grads(run, inputs, torch.ones(rows, H))
    leaves = {n: v.detach().clone().requires_grad_() for n, v in inputs.items() if v is not None}
    out = checkpoint(run, *leaves.values(), use_reentrant=use_reentrant)
    out.backward(torch.ones(rows, H))
    assert torch.equal(out, expected[0])
    for name, grad in expected[1].items():
        assert torch.equal(leaves[name].grad, grad), name


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_another_width_are_refused_below_the_checks_of_calls(packed):
    weight, offsets = draw(1, 2, 64, 64, dtype=torch.float32), torch.tensor([1, 3], dtype=torch.int32)
    stored = moekit.pack(weight, "int8").stored()
    for width in (32, 96):
        rows = draw(2, 3, width, dtype=torch.float32)
        with pytest.raises(ValueError, match="rows must be of 64 columns"):
            packed_rows(rows, stored, offsets) if packed else grouped_rows(rows, weight, offsets)


def test_rows_apart_by_no_multiple_of_16_bytes(monkeypatch):
    """As a GPU's products want their operands: they refuse such strides."""
    monkeypatch.setattr("moekit.ops.gemm.looped", lambda rows: False)
    wide, weight = draw(1, 8, 68, dtype=torch.bfloat16), draw(2, 2, 16, 64, dtype=torch.bfloat16)
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    with moekit.backend("torch"):
        found = moekit.grouped_linear(wide[:, :64], weight, offsets)
        assert torch.equal(found, moekit.grouped_linear(wide[:, :64].contiguous(), weight, offsets))


@pytest.mark.parametrize("save", ["nothing", "recompute", "fp8", "all"])
def test_opcheck(save):
    inputs = make(dtype=torch.float32, bias=True)
    leaves = [v.requires_grad_(save != "nothing") for v in inputs.values()]
    routing = Routing.from_topk(choose(), num_experts=E)
    gate, dense = ("sigmoid", 1.0, 0.0, 0.0, None, True, "concatenated"), ("", "", [0] * 4, False, False, [], [])
    tables = (routing.order, routing.inverse, routing.offsets, *[None] * 7)
    arguments = (*leaves, *[None] * 4, *tables, *gate, False, *dense, False, save, False)
    # The last check adds up every output, which PyTorch cannot do in float8.
    opcheck(torch.ops.moekit.experts, arguments, OPCHECKS[: 3 if save == "fp8" else 4])


def test_the_output_is_its_own():
    inputs = make(dtype=torch.float32)
    out = ours(choose())(**inputs)
    assert all(v is None or v.data_ptr() != out.data_ptr() for v in inputs.values())


def test_compiles_whole_for_any_number_of_tokens():
    from torch._dynamo.testing import CompileCounterWithBackend  # takes a second to import

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda i, **inputs: ours(i)(**inputs), fullgraph=True, backend=counter)
    for rows in (T, 7, 9, 5):
        inputs = {n: v for n, v in make(dtype=torch.float32).items() if v is not None}
        inputs.update(x=inputs["x"][:rows].clone(), weights=inputs["weights"][:rows].clone())
        indices = choose(rows)[:rows].clone()
        expected = value_and_grads(ours(indices), inputs, torch.ones(rows, H))
        actual = value_and_grads(lambda i=indices, **named: run(i, **named), inputs, torch.ones(rows, H))
        assert torch.equal(actual[0], expected[0])
        assert all(torch.equal(actual[1][n], g) for n, g in expected[1].items())
    assert counter.frame_count <= 2


def test_twenty_runs_bit_equal():
    inputs = make(dtype=torch.bfloat16, bias=True)
    runs = [value_and_grads(ours(choose()), inputs, draw(9, T, H, dtype=torch.bfloat16)) for _ in range(RUNS)]
    for out, grads in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert all(torch.equal(g, runs[0][1][n]) for n, g in grads.items())


def test_routing_object_and_tuple_agree_and_padding_is_invisible():
    inputs, indices = make(), choose()
    routing = Routing.from_topk(indices, inputs["weights"], num_experts=E)
    expected = ours(indices)(**inputs)
    for built in (routing, routing.pad_to_multiple(4), Routing.from_map(*routing.to_map())):
        assert_accurate(experts(inputs["x"], built, inputs["gate_up"], inputs["down"]), expected, what="routing")


def test_parametrised_weights_get_their_gradients():
    """LoRA: the stack is ``W + B A``, built anew each forward."""
    base = make()
    a, b = draw(11, E, 2, H).requires_grad_(), draw(12, E, 2 * I, 2).requires_grad_()
    base["gate_up"] = base["gate_up"] + b @ a
    ours(choose())(**base).sum().backward()
    got = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    base["gate_up"] = make()["gate_up"] + b @ a
    loop(**base, indices=choose()).sum().backward()
    assert_accurate(got[0], a.grad, what="A")
    assert_accurate(got[1], b.grad, what="B")


def test_errors_name_what_is_wrong():
    inputs = make(dtype=torch.float32)
    x, weights, gate_up, down = (inputs[n] for n in ("x", "weights", "gate_up", "down"))
    routing = (choose(), weights)
    with pytest.raises(ValueError, match=r"experts: down must be of shape \[experts, out, in\]"):
        experts(x, routing, gate_up, down[:, :, 1:])
    with pytest.raises(ValueError, match=r"gate_up must be of the dtype of hidden_states \(torch.float32\)"):
        experts(x, routing, gate_up.double(), down)
    with pytest.raises(ValueError, match="routing must be of 10 tokens"):
        experts(x[:10], routing, gate_up, down)
    with pytest.raises(ValueError, match="routing must be built with weights"):
        experts(x, Routing.from_topk(choose(), num_experts=E), gate_up, down)
    with pytest.raises(ValueError, match="save must be one of"):
        experts(x, routing, gate_up, down, save="everything")
    with pytest.raises(TypeError, match="indices must be an int32 or int64 tensor"):
        experts(x, (choose().float(), weights), gate_up, down)


def test_fsdp2_mixed_precision(tmp_path):
    """fully_shard hands the layer bf16 weights and takes its gradients, on one gloo rank."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            inputs = make(dtype=torch.float32)
            self.gate_up = torch.nn.Parameter(inputs["gate_up"])
            self.down = torch.nn.Parameter(inputs["down"])

        def forward(self, x, weights):
            return experts(x, (choose(), weights), self.gate_up, self.down)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        layer = fully_shard(Layer(), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        inputs = make(dtype=torch.bfloat16)
        out = layer(inputs["x"], inputs["weights"])
        out.float().sum().backward()
        expected = value_and_grads(
            ours(choose()),
            {n: v for n, v in inputs.items() if v is not None},
            torch.ones(T, H, dtype=torch.bfloat16),
        )
        assert torch.equal(out, expected[0])
        assert torch.equal(layer.down.grad.to_local(), expected[1]["down"].float())
        assert torch.equal(layer.gate_up.grad.to_local(), expected[1]["gate_up"].float())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_grouped_products(dtype):
    offsets = torch.tensor([3, 3, 8], dtype=torch.int32)
    rows, matrices, right = draw(1, 10, 6), draw(2, 3, 6, 5), draw(3, 10, 5)
    product = grouped_rows(rows.to(dtype), matrices.to(dtype), offsets)
    outer = grouped_outer(rows.to(dtype), right.to(dtype), offsets)
    for expert, block in ((0, slice(0, 3)), (2, slice(3, 8))):
        assert_accurate(product[block], rows[block] @ matrices[expert], scale=20.0)
        assert_accurate(outer[expert], rows[block].T @ right[block], scale=20.0)
    assert not outer[1].any()


def test_grouped_linear_gradcheck():
    offsets = torch.tensor([3, 3, 8], dtype=torch.int32)
    rows, weight = draw(1, 10, 6).requires_grad_(), draw(2, 3, 5, 6).requires_grad_()

    def run(rows, weight):
        return moekit.grouped_linear(rows, weight, offsets)

    assert torch.autograd.gradcheck(run, (rows, weight))
    assert torch.autograd.gradgradcheck(run, (rows, weight))
    assert not run(rows, weight)[8:].any()
