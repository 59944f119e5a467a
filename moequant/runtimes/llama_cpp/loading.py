"""Loads a file without its weights, in the process that `acceptance` started: it imports next to nothing."""

from __future__ import annotations

import json
import sys

from moequant.errors import MoequantError
from moequant.runtimes.llama_cpp.binding import LlamaError, library

TOKENS = 32
"""Context and batch: shapes of the graph do not depend on it."""


def _check(path: str) -> None:
    """The job itself. LlamaError when llama.cpp refuses."""
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
