"""`moequant.library.check`."""

from __future__ import annotations

from moequant.check.figures import CheckReport
from moequant.commands import check as checking
from moequant.commands.check import CheckSettings
from moequant.hub import Model
from moequant.progress import Listener, listening
from moequant.report.check import check_json, check_report
from moequant.report.shown import Result, View

__all__ = ["CheckSettings", "check"]

CHECKED = View("check", check_report, check_json)


def check(
    out: Model,
    settings: CheckSettings = CheckSettings(),  # frozen
    progress: Listener | None = None,
) -> Result[CheckReport]:
    """Check a GGUF file or a quantized folder: its bytes, and with a baseline every expert.

    `found.holds` says whether all is well, `found.damages` what is not and where. VerifyError for a file
    that cannot be read at all, or a baseline that does not fit.
    """
    with listening(progress):
        return Result(checking.check(out, settings), CHECKED)
