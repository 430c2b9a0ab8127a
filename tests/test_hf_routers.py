"""Every router of Transformers is its spec: the same experts, weights and gradients as its own forward.

``tests/routers.toml`` has the classes and their settings; what is found in the installed release and not there fails.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moekit
from moekit.hf import routers
from moekit.hf.routers import RouterSpec, spec_of

transformers = pytest.importorskip("transformers")
tomllib = pytest.importorskip("tomllib")
DATA = tomllib.loads(Path(__file__).with_name("routers.toml").read_text(encoding="utf-8"))
PAGE = Path(__file__).parent.parent / "docs" / "reference" / "routers.md"
NEWEST = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
T, EPS = 12, torch.finfo(torch.float32).eps


# --- the classes ----------------------------------------------------------------------------------------------------


@cache
def installed() -> list[str]:
    """``model.Class`` of every router class in the modeling files."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            router = re.search(r"(Router|TopK|Topk|MoEGate|V1Gate|TopKGating)\w*$", name)
            if router and not re.search(r"Gated|ForgetGate|RouterMLP|Output", name):
                found.append(f"{path.parent.name}.{name}")
    return found


def class_of(name: str) -> Any:
    model, kind = name.split(".")
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), kind)


def test_every_class_is_compared_or_out_of_reach():
    listed = [name for entry in DATA["router"] for name in entry["classes"]]
    assert len(listed) == len(set(listed))
    missing = sorted(set(installed()) - set(listed))
    assert not missing, f"neither compared nor named out of reach in tests/routers.toml: {missing}"
    assert all(("out_of_reach" in entry) != ("route" in entry) for entry in DATA["router"])


def cases(key: str, first: bool = False) -> list[Any]:
    """A router of each class and variant (``key`` "variants"), or of settings that are out of reach ("unless")."""
    found = []
    for entry in DATA["router"]:
        for name in filter(installed().__contains__, entry["classes"]):
            for number, settings in enumerate(entry.get(key, [])[: 1 if first else None]):
                found.append(pytest.param(name, entry, settings, id=f"{name}-{number}"))
    return found


def make(name: str, entry: dict[str, Any], settings: dict[str, Any]) -> nn.Module:
    values = {**DATA["settings"], **settings}
    values = {key: None if value == "none" else value for key, value in values.items()}
    arguments = [values[key] for key in entry.get("construct", [])] or [SimpleNamespace(**values)]
    module = class_of(name)(*arguments)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.6 if tensor.dim() > 1 else 0.2))
            else:
                tensor.copy_(torch.rand(tensor.shape[0], 16, generator=generator).argsort(1)[:, : tensor.shape[1]])
    return module


