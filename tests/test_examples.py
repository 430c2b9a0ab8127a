"""The examples run, at their smallest size."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import moekit.hf

for needed in ("transformers", "peft", "rich"):
    pytest.importorskip(needed)

FOLDER = Path(__file__).parents[1] / "examples"
if not FOLDER.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)

SMALL = ["--data", str(Path(moekit.__file__).parent), "--steps", "12", "--tokens", "32", "--batch", "4", "--windows", "8"]


@pytest.fixture
def qlora(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("qlora")
    moekit.hf.unregister()
    torch.set_num_threads(threads)


def test_qlora_learns_and_its_adapter_is_read_back(qlora, tmp_path, capsys):
    with moekit.backend("torch"):
        found = qlora.main([*SMALL, "--out", str(tmp_path), "--merge"])
        again = moekit.hf.load(tmp_path / "merged")
    assert found.after < found.before - 0.5
    assert found.reloaded == found.after
    assert found.merged == pytest.approx(found.after, abs=0.05)
    packed = [weight for weight in again.parameters() if isinstance(weight, moekit.PackedExperts)]
    assert len(packed) == 2 * again.config.num_hidden_layers
    printed = capsys.readouterr().out
    for text in ("in nf4", "step   12/12", "tokens/s", "Peak: "):
        assert text in printed


def test_qlora_takes_a_model_with_a_tokenizer(qlora, tmp_path):
    """The way of a real model, with one small enough."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=letters, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    qlora.save_tiny_model(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with moekit.backend("torch"):
        found = qlora.main([*SMALL, "--model", str(tmp_path), "--steps", "2", "--format", "mxfp4"])
    assert found.merged is None and found.reloaded == found.after != found.before
