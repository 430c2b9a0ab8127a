"""Packed experts in Transformers' loader and its ``save_pretrained``: the quantisation method ``moekit``.

A checkpoint in floating point is packed as it is read: a weight that stands in it expert by expert is read, packed and freed
expert by expert; another one when it is complete. One in mxfp4 (gpt-oss) or in block-FP8 (DeepSeek-V3, Qwen3-FP8) is taken
as it is: no floating-point copy of an expert exists, unless another format is asked for. What is in FP8 beside the experts
is dequantised.

Transformers calls a quantiser at the points that its base class names; how tensors of a checkpoint become a parameter is in
:mod:`moekit.hf._loading`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moekit import _check
from moekit.hf._loading import READERS, Operation, Pack, expert_by_expert
from moekit.hf._packing import Options, chosen, keep_in_state_dicts, nothing_packed, pack_in_place, slots, unpack_in_place
from moekit.packed import PackedExperts

_log = logging.getLogger("moekit.hf")


def enter(name: str) -> None:
    """Make the method known to ``from_pretrained``."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[name] = PackedConfig
    AUTO_QUANTIZER_MAPPING[name] = PackedQuantizer


def leave(name: str) -> None:
    """Take it out again."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(name, None)
    AUTO_QUANTIZER_MAPPING.pop(name, None)


class PackedConfig(QuantizationConfigMixin):
    """What ``config.json`` says of packed experts.

    Args:
        format: what experts are packed in; None keeps what a checkpoint has.
        double_quant: as in :func:`moekit.pack`.
        block: as in :func:`moekit.pack`.
        skip: names of parameters or modules (``*`` for anything) that stay in floating point.
        source: how the checkpoint that is read has its experts: ``moekit`` (what ``save_pretrained`` wrote), ``mxfp4`` or
            ``fp8``. It is not written.
        source_block: the block of ``fp8``.
        quant_method: this one.
    """

    quant_method: Any

    def __init__(
        self,
        format: str | None = None,
        double_quant: bool = False,
        block: Sequence[int] | None = None,
        skip: Sequence[str] = (),
        source: str = "moekit",
        source_block: Sequence[int] | None = None,
        quant_method: str = "moekit",
    ) -> None:
        self.quant_method = quant_method
        self.format, self.double_quant, self.block, self.skip = format, double_quant, block and list(block), list(skip)
        self.source, self.source_block = source, source_block and tuple(source_block)

    def options(self) -> Options | None:
        """How experts are packed; None where they stay as they are."""
        return None if self.format is None else Options.of(self.format, self.double_quant, self.block)

    def to_dict(self) -> dict[str, Any]:
        """What is written."""
        return {name: value for name, value in super().to_dict().items() if not name.startswith("source")}


class _Target(NamedTuple):
    """A weight that is to be packed."""

    turned: bool
    bytes_an_element: float


class PackedQuantizer(HfQuantizer):
    """Packs experts' weights while a model is loaded, or reads packed ones."""

    requires_calibration = False
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.options = quantization_config.options()
        self.targets: dict[str, _Target] = {}  # by the name of the parameter, while a model is loaded
        self.conversions: list | None = None  # the model's, before those of packed weights were left out

    # --- what the operations of the loader ask ------------------------------------------------------------------------

    @property
    def source_block(self) -> tuple[int, int] | None:
        """The block of FP8 codes that are read; None for one that the scales show."""
        config = self.quantization_config
        found = config.source_block or (config.block if config.source == "moekit" else None)
        return None if found is None else (found[0], found[1])

    def is_target(self, name: str) -> bool:
        """Whether a parameter is to be packed."""
        return name in self.targets

    def takes_experts(self, name: str) -> bool:
        """Whether :meth:`from_experts` can make the parameter."""
        return name in self.targets and not self.targets[name].turned

    def from_dense(self, name: str, weight: Tensor) -> Tensor:
        """A parameter of a complete weight: packed, if it is to be."""
        if name not in self.targets or self.options is None:
            return weight
        return _frozen(self.options.pack(weight, self.targets[name].turned))

    def from_experts(self, experts: Iterator[Tensor], count: int) -> Tensor:
        """A packed parameter of ``count`` experts ``[out, in]`` that come one after the other."""
        return _frozen((self.options or Options("nf4")).pack_each(experts, count))

    def from_packed(self, name: str, packed: PackedExperts, turned: bool) -> Tensor:
        """A parameter of what a checkpoint has: as it is, unless another format, or none, was asked for."""
        if name not in self.targets:
            values = packed.unpack()
            return values.mT.contiguous() if turned else values
        again = self.options is not None and self.options.format != packed.format
        if self.options is not None and again and self.quantization_config.source != "moekit":
            experts = (packed.unpack(slice(expert, expert + 1))[0] for expert in range(len(packed)))
            packed = self.options.pack_each(experts, len(packed))
        return _frozen(packed.turn() if turned else packed)

    # --- what Transformers asks -------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what leaves experts elsewhere than they are computed."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"moekit.hf.load: device_map must be of devices that compute, got {sorted(places)}: packed experts are not "
                "offloaded; they need so much less memory that it may do without"
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is to be packed."""
        return param_name in self.targets

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element: devices are chosen, and memory is set aside, by it."""
        target = self.targets.get(param_name)
        return param.element_size() if target is None else target.bytes_an_element

    def get_quantize_ops(self) -> ConversionOps:
        """What packs a complete weight."""
        return Pack(self)

    def update_weight_conversions(self, weight_conversions: list, model: Any = None) -> list:
        """The model's converters, made to pack, or to read what is packed."""
        if not self.pre_quantized:
            return [expert_by_expert(converter) for converter in weight_conversions]
        return READERS[self.quantization_config.source](self, weight_conversions)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` writes packed weights as plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """And so can all that is not packed, without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Products with packed weights are operators."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Choose the weights: the model is on meta, with the shapes it will have."""
        config = self.quantization_config
        found, left = chosen(model, config.skip, empty=True)
        options = self.options or Options(config.source)
        for slot in found:
            one = slot.weight[:1]
            try:
                size = options.pack(one, slot.turned).bytes / max(1, one.numel())
            except ValueError as error:
                left[slot.name] = str(error)
            else:
                self.targets[slot.name] = _Target(slot.turned, size)
        if not self.targets:
            raise nothing_packed("hf.load", left)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """What the checkpoint had no weights for was made in floating point; then the model is told what it has."""
        if not self.pre_quantized and self.options is not None:
            pack_in_place([slot for slot in chosen(model, ())[0] if slot.name in self.targets], self.options)
        self.targets = {}
        if self.conversions is None:
            self.conversions = getattr(model, "_weight_conversions", None)
        adopted(model, self.quantization_config)

    def remove_quantization_config(self, model: Any) -> None:
        """Forget packed experts; the model is saved as it would have been without them."""
        super().remove_quantization_config(model)
        for name in ("_weight_conversions", "get_memory_footprint"):
            vars(model).pop(name, None)
        if self.conversions is not None:
            model._weight_conversions = [conversion for conversion in self.conversions if not _ours(conversion)]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        unpack_in_place(model, dtype)
        return model


def _frozen(packed: Any) -> nn.Parameter:
    return nn.Parameter(packed, requires_grad=False)


def adopted(model: Any, config: PackedConfig) -> None:
    """Tell a model what it has: state dicts, the implementation of experts and what is saved are to fit packed weights."""
    packed = [slot for slot in slots(model) if isinstance(slot.weight, PackedExperts)]
    for slot in packed:
        keep_in_state_dicts(slot.module)
    config.skip = [slot.name for slot in slots(model) if not isinstance(slot.weight, PackedExperts)]
    config.source, config.source_block = "moekit", None
    model.get_memory_footprint = functools.partial(_footprint, model)
    if config.format is None and packed:
        config.format = packed[0].weight.format
    blocks = {slot.weight.stored().block for slot in packed if slot.weight.format == "fp8"}
    config.block = list(*blocks) if len(blocks) == 1 else None
    model.set_experts_implementation("moekit")
    model._weight_conversions = _without(model, [slot.name for slot in packed])


def _footprint(model: Any, return_buffers: bool = True) -> int:
    """``get_memory_footprint`` of what is stored: Transformers' own takes elements to be of the size of their dtype."""
    tensors = [*model.parameters(), *(model.buffers() if return_buffers else ())]
    return sum(tensor.bytes if isinstance(tensor, PackedExperts) else tensor.nbytes for tensor in tensors)


def _without(model: Any, names: Sequence[str]) -> list:
    """What ``save_pretrained`` undoes of a model's conversions: not those that stack experts, whose weights are packed."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # never loaded: as save_pretrained finds them itself
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in found if not isinstance(conversion, PrefixChange)]
    return [conversion for conversion in conversions if not _touches(conversion, names)]


def _ours(conversion: Any) -> bool:
    return any(isinstance(step, Operation) for step in getattr(conversion, "operations", ()))


def _touches(conversion: Any, names: Sequence[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    if _ours(conversion):
        return True
    back = conversion.reverse_transform()
    return any(back.rename_source_key(name)[1] is not None for name in names)


# --- what packing in place, unpacking and loading ask -------------------------------------------------------------------


def take_over(model: Any, options: Options, skip: Sequence[str]) -> None:
    """Have a model know that its experts were packed in place; what else is quantised stays its quantiser's."""
    config = PackedConfig(*options, skip=skip)
    other = getattr(model, "hf_quantizer", None)
    if other is not None and not isinstance(other, PackedQuantizer):
        model.hf_quantizer = other if isinstance(other, BesideAnother) else BesideAnother(other)
        return
    quantizer = PackedQuantizer(config)
    quantizer.conversions = None if other is None else other.conversions
    model.is_quantized, model.quantization_method, model.hf_quantizer = True, config.quant_method, quantizer
    quantizer.postprocess_model(model)


def give_back(model: Any) -> None:
    """Undo :func:`take_over`, or what loading did."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, BesideAnother):
        model.hf_quantizer = quantizer.other
    elif isinstance(quantizer, PackedQuantizer):
        quantizer.remove_quantization_config(model)


def source_of(op: str, config: Any, wanted: str | None) -> dict[str, Any] | None:
    """How a checkpoint that is quantised has its experts, for :class:`PackedConfig`; None for one in floating point."""
    text = config.get_text_config(decoder=True)
    found = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    method = found.get("quant_method")
    if method == "moekit":
        own = found.get("format")
        if wanted not in (None, own):
            raise _check.fail(op, "format", f"{own!r}, as the checkpoint has it (or 'auto')", repr(wanted))
        return found
    if method not in ("mxfp4", "fp8"):
        raise NotImplementedError(
            f"moekit.{op}: the checkpoint is quantised by {method!r}, which is not read as packed experts. Load it with "
            "from_pretrained, then pack the experts that are in floating point: moekit.hf.pack(model)"
        )
    if text is not config and hasattr(text, "quantization_config"):
        del text.quantization_config
    block = found.get("weight_block_size") if method == "fp8" else None
    return {"format": wanted, "source": method, "source_block": block}


class BesideAnother(HfQuantizer):
    """The quantiser of a model whose experts were packed in place after it had quantised other layers.

    Both cannot be written into one ``config.json``: such a model is not saved whole, but its adapters are.
    """

    def __init__(self, other: HfQuantizer) -> None:
        super().__init__(other.quantization_config, pre_quantized=other.pre_quantized)
        self.other = other

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Never."""
        method = self.quantization_config.quant_method
        _log.warning(
            "moekit: experts packed beside layers quantised by %s are not saved by save_pretrained; save adapters, or "
            "unpack the experts first (moekit.hf.unpack)",
            getattr(method, "value", method),
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """As without packed experts."""
        return bool(self.other.is_trainable)

    @property
    def is_qat_trainable(self) -> bool:
        """As without packed experts."""
        return bool(self.other.is_qat_trainable)

    @property
    def is_compileable(self) -> bool:
        """As without packed experts."""
        return self.other.is_compileable
