"""What a Mixture-of-Experts model takes, from its config alone: parameters, memory, messages, time.

:func:`plan` reads a Transformers config (or a bundled one) and gives a :class:`Plan`: no weights, no network. How each
figure comes about is in docs/performance/plan.md.
"""

from moekit.plan.models import Model, UnknownModelError, given, presets, read
from moekit.plan.planning import Activations, Exchange, Fit, Parameters, Plan, Times, plan
from moekit.plan.rates import MACHINES, Rates, changed, measured

__all__ = [
    "MACHINES",
    "Activations",
    "Exchange",
    "Fit",
    "Model",
    "Parameters",
    "Plan",
    "Rates",
    "Times",
    "UnknownModelError",
    "changed",
    "given",
    "measured",
    "plan",
    "presets",
    "read",
]
