"""How parameters of packed experts are made of a checkpoint's tensors: converters and operations of Transformers' loader.

A converter collects the tensors whose names match its patterns, for each parameter they belong to; its operations, one after
the other, turn ``{pattern: tensors}`` into ``{name: parameter}``. The quantiser that an operation is given
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
from moekit.ops.unpack import Stored
from moekit.packed import PackedExperts, pack
from moekit.packed.formats import FORMATS

_CODE = torch.float8_e4m3fn
_SCALE = "_scale_inv"
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
            return {layer_name: hf_quantizer.from_experts(_experts(lists), len(lists[0]))}
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
    return entry.result() if isinstance(entry, Future) else entry()


# --- what is packed already -----------------------------------------------------------------------------------------


class ReadPacked(Operation):
    """Makes a packed weight of the tensors that ``save_pretrained`` wrote, or gpt-oss's checkpoint has."""

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """A tensor alone is a weight that was not packed."""
        name, (module, attribute) = full_layer_name, _place(model, full_layer_name)
        ends = {pattern: _unescaped(pattern).removeprefix(f".{attribute}") for pattern in input_dict}
        tensors = {name + ends[pattern]: _one(found) for pattern, found in input_dict.items()}
        input_dict.clear()
        dtype = _dtype(model, name)
        if list(tensors) == [name]:
            return {name: tensors[name].to(dtype)}
        if name + _SCALE in tensors:
            tensors[name] = _uncast(tensors[name])
        packed = PackedExperts.from_state_dict(tensors, name, block=self.hf_quantizer.source_block, dtype=dtype)
        return {name: self.hf_quantizer.from_packed(name, packed, getattr(module, "is_transposed", False))}


def read_moekit(quantizer: Any, converters: list) -> list:
    """The converters of what ``save_pretrained`` wrote, where the model's own were not undone for weights of experts."""
    return [*_read_packed(quantizer), *converters]


def read_mxfp4(quantizer: Any, converters: list) -> list:
    """The converters of gpt-oss's checkpoint: ``*_blocks`` and ``*_scales``."""
    return [*converters, *_read_packed(quantizer)]


def _read_packed(quantizer: Any) -> list:
    """For each weight of experts: its name in a checkpoint ends as in :meth:`moekit.PackedExperts.state_dict`."""
    ends = sorted({end for format in FORMATS for end in _ends(format)}, key=len, reverse=True)
    sources = {weight: [rf"\.{weight}{re.escape(end)}$" for end in ends] for weight in _WEIGHTS}
    return [WeightConverter(sources[weight], f".{weight}", [ReadPacked(quantizer)]) for weight in _WEIGHTS]


def _ends(format: str) -> list[str]:
    return list(pack(torch.zeros(1, 64, 64, dtype=torch.float32), format, double_quant=format == "nf4").state_dict(""))


# --- block-FP8 ------------------------------------------------------------------------------------------------------

_Pairs = dict[str, list[tuple[Tensor, Tensor | None]]]


