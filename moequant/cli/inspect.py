"""`moequant inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from moequant.cli.common import AsJson, CacheDir, guarded, place, tell


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="Hugging Face model folder, GGUF file (the first of several), or a name on the Hub: "
            "OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:FILE.gguf."
        ),
    ],
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Describe a model from its headers: experts, parameters, size of every type, and what can run it."""
    from moequant.library import inspect as run

    tell(guarded(lambda: run(place(path, cache_dir))), as_json)
