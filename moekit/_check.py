"""Every validation and error text of moekit.

Each message names the operation, the argument, what was wanted and what came. Checks look at shapes, dtypes and
devices only, so they never wait for a GPU; the checks of values at the end do nothing on one, but under ``moekit.debug()``.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from moekit import _backend

T = TypeVar("T")
_ROWS_LOOKED_AT = 64  # of a map
_TOKENS_OF_A_MAP = 8
_ROUNDING = -1e-3  # a probability that came out below 0 is not far below it
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
# Subclasses that stand for a plain tensor while it is traced, or until a collective has delivered it.
_TRANSPARENT = (
    "torch._subclasses.fake_tensor",
    "torch._subclasses.functional_tensor",
    "torch.distributed._functional_collectives",
)


def fail(op: str, argument: str, wanted: str, got: object) -> ValueError:
    """The ``ValueError`` to raise when ``argument`` of ``op`` has a wrong value."""
    return ValueError(f"moekit.{op}: {argument} must be {wanted}, got {got}")


def wrong_type(op: str, argument: str, wanted: str, got: object) -> TypeError:
    """The ``TypeError`` to raise when ``argument`` of ``op`` has a wrong type or dtype."""
    return TypeError(f"moekit.{op}: {argument} must be {wanted}, got {got}")


def tensor(op: str, name: str, value: object) -> None:
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise wrong_type(op, name, "a tensor", type(value).__name__)


def tensor_dim(op: str, name: str, value: Tensor, ndim: int) -> None:
    """``value`` is a tensor of ``ndim`` dimensions."""
    tensor(op, name, value)
    if value.dim() != ndim:
        raise fail(op, name, f"a {ndim}-D tensor", f"shape {list(value.shape)}")


def shape(op: str, name: str, value: Tensor, wanted: Sequence[int], legend: str) -> None:
    """``value`` is a tensor of exactly the shape ``wanted``, described by ``legend``."""
    tensor(op, name, value)
    if tuple(value.shape) != tuple(wanted):
        raise fail(op, name, f"of shape {legend} = {list(wanted)}", f"shape {list(value.shape)}")


def floating(op: str, name: str, value: Tensor) -> None:
    """``value`` is a tensor of floating-point numbers."""
    tensor(op, name, value)
    if not value.dtype.is_floating_point:
        raise wrong_type(op, name, "a floating-point tensor", value.dtype)


def transparent(value: Tensor) -> bool:
    """Whether a tensor is what it seems: not a subclass that computes by a dispatch of its own, but tracing's."""
    kind: Any = type(value)
    plain: Any = Tensor
    return kind.__torch_dispatch__ is plain.__torch_dispatch__ or kind.__module__ in _TRANSPARENT


def sharded(value: object) -> bool:
    """Whether a tensor is a DTensor, by what it has: its class is in torch.distributed, which is not loaded for this."""
    return isinstance(value, Tensor) and type(value) not in _PLAIN and hasattr(value, "device_mesh")


def computable(op: str, name: str, value: Tensor) -> None:
    """``value`` is a plain tensor of a dtype that products are computed in."""
    if type(value) not in _PLAIN:
        tensor(op, name, value)
        if not transparent(value):
            part = "moekit.ep.part(weight) is what this rank has, weight.full_tensor() the whole"
            hint = part if sharded(value) else "unwrap or dequantise it first"
            got = f"a {type(value).__name__} of dtype {value.dtype}; {hint}"
            raise wrong_type(op, name, f"a plain tensor of {names_of(FLOATS)}", got)
    if value.dtype not in FLOATS:
        raise wrong_type(op, name, f"a floating-point tensor ({names_of(FLOATS)})", value.dtype)


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """Dtypes in words."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def integer(op: str, name: str, value: Tensor, mistaken_for: Callable[[Tensor], str] | None = None) -> None:
    """``value`` is an int32 or int64 tensor; ``mistaken_for(value)`` is a hint for the error."""
    tensor(op, name, value)
    if value.dtype not in (torch.int32, torch.int64):
        hint = "" if mistaken_for is None else mistaken_for(value)
        raise wrong_type(op, name, "an int32 or int64 tensor", f"{value.dtype}{hint}")


def real(op: str, name: str, value: object) -> float:
    """``value`` is a number, Python's or numpy's; returned as a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(op, name, "a number", type(value).__name__)
    return float(value)


