"""Computes logits with a file, in the process that `logits` started: it imports next to nothing."""

from __future__ import annotations

import json
import sys

from moequant.errors import MoequantError
from moequant.runtimes.llama_cpp.session import Session


def main() -> None:
    """Reads a job from standard input, writes logits to standard output."""
    job = json.load(sys.stdin)
    try:
        with Session(job["path"], n_ctx=len(job["ids"][0]), threads=job["threads"]) as model:
            for row in job["ids"]:
                model.start(len(row))
                sys.stdout.buffer.write(model.decode(row, every=True))
    except MoequantError as error:
        sys.exit(str(error))
