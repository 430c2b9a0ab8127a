"""Expert parallelism on :mod:`torch.distributed`: experts sharded over ranks, tokens exchanged between them."""

from moekit.ep._traffic import Traffic, traffic
from moekit.ep.all_gather import AllGather
from moekit.ep.all_to_all import AllToAll
from moekit.ep.choose import choose, dispatcher
from moekit.ep.ddp import expert_parameters, hide_from_ddp
from moekit.ep.dispatcher import Dispatcher, Overlapping, Underway
from moekit.ep.gradients import clip_grad_norm_
from moekit.ep.local import Local
from moekit.ep.parallelize import Parallelized, parallelize
from moekit.ep.placement import part, shard, shard_parameters
from moekit.ep.run import run

__all__ = [
    "AllGather",
    "AllToAll",
    "Dispatcher",
    "Local",
    "Overlapping",
    "Parallelized",
    "Traffic",
    "Underway",
    "choose",
    "clip_grad_norm_",
    "dispatcher",
    "expert_parameters",
    "hide_from_ddp",
    "parallelize",
    "part",
    "run",
    "shard",
    "shard_parameters",
    "traffic",
]
