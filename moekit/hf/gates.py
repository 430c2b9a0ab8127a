"""What may run fused: activations and gates that are provably moekit's one formula.

Nothing is guessed from a name. An activation is known by its very type (or function object) whose ``forward`` is still
the one of its own source file; a gate is known by what its code says, so that a copy in another class is recognised
and a patched, wrapped or overridden one is not. Whatever a user attached (hooks of any kind, a gate or a forward set
on an instance, a subclass, a parametrisation) leads to the unfused path, which calls the module's own functions.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import math
import sys
import textwrap
import weakref
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

_CALL = nn.Module.__call__
_SILU, _GELU, _RELU = functional.silu, functional.gelu, functional.relu


def _is_own(function: Any, home: str) -> bool:
    """Whether ``function`` comes from the source of the module ``home``, and was not put there by somebody else."""
    if type(function) is BuiltinFunctionType:
        return True
    file = getattr(sys.modules.get(home), "__file__", None)
    return type(function) is FunctionType and function.__closure__ is None and function.__code__.co_filename == file


# --- activations ----------------------------------------------------------------------------------------------------


def _torch_gelu(act: Any) -> str | None:
    return {"tanh": "gelu_tanh", "none": "gelu"}.get(act.approximate)


def _hf_gelu(act: Any) -> str | None:
    chosen = act.act
    return "gelu" if chosen is _GELU or _is_method(chosen, act, "_gelu_python") else None


def _hf_gelu_tanh(act: Any) -> str | None:
    chosen = act.act
    if type(chosen) is functools.partial:
        same = chosen.func is _GELU and not chosen.args and chosen.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if same else None
    return "gelu_tanh" if _is_method(chosen, act, "_gelu_tanh_python") else None


def _is_method(chosen: Any, act: Any, name: str) -> bool:
    """Whether ``chosen`` is the method ``name`` as the class of ``act`` defines it in its own source."""
    function = getattr(chosen, "__func__", None)
    return function is vars(type(act)).get(name) and _is_own(function, type(act).__module__)


class _Activation(NamedTuple):
    """The ``forward`` by which a class is known, and the name of its function (or how an instance tells it)."""

    forward: Any
    name: str | Callable[[Any], str | None]


_FUNCTIONS: dict[Any, str] = {
    function: name
    for function, name in ((_SILU, "silu"), (_RELU, "relu"), (torch.relu, "relu"), (_GELU, "gelu"))
    if _is_own(function, functional.__name__)
}
_MODULES: dict[type, _Activation] = {}
# Transformers' classes. Its FastGELU has another constant (in the eleventh digit), so it is not here.
_HF_MODULES: dict[str, str | Callable[[Any], str | None]] = {
    "SiLUActivation": "silu",
    "GELUTanh": _hf_gelu_tanh,
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": _hf_gelu,
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu2",
}


def _learn(kind: type, name: str | Callable[[Any], str | None]) -> None:
    forward = vars(kind).get("forward")
    if _is_own(forward, kind.__module__):
        _MODULES[kind] = _Activation(forward, name)


for _kind, _name in ((nn.SiLU, "silu"), (nn.ReLU, "relu"), (nn.GELU, _torch_gelu)):
    _learn(_kind, _name)


def learn_transformers(activations: Any) -> None:
    """Know the activation classes of the module ``transformers.activations``."""
    torch.compiler.assume_constant_result(_gate_digest)
    for name, what in _HF_MODULES.items():
        if hasattr(activations, name):
            _learn(getattr(activations, name), what)


def _activation(module: Any) -> str | None:
    """The activation of ``module.act_fn`` by moekit's name, or None where it has to be called itself."""
    act = module.act_fn
    kind = type(act)
    if kind is FunctionType or kind is BuiltinFunctionType:
        return _FUNCTIONS.get(act)
    known = _MODULES.get(kind)
    if known is None or kind.forward is not known.forward or kind.__call__ is not _CALL or _attached(act):
        return None
    if functional.silu is not _SILU or functional.gelu is not _GELU or functional.relu is not _RELU:
        return None
    return known.name if isinstance(known.name, str) else known.name(act)


def _attached(act: nn.Module) -> bool:
    """Whether somebody wants to see or change what ``act`` computes."""
    own = act.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_call_impl" in own
        or torch_module._has_any_global_hook()
    )


# --- gates ----------------------------------------------------------------------------------------------------------


def _plain(module: Any) -> dict[str, Any] | None:
    """``act(gate) * up``, in whatever precision: moekit's is float32 anyway."""
    activation = _activation(module)
    return None if activation is None else {"activation": activation}


def _clamped(module: Any) -> dict[str, Any] | None:
    """``act(min(gate, L)) * clamp(up, -L, L)`` with ``L = module.limit``."""
    activation, limit = _activation(module), module.limit
    return {"activation": activation, "clamp": limit} if activation is not None and _is_limit(limit) else None


