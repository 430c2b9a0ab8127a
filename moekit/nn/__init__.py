"""Modules: a router, experts, a shared expert, and the layer that is made of them.

They hold the parameters; what they compute is :func:`moekit.route`, :func:`moekit.experts`, :func:`moekit.glu` and the
losses of the choice. ::

    layer = moekit.nn.MoE.build(1024, 512, num_experts=64, k=8, balance_coeff=0.01)
    y = layer(x)  # [batch, length, 1024], and the balance loss is attached in training
"""

from moekit.nn.experts import Experts
from moekit.nn.moe import MoE
from moekit.nn.router import Router
from moekit.nn.shared import SharedExpert

__all__ = ["Experts", "MoE", "Router", "SharedExpert"]
