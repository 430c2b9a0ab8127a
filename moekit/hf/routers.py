"""A router of Transformers as arguments of :func:`moekit.route`.

``spec_of(module)`` is what the module's code says, or None: for what is no router, for a router that does something else
(sparsemixer, a state handed from layer to layer), and for one that somebody patched. What forward hooks do to a router's
output afterwards is in the output, where :meth:`RouterSpec.unpack` finds it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from moekit import _check
from moekit.hf._router_specs import FORMS, Form, digest_of
from moekit.hf.gates import _is_own

_OF_THE_CHOICE = ("k", "indices", "bias", "num_groups", "group_topk", "group_best")
_CALL = nn.Module.__call__
# What a forward may call by a bare name, and where that has to come from.
_CALLED = {"maybe_autocast": "transformers.utils.generic"}


@dataclass(frozen=True)
class RouterSpec:
    """What one router does, as its code says and its settings are.

    Attributes:
        topk: K, the experts of a token.
        code: the digest of the router's forward, by which its form is known.
        names: the parameters of that forward.
    """

    topk: int
    code: str
    names: tuple[str, ...]

    @property
    def _form(self) -> Form:
        return FORMS[self.code]

    def logits(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Tensor:
        """The logits ``[T, E]`` from which ``moekit.route(logits, **options)`` makes the router's choice and weights.

        They are computed as the router does, so they carry gradients to its parameters and to the hidden states. Their
        dtype is the one of the router's weights or, where it rounds those to the hidden states' at last, float32;
        :meth:`pack` rounds.

        Args:
            module: the router.
            args: what it was called with, as a forward hook is told.
            kwargs: the same.

        Raises:
            ValueError: an argument that the router needs is missing or of a wrong shape.
        """
        return self._form.logits(module, self._arguments(args, kwargs))

    def options(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        """The keyword arguments for :func:`moekit.route`, ``k`` or (of a hash table) ``indices`` included.

        Raises:
            ValueError: an argument that the router needs is missing.
        """
        found = self._form.options(module, self._arguments(args, kwargs))
        return found if "indices" in found else {"k": self.topk, **found}

    def weighing(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        """:meth:`options` without what says how to choose, to be given to :func:`moekit.route` with ``indices``.

        Raises:
            ValueError: an argument that the router needs is missing.
        """
        found = {n: v for n, v in self.options(module, args, kwargs).items() if n not in _OF_THE_CHOICE}
        if found.get("score", "softmax") != "softmax":
            found.pop("select_by", None)
        return found

    def unpack(self, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """``(logits [T, E], weights [T, K], indices [T, K])`` in the router's output.

        These logits are those of which scores are taken: a multiplier or a softcap is in them already.
        """
        return self._form.layout.unpack(output, self.topk)

    def pack(self, output: Any, weights: Tensor, indices: Tensor) -> Any:
        """The router's ``output`` with another choice in it, in the dtypes of the one that was there.

        Raises:
            ValueError: ``weights`` and ``indices`` are not both ``[T, K]``.
        """
        shape = self.unpack(output)[2].shape
        _check.shape("hf.routers", "weights", weights, shape, "[tokens, topk]")
        _check.shape("hf.routers", "indices", indices, shape, "[tokens, topk]")
        return self._form.layout.pack(output, weights, indices)

    def _arguments(self, args: tuple, kwargs: dict[str, Any] | None) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **(kwargs or {})}


def spec_of(module: nn.Module) -> RouterSpec | None:
    """The :class:`RouterSpec` of a router of Transformers, None for any other module.

    A router is known by the digest of its ``forward`` and of what that calls. None for a subclass that overrides one of
    them, for an instance whose ``forward`` was replaced (Accelerate's dispatch does so), and for settings with which the
    router does what :func:`moekit.route` does not.

    In half precision some routers round scores before they compare them; :func:`moekit.route` does not, and may order
    scores otherwise that are equal to half precision.
    """
    kind = type(module)
    forward = kind.forward
    own = vars(module)
    if kind.__call__ is not _CALL or "forward" in own or "_call_impl" in own or type(forward) is not FunctionType:
        return None
    code = digest_of(forward, ("__class__",) if forward.__code__.co_freevars else ())  # what super() needs
    form = FORMS.get(code)
    if form is None or not _honest(forward) or not form.fits(module):
        return None
    return RouterSpec(form.k(module), code, forward.__code__.co_varnames[1 : forward.__code__.co_argcount])


def _honest(forward: FunctionType) -> bool:
    """Whether the names that ``forward`` calls still mean what they did when its form was read."""
    for name, home in _CALLED.items():
        if name in forward.__code__.co_names:
            function = forward.__globals__.get(name)
            genuine = getattr(importlib.import_module(home), name, None)
            if function is not genuine or not _is_own(function, home):
                return False
    return True
