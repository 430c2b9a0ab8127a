"""How a parameter of packed experts is made of the tensors of a checkpoint: converters and operations of Transformers' loader.

An operation takes ``{pattern of the checkpoint's name: tensors}`` and returns ``{name: parameter}``. The quantiser it is given
(:class:`moekit.hf._quantizer.PackedQuantizer`) says which parameters are to be packed, and how.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    log_conversion_errors,
)

from moekit import _check
from moekit.ops.unpack import Stored, unpack
from moekit.packed import PackedExperts, pack
from moekit.packed.formats import FORMATS

_CODE = torch.float8_e4m3fn
_SCALE, _INPUT_SCALE = "_scale_inv", "activation_scale"
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class Operation(ConversionOps):
    """An operation with its quantiser: the loader copies it for each parameter, and casts no codes on the way to it."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict) -> Operation:
        return self


# --- from floating point --------------------------------------------------------------------------------------------


class Pack(Operation):
    """Packs weights that are complete."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Each is freed before the next."""
        return {name: self.hf_quantizer.from_dense(name, _one(input_dict.pop(name))) for name in list(input_dict)}


class ExpertByExpert(WeightConverter):
    """A converter that stacks experts: with one to be packed, it reads and packs one expert after the other."""

    __slots__ = ()

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Any]:
        """The parameter ``layer_name``; as ever, where it is not packed or is stored ``[E, in, out]``."""
        lists = [self.collected_tensors.get(pattern, []) for pattern in self.source_patterns]
        takes = isinstance(self.quantization_operation, Pack) and hf_quantizer.takes_experts(layer_name)
        if not takes or len({len(tensors) for tensors in lists}) != 1:
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        self.collected_tensors.clear()
        with log_conversion_errors(layer_name, loading_info, (len(lists), layer_name), self.quantization_operation):
            return {layer_name: hf_quantizer.from_experts(layer_name, _experts(lists))}
        return {}


def expert_by_expert(converter: Any) -> Any:
    """``converter``, able to pack as it goes if it stacks experts and does nothing else."""
    if type(converter) is not WeightConverter or not _stacks(converter.operations):
        return converter
    return _alike(converter, ExpertByExpert, converter._original_source_patterns, converter.operations)


def _stacks(operations: Sequence[Any]) -> bool:
    """Whether operations stack experts, the halves of the gate one below the other, and do nothing else."""
    steps = [(type(step), getattr(step, "dim", None)) for step in operations]
    return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _experts(lists: Sequence[list]) -> Iterator[Tensor]:
    """One expert ``[out, in]`` after the other, read when it is asked for."""
    for number in range(len(lists[0])):
        parts = [_materialised(tensors, number) for tensors in lists]
        yield torch.cat(parts) if len(parts) > 1 else parts[0]


def _materialised(tensors: list, number: int) -> Tensor:
    """The tensor that an entry of the loader stands for, which forgets it."""
    entry, tensors[number] = tensors[number], None
    if isinstance(entry, Future):
        return entry.result()
    return entry() if callable(entry) else entry


def _alike(converter: Any, kind: type, sources: Sequence[str], operations: Sequence[Any]) -> Any:
    """A converter to the targets of another, for the same part of the model."""
    made = kind(list(sources), list(converter._original_target_patterns), list(operations))
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(converter, name):
            setattr(made, name, getattr(converter, name))
    return made


