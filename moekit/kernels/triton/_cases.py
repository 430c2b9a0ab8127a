"""What the offline compiler compiles: every kernel, in every configuration that makes another program of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# R rows of I features in E experts, T tokens of H features to K experts each: a Qwen3-30B-A3B layer at T = 16384.
_T, _K, _E, _H, _I = 16384, 8, 128, 2048, 768
_R = _T * _K
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SILU, _QUICK, _GELU, _RELU2 = (
    ("sigmoid", 1.0, 0.0),
    ("sigmoid", 1.702, 0.0),
    ("gelu", 0.0, 0.0),
    ("relu2", 0.0, 0.0),
)


class Case(NamedTuple):
    """One call of a launcher, on meta tensors."""

    name: str
    op: str
    args: tuple
    shown: bool = False  # in the table; the others count in its summary
    aligned: bool = True  # whether accesses to rows can be, and so must be, 16 bytes wide


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _integers(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.int32)


def _glu_cases(width: int, dtype_name: str, layout: str, bias_kind: str, constants: tuple, label: str) -> Iterator[Case]:
    dtype = _DTYPES[dtype_name]
    features = width if layout == "ungated" else 2 * width
    y, grad, weights = _meta(_R, features, dtype=dtype), _meta(_R, width, dtype=dtype), _meta(_R)
    shapes = {"shared": (features,), "row": (_R, features), "expert": (_E, features)}
    bias = None if bias_kind == "none" else _meta(*shapes[bias_kind], dtype=dtype)
    offsets = _integers(_E) if bias_kind == "expert" else None
    shown, aligned = dtype_name == "bf16" and label == "silu" and width == _I, width % 16 == 0
    what = f"{layout} {dtype_name} {label}" + ("" if bias is None else f", {bias_kind} bias") + f", I={width}"

    def case(op: str, name: str, *args: Any) -> Case:
        return Case(f"{name} {what}", op, args, shown, aligned)

    inputs = (weights, bias, offsets, *constants, layout)
    yield case("glu", "glu", y, *inputs)
    yield case("glu_fp8", "glu float8", y, *inputs)
    yield case("glu_backward", "glu backward", grad, y, None, *inputs, [True, True, False, False])
    yield case("glu_backward_over", "glu backward again", grad, y, None, *inputs, [True, True, False, True])
    stored = _meta(_R, features, dtype=torch.float8_e4m3fn)
    yield case("glu_backward", "glu backward float8", grad, stored, _meta(_R), *inputs, [True, True, False, False])
    if bias is not None:
        yield case("glu_backward", "glu backward with dbias", grad, y, None, *inputs, [True, True, True, False])


def _all_glu() -> Iterator[Case]:
    plain = (*_SILU, 0.0, None, False)
    gpt_oss, clamped = (*_QUICK, 1.0, 7.0, True), (*_QUICK, 1.0, 7.0, False)
    for layout, dtype in itertools.product(("concatenated", "interleaved", "ungated"), _DTYPES):
        yield from _glu_cases(_I, dtype, layout, "none", plain, "silu")
        yield from _glu_cases(_I, dtype, layout, "expert", plain, "silu")
        yield from _glu_cases(_I, dtype, layout, "shared", (*_GELU, 0.0, None, False), "gelu")
        if layout != "ungated":
            yield from _glu_cases(_I, dtype, layout, "expert", gpt_oss, "clamp after bias")
            yield from _glu_cases(_I, dtype, layout, "row", clamped, "clamp before bias")
    yield from _glu_cases(_I, "bf16", "ungated", "none", (*_RELU2, 0.0, None, False), "relu2")
    yield from _glu_cases(14336, "bf16", "concatenated", "none", plain, "silu")
    yield from _glu_cases(37, "bf16", "concatenated", "none", plain, "silu")


def _all_rows() -> Iterator[Case]:
    for (tokens, topk, width), (name, dtype) in itertools.product(
        ((_T, _K, _H), (4096, 8, 7168), (_T, 2, 4096), (4096, 1, 2880), (4096, 4, 37)), _DTYPES.items()
    ):
        rows = tokens * topk
        tables = (_integers(rows), _integers(tokens + 1), _integers(rows))
        x, y, weights = _meta(tokens, width, dtype=dtype), _meta(rows, width, dtype=dtype), _meta(rows)
        what = f"{name} T={tokens} K={topk} H={width}"
        shown = name == "bf16" and (tokens, topk) == (_T, _K)
        flags = {"shown": shown, "aligned": width % 16 == 0}
        yield Case(f"permute {what}", "permute", (x, *tables), **flags)
        yield Case(f"unpermute {what}", "unpermute", (y, None, *tables), **flags)
        yield Case(f"unpermute weighted {what}", "unpermute", (y, weights, *tables), **flags)
        for wanted in ([True, True], [True, False], [False, True]):
            label = "" if all(wanted) else " of rows" if wanted[0] else " of weights"
            args = (x, y, weights, *tables, wanted)
            shown_here = {"shown": shown and all(wanted), "aligned": width % 16 == 0 and wanted[0]}
            yield Case(f"unpermute backward{label} {what}", "unpermute_backward", args, **shown_here)


def _all_tables() -> Iterator[Case]:
    for tokens, topk, experts in ((_T, _K, _E), (_T, 2, 8), (4096, 8, 512), (4096, 6, 160)):
        rows, what = tokens * topk, f"T={tokens} K={topk} E={experts}"

        def case(op: str, *args: Any, what: str = what, shown: bool = experts == _E) -> Case:
            return Case(f"{op} {what}", op, args, shown, aligned=False)

        indices, row_token = _meta(tokens, topk, dtype=torch.int64), _meta(rows, dtype=torch.int64)
        yield case("route_indices", indices, experts)
        yield case("route_indices", indices[:8], experts, what=f"{what}, of 8 tokens", shown=False)
        yield case("choice_rows", indices, _meta(tokens, topk), experts)
        yield case("choice_rows", indices[:8], _meta(8, topk), experts, what=f"{what}, of 8 tokens", shown=False)
        yield case("rows_of_tokens", row_token, tokens)
        yield case("pad_rows", _integers(experts), _integers(rows), _integers(tokens, topk), 16)
        yield case("row_tables", _integers(rows), tokens, topk)
        yield case("row_order", _integers(rows), _meta(tokens, topk), _integers(experts), tokens, topk)
        yield case("take", _meta(tokens, topk), _integers(rows), _integers(tokens, topk))
        yield case("put", _meta(rows), _meta(rows, dtype=torch.int64), tokens * experts)
        yield case("sort_chunk_rows", _integers(experts), _integers(experts), rows, rows)
        for dtype in (torch.bool, torch.float32, torch.int64):
            routing_map, shown = _meta(tokens, experts, dtype=dtype), dtype is torch.bool and experts == _E
            yield case("route_map", routing_map, rows, shown=shown)
            yield case("map_to_indices", routing_map, topk, shown=shown)
            yield case("route_capacity", routing_map, 2 * rows // experts, shown=shown)


def _all_routers() -> Iterator[Case]:
    shapes = ((_T, _E, _K, 0, 0, 0), (_T, 8, 2, 0, 0, 0), (4096, 256, 8, 8, 4, 2), (4096, 512, 10, 0, 0, 0))
    scores = {
        "softmax": ("softmax", False, None, None),
        "pre-softmax": ("softmax", True, 1e-20, None),
        "sigmoid": ("sigmoid", False, 1e-20, None),
        "sqrtsoftplus": ("sqrtsoftplus", False, 1e-20, None),
    }
    for (tokens, experts, k, *groups), (label, score), name, biased in itertools.product(
        shapes, scores.items(), ("fp32", "bf16"), (False, True)
    ):
        dtype = _DTYPES[name]
        logits, bias = _meta(tokens, experts, dtype=dtype), _meta(experts) if biased else None
        what = f"{label} {name} T={tokens} E={experts} K={k}" + (" grouped" if groups[0] else "")
        shown = name == "fp32" and not biased and experts in (_E, 256)
        args = (logits, bias, None, k, *score, False, *groups)
        yield Case(f"topk {what}" + (" biased" if biased else ""), "topk_router", args, shown, aligned=False)
        if not biased:
            grads = (_meta(tokens, k, dtype=dtype), _meta(experts), logits, _meta(tokens, k, dtype=torch.int64))
            yield Case(f"topk backward {what}", "topk_router_backward", (*grads, None, *score), shown, aligned=False)
            if not score[1]:
                yield Case(f"score sums {what}", "score_sums", (logits, grads[1], score[0], None), shown, aligned=False)
            yield Case(f"weigh {what}", "weigh_experts", (*grads[2:], None, *score), shown, aligned=False)


class _Packed(NamedTuple):
    """A packed stack ``[E, out, in]`` as the launchers see it: ``moekit.ops`` is above them."""

    codes: Tensor
    scales: list[Tensor]
    format: str
    block: tuple[int, int]
    shape: tuple[int, int, int]


def _packed(form: str, experts: int, height: int, width: int) -> _Packed:
    def stored(codes: Tensor, scale: Tensor, *block: int, nested: tuple[Tensor, ...] = ()) -> _Packed:
        return _Packed(codes, [scale, *nested], form.split()[0], block, (experts, height, width))

    byte, blocks = torch.uint8, height * width // 64
    half, whole = _meta(experts, height, width // 2, dtype=byte), (experts, height, width)
    found = {
        "nf4": lambda: stored(half, _meta(experts, blocks), 1, 64),
        "nf4 nested": lambda: stored(
            half, _meta(experts, blocks, dtype=byte), 1, 64, nested=(_meta(-(-experts * blocks // 256)), _meta())
        ),
        "mxfp4": lambda: stored(half, _meta(experts, height, width // 32, dtype=byte), 1, 32),
        "fp8": lambda: stored(
            _meta(*whole, dtype=torch.float8_e4m3fn), _meta(experts, -(-height // 128), -(-width // 128)), 128, 128
        ),
        "int8": lambda: stored(_meta(*whole, dtype=torch.int8), _meta(experts, height), 1, width),
    }
    return found[form]()


def _all_products() -> Iterator[Case]:
    """With three numbers of rows an expert: where kernels unpack in the product it says which of them."""

    def case(op: str, name: str, *args: Any, shown: bool = False) -> Case:
        return Case(f"{op} {name}", op, args, shown, aligned=False)

    experts, height, width, offsets = _E, 2 * _I, _H, _integers(_E)
    for name, dtype in _DTYPES.items():
        for (rows, rank), back in itertools.product(((_R, 0), (_R, 16), (4096, 0), (4096, 64)), (False, True)):
            x, weight = _meta(rows, width, dtype=dtype), _meta(experts, height, width, dtype=dtype)
            matrices = weight.transpose(1, 2).contiguous() if back else weight.mT
            low, factors = _meta(rows, rank, dtype=dtype), _meta(experts, height, rank, dtype=dtype).mT
            update, out = (low, factors) if rank else (None, None), _meta(rows, height, dtype=dtype)
            what = f"{name} R={rows} r={rank}" + (" back" if back else "")
            shown = name == "bf16" and rows == _R
            yield case("grouped_slice", what, x, matrices, offsets, 0, out, *update, shown=shown)
            yield case("grouped_rows", what, x, matrices, offsets, None, *update)
        if name != "fp32":
            short = _meta(experts, width, _I, dtype=dtype).mT
            x = _meta(_R, _I, dtype=dtype)
            yield case("grouped_rows", f"{name} R={_R} short", x, short, offsets, shown=name == "bf16")
        x = _meta(4096, width, dtype=dtype)
        for rank in (8, 64):
            factors = _meta(experts, rank, width, dtype=dtype)
            yield case("grouped_rows", f"{name} narrow r={rank}", x, factors.mT, offsets)
            yield case("grouped_add", f"{name} r={rank}", x, _meta(len(x), rank, dtype=dtype), factors, offsets)
    for form, (name, dtype) in itertools.product(("nf4", "nf4 nested", "mxfp4", "fp8", "int8"), _DTYPES.items()):
        stored = _packed(form, experts, height, width)
        yield case("unpack", f"{form} {name}", stored, 0, 4, dtype, None, shown=name == "bf16")
        if name != "fp32":  # what the copy engine does not fetch
            out, slices = _meta(_R, height, dtype=dtype), [(0, experts // 2), (experts // 2, experts)]
            yield case("packed_slices", f"{form} {name}", _meta(_R, width, dtype=dtype), stored, offsets, out, False, slices)
        for rows, rank, back in itertools.product((8, 32, 96), (0, 16), (False, True)):
            depth, outputs = (height, width) if back else (width, height)
            x, low = _meta(rows * experts, depth, dtype=dtype), _meta(rows * experts, rank, dtype=dtype)
            update = (low, _meta(experts, outputs, rank, dtype=dtype).mT) if rank else (None, None)
            what = f"{form} {name} R/E={rows} r={rank}" + (" back" if back else "")
            yield case("packed_rows", what, x, stored, offsets, None, back, *update, shown=name == "bf16" and not rank)


def _all_gathered() -> Iterator[Case]:
    """Where the copy engine fetches matrices: on others there is nothing to compile."""
    gates = {
        "silu": (*_SILU, 0.0, None, False, "concatenated"),
        "clamp after bias": (*_QUICK, 1.0, 7.0, True, "interleaved"),
        "relu2": (*_RELU2, 0.0, None, False, "ungated"),
    }
    for (name, dtype), rows, back in itertools.product(_DTYPES.items(), (_R, 4096), (False, True)):
        if name == "fp32":
            continue
        tokens, weight, offsets = _meta(rows // _K, _H, dtype=dtype), _meta(_E, 2 * _I, _H, dtype=dtype), _integers(_E)
        matrices = weight.transpose(1, 2).contiguous() if back else weight.mT
        what = f"{name} R={rows}" + (" back" if back else "")
        args = (tokens, _integers(rows), matrices, offsets)
        yield Case(f"gathered_rows {what}", "gathered_rows", args, aligned=False)
        less, few = _meta(rows // _K, _H - 8, dtype=dtype), _meta(_E, 2 * _I, _H - 8, dtype=dtype)
        odd = (
            less,
            _integers(rows),
            few.transpose(1, 2).contiguous() if back else few.mT,
            offsets,
        )  # 8 divides them, not 16
        if rows == _R:
            yield Case(f"gathered_rows {what} odd", "gathered_rows", odd, aligned=False)
        for (label, gate), keep in itertools.product(gates.items(), (False, True)):
            bias = _meta(_E, 2 * _I) if "bias" in label else None
            given = (*args, _meta(rows), bias, keep, False, *gate)
            yield Case(f"gathered_glu {what} {label}" + " kept" * keep, "gathered_glu", given, aligned=False)


def _all_outer() -> Iterator[Case]:
    for (name, dtype), (height, width) in itertools.product(_DTYPES.items(), ((2 * _I, _H), (_H, _I))):
        tables = (_integers(_R), _integers(_T + 1), _integers(_R))
        left, right, shown = _meta(_R, height, dtype=dtype), _meta(_R, width, dtype=dtype), name == "bf16"
        yield Case(f"grouped_outer {name} {height}x{width}", "grouped_outer", (left, right, _integers(_E)), shown, False)
        if name == "fp32":  # of which no rows are fetched as they are found
            continue
        for odd in (0, 8):
            args = (_meta(_T, height - odd, dtype=dtype), right, _integers(_E), tables, "left")
            yield Case(f"gathered_outer {name} {height - odd}x{width}", "gathered_outer", args, False, False)


_FORMS = ("nf4", "nf4 nested", "mxfp4", "fp8", "int8")


def _all_decoding() -> Iterator[Case]:
    """With one row an expert and with four: sums, and matrix instructions."""
    for form, name, (height, width) in itertools.product(_FORMS, ("bf16", "fp16"), ((2 * _I, _H), (_H, _I))):
        stored = _packed(form, _E, height, width)
        for rows in (1, 4):
            args = (_meta(rows * _E, width, dtype=_DTYPES[name]), stored, _integers(_E))
            shown = name == "bf16" and width == _H and form != "nf4 nested"
            yield Case(f"packed_rows_few {form} {name} R/E={rows} {width}", "packed_rows_few", args, shown, aligned=False)


_ONE_TOKEN = (
    ("silu", (_E, _H, _I, _K), (*_SILU, 0.0, None, False, "concatenated")),
    ("clamp after bias", (32, 2880, 2880, 4), (*_QUICK, 1.0, 7.0, True, "interleaved")),
    ("relu2", (_E, _H, _I, _K), (*_RELU2, 0.0, None, False, "ungated")),
)


def _all_by_slot() -> Iterator[Case]:
    """One token, with weights stored either way or packed: Qwen3's layer, and gpt-oss's."""
    for (name, dtype), (label, (experts, hidden, inner, topk), gate) in itertools.product(_DTYPES.items(), _ONE_TOKEN):
        width = inner if gate[-1] == "ungated" else 2 * inner
        stored = [_meta(experts, width, hidden, dtype=dtype), _meta(experts, hidden, inner, dtype=dtype)]
        biases = [_meta(experts, width), _meta(experts, hidden)] if "bias" in label else [None, None]
        x, indices, weights = _meta(1, hidden, dtype=dtype), _meta(1, topk, dtype=torch.int64), _meta(1, topk)
        for across in (False, True):
            matrices = [weight.mT.contiguous() if across else weight.mT for weight in stored]
            what = f"{name} {label}" + (" across" if across else "")
            args = (x, indices, weights, *matrices, *biases, *gate, False)
            yield Case(f"experts_by_slot {what}", "experts_by_slot", args, name == "bf16" and label == "silu")
        for form in _FORMS if name != "fp32" else ():  # sums of codes are of halves alone
            packed = [_packed(form, *weight.shape) for weight in stored]
            args = (x, indices, weights, *packed, *biases, *gate, False)
            shown = name == "bf16" and label == "silu" and form != "nf4 nested"
            yield Case(f"experts_by_slot {name} {label} {form}", "experts_by_slot", args, shown, aligned=False)


def cases(select: Callable[[Case], bool] = lambda case: True) -> Iterator[Case]:
    """All of them, or those that ``select`` takes."""
    products = (_all_products, _all_gathered, _all_outer, _all_decoding, _all_by_slot)
    for family in (_all_glu, _all_rows, _all_tables, _all_routers, *products):
        yield from filter(select, family())