def factor(op: str, name: str, value: Any) -> Any:
    """``value`` is a number or a tensor of one element, which is returned as it is."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise fail(op, name, "a number or a tensor of one element", f"shape {list(value.shape)}")
        return value
    return value if isinstance(value, torch.SymFloat | torch.SymInt) else real(op, name, value)


def positive(op: str, name: str, value: Any, *, at_least: int = 1) -> int:
    """``value`` is an integer not below ``at_least``: Python's, numpy's, a tensor of one or a symbolic one.

    Returned as Python's, as the operators want them; a symbolic one as it is.
    """
    known_integer = type(value) is int or isinstance(value, torch.SymInt)
    number: Any = value if known_integer else _as_int(op, name, value)
    if number < at_least:
        raise fail(op, name, f"at least {at_least}", number)
    return number


def _as_int(op: str, name: str, value: Any) -> int:
    """What ``operator.index`` makes of ``value``, bools left out."""
    if not isinstance(value, bool) and getattr(value, "dtype", None) is not torch.bool:
        try:
            return operator.index(value)
        except (TypeError, RuntimeError):  # not an integer; or more of them than one
            pass
    raise wrong_type(op, name, "an integer", type(value).__name__)


def one_of(op: str, name: str, value: object, choices: Collection[str]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise fail(op, name, "one of " + ", ".join(repr(choice) for choice in choices), repr(value))


def known(owner: str, what: str, name: str, table: Mapping[str, T]) -> T:
    """The row of ``owner``'s table that ``name`` names. Each backend looks in its own: none takes one for another."""
    if name not in table:
        raise ValueError(f"moekit: {owner} have no {what} {name!r}, only {', '.join(map(repr, table))}")
    return table[name]


def topk(op: str, k: Any, num_experts: int) -> int:
    """``k`` experts can be chosen among ``num_experts``; returned as :func:`positive` does."""
    k = positive(op, "k", k)
    if k > num_experts:
        raise fail(op, "k", f"at most the number of experts ({num_experts})", k)
    return k


def unused(op: str, name: str, value: object, because: str) -> ValueError:
    """The ``ValueError`` to raise when ``name`` is given where it would be ignored."""
    return ValueError(f"moekit.{op}: {name}={value!r} has no effect {because}; leave it out")


