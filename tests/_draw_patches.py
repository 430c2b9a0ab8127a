"""What users hook and patch in an experts module."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from _draw_classes import CONSTANTS, Situation, halves
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import peft
except ImportError:  # its adapters are not drawn then
    peft = None


@dataclass
class Case:
    """One drawn situation made real."""

    situation: Situation
    exact: bool
    noise: float
    module: Any
    calls: list[str] = field(default_factory=list)
    extra: dict[str, Tensor] = field(default_factory=dict)
    undo: list[Callable[[], Any]] = field(default_factory=list)

    @property
    def experts(self) -> Any:
        """The experts module, which an adapter may have wrapped."""
        return next(m for m in self.module.modules() if "_is_expert_parallel" in vars(m))

    def replace(self, holder: Any, name: str, value: Any) -> None:
        """Set a class attribute until the end of the draw."""
        before = vars(holder)[name]
        setattr(holder, name, value)
        self.undo.append(lambda: setattr(holder, name, before))

    def finish(self) -> None:
        while self.undo:
            self.undo.pop()()


def _bend(value: Tensor) -> Tensor:
    return 0.5 * value + 0.25


def _bend_first(_: Any, args: tuple) -> tuple:
    return (_bend(args[0]), *args[1:])


def _grad_halved(_: Any, grads: tuple, *__: Any) -> tuple:
    return tuple(0.5 * g if g is not None and g.is_floating_point() else g for g in grads)


def _patched_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = halves(self, gate_up)
    return torch.tanh(gate) * up


def _hook(target: str, register: str, hook: Callable) -> Callable[[Case], None]:
    def patch(case: Case) -> None:
        getattr(case.experts.act_fn if target == "act" else case.experts, register)(hook)

    return patch


def _count(case: Case) -> None:
    case.experts.act_fn.register_forward_hook(lambda *_: case.calls.append("act"))


def _global_hook(case: Case) -> None:
    mark = case.experts.act_fn.drawn = object.__hash__(case)

    def hook(module: Any, _: Any, out: Tensor) -> Tensor | None:
        return _bend(out) if getattr(module, "drawn", None) == mark else None

    case.undo.append(nn.modules.module.register_module_forward_hook(hook).remove)


def _bent_forward(self: Any, x: Tensor) -> Tensor:
    return _bend(type(self).forward(self, x))


def _act_forward(case: Case) -> None:
    case.experts.act_fn.forward = types.MethodType(_bent_forward, case.experts.act_fn)


def _act_subclass(name: str) -> Callable[[Case], None]:
    def patch(case: Case) -> None:
        act = case.experts.act_fn
        act.__class__ = type(type(act).__name__, (type(act),), {name: lambda self, x: torch.tanh(x)})

    return patch


def _functional(case: Case) -> None:
    case.replace(F, "silu", lambda x, inplace=False: torch.tanh(x))


def _act_class_forward(case: Case) -> None:
    cls = type(case.experts.act_fn)
    if "forward" in vars(cls):
        case.replace(cls, "forward", lambda self, x: torch.tanh(x))


def _act_inner(case: Case) -> None:
    if hasattr(case.experts.act_fn, "act"):
        case.experts.act_fn.act = torch.tanh


def _gate_instance(case: Case) -> None:
    case.experts._apply_gate = types.MethodType(_patched_gate, case.experts)


def _doubled_gate(self: Any, gate_up: Tensor) -> Tensor:
    return 2 * type(self)._apply_gate(self, gate_up)


def _gate_around(case: Case) -> None:
    case.experts._apply_gate = types.MethodType(_doubled_gate, case.experts)


def _gate_class(case: Case) -> None:
    cls = next(c for c in type(case.experts).__mro__ if "_apply_gate" in vars(c))
    case.replace(cls, "_apply_gate", _patched_gate)


def _subclass(same_name: bool, **space: Any) -> Callable[[Case], None]:
    def patch(case: Case) -> None:
        cls = type(case.experts)
        case.experts.__class__ = type(cls.__name__ if same_name else "Users", (cls,), {"__module__": __name__, **space})

    return patch


def _gate_through_super(self: Any, gate_up: Tensor) -> Tensor:
    return 1.5 * super(type(self), self)._apply_gate(gate_up)


class Scaled(nn.Module):
    """A parametrisation."""

    def forward(self, value: Tensor) -> Tensor:
        return 0.75 * value


def _parametrize(name: str) -> Callable[[Case], None]:
    def patch(case: Case) -> None:
        of = "up_proj" if name == "gate_up_proj" and not case.experts.has_gate else name
        nn.utils.parametrize.register_parametrization(case.experts, of, Scaled(), unsafe=True)

    return patch


def _weight_replaced(case: Case) -> None:
    case.experts.down_proj = nn.Parameter(torch.empty_like(case.experts.down_proj))


def _weight_is_tensor(case: Case) -> None:
    shape = case.experts._parameters.pop("down_proj").shape
    case.experts.down_proj = case.extra["down_proj"] = torch.empty(shape)


def _constants(make: Callable[[float], Any]) -> Callable[[Case], None]:
    def patch(case: Case) -> None:
        for name in CONSTANTS:
            if hasattr(case.experts, name):
                setattr(case.experts, name, make(0.625))

    return patch


def _lora(case: Case) -> None:
    case.module.config._experts_implementation = "eager"
    net = nn.Module()
    net.experts, net.forward = case.module, lambda *args: case.module(*args)
    first = "gate_up_proj" if case.module.has_gate else "up_proj"
    wanted = peft.LoraConfig(r=2, target_parameters=[f"experts.{first}", "experts.down_proj"])
    net = peft.get_peft_model(net, wanted)
    net.base_model.model.forward = lambda *args: net.base_model.model.experts(*args)
    case.module = net


PATCHES: dict[str, tuple[str, Callable[[Case], None]]] = {
    # name: what the class must have, how it is done
    "act_forward_hook": ("act", _hook("act", "register_forward_hook", lambda m, a, out: _bend(out))),
    "act_pre_hook": ("act", _hook("act", "register_forward_pre_hook", _bend_first)),
    "act_backward_hook": ("act", _hook("act", "register_full_backward_hook", _grad_halved)),
    "act_backward_pre_hook": ("act", _hook("act", "register_full_backward_pre_hook", _grad_halved)),
    "act_counting_hook": ("act", _count),
    "global_hook": ("act", _global_hook),
    "act_forward": ("act", _act_forward),
    "act_class_forward": ("act", _act_class_forward),
    "act_class": ("act", _act_subclass("forward")),
    "act_class_call": ("act", _act_subclass("__call__")),
    "functional_silu": ("", _functional),
    "act_inner": ("act", _act_inner),
    "experts_forward_hook": ("", _hook("experts", "register_forward_hook", lambda m, a, out: _bend(out))),
    "experts_pre_hook": ("", _hook("experts", "register_forward_pre_hook", _bend_first)),
    "experts_backward_hook": ("", _hook("experts", "register_full_backward_hook", _grad_halved)),
    "gate_instance": ("gate", _gate_instance),
    "gate_around": ("gate", _gate_around),
    "gate_class": ("gate", _gate_class),
    "gate_subclass": ("gate", _subclass(False, _apply_gate=_patched_gate)),
    "gate_subclass_same_name": ("gate", _subclass(True, _apply_gate=_patched_gate)),
    "gate_subclass_super": ("gate", _subclass(False, _apply_gate=_gate_through_super)),
    "subclass_plain": ("", _subclass(False)),
    "parametrize_gate_up": ("", _parametrize("gate_up_proj")),
    "parametrize_down": ("", _parametrize("down_proj")),
    "weight_replaced": ("", _weight_replaced),
    "weight_is_tensor": ("", _weight_is_tensor),
    "constant_changed": ("constants", _constants(float)),
    "constant_tensor": ("constants", _constants(torch.tensor)),
    "constant_parameter": ("constants", _constants(lambda value: nn.Parameter(torch.tensor(value)))),
    **({} if peft is None else {"lora": ("", _lora)}),
}