def inputs(module: nn.Module, entry: dict[str, Any], kind: str = "random") -> tuple[Tensor, dict[str, Any]]:
    """Hidden states and what else forward takes; the module's weights are changed to suit ``kind``."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(T, 8, generator=generator)
    extra = {
        "input_ids": torch.randint(0, 32, (3, T // 3), generator=generator),
        "expert_bias": torch.randn(16, generator=generator) * 0.2,
    }
    extra["e_score_correction_bias"] = extra["expert_bias"].roll(1)
    of_experts = [t for t in (*module.parameters(), *module.buffers(), *extra.values()) if t.is_floating_point()]
    with torch.no_grad():
        if kind == "tied":  # experts in pairs, and tokens of zeros
            for tensor in of_experts:
                dim = next((d for d, size in enumerate(tensor.shape) if size >= 16), None)
                if dim is not None:
                    pairs = tensor.transpose(0, dim)
                    pairs[1::2] = pairs[::2]
            scale: Any = getattr(module, "per_expert_scale", torch.empty(0))
            scale.fill_(0.7)  # a tie of all experts is one of their weights
            hidden[::3] = 0
        if kind == "large":
            hidden *= torch.logspace(0, 1.6, T).unsqueeze(1)
        matrix = next(tensor for tensor in module.parameters() if tensor.dim() == 2 and tensor.shape[1] == 8)
        if kind == "low":  # logits fall from token to token: what is added to sums shows
            hidden[:, 0], matrix[:, 0] = torch.linspace(0, 40, T), -1
        if kind == "-inf":
            hidden[:, 0] = hidden[:, 0].abs() + 0.5
            matrix[3::5, 0] = -torch.inf
    return hidden, {name: extra[name] for name in entry.get("forward", [])}


# --- ours and theirs ------------------------------------------------------------------------------------------------


def shaped(hidden: Tensor, entry: dict[str, Any]) -> Tensor:
    return hidden.view(3, -1, hidden.shape[1]) if entry.get("dim") == 3 else hidden


def theirs(module: nn.Module, entry: dict[str, Any], hidden: Tensor, extra: dict[str, Any]) -> Any:
    return module(shaped(hidden, entry).clone(), **extra)


def ours(module: nn.Module, entry: dict[str, Any], hidden: Tensor, extra: dict[str, Any]) -> moekit.Routing:
    spec = known(module)
    call = (module, (shaped(hidden, entry), *extra.values()), {})  # by position here, by name there
    return moekit.route(spec.logits(*call), **spec.options(*call))


def weights_of(routing: moekit.Routing) -> Tensor:
    assert routing.weights is not None
    return routing.weights


def known(module: nn.Module) -> RouterSpec:
    """The spec of a module that has one; in an older release, some classes are written otherwise."""
    spec = spec_of(module)
    if spec is None and not NEWEST:
        pytest.skip("written otherwise in this release")
    assert spec is not None
    return spec


def choice(module: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
    return known(module).unpack(output)[1:]


def dense(weights: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(indices.shape[0], 32).scatter(1, indices, weights.float())


@pytest.mark.parametrize(("name", "entry", "settings"), cases("variants"))
def test_experts_weights_and_gradients(name, entry, settings):
    module = make(name, entry, settings)
    spec = known(module)
    hidden, extra = inputs(module, entry)
    coefficients = torch.randn(T, 32, generator=torch.Generator().manual_seed(7))
    found = []
    for mine in (False, True):
        x = hidden.clone().requires_grad_()
        if mine:
            routing = ours(module, entry, x, extra)
            weights, indices = weights_of(routing), routing.indices
        else:
            weights, indices = choice(module, theirs(module, entry, x, extra))
        module.zero_grad()
        spread = dense(weights, indices)
        (spread * coefficients).sum().backward()
        gradients = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
        found.append((indices.sort(1).values, spread.detach(), {"hidden": x.grad, **gradients}))
    (their_experts, their_weights, their_gradients), (experts, weights, gradients) = found
    assert torch.equal(experts, their_experts) and experts.shape[1] == spec.topk
    assert (weights - their_weights).abs().max() <= 8 * EPS * their_weights.abs().max()
    assert their_weights.abs().max() > 0.05 and gradients.keys() == their_gradients.keys() and len(gradients) > 1
    for key, gradient in their_gradients.items():
        assert gradient.abs().max() > 0, key
        assert (gradients[key] - gradient).abs().max() <= 50 * EPS * gradient.abs().max(), key


@pytest.mark.parametrize("kind", ["tied", "large", "low", "-inf"])
@pytest.mark.parametrize(("name", "entry", "settings"), cases("variants"))
@torch.no_grad()
def test_ties_and_extremes(name, entry, settings, kind):
    """Where scores tie, to rounding or exactly, any choice among them is right: its weights are the same."""
    module = make(name, entry, settings)
    known(module)
    hidden, extra = inputs(module, entry, kind)
    weights = choice(module, theirs(module, entry, hidden, extra))[0].sort(1).values
    routing = ours(module, entry, hidden, extra)
    assert weights.isfinite().all()
    difference = weights_of(routing).sort(1).values - weights
    assert (difference.abs() <= 8 * EPS * weights.abs().amax(1, keepdim=True)).all()
    assert (routing.indices.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize(("name", "entry", "settings"), cases("variants", first=True))
@torch.no_grad()
def test_nan_stays_with_its_token(name, entry, settings):
    module = make(name, entry, settings)
    known(module)
    hidden, extra = inputs(module, entry)
    clean = ours(module, entry, hidden, extra)
    hidden[4, 3], hidden[7] = torch.nan, torch.nan
    routing = ours(module, entry, hidden, extra)
    others = [token for token in range(T) if token not in (4, 7)]
    assert torch.equal(routing.indices[others], clean.indices[others])
    assert torch.equal(weights_of(routing)[others], weights_of(clean)[others])
    assert (routing.indices.sort(1).values.diff(dim=1) > 0).all()
    assert routing.indices.min() >= 0 and routing.indices.max() < routing.num_experts


@pytest.mark.parametrize(("name", "entry", "settings"), cases("variants", first=True))
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_packing_in_half_precision(name, entry, settings, autocast):
    """What a router returned packs to itself; ours in its place has its dtypes, and its values to their rounding."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        packing(name, entry, settings, torch.float32 if autocast else torch.bfloat16)


