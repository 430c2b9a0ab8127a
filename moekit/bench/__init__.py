"""What ``moekit bench`` runs: the main operators and the expert MLP of a layer, against whoever else is installed.

``cases`` has what is computed, ``peers`` who else computes it, ``timing`` the
clock, ``run`` puts them together. The repository's ``benchmarks/`` use the same parts.
"""
