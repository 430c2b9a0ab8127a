"""moekit.hf under the tensor, expert and data parallelism of Transformers, on gloo ranks: as one process."""

from __future__ import annotations

import functools
import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks, preload
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moekit.ep
import moekit.hf
from moekit.hf import _register

transformers = pytest.importorskip("transformers")
if _register._expert_parallel() is None:
    pytest.skip("Transformers before 5.24 has no registry of expert parallelism", allow_module_level=True)
preload("transformers.modeling_utils", "transformers.distributed", "moekit.hf")

STEPS, FEW = 8, 3
BATCH, LENGTH = 4, 5

# What is the same with one process: layouts by the number of ranks.
LAYOUTS = {
    2: {
        "EP=2": {"fsdp_size": 2, "ep_size": 2},
        "EP=2 on one batch": {"tp_size": 2, "ep_size": 2},
    },
    4: {
        "EP=4": {"fsdp_size": 4, "ep_size": 4},
        "EP=2 x DP=2": {"fsdp_size": 4, "ep_size": 2},
        "EP=2 x TP=2": {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
        "EP=4, TP=2": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    },
}
ALSO = ("EP=2 on one batch", "EP=4, TP=2")  # a few steps
# Of these, too: experts and options.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "all-gather": ("eager", {"kind": "all_gather"}),
    "rounds": ("grouped_mm", {"kind": "all_to_all", "max_rows": 6}),
    "checkpoints": ("moekit", {}),
}
# Of these, one step: what of moekit is the experts alone, whose tokens are Transformers' to bring.
OTHERS = {
    "tensor parallel": {"tp_size": 2},
    "all-to-all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "all-reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "FSDP2": {"fsdp_size": 2},
}
# K is above the experts of a rank, where there are four.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "GptOss": {
        **{"num_local_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 24, "head_dim": 8},
        "layer_types": ["full_attention"],
    },
    "DeepseekV3": {
        **{"n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "n_shared_experts": 1},
        **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
COMMON = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": False},
}


# --- models: a step of one is a step of the other ---------------------------------------------------------------------


def batch() -> Tensor:
    return torch.randint(1, 96, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))


def whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def step(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The loss, the logits and the gradients of one step, gathered."""
    out = model(inputs, labels=inputs)
    out.loss.backward()
    grads = {name: whole(p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": whole(out.logits).detach(), **grads}


def local(value: Any, like: Any) -> Tensor:
    """What this rank has of ``value``, placed as ``like``."""
    return value.redistribute(placements=like.placements).to_local() if hasattr(like, "placements") else value


def trained(model: nn.Module, inputs: Tensor, steps: int = STEPS) -> list[float]:
    """The losses of some steps of gradient descent with momentum, on what each rank has of a parameter."""
    speeds: dict[str, Tensor] = {}
    losses = []
    for _ in range(steps):
        loss = model(inputs, labels=inputs).loss
        loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    speeds[name] = 0.9 * speeds.get(name, 0) + local(parameter.grad, parameter)
                    local(parameter, parameter).sub_(0.3 * speeds[name])
                    parameter.grad = None
        losses.append(float(loss.detach()))
    return losses


def load(folder: str, kind: str, experts: str = "moekit", **layout: Any) -> nn.Module:
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**layout) if layout else None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/{kind}", distributed_config=config, experts_implementation=experts, dtype=torch.float32
    )
    return model.train()


def trained_on_a_rank(folder: str) -> dict[tuple[str, str], list[float]]:
    """The mean loss of all ranks, with moekit's exchange and for some steps with Transformers'."""
    found = {}
    for layout, settings in LAYOUTS[dist.get_world_size()].items():
        shards = settings.get("fsdp_size", 1)
        mine = batch().chunk(shards)[dist.get_rank() // settings.get("tp_size", 1)]
        for kind in MODELS:
            model = load(folder, kind, ep_implementation="moekit", **settings)
            found[layout, kind, "moekit"] = averaged(trained(model, mine, FEW if layout in ALSO else STEPS))
        theirs = load(folder, "Qwen3Moe", ep_implementation="all_to_all", **settings)
        found[layout, "Qwen3Moe", "all_to_all"] = averaged(trained(theirs, mine, FEW))
    world = dist.get_world_size()
    for name, (experts, options) in WAYS.items():
        moekit.hf.register(expert_parallel=options)
        model = load(folder, "GptOss", experts, fsdp_size=world, ep_size=2, ep_implementation="moekit")
        if name == "checkpoints":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found[name, "GptOss", experts] = averaged(trained(model, batch().chunk(world)[dist.get_rank()], FEW))
    return found


def averaged(losses: list[float]) -> Tensor:
    of_all = torch.tensor(losses)
    dist.all_reduce(of_all)
    return of_all / dist.get_world_size()


def one_step_on_a_rank(folder: str) -> dict[tuple[str, str, str], dict[str, Tensor]]:
    """One step on the same batch, where moekit has the experts only."""
    return {
        (kind, layout, experts): step(load(folder, kind, experts, **settings), batch())
        for kind in ("Qwen3Moe", "Mixtral")
        for layout, settings in OTHERS.items()
        for experts in ("grouped_mm", "moekit")
    }


# --- one module: every implementation of experts, every number of tokens ------------------------------------------------

EXPERTS, TOPK, HIDDEN, INNER = 8, 4, 32, 16
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "moekit")
# Tokens of each batch by the ranks that share one: slices are uneven, and some empty.
TOKENS = {1: (5, 0, 7, 3), 2: (5, 1), 4: (3,)}
KINDS = ("random", "collapsed", "no tokens")
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "all-gather": {"kind": "all_gather"},
    "capacity": {"kind": "all_to_all", "capacity": 8},
    "rounds": {"kind": "all_to_all", "max_rows": 4},
    "redispatch": {"kind": "all_to_all", "redispatch": True},
}


CASES = [
    *(("GptOss", implementation, "auto") for implementation in IMPLEMENTATIONS),
    *(("Qwen3Moe", implementation, "auto") for implementation in IMPLEMENTATIONS),
    *(("GptOss", implementation, options) for implementation in ("eager", "moekit") for options in [*OPTIONS][1:]),
    ("GptOss", "grouped_mm", "capacity"),
]


def problem(kind: str, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """All batches: tokens, their choice, its weights and the gradient of the output."""
    g = torch.Generator().manual_seed(3)
    count = 0 if kind == "no tokens" else sum(sizes)
    random = torch.rand(count, EXPERTS, generator=g).argsort(1)[:, :TOPK]
    return {
        "x": torch.randn(count, HIDDEN, generator=g),
        "index": torch.arange(2).repeat(count, 1) if kind == "collapsed" else random,  # to the first of four ranks
        "weights": torch.rand(count, 2 if kind == "collapsed" else TOPK, generator=g),
        "grad": torch.randn(count, HIDDEN, generator=g),
    }


def experts_of(name: str, implementation: str, rank: int = 0, ranks: int = 1, inner: int = INNER, **sizes: int) -> Any:
    """An experts module of a class of Transformers, with the share of a rank."""
    settings = {**COMMON, **MODELS[name], "intermediate_size": inner, "moe_intermediate_size": inner, **sizes}
    settings["num_local_experts" if name == "GptOss" else "num_experts"] = settings.pop("experts", EXPERTS)
    config = getattr(transformers, f"{name}Config")(**settings)
    config._experts_implementation = implementation
    lower = {"Qwen3Moe": "qwen3_moe", "GptOss": "gpt_oss"}[name]
    module = getattr(importlib.import_module(f"transformers.models.{lower}.modeling_{lower}"), f"{name}Experts")(config)
    g = torch.Generator().manual_seed(4)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=g).mul_(0.3).chunk(ranks)[rank].clone()
    module.num_experts, module._is_expert_parallel = module.num_experts // ranks, ranks > 1
    return module


def through(experts: Callable[..., Tensor], module: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    x, weights = given["x"].clone().requires_grad_(), given["weights"].clone().requires_grad_()
    out = experts(x, given["index"], weights)
    out.backward(given["grad"])
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **{n: p.grad for n, p in module.named_parameters()}}


def experts_on_a_rank() -> dict[tuple, dict[str, Tensor]]:
    found = {}
    rank, world = dist.get_rank(), dist.get_world_size()
    ep_mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    for sharing, sizes in TOKENS.items():
        tp_mesh = dist.init_device_mesh("cpu", (world // sharing, sharing), mesh_dim_names=("dp", "tp"))["tp"]
        for kind in KINDS:
            counts = [0] * len(sizes) if kind == "no tokens" else list(sizes)
            given = {name: value.split(counts)[rank // sharing] for name, value in problem(kind, sizes).items()}
            for name, implementation, options in CASES if sharing == 2 else CASES[: len(IMPLEMENTATIONS)]:
                module = experts_of(name, implementation, rank, world)
                experts = interface()["moekit"](module, ep_mesh, tp_mesh, **OPTIONS[options])
                found[sharing, kind, name, implementation, options] = through(experts, module, given)
    return found


def registry() -> Any:
    from transformers.distributed.expert_parallel import EPImplementationInterface

    return EPImplementationInterface()


def interface() -> Any:
    moekit.hf.register()
    return registry()


def check_experts(found: list[dict[tuple, dict[str, Tensor]]]) -> None:
    """All ranks equal one process with all experts, which has seen every batch once."""
    world = len(found)
    for sharing, kind, name, implementation, options in found[0]:
        sizes = TOKENS[sharing]
        module = experts_of(name, "batched_mm")
        wanted = through(module, module, problem(kind, sizes))
        counts = [0] * len(sizes) if kind == "no tokens" else list(sizes)
        for rank in range(world):
            case = (sharing, kind, name, implementation, options)
            for what, value in found[rank][case].items():
                of_tokens = what in ("out", "x", "weights")
                mine = wanted[what].split(counts)[rank // sharing] if of_tokens else wanted[what]
                if not of_tokens:
                    mine = torch.zeros_like(getattr(module, what)) if mine is None else mine
                    mine = mine.chunk(world)[rank]
                torch.testing.assert_close(value, mine, rtol=1e-4, atol=1e-5, msg=lambda m, c=case, w=what: f"{c} {w}: {m}")


# --- beside Transformers' own -------------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Bytes that this rank sends to others by all-to-all, of whoever's collectives."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops._c10d_functional.all_to_all_single.default, torch.ops.c10d.alltoall_base_.default):
            functional = func is torch.ops._c10d_functional.all_to_all_single.default
            sent, splits = (args[0], args[2]) if functional else (args[1], args[4])
            rows = sent.shape[0] - (splits[dist.get_rank()] if splits else sent.shape[0] // dist.get_world_size())
            self.bytes += rows * sent[:1].numel() * sent.element_size()
        return func(*args, **(kwargs or {}))


@contextmanager
def kept(but: nn.Module) -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps, but for weights."""
    saved: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in but.parameters()}

    def see(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            saved[place] = tensor.detach()
        return tensor

    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        yield found
    found.extend(saved.values())


WIDE = {"experts": 64, "num_experts_per_tok": 8, "hidden_size": 128}
MANY = 128  # tokens of a rank


def measured_on_a_rank() -> dict[str, dict[str, Any]]:
    """A layer's exchange with experts of moekit's: what goes over the wire, what is kept, and what comes out."""
    g = torch.Generator().manual_seed(7 + dist.get_rank())
    given = {
        "x": torch.randn(MANY, 128, generator=g),
        "index": torch.rand(MANY, 64, generator=g).argsort(1)[:, :8],
        "weights": torch.rand(MANY, 8, generator=g),
    }
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
    found = {}
    for name, options in {"moekit": {"kind": "all_to_all"}, "all_to_all": {}}.items():
        module = experts_of("Qwen3Moe", "moekit", dist.get_rank(), dist.get_world_size(), inner=48, **WIDE)
        implementation = interface()[name](module, mesh["ep"], mesh["tp"], **options)
        x, weights = given["x"].clone().requires_grad_(), given["weights"].clone().requires_grad_()
        with Sent() as sent, moekit.ep.traffic() as seen:
            with kept(module) as saved:
                out = implementation(x, given["index"], weights)
            out.sum().backward()
        found[name] = {
            **{"sent": sent.bytes, "seen": seen.total, "shapes": Counter(tuple(t.shape) for t in saved)},
            **{"kept": sum(t.untyped_storage().nbytes() for t in saved), "out": out.detach(), "x": x.grad},
            **{"weights": weights.grad, "down": module.down_proj.grad},
        }
    return found


def check_measured(found: list[dict[str, dict[str, Any]]]) -> None:
    ours, theirs = ([of_rank[name] for of_rank in found] for name in ("moekit", "all_to_all"))
    for one, other in zip(ours, theirs, strict=True):
        for name in ("out", "x", "weights", "down"):
            assert (one[name] - other[name]).abs().max() <= 1e-5 * other[name].abs().max()
        assert one["sent"] == one["seen"]
        assert one["sent"] <= 0.5 * other["sent"], (one["sent"], other["sent"])
        assert one["kept"] <= 0.5 * other["kept"], (one["kept"], other["kept"])
        rows = [shape for shape in one["shapes"] if shape[-1] == 128]
        assert rows and all(shape[0] < 4 * MANY for shape in rows), rows  # no row of a slot, of which there are 8 * MANY
    for what in ("sent", "kept"):
        mine, other = (sum(of_rank[what] for of_rank in part) / len(part) / MANY for part in (ours, theirs))
        print(f"bytes {what} a token: moekit {mine:.0f}, all_to_all {other:.0f} ({mine / other:.2f})")


# --- what is refused ------------------------------------------------------------------------------------------------------


def refused_on_a_rank(folder: str) -> dict[str, str]:
    """The errors of what cannot be right."""
    import peft

    sharded = {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "moekit"}
    adapted = peft.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "tp"))
    attempts: dict[str, Callable[[], Any]] = {
        "adapters": lambda: peft.get_peft_model(load(folder, "Qwen3Moe", **sharded), adapted)(batch()),
        "packing": lambda: moekit.hf.pack(load(folder, "Qwen3Moe", **sharded)),
        "an unknown option": lambda: interface()["moekit"](
            experts_of("Qwen3Moe", "moekit", dist.get_rank(), 2), mesh["ep"], mesh["tp"], max_row=8
        ),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


REFUSED = {
    "adapters": r"NotImplementedError: moekit\.hf: down_proj has adapters, and its experts are sharded.*ep_size=1",
    "packing": r"ValueError: moekit\.hf\.pack: model must be one with experts that can be packed, got .* a DTensor",
    "an unknown option": r"ValueError: moekit\.ep\.dispatcher: max_row=8 has no effect",
}


def test_a_release_without_the_registry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moekit.hf._register._expert_parallel", lambda: None)
    moekit.hf.register()
    with pytest.raises(ValueError, match=r"hf\.register: expert_parallel=.* has no effect before Transformers 5\.24"):
        moekit.hf.register(expert_parallel={"max_rows": 8})


def test_the_registry():
    assert interface()["moekit"].keywords == {}
    moekit.hf.register(expert_parallel={"max_rows": 8})
    assert registry()["moekit"].keywords == {"max_rows": 8}
    moekit.hf.unregister()
    assert "moekit" not in registry()
    moekit.hf.register()


# --- all of them, in one start of each number of ranks ------------------------------------------------------------------


def on_two(folder: str) -> Any:
    moekit.hf.register()
    return trained_on_a_rank(folder), one_step_on_a_rank(folder), refused_on_a_rank(folder)


def on_four(folder: str) -> Any:
    moekit.hf.register()
    return trained_on_a_rank(folder), experts_on_a_rank(), measured_on_a_rank()


@functools.lru_cache(maxsize=1)
def alone(folder: str) -> tuple[dict[str, list[float]], dict[str, dict[str, Tensor]]]:
    """One process: losses of all steps, and one step's gradients."""
    losses, steps = {}, {}
    for kind, settings in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**COMMON, **settings})
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(f"{folder}/{kind}")
        losses[kind] = trained(load(folder, kind, "eager"), batch())
        steps[kind] = step(load(folder, kind, "eager"), batch())
    return losses, steps


