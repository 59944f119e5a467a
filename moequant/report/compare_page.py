"""The comparison as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moequant.escape import plain, text_names
from moequant.evaluate.compared import Compared
from moequant.evaluate.divergence import PERCENTILES
from moequant.report import figures, maps
from moequant.report import page as pages
from moequant.report.compare import OUTLIER, TELLING, verdict
from moequant.report.compare_running import QUOTED, as_base, record_rows, speeds

WORST = 10
"""Experts listed for each candidate."""


def page(found: Compared) -> str:
    """The page's HTML."""
    first = found.measured[0]
    seen = {error.layer: error.tokens for error in first.errors if error.tokens is not None}
    tokens = {layer: count for layer, count in seen.items() if layer is not None}
    return pages.render(
        "compare.html",
        found=found,
        verdicts=[(one.name, verdict(one)) for one in found.measured],
        source=text_names(found.source),
        percentiles=PERCENTILES,
        telling=TELLING,
        outlier=OUTLIER,
        candidates=[_candidate(found, number) for number in range(len(found.measured))],
        sizes=pages.picture(figures.sizes(_points(found))),
        domains=pages.picture(figures.domains(found)) if len(found.domains) > 1 else "",
        rerouted=pages.picture(figures.rerouted(found.measured)) if first.routing else "",
        speeds=speeds(found.ran),
        server=next((one.serving for one in found.ran if one.serving), None),
        quoted=QUOTED,
        samples=_samples(found),
        record=record_rows(found.record, digits=64),
        tokens=pages.present(maps.tokens(tokens, "tokens of every expert")),
    )


def write(found: Compared, path: Path) -> None:
    """The page into a file. OutputError when the disk refuses."""
    pages.write(page(found), path)


def _points(found: Compared) -> list[figures.Point]:
    pairs = zip(found.candidates, found.measured, strict=True)
    return [figures.Point(one.name, source.bytes, one.comparison.kl_mean) for source, one in pairs]


def _samples(found: Compared) -> list[dict[str, Any]]:
    """Prompt by prompt, what every version said."""
    shown = [one for one in found.ran if one.samples]
    return [
        {
            "name": first.prompt,
            "fed": first.fed,
            "cut": first.cut,
            "versions": [
                {
                    "name": one.name,
                    "same": as_base(first, one.samples[number], one is shown[0]),
                    "text": plain(one.samples[number].text, "\n"),
                }
                for one in shown
            ],
        }
        for number, first in enumerate(shown[0].samples if shown else ())
    ]


def _candidate(found: Compared, number: int) -> dict[str, Any]:
    """What the template shows of one candidate beside its figures."""
    one, source = found.measured[number], found.candidates[number]
    worst = one.expert_errors
    inside = [
        figures.Typed(weight.role, weight.layer, source.types[weight.weight])
        for weight in one.errors
        if weight.layer is not None and not weight.role.keeps_precision
    ]
    return {
        "one": one,
        "source": source,
        "worst": [
            (error, times, weight.role, weight.layer, expert, _count(weight.tokens, expert))
            for error, times, weight, expert in worst[:WORST]
        ],
        "outliers": sum(times > OUTLIER for _, times, _, _ in worst),
        "errors": maps.errors([(each.role, each.layer, each.error) for each in one.errors]),
        "moved": pages.present(maps.moved(one.routing, "tokens that another expert computes")),
        "types": pages.picture(figures.types(inside, f"types {number}")) if inside else "",
    }


def _count(tokens: Any, expert: int) -> int | None:
    return None if tokens is None else int(tokens[expert])