def packing(name: str, entry: dict[str, Any], settings: dict[str, Any], dtype: torch.dtype) -> None:
    module = make(name, entry, settings)
    module = module if name in entry.get("float32", []) else module.to(dtype)
    spec = known(module)
    hidden, extra = inputs(module, entry)
    hidden = hidden.to(dtype)
    output = theirs(module, entry, hidden, extra)
    logits, weights, indices = spec.unpack(output)
    assert logits.shape == (T, ours(module, entry, hidden, extra).num_experts)
    again = spec.pack(output, weights, indices)
    assert dense(*choice(module, again)).equal(dense(weights, indices)) and len(again) == len(output)
    routing = ours(module, entry, hidden, extra)
    _, packed_weights, packed_indices = spec.unpack(spec.pack(output, weights_of(routing), routing.indices))
    assert packed_weights.dtype is weights.dtype and packed_indices.dtype is indices.dtype
    assert dense(packed_weights, packed_indices).equal(dense(weights_of(routing).to(weights.dtype), routing.indices))
    same = (packed_indices.sort(1).values == indices.sort(1).values).all(1)
    assert same.sum() >= T - 2  # the others tie in half precision
    difference = dense(packed_weights, packed_indices) - dense(weights, indices)
    assert difference[same].abs().max() <= 2**-6 * weights.abs().max()
    with pytest.raises(ValueError, match=re.escape("moekit.hf.routers: weights must be of shape [tokens, topk]")):
        spec.pack(output, weights[1:], indices)


@pytest.mark.parametrize(("name", "entry", "settings"), cases("variants", first=True))
@torch.no_grad()
def test_the_choice_given(name, entry, settings):
    """With ``weighing`` and the choice, weights are the same as when the router chose."""
    module = make(name, entry, settings)
    spec = known(module)
    hidden, extra = inputs(module, entry)
    routing = ours(module, entry, hidden, extra)
    call = (module, (shaped(hidden, entry),), extra)
    replayed = moekit.route(spec.logits(*call), indices=routing.indices, **spec.weighing(*call))
    assert (weights_of(replayed) - weights_of(routing)).abs().max() <= 4 * EPS * weights_of(routing).abs().max()


# --- None: what does something else ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "entry", "settings"), cases("unless"))
def test_settings_out_of_reach(name, entry, settings):
    assert spec_of(make(name, entry, settings)) is None


OUT = [name for entry in DATA["router"] if "out_of_reach" in entry for name in entry["classes"] if name in installed()]


@pytest.mark.parametrize("name", OUT)
def test_classes_out_of_reach(name):
    kind = class_of(name)
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    assert spec_of(module) is None


def router(name: str = "qwen3_moe.Qwen3MoeTopKRouter", **settings: Any) -> Any:
    entry = next(entry for entry in DATA["router"] if name in entry["classes"])
    return make(name, entry, settings)


def test_what_is_patched_is_not_known(monkeypatch):
    module = router()
    assert spec_of(module) is not None and spec_of(nn.Linear(2, 2)) is None
    module.forward = lambda hidden_states: None
    assert spec_of(module) is None
    kind = type(router())
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states: original(self, 2 * hidden_states))
    assert spec_of(router()) is None


def test_subclasses():
    kind = class_of("qwen3_moe.Qwen3MoeTopKRouter")
    longcat = class_of("longcat_flash.LongcatFlashTopkRouter")

    class Same(kind):
        pass

    class Doubled(kind):
        def forward(self, hidden_states):
            return super().forward(2 * hidden_states)

    class Called(kind):
        def __call__(self, hidden_states):
            return super().__call__(2 * hidden_states)

    class First(longcat):
        def get_topk_indices(self, scores):
            return scores.topk(self.top_k)[1]

    def changed(name: str, to: type) -> nn.Module:
        module = router(name)
        module.__class__ = to
        return module

    assert spec_of(changed("qwen3_moe.Qwen3MoeTopKRouter", Same)) is not None
    assert spec_of(changed("qwen3_moe.Qwen3MoeTopKRouter", Doubled)) is None
    assert spec_of(changed("qwen3_moe.Qwen3MoeTopKRouter", Called)) is None
    if NEWEST:
        assert spec_of(router("longcat_flash.LongcatFlashTopkRouter")) is not None
    assert spec_of(changed("longcat_flash.LongcatFlashTopkRouter", First)) is None


def test_what_a_router_calls_is_looked_at(monkeypatch):
    ernie = router("ernie4_5_moe.Ernie4_5_MoeTopKRouter")
    hooked, patched = copy.deepcopy(ernie), copy.deepcopy(ernie)
    assert spec_of(ernie) is not None
    hooked.moe_statics.register_forward_hook(lambda module, args, output: output + 1)
    patched.moe_statics.forward = lambda scores: scores
    assert spec_of(hooked) is None and spec_of(patched) is None
    monkeypatch.setattr(inspect.getmodule(type(ernie)), "maybe_autocast", lambda **_: None)
    assert spec_of(ernie) is None
    v4 = router("deepseek_v4.DeepseekV4TopKRouter")
    v4.score_fn.register_forward_hook(lambda module, args, output: 2 * output)
    assert spec_of(v4) is None
    muse = router("muse_spark.MuseSparkTopkRouter") if NEWEST else None
    if muse is not None:
        muse.scoring_function = nn.Tanh()
        assert spec_of(muse) is None


