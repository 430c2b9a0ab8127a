"""A Mixture-of-Experts model as a plan needs it: sizes and numbers of parameters, from a Transformers config.

The JSON is read as it is; neither weights nor Transformers are needed. Keys mean different things in different models
(``intermediate_size`` is an expert's in one and a dense layer's in another), so each ``model_type`` has a reader of its own
in :mod:`moekit.plan.families`, and one that has none is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from moekit import _check
from moekit.plan.families import FAMILIES, Counts, Keys

_OP = "plan"
SIZES = ("layers", "hidden", "intermediate", "experts", "topk")
# What tells a config of experts, by whatever name.
_OF_EXPERTS = ("expert", "moe", "shared_intermediate")


class UnknownModelError(ValueError):
    """A config that is sound but of no known ``model_type``; :func:`given` takes its sizes."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model.

    Attributes:
        name: of the preset, or where the config lies.
        model_type: as Transformers names it; empty where sizes were given.
        layers: all of them.
        moe_layers: those with experts.
        hidden: H.
        inner: I, of an expert.
        experts: E, of a layer.
        topk: K.
        gated: whether an expert has a gate beside its up projection.
        biases: whether an expert's projections have biases.
        groups: groups of experts, of which a token may choose ``groups_chosen``; 1: no such limit.
        groups_chosen: how many.
        others: parameters that are not of routed experts, by what they are of; None where only sizes were given.
    """

    name: str
    model_type: str
    layers: int
    moe_layers: int
    hidden: int
    inner: int
    experts: int
    topk: int
    gated: bool = True
    biases: bool = False
    groups: int = 1
    groups_chosen: int = 1
    others: Mapping[str, int] | None = None

    @property
    def gate_up_shape(self) -> tuple[int, int, int]:
        """``[E, out, in]`` of a layer's first projection."""
        return self.experts, (2 if self.gated else 1) * self.inner, self.hidden

    @property
    def down_shape(self) -> tuple[int, int, int]:
        """``[E, out, in]`` of a layer's second one."""
        return self.experts, self.hidden, self.inner

    @property
    def expert_parameters(self) -> int:
        """Of one expert."""
        width = self.gate_up_shape[1]
        return (width + self.inner) * self.hidden + (width + self.hidden if self.biases else 0)

    @property
    def experts_parameters(self) -> int:
        """Of all experts of all layers."""
        return self.moe_layers * self.experts * self.expert_parameters

    @property
    def parameters(self) -> int | None:
        """Of the whole model, one copy of tied weights; None if unknown."""
        return None if self.others is None else self.experts_parameters + sum(self.others.values())

    @property
    def active_parameters(self) -> int | None:
        """All but those of experts that a token does not choose; embeddings count in full."""
        if self.others is None:
            return None
        return self.moe_layers * self.topk * self.expert_parameters + sum(self.others.values())


def presets() -> list[str]:
    """The names of the models that are bundled."""
    return sorted(path.name.removesuffix(".json") for path in _folder().iterdir() if path.name.endswith(".json"))


def read(config: str | Path | Mapping[str, Any]) -> Model:
    """The model of a config.

    Args:
        config: a preset's name (in any case), a ``config.json``, the folder it lies in, or its content.

    Raises:
        FileNotFoundError: neither a file, nor a folder with a config, nor a preset.
        UnknownModelError: a ``model_type`` that is not known. The message names the keys that were found.
        ValueError: no JSON object, a model without experts, or keys that are missing or make no sense.
    """
    name, content = _content(config)
    if not isinstance(content, Mapping):
        raise _check.fail(_OP, "the config", "a JSON object", f"{type(content).__name__} in {name}")
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise _unknown(name, kind, content)
    counts = FAMILIES[kind](Keys(name, content))
    if not counts.moe_layers:
        raise _check.fail(_OP, "the config", "of a model with experts", f"{kind} in {name} without a layer of them")
    return _model(name, kind, counts)


def given(name: str = "as given", **sizes: int | None) -> Model:
    """A model of which only the sizes of its experts are known: :data:`SIZES`, all of them.

    Raises:
        ValueError: a size that is missing or not positive, or more experts a token than there are.
    """
    missing = [size for size in SIZES if sizes.get(size) is None]
    if missing:
        raise _check.fail(_OP, "the sizes", f"all of {', '.join(SIZES)}", f"no {', '.join(missing)}")
    layers, hidden, inner, experts, topk = (_check.positive(_OP, size, sizes[size]) for size in SIZES)
    if topk > experts:
        raise _check.fail(_OP, "topk", f"at most the {experts} experts", topk)
    return Model(name, "", layers, layers, hidden, inner, experts, topk)


def _model(name: str, kind: str, counts: Counts) -> Model:
    if counts.topk > counts.experts:
        raise _check.fail(_OP, "experts a token", f"at most the {counts.experts} experts of {name}", counts.topk)
    sizes = (counts.layers, counts.moe_layers, counts.hidden, counts.inner, counts.experts, counts.topk)
    limits = (counts.groups, counts.groups_chosen)
    return Model(name, kind, *sizes, True, counts.biases, *limits, counts.others())


def _folder() -> Any:
    return resources.files("moekit.plan") / "presets"


def _content(config: str | Path | Mapping[str, Any]) -> tuple[str, Any]:
    """What it is to be called, and what the JSON says."""
    if isinstance(config, Mapping):
        return str(config.get("_name_or_path") or config.get("model_type") or "config"), config
    if not isinstance(config, str | Path):
        raise _check.wrong_type(_OP, "config", "a path, a preset's name or a dict", type(config).__name__)
    path = Path(config)
    named = next((preset for preset in presets() if preset.lower() == str(config).lower()), None)
    if named is not None and not path.exists():
        return named, json.loads((_folder() / f"{named}.json").read_text(encoding="utf-8"))
    found = path / "config.json" if path.is_dir() else path
    if not found.is_file():
        known = ", ".join(presets())
        raise FileNotFoundError(f"moekit.plan: no file {str(found)!r}, and no preset of that name; presets: {known}")
    try:
        return path.resolve().name if path.is_dir() else str(found), json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _check.fail(_OP, "the config", "JSON", f"{found}: {error}") from error


def _unknown(name: str, kind: Any, content: Mapping[str, Any]) -> UnknownModelError:
    """What to say of a config that nobody can read."""
    hint = "for others give the sizes: --layers, --hidden, --intermediate, --experts, --topk"
    keys = sorted(key for key in content if any(part in key.lower() for part in _OF_EXPERTS))
    if not keys:
        nested = [key for key, value in content.items() if isinstance(value, Mapping) and "model_type" in value]
        inside = f" (there may be some in {', '.join(nested)}: give that part as a config of its own)" if nested else ""
        wanted = f"of a model with experts{inside}"
        error = _check.fail(_OP, "the config", wanted, f"model_type {kind!r} and no key of experts in {name}")
        return UnknownModelError(*error.args)
    found = ", ".join(f"{key}={content[key]!r}" for key in keys)
    wanted = f"one of {', '.join(sorted(FAMILIES))} ({hint})"
    return UnknownModelError(*_check.fail(_OP, "model_type", wanted, f"{kind!r} with {found} in {name}").args)
