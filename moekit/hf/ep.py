"""The experts' side of Transformers' expert parallelism, on moekit's dispatchers.

::

    moekit.hf.register()
    model = AutoModelForCausalLM.from_pretrained(
        name, distributed_config=DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="moekit")
    )

Transformers shards the experts, reads each rank's from the checkpoint and reduces their gradients; what is here brings the
tokens to them. A token goes once to each rank that has any of its experts, in place of once for each expert, its routing
weights are applied there, and one row comes back::

    GPU            0          1            2          3          tp_size=2, fsdp_size=2, ep_size=4
    batch        [====== B0 ======]      [====== B1 ======]
    slice        B0[:n/2]   B0[n/2:]     B1[:n/2]   B1[n/2:]     the ranks that share a batch take a slice each
    exchange     [================= all four =================]
    experts      E0 E1      E2 E3        E4 E5      E6 E7        whatever experts_implementation is chosen
    exchange     [================= all four =================]
    whole        [====== B0 ======]      [====== B1 ======]
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel, EPImplementation

from moekit.ep import Dispatcher, dispatcher, run
from moekit.ep.slices import mine, whole
from moekit.ops._segments import expert_of_row
from moekit.ops.rows import permute, unpermute
from moekit.routing import Routing

NAME = "moekit"


class ExpertParallel(EPImplementation):
    """How the experts of one module get their tokens.

    Args:
        experts: a module of a class that is decorated with ``use_experts_implementation``, with this rank's experts.
        ep_mesh: the ranks that share the experts.
        tp_mesh: those of them that have the same tokens.
        **options: of :func:`moekit.ep.dispatcher`.
    """

    style = EpDispatchExpertsParallel()

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any, **options: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.module, self.num_experts, self.options = experts, experts.num_experts * ep_mesh.size(), options
        self.dispatchers: dict[int, Dispatcher] = {}  # by K
        if isinstance(topk := getattr(getattr(experts, "config", None), "num_experts_per_tok", None), int):
            self._by(topk)  # what is wrong with options shows when the model is loaded

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """This rank's tokens through the experts of all.

        Args:
            hidden_states: ``[T, H]``; T may be another on ranks with another batch, and 0.
            top_k_index: ``[T, K]`` integers, of all experts.
            top_k_weights: ``[T, K]``.

        Returns:
            ``[T, H]``, weighted and summed.
        """
        shared = self.tp_mesh.get_group() if self.tp_mesh.size() > 1 else None
        tokens, index, weights = hidden_states, top_k_index, top_k_weights
        if shared is not None:
            tokens, index, weights = mine(tokens, shared), mine(index, shared, "slots"), mine(weights, shared, "slots")
        routing = Routing.from_topk(index, weights, num_experts=self.num_experts)
        out = run(self._by(index.shape[1]), tokens, routing, self._experts)
        return out if shared is None else whole(out, hidden_states.shape[0], shared)

    def _by(self, topk: int) -> Dispatcher:
        """What brings tokens of ``topk`` experts to them; made once."""
        if topk not in self.dispatchers:
            self.dispatchers[topk] = dispatcher(self.ep_mesh, self.num_experts, topk, **self.options)
        return self.dispatchers[topk]

    def _experts(self, rows: Tensor, routing: Routing) -> Tensor:
        """This rank's experts on what arrived, weighted and summed."""
        implementation = getattr(getattr(self.module, "config", None), "_experts_implementation", "eager")
        if implementation == NAME:
            return self._forward(rows, routing, routing.weights)
        # Others copy a row for each of its slots, also for those of other ranks: what they get are slots of this rank.
        if implementation == "eager":  # whose code need not know slots of nobody (gpt-oss's does not), and reads the host
            routing = dataclasses.replace(routing, order=routing.order[: int(routing.offsets[-1])])
        slots, owner = permute(rows, routing), expert_of_row(routing.offsets, routing.num_rows).unsqueeze(1)
        weights = routing.row_weights().unsqueeze(1)
        if slots.shape[0]:
            return unpermute(self._forward(slots, owner, weights), routing)
        # FSDP waits for gradients of the weights, on all ranks: a row of zeros goes through an expert and is cut off, so
        # that they are there, and zero.
        one = slots.sum(0, keepdim=True), owner.new_zeros(1, 1), weights.sum(0, keepdim=True)
        return unpermute(self._forward(*one)[:0], routing)

    def _forward(self, rows: Tensor, index: Tensor | Routing, weights: Any) -> Tensor:
        """The experts as Transformers calls them; a slot of nobody is the number of local experts."""
        with self.style.context_around_forward(self.module, self.ep_mesh):  # again, for what is recomputed in backward
            return self.experts_forward(rows, index, weights)
