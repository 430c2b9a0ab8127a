"""A router with its weights, its bias and its memory of what it chose."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moekit import _check
from moekit.megatron import router_gating_linear
from moekit.ops.counts import accumulate
from moekit.ops.losses import updated_expert_bias
from moekit.ops.route import route
from moekit.routing import Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OP = "nn.Router"
_DTYPES = (torch.float32, torch.float64)
_OF_THE_CHOICE = ("num_groups", "group_topk", "group_best")


class Router(nn.Module):
    """Choose K experts for each token by a linear map of it: :func:`moekit.route` with its parameters.

    Logits are computed in float32 (float64 for float64) whatever the tokens are in, and under autocast as well; for
    backward the tokens are kept as they came. The parameters, and ``expert_bias``, stay in float32 when the module around
    them is cast to a narrower dtype (``to(torch.bfloat16)``, ``half()``), for a choice is a comparison of numbers that lie
    close together. They do move between devices, and ``double()`` widens them.

    Args:
        hidden: H.
        num_experts: E.
        k: experts a token.
        score: this and what follows down to ``overflow`` as in :func:`moekit.route`. With ``k=1`` weights that are
            normalised are 1 and teach the router nothing: pass ``normalise=False`` (Switch Transformer).
        select_by: as there.
        multiplier: as there.
        softcap: as there.
        num_groups: as there.
        group_topk: as there.
        group_best: as there.
        normalise: as there.
        epsilon: as there.
        scale: as there.
        capacity: as there.
        capacity_by: as there.
        overflow: as there.
        logit_bias: have a parameter ``bias [E]`` that is added to the logits (gpt-oss).
        expert_bias: have a buffer ``expert_bias [E]`` that takes part in the choice alone, and count what is chosen in
            training, for :meth:`update_bias` (loss-free balancing, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437).
        expert_scale: have a parameter ``expert_scale [E]`` that multiplies the weights.
        jitter: in training, multiply what the router sees by numbers drawn from ``[1 - jitter, 1 + jitter]`` (Switch
            Transformer, arXiv 2101.03961).
        dtype: float32 (unless said) or float64.
        device: of the parameters.

    Attributes:
        indices: ``[T, K]``, the choice of the last forward, detached: what it chose, was given, and left out (-1).
        tokens_per_expert: ``[E]`` int64, how many tokens each expert had in the last forward. Both stay on the device and
            are dropped by ``copy.deepcopy`` and ``pickle``.
        given: ``[T, K]`` to use as the choice of every forward in place of the router's own, with the weights of today's
            logits; None for its own. The argument ``indices`` wins over it.
        expert_counts: ``[E]`` int64, what was chosen in training since the last :meth:`update_bias`; None without
            ``expert_bias``. Each process has its own, and loading a state dict starts it anew.

    Counting needs no care under gradient accumulation, activation checkpointing or evaluation: every training forward counts
    once, one that a backward computes again does not. Since ``indices`` are an attribute, checkpointing *inside* code that
    ``torch.compile`` compiles needs ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``.

    Raises:
        ValueError: sizes or options that do not fit together, or an option that would have no effect.

    Examples:
        >>> import torch, moekit.nn
        >>> router = moekit.nn.Router(64, 8, 2, score="sigmoid", expert_bias=True)
        >>> routing = router(torch.randn(10, 64))
        >>> routing.indices.shape, int(router.expert_counts.sum())
        (torch.Size([10, 2]), 20)
        >>> router.update_bias(rate=1e-3)  # after the optimiser's step
    """

    weight: Tensor
    bias: Tensor | None
    expert_scale: Tensor | None
    expert_bias: Tensor | None

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        k: int,
        *,
        score: str = "softmax",
        select_by: str = "scores",
        multiplier: float | None = None,
        softcap: float | None = None,
        num_groups: int | None = None,
        group_topk: int | None = None,
        group_best: int | None = None,
        normalise: bool | None = None,
        epsilon: float | None = None,
        scale: float | None = None,
        capacity: int | None = None,
        capacity_by: str | None = None,
        overflow: str | None = None,
        logit_bias: bool = False,
        expert_bias: bool = False,
        expert_scale: bool = False,
        jitter: float | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.hidden = _check.positive(_OP, "hidden", hidden)
        self.num_experts = _check.positive(_OP, "num_experts", num_experts)
        self.k = _check.topk(_OP, k, self.num_experts)
        self.options: dict[str, Any] = {
            "score": score,
            "select_by": select_by,
            "multiplier": multiplier,
            "softcap": softcap,
            "num_groups": num_groups,
            "group_topk": group_topk,
            "group_best": group_best,
            "normalise": normalise,
            "epsilon": epsilon,
            "scale": scale,
            "capacity": capacity,
            "capacity_by": capacity_by,
            "overflow": overflow,
        }
        # Options that do not fit are an error here and now, in the words of the function that looks at them.
        route(torch.zeros(0, self.num_experts, dtype=torch.float32, device="cpu"), self.k, **self.options)
        self.jitter = None if jitter is None else _share(jitter)
        self.given: Tensor | None = None
        self.indices: Tensor | None = None
        self.tokens_per_expert: Tensor | None = None
        place = {"dtype": _own_dtype(dtype), "device": device}
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden, **place))
        for name, wanted in (("bias", logit_bias), ("expert_scale", expert_scale)):
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, **place)) if wanted else None)
        self.register_buffer("expert_bias", torch.empty(self.num_experts, **place) if expert_bias else None)
        # No buffer: DistributedDataParallel would overwrite it with the first process's at every forward.
        self.expert_counts = torch.empty(self.num_experts, dtype=torch.int64, device=device) if expert_bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as ``nn.Linear`` does; biases and counts 0, ``expert_scale`` 1."""
        bound = self.hidden**-0.5
        self.weight.uniform_(-bound, bound)
        for value, start in ((self.bias, 0), (self.expert_scale, 1), (self.expert_bias, 0), (self.expert_counts, 0)):
            if value is not None:
                value.fill_(start)

    def forward(self, x: Tensor, *, indices: Tensor | None = None, padding_mask: Tensor | None = None) -> Routing:
        """Route the tokens.

        Args:
            x: ``[T, H]``, floating point.
            indices: ``[T, K]`` integers, the choice to use in place of the router's own (and of ``given``); -1 is none.
            padding_mask: ``[T]`` bool, True for padding.

        Returns:
            A :class:`moekit.Routing`, its weights in float32, which knows what it was chosen from.

        Raises:
            ValueError: shapes or devices that do not fit. TypeError: tokens that are not floating point.
        """
        logits = self._logits(x)
        chosen = self.given if indices is None else indices
        how = self.options
        if chosen is None:
            how = {**how, "bias": self.expert_bias}
        else:
            by_logits = how["select_by"] if how["score"] == "softmax" else "scores"
            how = {**how, **dict.fromkeys(_OF_THE_CHOICE), "select_by": by_logits}
        routing = route(
            logits,
            self.k if chosen is None else None,
            indices=chosen,
            expert_scale=self.expert_scale,
            padding_mask=padding_mask,
            **how,
        )
        if not exporting():  # a program that is exported has no place for them
            self.indices, self.tokens_per_expert = routing.indices.detach(), routing.tokens_per_expert.detach()
        if self.training and self.expert_counts is not None:
            accumulate(self.expert_counts, routing.tokens_per_expert)
        return routing

    def _logits(self, x: Tensor) -> Tensor:
        """``[T, E]`` in float32 or wider."""
        _check.tensor_dim(_OP, "x", x, 2)
        _check.floating(_OP, "x", x)
        if x.shape[1] != self.hidden:
            raise _check.fail(_OP, "x", f"of shape [tokens, {self.hidden}]", f"shape {list(x.shape)}")
        wide = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        if self.jitter is not None and self.training:
            x = x.to(wide)
            x = x * (1 - self.jitter + 2 * self.jitter * torch.rand_like(x))
        kind = x.device.type
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):  # which has no meta device
            if x.dtype is self.weight.dtype is wide:
                return nn.functional.linear(x, self.weight, self.bias)
            return router_gating_linear(x, self.weight, self.bias, wide)

    @torch.no_grad()
    def update_bias(self, rate: float = 1e-3, group: ProcessGroup | None = None) -> None:
        """Raise the bias of experts that had less than the mean since the last call, lower that of the others.

        Call it once after the optimiser's step: one step of :func:`moekit.ops.losses.updated_expert_bias`, which clears the
        counts. No value is read from a device.

        Args:
            rate: size of the step.
            group: sum the counts over these processes first, so that all of them take the same step.

        Raises:
            ValueError: the router was made without ``expert_bias``.
        """
        if self.expert_bias is None or self.expert_counts is None:
            raise _check.fail(f"{_OP}.update_bias", "the router", "made with expert_bias=True", "one without")
        rate = _check.real(f"{_OP}.update_bias", "rate", rate)
        self.expert_bias.copy_(updated_expert_bias(self.expert_counts, self.expert_bias, rate, group))
        self.expert_counts.zero_()

    def extra_repr(self) -> str:
        """Sizes, and the options that are not the default."""
        said = [
            f"hidden={self.hidden}",
            f"num_experts={self.num_experts}",
            f"k={self.k}",
            f"score={self.options['score']!r}",
        ]
        said += [] if self.options["select_by"] == "scores" else [f"select_by={self.options['select_by']!r}"]
        rest = {**self.options, "jitter": self.jitter}
        said += [f"{name}={value!r}" for name, value in list(rest.items())[2:] if value is not None]
        flags = {"logit_bias": self.bias, "expert_bias": self.expert_bias, "expert_scale": self.expert_scale}
        return ", ".join(said + [f"{name}=True" for name, value in flags.items() if value is not None])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Whatever is done to the tensors of a module, but for a cast below float32, or of counts."""

        def kept(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            if not tensor.dtype.is_floating_point:
                return tensor.to(found.device) if found.dtype is not tensor.dtype else found
            return tensor.to(found.device, torch.float32) if found.dtype.itemsize < 4 else found

        if self.expert_counts is not None:
            self.expert_counts = kept(self.expert_counts)
        return super()._apply(kept, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        if self.expert_bias is not None and self.expert_counts is not None:  # what was counted was another state's
            if self.expert_counts.device != self.expert_bias.device:  # assigned to a module that was on "meta"
                self.expert_counts = torch.empty_like(self.expert_counts, device=self.expert_bias.device)
            self.expert_counts.zero_()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "indices": None, "tokens_per_expert": None}


def exporting() -> bool:
    """Whether ``torch.export`` is at work.

    Its flag is read, for ``torch.compiler.is_exporting()`` is True in all code that torch 2.10 compiles.
    """
    return torch.compiler._is_exporting_flag


def _share(jitter: object) -> float:
    value = _check.real(_OP, "jitter", jitter)
    if not 0 < value < 1:
        raise _check.fail(_OP, "jitter", "above 0 and below 1, or None", value)
    return value


def _own_dtype(dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None and dtype not in _DTYPES:
        raise _check.fail(_OP, "dtype", f"{_check.names_of(_DTYPES)} (logits are never narrower)", dtype)
    return dtype or torch.float32
