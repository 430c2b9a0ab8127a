"""The examples run, at their smallest size, and what they give is right."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from _examples_on_ranks import EXAMPLES, EXPERT_PARALLEL, FSDP2

import moekit
import moekit.hf

pytest.importorskip("rich")
if not EXAMPLES.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)

SMALL = ["--steps", "12", "--tokens", "32", "--batch", "4"]


@pytest.fixture
def example():
    """A loader of examples by name; what they set in the process is undone. Nothing has to be compiled."""

    def load(name: str, *needed: str) -> ModuleType:
        for package in needed:
            pytest.importorskip(package)
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    threads = torch.get_num_threads()
    with moekit.backend("torch"):
        yield load
    torch.set_num_threads(threads)
    if "transformers" in sys.modules:
        moekit.hf.unregister()


def test_every_example_is_short_and_in_the_table():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) >= 8
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= (200 if script.name == "qlora.py" else 150), script.name
        assert f"[{script.name}]({script.name})" in table
        assert f"python examples/{script.name}" in text.split('"""')[1]
        assert "moekit.keep_pages()" in text


def test_language_model(example, tmp_path, capsys):
    module = example("language_model")
    found = module.main(["--steps", "50", "--file", str(tmp_path / "model.pt")])
    assert found.before == pytest.approx(5.7, abs=0.5)  # log 256, and what a first draw is off by
    assert found.after < 3 and found.reloaded == found.after
    assert "busiest expert" in capsys.readouterr().out
    assert len(found.busiest) == 10 and max(found.busiest) > 1.6  # of 8 experts, 2 a token: 4 at most
    assert 1 <= found.busiest[-1] < 1.4
    biases = [value for name, value in torch.load(tmp_path / "model.pt").items() if name.endswith("router.expert_bias")]
    assert len(biases) == 2 and all(bias.abs().max() >= 0.01 for bias in biases)
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 256
    ours, others = found.model(tokens), found.model(changed)
    torch.testing.assert_close(others[:, :20], ours[:, :20])  # no byte sees later ones
    assert (others[:, 20:] - ours[:, 20:]).abs().amax(2).gt(1e-4).any(0).all()  # and all see earlier ones


def test_trainer_lora(example, tmp_path):
    module = example("trainer_lora", "transformers", "peft", "accelerate")
    found = module.main([*SMALL, "--out", str(tmp_path)])
    assert found.after < found.before - 0.5
    assert found.reloaded == pytest.approx(found.after, abs=1e-5)
    assert 0 < found.difference < 1e-4
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 10_000


def test_replay(example):
    steps = example("replay", "transformers").main(["--steps", "3"])
    assert steps[-1].reward > steps[0].reward
    for step in steps:
        assert 0 < step.other_choices < 0.2
        assert 0 < step.with_replay < 0.5 * step.without_replay


FRAMEWORK = """
    import torch

    def permute(tokens, routing_map, probs=None, num_out_tokens=None, fused=False, drop_and_pad=False):
        order = routing_map.T.nonzero()[:, 1]
        return tokens[order], None if probs is None else probs.T[routing_map.T], order

    def unpermute(permuted_tokens, sorted_indices, restore_shape, probs=None, routing_map=None, fused=False,
                  drop_and_pad=False):
        if probs is not None:
            permuted_tokens = permuted_tokens * probs.T[routing_map.T].unsqueeze(1)
        empty = torch.zeros(restore_shape, dtype=permuted_tokens.dtype)
        return empty.index_add(0, sorted_indices, permuted_tokens)
"""


