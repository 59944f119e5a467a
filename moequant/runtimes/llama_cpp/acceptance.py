"""Whether llama.cpp takes a file, asked of its header before there is any weight.

It checks the shape of every tensor, lays out its caches and its graph, and allocates nothing. What it
refuses would else be known at the end of a conversion; of a model larger than memory, by whoever starts it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from moequant.errors import OutputError
from moequant.files import scratch
from moequant.runtimes.llama_cpp.isolated import ask
from moequant.runtimes.llama_cpp.logits import available


def check(outline: Callable[[Path], None], what: str) -> None:
    """LlamaError when llama.cpp, where it is here, refuses the file that `outline` writes, with a header and
    a hole for weights; `what` names the model. A disk without room or without holes is no reason to stop."""
    if not available():
        return
    with suppress(OSError, OutputError), scratch() as folder:
        header = folder / "header.gguf"
        outline(header)
        job = {"path": str(header)}
        ask(f"{__package__}.loading", job, f"{what}: llama.cpp cannot run a file of this model")
