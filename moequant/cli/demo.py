"""`moequant demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moequant.cli.common import AsJson, Details, Effort, EffortOption, Overwrite, Type, console, emit, guarded


def demo(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep the GGUF file under this name.")
    ] = None,
    type_: Type = "Q4_K_M",
    effort: EffortOption = Effort.default,
    details: Details = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Convert the tiny trained MoE that ships with moequant, and print the report."""
    from moequant.commands.convert import Settings
    from moequant.commands.convert import convert as run
    from moequant.files import scratch
    from moequant.text import bundled

    # A model this small has nothing more to learn from the rest of the bundled text.
    settings = Settings(type_, calib_tokens=32_768, effort=effort.value, overwrite=overwrite)

    def work() -> None:
        with scratch() as folder:
            target = out or folder / f"demo-{type_}.gguf"
            report = run(bundled.path("demo"), target, settings)
            if as_json:
                emit("demo", report.value())
            else:
                console().print(report.renderable(details))

    guarded(work)
    if out is None and not as_json:
        typer.echo("The file was made in a temporary folder and is gone; -o FILE keeps it.")
