"""What llama.cpp computes with a file, in a process of its own: a file that it aborts on ends that one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moequant.errors import MoequantError, one_line
from moequant.runtimes.llama_cpp.engine import Llama, LlamaError, library
from moequant.runtimes.llama_cpp.isolated import command


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
    done = subprocess.run(command(__name__), input=json.dumps(job).encode(), capture_output=True, check=False)
    if done.returncode != 0:
        reason = one_line(done.stderr.decode(errors="replace")[-300:]) if done.stderr else ""
        raise LlamaError(f"{path}: llama.cpp cannot run it ({reason or f'ended with {done.returncode}'})")
    return np.frombuffer(done.stdout, np.float32).reshape(*ids.shape, -1)


def main() -> None:
    """Reads a job from standard input, writes logits to standard output."""
    job = json.load(sys.stdin)
    try:
        with Llama(job["path"], n_ctx=len(job["ids"][0]), threads=job["threads"]) as model:
            for row in job["ids"]:
                sys.stdout.buffer.write(model.logits(row).tobytes())
    except MoequantError as error:
        sys.exit(str(error))