def check_trained(found: dict[tuple[str, str, str], Tensor], losses: dict[str, list[float]]) -> None:
    for (layout, kind, implementation), values in found.items():
        wanted = torch.tensor(losses[kind])[: len(values)]
        worst = (values - wanted).abs().max() / wanted.abs().max()
        assert worst <= 1e-5, (layout, kind, implementation, worst)
        assert len(values) < STEPS or values[-1] < 0.7 * values[0], (layout, kind)  # it has trained


@pytest.mark.slow
def test_two_ranks(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    folder = str(tmp_path_factory.getbasetemp())
    losses, steps = alone(folder)
    (trained_losses, found, errors), _ = on_ranks(on_two, 2, tmp_path, folder, timeout=120)
    check_trained(trained_losses, losses)
    for name, wanted in REFUSED.items():
        assert re.match(wanted, errors[name]), (name, errors)
    for (kind, layout, experts), values in found.items():
        peer = found[kind, layout, "grouped_mm"]
        assert values.keys() == peer.keys()
        for name, value in values.items():
            assert (value - peer[name]).abs().max() <= 1e-5 * peer[name].abs().max() + 1e-7, (kind, layout, experts, name)
        for name in ("loss", "logits"):
            wanted = steps[kind][name]
            assert (values[name] - wanted).abs().max() <= 1e-4 * wanted.abs().max(), (kind, layout, experts, name)


@pytest.mark.slow
def test_four_ranks(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    folder = str(tmp_path_factory.getbasetemp())
    losses, _ = alone(folder)
    found = on_ranks(on_four, 4, tmp_path, folder, timeout=120)
    check_trained(found[0][0], losses)
    check_experts([of_rank[1] for of_rank in found])
    check_measured([of_rank[2] for of_rank in found])
