"""The experts of few tokens slot by slot: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from _interpreter import INTERPRETED, RUNS, run_interpreted
from _reference import draw
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

import moekit
from moekit.kernels.triton import KERNELS, _policy, by_slot
from moekit.ops import experts_topk  # noqa: F401  (defines the operator)
from moekit.ops.glu import make_glu
from moekit.ops.unpack import unpack

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
kernels_run = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs in the interpreter, by the test below")
# Tokens, choices of each, experts, hidden and inner features; some leave tiles and rounds of experts half full.
SHAPES = {
    "one token": (1, 8, 16, 40, 24),
    "several": (3, 2, 48, 32, 24),
    "odd": (1, 11, 12, 37, 11),
    "one expert": (1, 1, 1, 8, 8),
}
GATES = {
    "silu": {"activation": "silu"},
    "gpt-oss": {"activation": "quick_gelu", "linear_offset": 1.0, "clamp": 0.7, "layout": "interleaved"},
    "gelu": {"activation": "gelu", "clamp": 0.5},
    "relu2": {"activation": "relu2", "layout": "ungated"},
}
# What the operator takes between biases and weight_after_down: no scales, the gate, how dense weights are stored.
DENSE = (*(None,) * 6, *make_glu("silu", alpha=None, op="test"), False, "", "", [0, 0, 0, 0], False, False)
# As above, with sides that all formats pack.
PACKED_SHAPES = {"one token": (1, 8, 16, 192, 64), "several": (3, 2, 48, 64, 128), "odd": (1, 11, 12, 64, 64)}
PACKED_CASES = [
    (torch.bfloat16, "one token", "silu"),
    (torch.bfloat16, "several", "gpt-oss"),
    (torch.float16, "odd", "relu2"),
]
UNREAD = ("several", "int8")  # more than one token of it goes with tables
FORMATS = {
    **{"nf4": {}, "nf4 nested": {"double_quant": True}, "mxfp4": {}, "int8": {}},
    **{"fp8": {}, "fp8 by rows": {"block": (1, 64)}},
}
EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_kernels_pass_in_the_interpreter():
    run_interpreted(Path(__file__))


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Of which sums take several; on a GPU, and where no kernel runs, the policy's own."""
    if INTERPRETED and request.node.get_closest_marker("skipif"):
        sizes = {True: {"columns": 8, "depth": 16}, False: {"columns": 16, "depth": 8}}
        for name in ("slot_gate", "slot_down"):
            cut = getattr(_policy, name)
            small = lambda *args, along, cut=cut: cut(*args, along=along)._replace(**sizes[along])  # noqa: E731
            monkeypatch.setattr(_policy, name, small)


def case(shape: str, dtype: torch.dtype, gate: str = "silu", *, across: bool = False, bias: bool = False, form: str = ""):
    """Tokens, choices (some of no expert), weights, matrices as stored or packed, and biases."""
    tokens, topk, experts, hidden, inner = (PACKED_SHAPES if form else SHAPES)[shape]
    width = inner if GATES[gate].get("layout") == "ungated" else 2 * inner
    torch.manual_seed(1)
    indices = torch.rand(tokens, experts).topk(topk).indices
    if topk > 1:
        indices[:, 1] = torch.tensor([-1, experts, 2**40 + 1, -(2**40)])[: len(indices)]
    stored = [draw(2, experts, width, hidden) * 0.3, draw(3, experts, hidden, inner) * 0.3]
    stored = [(weight.mT if across else weight).contiguous().to(dtype) for weight in stored]
    if form:
        stored = [moekit.pack(weight, form.split()[0], **FORMATS[form]) for weight in stored]
    biases = [draw(4, experts, width).to(dtype), draw(5, experts, hidden).to(dtype)] if bias else [None, None]
    tensors = [draw(6, tokens, hidden).to(dtype), indices, torch.rand(tokens, topk), *stored, *biases]
    return [t if t is None else t.to(DEVICE) for t in tensors]


def by_kernel(given: list, gate: str = "silu", *, across: bool = False, after: bool = False):
    x, indices, weights, gate_up, down, *biases = given
    options = dict(GATES[gate])
    spec = make_glu(options.pop("activation"), alpha=None, op="test", clamp_after_bias=True, **{
        "linear_offset": 0.0, "clamp": None, "layout": "concatenated", **options,
    })  # fmt: skip
    matrices = [
        weight.stored() if isinstance(weight, moekit.PackedExperts) else weight if across else weight.mT
        for weight in (gate_up, down)
    ]
    return KERNELS["experts_by_slot"](x, indices, weights, *matrices, *biases, *spec, after)