def same_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors that are given live on one device."""
    first = None
    for name, value in tensors.items():
        if value is None:
            continue
        if first is None:
            first = (name, value.device)
        elif value.device != first[1]:
            raise fail(op, name, f"on the device of {first[0]} ({first[1]})", value.device)


# --- values: looked at on a CPU, where that is free, or under ``moekit.debug()`` ------------------------------------


def in_range(op: str, name: str, index: Tensor, end: int, what: str) -> None:
    """Refuse an index below -1 or past ``end``, where looking at values is free or asked for."""
    if not _backend.checks_values(index) or index.numel() == 0:
        return
    low, high = (int(v) for v in index.aminmax())
    if low < -1 or high >= end:
        raise fail(op, name, f"-1 (none) or below {end} ({what})", f"index {low if low < -1 else high}")


def routing_map(op: str, name: str, value: Tensor) -> None:
    """``value`` is a map ``[tokens, experts]`` of any dtype, and not a router's indices.

    Any integer but 0 may mark a routed pair, so indices are known by two things together that no map has: three
    different positive numbers or more, and none of them twice in a row.
    """
    tensor_dim(op, name, value, 2)
    if value.dtype not in (torch.int32, torch.int64) or not _backend.checks_values(value) or len(value) < 4:
        return
    seen: set[int] = set()
    for token in range(min(len(value), _ROWS_LOOKED_AT)):
        entries = [entry for entry in value[token].tolist() if entry != -1]
        if len(set(entries)) < len(entries) or any(entry < 0 for entry in entries):
            return
        seen.update(entries)
    if len(seen - {0}) >= 3:
        wanted = "a map [tokens, experts] in which what is not zero is routed"
        hint = "indices of experts, it seems: use Routing.from_topk (if it is a map, pass `routing_map != 0`)"
        raise fail(op, name, wanted, f"{value.dtype} of shape {list(value.shape)}, {hint}")


def not_a_map(op: str, name: str, indices: Tensor, num_experts: int) -> None:
    """Refuse as many indices a token as there are experts which name only the first two, as a map of 0 and 1 does."""
    if num_experts < 3 or indices.shape[1] != num_experts or not _backend.checks_values(indices):
        return
    if len(indices) < _TOKENS_OF_A_MAP:  # so few may choose so by chance
        return
    low, high = indices.aminmax()
    if int(low) == 0 and int(high) == 1:
        got = f"only 0 and 1 in shape {list(indices.shape)} (a map? use Routing.from_map)"
        raise fail(op, name, "the numbers of experts", got)


def probabilities(op: str, name: str, values: Tensor) -> None:
    """Refuse numbers well below 0, as logits have them."""
    if values.numel() and _backend.checks_values(values):
        lowest = float(values.detach().amin())
        if lowest < _ROUNDING:
            raise fail(op, name, "probabilities (logits? take their softmax first)", f"a value of {lowest:g}")


def route_indices(indices: Tensor, num_experts: int) -> None:
    """Refuse indices out of range. Kernels that meet one leave the call to the reference, which starts with this."""
    in_range("Routing.from_topk", "indices", indices, num_experts, "num_experts")


def slots_of_token(op: str, indices: Tensor, num_experts: int) -> None:
    """Refuse a token with more experts than there are: of more slots than experts, some have to be of none."""
    if indices.shape[1] <= num_experts or not indices.numel() or not _backend.checks_values(indices):
        return
    slots = int((indices >= 0).sum(1).max())
    if slots > num_experts:
        raise fail(op, "indices", f"at most num_experts ({num_experts}) a token", slots)


def row_tokens(row_token: Tensor, num_tokens: int) -> None:
    """Refuse tokens out of range."""
    tensor_dim("unpermute", "sorted_indices", row_token, 1)
    integer("unpermute", "sorted_indices", row_token)
    in_range("unpermute", "sorted_indices", row_token, num_tokens, "the number of tokens")


def offsets(op: str, value: Tensor, num_rows: int, num_experts: int | None = None) -> None:
    """``value`` holds the row ends of experts: int32 or int64, one an expert, ascending within the rows."""
    tensor_dim(op, "offsets", value, 1)
    integer(op, "offsets", value)
    if num_experts is not None and len(value) != num_experts:
        raise fail(op, "offsets", f"of shape [experts] = [{num_experts}]", f"shape {list(value.shape)}")
    if _backend.checks_values(value):
        ends(op, value.tolist(), num_rows)


def ends(op: str, values: Sequence[int], num_rows: int) -> None:
    """Row ends that were read already: see :func:`offsets`."""
    before = 0
    for end in values:
        if end < before or end > num_rows:
            wanted = f"ascending row ends from 0 to {num_rows}, the number of rows (counts? take their cumulative sum)"
            raise fail(op, "offsets", wanted, list(values))
        before = end


def row_tables(op: str, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor, num_tokens: int) -> None:
    """The tables say twice, and the same, which row is which token's: by row, and by token."""
    if num_tokens < 0:
        raise fail(op, "token_offsets", "of shape [tokens + 1]", f"shape {list(token_offsets.shape)}")
    for name, value in (("row_token", row_token), ("token_offsets", token_offsets), ("token_rows", token_rows)):
        tensor_dim(op, name, value, 1)
        integer(op, name, value)
    if len(token_offsets) != num_tokens + 1:
        raise fail(op, "token_offsets", f"of shape [tokens + 1] = [{num_tokens + 1}]", f"shape {list(token_offsets.shape)}")
    if not _backend.checks_values(row_token):
        return
    in_range(op, "row_token", row_token, num_tokens, "the number of tokens")
    in_range(op, "token_rows", token_rows, len(row_token), "the number of rows")
    lengths = token_offsets.long().diff()  # int32 could wrap to a length again
    if int(token_offsets[0]) < 0 or int(token_offsets[-1]) > len(token_rows) or (lengths < 0).any():
        wanted = f"ascending from 0 to {len(token_rows)}, the length of token_rows"
        raise fail(op, "token_offsets", wanted, token_offsets.tolist())
    named = token_rows[int(token_offsets[0]) : int(token_offsets[-1])].long()
    owner = torch.arange(num_tokens, device=row_token.device).repeat_interleave(lengths)[named >= 0]
    named = named[named >= 0]
    claimed = torch.full_like(row_token, -1).scatter(0, named, owner.to(row_token.dtype))
    if len(named) != int((row_token >= 0).sum()) or not claimed.equal(row_token):
        raise fail(op, "token_rows", "the rows of each token as row_token has them, each once", token_rows.tolist())


