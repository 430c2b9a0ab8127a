"""Record which experts a model's routers choose, and let them choose the same again.

In reinforcement learning the rollout's engine and the trainer compute the same router a little differently, and about a
tenth of the choices come out otherwise, which makes training collapse. Router replay (R3, arXiv 2510.11370) trains on the
rollout's choices, weighed by the logits of today, so that the router keeps its gradient.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from moekit import _check
from moekit._routers import Found, Hook, find, in_backward
from moekit.choices import Choices, Pass, stored

_OP = "Replay"
_PLAIN = (int, float, complex, str, bytes, bool, type(None))
_COMPILED = (
    "moekit.Replay counts the passes of a model outside of compiled code: make it for the compiled model, "
    "Replay(torch.compile(model))"
)


class Replay:
    """Record and replay of the choices of a model's routers.

    ::

        replay = moekit.Replay(model)
        with replay.record() as choices:  # a pass of the model is an entry: two micro-batches, two entries
            for batch in batches:
                model(batch)
        with replay.play(choices):  # the next passes take the entries, one each
            for batch in batches:
                loss(model(batch)).backward()

    or ``replay.play(moekit.Choices.from_array(routed_experts))`` with what an inference engine returned. Weights are those
    of today's logits at the recorded experts, so gradients reach the router; a slot of -1 has no expert. Only the choice is
    replaced: what the model computes from logits elsewhere is not. :func:`moekit.hf.fix_aux_loss` sees to it that the
    load-balancing loss of Transformers is of the choice that was replayed.

    A pass is one call of ``model``, however many passes come before a backward. Checkpointing of either kind within the
    model computes a pass again with that pass's choices: each output of a pass that requires a gradient hands them to the
    routers again as its backward begins, and keeps them alive as long as its graph. So the loss has to be made of what the
    model returned. (A model that is spread over several devices needs a backward for each pass.)

    Compiled code ignores hooks that come after it was compiled: make the replay before a model's first call, of the compiled
    model if it is the model as a whole that is compiled (``Replay(torch.compile(model))``).

    Args:
        model: what is called for a pass, with :class:`moekit.nn.Router` or routers of Transformers in it.

    Attributes:
        names: the paths of the routers, in order.

    Raises:
        ValueError: there is no router, or one that cannot be read.
        TypeError: no module.

    Examples:
        >>> import torch, moekit.nn
        >>> model, x = moekit.nn.MoE.build(16, 8, num_experts=4, k=2), torch.randn(5, 16)
        >>> replay = moekit.Replay(model)
        >>> with replay.record() as choices:
        ...     y = model(x)
        >>> with replay.play(choices):
        ...     again = model(x)
        >>> len(choices), choices.to_array().shape, torch.equal(y, again)
        (1, (5, 1, 2), True)
    """

    def __init__(self, model: nn.Module) -> None:
        routers, unread = find(_OP, model)
        if unread:
            raise _check.fail(
                _OP, "model", "one whose routers can all be read", f"one where these cannot: {', '.join(unread)}"
            )
        self.names = tuple(router.name for router in routers)
        self._slots = [_Slot(router) for router in routers]
        self._recording: Choices | None = None
        self._playing: Iterator[Pass] | None = None
        self._played = 0
        self._given: Pass | None = None  # what the routers are given now
        self._task = -1  # the backward that gave it
        self._in_pass = False
        self._current: Pass | None = None  # what it was given
        self._outside: tuple[Any, ...] = self._begin, self._end  # what is not to be compiled
        self._blind = False  # a pass was played whose output told of no backward to come
        # In this order, for the model may be a router itself.
        hooks: list[Any] = [model.register_forward_pre_hook(Hook(self._before), with_kwargs=True)]
        hooks += [hook for slot in self._slots for hook in slot.hooks()]
        self._hooks = [*hooks, model.register_forward_hook(Hook(self._after), with_kwargs=True)]

    @contextmanager
    def record(self) -> Iterator[Choices]:
        """Record each pass of the model within the block.

        Yields:
            the :class:`moekit.Choices`, which grow by one entry a pass. They stay on the device.

        Raises:
            RuntimeError: it is recording already; no pass was seen; or in a pass a router did not run, or twice.
        """
        if self._recording is not None:
            raise RuntimeError("moekit.Replay.record: it is recording already")
        self._stay_outside()
        choices = self._recording = Choices([], self.names)
        try:
            yield choices
        finally:
            self._recording = None
            self._leave()
        if not len(choices):
            raise RuntimeError(f"moekit.Replay.record: no pass was seen. {_why_none()}")

    @contextmanager
    def play(self, choices: Choices) -> Iterator[None]:
        """Let the routers choose what ``choices`` say: the next passes of the model take an entry each, in order.

        After the block routers choose by themselves again. A backward after it still computes again with the entries of
        its pass.

        Args:
            choices: of as many routers. If both have names and the same ones, they go by name; if they have other names,
                use ``Choices(choices.passes)`` to go by order.

        Raises:
            ValueError: choices of other routers; in a pass, another number of tokens or experts a token, or (on a CPU) an
                index out of range.
            RuntimeError: it is playing already; more passes than entries, or fewer.
            TypeError: something else than choices.
        """
        if not isinstance(choices, Choices):
            got = f"{type(choices).__name__} (an array? use Choices.from_array)"
            raise _check.wrong_type(f"{_OP}.play", "choices", "moekit.Choices", got)
        if self._playing is not None:
            raise RuntimeError("moekit.Replay.play: it is playing already")
        entries = self._in_order(choices)
        self._stay_outside()
        self._playing, self._played = iter(entries), 0
        try:
            yield
        finally:
            self._playing = None
            self._leave()
        if self._played < len(entries):
            got = f"{self._played} of {len(entries)} entries were taken by passes of the model. {_why_none()}"
            raise RuntimeError(f"moekit.Replay.play: {got}")

    def remove(self) -> None:
        """Take all hooks off the model. Graphs of passes that were played must have gone backward."""
        self._leave()
        for hook in self._hooks:
            hook.remove()

    def __repr__(self) -> str:
        return f"Replay({len(self.names)} routers: {', '.join(self.names)})"

    def _in_order(self, choices: Choices) -> list[Pass]:
        """The entries with the layers in the order of the routers."""
        op, ours = f"{_OP}.play", self.names
        for one in choices.passes:
            if len(one) != len(ours):
                hint = "" if choices.names else " (one a layer of the model? Choices.from_array(..., layers=) picks some)"
                raise _check.fail(op, "choices", f"of {len(ours)} routers", f"{len(one)} layers{hint}")
        if choices.names is None or choices.names == ours:
            return choices.passes
        if set(choices.names) != set(ours):
            wanted = f"of the routers {', '.join(ours)} (Choices(choices.passes) goes by order)"
            raise _check.fail(op, "choices", wanted, ", ".join(choices.names))
        at = [choices.names.index(name) for name in ours]
        return [tuple(one[place] for place in at) for one in choices.passes]

    def _stay_outside(self) -> None:
        """Keep the counting of passes out of compiled code, if there is any: this loads the compiler."""
        if "torch._dynamo" in sys.modules:
            self._outside = tuple(torch.compiler.disable(call, reason=_COMPILED) for call in (self._begin, self._end))

    # --- a pass -------------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        idle = self._recording is None and self._playing is None
        if idle and self._given is None and not self._blind:
            return
        self._outside[0](idle)

    def _begin(self, idle: bool) -> None:
        if in_backward():  # all of the model is computed again, and has been given its entry
            if self._given is None and self._blind:
                raise RuntimeError(
                    "moekit.Replay: a whole pass is computed again, and which one cannot be known: use use_reentrant=False"
                )
            return
        entry = None
        if self._playing is not None:
            entry = next(self._playing, None)
            if entry is None:
                raise RuntimeError(f"moekit.Replay.play: there are {self._played} entries, and this is one more pass")
            self._played += 1
        self._give(entry)
        if not idle:
            self._in_pass, self._current = True, entry
            for slot in self._slots:
                slot.start(self._played)
            self._listen(True)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._in_pass and not in_backward():
            self._outside[1](module, output)

    def _end(self, module: nn.Module, output: Any) -> None:
        entry, missing = self._given, [slot.name for slot in self._slots if slot.indices is None]
        found = [slot.indices for slot in self._slots if slot.indices is not None]
        self._leave()
        if missing:
            raise RuntimeError(f"moekit.Replay: these routers did not run in this pass: {', '.join(missing)}. {_why_none()}")
        if self._recording is not None:
            one = tuple(stored(chosen, slot.num_experts) for chosen, slot in zip(found, self._slots, strict=True))
            self._recording.passes.append(one)
        if entry is not None and torch.is_grad_enabled():
            self._watch(output, entry)
        elif entry is not None and module.training:
            self._blind = True

    def _leave(self) -> None:
        """No pass is under way, and nothing is given."""
        self._in_pass, self._current = False, None
        self._give(None)
        self._listen(False)
        for slot in self._slots:
            slot.indices = None

    def _give(self, entry: Pass | None) -> None:
        self._given, self._task = entry, -1
        for slot, indices in zip(self._slots, entry or [None] * len(self._slots), strict=True):
            slot.give(indices)

    # --- its backward -------------------------------------------------------------------------------------------

    def _watch(self, output: Any, entry: Pass) -> None:
        """Have the entry given again when the backward of this pass begins, where checkpointing may compute it again."""
        leaves = list(_leaves(output))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        strange = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))]
        if strange and not tensors:
            wanted = "tensors, or tuples, lists, dicts or dataclasses of them"
            raise _check.wrong_type(_OP, "what the model returns", wanted, ", ".join(strange))

        def again(_: Tensor) -> None:
            self._give_again(entry)

        for tensor in tensors:
            tensor.register_hook(again)

    def _give_again(self, entry: Pass) -> None:
        task = torch._C._current_graph_task_id()
        if self._task == task and self._given is not entry and len({slot.device for slot in self._slots}) > 1:
            raise RuntimeError(
                "moekit.Replay: backward of two passes at once, on several devices, each of which goes at its own pace: "
                "call backward for each pass"
            )
        self._listen(False)
        self._give(entry)
        self._task = task
        torch.autograd.Variable._execution_engine.queue_callback(self._back_to_pass)

    def _back_to_pass(self) -> None:
        """After a backward: to the pass that it was called in the middle of (or that failed before), if any."""
        self._give(self._current if self._in_pass else None)
        self._listen(self._in_pass)

    def _listen(self, active: bool) -> None:
        for slot in self._slots:
            slot.active = active


class _Slot:
    """One router: what it is given, and what it chose in the pass that is under way."""

    def __init__(self, router: Found) -> None:
        self.name, self._module, self._spec = router.name, router.module, router.spec
        self.num_experts = 0
        self.indices: Tensor | None = None
        self._given: Tensor | None = None
        self._lent: Tensor | None = None  # what of it the router holds
        self.active = False  # in a pass: its choice is noted
        self._pass = 0

    def hooks(self) -> list[Any]:
        module = self._module
        if self._spec is None:
            return [
                module.register_forward_pre_hook(Hook(self._lend), with_kwargs=True),
                module.register_forward_hook(Hook(self._take_back), with_kwargs=True),
            ]
        # Before others': they are to see what the router is made to choose.
        return [module.register_forward_hook(Hook(self._replace), with_kwargs=True, prepend=True)]

    @property
    def device(self) -> torch.device | None:
        return next((parameter.device for parameter in self._module.parameters()), None)

    def give(self, indices: Tensor | None) -> None:
        self._given = indices
        if self._lent is not None:  # a forward that failed
            if self._module.given is self._lent:
                self._module.given = None
            self._lent = None

    def start(self, number: int) -> None:
        self.indices, self._pass = None, number

    def _lend(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Of moekit's router, which takes it from there."""
        if self._given is None:
            return
        if module.given is not None:
            raise RuntimeError(f"moekit.Replay: somebody else has set `given` of the router {self.name!r}")
        x = args[0] if args else kwargs["x"]
        self._lent = self._fitting(x, module.num_experts, module.k)
        module.given = self._lent

    def _take_back(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._lent is not None:
            module.given = self._lent = None
        if self.active:
            self._note(output.indices.detach(), module.num_experts)

    def _replace(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Of Transformers' routers: put the given choice into the output, weighed by the router's own logits."""
        from moekit.hf._replayed import replayed

        if self._given is None and not self.active:
            return None
        chosen = self._spec.unpack(output)[2]
        num_experts = 0
        if self._given is not None:
            logits = self._spec.logits(module, args, kwargs)
            num_experts = logits.shape[1]
            given = self._fitting(logits, num_experts, self._spec.topk)
            output = replayed(self._spec, module, args, kwargs, output, logits, given)
            chosen = given
        if self.active:
            self._note(chosen.detach(), num_experts or self._spec.unpack(output)[0].shape[1])
        return output

    def _note(self, indices: Tensor, num_experts: int) -> None:
        if self.indices is not None:
            raise RuntimeError(f"moekit.Replay: the router {self.name!r} ran twice in a pass, which is not told apart")
        self.indices, self.num_experts = indices, num_experts

    def _fitting(self, rows: Tensor, num_experts: int, topk: int) -> Tensor:
        """The given choice for these rows, looked at."""
        given = self._given
        if given is None:
            raise RuntimeError(f"moekit.Replay: nothing is given to the router {self.name!r}")
        if given.shape != (rows.shape[0], topk):
            _check.shape(f"{_OP}.play", self._what(), given, (rows.shape[0], topk), "[tokens, topk]")
        if not torch.compiler.is_compiling():
            _check.in_range(f"{_OP}.play", self._what(), given, num_experts, "the number of experts")
        return given.to(rows.device, torch.int64, non_blocking=True)

    def _what(self) -> str:  # not looked at by code that is compiled, which would be compiled for each pass
        return f"choices of pass {self._pass} and router {self.name!r}"


def _leaves(output: Any) -> Iterator[Any]:
    """What is in the containers of a model's output."""
    for leaf in _pytree.tree_leaves(output):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _leaves(getattr(leaf, field.name))
        else:
            yield leaf


def _why_none() -> str:
    return "It has to be the model that was given to Replay which is called, and Replay made before code is compiled"