def exactly(given: list, gate: str = "silu", *, across: bool = False) -> torch.Tensor:
    given = [unpack(t.stored(), 0, len(t), torch.float64) if isinstance(t, moekit.PackedExperts) else t for t in given]
    x, indices, weights, *others = [t if t is None or t.dtype is torch.int64 else t.double().cpu() for t in given]
    gate_up, down, gate_up_bias, down_bias = others
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    indices = torch.where((indices.cpu() >= 0) & (indices.cpu() < len(down)), indices.cpu(), -1)
    with moekit.backend("torch"):
        return moekit.experts(x, (indices, weights), gate_up, down, transposed=across, **biases, **GATES[gate])


def close(found: torch.Tensor, wanted: torch.Tensor, roundings: int = 1) -> bool:
    """Token by token, within the roundings of the activation and of the output."""
    off = (found.double().cpu() - wanted).norm(dim=1) / wanted.norm(dim=1)
    return found.shape == wanted.shape and bool((off < roundings * EPS[found.dtype]).all())


@kernels_run
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype, gate):
    for across, bias, after in ((False, False, True), (True, False, False), (False, True, False), (True, True, True)):
        given = case(shape, dtype, gate, across=across, bias=bias)
        found = by_kernel(given, gate, across=across, after=after)
        assert found.dtype is dtype and close(found, exactly(given, gate, across=across))
        assert all(torch.equal(found, by_kernel(given, gate, across=across, after=after)) for _ in range(RUNS if GPU else 0))


