"""``moekit.plan`` against what Transformers builds, what ``moekit.pack`` makes, and what a step allocates and multiplies."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from _memory import peak_bytes, saved_bytes
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import moekit
from moekit import Lora, Routing
from moekit.cli.app import app
from moekit.ops import gemm, tables
from moekit.plan import MACHINES, Model, Rates, changed, given, plan, planning, presets, rates, read, show
from moekit.plan import memory as accounts
from moekit.plan.memory import SAVES, Load, step
from moekit.plan.weights import packed_bytes

ROOT = Path(__file__).resolve().parent.parent
WITHIN = 0.05  # of what is measured, is what a plan promises

# --- parameters -----------------------------------------------------------------------------------------------------

TINY: dict[str, list[dict[str, Any]]] = {
    "mixtral": [{"intermediate_size": 24, "num_local_experts": 5, "num_key_value_heads": 2}, {"head_dim": 6}],
    "minimax_m2": [{"intermediate_size": 24, "num_local_experts": 6, "head_dim": 8, "num_key_value_heads": 2}],
    "gpt_oss": [
        {"intermediate_size": 24, "num_local_experts": 6, "head_dim": 8, "num_key_value_heads": 2},
        {"attention_bias": False},
    ],
    "olmoe": [{"intermediate_size": 24, "num_experts": 6, "num_key_value_heads": 2}, {"attention_bias": True}],
    "qwen3_moe": [
        {"moe_intermediate_size": 24, "num_experts": 6, "head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 40},
        {"decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    ],
    "qwen2_moe": [
        {"moe_intermediate_size": 24, "num_experts": 6, "shared_expert_intermediate_size": 20, "intermediate_size": 40}
        | {"num_key_value_heads": 4},
        {"mlp_only_layers": [0], "qkv_bias": False, "num_key_value_heads": 2},
    ],
    "deepseek_v3": [
        {"moe_intermediate_size": 24, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "intermediate_size": 40}
        | {"first_k_dense_replace": 3, "n_shared_experts": 1}
        | {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10, "q_lora_rank": 14},
        {"q_lora_rank": None, "first_k_dense_replace": 1, "n_shared_experts": 2, "attention_bias": True},
    ],
    "glm4_moe": [
        {
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "head_dim": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 40,
        }
        | {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
        {"use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 2, "n_shared_experts": 3},
    ],
}
COMMON = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "num_experts_per_tok": 2}
COMMON |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
CASES = {
    f"{kind}-{place}-{'tied' if tied else 'untied'}": (
        kind,
        COMMON | {k: v for d in given_[: place + 1] for k, v in d.items()},
        tied,
    )
    for kind, given_ in TINY.items()
    for place in range(len(given_))
    for tied in (False, True)
}


def built(kind: str, **settings: Any) -> tuple[int, int, str]:
    """Parameters of Transformers' model and of its experts, and its config as a file has it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    return sum(sizes.values()), sum(n for name, n in sizes.items() if ".experts." in name), config.to_json_string()


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_transformers(case: str):
    kind, settings, tied = CASES[case]
    total, experts, text = built(kind, **settings, tie_word_embeddings=tied)
    for content in (json.loads(text), {"model_type": kind, **settings, "tie_word_embeddings": tied}):
        model = read(content)
        assert (model.parameters, model.experts_parameters) == (total, experts)
        assert (model.model_type, model.hidden, model.inner, model.topk) == (kind, 32, 24, 2)
    assert set(TINY) == set(moekit.plan.families.FAMILIES)


