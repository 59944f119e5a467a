"""`moequant.library.push`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moequant.hub.publish import Push, PushSettings, prepare, upload
from moequant.progress import Listener, Meter, listening
from moequant.report.push import push_tables, push_value
from moequant.report.shown import Result, View

__all__ = ["PushSettings", "push"]

PUSHED: View[Push] = View("push", push_tables, push_value)


def push(
    name: str,
    folder: str | Path,
    settings: PushSettings = PushSettings(),  # frozen
    agree: Callable[[Result[Push]], bool] | None = None,
    progress: Listener | None = None,
) -> Result[Push]:
    """Publish the files of a folder on the Hub, in one commit to `name` (OWNER/NAME or OWNER/NAME@BRANCH).

    `agree` is called with what would be done, and nothing is uploaded unless it returns True; without it
    nothing is ever uploaded. `found.files` are the files with their bytes, `found.commit` the commit that was
    made, None where nothing was. A repository that is not there is made. HubError when the Hub refuses or
    cannot be reached; OutputError for a folder that has no file.
    """
    with listening(progress):
        planned = Result(prepare(name, Path(folder), settings), PUSHED)
        if agree is None or not agree(planned):
            return planned
        with Meter().stage("upload"):
            return Result(upload(planned.found, settings), PUSHED)
