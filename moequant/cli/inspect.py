"""`moequant inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from moequant.cli.common import AsJson, CacheDir, console, emit, guarded, place


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="Hugging Face model folder, GGUF file (the first of several), or a name of the Hub: "
            "OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:FILE.gguf."
        ),
    ],
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Describe a model from its headers: experts, active parameters, bytes by role, sizes, support."""
    from moequant.inspection import inspect as run
    from moequant.report.inspect import inspection_json, inspection_report

    found = guarded(lambda: run(place(path, cache_dir)))
    if as_json:
        emit("inspect", inspection_json(found))
    else:
        console().print(inspection_report(found))
