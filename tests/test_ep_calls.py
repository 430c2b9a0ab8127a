"""How dispatchers are called: several layers, checkpoints, autocast, compilers, errors; and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import _ep
import pytest
import torch
import torch.distributed as dist
from _ep import EXPERTS, HIDDEN, all_gather, all_to_all, equal, keeping, layer, rowwise
from _ranks import Everywhere, on_ranks, run_everywhere
from torch import Tensor

import moekit
import moekit.ep

WORLD = 2
everywhere = Everywhere()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_ranks(run_everywhere, WORLD, tmp_path_factory.mktemp("ranks"), __name__)


# --- how it is called -----------------------------------------------------------------------------------------------

OPTIONS = ({}, {"max_rows": 5}, {"redispatch": True}, {"capacity": 15})


@everywhere
def several_layers() -> dict[str, Any]:
    """One on the other; two in flight, of which the first goes back first; one in a checkpoint; one that goes back twice."""
    given = _ep.mine(_ep.problem("random"))
    other = {**given, "indices": given["indices"].flip(0)}
    found: dict[str, Any] = {}
    for options in OPTIONS:
        used = all_to_all(**options)
        inner, leaves = layer(given, used)
        out, _ = layer(other, used, None, **{**leaves, "x": inner})
        found[f"on top {options}"] = _ep.backward(out, leaves, given["grad"])
        (first, a), (second, b) = layer(given, used), layer(given, used)
        results = _ep.backward(first, a, given["grad"]), _ep.backward(second, b, given["grad"])
        found[f"in flight {options}"] = equal(*results)
        for reentrant in (True, False):
            run = lambda x, leaves, used=used: layer(given, used, None, **{**leaves, "x": x})[0]  # noqa: E731
            leaves = _ep.leaves_of(given)
            out = torch.utils.checkpoint.checkpoint(run, leaves["x"], leaves, use_reentrant=reentrant)
            found[f"checkpoint {reentrant} {options}"] = equal(results[0], _ep.backward(out, leaves, given["grad"]))
        if "max_rows" not in options:  # of which a checkpoint has let go
            out, leaves = layer(given, used)
            out.backward(given["grad"], retain_graph=True)
            found[f"twice {options}"] = equal(results[0], _twice(out, leaves, given["grad"]))
    return found


def _twice(out: Tensor, leaves: _ep.Problem, grad: Tensor) -> _ep.Problem:
    for leaf in leaves.values():
        leaf.grad = None
    return _ep.backward(out, leaves, grad)


def test_several_layers(ranks: list[dict]):
    given = _ep.problem("random")
    leaves = _ep.leaves_of(given)
    # Each rank has its own tokens in another order.
    flipped = torch.cat([part.flip(0) for part in given["indices"].split(_ep.TOKENS[WORLD])])
    inner = _ep.precise(leaves["x"], _ep.as_routing(given["indices"], leaves["weights"]), leaves)
    out = _ep.precise(inner, _ep.as_routing(flipped, leaves["weights"]), leaves)
    wanted = _ep.backward(out, leaves, given["grad"])
    for rank, found in enumerate(ranks):
        found = found["several_layers"]
        for options in OPTIONS:
            for name, value in _ep.of_rank({**given, **wanted}, rank, WORLD).items():
                if name in wanted:
                    torch.testing.assert_close(found[f"on top {options}"][name], value, rtol=1e-11, atol=1e-11)
        assert all(value for name, value in found.items() if not name.startswith("on top")), found


@everywhere
def gradients() -> dict[str, Any]:
    """Of tokens that need none, of nobody, of experts that do not look at their rows."""
    given, found = _ep.mine(_ep.problem("random")), {}
    for options in OPTIONS:
        used = all_to_all(**options)
        out, leaves = layer(given, used, None, x=given["x"])
        found[f"no x {options}"] = _ep.backward(out, leaves, given["grad"])
        with torch.no_grad():
            found[f"none {options}"] = layer(given, used)[0]
        with torch.inference_mode():
            assert torch.equal(layer(given, used)[0], found[f"none {options}"])
        # One rank only makes something of its rows; the other has none, it seems.
        alone = dist.get_rank() == 0
        experts = (
            (lambda rows, local: rows.exp()) if alone else lambda rows, local: torch.zeros(rows.shape, dtype=rows.dtype)
        )
        out, leaves = layer(given, used, experts)
        found[f"disconnected {options}"] = _ep.backward(out, leaves, given["grad"])
    return found


def test_gradients(ranks: list[dict]):
    given = _ep.problem("random")
    wanted = _ep.alone(given)
    goes_to_first = (given["indices"] < EXPERTS // WORLD).any(1, keepdim=True)
    disconnected = torch.where(goes_to_first, given["x"].exp() * given["grad"], 0)
    for rank, found in enumerate(ranks):
        found = found["gradients"]
        mine = _ep.of_rank({**given, **wanted, "disconnected": disconnected}, rank, WORLD)
        for options in OPTIONS:
            assert found[f"no x {options}"].keys() == {"out", "weights", "gate_up", "down"}
            for name, value in found[f"no x {options}"].items():
                torch.testing.assert_close(value, mine[name], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found[f"none {options}"], mine["out"], rtol=1e-12, atol=1e-12)
            of_x, of_weights = (found[f"disconnected {options}"][name] for name in ("x", "weights"))
            torch.testing.assert_close(of_x, mine["disconnected"], rtol=1e-12, atol=1e-12)
            assert not of_weights.any()


@everywhere
def autocast() -> dict[str, Any]:
    """Tokens travel in the dtype of the products, and redispatch knows them there."""
    given = {name: v.float() if v.is_floating_point() else v for name, v in _ep.mine(_ep.problem("random")).items()}
    found = {}
    for options in ({}, {"redispatch": True}):
        with torch.autocast("cpu", torch.bfloat16), keeping() as tensors, moekit.ep.traffic() as sent:
            out, leaves = layer(given, all_to_all(**options))
        wide = [len(t) for t in tensors if t.dim() == 2 and t.shape[1] == HIDDEN]
        result = _ep.backward(out, leaves, given["grad"].to(out.dtype))
        found[str(options)] = (result, wide, sent.bytes["rows"] / sent.rows)
    return found


def test_autocast(ranks: list[dict]):
    given = {name: v.float() if v.is_floating_point() else v for name, v in _ep.problem("random").items()}
    leaves = _ep.leaves_of(given)
    with torch.autocast("cpu", torch.bfloat16):
        routing = _ep.as_routing(given["indices"], leaves["weights"])
        out = moekit.experts(leaves["x"], routing, leaves["gate_up"], leaves["down"])
    wanted = _ep.backward(out, leaves, given["grad"].to(out.dtype))
    for rank, found in enumerate(ranks):
        plain, again = found["autocast"].values()
        assert equal(plain[0], again[0])
        assert len(plain[1]) == 1 and again[1] == [_ep.TOKENS[WORLD][rank]]  # the rows, or the tokens
        assert plain[2] == again[2] == 2 * HIDDEN
        for name, value in _ep.of_rank({**given, **wanted}, rank, WORLD).items():
            if name in wanted:
                assert plain[0][name].dtype is value.dtype
                scale = wanted[name].abs().max()
                torch.testing.assert_close(plain[0][name] / scale, value / scale, rtol=0, atol=2e-2)


@everywhere
def compiled() -> list[str]:
    """The options that a compiler makes another result of."""
    wrong = []
    given = _ep.mine(_ep.problem("random"))
    for used in (all_to_all(max_rows=5), all_to_all(redispatch=True, capacity=15), all_gather()):

        def model(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            routing = moekit.Routing.from_topk(given["indices"], weights, num_experts=EXPERTS)
            experts = lambda rows, local: moekit.experts(rows, local, gate_up, down)  # noqa: E731
            return moekit.ep.run(used, x.sin(), routing, experts, lambda: x.cos()).sin()  # noqa: B023

        torch._dynamo.reset()
        results = []
        for call in (model, torch.compile(model, backend="aot_eager")):
            leaves = _ep.leaves_of(given)
            results.append(_ep.backward(call(*leaves.values()), leaves, given["grad"]))
        wrong += (
            [] if all(torch.allclose(a, b) for a, b in zip(*(r.values() for r in results), strict=True)) else [str(used)]
        )
    return wrong


def test_compiled(ranks: list[dict]):
    assert [found["compiled"] for found in ranks] == [[], []]


@everywhere
def after_an_error() -> bool:
    """What runs beside the exchange raises an error while rows travel; the next call knows nothing of it."""
    given, used = _ep.mine(_ep.problem("random")), all_to_all()
    leaves = _ep.leaves_of(given)
    routing = _ep.as_routing(given["indices"], leaves["weights"])
    with suppress(ZeroDivisionError):
        moekit.ep.run(used, leaves["x"], routing, rowwise, beside=lambda: 1 / 0)
    return equal(*(_ep.backward(*layer(given, d, rowwise), given["grad"]) for d in (used, all_to_all())))


def test_after_an_error(ranks: list[dict]):
    assert all(found["after_an_error"] for found in ranks)


# --- what is refused, before any rank waits for another -----------------------------------------------------------------


def _attempts() -> dict[str, Callable[[], Any]]:
    given, group = _ep.mine(_ep.problem("random")), dist.group.WORLD
    x, indices, weights = given["x"], given["indices"], given["weights"]
    routing = moekit.Routing.from_topk(indices, weights, num_experts=EXPERTS)
    used = all_to_all()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "ep"))
    rows, _, handle = used.dispatch(x, routing)
    used.combine(rows, handle)
    _, _, open_handle = used.dispatch(x, routing)
    return {
        "no group": lambda: moekit.ep.AllToAll(None, EXPERTS),
        "a mesh of two": lambda: moekit.ep.AllGather(mesh, EXPERTS),
        "experts": lambda: moekit.ep.AllToAll(group, 7),
        "ranks": lambda: moekit.ep.Local(group, EXPERTS),
        "both": lambda: all_to_all(capacity=3, max_rows=3),
        "few rows": lambda: all_to_all(max_rows=1),
        "capacity": lambda: all_to_all(capacity=0),
        "slots": lambda: all_to_all(slot_capacity=3),
        "no slots": lambda: all_gather(tokens_per_rank=15, slot_capacity=0),
        "kind": lambda: moekit.ep.dispatcher(group, EXPERTS, 4, kind="ring"),
        "option": lambda: moekit.ep.dispatcher(group, EXPERTS, 4, kind="all_gather", capacity=3),
        "alone": lambda: moekit.ep.dispatcher(None, EXPERTS, 4, capacity=3),
        "of nobody": lambda: moekit.ep.dispatcher(group, EXPERTS, 2, slots=3),
        "tuple": lambda: used.dispatch(x, (indices, weights)),
        "no weights": lambda: used.dispatch(x, moekit.Routing.from_topk(indices, num_experts=EXPERTS)),
        "other experts": lambda: used.dispatch(x, moekit.Routing.from_topk(indices, weights, num_experts=16)),
        "other tokens": lambda: all_gather().dispatch(x[1:], routing),
        "integers": lambda: used.dispatch(x.long(), routing),
        "3-D": lambda: used.dispatch(x[None], routing),
        "too many tokens": lambda: all_gather(tokens_per_rank=3).dispatch(x, routing),
        "used handle": lambda: used.combine(rows, handle),
        "no handle": lambda: used.combine(rows, routing),
        "other rows": lambda: used.combine(rows[1:], open_handle),
        "other width": lambda: used.combine(rows[:, 1:], open_handle),
        "rounds": lambda: all_to_all(max_rows=2).dispatch(x, routing),
        "no dispatcher": lambda: moekit.ep.run(group, x, routing, rowwise),
        "beside": lambda: moekit.ep.run(used, x, routing, rowwise, lambda: x[:1]),
    }


REFUSED = {
    "no group": "TypeError: moekit.ep.AllToAll: group must be a torch.distributed.ProcessGroup",
    "a mesh of two": "ValueError: moekit.ep.AllGather: group must be of one dimension (a part of it: mesh['ep']), got 2",
    "experts": "ValueError: moekit.ep.AllToAll: num_experts must be a multiple of the 2 ranks of the group, got 7",
    "ranks": "ValueError: moekit.ep.Local: group must be of one rank, got 2 ranks",
    "both": "ValueError: moekit.ep.AllToAll: max_rows=3 has no effect with a capacity",
    "few rows": "ValueError: moekit.ep.AllToAll: max_rows must be at least 2, got 1",
    "capacity": "ValueError: moekit.ep.AllToAll: capacity must be at least 1, got 0",
    "slots": "ValueError: moekit.ep.AllToAll: slot_capacity=3 has no effect without capacity: slots are counted",
    "no slots": "ValueError: moekit.ep.AllGather: slot_capacity must be at least 1, got 0",
    "kind": "ValueError: moekit.ep.dispatcher: kind must be one of 'auto', 'all_to_all', 'all_gather', 'local', got 'ring'",
    "option": "ValueError: moekit.ep.dispatcher: capacity=3 has no effect with kind='all_gather' (kind='all_to_all' has it)",
    "alone": "ValueError: moekit.ep.dispatcher: capacity=3 has no effect with kind='local', chosen for 4 experts a ",
    "of nobody": "ValueError: moekit.ep.dispatcher: slots=3 has no effect with kind='all_to_all', chosen for 2 experts a ",
    "tuple": "TypeError: moekit.ep.AllToAll: routing must be a moekit.Routing",
    "no weights": "ValueError: moekit.ep.AllToAll: routing must be built with weights, got none",
    "other experts": "ValueError: moekit.ep.AllToAll: routing must be of all 8 experts, got 16",
    "other tokens": "ValueError: moekit.ep.AllGather: routing must be of the",
    "integers": "TypeError: moekit.ep.AllToAll: tokens must be a floating-point tensor",
    "3-D": "ValueError: moekit.ep.AllToAll: tokens must be a 2-D tensor, got shape",
    "too many tokens": "ValueError: moekit.ep.AllGather: tokens must be at most tokens_per_rank (3), got",
    "used handle": "ValueError: moekit.ep.AllToAll: handle must be of a dispatch that has not been combined, got one",
    "no handle": "TypeError: moekit.ep.AllToAll: handle must be what dispatch gave, got Routing",
    "other rows": "ValueError: moekit.ep.AllToAll: rows must be of shape [rows that were dispatched, H] = [",
    "other width": "ValueError: moekit.ep.AllToAll: rows must be of shape [rows that were dispatched, H] = [",
    "rounds": "ValueError: moekit.ep.AllToAll: max_rows must be enough for what each rank receives, unless moekit.ep.run",
    "no dispatcher": "TypeError: moekit.ep.run: dispatcher must be a moekit.ep.Dispatcher, with dispatch and combine, got",
    "beside": "ValueError: moekit.ep.run: what beside gives must be of shape [tokens, H]",
}


@everywhere
def refused() -> dict[str, Any]:
    found = {}
    for name, attempt in _attempts().items():
        with moekit.ep.traffic() as sent:
            try:
                attempt()
                found[name] = ("nothing", 0)
            except Exception as error:
                found[name] = (f"{type(error).__name__}: {error}", sent.total)
    return found


def test_refused(ranks: list[dict]):
    for found in ranks:
        assert found["refused"].keys() == REFUSED.keys()
        for name, (text, sent) in found["refused"].items():
            assert text.startswith(REFUSED[name]), name
            assert (sent == 0) != (name in ("rounds", "beside")), name  # all ranks find out, when sizes are known


DIFFERENT = {
    "hidden size": lambda given: {**given, "x": given["x"][:, :8].contiguous()},
    "experts of a token": lambda given: {n: v[:, :2] if n in ("indices", "weights") else v for n, v in given.items()},
    "dtype of tokens": lambda given: {**given, "x": given["x"].float()},
    "dtype of weights": lambda given: {**given, "weights": given["weights"].bfloat16()},
    "tokens need a gradient": lambda given: {**given, "x": given["x"].clone().requires_grad_()},
    "weights need a gradient": lambda given: {**given, "weights": given["weights"].clone().requires_grad_()},
}


@everywhere
def different() -> dict[str, str]:
    """One rank calls with something else than the other."""
    given, found = _ep.mine(_ep.problem("random")), {}
    makers = (all_to_all, all_gather)
    kinds = [(make, {}) for make in makers] + [(all_to_all, {"max_rows": 5}), (all_to_all, {"capacity": 15})]
    kinds.append((all_gather, {"tokens_per_rank": 15}))
    for what, change in DIFFERENT.items():
        mine = change(given) if dist.get_rank() else given
        routing = moekit.Routing.from_topk(mine["indices"], mine["weights"], num_experts=EXPERTS)
        for make, options in kinds:
            try:
                make(**options).start(mine["x"], routing)
                said = "nothing"
            except ValueError as error:
                said = str(error)
            found[f"{what}, {make.__name__} {options}"] = said
    return found


def test_different(ranks: list[dict]):
    """Both hear of it, and no message is taken for another."""
    for found in ranks:
        assert len(found["different"]) == 5 * len(DIFFERENT)
        for name, said in found["different"].items():
            assert "the ranks of a group must be given the same, got\n" in said, name
            assert f"  {name.split(',')[0]}: " in said and "on rank 0; " in said, name


@everywhere
def without_this_rank() -> str:
    mesh = dist.device_mesh.DeviceMesh("cpu", [0])
    try:
        return type(moekit.ep.dispatcher(mesh, EXPERTS, 2)).__name__
    except ValueError as error:
        return str(error)


def test_a_mesh_without_this_rank(ranks: list[dict]):
    first, second = (found["without_this_rank"] for found in ranks)
    assert first == "Local" and "group must be one that this rank (1) is in, got DeviceMesh" in second


@everywhere
def meshes() -> list[str]:
    """The dispatchers chosen for a mesh of both ranks, and for a mesh of one."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "ep"))
    made = [moekit.ep.dispatcher(mesh[name], EXPERTS, topk) for name, topk in (("ep", 2), ("ep", 4), ("dp", 4))]
    bounded = moekit.ep.dispatcher(mesh["ep"], EXPERTS, 4, max_rows=8)  # which only one kind has
    return [type(used).__name__ for used in [*made, moekit.ep.dispatcher(None, EXPERTS, 4), bounded]]


def test_meshes(ranks: list[dict]):
    assert all(found["meshes"] == ["AllToAll", "AllGather", "Local", "Local", "AllToAll"] for found in ranks)


def test_local():
    given = _ep.problem("duplicate")
    wanted, found = _ep.alone(given), _ep.together(given, moekit.ep.Local(None, EXPERTS))
    assert equal(wanted, found)
    used = moekit.ep.Local(None, EXPERTS)
    rows, _, handle = used.dispatch(given["x"], _ep.as_routing(given["indices"], given["weights"]))
    with pytest.raises(ValueError, match=r"moekit\.ep\.Local: rows must be of shape"):
        used.combine(rows[1:], handle)