@kernels_run
@pytest.mark.parametrize(("dtype", "shape", "gate"), PACKED_CASES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_values_of_packed_weights(form, dtype, shape, gate):
    bias = after = gate != "silu"
    given = case(shape, dtype, gate, bias=bias, form=form)
    found = by_kernel(given, gate, after=after)
    if (shape, form) == UNREAD:
        assert found is NotImplemented
        return
    roundings = 2 if "nf4" in form and dtype is torch.float16 else 1  # its table is rounded to float16, too
    assert found.dtype is dtype and close(found, exactly(given, gate), roundings)
    assert all(torch.equal(found, by_kernel(given, gate, after=after)) for _ in range(RUNS if GPU else 0))


@kernels_run
@pytest.mark.parametrize("place", [3, 4])
def test_one_weight_packed_and_one_dense(place):
    given = case("several", torch.bfloat16, bias=True, form="mxfp4")
    given[place] = given[place].unpack()
    assert close(by_kernel(given), exactly(given))


@kernels_run
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_what_scales_of_others_hold_stays_theirs(form):
    """A slot of no expert stands for the first one, where something has to be read."""
    x, indices, weights, *stored, _, _ = case("several", torch.bfloat16, form=form)
    indices = torch.where(indices == 0, 1, indices)
    found = by_kernel([x, indices, weights, *stored, None, None])
    for weight in stored:
        for scale in weight.stored().scales:
            scale[0] = torch.nan
    assert found.isfinite().all() and torch.equal(by_kernel([x, indices, weights, *stored, None, None]), found)


@kernels_run
@pytest.mark.parametrize("form", ["", "nf4", "mxfp4", "fp8"])
def test_a_token_has_the_same_bits_in_any_company(form):
    given = case("several", torch.bfloat16 if form else torch.float32, bias=True, form=form)
    together = by_kernel(given)
    for token in range(3):
        alone = [part[token : token + 1] for part in given[:3]]
        assert torch.equal(by_kernel([*alone, *given[3:]])[0], together[token])


@kernels_run
def test_rows_and_matrices_may_lie_apart():
    given = case("several", torch.bfloat16, bias=True)
    apart = [
        part if part is None else torch.stack([part, torch.full_like(part, 7)], -1)[..., 0] if part.dim() == 2
        else torch.cat([part, torch.full_like(part, 7)], 1)[:, : part.shape[1]]
        for part in given
    ]  # fmt: skip
    assert not any(part.is_contiguous() for part in apart)
    assert torch.equal(by_kernel(apart), by_kernel(given))


@kernels_run
def test_tokens_of_no_expert_and_no_tokens():
    x, indices, *others = case("several", torch.float32, bias=True)
    assert not by_kernel([x, torch.full_like(indices, -1), *others]).any()
    assert by_kernel([x[:0], indices[:0], others[0][:0], *others[1:]]).shape == (0, 32)


@kernels_run
def test_what_it_leaves_to_others():
    given = case("several", torch.float32)
    assert by_kernel([t.double() if t is not None and t.is_floating_point() else t for t in given]) is NotImplemented
    many = [torch.cat([part] * 3) for part in given[:3]]
    assert by_kernel([*many, *given[3:]]) is NotImplemented
    for place, part in enumerate(given[:5]):  # shapes that do not belong together are for others to refuse
        assert by_kernel([*given[:place], part[:-1], *given[place + 1 :]]) is NotImplemented
    spread = torch.stack([given[3]] * 2, -1)[..., 0]  # no side of it adjacent
    assert by_kernel([*given[:3], spread, *given[4:]]) is NotImplemented
    packed = case("several", torch.float32, form="nf4")
    assert by_kernel(packed) is NotImplemented  # sums of halves alone
    packed = [t.to(torch.bfloat16) if t is not None and t.is_floating_point() else t for t in packed]
    assert by_kernel([*packed[:4], packed[4][:-1], None, None]) is NotImplemented
    alone = [part[:1] for part in packed[:3]]
    assert by_kernel([*alone, *packed[3:5], None, None]) is not NotImplemented
    assert by_kernel([*alone, packed[3][:0], packed[4][:0], None, None]) is NotImplemented  # no expert to stand for none


@kernels_run
@pytest.mark.parametrize("block", [(1, 24), (1, 8), (128, 40), (3, 1)], ids=str)
def test_scales_of_less_than_a_load_are_left_to_others(block):
    x, indices, weights, *stored, _, _ = case("several", torch.bfloat16, form="fp8")
    stored = [moekit.pack(weight.unpack(), "fp8", block=block) for weight in stored]
    given = [x, indices, weights, *stored, None, None]
    assert by_kernel(given) is NotImplemented
    with moekit.backend("triton"):
        assert close(moekit.experts(x, (indices, weights), *stored), exactly(given), 3)  # of the weights as well


@kernels_run
def test_experts_take_it_where_nothing_needs_a_gradient(monkeypatch):
    calls = []
    kernel = KERNELS["experts_by_slot"]
    monkeypatch.setitem(KERNELS, "experts_by_slot", lambda *args: (calls.append(len(args[0])), kernel(*args))[1])
    x, indices, weights, gate_up, down, *biases = given = case("several", torch.float32, "gpt-oss", bias=True)
    options = {**GATES["gpt-oss"], "gate_up_bias": biases[0], "down_bias": biases[1]}
    with moekit.backend("triton"):
        with FlopCounterMode(display=False) as counter:
            found = moekit.experts(x, (indices, weights), gate_up, down, **options)
        assert calls == [3] and close(found, exactly(given, "gpt-oss"))
        assert counter.get_total_flops() == 2 * 6 * 3 * 32 * 24
        many = [torch.cat([part] * 5) for part in (x, indices, weights)]
        found = moekit.experts(many[0], (many[1], many[2]), gate_up, down, **options)
        assert calls == [3, 15] and close(found, exactly([*many, *given[3:]], "gpt-oss"))
        x.requires_grad_()
        out = moekit.experts(x, (indices, weights), gate_up, down, **options)
        moekit.experts(x.detach(), (indices, weights), gate_up, down, batch_invariant=True, **options)
        moekit.experts(x.detach(), moekit.route(torch.rand(3, 48, device=DEVICE), 2), gate_up, down, **options)
        assert calls == [3, 15] and out.requires_grad
    wrong = {"indices": (indices[:2], weights[:2]), "weights": (indices, weights[:, :1])}
    for choice in wrong.values():
        with moekit.backend("triton"), torch.no_grad(), pytest.raises(ValueError, match=r"shape|3 tokens"):
            moekit.experts(x, choice, gate_up, down, **options)


@kernels_run
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "int8"])
def test_experts_take_it_with_packed_weights(form, monkeypatch):
    found = []
    kernel = KERNELS["experts_by_slot"]
    monkeypatch.setitem(KERNELS, "experts_by_slot", lambda *args: (found.append(kernel(*args)), found[-1])[1])
    x, indices, weights, gate_up, down, *_ = given = case("several", torch.bfloat16, form=form)
    wanted = exactly(given)
    with moekit.backend("triton"):
        with FlopCounterMode(display=False) as counter:
            out = moekit.experts(x, (indices, weights), gate_up, down)
        assert counter.get_total_flops() == 2 * 6 * 3 * 64 * 128
        seen = moekit.experts(x, (indices, weights), gate_up.mT, down.mT, transposed=True)  # as gpt-oss has them
        assert len(found) == 2 and torch.equal(out, found[0]) and torch.equal(seen, out) and close(out, wanted)
        across = [moekit.pack(w.unpack().mT.contiguous(), "int8").to(DEVICE) for w in (gate_up, down)]  # along the outputs
        out = moekit.experts(x, (indices, weights), *across, transposed=True)
        assert len(found) == 2 and out.any()
        out = moekit.experts(x.requires_grad_(), (indices, weights), gate_up, down)
        assert len(found) == 2 and out.requires_grad


