"""Expert parallelism on :mod:`torch.distributed`: experts sharded over ranks, tokens exchanged between them."""

from moekit.ep._exchange import Traffic, traffic
from moekit.ep.all_to_all import AllToAll
from moekit.ep.dispatcher import Dispatcher, Overlapping
from moekit.ep.gradients import clip_grad_norm_
from moekit.ep.parallelize import Parallelized, expert_parameters, parallelize
from moekit.ep.placement import local, shard
from moekit.ep.run import run

__all__ = [
    "AllToAll",
    "Dispatcher",
    "Overlapping",
    "Parallelized",
    "Traffic",
    "clip_grad_norm_",
    "expert_parameters",
    "local",
    "parallelize",
    "run",
    "shard",
    "traffic",
]
