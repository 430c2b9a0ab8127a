"""The CPU kernels by themselves: what the operators' own tests, which run on this backend too, do not reach."""

import ctypes
import itertools
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba")

import moekit
from moekit.kernels import numba as kernels
from moekit.kernels.numba import _activations, _bits, _elements, _glu_kernels, _jit, _launch, _threads, _warmup, tables
from moekit.ops import glu, rows, topk
from moekit.ops import tables as table_ops

KERNELS = kernels.KERNELS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_rounded_once(result, exact, slack=2.0):
    """``result`` is at most ``slack`` roundings away from ``exact`` (float64), sums of terms of both signs aside."""
    eps = torch.finfo(result.dtype).eps
    allowed = slack * eps / 2 * exact.abs() + 16 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert bool(((result.double() - exact).abs() <= allowed + torch.finfo(result.dtype).tiny).all())


# --- conversions ------------------------------------------------------------------------------------------------------


def _converter(read, convert, write, name):
    @_jit.kernel("test", name)
    def apply(start: "int", stop: "int", source: "int", target: "int"):
        for i in range(start, stop):
            write(target, i, convert(read(source, i)))

    return apply


SMALL_FLOATS = {
    "bf16": (torch.bfloat16, _bits.read_u16, _bits.write_u16, _elements.narrow_bf16, _elements.widen_bf16),
    "f16": (torch.float16, _bits.read_u16, _bits.write_u16, _elements.narrow_f16, _elements.widen_f16),
    "e4m3": (torch.float8_e4m3fn, _bits.read_u8, _bits.write_u8, _elements.narrow_e4m3, _elements.widen_e4m3),
}
if _bits.HARDWARE_BF16:
    SMALL_FLOATS["bf16 instruction"] = (*SMALL_FLOATS["bf16"][:3], _bits.narrow_bf16, _elements.widen_bf16)
if _bits.HARDWARE_F16:
    SMALL_FLOATS["f16 instruction"] = (*SMALL_FLOATS["f16"][:3], _bits.narrow_f16, _bits.widen_f16)


