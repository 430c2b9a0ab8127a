"""``moekit demo``: a byte-level Mixture-of-Experts language model trained on the source of Python's standard library.

Shape letters of this package: B windows a batch, C bytes of context, T = B * C tokens, H hidden, I intermediate of one
expert, E experts, K experts a token, R = T * K rows after permutation, L layers, V = 256 byte values.
"""

from __future__ import annotations


class DemoError(Exception):
    """Something the user can put right: a path, a setting, a device. Its text is the whole message."""
