"""A token dispatcher for torchtitan's ``RoutedExperts``, on moekit's exchange. torchtitan itself is not imported.

In torchtitan, a dispatcher is a class with a ``Config``; one that takes its place there is five lines of the user's::

    from moekit.ep.torchtitan import TokenDispatcher
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    class MoekitTokenDispatcher(TokenDispatcher, AllToAllTokenDispatcher):
        @dataclass(kw_only=True, slots=True)
        class Config(AllToAllTokenDispatcher.Config):
            pass

    config.routed_experts.token_dispatcher = MoekitTokenDispatcher.Config(num_experts=128, top_k=8)

Letters as there: T tokens of this rank, D their width, K experts a token, E experts, e those of this rank, R rows of this
rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moekit import _check
from moekit.ep.choose import dispatcher
from moekit.ep.dispatcher import Dispatcher
from moekit.ops.rows import permute, unpermute
from moekit.routing import Routing


@dataclass(frozen=True, eq=False)
class Metadata:
    """What :meth:`TokenDispatcher.combine` needs: integers and the scores.

    Attributes:
        routing: of the tokens that arrived, over the experts of this rank.
        handle: of the exchange.
    """

    routing: Routing
    handle: Any


class TokenDispatcher:
    """Brings tokens to the experts of all ranks, in the order of experts, and their scored outputs back.

    A token travels once to each rank that has any of its experts, is copied for each of them there, and the outputs are
    multiplied by the scores and added there before one row goes back (float32, rounded once), so both ways have at most
    ``min(K, ranks)`` rows a token in place of K::

        x[t], chose experts 1, 2 (rank 0) and 5 (rank 1)
        to rank 0:  x[t] -> rows x[t] of expert 1, x[t] of expert 2      back:  s1 y1 + s2 y2
        to rank 1:  x[t] -> row x[t] of expert 5                         back:  s5 y5

    Args:
        config: whatever has ``num_experts`` and ``top_k``.
    """

    options: ClassVar[dict[str, Any]] = {}  # of moekit.ep.dispatcher; max_rows is not among them: it has to run the experts

    def __init__(self, config: Any) -> None:
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.ep_mesh: DeviceMesh | None = None
        self._dispatcher: Dispatcher | None = None

    def wire_meshes(self, *, ep_mesh: DeviceMesh | None) -> None:
        """Say which ranks share the experts: a mesh of one dimension; None for this one alone."""
        self.ep_mesh = ep_mesh
        self._dispatcher = dispatcher(ep_mesh, self.num_experts, self.top_k, **self.options)

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Metadata]:
        """Bring tokens to their experts.

        Args:
            x_TD: ``[T, D]``; T may differ between ranks, and be 0.
            topk_scores_TK: ``[T, K]`` routing scores.
            topk_expert_ids_TK: ``[T, K]`` integers of all experts.
            num_local_tokens_per_expert_E: not needed.

        Returns:
            ``(rows_RD, counts_e, metadata)``: the rows of this rank's experts, expert by expert, how many each has
            ``[e] int64``, and what :meth:`combine` needs. With a ``capacity`` there may be more rows than counted: zeros, at
            the end.
        """
        routing = Routing.from_topk(topk_expert_ids_TK, topk_scores_TK, num_experts=self.num_experts)
        rows, local, handle = self._wired().dispatch(x_TD, routing)
        return permute(rows, local), local.tokens_per_expert, Metadata(local, handle)

    def combine(self, routed_output_RD: Tensor, metadata: Metadata, x_TD: Tensor | None = None) -> Tensor:
        """Bring the experts' outputs back.

        Args:
            routed_output_RD: ``[R, D]``, of the rows that :meth:`dispatch` gave.
            metadata: from there.
            x_TD: not needed.

        Returns:
            ``[T, D]`` in the dtype of ``routed_output_RD``: times their scores and summed.
        """
        if not isinstance(metadata, Metadata):
            raise _check.wrong_type("ep.torchtitan", "metadata", "what dispatch gave", type(metadata).__name__)
        return self._wired().combine(unpermute(routed_output_RD, metadata.routing, weighted=True), metadata.handle)

    def _wired(self) -> Dispatcher:
        if self._dispatcher is None:
            self.wire_meshes(ep_mesh=None)
        wired: Any = self._dispatcher
        return wired