def _floats(dtype):
    every = torch.arange(-(2**31), 2**31, 40_009).to(torch.int32).view(torch.float32)
    edges = torch.tensor([0.0, -0.0, 448, 463.9, 65504, 65519.9, 65520, 2**-6, 2**-9, 2**-10, 2**-24, 2**-25])
    values = torch.cat([every, edges, torch.randn(4096), -torch.randn(4096).exp()])
    if dtype is torch.bfloat16:  # the instruction flushes subnormals
        values = values[(values.abs() >= torch.finfo(torch.float32).tiny) | values.isnan() | (values == 0)]
    return values[values.isfinite()] if dtype is torch.float8_e4m3fn else values


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_conversions_and_their_twins_equal_torch(name):
    dtype, read, write, narrow, widen = SMALL_FLOATS[name]
    values = _floats(dtype)
    if dtype is torch.float8_e4m3fn:
        values = values.clamp(-448, 448)
    narrowed, widened = torch.empty(values.shape, dtype=dtype), torch.empty_like(values)
    _converter(_bits.read_f32, narrow, write, f"narrow {name}".replace(" ", "_"))(
        0, len(values), values.data_ptr(), narrowed.data_ptr()
    )
    torch.testing.assert_close(narrowed.float(), values.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    _converter(read, widen, _bits.write_f32, f"widen {name}".replace(" ", "_"))(
        0, len(values), narrowed.data_ptr(), widened.data_ptr()
    )
    torch.testing.assert_close(widened, narrowed.float(), rtol=0, atol=0, equal_nan=True)


def test_float8_saturates_and_keeps_nan():
    values = torch.tensor([500.0, -1e30, float("inf"), float("nan")])
    out = torch.empty(4, dtype=torch.float8_e4m3fn)
    _converter(_bits.read_f32, _elements.narrow_e4m3, _bits.write_u8, "narrow_e4m3")(0, 4, values.data_ptr(), out.data_ptr())
    assert out.float().tolist()[:3] == [448, -448, 448] and out.float()[3].isnan()


def test_exp_is_accurate_over_its_range():
    @_jit.kernel("test", "exp")
    def apply(start: "int", stop: "int", source: "int", target: "int"):
        for i in range(start, stop):
            _bits.write_f32(target, i, _activations.exp(_bits.read_f32(source, i)))

    x = torch.cat([torch.linspace(-87, 88, 100_001), torch.linspace(-1e-3, 1e-3, 1001), torch.tensor([-1e30, 1e30])])
    out = torch.empty_like(x)
    apply(0, len(x), x.data_ptr(), out.data_ptr())
    exact = x.double().clamp(-87, 88).exp()
    assert ((out.double() - exact).abs() / exact).max() < 2 * torch.finfo(torch.float32).eps


# --- gated activations ------------------------------------------------------------------------------------------------

SPECS = {
    "swiglu": glu.make_glu(),
    "geglu": glu.make_glu("gelu_tanh"),
    "clamped": glu.make_glu("quick_gelu", linear_offset=1.0, clamp=1.5),
    "gpt-oss": glu.make_glu("quick_gelu", linear_offset=1.0, clamp=1.5, clamp_after_bias=True, layout="interleaved"),
    "ungated": glu.make_glu("relu2", layout="ungated"),
}
SPECS_BY_DTYPE = [("swiglu", dtype) for dtype in DTYPES] + [(name, torch.bfloat16) for name in list(SPECS)[1:]]


def _glu_case(name, dtype, num_rows=300, width=200, bias="expert"):
    torch.manual_seed(0)
    features = width if name == "ungated" else 2 * width
    y, grad = torch.randn(num_rows, features).mul(2).to(dtype), torch.randn(num_rows, width).to(dtype)
    offsets = torch.tensor([7, 7, 250, num_rows - 20], dtype=torch.int32) if bias == "expert" else None
    shape = {"expert": (4, features), "shared": (features,), "row": (num_rows, features)}.get(bias)
    return grad, y, torch.rand(num_rows), None if shape is None else torch.randn(shape).to(dtype), offsets


@pytest.mark.parametrize(("name", "dtype"), SPECS_BY_DTYPE)
@pytest.mark.parametrize("bias", [None, "expert"])
def test_glu_matches_float64(name, dtype, bias):
    grad, y, weights, bias, offsets = _glu_case(name, dtype, bias=bias)
    args, wanted = (y, weights, bias, offsets), [True, True, bias is not None, True]
    results = [
        KERNELS["glu"](*args, *SPECS[name]),
        *KERNELS["glu_backward"](grad, y, None, *args[1:], *SPECS[name], wanted),
    ]
    wide = [double(arg) for arg in args]
    exact = [
        glu.glu_reference(*wide, *SPECS[name]),
        *glu.glu_backward_reference(double(grad), wide[0], None, *wide[1:], *SPECS[name], wanted),
    ]
    assert torch.equal(results[0], results[4])
    for result, value in zip(results, exact, strict=True):
        if value.numel():
            assert_rounded_once(result, value)


@pytest.mark.parametrize("bias", ["shared", "row", "expert"])
def test_glu_is_bit_equal_for_any_threads_and_any_way_of_writing(threads, monkeypatch, bias):
    monkeypatch.setattr(_threads, "_WORTH_SHARING", 0)
    grad, y, weights, bias, offsets = _glu_case("swiglu", torch.bfloat16, num_rows=1500, width=256, bias=bias)
    seen = []
    for num_threads, outgrows in itertools.product((1, 2, 4), (0, 1 << 60)):
        threads(num_threads)
        monkeypatch.setattr(_launch, "_OUTGROWS_CACHE", outgrows)
        args = (weights, bias, offsets, *SPECS["swiglu"])
        out = KERNELS["glu_fp8"](y, *args)
        seen.append((*out, *KERNELS["glu_backward"](grad, y, None, *args, [True] * 4)))
    for other in seen[1:]:
        for first, second in zip(seen[0], other, strict=True):
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1.0, 224.0, 225.0, 448.0, 449.0, 1e30, 3e38])
def test_fp8_store_equals_the_reference(size):
    y = torch.randn(5, 64).clamp(-2, 2)
    y = y / y.abs().amax(1, keepdim=True) * size
    _, kept, scales = KERNELS["glu_fp8"](y, None, None, None, *SPECS["swiglu"])
    for result, wanted in zip((kept.float(), scales), map(torch.Tensor.float, glu.store_fp8(y)), strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=4)))