# --- what needs no kernel -------------------------------------------------------------------------------------------


def test_when_and_how():
    assert _policy.slots_apart(1, 8, 8) and _policy.slots_apart(4, 8, 128) and _policy.slots_apart(0, 8, 16)
    assert not _policy.slots_apart(5, 8, 128) and not _policy.slots_apart(2, 2, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cuts = {along: [_policy.slot_gate(dtype, along=along)] for along in (True, False)}
        for topk, depth in ((8, 768), (8, 2880), (1, 8), (10, 40), (2, 14336)):
            for along, found in cuts.items():
                found.append(_policy.slot_down(topk, depth, dtype, along=along))
                assert found[-1].rows == min(topk, 2 if along and depth > 2048 else 4)
        for along, found in cuts.items():  # 16 bytes a thread, of one column or of one row
            assert all((cut.depth if along else cut.columns) * dtype.itemsize % 16 == 0 for cut in found)
            assert all(cut.rows * cut.columns * cut.depth * dtype.itemsize >= 16 * 32 * cut.warps for cut in found)


def test_how_packed_weights_are_cut():
    for arch, tokens, along, threads in itertools.product(("8", "9", "gfx942"), (1, 4), (4, 8, 32), (32, 64)):
        gate, down = (_policy.slot_packed(tokens, along, threads, arch, adds=adds) for adds in (False, True))
        assert gate.depth == down.depth == along and gate.rows == 1 < down.rows
        assert gate.columns * along == 4 * threads
        assert down.rows * down.columns * along == threads * (8 if arch == "9" else 4)


def test_numbers_too_far_apart_for_32_bits():
    def stored(*strides: int) -> torch.Tensor:
        return torch.empty_strided((2, 1 << 16, 1 << 16), strides, device="meta")

    assert by_slot._reachable(stored(1 << 40, 1 << 14, 1)) and not by_slot._reachable(stored(1 << 40, 1 << 15, 1))
    assert not by_slot._reachable(stored(1 << 40, 2, 1 << 14))


def test_the_operator_with_packed_weights():
    x, indices, weights, gate_up, down, *_ = case("several", torch.float32, form="nf4 nested")
    stored = [weight.stored() for weight in (gate_up, down)]
    packed = (*(part.codes for part in stored), None, None, *stored[0].scales, *stored[1].scales)
    storage = (False, "nf4", "nf4", [1, 64, 1, 64], False, False)
    gate = make_glu("silu", alpha=None, op="test")
    torch.library.opcheck(
        torch.ops.moekit.experts_topk.default, (x, indices.clamp(-1, 47), weights, *packed, *gate, *storage, False)
    )


def test_the_operator():
    x, indices, weights, *others = case("several", torch.float32, bias=True)
    indices = indices.clamp(-1, len(others[1]) - 1)
    args = (x, indices, weights, *others, *DENSE, False)
    torch.library.opcheck(torch.ops.moekit.experts_topk.default, args)


def test_what_is_no_expert_here_is_left_out_on_a_cpu():
    """A program that was exported for a GPU may be moved there."""
    x, indices, weights, *others = case("several", torch.float32, bias=True)
    indices = indices.clamp(-1, len(others[1]) - 1)
    found = []
    for none in (-1, len(others[1]), len(others[1]) + 7):
        given = indices.clone()
        given[0, 0] = given[1, 1] = none
        args = (x, given, weights, *others, *DENSE, False)
        found.append(torch.ops.moekit.experts_topk.default(*args))
    assert found[0].any() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
