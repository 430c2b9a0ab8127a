"""The script of the documents that defines, trains, watches, saves and loads a language model does all of that."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "docs" / "language_model.py"


def test_the_script_of_the_documents(tmp_path, capsys):
    names = runpy.run_path(str(SCRIPT))
    losses, model, again = names["main"](60, str(tmp_path / "model.pt"))
    assert losses[0] == pytest.approx(5.7, abs=0.5)  # log 256, and what a first draw is off by
    assert sum(losses[-5:]) / 5 < 3.3
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and "busiest expert" in shown[-1]
    windows = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.loss(windows), again.loss(windows))
    assert 1.0 <= float(shown[-1].split()[-4]) <= 4.0  # of 8 experts, 2 a token
    biases = [value for name, value in again.state_dict().items() if name.endswith("router.expert_bias")]
    assert len(biases) == 2 and all(bias.abs().max() >= 0.01 for bias in biases)
    changed = windows[:, :-1].clone()
    changed[:, 20] += 1
    torch.testing.assert_close(model(changed % 256)[:, :20], model(windows[:, :-1])[:, :20])  # no byte sees later ones
