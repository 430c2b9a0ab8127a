"""Which weights of a model are packed, one after the other in place, and how they stand in state dicts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekit import _check
from moekit.packed import PackedExperts, pack
from moekit.packed.formats import FORMATS
from moekit.packed.packing import pack_each

_PLAIN = (nn.Parameter, Tensor)
_REMEDIES = {"Mxfp4GptOssExperts": "; load the checkpoint with moekit.hf.load"}


class Options(NamedTuple):
    """How weights are packed: arguments of :func:`moekit.pack`, checked as far as they can be without a weight."""

    format: str
    double_quant: bool = False
    block: tuple[int, int] | None = None

    @staticmethod
    def of(format: str, double_quant: bool = False, block: Sequence[int] | None = None) -> Options:
        """Checked: what is wrong with them is wrong with every weight, and no reason to leave one."""
        _check.one_of("hf.pack", "format", format, FORMATS)
        wanted: Any = tuple(block) if isinstance(block, list) else block
        sides = FORMATS[format].block("hf.pack", 128, 128, wanted) if wanted is not None else (128, 128)
        made = Options(format, bool(double_quant), wanted)
        pack(torch.empty(1, 128, sides[1], dtype=torch.float32, device="meta"), **made._asdict())
        return made

    def pack(self, weight: Tensor, turned: bool) -> PackedExperts:
        """``weight`` packed; its logical shape stays what it is, ``[E, in, out]`` if ``turned``."""
        if not turned:
            return pack(weight, **self._asdict())
        return pack(weight.mT, **self._asdict()).turn()

    def pack_each(self, experts: Iterator[Tensor], count: int) -> PackedExperts:
        """``count`` experts ``[out, in]`` packed as they come."""
        first = next(experts)
        height, width = first.shape
        block = FORMATS[self.format].block("pack", height, width, self.block)
        every = itertools.chain([first], experts)
        stored = pack_each(
            lambda _: next(every), (count, height, width), self.format, block, first.device, double_quant=self.double_quant
        )
        return PackedExperts(stored, first.dtype)


class Slot(NamedTuple):
    """A weight of an experts module by its place."""

    path: str  # of the module
    module: Any
    attribute: str

    @property
    def name(self) -> str:
        """Of the parameter, in the model."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def weight(self) -> Any:
        """The parameter that is there now; None where there is none of that name."""
        return self.module._parameters.get(self.attribute)

    @property
    def turned(self) -> bool:
        """Whether the class stores ``[E, in, out]``."""
        return self.module.is_transposed

    def put(self, weight: Tensor, requires_grad: bool = False) -> None:
        """Put a weight there."""
        setattr(self.module, self.attribute, nn.Parameter(weight, requires_grad=requires_grad))


def decorated(module: Any) -> bool:
    """Whether ``module`` is of a class that Transformers decorates with ``use_experts_implementation``."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def slots(model: nn.Module) -> Iterator[Slot]:
    """The weights of every decorated experts module."""
    for path, module in model.named_modules():
        if decorated(module):
            for attribute in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                yield Slot(path, module, attribute)


def chosen(model: nn.Module, skip: Sequence[str], *, empty: bool = False) -> tuple[list[Slot], dict[str, str]]:
    """The weights that can be packed, as far as it shows before it is tried, and why the others are left.

    With ``empty``, those on meta, too: the model is yet to be loaded.
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # each once, wherever else it stands
        for attribute, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{attribute}" if path else attribute)
    found, left = [], undecorated(model)
    for slot in slots(model):
        reason = _obstacle(slot, owners, empty)
        if any(matches(slot.name, wanted) for wanted in skip):
            reason = "skipped, as asked for"
        if reason is None:
            found.append(slot)
        else:
            left[slot.name] = reason
    return found, left


def matches(name: str, wanted: str) -> bool:
    """Whether ``wanted`` is a name, or of a module around it; ``*`` stands for anything."""
    return fnmatchcase(name, wanted) or fnmatchcase(name, f"{wanted}.*")


