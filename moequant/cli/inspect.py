"""`moequant inspect`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moequant.cli.common import CacheDir, console, guarded, place


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="Hugging Face model folder, GGUF file (the first of several), or a name of the Hub: "
            "OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:FILE.gguf."
        ),
    ],
    cache_dir: CacheDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Describe a model from its headers: experts, active parameters, bytes by role, sizes, support."""
    from moequant.inspection import inspect as run
    from moequant.report.inspect import inspection_json, inspection_report

    found = guarded(lambda: run(place(path, cache_dir)))
    if as_json:
        typer.echo(json.dumps(inspection_json(found), indent=1, ensure_ascii=False))
    else:
        console().print(inspection_report(found))
