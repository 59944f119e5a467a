"""The end of a conversion to several sizes: a row a file, then what the files share."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from moequant.escape import shown, size
from moequant.report.machine import conversion_json
from moequant.report.shown import Shown
from moequant.report.style import line, table
from moequant.report.summary import Report, estimate, made_how, stages, verdict


@dataclass(frozen=True, slots=True)
class Conversion(Shown):
    """What a run made of one model: a report for every file, in the order in which their sizes were named."""

    reports: tuple[Report, ...]

    def renderable(self, details: bool = True) -> RenderableType:
        """The report for a rich console."""
        first = self.reports[0]
        if len(self.reports) == 1:
            return first.renderable(details)
        parts: list[RenderableType] = [
            line(f"{shown(first.model)} → {len(self.reports)} files", style="bold"),
            *(line(f"{shown(report.out)} is {verdict(report)}") for report in self.reports),
            _files(self.reports),
        ]
        if (found := first.comparison) is not None:
            parts.append(line(f"{found.tokens:,} tokens scored of: {found.source}"))
            parts.append(line(f"perplexity of the original: {estimate(found.base_perplexity, 3)}\n"))
        parts += made_how(first, details)
        return Group(*parts, *([stages(first.stages)] if details else []))

    @property
    def command(self) -> str:
        """See `Shown`."""
        return "convert"

    def value(self) -> dict[str, Any]:
        """See `Shown`."""
        return conversion_json(self.reports)

    def html(self) -> str:
        """See `Shown`."""
        from moequant.report.conversion_page import page  # draws this

        return page(self)


def next_steps(made: Conversion, model: str, card: Path | None = None) -> RenderableType:
    """What a person does next, `model` as was typed: the commands that start a file, compare all of them and
    upload them with their `card`, and what the card still lacks, if there is one."""
    first, outs = made.reports[0], [str(report.out) for report in made.reports]
    if first.checkpoint.encodes:
        start = None
    elif first.how.folder is not None:
        start = f"vllm serve {shlex.quote(outs[0])}"
    else:
        context = min(first.checkpoint.shape.context, 8192)
        start = f"llama-server -m {shlex.quote(outs[0])} -c {context}"
    compared = shlex.join(["moequant", "compare", model, *outs, "--html", "compare.html"])
    steps = [each for each in (start, compared, _upload(made, card)) if each]
    lines = [line(f"  {each}", style="cyan") for each in steps]
    if card is not None and first.checkpoint.hub_name is None:
        lines.append(
            line("  before you publish the card, put the original's name on the Hub into its first lines")
        )
    return Group(line("next", style="bold"), *lines)


def _upload(made: Conversion, card: Path | None) -> str | None:
    """The command for a folder that has all files and the card."""
    if card is None:
        return None
    folder = card.parent if card.suffix == ".md" else card
    if any(report.out.resolve().parent != folder.resolve() for report in made.reports):
        return None
    name = f"YOUR_NAME/{made.reports[0].checkpoint.name}-GGUF"
    return shlex.join(["moequant", "push", name, str(folder)])


def _files(reports: tuple[Report, ...]) -> Table:
    """Every file with its size and what it lost."""
    figures = ("perplexity", "change", "KL divergence", "expected", "same top")
    found = [report.comparison for report in reports]
    columns = figures if all(found) else figures[3:4]
    made = table("", "file", "size", "bits", *columns)
    for report, comparison in zip(reports, found, strict=True):
        expected = "" if report.plan.kl is None else f"{report.plan.kl:.5f}"
        row = [expected]
        if comparison is not None:
            base, now = comparison.base_perplexity, comparison.perplexity
            row = [
                f"{now.value:.3f}",
                f"{now.value / base.value - 1:+.2%}",
                estimate(comparison.kl_mean, 5),
                expected,
                f"{comparison.same_top:.2%}",
            ]
        made.add_row(shown(report.out), size(report.file_bytes), f"{report.bits_per_weight:.2f}", *row)
    return made