def _obstacle(slot: Slot, owners: dict[int, list[str]], empty: bool) -> str | None:
    """Why a weight cannot be packed as it is; None if nothing is known against it."""
    weight = slot.weight
    if weight is None:
        computed = slot.attribute in getattr(slot.module, "parametrizations", ())
        return "computed by a parametrisation" if computed else "not a parameter of the module"
    if isinstance(weight, PackedExperts):
        return f"packed already, in {weight.format}"
    if hasattr(weight, "placements"):
        return "a DTensor: pack before the model is sharded"
    if type(weight) not in _PLAIN and not _check.transparent(weight):
        return f"a {type(weight).__name__}: packed by another library"
    if weight.dtype not in _check.FLOATS:
        return f"of dtype {weight.dtype}: quantised already (moekit.hf.load keeps what a checkpoint has)"
    if weight.is_meta and not empty:
        return "on meta: load the weights first"
    others = [other for other in owners.get(id(weight), ()) if other != slot.name]
    return f"shared with {others[0]}" if others else None


def undecorated(model: nn.Module) -> dict[str, str]:
    """Experts whose classes Transformers does not decorate: they compute with their weights themselves."""
    known = [path for path, module in model.named_modules() if decorated(module)]
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "expert" not in kind.lower() or "shared" in kind.lower() or next(module.parameters(), None) is None:
            continue
        if not any(_within(path, other) or _within(other, path) for other in (*known, *left)):
            left[path] = f"{kind} is not decorated with use_experts_implementation{_REMEDIES.get(kind, '')}"
    return left


def _within(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.")


def unpack_in_place(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Put the values of packed weights in their places, frozen where other parameters are; returns how many they were."""
    found = [slot for slot in slots(model) if isinstance(slot.weight, PackedExperts)]
    trained = all(parameter.requires_grad for parameter in model.parameters() if not isinstance(parameter, PackedExperts))
    for slot in found:
        slot.put(slot.weight.unpack(dtype=dtype).contiguous(), trained)
    return len(found)


def pack_in_place(found: Sequence[Slot], options: Options) -> tuple[list[Slot], dict[str, str], int, int]:
    """Pack weights, each freed before the next; what came of it, what a format does not take, bytes before and after."""
    done, left, before, after = [], {}, 0, 0
    for slot in found:
        size = slot.weight.nbytes
        try:
            packed = options.pack(slot.weight.detach(), slot.turned)
        except ValueError as error:
            left[slot.name] = str(error)
            continue
        slot.put(packed)
        keep_in_state_dicts(slot.module)
        done.append(slot)
        before, after = before + size, after + packed.bytes
    return done, left, before, after


# --- state dicts ----------------------------------------------------------------------------------------------------


def keep_in_state_dicts(module: nn.Module) -> None:
    """Have packed weights stand in state dicts as plain tensors, by the names that checkpoints have, and be read back.

    The hooks are functions of this module, so that models with them are copied and pickled; they pass by what is not packed.
    """
    if _to_plain not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_to_plain)
        module.register_load_state_dict_pre_hook(_from_plain)


def _to_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    for name, weight in _packed_in(module):
        state_dict.pop(prefix + name, None)
        state_dict.update(weight.state_dict(prefix + name))


def _from_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    for name, weight in _packed_in(module):
        key = prefix + name
        found = {entry for entry in weight.state_dict(key) if entry in state_dict} - {key}
        if found:
            packed = PackedExperts.from_state_dict(state_dict, key, block=weight.stored().block, dtype=weight.dtype)
            for entry in found:
                del state_dict[entry]
            state_dict[key] = packed.mT if weight.turned else packed


def _packed_in(module: nn.Module) -> list[tuple[str, PackedExperts]]:
    return [(name, weight) for name, weight in module._parameters.items() if isinstance(weight, PackedExperts)]


def nothing_packed(op: str, left: dict[str, str]) -> ValueError:
    """The error of a model without experts that can be packed."""
    why = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3]) or "it has no experts modules"
    return _check.fail(op, "model", "one with experts that can be packed", why)
