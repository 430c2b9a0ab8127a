"""Expert parallelism on :mod:`torch.distributed`: experts sharded over ranks, tokens exchanged between them."""

from moekit.ep._exchange import Traffic, traffic
from moekit.ep.all_to_all import AllToAll
from moekit.ep.dispatcher import Dispatcher, Overlapping
from moekit.ep.run import run

__all__ = ["AllToAll", "Dispatcher", "Overlapping", "Traffic", "run", "traffic"]