class ReadFp8(Operation):
    """Makes a weight of FP8 codes and their scales: packed if it is of experts, else in floating point.

    Codes that are integers are two of 4 bits each (DeepSeek-V4's experts): mxfp4. ``operations`` are those of the model's
    converter for floating-point weights. Where they stack experts, and the halves of the gate, they do to the scales of
    blocks what they do to the codes.
    """

    def __init__(self, hf_quantizer: Any, sources: Sequence[str], operations: Sequence[Any]) -> None:
        super().__init__(hf_quantizer)
        self.sources, self.operations = list(sources), list(operations)

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Codes without scales are refused: their values are not known."""
        pairs = self._pairs(input_dict, full_layer_name)
        dtype = _dtype(model, full_layer_name)
        kwargs |= {"source_patterns": self.sources, "full_layer_name": full_layer_name, "model": model}
        coded = all(scale is not None for tensors in pairs.values() for _, scale in tensors)
        if coded and self.hf_quantizer.is_target(full_layer_name):
            packed = PackedExperts.of(self._stacked(pairs, kwargs), dtype)
            return {full_layer_name: self.hf_quantizer.from_packed(full_layer_name, packed, False)}
        block = self.hf_quantizer.source_block
        dense = {name: [_dense(*pair, block, dtype) for pair in tensors] for name, tensors in pairs.items()}
        return self._run(dense, kwargs)

    def _pairs(self, tensors: dict[str, Any], name: str) -> _Pairs:
        """Codes and scales by the pattern of the codes; no scales beside what is no code."""
        found = {_unescaped(pattern): tensors.pop(pattern) for pattern in list(tensors)}
        pairs: _Pairs = {}
        for source in self.sources:
            if source not in found:
                continue
            codes = found[source]
            scales = next((found[name] for name in _names_of_scales(source) if name in found), [None] * len(codes))
            if len(scales) != len(codes) or (scales[0] is None and codes[0].element_size() == 1):
                scaled = sum(scale is not None for scale in scales)
                raise _check.fail("hf.load", name, "codes with a tensor of scales each", f"{len(codes)} with {scaled}")
            pairs[source] = list(zip(codes, scales, strict=True))
        return pairs

    def _stacked(self, pairs: _Pairs, kwargs: dict[str, Any]) -> Stored:
        if not _stacks(self.operations):
            wanted = "stacked from whole matrices; load it with FineGrainedFP8Config(dequantize=True), then moekit.hf.pack"
            steps = ", ".join(type(step).__name__ for step in self.operations)
            raise _check.fail("hf.load", kwargs["full_layer_name"], wanted, f"FP8 codes that go through {steps}")
        codes = {name: [_uncast(code).view(torch.uint8) for code, _ in tensors] for name, tensors in pairs.items()}
        scales = {name: [_matrix(scale) for _, scale in tensors] for name, tensors in pairs.items()}
        kind = _uncast(next(iter(pairs.values()))[0][0]).dtype
        stacked = [_one(next(iter(self._run(part, kwargs).values()))) for part in (codes, scales)]
        return _stored(stacked[0].view(kind), stacked[1], self.hf_quantizer.source_block)

    def _run(self, tensors: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        for step in self.operations:
            tensors = step.convert(tensors, **kwargs)
        return tensors


def read_fp8(quantizer: Any, converters: list) -> list:
    """The converters of a block-FP8 checkpoint: ``*.weight`` and ``*.weight_scale_inv``, expert by expert."""
    made = [_with_scales(quantizer, converter) for converter in converters]
    names = [".weight", *_names_of_scales(".weight"), ".activation_scale"]
    linear = [re.escape(name) + "$" for name in names]
    return [*read_mxfp4(quantizer, made), WeightConverter(linear, ".weight", [ReadFp8(quantizer, [".weight"], [])])]


def _with_scales(quantizer: Any, converter: Any) -> Any:
    """``converter`` for codes and scales, if it is one of weights."""
    sources = getattr(converter, "_original_source_patterns", [])
    if not isinstance(converter, WeightConverter) or not all(source.endswith(".weight") for source in sources):
        return converter
    read = ReadFp8(quantizer, [_unescaped(source) for source in sources], converter.operations)
    names = [name for source in sources for name in (source, *_names_of_scales(source))]
    return _alike(converter, WeightConverter, [f"{name}$" for name in names], [read])


def _names_of_scales(weight: str) -> tuple[str, str]:
    """Of a name or a pattern that ends in ``.weight``: as most checkpoints have them, and as DeepSeek-V4."""
    return weight + _SCALE, weight.removesuffix("weight") + "scale"


def _stored(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Stored:
    """Codes ``[E, out, in]`` (in bytes of two: mxfp4) and scales ``[E, rows, columns]``.

    Without a block a scale is of a matrix, or of a half of the gate: each row gets its own.
    """
    height, width = codes.shape[1:]
    if codes.dtype is torch.uint8:
        exponents = scales.view(torch.uint8) if scales.dtype is torch.float8_e8m0fnu else scales
        return Stored(codes, [exponents], "mxfp4", FORMATS["mxfp4"].block("hf.load", height, 2 * width, None))
    if block is None:
        scales, block = scales.repeat_interleave(height // max(1, scales.shape[1]), 1), (1, width)
    return Stored(codes, [scales], "fp8", block)


def _dense(codes: Tensor, scales: Tensor | None, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """A matrix, in floating point."""
    if scales is None:
        return codes.to(dtype)
    stored = _stored(_uncast(codes)[None], _matrix(scales)[None], block)
    return PackedExperts.of(stored, dtype).unpack()[0]


def _uncast(codes: Tensor) -> Tensor:
    """Codes as they are: an older loader casts FP8 that has its name in the model already, which changes no value of it."""
    return codes.to(_CODE) if codes.dtype.is_floating_point else codes.view(torch.uint8)


def _matrix(scales: Any) -> Tensor:
    """Scales of a matrix as a matrix, of a dtype that packed weights have; bytes are exponents of two."""
    matrix = scales if scales.dim() == 2 else scales.reshape(-1, 1)
    if matrix.dtype is torch.uint8:
        return matrix.view(torch.float8_e8m0fnu)
    return matrix.float() if matrix.dtype in (torch.float16, torch.float64) else matrix


# --- parts ----------------------------------------------------------------------------------------------------------


def _alike(converter: Any, kind: type, sources: Sequence[str], operations: Sequence[Any]) -> Any:
    """A converter to the targets of another, for the same part of the model."""
    made = kind(list(sources), list(converter._original_target_patterns), list(operations))
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(converter, name):
            setattr(made, name, getattr(converter, name))
    return made


def _place(model: Any, name: str) -> tuple[Any, str]:
    """The module and the attribute that a parameter's name is of."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _dtype(model: Any, name: str) -> torch.dtype:
    """What a parameter is to be: the model's dtype, but for what it keeps in float32."""
    declared = getattr(*_place(model, name)).dtype
    kept = model._get_dtype_plan(declared).items()
    return next((dtype for pattern, dtype in kept if re.search(pattern.replace("*", ".*"), name)), declared)


def _unescaped(pattern: str) -> str:
    """The name that a pattern stands for: those of the loader have nothing but dots, stars and an end in them."""
    return pattern.replace("\\", "").removesuffix("$")


def _one(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


READERS: dict[str, Callable[[Any, list], list]] = {"moekit": read_moekit, "mxfp4": read_mxfp4, "fp8": read_fp8}
