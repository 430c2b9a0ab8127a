"""Experts' weights in 4 or 8 bits: the formats, the tensor that holds such a stack, and how one is made.

A stack ``[E, out, in]`` is packed once and never changed. Names load on first use of :mod:`moekit.packed`; files with packed
tensors in them can be read by ``torch.load`` from then on.
"""

from moekit.packed.merging import merge
from moekit.packed.packing import pack
from moekit.packed.tensor import PackedExperts

__all__ = ["PackedExperts", "merge", "pack"]