def _one(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


# --- what is packed already -----------------------------------------------------------------------------------------


class ReadPacked(Operation):
    """Makes a packed weight of the tensors that ``save_pretrained`` wrote, or gpt-oss's checkpoint has."""

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """A tensor alone is a weight that was not packed."""
        tensors = {full_layer_name + _suffix(pattern): _one(value) for pattern, value in input_dict.items()}
        input_dict.clear()
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        if list(tensors) == [full_layer_name]:
            return {full_layer_name: tensors[full_layer_name].to(dtype)}
        if full_layer_name + _SCALE in tensors:
            tensors[full_layer_name] = _codes(tensors[full_layer_name])
        block = self.hf_quantizer.source_block
        packed = PackedExperts.from_state_dict(tensors, full_layer_name, block=block, dtype=dtype)
        return {full_layer_name: self.hf_quantizer.from_packed(full_layer_name, packed)}


def read_packed(quantizer: Any, converters: list) -> list:
    """The converters of a checkpoint whose experts have the names of :meth:`moekit.PackedExperts.state_dict`."""
    suffixes = sorted({suffix for format in FORMATS for suffix in _suffixes(format)}, key=len, reverse=True)
    made = []
    for weight in _WEIGHTS:
        sources = [rf"\.{weight}{re.escape(suffix)}$" for suffix in suffixes]
        made.append(WeightConverter(sources, f".{weight}", [ReadPacked(quantizer)]))
    return [*converters, *made]


def _suffixes(format: str) -> list[str]:
    """The ends of the names of a packed weight's tensors."""
    packed = pack(torch.zeros(1, 64, 64), format, double_quant=format == "nf4")
    return list(packed.state_dict(""))


def _unescaped(pattern: str) -> str:
    """The name that a pattern of ours stands for; the loader's own have no more in them than stars."""
    return pattern.replace("\\", "").removesuffix("$")


def _suffix(pattern: str) -> str:
    """What :func:`read_packed` put behind the name of the weight."""
    found = _unescaped(pattern)
    return found.removeprefix(next(f".{weight}" for weight in _WEIGHTS if found.startswith(f".{weight}")))


# --- block-FP8 ------------------------------------------------------------------------------------------------------


class ReadFp8(Operation):
    """Makes a weight of FP8 codes and their scales: packed if it is of experts, else in floating point.

    ``operations`` are those of the model's converter for floating-point weights. Where they stack experts, and the halves of
    the gate, they do to the scales of blocks what they do to the codes.
    """

    def __init__(self, hf_quantizer: Any, sources: Sequence[str], operations: Sequence[Any]) -> None:
        super().__init__(hf_quantizer)
        self.sources, self.operations = list(sources), list(operations)

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Codes without scales are refused: their values are not known."""
        pairs = self._pairs(input_dict, full_layer_name)
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        kwargs |= {"source_patterns": self.sources, "full_layer_name": full_layer_name, "model": model}
        packed = all(scale is not None for tensors in pairs.values() for _, scale in tensors)
        if not (packed and self.hf_quantizer.is_target(full_layer_name)):
            block = self.hf_quantizer.source_block
            dense = {name: [_dense(*pair, block, dtype) for pair in tensors] for name, tensors in pairs.items()}
            return self._run(dense, kwargs)
        if not _stacks(self.operations):
            steps = ", ".join(type(step).__name__ for step in self.operations)
            wanted = "stacked from whole matrices; dequantise it (FineGrainedFP8Config(dequantize=True)), then moekit.hf.pack"
            raise _check.fail("hf.load", full_layer_name, wanted, f"FP8 codes that go through {steps}")
        codes = {name: [code.view(torch.uint8) for code, _ in tensors] for name, tensors in pairs.items()}
        scales = {name: [_matrix(scale) for _, scale in tensors] for name, tensors in pairs.items()}
        merged = (_one(next(iter(self._run(part, kwargs).values()))) for part in (codes, scales))
        stored = _stored(*merged, self.hf_quantizer.source_block)
        return {full_layer_name: self.hf_quantizer.from_packed(full_layer_name, PackedExperts.of(stored, dtype))}

    def _pairs(self, tensors: dict[str, Any], name: str) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
        """Codes and scales by the pattern of the codes; None beside what is no code."""
        found = {_unescaped(pattern): tensors.pop(pattern) for pattern in list(tensors)}
        pairs = {}
        for source in self.sources:
            if source not in found:
                continue
            codes = found[source] if isinstance(found[source], list) else [found[source]]
            scales = found.get(source + _SCALE, [None] * len(codes))
            if len(scales) != len(codes) or (scales[0] is None and codes[0].element_size() == 1):
                scaled = sum(scale is not None for scale in scales)
                raise _check.fail("hf.load", name, "codes with a tensor of scales each", f"{len(codes)} with {scaled}")
            pairs[source] = [
                (code if scale is None else _codes(code), scale) for code, scale in zip(codes, scales, strict=True)
            ]
        return pairs

    def _run(self, tensors: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        for step in self.operations:
            tensors = step.convert(tensors, **kwargs)
        return tensors


def read_fp8(quantizer: Any, converters: list) -> list:
    """The converters of a block-FP8 checkpoint: ``*.weight`` and ``*.weight_scale_inv``, expert by expert."""
    made = [_with_scales(quantizer, converter) for converter in converters]
    linear = [r"\.weight$", rf"\.weight{_SCALE}$", rf"\.{_INPUT_SCALE}$"]
    return [*read_packed(quantizer, made), WeightConverter(linear, ".weight", [ReadFp8(quantizer, [".weight"], [])])]


def _with_scales(quantizer: Any, converter: Any) -> Any:
    """``converter`` for codes and scales, if it is one of weights."""
    sources = getattr(converter, "_original_source_patterns", [])
    if not isinstance(converter, WeightConverter) or not all(source.endswith(".weight") for source in sources):
        return converter
    plain = [_unescaped(source) for source in sources]
    read = ReadFp8(quantizer, plain, converter.operations)
    return _alike(converter, WeightConverter, [f"{source}{end}$" for end in ("", _SCALE) for source in sources], [read])


def _stored(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Stored:
    """Codes as bytes ``[E, out, in]`` and scales ``[E, rows, columns]``.

    Without a block a scale is of a matrix, or of a half of the gate: each row gets its own.
    """
    height, width = codes.shape[1:]
    if block is None:
        scales, block = scales.repeat_interleave(height // max(1, scales.shape[1]), 1), (1, width)
    return Stored(codes.view(_CODE), [scales], "fp8", block)


def _dense(codes: Tensor, scales: Tensor | None, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """A matrix, in floating point."""
    if scales is None:
        return codes.to(dtype)
    stored = _stored(codes[None].view(torch.uint8), _matrix(scales)[None], block)
    return unpack(PackedExperts.of(stored, dtype).stored(), 0, 1, dtype)[0]


def _codes(codes: Tensor) -> Tensor:
    """FP8 codes: an older loader casts what has its name in the model already, which changes no value of them."""
    return codes.to(_CODE)


def _matrix(scales: Any) -> Tensor:
    """Scales of a matrix as a matrix, of a dtype that packed weights have; bytes are exponents of two."""
    matrix = scales.reshape(scales.shape if scales.dim() == 2 else (scales.numel(), 1))
    if matrix.dtype is torch.uint8:
        return matrix.view(torch.float8_e8m0fnu)
    return matrix.float() if matrix.dtype in (torch.float16, torch.float64) else matrix


READERS: dict[str, Callable[[Any, list], list]] = {"moekit": read_packed, "mxfp4": read_packed, "fp8": read_fp8}
