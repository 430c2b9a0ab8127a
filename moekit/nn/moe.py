"""The Mixture-of-Experts layer."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moekit import _check
from moekit.nn.experts import Experts
from moekit.nn.router import Router, exporting
from moekit.nn.shared import SharedExpert
from moekit.ops.aux_loss import aux_loss
from moekit.ops.balance import balance_loss, sequence_balance_loss
from moekit.ops.losses import z_loss
from moekit.routing import Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from moekit.ep.dispatcher import Dispatcher

_OP = "nn.MoE"


class MoE(nn.Module):
    """A router, its experts and what every token goes through, with the losses of the choice attached in training.

    The losses' gradients flow with the output's (:func:`moekit.aux_loss`): there is nothing to add to the main loss. They
    are of the actual choice, whoever made it. ``k`` and all that the router does is the router's.

    Args:
        router: of ``experts.num_experts + null_experts`` experts.
        experts: the routed experts.
        shared: a module that every token goes through, ``[T, H]`` to ``[T, H]``, and that is added; None for none.
        balance_coeff: of :func:`moekit.balance_loss`; 0 leaves it out, as the next two.
        sequence_balance_coeff: of :func:`moekit.sequence_balance_loss`.
        z_coeff: of :func:`moekit.z_loss`.
        null_experts: how many experts, the last of the router's, compute nothing: they give the token back, times its
            weight (LongCat-Flash, arXiv 2509.01322).
        ep_mesh: a ``DeviceMesh`` of one dimension, over whose ranks the experts are sharded (:mod:`moekit.ep`): their
            parameters become DTensors of which each rank keeps its slice, and tokens travel, the shared expert beside the
            exchange. Every rank calls the layer with its own tokens, one without tokens as well. For whole models, and with
            options: :func:`moekit.ep.parallelize`.
        dispatcher: a :class:`moekit.ep.Dispatcher`, or the ``kind`` of :func:`moekit.ep.dispatcher`; goes with ``ep_mesh``.

    Attributes:
        loss_scale: what the gradients of these losses are multiplied by, a number or a tensor of one element that is read
            in backward: a gradient scaler's scale, or one over the number of micro-batches.
        balance_group: processes over which the balance loss counts: that of the global batch (arXiv 2501.11873). None, each
            rank's own batch, under expert parallelism as well.
        dispatcher: what brings tokens to the ranks of their experts; None without expert parallelism.
        losses: the losses of the last training forward by name (``balance``, ``sequence_balance``, ``z``), detached 0-d
            tensors with their coefficients in them.

    Raises:
        ValueError: parts of different sizes, or a coefficient below 0.
        TypeError: parts of another kind.

    Examples:
        >>> import torch, moekit.nn
        >>> layer = moekit.nn.MoE.build(64, 32, num_experts=8, k=2, shared_intermediate=32, balance_coeff=0.01)
        >>> y = layer(torch.randn(2, 10, 64))
        >>> y.shape, list(layer.losses)
        (torch.Size([2, 10, 64]), ['balance'])
        >>> y.square().mean().backward()  # the balance loss comes along
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None = None,
        *,
        balance_coeff: float = 0.0,
        sequence_balance_coeff: float = 0.0,
        z_coeff: float = 0.0,
        null_experts: int = 0,
        ep_mesh: DeviceMesh | None = None,
        dispatcher: str | Dispatcher | None = None,
    ) -> None:
        super().__init__()
        for name, part, kind in (("router", router, Router), ("experts", experts, Experts)):
            if not isinstance(part, kind):
                raise _check.wrong_type(_OP, name, f"a moekit.nn.{kind.__name__}", type(part).__name__)
        if not isinstance(shared, nn.Module | None):
            raise _check.wrong_type(_OP, "shared", "a module or None", type(shared).__name__)
        self.null_experts = _check.positive(_OP, "null_experts", null_experts, at_least=0)
        total = experts.num_experts + self.null_experts
        if router.num_experts != total:
            wanted = f"of {total} experts ({experts.num_experts} in experts, {self.null_experts} null)"
            raise _check.fail(_OP, "router", wanted, router.num_experts)
        if self.null_experts and router.options["overflow"] == "pad":
            raise _check.unused(_OP, "overflow", "pad", "with null experts, whose rows are not computed")
        for name, part in (("router", router), ("shared", shared)):
            if getattr(part, "hidden", experts.hidden) != experts.hidden:
                raise _check.fail(_OP, name, f"of hidden size {experts.hidden}, as experts", getattr(part, "hidden", None))
        self.router, self.experts, self.shared = router, experts, shared
        self.hidden, self.num_experts = experts.hidden, experts.num_experts  # which what wraps the experts need not have
        self.balance_coeff = _coefficient("balance_coeff", balance_coeff)
        self.sequence_balance_coeff = _coefficient("sequence_balance_coeff", sequence_balance_coeff)
        self.z_coeff = _coefficient("z_coeff", z_coeff)
        self.loss_scale: float | Tensor = 1.0
        self.balance_group: ProcessGroup | None = None
        self.losses: dict[str, Tensor] = {}
        self.dispatcher: Dispatcher | None = None
        if ep_mesh is not None:
            _ep("parallelize").shard_layer(_OP, self, ep_mesh, "auto" if dispatcher is None else dispatcher)
        elif dispatcher is not None:
            raise _check.unused(_OP, "dispatcher", dispatcher, "without ep_mesh")

    @classmethod
    def build(
        cls,
        hidden: int,
        intermediate: int,
        num_experts: int,
        k: int,
        *,
        shared_intermediate: int | None = None,
        **options: Any,
    ) -> MoE:
        """A layer from sizes.

        Args:
            hidden: H.
            intermediate: I of one expert.
            num_experts: E, null experts not counted.
            k: experts a token.
            shared_intermediate: I of a shared expert; None for none.
            **options: keyword arguments of :class:`Router`, :class:`Experts` and this class, each by its own name;
                ``dtype`` is of the experts (of the router only if it is float64), ``device`` of all. The shared expert has
                the activation of the experts; ``shared_gate=True`` gives it a gate.

        Raises:
            ValueError: as the parts. TypeError: an option that none of them has.
        """
        ours, routers, of_experts = (_taken(options, kind) for kind in (cls, Router, Experts))
        shared_gate = options.pop("shared_gate", None)
        if routers.get("dtype") is not torch.float64:
            routers.pop("dtype", None)
        unknown = set(options) - set(ours) - set(routers) - set(of_experts)
        if unknown:
            wanted = "those of moekit.nn.Router, Experts and MoE"
            raise _check.wrong_type(f"{_OP}.build", "options", wanted, ", ".join(sorted(unknown)))
        if shared_gate is not None and shared_intermediate is None:
            raise _check.unused(f"{_OP}.build", "shared_gate", shared_gate, "without shared_intermediate")
        router = Router(hidden, num_experts + ours.get("null_experts", 0), k, **routers)
        experts, shared = Experts(num_experts, hidden, intermediate, **of_experts), None
        if shared_intermediate is not None:
            routed = ("save", "weight_after_down", "batch_invariant")
            alike = {name: value for name, value in of_experts.items() if name not in routed}
            shared = SharedExpert(hidden, shared_intermediate, gate=bool(shared_gate), **alike)
        return cls(router, experts, shared, **ours)

    def reset_parameters(self) -> None:
        """Draw the parameters of all parts anew."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        again: Any = getattr(self.shared, "reset_parameters", None)
        if again is not None:
            again()

    def forward(
        self,
        x: Tensor,
        *,
        indices: Tensor | None = None,
        padding_mask: Tensor | None = None,
        sequences: int | Tensor | None = None,
    ) -> Tensor:
        """``[..., H]`` to ``[..., H]``.

        Args:
            x: ``[..., H]``, in the dtype of the experts (of float32, bfloat16 or float16 under autocast).
            indices: ``[..., K]`` integers, the choice to use in place of the router's own.
            padding_mask: ``[...]`` bool, True for padding: such tokens go to no routed expert and count nowhere. The
                shared expert computes them.
            sequences: for the sequence balance loss, as of :func:`moekit.sequence_balance_loss`; by default every
                dimension of ``x`` but the last two counts sequences, and the last but one is their length.

        Returns:
            The layer's output, in the dtype of ``x`` (of autocast, where it is on).

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, or ``sequences`` without a use.
            TypeError: tensors of wrong kinds.
        """
        _check.tensor(_OP, "x", x)
        if sequences is not None and not self.sequence_balance_coeff:
            raise _check.unused(_OP, "sequences", "...", "without sequence_balance_coeff")
        if x.dim() == 0 or x.shape[-1] != self.hidden:
            raise _check.fail(_OP, "x", f"of shape [..., {self.hidden}]", f"shape {list(x.shape)}")
        lead = x.shape[:-1]
        tokens = x.reshape(-1, x.shape[-1])
        if indices is not None:
            _check.tensor(_OP, "indices", indices)
            if indices.shape[:-1] != lead:
                raise _check.fail(_OP, "indices", f"of shape {[*lead, 'K']}", f"shape {list(indices.shape)}")
            indices = indices.reshape(-1, indices.shape[-1])
        if padding_mask is not None:
            _check.shape(_OP, "padding_mask", padding_mask, lead, "that of x without its last dimension")
            padding_mask = padding_mask.reshape(-1)
        routing = self.router(tokens, indices=indices, padding_mask=padding_mask)
        out = self._routed(tokens, routing)
        if self.training:
            default = max(lead[:-1].numel(), 1) if x.dim() > 1 else 1
            out = self._with_losses(out, routing, default if sequences is None else sequences)
        return out.reshape(x.shape)

    def _routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        """What the routed experts, those that compute nothing, and the shared one make of the tokens."""
        null = None
        if self.null_experts:
            weights = routing.weights
            if weights is None:
                raise _check.fail(_OP, "routing", "one with weights", None)
            null = weights.masked_fill(routing.indices < self.num_experts, 0).sum(1, keepdim=True)
            computed = routing.indices.masked_fill(routing.indices >= self.num_experts, -1)
            routing = Routing.from_topk(computed, weights, num_experts=self.num_experts)
        beside = None if self.shared is None else functools.partial(self.shared, tokens)
        if self.dispatcher is not None:
            out = self.experts(tokens, routing, functools.partial(_ep("run").run, self.dispatcher, beside=beside))
            return out if null is None else (out + tokens * null).to(out.dtype)
        out = self.experts(tokens, routing)
        out = out if null is None else (out + tokens * null).to(out.dtype)
        return out if beside is None else out + beside()

    def _with_losses(self, out: Tensor, routing: Routing, sequences: int | Tensor) -> Tensor:
        """The output with the losses attached to it, and these kept to be looked at."""
        losses: dict[str, Tensor] = {}
        if self.balance_coeff:
            losses["balance"] = balance_loss(routing, self.balance_coeff, group=self.balance_group)
        if self.sequence_balance_coeff:
            losses["sequence_balance"] = sequence_balance_loss(routing, self.sequence_balance_coeff, sequences=sequences)
        if self.z_coeff:
            losses["z"] = z_loss(routing, self.z_coeff)
        if not exporting():
            self.losses = {name: loss.detach() for name, loss in losses.items()}
        if losses and torch.is_grad_enabled():
            found = list(losses.values())
            out = aux_loss(out, found[0] if len(found) == 1 else torch.stack(found), self.loss_scale)
        return out

    @classmethod
    def from_transformers(cls, block: nn.Module) -> MoE:
        """The same layer as a Mixture-of-Experts block of Transformers, with copies of its weights.

        The block is known by what its code says (its own, its router's, its experts' and its shared expert's), never by a
        name; hooks, patches and overridden methods make it unknown, and so does a jitter that the experts would see (set
        ``block.jitter_noise`` to 0). Outputs agree to rounding; logits are computed in float32. Of blocks that return a
        tuple, such as gpt-oss's, the layer gives the first entry.

        Args:
            block: such as ``model.model.layers[0].mlp`` of a Qwen3-MoE model.

        Returns:
            A layer in the dtype and on the device of the block's experts, in its mode (training or not), without losses.

        Raises:
            TypeError: a block that is not known, with what is not known about it.
        """
        found = _blocks().read(block)
        layer = cls._like(found)
        layer.load_state_dict(found.tensors())
        return layer.train(block.training)

    def to_transformers(self, block: nn.Module) -> None:
        """Write the weights into a block of Transformers that computes what this layer does.

        Args:
            block: of the class, the sizes and the options that :meth:`from_transformers` would make this layer of.

        Raises:
            TypeError: a block that is not known. ValueError: one that computes something else; nothing is written then.
        """
        if self.dispatcher is not None:
            wanted = "of one process: load its whole state (full_state_dict=True) into such a layer"
            raise _check.fail(f"{_OP}.to_transformers", "the layer", wanted, "one whose experts are sharded")
        found, values = _blocks().read(block), self.state_dict()
        theirs, ours = (layer._what_it_computes() for layer in (self._like(found, device="meta"), self))
        for name in {**theirs, **ours}:
            if theirs.get(name) != ours.get(name):
                wanted = f"one whose {name} is {ours.get(name)}, as this layer's"
                raise _check.fail(f"{_OP}.to_transformers", "block", wanted, theirs.get(name))
        for slot in found.slots:
            slot.write(values[slot.name])

    @classmethod
    def _like(cls, found: Any, **place: Any) -> MoE:
        """A layer that computes what a block of Transformers was found to."""
        router, experts = Router(**{**found.router, **place}), Experts(**{**found.experts, **place})
        shared = None if found.shared is None else SharedExpert(**{**found.shared, **place})
        return cls(router, experts, shared, null_experts=found.null_experts)

    def _what_it_computes(self) -> dict[str, Any]:
        """Everything that the output in evaluation depends on but the weights' numbers and dtypes."""
        parts = {"router": self.router, "experts": self.experts, "shared": self.shared}
        found = {name: getattr(part, "options", type(part).__name__) for name, part in parts.items()}
        shapes = {f"{name}'s shape": list(value.shape) for name, value in self.state_dict().items()}
        return {**found, "k": self.router.k, "null_experts": self.null_experts, **shapes}

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module | tuple[Tensor | None, Tensor, Tensor],
        *,
        num_experts: int,
        k: int,
        granularity: int = 1,
        activation: str | None = None,
        **options: Any,
    ) -> MoE:
        """Upcycle a dense MLP: see :func:`moekit.nn.upcycling.from_dense`, which has the same arguments."""
        upcycling = importlib.import_module("moekit.nn.upcycling")  # which needs this module
        return upcycling.from_dense(
            dense, num_experts=num_experts, k=k, granularity=granularity, activation=activation, **options
        )

    def extra_repr(self) -> str:
        """What is not the default."""
        names = ("balance_coeff", "sequence_balance_coeff", "z_coeff", "null_experts")
        said = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name)]
        said += [] if self.dispatcher is None else [f"dispatcher={type(self.dispatcher).__name__}"]
        return ", ".join(said)

    def __deepcopy__(self, memo: dict[int, Any]) -> MoE:
        """A copy on the same ranks: groups of processes are not copied."""
        memo.update({id(shared): shared for shared in (self.dispatcher, self.balance_group)})
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def _coefficient(name: str, value: object) -> float:
    value = _check.real(_OP, name, value)
    if not value >= 0:
        raise _check.fail(_OP, name, "at least 0", value)
    return value


def _taken(options: dict[str, Any], kind: type) -> dict[str, Any]:
    """Those of ``options`` that the class ``kind`` has by keyword."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: options[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in options}


def _ep(module: str) -> Any:
    """By name, for it imports torch.distributed."""
    return importlib.import_module(f"moekit.ep.{module}")


def _blocks() -> Any:
    """By name, for it imports Transformers."""
    return importlib.import_module("moekit.hf.blocks")