def _clamped_silu(module: Any) -> dict[str, Any] | None:
    """The same with SiLU itself and ``L = module.swiglu_limit``."""
    limit = module.swiglu_limit
    return {"activation": "silu", "clamp": limit} if _is_limit(limit) and functional.silu is _SILU else None


def _gpt_oss(module: Any) -> dict[str, Any] | None:
    """``(clamp(up, -L, L) + 1) * gate * sigmoid(alpha * gate)`` after ``gate = min(gate, L)``."""
    return _quick(module.alpha, module.limit)


def _gpt_oss_interleaved(module: Any) -> dict[str, Any] | None:
    options = _quick(module.alpha, module.limit)
    return options and {**options, "layout": "interleaved"}


def _minimax(module: Any) -> dict[str, Any] | None:
    return _quick(module.swiglu_alpha, module.swiglu_limit)


def _quick(alpha: Any, limit: Any) -> dict[str, Any] | None:
    if not (_is_number(alpha) and _is_limit(limit)):
        return None
    return {"activation": "quick_gelu", "alpha": alpha, "clamp": limit, "linear_offset": 1.0}


def _fp8(module: Any) -> dict[str, Any] | None:
    """The gate of Transformers' FP8 experts: which of the forms above depends on what the model's config has."""
    if getattr(module, "gate_softcap", None) is not None:  # not there before 5.24
        return None
    if module.swiglu_alpha is not None:
        return _minimax(module)
    return _plain(module) if module.limit is None else _clamped(module)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_limit(value: Any) -> bool:
    return _is_number(value) and value >= 0


# The gates of Transformers by the digest of their code. Each was read and is compared with its class by the tests; one
# that a release writes otherwise is not here, and runs unfused until somebody has read it.
_GATES: dict[str, Callable[[Any], dict[str, Any] | None]] = {
    "674639f1e01a7583": _plain,  # the default of use_experts_implementation
    "52d3cded4539f949": _plain,  # Beam, in float32
    "af27b63e51fc4298": _clamped,  # DeepseekV4
    "cb4241cfd94186fc": _clamped_silu,  # Glm5Next, HYV4
    "7098080a9b7d2c01": _gpt_oss_interleaved,  # GptOss
    "8f85c3f2488369e7": _gpt_oss,  # OpenAIPrivacyFilter
    "6b27fdb20b54e57c": _minimax,  # MiniMaxM3VL
    "4f3df1f7eabaa45d": _fp8,  # FP8Experts
    "36c400ef60b8fd3a": _fp8,  # FP8Experts of 5.12
}


def fused_options(module: Any) -> dict[str, Any] | None:
    """The gate of ``module`` as arguments of :func:`moekit.experts`, or None where it has to run itself."""
    if getattr(module, "has_post_expert_norm", False):
        return None
    if not module.has_gate:
        options = _plain(module)
        return options and {**options, "layout": "ungated"}
    if "_apply_gate" in module.__dict__:
        return None
    read = _GATES.get(_gate_digest(type(module)))
    return None if read is None else read(module)


# Weak: a class (and its gate) may be made anew at every step, and must be free to go.
_digests: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _gate_digest(kind: type) -> str:
    """The digest of the gate of the class ``kind``, taken once; ``torch.compile`` takes it for a constant."""
    gate = kind._apply_gate
    if type(gate) is not FunctionType:
        return ""
    if gate not in _digests:
        _digests[gate] = digest(gate)
    return _digests[gate]


def digest(function: FunctionType, cells: tuple[str, ...] = (), decorators: tuple[str, ...] = ()) -> str:
    """A digest of what a function computes: its statements, without comments and annotations, and what they refer to.

    Empty for a function whose source cannot be had, or does not tell: a closure, decorators, names that do not mean
    what they say. ``cells`` and ``decorators`` are those that the caller knows and has looked at.
    """
    code, scope = function.__code__, function.__globals__
    honest = {"torch": torch, "nn": nn, "F": functional}
    if code.co_freevars != cells or any(
        scope.get(name) is not what for name, what in honest.items() if name in code.co_names
    ):
        return ""
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return ""
    if not isinstance(definition, ast.FunctionDef):
        return ""
    if tuple(map(ast.unparse, definition.decorator_list)) != decorators:
        return ""
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    names = [argument.arg for argument in definition.args.args]
    return hashlib.sha256(repr((names, [_structure(statement) for statement in body])).encode()).hexdigest()[:16]


def _structure(node: Any) -> Any:
    """A syntax tree as nested tuples, the same for every release of Python (``ast.dump`` and ``ast.unparse`` are not)."""
    if isinstance(node, list):
        return tuple(_structure(entry) for entry in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, getattr(node, name, None)) for name in node._fields if name not in ("annotation", "kind", "ctx"))
    return type(node).__name__, *((name, _structure(value)) for name, value in fields if value not in (None, []))