PUBLISHED = {  # billions: all and, where the model's card says so in the same way of counting, active
    "DeepSeek-V3": (671, 37),
    "GLM-4.5-Air": (106, 12),
    "MiniMax-M2": (230, 10),
    "Mixtral-8x7B": (46.7, 12.9),
    "OLMoE-1B-7B": (6.9, 1.3),
    "Qwen1.5-MoE-A2.7B": (14.3, 2.7),
    "Qwen3-235B-A22B": (235, 22),
    "Qwen3-30B-A3B": (30.5, 3.3),
    "gpt-oss-120b": (117, None),
    "gpt-oss-20b": (21, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(name: str):
    model = read(name.lower())
    content = json.loads((Path(moekit.__file__).parent / "plan" / "presets" / f"{name}.json").read_text(encoding="utf-8"))
    kind = content.pop("model_type")
    assert (model.parameters, model.experts_parameters) == built(kind, **content)[:2]
    total, active = PUBLISHED[name]
    assert model.name == name and model.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert active is None or model.active_parameters / 1e9 == pytest.approx(active, rel=0.13)
    assert presets() == sorted(PUBLISHED)


def test_a_config_is_a_file_a_folder_or_a_dict(tmp_path: Path):
    kind, settings, _ = CASES["qwen3_moe-1-untied"]
    content = {"model_type": kind, **settings}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    found = [read(tmp_path), read(str(tmp_path / "config.json")), read(content)]
    assert {model.parameters for model in found} == {found[0].parameters} and found[0].name == tmp_path.name
    assert found[0].moe_layers == 1  # every second of five, but for the fourth


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["nf4", "nf4 double", "mxfp4", "fp8", "int8"])
def test_packed_bytes_are_those_of_pack(format: str):
    name, double = format.split()[0], "double" in format
    for shape in ((4, 96, 64), (3, 64, 160), (5, 128, 128)):
        codes, scales, *_ = moekit.pack(torch.randn(shape), name, **({"double_quant": True} if double else {})).stored()
        made = sum(part.numel() * part.element_size() for part in (codes, *scales))
        assert packed_bytes(shape, name, double_quant=double) == made


def test_whole_models_take_what_was_measured():
    """GiB of experts, other weights, adapters of rank 8 and moments, as docs/performance/whole_models_h200.json has them."""
    for found in json.loads((ROOT / "docs/performance/whole_models_h200.json").read_text(encoding="utf-8")):
        options = {"format": found["format"], "double_quant": bool(found.get("double_quant")), "lora": 8, "memory": 24}
        made, parts = plan(found["model"], tokens=found["tokens"], **options), found["parts GiB"]
        gib = 2**30
        weights = (made.fit.experts + made.fit.others) / gib  # there, gpt-oss's biases of experts are among the others
        assert weights == pytest.approx(parts["experts"] + parts["other weights"], rel=1e-3)
        assert made.fit.experts / gib == pytest.approx(parts["experts"], rel=2e-3)
        assert made.fit.training / gib == pytest.approx(parts["adapters"] + parts["moments"], rel=1e-3)
        assert 2 * made.parameters.adapters / gib == pytest.approx(parts["adapters"], rel=1e-3)
        assert made.fit.total["checkpointed"] / gib < found["peak GiB"] < 1.1 * made.fit.total["checkpointed"] / gib


# --- bytes of a step, measured --------------------------------------------------------------------------------------

SHAPE = (256, 256, 128, 16, 4)  # tokens, hidden, intermediate, experts, topk
WAYS: dict[str, dict[str, Any]] = {
    "trained": {},
    "frozen": {"frozen": True},
    "adapters": {"rank": 16},
    "nf4": {"packed": "nf4"},
    "adapters on nf4": {"rank": 16, "packed": "nf4"},
    "adapters on fp8": {"rank": 16, "packed": "fp8"},
    "trained, biases": {"biases": True},
    "trained, float32": {"dtype": torch.float32},
}


class Layer:
    """One layer of experts, evenly loaded, and what a plan says of it."""

    def __init__(self, *, frozen=False, rank=0, packed="", biases=False, dtype=torch.bfloat16, save="recompute") -> None:
        tokens, hidden, inner, experts, topk = SHAPE
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

        weights: list[Any] = [draw(experts, 2 * inner, hidden), draw(experts, hidden, inner)]
        added = [draw(experts, 2 * inner), draw(experts, hidden)] if biases else []
        trained = not (frozen or rank or packed)
        self.x, self.leaves = draw(tokens, hidden).requires_grad_(), []
        if trained:
            self.leaves += [weight.requires_grad_() for weight in (*weights, *added)]
        weights = [moekit.pack(weight, packed) for weight in weights] if packed else weights
        sizes = ((rank, hidden), (2 * inner, rank), (rank, inner), (hidden, rank)) if rank else ()
        factors = [draw(experts, *size).requires_grad_() for size in sizes]
        lora = {"gate_up": Lora(*factors[:2]), "down": Lora(*factors[2:])} if rank else None
        order = torch.randperm(tokens * topk // experts * experts, generator=generator) % experts
        self.indices = (torch.arange(topk) + order[:tokens, None]) % experts
        self.weights = torch.rand(tokens, topk, generator=generator).requires_grad_()
        self.leaves += [self.x, self.weights, *factors]
        named = dict(zip(("gate_up_bias", "down_bias"), added, strict=True)) if added else {}
        self.given, self.options = (*weights, *added), {**named, "lora": lora, "save": save}
        self.matrices, self.grad = weights, draw(tokens, hidden)
        self.load = Load(
            *(tokens, tokens * topk, hidden, inner, experts, topk, True, biases, self.x.element_size()),
            **{"trained": trained, "rank": rank, "packed": packed, "save": save, "device": "cpu"},
        )

    def run(self, x: Tensor | None = None, routing: Any = None) -> Tensor:
        routing = (self.indices, self.weights) if routing is None else routing
        return moekit.experts(self.x if x is None else x, routing, *self.matrices, **self.options)

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def step(self) -> None:
        self.clear()
        self.run().backward(self.grad)

    def infer(self) -> None:
        with torch.no_grad():
            self.run()

    def kept(self) -> int:
        own = [*self.leaves, self.indices, *(tensor for tensor in self.given if type(tensor) is Tensor)]
        return sum(saved_bytes(self.run, own).values())


@pytest.mark.not_interpreted
@pytest.mark.parametrize("way", WAYS)
@moekit.backend("auto")  # the reference makes float32 copies of all rows
def test_bytes_of_a_step_are_those_measured(way: str):
    for save in SAVES:
        layer = Layer(**WAYS[way], save=save)
        layer.step()  # what is made once, such as tables of formats, is there
        layer.clear()
        found = step(layer.load)
        assert found.kept == layer.kept(), save
        for planned, run in ((found.peak, layer.step), (found.forward, layer.infer)):
            layer.clear()
            assert planned == pytest.approx(peak_bytes(run), rel=WITHIN), (save, run.__name__)
        layer.step()
        assert found.left == sum(leaf.grad.nbytes for leaf in layer.leaves)


@pytest.mark.not_interpreted
@moekit.backend("auto")
def test_a_rank_of_several_has_the_rows_of_its_experts():
    """More tokens than rows by their slots: order and inverse have room for all of them."""
    layer, (tokens, _, _, experts, topk) = Layer(frozen=True), SHAPE
    elsewhere = torch.arange(topk) >= 1  # one slot of each token is of this rank
    indices = layer.indices.masked_fill(elsewhere, -1)
    counts, offsets, order, inverse = tables.route_indices(indices, experts)
    routing = Routing(indices, layer.weights, counts, offsets, order[:tokens], inverse)

    def run() -> None:
        layer.clear()
        layer.run(routing=routing).backward(layer.grad)

    run()
    layer.clear()
    found = step(Load(**{**vars(layer.load), "rows": tokens}))
    inside = order.untyped_storage().nbytes() + inverse.nbytes + offsets.nbytes  # made before the step here
    assert found.peak - inside == pytest.approx(peak_bytes(run), rel=WITHIN)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("way", ["trained", "adapters on nf4"])
@moekit.backend("auto")
def test_layers_in_a_row_take_what_is_said_of_all(way: str):
    stack, (_, hidden, inner, experts, topk) = [Layer(**WAYS[way]) for _ in range(3)], SHAPE
    model = Model("three", "", 3, 3, hidden, inner, experts, topk)
    options = {"format": stack[0].load.packed or None, "lora": stack[0].load.rank, "device": "cpu"}
    found = plan(model, tokens=SHAPE[0], **options).activations["recompute"]

    def run() -> None:
        for layer in stack:
            layer.clear()
        x = stack[0].x * 1  # the input is of the step, as it is in a model
        for layer in stack:
            x = layer.run(x)
        x.backward(stack[0].grad)

    run()
    for layer in stack:
        layer.clear()
    assert found.all_peak == pytest.approx(peak_bytes(run), rel=WITHIN)


def measured(name: str) -> Any:
    return json.loads((ROOT / "docs" / "performance" / name).read_text(encoding="utf-8"))


GPU_SHAPES = measured("gpu_experts.json")["sizes"]


def load_of(shape: Any, **options: Any) -> Load:
    tokens, hidden, inner, experts, topk = shape
    return Load(tokens, tokens * topk, hidden, inner, experts, topk, **options)


@pytest.mark.parametrize("name", GPU_SHAPES)
def test_peaks_of_trained_layers_on_a_gpu(name: str):
    found = measured("gpu_experts.json")["shapes"][name].get("peak MiB", {})  # of one only times are measured
    for save, label in (("recompute", "moekit"), ("fp8", "moekit fp8")):
        planned = step(load_of(GPU_SHAPES[name], save=save, weight_itemsize=2)).peak / 2**20
        assert planned == pytest.approx(found.get(label, planned), rel=0.001)


def test_bytes_of_every_way_on_a_gpu():
    """As measured, but where the forward is highest, which held the projection and the activation to its end then."""
    cases, higher = measured("plan_h200.json")["cases"], []
    assert len(cases) > 80
    for case in cases:
        names = ("biases", "rank", "packed", "save", "trained")
        found = step(load_of(case["shape"], **{name: case[name] for name in names}))
        assert found.kept == case["kept"], case
        assert 0.9 * case["peak"] < found.peak < 1.01 * case["peak"], case
        assert 0.6 * case["forward"] < found.forward < 1.01 * case["forward"], case
        higher += [case] if found.peak < 0.99 * case["peak"] else []
    assert [(case["layer"], case["trained"]) for case in higher] == [("qwen3", False)]


def test_bytes_of_adapters_on_a_gpu():
    layers = {"Qwen3-30B-A3B": (2048, 768, 128, 8), "gpt-oss-20b": (2880, 2880, 32, 4)}
    for found in measured("packed_h200.json"):
        if found["what"] == "LoRA step" and found["name"].startswith("moekit"):
            form = found["name"].removeprefix("moekit, ").replace("dense", "")
            options = {"trained": False, "rank": 16, "packed": form, "weight_itemsize": 2}
            load = load_of((found["tokens"], *layers[found["layer"]]), **options)
            planned = step(load)
            assert planned.kept / 2**20 == pytest.approx(found["kept MiB"], rel=1e-6)
            assert planned.peak / 2**20 == pytest.approx(found["peak MiB"], rel=0.007)


def test_rows_are_shared_at_no_higher_peak_than_with_all_rows_together(monkeypatch):
    """Shapes of whole rows and of halves, of few and of many rows an expert."""
    grid = itertools.product((2048, 8192, 16384, 65536), (2, 8), (1536, 2048, 4096), (640, 1024, 4096), (8, 64, 256))
    loads = [
        load_of((tokens, hidden, inner, experts, topk), save=save)
        for tokens, topk, hidden, inner, experts in grid
        for save in ("recompute", "fp8")
    ]
    shared = [load for load in loads if accounts.shares_rows(load)]
    assert 20 < len(shared) < len(loads) / 2
    peaks = [step(load).peak for load in shared]
    monkeypatch.setattr(accounts, "shares_rows", lambda load: False)
    monkeypatch.setattr(accounts, "_WIDE_ROWS", math.inf)
    without = [step(load).peak for load in shared]
    assert all(peak <= 1.001 * other for peak, other in zip(peaks, without, strict=True))


def test_what_kernels_decide_by_is_what_is_planned_by():
    pytest.importorskip("triton")
    from moekit.kernels.triton import _policy
    from moekit.ops import experts_backward
    from moekit.ops.experts import SAVES as of_operator

    assert accounts._MOST_PER_MOVE == _policy._MOST_PER_MOVE
    assert accounts._WIDE_ROWS == _policy._WIDE_ROWS == experts_backward._WIDE
    assert accounts._MANY == _policy._MANY == experts_backward._MANY
    for hidden in (1536, 2048, 2880):
        parts = _policy.column_halves(hidden)
        held = accounts._brought_together(load_of((64, hidden, 256, 8, 1)), 256)["fetched"]
        assert held == 64 * 2 * max(part.stop - part.start for part in parts)
    sizes = itertools.product((128, 2048, 2049), (64, 128, 2048), (64, 128, 768, 776), (8, 128, 129))
    for rows, hidden, inner, experts in sizes:
        shape = _policy.Shape(rows * experts, experts, hidden, inner)
        fetched = _policy.outer(shape, torch.bfloat16, "9", gathered="left") is not None
        load = Load(rows * experts // 4, rows * experts, hidden, inner, experts, 4)
        assert accounts.fetches_left(load) == fetched, shape
    assert accounts.FEW_ROWS == gemm._FEW and of_operator == accounts.SAVES
    for rows in (1, 112, 113, 224, 225, 1000):
        shape = _policy.Shape(rows * 128, 128, 2048, 1536)
        for form in ("nf4", "mxfp4", "fp8", "int8"):
            cut = _policy.packed(shape, form, torch.bfloat16, "9", back=False)
            load = Load(rows * 16, rows * 128, 2048, 768, 128, 8, trained=False, packed=form)
            assert bool(accounts._workspace(load, 1)) == (cut is None), (form, rows)


# --- messages and time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["trained", "frozen", "adapters"])
def test_operations_are_those_counted(way: str):
    layer = Layer(**WAYS[way])
    with FlopCounterMode(display=False) as counter:
        layer.step()
    assert rates.operations(layer.load) == counter.get_total_flops()


@pytest.mark.parametrize("name", GPU_SHAPES)
def test_times_are_near_those_measured(name: str):
    """A quarter: docs/performance/plan.md has each. Small experts, whose rows come from a cache, are the furthest off."""
    load, speeds = load_of(GPU_SHAPES[name]), MACHINES["H200"]
    seconds = rates.operations(load) / speeds.flops + rates.traffic(load) / speeds.bandwidth
    found = measured("gpu_experts.json")
    assert 1e3 * seconds == pytest.approx(found["shapes"][name]["forward + backward, graph"]["moekit"], rel=0.25)
    four = next(found for found in measured("ep_h200.json") if found["ranks"] == 4)
    assert speeds.inside == pytest.approx(max(link["rate"] for link in four["link"]), rel=0.01)
    assert speeds.flops / 1e12 == found["dense TFLOP/s"] and speeds.bandwidth / 1e9 == found["copy GB/s"]


def test_ranks_share_experts_and_exchange_rows():
    alone, shared = (plan("Qwen3-30B-A3B", tokens=8192, ep=ep, memory=141, rates=MACHINES["H200"]) for ep in (1, 8))
    assert alone.exchange is None and shared.fit.experts == alone.fit.experts / 8
    assert shared.times.products == alone.times.products
    found = shared.exchange
    assert found.received == math.ceil(8192 * 8 * (1 - math.comb(112, 8) / math.comb(128, 8)))  # all but what needs no one
    each = found.messages["rank"]
    assert found.sent["rows"] == pytest.approx(4 * each) and found.messages["slot"] == 8192 * 8 * 2048 * 2 * 7 / 8
    assert found.seconds == pytest.approx(4 * each / 166e9)
    assert shared.times.layer == pytest.approx(sum((shared.times.products, shared.times.moves, found.seconds)))


def test_own_rates_take_the_place_of_known_ones():
    assert changed(None) is None
    with pytest.raises(ValueError, match="flops must be given with bandwidth, or a machine named or measured, got none"):
        changed(None, bandwidth=1e9)
    own = changed(None, flops=1e12, bandwidth=1e11)
    assert (own.flops, own.bandwidth, own.inside) == (1e12, 1e11, None)
    found = plan("OLMoE-1B-7B", tokens=64, device="cpu", rates=own).times
    assert found.products == rates.operations(load_of((64, 2048, 1024, 64, 8))) / 1e12
    mixed = changed(MACHINES["B200"], bandwidth=7e12)
    assert mixed.flops == MACHINES["B200"].flops and mixed.sources["bandwidth"] == "as given"
    here = rates.measured("cpu")
    assert here.flops > 1e8 and here.bandwidth > 1e7 and set(here.sources.values()) == {"measured here"}
    assert here.products_in("bfloat16") == here.flops and here.products_in("float32") is None


def table_of_times(made: Any) -> str:
    printed = io.StringIO()
    Console(width=120, file=printed).print(show.tables(made)[-1 if made.fit is None else -2])
    return printed.getvalue()


@pytest.mark.parametrize(
    ("speeds", "dtype", "known"),
    [
        (MACHINES["H200"], "bfloat16", True),
        (MACHINES["H200"], "float16", True),
        (MACHINES["H200"], "float32", False),
        (changed(MACHINES["H200"], bandwidth=4e12), "float32", False),
        (changed(MACHINES["H200"], flops=5e13), "float32", True),
        (
            Rates("measured", 5e13, 4e12, 8, None, None, dict.fromkeys(("flops", "bandwidth"), "x"), ("float32",)),
            "float32",
            True,
        ),
    ],
)
def test_a_rate_of_products_is_of_its_dtype(speeds: Rates, dtype: str, known: bool):
    made = plan("OLMoE-1B-7B", tokens=64, dtype=dtype, rates=speeds)
    found, text = made.times, table_of_times(made)
    assert found.moves == rates.traffic(load_of((64, 2048, 1024, 64, 8), itemsize=planning.DTYPES[dtype])) / speeds.bandwidth
    if known:
        assert found.products == rates.operations(load_of((64, 2048, 1024, 64, 8))) / speeds.flops
        assert found.layer == found.products + found.moves and found.layers == 16 * found.layer
        assert "No sums" not in text and "--flops" not in text
    else:
        assert found.products is found.layer is found.layers is None
        assert "known in bfloat16 and float16 only: give --flops" in text and "No sums" in text


@pytest.mark.parametrize("name", ["B200", "GB200"])
def test_no_sum_leaves_out_a_part(name: str):
    made = plan("OLMoE-1B-7B", tokens=64, ep=4, rates=MACHINES[name])
    assert made.times.moves is made.times.layer is made.times.layers is None
    assert made.times.products > 0 and made.times.exchange > 0 and "No sums" in table_of_times(made)
    found = plan("OLMoE-1B-7B", tokens=64, ep=4, rates=changed(MACHINES[name], bandwidth=7e12)).times
    assert found.layer == pytest.approx(found.products + found.moves + found.exchange)


@pytest.mark.parametrize(
    ("ep", "links", "said"),
    [
        (8, {"inside": 1e11}, ""),
        (8, {"between": 1e10}, "not known: give --link "),
        (16, {"inside": 1e11}, "not known: give --between "),
        (16, {"inside": 1e11, "between": 1e10}, ""),
        (16, {}, "not known: give --link and --between "),
    ],
)
def test_links_between_nodes_are_needed_between_nodes(ep: int, links: dict[str, float], said: str):
    made = plan("OLMoE-1B-7B", tokens=64, ep=ep, rates=changed(None, flops=1e12, bandwidth=1e11, **links))
    text = table_of_times(made)
    if said:
        assert made.times.exchange is made.times.layer is None and said in text
        return
    each = 64 * 2048 * 2 * (1 - math.comb(64 - 64 // ep, 8) / math.comb(64, 8))  # of a peer: E=64, K=8
    slowest = max(7 * each / 1e11, (ep - 8) * each / links.get("between", math.inf))
    assert made.times.exchange == made.exchange.seconds == pytest.approx(4 * slowest) and "not known" not in text


# --- bad input ------------------------------------------------------------------------------------------------------

MIXTRAL = {"model_type": "mixtral", **CASES["mixtral-0-untied"][1]}
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no tokens": ("Mixtral-8x7B", {"tokens": 0}, "tokens must be at least 1, got 0"),
    "ranks": ("Mixtral-8x7B", {"ep": 3}, "ep must be a divisor of the 8 experts, got 3"),
    "groups": (
        {**CASES["deepseek_v3-0-untied"][1], "model_type": "deepseek_v3", "n_routed_experts": 12, "n_shared_experts": 1},
        {"ep": 6, "tokens": 8},
        "whole groups of 3 experts, or groups whole ranks, got 6",
    ),
    "format": ("Mixtral-8x7B", {"format": "q4"}, "format must be one of 'nf4', 'mxfp4', 'fp8', 'int8', got 'q4'"),
    "blocks": ({**MIXTRAL, "hidden_size": 36}, {"format": "mxfp4"}, r"divisible by 32, got 36"),
    "double": (
        "Mixtral-8x7B",
        {"format": "fp8", "double_quant": True},
        "double_quant must be False for all .* got True for fp8",
    ),
    "double alone": ("Mixtral-8x7B", {"double_quant": True}, "double_quant must be given with format='nf4', got no format"),
    "adapters": ("Mixtral-8x7B", {"lora": -1}, "lora must be at least 1, got -1"),
    "device": ("Mixtral-8x7B", {"device": "tpu"}, "device must be one of 'cpu', 'cuda', got 'tpu'"),
    "dtype": ("Mixtral-8x7B", {"dtype": "int4"}, "dtype must be one of .* got 'int4'"),
    "memory": ("Mixtral-8x7B", {"memory": -2}, "memory must be a positive number of GiB, got -2"),
    "dense": (
        {"model_type": "llama", "hidden_size": 8},
        {},
        "model with experts, got model_type 'llama' and no key of experts",
    ),
    "inside": (
        {"model_type": "a_vlm", "text_config": {"model_type": "mixtral"}},
        {},
        r"some in text_config: give that part",
    ),
    "unknown": (
        {"model_type": "newmoe", "num_experts": 7, "moe_size": 3},
        {},
        r"model_type must be one of deepseek_v3, .*--topk.*got 'newmoe' with moe_size=3, num_experts=7",
    ),
    "no type": ({"num_experts": 7}, {}, "got None with num_experts=7"),
    "missing": (
        {"model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 2},
        {},
        "num_local_experts of mixtral .* no such",
    ),
    "odd": ({**MIXTRAL, "hidden_size": "32"}, {}, "hidden_size of mixtral must be an integer of at least 1, got '32'"),
    "odd flag": ({**MIXTRAL, "tie_word_embeddings": 1}, {}, "tie_word_embeddings of mixtral must be true or false, got 1"),
    "topk": ({**MIXTRAL, "num_experts_per_tok": 9}, {}, "experts a token must be at most the 5 experts of mixtral, got 9"),
    "more than groups hold": (
        {**CASES["deepseek_v3-0-untied"][1], "model_type": "deepseek_v3", "topk_group": 1, "num_experts_per_tok": 3},
        {"ep": 4},
        "num_experts_per_tok of deepseek_v3 must be at most the 2 experts that topk_group 1 of n_group 4 leaves, got 3",
    ),
    "no layer": (
        {"model_type": "qwen3_moe", **CASES["qwen3_moe-0-untied"][1], "mlp_only_layers": [0, 1, 2, 3, 4]},
        {},
        "must be of a model with experts, got qwen3_moe in qwen3_moe without a layer of them",
    ),
    "bad layers": (
        {"model_type": "qwen3_moe", **CASES["qwen3_moe-0-untied"][1], "mlp_only_layers": [9]},
        {},
        r"mlp_only_layers of qwen3_moe must be a list of layers \(0 to 4\), got \[9\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str):
    config, options, said = BAD[case]
    with pytest.raises(ValueError, match=said):
        plan(config, **{"tokens": 8, **options})


def test_bad_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no file 'nope', and no preset of that name; presets: DeepSeek-V3, "):
        read("nope")
    with pytest.raises(FileNotFoundError, match=r"no file '.*config\.json'"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the config must be JSON, got .*config\.json: Expecting"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the config must be a JSON object, got list in "):
        read(tmp_path)
    with pytest.raises(TypeError, match="config must be a path, a preset's name or a dict, got int"):
        read(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the sizes must be all of layers, hidden, .* got no topk"):
        given(layers=1, hidden=2, intermediate=3, experts=4)
    with pytest.raises(ValueError, match="memory must be left out where only the sizes of experts are known, got 8"):
        plan(given(layers=1, hidden=2, intermediate=3, experts=4, topk=2), tokens=8, memory=8)
    with pytest.raises(ValueError, match="topk must be at most the 4 experts, got 5"):
        given(layers=1, hidden=2, intermediate=3, experts=4, topk=5)


# --- the command ----------------------------------------------------------------------------------------------------


def command(*args: Any, columns: int = 80) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, args)], env={"COLUMNS": str(columns), "TERM": "dumb"})


def test_the_command_prints_tables_of_80_columns(tmp_path: Path):
    result = command("gpt-oss-20b", "--tokens", 4096, "--ep", 4, "--format", "mxfp4", "--lora", 8, "--memory", 80)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    made = plan("gpt-oss-20b", tokens=4096, ep=4, format="mxfp4", lora=8, memory=80, rates=MACHINES["H200"])
    text = " ".join(result.output.split())
    for wanted in (
        *("20,914,757,184", f"{made.activations['fp8'].kept / 2**20:,.1f}", f"{made.activations['all'].peak / 2**20:,.1f}"),
        *(f"{made.exchange.messages['rank'] / 1e6:,.1f}", f"{1e3 * made.times.layer:.3f}", "left of 80 GiB"),
        f"{made.fit.left['recompute'] / 2**30:.2f}",
    ):
        assert wanted in text, wanted


def test_the_command_prints_json_and_draws(tmp_path: Path):
    picture = tmp_path / "plan.png"
    options = (
        "--tokens",
        2048,
        "--device",
        "cpu",
        "--flops",
        2,
        "--bandwidth",
        20,
        "--memory",
        16,
        "--json",
        "--out",
        picture,
    )
    result = command("olmoe-1b-7b", *options)
    assert result.exit_code == 0, result.output
    own = Rates("as given", 2e12, 2e10, 8, None, None, {"flops": "as given", "bandwidth": "as given"})
    made = plan("OLMoE-1B-7B", tokens=2048, device="cpu", memory=16, rates=own)
    assert json.loads(result.output) == json.loads(json.dumps(made.as_dict()))
    assert made.fit.left["recompute"] < 0  # it says so
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[:2] == (484, 1320) and pixels.std() > 0.1


def test_sizes_in_the_place_of_a_config(tmp_path: Path):
    sizes = ("--layers", 4, "--hidden", 256, "--intermediate", 128, "--experts", 8, "--topk", 2)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "newmoe", "num_experts": 8}), encoding="utf-8")
    for config in ((), (path,)):
        result = command(*config, "--tokens", 64, *sizes, "--json")
        found = json.loads(result.output)
        assert found["parameters"]["experts"] == 4 * 8 * 3 * 256 * 128 and found["parameters"]["total"] is None
        assert found["fit"] is None
    assert "nothing is said of the rest" in " ".join(command("--tokens", 64, *sizes).output.split())
    assert command("--presets").output.split() == presets()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{nope", "the config must be JSON"),
        ("[1]", "the config must be a JSON object"),
        (json.dumps({**MIXTRAL, "hidden_size": "32"}), "hidden_size of "),
        (json.dumps(MIXTRAL), "--topk must be left out"),
    ],
)
def test_sizes_do_not_hide_what_is_wrong_with_a_config(content: str, said: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    sizes = ("--layers", 4, "--hidden", 256, "--intermediate", 128, "--experts", 8, "--topk", 2)
    result = command(path, "--tokens", 64, *sizes)
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("Mixtral-8x7B",), "say how many --tokens a step has"),
        (("--tokens", 8), "say which model: one of DeepSeek-V3, "),
        (("nope", "--tokens", 8), "no file 'nope'"),
        (("Mixtral-8x7B", "--tokens", 8, "--ep", 3), "ep must be a divisor of the 8 experts, got 3"),
        (("Mixtral-8x7B", "--tokens", 8, "--hidden", 3), "--hidden must be left out"),
        (("--tokens", 8, "--hidden", 3), "got no layers, intermediate, experts, topk"),
        (("Mixtral-8x7B", "--tokens", 8, "--out", "x.jpg"), "out must be a file that ends in .png, got 'x.jpg'"),
        (("Mixtral-8x7B", "--tokens", 8, "--out", "no/where.png"), "out must be in a folder that exists"),
        (("Mixtral-8x7B", "--tokens", 8, "--machine", "TPU"), "machine must be one of H200, B200, GB200, got 'TPU'"),
        (("Mixtral-8x7B", "--tokens", 8, "--machine", "H200", "--measure"), "--machine or --measure, not both"),
        (("Mixtral-8x7B", "--tokens", 8, "--flops", 0), "flops must be positive"),
        (("Mixtral-8x7B", "--tokens", 8, "--device", "cpu", "--machine", "H200"), "--machine H200 is a GPU's: with"),
        (("Mixtral-8x7B", "--tokens", 8, "--device", "tpu", "--measure"), "device must be one of 'cpu', 'cuda', got 'tpu'"),
        (("Mixtral-8x7B", "--tokens", 8, "--dtype", "int4", "--measure"), "dtype must be one of "),
    ],
)
def test_the_command_says_what_is_wrong(args: tuple, said: str):
    result = command(*args)
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


def test_every_part_of_a_plan_has_a_table():
    speeds = changed(None, flops=1e12)
    made = plan("Qwen3-30B-A3B", tokens=64, ep=2, rates=speeds)
    printed = io.StringIO()
    console = Console(width=80, file=printed)
    for table in show.tables(made):
        console.print(table)
    text = " ".join(printed.getvalue().split())
    assert "give --bandwidth" in text and "give --link │" in text and made.times.exchange is None
    assert planning.SAVES == SAVES


def test_the_document_has_what_the_command_prints():
    text = (ROOT / "docs/performance/plan.md").read_text(encoding="utf-8")
    exec(text.split("```python\n")[1].split("```")[0], {})
    shown = text.split("```console\n")[1:]
    assert shown
    for block in shown:
        line, output = block.split("```")[0].split("\n", 1)
        result = command(*line.removeprefix("$ moekit plan ").split())
        assert [row.rstrip() for row in result.output.splitlines()] == [row.rstrip() for row in output.splitlines()]
