"""`moequant push`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moequant.cli.common import AsJson, console, guarded, tell
from moequant.errors import HubError

if TYPE_CHECKING:
    from moequant.report.shown import Result


def push(
    name: Annotated[
        str,
        typer.Argument(
            help="Repository on the Hub: OWNER/NAME, or OWNER/NAME@BRANCH. Made if it is not there."
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(help="The folder with the files, such as `moequant convert -o FOLDER` made.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Let only you see a repository that is made.")
    ] = False,
    message: Annotated[
        str | None, typer.Option(help="What the commit says (default: which moequant uploaded it).")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Upload without asking.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded, and upload nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a folder on the Hugging Face Hub: show what would be uploaded, and upload it once you agree."""
    from moequant.library import PushSettings
    from moequant.library import push as run
    from moequant.report.push import uploaded

    def agree(planned: Result[Any]) -> bool:
        if not as_json:
            tell(planned, False)
        if dry_run:
            return False
        if yes:
            return True
        if as_json or not sys.stdin.isatty():
            raise HubError(
                f"{name}: nothing was uploaded, for nobody can be asked here; --yes uploads without asking, "
                "--dry-run only shows"
            )
        return typer.confirm("Upload?", err=True)

    done = guarded(lambda: run(name, folder, PushSettings(private, message), agree))
    if as_json:
        tell(done, True)
    else:
        console().print(uploaded(done.found))
