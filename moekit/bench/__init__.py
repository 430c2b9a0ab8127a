"""What ``moekit bench`` runs: the main operators and the expert MLP of a layer, against whoever else is installed.

``cases`` has what is computed, ``moved`` the bytes that it moves, ``peers`` who else computes it, ``timing`` the clock,
``run`` puts them together. Of the repository's ``benchmarks/``, ``ops.py`` and ``experts.py`` use the same clock.
"""