def test_glu_backward_computes_what_is_wanted(wanted):
    grad, y, weights, bias, offsets = _glu_case("swiglu", torch.float32)
    args = (grad, y, None, weights, bias, offsets, *SPECS["swiglu"])
    whole = KERNELS["glu_backward"](*args, [True] * 4)
    for result, full, want in zip(KERNELS["glu_backward"](*args, list(wanted)), whole, wanted, strict=True):
        assert torch.equal(result, full if want else full.new_empty(0))


# --- rows, tables, router ---------------------------------------------------------------------------------------------


def _routed(num_tokens=200, experts=16, k=4, dropped=0.2):
    torch.manual_seed(1)
    indices = torch.rand(num_tokens, experts).topk(k).indices
    indices[torch.rand(num_tokens, k) < dropped] = -1
    with moekit.backend("torch"):
        routing = moekit.Routing.from_topk(indices, torch.rand(num_tokens, k), num_experts=experts).pad_to_multiple(8)
        return routing, routing.row_tables(), routing.row_weights()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 130, 2304])
def test_row_movement_for_any_threads_and_any_way_of_writing(threads, monkeypatch, dtype, width):
    monkeypatch.setattr(_threads, "_WORTH_SHARING", 0)
    routing, found, weights = _routed()
    tokens, values = torch.randn(200, width).to(dtype), torch.randn(routing.num_rows, width).to(dtype)
    exact = rows._unpermute_reference(values.double(), weights.double(), *found)
    for num_threads, outgrows in itertools.product((1, 2, 4), (0, 1 << 60)):
        threads(num_threads)
        monkeypatch.setattr(_launch, "_OUTGROWS_CACHE", outgrows)
        assert torch.equal(KERNELS["permute"](tokens, *found), rows._permute_reference(tokens, *found))
        summed = KERNELS["unpermute"](values, weights, *found)
        assert_rounded_once(summed, exact)
        grads = KERNELS["unpermute_backward"](tokens, values, weights, *found, [True, True])
        first = (summed, *grads) if num_threads == 1 and not outgrows else first  # noqa: F821
        assert all(map(torch.equal, first, (summed, *grads)))
    wide = [t.double() for t in (tokens, values, weights)]
    for result, value in zip(grads, rows._weighted_backward_reference(*wide, *found, [True, True]), strict=True):
        assert_rounded_once(result, value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float64, torch.bool])
def test_permute_moves_any_dtype(dtype):
    _, found, _ = _routed()
    tokens = torch.arange(200 * 5).view(200, 5).to(dtype)
    assert torch.equal(KERNELS["permute"](tokens, *found), rows._permute_reference(tokens, *found))


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("experts", [1, 7, 64, 130])
def test_tables_equal_the_reference_for_any_threads(threads, monkeypatch, num_threads, experts):
    monkeypatch.setattr(_threads, "_WORTH_SHARING", 0)
    monkeypatch.setattr(tables, "_PIECE", 16)
    threads(num_threads)
    torch.manual_seed(2)
    indices = torch.randint(-1, experts, (97, 3))
    routed = (torch.rand(97, experts) < 0.3).to(torch.bfloat16) * -0.5
    spare = int((routed != 0).sum()) + 3
    for op, args in {
        "route_indices": (indices, experts),
        "route_map": (routed, spare),
        "map_to_indices": (routed, None),
        "route_capacity": (routed, 110),
        "rows_of_tokens": (torch.randint(-1, 97, (300,), dtype=torch.int32), 97),
    }.items():
        results, wanted = KERNELS[op](*args), getattr(table_ops, f"_{op}_reference")(*args)
        if isinstance(results, torch.Tensor):
            results, wanted = (results,), (wanted,)
        assert all(map(torch.equal, results, wanted)), op


