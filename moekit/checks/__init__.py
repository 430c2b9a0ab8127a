"""Is a module with the functions of ``moe_utils`` right? ``moekit check`` and :func:`check` run cases against it.

Cases are made when they run: small tensors that every dtype holds exactly, and for expected values formulas and loops in
float64 that are written out here, apart from everything that is checked. Ordinary cases allow what work done step by step
in a dtype loses; :data:`SEAMS` are the places where published code falls short, each with cases that show it.
"""

from moekit.checks._run import Outcome, Report, check
from moekit.checks._seams import SEAMS

__all__ = ["SEAMS", "Outcome", "Report", "check"]
