"""`moequant inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moequant.cli.common import console, guarded


def inspect(
    path: Annotated[
        Path, typer.Argument(help="Hugging Face model folder, or GGUF file (the first of several).")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Describe a model from its headers: experts, active parameters, bytes by role, sizes, support."""
    from moequant.inspection import inspect as run
    from moequant.report.inspect import inspection_json, inspection_report

    found = guarded(lambda: run(path))
    if as_json:
        typer.echo(json.dumps(inspection_json(found), indent=1, ensure_ascii=False))
    else:
        console().print(inspection_report(found))