@pytest.mark.parametrize("groups", [(0, 0, 0), (4, 2, 2)])
@pytest.mark.parametrize("by_logits", [False, True])
@pytest.mark.parametrize("score", topk.SCORE_FUNCTIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_router_equals_the_reference_with_ties_and_nan(groups, by_logits, score, biased):
    torch.manual_seed(3)
    logits = torch.randn(64, 32).mul(4).round().div(4)
    logits[1, ::3], logits[2], logits[3, :20], logits[4] = float("nan"), float("nan"), float("-inf"), -0.0
    bias = torch.randn(32).mul(4).round() / 8 if biased else None
    args = (logits, bias, None, 4, score, False, 1e-6, 2.5, by_logits, *groups)
    weights, indices, _ = KERNELS["topk_router"](*args)
    wanted_weights, wanted_indices, _ = topk._topk_router_reference(*args)
    assert torch.equal(indices, wanted_indices)
    torch.testing.assert_close(weights, wanted_weights, equal_nan=True)


@pytest.mark.parametrize("op", ["glu", "unpermute", "topk_router"])
def test_float64_is_left_to_the_reference(op):
    _, found, _ = _routed()
    x = torch.randn(4, 4, dtype=torch.float64)
    args = {
        "glu": (x, None, None, None, *SPECS["swiglu"]),
        "unpermute": (x, None, *found),
        "topk_router": (x, None, None, 2, "softmax", False, None, None, False, 0, 0, 0),
    }
    assert KERNELS[op](*args[op]) is NotImplemented


# --- compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_an_unwritable_cache_directory_breaks_nothing(monkeypatch, error):
    real = _jit.njit

    def refuse(*args, cache=False, **options):
        if cache:
            raise error("no locator available")
        return real(*args, **options)

    monkeypatch.setattr(_jit, "njit", refuse)
    kernel = _glu_kernels.sum_blocks_kernel.__wrapped__()
    sums, out = torch.ones(1, 3), torch.empty(3)
    kernel(0, 1, sums.data_ptr(), 0, 5, 3, out.data_ptr())
    assert out.tolist() == [1, 1, 1]


def test_warmup_reports_progress(monkeypatch):
    done, calls = [], []
    factories = [tables.kernels.total_kernel, tables.kernels.chunk_rows_kernel]
    monkeypatch.setattr(_warmup, "_usual", lambda: iter([lambda f=f: (done.append(f), f())[1] for f in factories]))
    assert kernels.warmup(lambda *step: calls.append(step)) == 2
    assert done == factories and calls == [(0, 2), (1, 2), (2, 2)]


# Every operator on memory that ends, inputs and outputs alike, right before a page that may not be touched. The script
# also runs with NUMBA_BOUNDSCHECK=1, which watches the arrays of kernels that have some: all but those of gated activations.
# Of these it takes two that differ in layout, clamp and activation, and that other tests have on disk.
GUARDED = """
    import ctypes, math, mmap, os
    import torch
    import moekit
    from moekit.kernels.numba import KERNELS, _launch, tables
    from moekit.ops import glu, rows

    torch.set_num_threads(1)
    libc, page, held, make = ctypes.CDLL(None), mmap.PAGESIZE, [], torch.empty

    def guarded(size, dtype=torch.float32, **_):
        shape = (size,) if isinstance(size, int) else tuple(size)
        count = math.prod(shape)
        used = count * make(0, dtype=dtype).element_size()
        if not used:
            return make(shape, dtype=dtype)
        pages = -(-used // page)
        memory = mmap.mmap(-1, (pages + 1) * page)
        held.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=pages * page - used).view(shape)

    def guard(x):
        if not isinstance(x, torch.Tensor) or not x.numel():
            return x
        copy = guarded(x.shape, x.dtype)
        return copy.copy_(x)

    def call(op, *args):
        result = KERNELS[op](*map(guard, args))
        assert result is not NotImplemented, op
        return result

    torch.manual_seed(0)
    _launch.torch.empty = guarded
    tables._PIECE = 8
    gpt_oss = glu.make_glu("quick_gelu", linear_offset=1.0, clamp=1.0, clamp_after_bias=True, layout="interleaved")
    specs = (glu.make_glu(), gpt_oss) if os.environ["NUMBA_BOUNDSCHECK"] == "0" else ()
    for width, outgrows in ((1, 1 << 60), (33, 1 << 60), (160, 1 << 60), (160, 0)):
        _launch._OUTGROWS_CACHE = outgrows
        for dtype in (torch.float32, torch.bfloat16):
            for spec in specs:
                y, grad, bias = torch.randn(9, 2 * width), torch.randn(9, width), torch.randn(2, 2 * width)
                y, grad, bias = y.to(dtype), grad.to(dtype), bias.to(dtype)
                rest = (torch.rand(9), bias, torch.tensor([3, 8]), *spec)
                _, kept, scales = call("glu_fp8", y, *rest)
                for stored, scale in ((y, None), (kept, scales)):
                    call("glu_backward", grad, stored, scale, *rest, [True] * 4)
                call("glu_backward", grad, y, None, None, bias[:1].expand(9, -1), None, *spec, [True] * 4)
            indices = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 0], [1, 0]])
            counts, offsets, order, inverse = call("route_indices", indices, 3)
            call("pad_rows", offsets, order, inverse, 4)
            routed = torch.zeros(5, 70, dtype=torch.bool)
            routed[:, ::9] = True
            call("map_to_indices", routed, None), call("route_capacity", routed, 3), call("route_capacity", routed, 8)
            _, row_token, *_ = call("route_map", routed, 45)
            found = (row_token, *call("rows_of_tokens", row_token, 5))
            tokens, values = torch.randn(5, width).to(dtype), torch.randn(45, width).to(dtype)
            call("permute", tokens, *found)
            call("unpermute", values, torch.rand(45), *found)
            call("unpermute_backward", tokens, values, torch.rand(45), *found, [True, True])
            call("sort_chunk_rows", torch.tensor([2, 3]), torch.tensor([1, 0]), 5, 5)
            for score in ("softmax", "sigmoid"):
                logits, args = torch.randn(5, 12).to(dtype), (score, score == "softmax", 1e-20, None)
                _, experts, link = call("topk_router", logits, torch.rand(12), None, 3, *args, False, 4, 2, 1)
                call("weigh_experts", logits, experts, None, *args)
                mask = torch.tensor([True, False, False, True, False])
                call("score_sums", logits, torch.rand(12), score, mask)
                call("topk_router_backward", torch.randn(5, 3).to(dtype), torch.rand(12), logits, experts, mask, *args)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
@pytest.mark.parametrize("boundscheck", ["0", "1"])
def test_nothing_is_touched_past_the_end(boundscheck, tmp_path):
    environment = {"NUMBA_BOUNDSCHECK": boundscheck, "PYTHONPATH": str(Path(moekit.__file__).parents[1])}
    if boundscheck == "1":  # kernels on disk were compiled without the checks
        environment |= {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_OPT": "0"}  # which come before any optimisation
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", textwrap.dedent(GUARDED)],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def scatter_small_memory(libc, order: random.Random) -> list[int]:
    """The next small pieces of memory that this thread asks for lie near each other or far apart, up or down.

    Returns what lies between them, to be freed afterwards.
    """
    between = []
    for size in range(96, 320, 16):
        apart = order.choice([16, 32, 64, 128, 700])
        places = []
        for _ in range(7):
            places.append(libc.malloc(size))
            between.append(libc.malloc(apart))
        for place in order.choice([places, places[::-1], order.sample(places, 7)]):  # what is freed last is taken first
            libc.free(place)
    return between


@pytest.mark.skipif(sys.platform != "linux", reason="needs the C library by its name")
def test_a_router_has_the_same_bits_wherever_its_scratch_memory_lies():
    """Chance decides where: without room between the arrays six of ten runs fail."""
    libc, order, between = ctypes.CDLL(None), random.Random(0), []
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    draws = [(torch.randn(100, 8, requires_grad=True), torch.randn(100, 2)) for _ in range(4)]
    found = [set() for _ in draws]
    for _ in range(150):
        for seen, (logits, grad) in zip(found, draws, strict=True):
            between += scatter_small_memory(libc, order)
            with moekit.backend("numba"):
                routing = moekit.route(logits, 2, select_by="logits")
                loss = (routing.weights * grad).sum() + moekit.balance_loss(routing, 0.1)
                (gradient,) = torch.autograd.grad(loss, (logits,))
            seen.add(routing.weights.detach().numpy().tobytes() + gradient.numpy().tobytes())
    for place in between:
        libc.free(place)
    assert [len(seen) for seen in found] == [1] * 4
