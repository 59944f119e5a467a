"""The fast mode: a few hundred hostile inputs, in a process that imports once and forks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import models
from tests.forks import python
from tests.hostile.keys import broken

INPUTS = 220


def test_every_input_gets_a_result_or_one_line() -> None:
    ran = python("-m", "tests.hostile", "--inputs", INPUTS)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-3000:]
    assert f"{INPUTS} inputs" in ran.stdout


@pytest.mark.parametrize("family", ["qwen3_moe", "mimo_v2_flash"])
def test_every_key_of_a_config_with_values_that_are_none(tmp_path: Path, family: str) -> None:
    """Two families here, `python -m tests.hostile.keys` tries all."""
    assert list(broken(models.build(tmp_path / family, family))) == []
