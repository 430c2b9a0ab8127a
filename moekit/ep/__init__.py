"""Expert parallelism on :mod:`torch.distributed`: experts sharded over ranks, tokens exchanged between them."""

from moekit.ep._traffic import Traffic, traffic
from moekit.ep.all_gather import AllGather
from moekit.ep.all_to_all import AllToAll
from moekit.ep.choose import choose, dispatcher
from moekit.ep.dispatcher import Dispatcher, Overlapping, Underway
from moekit.ep.local import Local
from moekit.ep.run import run

__all__ = [
    "AllGather",
    "AllToAll",
    "Dispatcher",
    "Local",
    "Overlapping",
    "Traffic",
    "Underway",
    "choose",
    "dispatcher",
    "run",
    "traffic",
]
