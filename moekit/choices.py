"""What routers chose, kept to be replayed: a recording of this process, or what an inference engine returned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit import _check

_OP = "Choices"
Pass = tuple[Tensor, ...]  # of one forward of the model: [T, K] for each router
_FORMAT = 1


class Choices:
    """The experts that a model's routers chose, in one or more forward passes.

    Made by :meth:`moekit.Replay.record`, :meth:`from_array` or :meth:`load`. It is a sequence of passes: ``len``, indexing
    and slicing, iteration, and ``+`` go by pass. An index of an expert takes 2 bytes (4 of more than 32,768 experts), so a
    token takes ``2 * K * layers`` bytes: 768 for 48 layers of 8 experts a token.

    Attributes:
        names: the paths of the routers in the model they were recorded from; None where they are not known.

    Args:
        passes: the indices ``[T, K]`` of each router, for each pass, such as ``choices.passes`` of others.
        names: of the routers.

    Raises:
        ValueError: layers of other shapes, or not as many as names.
        TypeError: something else than tensors of integers.
    """

    def __init__(self, passes: Iterable[Pass], names: Sequence[str] | None = None) -> None:
        self._passes = [tuple(one) for one in passes]
        self.names = None if names is None else tuple(names)
        for one in self._passes:
            for layer in one:
                _check.tensor_dim(_OP, "passes", layer, 2)
                _check.shape(_OP, "passes", layer, (len(one[0]), layer.shape[1]), "[tokens, topk] in every layer")
                if layer.dtype.is_floating_point or layer.dtype is torch.bool:
                    raise _check.wrong_type(_OP, "passes", "of integers", layer.dtype)
            if not one or (self.names is not None and len(one) != len(self.names)):
                raise _check.fail(_OP, "passes", f"of {len(self.names or ()) or 'some'} layers", f"{len(one)}")

    # --- from and to others -------------------------------------------------------------------------------------

    @classmethod
    def from_array(
        cls, array: Any, *, layers: Sequence[int] | Mapping[str, int] | None = None, tokens: Sequence[int] | None = None
    ) -> Choices:
        """What an inference engine recorded: vLLM's and SGLang's ``routed_experts`` (router replay, arXiv 2510.11370).

        Args:
            array: ``[tokens, layers, K]`` integers of any width, of numpy or PyTorch. Copied; on a GPU, where nobody looks
                whether narrower ones would do, in its own width. -1 is no expert: give such
                rows to tokens that have no recording. Engines return none for a sequence's last token, which they sampled
                and never ran; padding has none either.
            layers: which column of ``array`` belongs to each of the model's routers, in order, or to each by its name; by
                default the columns are the routers, in order. An engine may have a column for each layer of the model,
                dense ones included: ``layers=range(3, 61)`` leaves out the first three.
            tokens: how many tokens each forward pass has, if there are several; they have to add up.

        Raises:
            ValueError: another shape, a column that is not there, tokens that do not add up, or (on a CPU) an index below
                -1.
            TypeError: an array of something else than integers.
        """
        op = f"{_OP}.from_array"
        value = array.detach() if isinstance(array, Tensor) else torch.tensor(array)
        _check.tensor_dim(op, "array", value, 3)
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype is torch.bool:
            raise _check.wrong_type(op, "array", "of integers", value.dtype)
        value = _compact(value)
        names, columns = None, list(range(value.shape[1]))
        if layers is not None:
            names, columns = (tuple(layers), list(layers.values())) if isinstance(layers, Mapping) else (None, list(layers))
        for column in columns:
            if not 0 <= _check.positive(op, "layers", column, at_least=0) < value.shape[1]:
                raise _check.fail(op, "layers", f"columns of the {value.shape[1]} in array", column)
        whole = cls([tuple(value[:, column].contiguous() for column in columns)], names)
        return whole if tokens is None else whole.split(tokens)

    def to_array(self) -> Any:
        """``[tokens, layers, K]`` as a numpy array of int16 or int32, the passes one after the other; waits for a GPU.

        Raises:
            ValueError: the routers do not all choose as many experts.
        """
        widths = {layer.shape[1] for one in self._passes for layer in one}
        if len(widths) != 1:
            raise _check.fail(f"{_OP}.to_array", "the choices", "of as many experts a token in every layer", sorted(widths))
        return torch.cat([torch.stack([layer.cpu() for layer in one], 1) for one in self._passes]).numpy()

    def save(self, path: str | Path) -> None:
        """Write the choices to a file, which :meth:`load` reads."""
        passes = [[layer.cpu() for layer in one] for one in self._passes]
        torch.save({"moekit.Choices": _FORMAT, "passes": passes, "names": self.names and list(self.names)}, path)

    @classmethod
    def load(cls, path: str | Path) -> Choices:
        """Read what :meth:`save` wrote, onto the CPU. No code in the file is run.

        Raises:
            ValueError: a file of something else.
        """
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or found.get("moekit.Choices") != _FORMAT:
            raise _check.fail(f"{_OP}.load", "path", "a file that Choices.save has written", path)
        return cls(found["passes"], found["names"])

    # --- as a sequence of passes --------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._passes)

    def __getitem__(self, at: int | slice) -> Choices:
        return Choices(self._passes[at] if isinstance(at, slice) else [self._passes[at]], self.names)

    def __iter__(self) -> Iterator[Choices]:
        return (Choices([one], self.names) for one in self._passes)

    def __add__(self, other: Choices) -> Choices:
        if not isinstance(other, Choices):
            return NotImplemented
        if self.names != other.names:
            raise _check.fail(_OP, "both", "of the same routers", f"{self.names} and {other.names}")
        return Choices(self._passes + other._passes, self.names)

    def split(self, tokens: Sequence[int]) -> Choices:
        """The same tokens in other passes, such as micro-batches of what was recorded as one batch.

        Args:
            tokens: how many tokens each pass has.

        Raises:
            ValueError: they do not add up to the tokens there are.
        """
        sizes = [_check.positive(f"{_OP}.split", "tokens", number, at_least=0) for number in tokens]
        there = sum(self.num_tokens)
        if sum(sizes) != there:
            raise _check.fail(f"{_OP}.split", "tokens", f"adding up to {there}", f"{sizes}, {sum(sizes)} in all")
        layers = [torch.cat(parts).split(sizes) for parts in zip(*self._passes, strict=True)]
        return Choices([tuple(one) for one in zip(*layers, strict=True)], self.names)

    def to(self, device: torch.device | str) -> Choices:
        """The choices on another device, where replaying them moves nothing."""
        return Choices([tuple(layer.to(device) for layer in one) for one in self._passes], self.names)

    @property
    def passes(self) -> list[Pass]:
        """The indices ``[T, K]`` of each pass and router, as they are stored."""
        return self._passes

    @property
    def num_tokens(self) -> list[int]:
        """T of each pass."""
        return [one[0].shape[0] for one in self._passes]

    @property
    def num_layers(self) -> int:
        """The number of routers."""
        return len(self._passes[0]) if self._passes else len(self.names or ())

    @property
    def nbytes(self) -> int:
        """The memory that the choices take."""
        return sum(layer.nbytes for one in self._passes for layer in one)

    def __repr__(self) -> str:
        return f"Choices({len(self)} passes, {sum(self.num_tokens)} tokens, {self.num_layers} layers, {self.nbytes:,} bytes)"


def stored(indices: Tensor, num_experts: int) -> Tensor:
    """A copy of ``indices`` as they are kept."""
    dtype = torch.int16 if num_experts <= torch.iinfo(torch.int16).max + 1 else torch.int32
    return indices.detach().to(dtype, copy=True)


def _compact(value: Tensor) -> Tensor:
    """A copy in int16 where all fit, which is looked at on a CPU; else in a type that others can compute with."""
    narrow = value.dtype in (torch.int16, torch.int8, torch.uint8)
    wide = value.to(torch.int16 if narrow else torch.int32 if value.dtype is torch.uint16 else torch.int64, copy=True)
    if not wide.is_cpu or not wide.numel():
        return wide
    _check.in_range(f"{_OP}.from_array", "array", wide, torch.iinfo(torch.int32).max, "numbers of experts")
    return stored(wide, int(wide.max()) + 1)
