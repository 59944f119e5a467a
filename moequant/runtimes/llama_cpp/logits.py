"""What llama.cpp computes with a file, in a process of its own: a file that it aborts on ends that one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moequant.runtimes.llama_cpp.binding import LlamaError, library
from moequant.runtimes.llama_cpp.isolated import ask


def available() -> bool:
    """Whether the llama.cpp that is installed is one that can be asked."""
    try:
        library()
    except (LlamaError, OSError):
        return False
    return True


def logits(path: Path, ids: NDArray[np.int64], threads: int = 1) -> NDArray[np.float32]:
    """Logits f32 [rows, n, vocab] after every token of `ids` [rows, n], as exact as llama.cpp computes them.

    LlamaError, with what llama.cpp said, when it refuses the file or does not get through.
    """
    job = {"path": str(path), "ids": ids.tolist(), "threads": threads}
    found = ask(f"{__package__}.computing", job, f"{path}: llama.cpp cannot run it")
    return np.frombuffer(found, np.float32).reshape(*ids.shape, -1)
