"""What ``moekit doctor`` finds out: facts by pure functions, each probe on its own, so that one that fails is a line.

Nothing here needs more than Python until a probe asks for it: torch itself may be what is broken. :func:`examine` puts the
facts together, ``report`` judges and words them. Operators that are tried are in ``trials``.
"""

from __future__ import annotations

from moekit.doctor.examine import examine

__all__ = ["examine"]
