"""Whether llama.cpp takes a file, asked of its header before there is any weight.

It checks the shape of every tensor, lays out its caches and its graph, and allocates nothing. What it
refuses would else be known at the end of a conversion; of a model larger than memory, by whoever starts it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from moequant.errors import MoequantError, OutputError
from moequant.files import scratch
from moequant.runtimes.llama_cpp.engine import LlamaError, library
from moequant.runtimes.llama_cpp.isolated import ask
from moequant.runtimes.llama_cpp.logits import available

TOKENS = 32
"""Context and batch: shapes of the graph do not depend on it."""


def check(outline: Callable[[Path], None], what: str) -> None:
    """LlamaError when llama.cpp, where it is here, refuses the file that `outline` writes, with a header and
    a hole for weights; `what` names the model. A disk without room or without holes is no reason to stop."""
    if not available():
        return
    with suppress(OSError, OutputError), scratch() as folder:
        header = folder / "header.gguf"
        outline(header)
        ask(__name__, {"path": str(header)}, f"{what}: llama.cpp cannot run a file of this model")


def _check(path: str) -> None:
    """The job itself, in the process that `check` started."""
    lib = library()
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.load_mode, params.no_alloc = 0, 0, True
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise LlamaError(lib.log())
    wanted = lib.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = TOKENS
    if not lib.llama_init_from_model(model, wanted):
        raise LlamaError(lib.log())


def main() -> None:
    """Reads a job from standard input; ends with an error where llama.cpp refuses."""
    try:
        _check(json.load(sys.stdin)["path"])
    except MoequantError as error:
        sys.exit(str(error))
