"""The comparison as one page: no network, no script, light and dark, narrow and wide, and on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moequant import __version__
from moequant.escape import plain
from moequant.evaluate.compared import Compared
from moequant.evaluate.divergence import PERCENTILES
from moequant.files import atomic
from moequant.report import html_figures as figures
from moequant.report.compare import OUTLIER, TELLING
from moequant.report.compare_running import QUOTED, as_base, record_rows, speeds
from moequant.report.style import size

WORST = 20
"""Experts listed for each candidate."""


def page(found: Compared) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("moequant.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "percent": _percent, "fixed": _fixed}
    return environment.get_template("compare.html").render(
        found=found,
        version=__version__,
        percentiles=PERCENTILES,
        telling=TELLING,
        outlier=OUTLIER,
        candidates=[_candidate(found, number) for number in range(len(found.measured))],
        sizes=Markup(figures.sizes(found)),
        domains=Markup(figures.domains(found)) if len(found.domains) > 1 else "",
        rerouted=Markup(figures.rerouted(found)) if found.measured[0].routing else "",
        speeds=speeds(found.ran),
        server=next((one.serving for one in found.ran if one.serving), None),
        quoted=QUOTED,
        samples=_samples(found),
        record=record_rows(found.record, digits=64),
        routing=Markup(figures.routing(found.measured[0])) if found.measured[0].expert_errors else "",
    )


def write(found: Compared, path: Path) -> None:
    """The page into a file. OutputError when the disk refuses."""
    text = page(found)
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _shown(value: object) -> object:
    """What the template prints: nothing that hides or turns the reading direction. Escaping comes after."""
    return plain(value, "\n") if isinstance(value, str) and not isinstance(value, Markup) else value


def _percent(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}%}"


def _fixed(value: float, digits: int = 5) -> str:
    return f"{value:.{digits}f}"


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
    one = found.measured[number]
    worst = one.expert_errors
    return {
        "one": one,
        "source": found.candidates[number],
        "worst": worst[:WORST],
        "outliers": sum(times > OUTLIER for _, times, _, _ in worst),
        "errors": Markup(figures.errors(one)) if worst else "",
        "types": Markup(figures.types(found, number)) if one.errors else "",
    }
