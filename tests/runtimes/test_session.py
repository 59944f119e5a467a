"""The processes that ask llama.cpp something start quickly, and answer as this one would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moequant.runtimes.llama_cpp.binding import LlamaError
from moequant.runtimes.llama_cpp.engine import Llama
from moequant.runtimes.llama_cpp.logits import logits
from moequant.runtimes.llama_cpp.session import Session


@pytest.mark.parametrize("module", ["computing", "loading"])
def test_a_process_for_llama_cpp_imports_no_numpy(module: str) -> None:
    """It would take longer than all else that the process does with a small model."""
    code = f"import sys, moequant.runtimes.llama_cpp.{module}; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_logits_of_another_process_are_the_same(demo_file: Path) -> None:
    ids = np.arange(1, 21).reshape(2, 10)
    with Llama(demo_file, threads=1) as llama:
        here = np.stack([llama.logits(row) for row in ids.tolist()])
    there = logits(demo_file, ids)
    assert there.shape == here.shape and np.ptp(here) > 1
    np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize("ids", [[], [-1], [1, 1 << 20]])
def test_tokens_that_are_none_are_refused(demo_file: Path, ids: list[int]) -> None:
    with Session(demo_file) as session:
        session.start(len(ids))
        with pytest.raises(LlamaError, match="token ids must lie in 0…"):
            session.decode(ids, every=True)
