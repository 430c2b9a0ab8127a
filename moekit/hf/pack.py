"""Experts in 4 or 8 bits: a model's, packed in place or while it is loaded, saved, and unpacked again.

::

    model = moekit.hf.load(name, dtype=torch.bfloat16)   # experts packed as they are read
    print(moekit.hf.pack(model, "nf4"))                  # or those of a model that is loaded already
    model.save_pretrained(folder)                        # read back by moekit.hf.load(folder), bit for bit

A packed weight is a frozen parameter (:class:`moekit.PackedExperts`) in the place of the dense one, of its logical shape and
dtype; all else of the model stays as it is and can be trained. Experts run by the implementation ``"moekit"``.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moekit import _check
from moekit.hf._packing import Options, chosen, matches, nothing_packed, pack_in_place, unpack_in_place
from moekit.hf._register import NAME, ensure_registered

_HUB = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "code_revision", "subfolder", "token"),
    *("trust_remote_code",),
)
_DTYPES = ("dtype", "torch_dtype")  # "auto" means something to a model alone
_SHARDED = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


@dataclass(frozen=True)
class PackReport:
    """What :func:`pack` did.

    Attributes:
        format: what was packed in.
        packed: names of the parameters.
        modules: names of their modules.
        bytes_before: of those parameters.
        bytes_after: of the same, packed.
        left: names of experts' parameters (or modules) that stayed as they were, and why.
    """

    format: str
    packed: tuple[str, ...]
    modules: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        factor = self.bytes_before / max(1, self.bytes_after)
        lines = [
            f"{len(self.packed)} weights of {len(self.modules)} experts modules in {self.format}: "
            f"{_size(self.bytes_before)} -> {_size(self.bytes_after)} ({factor:.2f}x smaller)"
        ]
        lines += [f"  {count:4} x {name}" for name, count in _counted(self.packed)]
        if self.left:
            lines.append(f"{len(self.left)} left as they were:")
            lines += [f"  {count:4} x {text}" for text, count in _counted(f"{n}: {why}" for n, why in self.left.items())]
        return "\n".join(lines)


def pack(
    model: nn.Module,
    format: str = "nf4",
    *,
    double_quant: bool = False,
    block: tuple[int, int] | None = None,
    skip: Sequence[str] = (),
) -> PackReport:
    """Pack a model's experts in place, whatever device they are on.

    Args:
        model: a model of Transformers with experts of classes that are decorated with ``use_experts_implementation``, or a
            part of one (which can be trained, but only what is packed as a whole is saved by ``save_pretrained``).
        format: ``"nf4"``, ``"mxfp4"``, ``"fp8"`` or ``"int8"``, as in :func:`moekit.pack`.
        double_quant: nf4's scales in 8 bits.
        block: fp8's rows and columns that share a scale.
        skip: names of parameters or modules (``*`` stands for anything) whose weights stay as they are.

    Returns:
        What was packed, and what was left and why: weights whose sizes the format does not take, that are packed already,
        shared, sharded, parametrised, on meta or of another library, and experts of classes that are not decorated.

    Raises:
        ValueError: nothing could be packed (the message says why), an unknown format, options that it does not have, or a
            ``skip`` that names nothing.
        ImportError: no Transformers with an experts interface.

    Weights are packed one after the other and each is freed before the next, so that no more memory is used than before and
    one packed weight. What held them, such as an optimiser, has to be made anew. The packed ones are frozen; the model is
    set to ``experts_implementation="moekit"``.

    Examples:
        >>> import transformers, moekit.hf
        >>> sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=32)
        >>> config = transformers.Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
        >>> model = transformers.Qwen3MoeForCausalLM(config)
        >>> report = moekit.hf.pack(model, "nf4")
        >>> print(str(report).splitlines()[0])
        2 weights of 1 experts modules in nf4: 192.00 KiB -> 27.00 KiB (7.11x smaller)
        >>> moekit.hf.unregister()
    """
    op = "hf.pack"
    ensure_registered()
    options = Options.of(format, double_quant, block)
    found, left = chosen(model, skip)
    _check_skip(op, skip, [*(slot.name for slot in found), *left])
    done, refused, before, after = pack_in_place(found, options)
    left |= refused
    if not done:
        raise nothing_packed(op, left)
    for slot in done:
        slot.module.config._experts_implementation = NAME
    for root in _pretrained(model):
        _loader().take_over(root, options, skip)
    names, modules = (tuple(slot.name for slot in done), dict.fromkeys(slot.path for slot in done))
    return PackReport(format, names, tuple(modules), before, after, left)


def unpack(model: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """Give packed experts their floating-point values again, in place.

    Args:
        model: a model with packed experts.
        dtype: of the weights; the one that the packed ones stand for if None.

    Returns:
        ``model``, which is saved as it was before it was packed. The weights can be trained, unless others of the model are
        frozen. The implementation of its experts stays ``"moekit"``.

    Raises:
        ValueError: a model without packed experts.
    """
    if not unpack_in_place(model, dtype):
        raise _check.fail("hf.unpack", "model", "one with packed experts", "none")
    for root in _pretrained(model):
        _loader().give_back(root)
    if torch.distributed.is_available():
        from moekit.ep.ddp import hide_packed  # of the experts that DistributedDataParallel was told to leave alone

        hide_packed(model)
    return model


def load(
    path: Any,
    format: str | None = "auto",
    *,
    double_quant: bool = False,
    block: tuple[int, int] | None = None,
    skip: Sequence[str] = (),
    model_class: Any = None,
    **kwargs: Any,
) -> Any:
    """``from_pretrained`` that packs experts as it reads them: at most one expert (or one fused weight) is there unpacked.

    Args:
        path: a folder or the name of a model, as ``from_pretrained`` takes it.
        format: as in :func:`pack`. ``"auto"`` (or None) keeps what the checkpoint has - gpt-oss's mxfp4, block-FP8, what
            ``save_pretrained`` wrote of a packed model - and is ``"nf4"`` for one in floating point.
        double_quant: as in :func:`pack`.
        block: as in :func:`pack`.
        skip: as in :func:`pack`.
        model_class: whose ``from_pretrained`` is called; the one that the configuration names, or ``AutoModelForCausalLM``.
        **kwargs: of ``from_pretrained``.

    Returns:
        The model, in evaluation mode, with ``experts_implementation="moekit"``. Layers of a block-FP8 checkpoint other than
        experts are dequantised.

    Raises:
        ValueError: nothing to pack, an unknown format, options that have no effect, another ``experts_implementation``, or
            a checkpoint that ``save_pretrained`` wrote in another format.
        NotImplementedError: a checkpoint quantised in another way, or another ``quantization_config``; the message says what
            to do.
        ImportError: no Transformers with an experts interface.
    """
    op = "hf.load"
    ensure_registered()
    transformers = importlib.import_module("transformers")
    wanted = None if format in (None, "auto") else format
    Options.of(wanted or "nf4", double_quant, block)
    _check_load(op, kwargs)
    of_config = {name: value for name, value in kwargs.items() if name not in _DTYPES}
    config, others = transformers.AutoConfig.from_pretrained(path, return_unused_kwargs=True, **of_config)
    others |= {name: kwargs[name] for name in (*_HUB, *_DTYPES) if name in kwargs}
    own = _loader().source_of(op, config, wanted)
    settings = {"double_quant": double_quant, "block": block, "skip": skip}
    if own is None:
        others["quantization_config"] = _loader().PackedConfig(wanted or "nf4", **settings)
    else:
        _check_kept(op, wanted, own, settings)
        config.quantization_config = {"quant_method": NAME, **settings, **own}
    named = (getattr(config, "architectures", None) or [""])[0]
    kind = model_class or getattr(transformers, named, transformers.AutoModelForCausalLM)
    return kind.from_pretrained(path, config=config, **others)


def _check_load(op: str, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of ``from_pretrained`` that packed experts do not go with."""
    if kwargs.setdefault("experts_implementation", NAME) != NAME:
        raise _check.fail(op, "experts_implementation", repr(NAME), repr(kwargs["experts_implementation"]))
    if kwargs.pop("quantization_config", None) is not None:
        raise NotImplementedError(
            f"moekit.{op}: it quantises experts, and nothing else. Load with from_pretrained(quantization_config=...), then "
            "pack the experts: moekit.hf.pack(model)"
        )
    sharded = [name for name in _SHARDED if kwargs.get(name) is not None]
    if sharded:
        raise NotImplementedError(f"moekit.{op}: {sharded[0]}: packed experts are not sharded while they are loaded")


def _check_kept(op: str, wanted: str | None, own: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse options of packing where nothing is packed, for the checkpoint is."""
    ours = "source" not in own
    for name in ("double_quant", "block", *(["skip"] if ours else [])):
        if settings[name] and (ours or wanted is None):
            raise _check.unused(op, name, settings[name], "on a checkpoint whose experts are packed already")


def _loader() -> Any:
    """What knows Transformers' loader; it needs Transformers to be imported at all."""
    return importlib.import_module("moekit.hf._quantizer")


def _pretrained(model: nn.Module) -> list[Any]:
    """The model of Transformers that ``model`` is, or the ones that it wraps; none for a part of one."""
    kind = importlib.import_module("transformers").PreTrainedModel
    if isinstance(model, kind):
        return [model]
    return [found for child in model.children() for found in _pretrained(child)]


def _check_skip(op: str, skip: Sequence[str], names: Sequence[str]) -> None:
    for wanted in skip:
        if not any(matches(name, wanted) for name in names):
            raise _check.fail(op, "skip", "names of experts' weights or modules", repr(wanted))


def _counted(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names without the numbers of layers, and how often each comes."""
    return list(Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names).items())


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
