"""The seams: where published code falls short. A case or more for each, at inputs that show it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from moekit.checks import _formulas as formulas
from moekit.checks import _router_formulas as router
from moekit.checks._activations import I, N, backward, forward, inputs
from moekit.checks._case import Case, compared, draw, invoke, refused, transposed
from moekit.checks._compare import Difference, close, compare, exact, rounded, within
from moekit.checks._formulas import gelu_tanh, quick_gelu, silu
from moekit.checks._router import scaled
from moekit.checks._rows import E, H, T, routing, routing_map, rows_of

SEAMS = {
    "alpha": "alpha of weighted_bias_quick_geglu_impl acts",
    "linear_offset": "linear_offset keeps its value in bfloat16",
    "one rounding": "bfloat16 results are rounded once, and weights in float32 get gradients in it",
    "large gates": "large gates give finite gradients",
    "bias gradient": "the bias gradient is summed before it is rounded",
    "clamp": "the clamp comes before the bias, and lets gradients through at the limit",
    "fp8 store": "fp8_input_store keeps gradients of small and of large inputs",
    "weights [N]": "weights of shape [N] are refused when N equals I",
    "leading shapes": "any leading shape, strided or not, empty or not",
    "fused": "fused=True works and returns the same indices",
    "num_out_tokens": "num_out_tokens is checked, and a larger one pads",
    "drop_and_pad": "drop_and_pad reads maps of any numbers, and takes a capacity above T",
    "sums": "unpermute adds in float32 and rounds once, alike on every run",
    "restore_shape": "a restore_shape that is too narrow is refused",
    "aux loss": "MoEAuxLossAutoScaler writes nothing and compiles in one graph",
    "padding_mask": "padding_mask is True for padding",
    "pad_routing_map": "pad_routing_map leaves its argument alone, and refuses what it cannot pad",
    "sinkhorn": "sinkhorn is finite for large logits",
    "ties and NaN": "ties go to the lowest expert or token, and every token has k experts whatever the logits",
    "zero and bias": "scaling_factor=0.0 is zero, and expert_bias acts with softmax",
}
"""What each seam is about, by its name."""
_IMPLS = {"weighted_bias_swiglu_impl": silu, "weighted_bias_geglu_impl": gelu_tanh}


def cases() -> Iterator[Case]:
    """All of them, in the order of :data:`SEAMS`."""
    for group in (_quick, _rounding, _gates, _stores, _shapes, _permutation, _sums, _losses, _choices):
        yield from group()


def _quick() -> Iterator[Case]:
    impl = partial(compared, "weighted_bias_quick_geglu_impl", reference=forward(quick_gelu))
    biased, sources = inputs("input", "bias", "weights"), ("input", "bias", "weights")
    yield impl("alpha=0.75", {**biased, "alpha": 0.75}, sources=sources, seam="alpha")
    # An up half of -1 leaves 0.001 of an offset of 1.001, and nothing of one rounded to 1.
    y = draw(41, N, 2 * I)
    y[:, I:] = -1.0
    offset = {"linear_offset": 1.001}
    low = partial(compared, dtype=torch.bfloat16, reference=forward(quick_gelu), seam="linear_offset")
    alone = {"input": y, "bias": None, **inputs("weights"), **offset}
    yield low("weighted_bias_quick_geglu_impl", "1.001", alone, sources=("input", "weights"))
    yield low("quick_geglu", "1.001", {"y": y, **offset}, sources=("y",))
    limits = draw(42, N, 2 * I)
    limits[:, ::3] = 0.75
    clamped = {**biased, "input": limits, "clamp_value": 0.75, "linear_offset": 1.0}
    yield impl("clamp_value=0.75", clamped, sources=sources, seam="clamp")


def _rounding() -> Iterator[Case]:
    wide = {"g": draw(43, N, 64), "y": draw(44, N, 128), "weights": draw(45, N, 1)}
    alone = {name: wide[name] for name in ("y", "weights")}
    strict = partial(compared, dtype=torch.bfloat16, dtypes={"weights": torch.float32}, bound=rounded, seam="one rounding")
    both = (torch.bfloat16, torch.float32)
    for name, activation in {"swiglu": silu, "geglu": gelu_tanh, "quick_geglu": quick_gelu}.items():
        yield strict(f"weighted_{name}", "bfloat16", alone, forward(activation))
        back = backward(activation, "y", "weights")
        yield strict(f"weighted_{name}_back", "bfloat16", wide, back, results=both)
    # Many rows, whose terms all but cancel.
    many = {"input": draw(46, 256, 2 * I), "bias": draw(47, 2 * I), "weights": draw(48, 256, 1)}
    yield compared(
        "weighted_bias_quick_geglu_impl",
        "256 rows, bfloat16",
        many,
        forward(quick_gelu),
        dtype=torch.bfloat16,
        sources=("bias",),
        bound=close,
        grad_bound=rounded,
        seam="bias gradient",
    )


def _gates() -> Iterator[Case]:
    for name, dtype, gate in (("300 in float16", torch.float16, 300.0), ("1e20 in float32", torch.float32, 1e20)):
        y = draw(51, N, 2 * I)
        y[::2, :I], y[1::2, :I] = gate, -gate
        args = {**inputs("g"), "y": y}
        yield compared("geglu_back", name, args, backward(gelu_tanh, "y"), dtype=dtype, seam="large gates")
        given = {"input": y, **inputs("weights")}
        impl, sources = "weighted_bias_geglu_impl", ("input", "weights")
        yield compared(impl, name, given, forward(gelu_tanh), dtype=dtype, sources=sources, seam="large gates")


def _stores() -> Iterator[Case]:
    """Float8 e4m3 rounds by at most a 16th; that is how far a gradient may be as a whole."""
    for scale in (0.001, 1000.0):
        given = {"input": draw(52, N, 2 * I, scale=scale), **inputs("weights"), "fp8_input_store": True}
        for name, activation in _IMPLS.items():
            yield compared(
                name,
                f"inputs near {scale:g}, bfloat16",
                given,
                forward(activation),
                dtype=torch.bfloat16,
                sources=("input", "weights"),
                grad_bound=within(1 / 16),
                seam="fp8 store",
            )


def _shapes() -> Iterator[Case]:
    square = draw(53, I, 2 * I).float()
    for name in ("weighted_swiglu", "weighted_geglu", "weighted_quick_geglu"):
        yield refused(name, "weights [8], I = 8", {"y": square, "weights": draw(54, I).float()}, "weights [N]")
    for name, activation in _IMPLS.items():
        shapes = {"[2, 3, 2, 16]": (2, 3, 2), "[0, 3, 16]": (0, 3), "[2, 3, 16], transposed": (2, 3)}
        for special, lead in shapes.items():
            given = {"input": draw(55, *lead, 2 * I), "weights": draw(56, math.prod(lead), 1)}
            yield compared(
                name,
                special,
                given,
                forward(activation),
                sources=("input", "weights"),
                layout=transposed if "transposed" in special else torch.clone,
                seam="leading shapes",
            )


def _permutation() -> Iterator[Case]:
    known, tokens = routing(), {"tokens": draw(61, T, H)}
    found = known["routing_map"]
    alone, rows = {**tokens, "routing_map": found}, rows_of(found)
    moved = partial(compared, "permute", reference=formulas.permute, bound=exact)
    added = partial(compared, "unpermute", reference=formulas.unpermute)
    yield moved("without probs", {**alone, "fused": True}, seam="fused")
    yield moved("with probs", {**tokens, **known, "fused": True}, seam="fused")
    yield added("without probs", {**rows, "fused": True}, seam="fused")
    yield added("with probs", {**rows, **known, "fused": True}, seam="fused")
    pairs = int(found.sum())
    yield moved("larger by 3", {**tokens, **known, "num_out_tokens": pairs + 3}, seam="num_out_tokens")
    yield added("rows of no token", {**rows_of(found, num_out_tokens=pairs + 3), **known}, seam="num_out_tokens")
    # On a GPU the check would wait for it; nothing is written past the end there.
    too_few = {"tokens": tokens["tokens"].float(), "routing_map": found, "num_out_tokens": pairs - 3}
    yield refused("permute", "smaller by 3", too_few, "num_out_tokens", devices=("cpu",))
    capacity = {"num_out_tokens": 3 * E, "drop_and_pad": True}
    # Of type double, not of the tokens' type: what a map's entries are does not matter.
    for name, values in {"0.5": found * 0.5, "256": found * 256}.items():
        yield moved(f"a map of {name}", {**tokens, "routing_map": values, **capacity}, seam="drop_and_pad")
    above = {"num_out_tokens": (T + 2) * E, "drop_and_pad": True}
    yield moved("capacity T + 2", {**tokens, **known, **above}, seam="drop_and_pad")
    yield added("capacity T + 2", {**rows_of(found, **above), **known, "drop_and_pad": True}, seam="drop_and_pad")
    narrow = {**rows, "permuted_tokens": rows["permuted_tokens"].float(), "restore_shape": (T, H - 2)}
    yield refused("unpermute", "narrower by 2", narrow, "restore_shape")


def _sums() -> Iterator[Case]:
    everywhere = torch.ones(6, 32, dtype=torch.bool)
    rows, low = rows_of(everywhere, 16), {"dtype": torch.bfloat16, "bound": rounded, "seam": "sums"}
    yield compared("unpermute", "32 rows a token, bfloat16", rows, formulas.unpermute, **low)
    given = {"tokens": draw(62, 6, 16), "routing_map": everywhere}
    yield compared("permute", "gradient of 32 rows, bfloat16", given, formulas.permute, sources=("tokens",), **low)
    many = rows_of(torch.ones(64, 16, dtype=torch.bool), 256)

    def alike(call: Any, device: torch.device) -> list[Difference]:
        args = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in many.items()}
        args["permuted_tokens"] = args["permuted_tokens"].float()
        first = invoke(call, args)
        again = [invoke(call, args) for _ in range(3)]
        same = [bool(torch.equal(first, other)) for other in again]
        return [Difference("output", 0.0, all(same), "" if all(same) else "other bits on another run")]

    yield Case("unpermute", "four runs", alike, "sums")


def _losses() -> Iterator[Case]:
    def compiled(scaler: Any, device: torch.device) -> list[Difference]:
        # Dynamo alone: what the graph is compiled to does not matter, and needs no C++ compiler.
        with torch.compiler.set_stance("default"):
            attach = torch.compile(lambda output, loss: scaler.apply(output, loss), fullgraph=True, backend="eager")
            return scaled(scaler, device, attach=attach)

    def plain(scaler: Any, device: torch.device) -> list[Difference]:
        return scaled(scaler, device, attach=scaler.apply)

    yield Case("MoEAuxLossAutoScaler", "writes nothing", plain, "aux loss")
    yield Case("MoEAuxLossAutoScaler", "torch.compile(fullgraph=True)", compiled, "aux loss")
    balance = {
        "probs": draw(63, 6, 4).abs(),
        "tokens_per_expert": torch.tensor([3, 2, 0, 3]),
        "total_num_tokens": 4,
        "topk": 2,
        "num_experts": 4,
        "moe_aux_loss_coeff": 0.01,
        "padding_mask": torch.arange(6) >= 4,
    }
    loss = "switch_load_balancing_loss_func"
    yield compared(loss, "2 of 6 tokens", balance, router.balance_loss, sources=("probs",), seam="padding_mask")

    def untouched(call: Any, device: torch.device) -> list[Difference]:
        given = routing_map().to(device)
        before = given.clone()
        invoke(call, {"routing_map": given, "pad_multiple": 4})
        return [compare("routing_map, afterwards", given, before.cpu(), None, exact)]

    yield Case("pad_routing_map", "its argument", untouched, "pad_routing_map")
    short = {"routing_map": torch.ones(5, 2, dtype=torch.bool), "pad_multiple": 4}
    yield refused("pad_routing_map", "5 tokens, 8 wanted", short, "pad_routing_map", devices=("cpu",))
    yield compared("sinkhorn", "logits near 200", {"cost": draw(64, 12, 4) + 200}, router.sinkhorn, seam="sinkhorn")


def _choices() -> Iterator[Case]:
    function, seam = "topk_routing_with_score_function", "ties and NaN"
    route = partial(compared, function, reference=router.topk_routing)
    even: dict[str, Any] = {"logits": torch.zeros(4, 8, dtype=torch.float64), "topk": 3}
    yield route("all alike", even, seam=seam)
    yield route("all alike, sigmoid", {**even, "score_function": "sigmoid"}, seam=seam)
    groups = {"num_groups": 4, "group_topk": 2}
    yield route("all alike, groups", {**even, **groups}, seam=seam)
    drop = partial(compared, "apply_router_token_dropping", reference=router.token_dropping, seam=seam)
    chosen = draw(68, 12, 8) > 0.5
    limited = {
        "routing_probs": draw(69, 12, 8).abs() * chosen,
        "routing_map": chosen,
        "router_topk": 2,
        "capacity_factor": 0.75,
    }
    yield drop("by position", {**limited, "drop_policy": "position"})
    yield drop("filled to the capacity", {**limited, "pad_to_capacity": True})

    def of_nan(call: Any, device: torch.device) -> list[Difference]:
        logits = draw(65, 4, 8).float().to(device)
        logits[1, 2:5], logits[2], logits[3] = math.nan, math.nan, -math.inf
        _, chosen = invoke(call, {"logits": logits, "topk": 3, **groups})
        return [compare("experts a token", chosen.sum(1), torch.tensor([3] * 4), None, exact)]

    yield Case(function, "NaN, groups", of_nan, seam)
    logits = {"logits": draw(66, 12, 8), "topk": 2}
    yield route("scaling_factor=0.0", {**logits, "scaling_factor": 0.0}, seam="zero and bias")
    biased = {**logits, "use_pre_softmax": True, "expert_bias": draw(67, 8)}
    yield route("softmax, expert_bias", biased, seam="zero and bias")
