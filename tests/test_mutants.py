"""The mutation script works: it catches a mutant, and does not catch one that breaks nothing."""

from __future__ import annotations

import pytest
from mutants import CONTROL, MUTANTS, failures

ENOUGH = ("tests/test_glu.py", "-k", "test_value_and_gradients and quick_gelu-alpha")


@pytest.mark.parametrize("name", ["the output is zero", "gate and up are swapped in the gradient"])
def test_mutants_are_caught(name):
    assert failures(name, ENOUGH)


def test_what_is_not_broken_passes():
    assert failures(CONTROL, ENOUGH) == []
    assert len(MUTANTS) > 12