def test_drop_in(example, tmp_path, monkeypatch, capsys):
    """With one framework that is there, and one that is not."""
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "megatron"}
    folder = tmp_path / "megatron/core/transformer/moe"
    folder.mkdir(parents=True)
    (folder / "moe_utils.py").write_text(textwrap.dedent(FRAMEWORK))
    for parent in (folder, *folder.parents[:3]):
        (parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    module = example("drop_in")
    monkeypatch.setattr(module, "FRAMEWORKS", ("no_such_framework.moe_utils", "megatron.core.transformer.moe.moe_utils"))
    try:
        found = module.main(["--tokens", "64"])
        ours = sys.modules["megatron.core.transformer.moe.moe_utils"].permute
        assert ours.__module__ == "megatron.core.transformer.moe.moe_utils"  # uninstalled
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
            del sys.modules[name]
        sys.modules.update(held)
    assert list(found) == ["plain PyTorch", "moekit.experts", "moekit.moe_utils", "megatron", "megatron after install()"]
    for error, gradient_error, kept, seconds in found.values():
        assert 0 < error < 1e-5 and 0 < gradient_error < 1e-5 and kept > 0 and seconds > 0
    kept = {name: one[2] for name, one in found.items()}
    row = 64 * module.TOPK * 4  # of one column
    # One tensor [R, 2I], and small ones; the frameworks' form keeps the rows and the activation as well.
    assert row * 2 * module.INTERMEDIATE <= kept["moekit.experts"] < row * (2 * module.INTERMEDIATE + 30)
    assert kept["moekit.moe_utils"] > kept["moekit.experts"] + row * (module.HIDDEN + module.INTERMEDIATE)
    shown = " ".join(capsys.readouterr().out.split())
    assert "no_such_framework cannot be imported" in shown and "install() replaced 2 names" in shown


def test_compile_and_graphs(example, monkeypatch, capsys):
    module = example("compile_and_graphs")
    monkeypatch.setattr(module, "LAYERS", 1)
    torch._dynamo.reset()
    try:
        found = module.main([])
    finally:
        torch._dynamo.reset()
    assert "1 graph, 0 breaks" in capsys.readouterr().out
    assert list(found) == ["plain", "compiled", "autocast", "plain, checkpointed", "compiled, checkpointed"]
    for name, (output, gradients, kept, _) in found.items():
        if name == "autocast":
            assert 1e-4 < output < 5e-3 and 1e-4 < gradients < 3e-2  # bfloat16
        else:
            assert output < 1e-5 and gradients < 1e-5
        assert (kept < 0.4 * found["plain"][2]) == name.endswith("checkpointed")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """What rank 0 and rank 1 got, and where the checkpoint is."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("_examples_on_ranks.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(script), str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)], folder / "checkpoint"


def test_expert_parallel(example, on_two_ranks):
    """Two ranks train the model of one, and one goes on from their checkpoint."""
    module = example("expert_parallel")
    losses, norms, after, reloaded = module.main(EXPERT_PARALLEL)
    assert losses[-1] < losses[0] - 0.5 and reloaded == after
    ranks, checkpoint = on_two_ranks
    for rank in ranks:
        assert rank["expert_parallel"][0] == pytest.approx(losses, rel=1e-5)
        assert rank["expert_parallel"][1] == pytest.approx(norms, rel=1e-4)
        assert rank["expert_parallel"][2:] == pytest.approx((after, after), rel=1e-4)
    resumed, *_ = module.main(["--steps", "1", "--resume", str(checkpoint)])
    assert resumed[0] < losses[0] - 0.5


def test_fsdp2(example, on_two_ranks):
    """Two ranks that share or copy everything train the model of one."""
    module, ((first, second), _) = example("fsdp2"), on_two_ranks
    alone = {}
    for arguments in FSDP2:
        name = " ".join(arguments)
        losses, everything, state = alone[name] = module.main(arguments)
        assert losses[-1] < losses[0] - 0.5
        for theirs, here, _ in (first[name], second[name]):
            assert theirs == pytest.approx(losses, rel=0.01 if "--bf16" in arguments else 1e-4)
            assert here == (everything if "ddp" in arguments else everything // 2)
        for key, value in state.items():
            torch.testing.assert_close(first[name][2][key], value, rtol=0.1, atol=0.02)  # of a few steps of Adam
    plain, _, reduced = (losses for losses, _, _ in alone.values())
    assert reduced != plain and reduced == pytest.approx(plain, rel=0.01)  # bfloat16


def test_qlora_learns_and_its_adapter_is_read_back(example, tmp_path, capsys):
    module = example("qlora", "transformers", "peft")
    data = str(Path(moekit.__file__).parent)
    found = module.main([*SMALL, "--data", data, "--windows", "8", "--out", str(tmp_path), "--merge"])
    again = moekit.hf.load(tmp_path / "merged")
    assert found.after < found.before - 0.5
    assert found.reloaded == found.after
    assert found.merged == pytest.approx(found.after, abs=0.05)
    packed = [weight for weight in again.parameters() if isinstance(weight, moekit.PackedExperts)]
    assert len(packed) == 2 * again.config.num_hidden_layers
    printed = capsys.readouterr().out
    for text in ("in nf4", "step   12/12", "tokens/s", "Peak: "):
        assert text in printed


def test_qlora_takes_a_model_with_a_tokenizer(example, tmp_path):
    """The way of a real model, with one small enough."""
    module = example("qlora", "transformers", "peft")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=letters, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    module.save_tiny_model(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    data = str(Path(moekit.__file__).parent)
    small = [*SMALL, "--data", data, "--windows", "8"]
    found = module.main([*small, "--model", str(tmp_path), "--steps", "2", "--format", "mxfp4"])
    assert found.merged is None and found.reloaded == found.after != found.before
