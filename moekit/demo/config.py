"""Settings of the demo: the defaults, TOML files that change some of them, and their checks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from moekit.demo import DemoError


@dataclass(frozen=True)
class Config:
    """Sizes and schedule of one run. The defaults take about 100 seconds of training on two CPU cores.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream, a multiple of ``heads``.
        heads: attention heads; their width is even, for rotary position embeddings.
        experts: experts of each layer.
        topk: experts a token is sent to.
        intermediate: width of one expert, a multiple of 4 (grouped matrix products want strides of 16 bytes).
        context: bytes a window holds; the model sees no further back.
        batch: windows a step.
        steps: optimiser steps.
        learning_rate: the highest; a cosine takes it down to a twentieth.
        warmup: share of the steps over which the learning rate rises.
        weight_decay: decoupled, on matrices only.
        balance: how experts are kept evenly loaded: by a ``loss``, by a ``bias`` of the choice alone (arXiv 2408.15664), or
            by ``none``.
        balance_coeff: weight of the load-balancing loss.
        bias_rate: by how much a step changes the bias.
        unbalanced: share of the steps, from the start, that leave balancing out, to show what it changes.
        collapsed: how many experts take every token at the start, in every layer; 0 for an ordinary router.
        heldout_windows: held-out windows that every measurement uses.
        measurements: how many times the held-out windows are measured, the end included.
        time_limit: seconds of training after which a run of the configured ``steps`` stops early.
        prompt: what the text sample continues.
    """

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    experts: int = 16
    topk: int = 2
    intermediate: int = 64
    context: int = 128
    batch: int = 8
    steps: int = 1500
    learning_rate: float = 2e-3
    warmup: float = 0.04
    weight_decay: float = 0.1
    balance: str = "loss"
    balance_coeff: float = 0.05
    bias_rate: float = 1e-2
    unbalanced: float = 0.08
    collapsed: int = 0
    heldout_windows: int = 256
    measurements: int = 10
    time_limit: float = 130.0
    prompt: str = "def "

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        for name in _COUNTS:
            _demand(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _demand(self.balance in BALANCES, "balance", f"one of {', '.join(BALANCES)}", self.balance)
        for name in ("weight_decay", "balance_coeff", "bias_rate", "collapsed"):
            _demand(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("warmup", "unbalanced"):
            _demand(0 <= getattr(self, name) < 1, name, "a share, at least 0 and below 1", getattr(self, name))
        _demand(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        _demand(self.hidden % (2 * self.heads) == 0, "hidden", "a multiple of twice the heads", self.hidden)
        _demand(self.hidden % 4 == 0, "hidden", "a multiple of 4", self.hidden)
        _demand(self.intermediate % 4 == 0, "intermediate", "a multiple of 4", self.intermediate)
        for name in ("topk", "collapsed"):
            _demand(getattr(self, name) <= self.experts, name, f"at most experts ({self.experts})", getattr(self, name))
        _demand(bool(self.prompt), "prompt", "not empty", self.prompt)

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return round(self.warmup * self.steps)

    @property
    def unbalanced_steps(self) -> int:
        """Steps before balancing joins in."""
        return self.steps if self.balance == "none" else round(self.unbalanced * self.steps)


BALANCES = ("loss", "bias", "none")
_SIZES = ("layers", "hidden", "heads", "experts", "topk", "intermediate", "context", "batch")
_COUNTS = (*_SIZES, "steps", "heldout_windows", "measurements")
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}


def _demand(holds: bool, name: str, wanted: str, got: Any) -> None:
    if not holds:
        raise DemoError(f"setting {name!r}: expected {wanted}, got {got!r}")


def _folder() -> Any:
    return resources.files("moekit.demo") / "configs"


def config_names() -> list[str]:
    """The names that ``--config`` takes besides a path."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load_config(
    name_or_path: str | None, steps: int | None = None, balance: str | None = None, collapsed: int | None = None
) -> Config:
    """The defaults, changed by a TOML file and by options of the command.

    Args:
        name_or_path: one of :func:`config_names`, the path of a TOML file with some of the settings, or None.
        steps: replaces the number of steps and lifts the time limit.
        balance: replaces the setting.
        collapsed: replaces the setting.

    Raises:
        DemoError: no such file, not TOML, an unknown setting or a value of the wrong type or range.
    """
    config = Config() if name_or_path is None else Config(**_checked(name_or_path, _read_toml(name_or_path)))
    if steps is not None:
        config = replace(config, steps=steps, time_limit=float("inf"))
    given = {"balance": balance, "collapsed": collapsed}
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def _read_toml(name_or_path: str) -> dict[str, Any]:
    if sys.version_info < (3, 11):
        raise DemoError("--config reads TOML, which needs Python 3.11 or newer")
    import tomllib

    source = _folder() / f"{name_or_path}.toml" if name_or_path in config_names() else Path(name_or_path)
    try:
        return tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(config_names())
        raise DemoError(f"--config {name_or_path}: no such name ({known}), and {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DemoError(f"--config {name_or_path}: not a TOML file: {error}") from error


def _checked(source: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values, once each is known to be a setting and of its type."""
    types = {field.name: str(field.type) for field in fields(Config)}
    for name, value in values.items():
        if name not in types:
            raise DemoError(f"--config {source}: unknown setting {name!r}; there are {', '.join(types)}")
        if isinstance(value, bool) or not isinstance(value, _TYPES[types[name]]):
            raise DemoError(f"--config {source}: {name} is {types[name]}, got {value!r}")
    return values