def test_a_missing_bias_is_an_error():
    module = router("minimax_m2.MiniMaxM2TopKRouter")
    spec = known(module)
    with pytest.raises(ValueError, match="e_score_correction_bias must be given to the router"):
        spec.options(module, (torch.zeros(2, 8),), {})


def test_every_form_is_one_of_a_class():
    """No row of the table is left over from what nobody has."""
    modules = [make(*case.values) for case in cases("variants")]
    codes = {spec.code for spec in map(spec_of, modules) if spec is not None}
    older = {"a1613e99c4687e77", "ace4641aeba4b53c"}  # Ernie and Gemma4 of 5.12
    if NEWEST:
        assert set(routers.FORMS) - older == codes


def test_a_spec_can_be_saved():
    spec = known(router())
    assert pickle.loads(pickle.dumps(spec)) == spec


# --- the page -------------------------------------------------------------------------------------------------------


def table() -> str:
    lines = ["| router | `moekit.route(logits, k, ...)` |", "|---|---|"]
    for entry in DATA["router"]:
        names = ", ".join(name.split(".")[1] for name in entry["classes"])
        what = f"`{entry['route']}`" if "route" in entry else f"out of reach: {entry['out_of_reach']}"
        lines.append(f"| {names} | {what}{'; ' + entry['note'] if 'note' in entry else ''} |")
    return "\n".join(lines)


def test_the_page_has_the_table():
    begin, end = "<!-- routers: begin -->\n", "\n<!-- routers: end -->"
    assert PAGE.read_text(encoding="utf-8").split(begin)[1].split(end)[0] == table()


def test_the_table_names_the_options():
    for entry in DATA["router"]:
        if not NEWEST or "route" not in entry or entry["classes"][0] not in installed():
            continue
        module = make(entry["classes"][0], entry, {})
        used: set[str] = set()
        for settings in entry["variants"]:
            module = make(entry["classes"][0], entry, settings)
            hidden, extra = inputs(module, entry)
            used |= known(module).options(module, (shaped(hidden, entry),), extra).keys()
        call = ast.parse(f"f({entry['route']})", mode="eval").body
        assert isinstance(call, ast.Call)
        assert {keyword.arg for keyword in call.keywords} == used - {"k"}, entry["classes"]


def recipe(beginning: str) -> dict[str, Any]:
    """What the recipe of the page that begins so leaves behind."""
    text = PAGE.read_text(encoding="utf-8").split(f"*{beginning}")[1]
    generator = torch.Generator().manual_seed(1)
    scope: dict[str, Any] = {"moekit": moekit, "torch": torch, "k": 3, "num_experts": 5, "scale": 2.0, "eps": 0.3}
    shapes = {"logits": (6, 8), "bias": (8,), "x": (6, 4), "gate_up": (5, 6, 4), "down": (5, 4, 3), "weight": (8, 4)}
    scope |= {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    scope["input_ids"] = torch.randint(0, 9, (2, 3), generator=generator)
    scope["table"] = torch.rand(9, 8, generator=generator).argsort(1)[:, :3]
    exec(text.split("```python\n")[1].split("```")[0], scope)
    return scope


def test_the_recipe_of_null_experts():
    found = recipe("Experts that compute nothing")
    x, logits, bias = (found[name].double() for name in ("x", "logits", "bias"))
    probs = logits.softmax(1)
    expected = torch.zeros_like(x)
    for token, chosen in enumerate((probs + bias).topk(3)[1].tolist()):
        for expert in chosen:
            out = x[token]
            if expert < 5:
                gate, up = (found["gate_up"][expert].double() @ out).chunk(2)
                out = found["down"][expert].double() @ (nn.functional.silu(gate) * up)
            expected[token] += 2.0 * probs[token, expert] * out
    assert (found["routing"].indices >= 5).any() and (found["routing"].indices < 5).any()
    assert (found["out"] - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_other_recipes():
    balanced = recipe("Forced balance")["routing"]
    counts = balanced.tokens_per_expert
    assert counts.max() - counts.min() <= 1 and (balanced.indices.sort(1).values.diff(dim=1) > 0).all()
    hashed = recipe("A hash table")
    assert torch.equal(hashed["routing"].indices, hashed["table"][hashed["input_ids"].flatten()])
    jittered = recipe("Jitter")
    change = jittered["noisy"] / jittered["x"] - 1
    assert 0.1 < change.abs().max() <= 0.3 + 1e-6 and jittered["routing"].num_tokens == 6
