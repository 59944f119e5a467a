"""A conversion as one page: verdicts, a row a file, and what happened to every expert of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moequant.escape import shown, text_names
from moequant.report import figures, maps
from moequant.report import page as pages
from moequant.report.conversion import Conversion
from moequant.report.summary import OUTLIER, Report, experts_seen, unseen, verdict
from moequant.values import ExpertLoss

WORST = 10
"""Experts listed for each file."""


def page(made: Conversion) -> str:
    """The page's HTML."""
    first = made.reports[0]
    points = [
        figures.Point(shown(report.out), report.file_bytes, report.comparison.kl_mean)
        for report in made.reports
        if report.comparison is not None
    ]
    seen = experts_seen(first)
    changes = [report.measured for report in made.reports if report.measured is not None]
    source = first.comparison.source if first.comparison is not None else ""
    tokens, text = first.calibrated_on or (0, "")
    return pages.render(
        "conversion.html",
        name=shown(first.model),
        first=first,
        weights=sum(weight.numel for weight in first.checkpoint.weights),
        reports=[_file(report, number) for number, report in enumerate(made.reports)],
        verdicts=[(shown(report.out), verdict(report)) for report in made.reports],
        sizes=pages.picture(figures.sizes(points)) if len(points) > 1 else "",
        tokens=pages.present(maps.tokens(seen, "tokens of every expert")),
        unseen=unseen(seen),
        calibrated=text_names(text),
        calibrated_tokens=tokens,
        scored=text_names(source),
        rerouted=pages.picture(figures.rerouted(changes)) if changes and changes[0].routing else "",
        outlier=OUTLIER,
        notes=list(dict.fromkeys(note for report in made.reports for note in report.notes)),
    )


def write(made: Conversion, path: Path) -> None:
    """The page into a file. OutputError when the disk refuses."""
    pages.write(page(made), path)


def _file(report: Report, number: int) -> dict[str, Any]:
    """What the template shows of one output."""
    lost = [loss for loss in report.losses if loss.role.is_expert]
    roles = {weight.name: weight for weight in report.checkpoint.weights}
    inside = [
        figures.Typed(weight.role, weight.layer, choice.format)
        for choice in report.plan.choices
        if (weight := roles[choice.weight]).layer is not None and not weight.role.keeps_precision
    ]
    return {
        "name": shown(report.out),
        "report": report,
        "found": report.comparison,
        "types": pages.picture(figures.types(inside, f"types {number}")) if inside else "",
        "errors": maps.errors([(loss.role, loss.layer, loss.error) for loss in lost]),
        "moved": pages.present(
            maps.moved(report.measured.routing, "tokens that another expert computes")
            if report.measured is not None
            else None
        ),
        "worst": _worst(lost),
    }


def _worst(losses: list[ExpertLoss]) -> list[tuple[float, float, str, int | None, int, int | None]]:
    """(error, times the median of its weight's experts, projection, layer, expert, tokens), worst first."""
    rows = [
        (
            error,
            error / max(middle, 1e-300),
            str(loss.role),
            loss.layer,
            expert,
            None if loss.tokens is None else int(loss.tokens[expert]),
        )
        for loss in losses
        for middle in [float(loss.error.median())]
        for expert, error in enumerate(loss.error.tolist())
    ]
    return sorted(rows, key=lambda row: -row[0])[:WORST]