def rows_end(op: str, order: Tensor, offsets_: Tensor) -> None:
    """Rows at or past the last offset are of no slot: nobody computes them."""
    tensor_dim(op, "offsets", offsets_, 1)
    if not _backend.checks_values(order):
        return
    end = int(offsets_[-1]) if len(offsets_) else 0
    if end < len(order) and (order[end:] >= 0).any():
        raise fail(op, "order", f"-1 (none) from row {end} on, where offsets end", order.tolist())


def routing_tables(op: str, order: Tensor, inverse: Tensor, offsets_: Tensor) -> None:
    """Rows and slots of a routing name each other, and only rows of experts do: see :func:`offsets`, too."""
    tensor_dim(op, "order", order, 1)
    integer(op, "order", order)
    integer(op, "inverse", inverse)
    offsets(op, offsets_, len(order))
    if not _backend.checks_values(order):
        return
    in_range(op, "order", order, inverse.numel(), "the number of slots")
    in_range(op, "inverse", inverse, len(order), "the number of rows")
    rows_end(op, order, offsets_)
    slots = inverse.reshape(-1)
    for name, found, other, back in (("order", order, "inverse", slots), ("inverse", slots, "order", order)):
        places = (found >= 0).nonzero().flatten()
        strange = places[back[found[places]] != places].tolist()
        if strange:
            raise fail(op, name, f"the inverse of {other}, -1 for none", f"{int(found[strange[0]])} at {strange[0]}")


def chunks(split_sizes: Tensor, sorted_idxs: Tensor, num_in: int, num_out: int | None) -> None:
    """Refuse sizes that do not add up and chunks that do not exist."""
    for name, value in (("split_sizes", split_sizes), ("sorted_idxs", sorted_idxs)):
        tensor_dim("sort_chunks", name, value, 1)
        integer("sort_chunks", name, value)
    if not _backend.checks_values(split_sizes):
        return
    chunks = split_sizes.shape[0]
    if chunks and not 0 <= int(split_sizes.min()) <= int(split_sizes.max()) <= num_in:  # before a sum can overflow
        raise fail("sort_chunks", "split_sizes", f"sizes that sum to the {num_in} rows", split_sizes.tolist())
    if sorted_idxs.numel() and not 0 <= int(sorted_idxs.min()) <= int(sorted_idxs.max()) < chunks:
        raise fail("sort_chunks", "sorted_idxs", f"chunk numbers in [0, {chunks})", sorted_idxs.tolist())
    if int(split_sizes.sum()) != num_in:
        raise fail("sort_chunks", "split_sizes", f"sizes that sum to the {num_in} rows", split_sizes.tolist())
    if num_out is not None and int(split_sizes[sorted_idxs.long()].sum()) != num_out:
        raise fail("sort_chunks", "sorted_idxs", "a permutation of the chunks", sorted_idxs.tolist())
