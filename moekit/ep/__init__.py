"""Expert parallelism on :mod:`torch.distributed`: experts sharded over ranks, tokens exchanged between them."""

from moekit.ep._exchange import Traffic, traffic
from moekit.ep.all_to_all import AllToAll
from moekit.ep.dispatcher import Dispatcher, Overlapping
from moekit.ep.gradients import clip_grad_norm_
from moekit.ep.parallelize import Parallelized, expert_parameters, hide_from_ddp, parallelize
from moekit.ep.placement import local, shard, shard_parameters
from moekit.ep.run import run

__all__ = [
    "AllToAll",
    "Dispatcher",
    "Overlapping",
    "Parallelized",
    "Traffic",
    "clip_grad_norm_",
    "expert_parameters",
    "hide_from_ddp",
    "local",
    "parallelize",
    "run",
    "shard",
    "shard_parameters",
    "traffic",
]
