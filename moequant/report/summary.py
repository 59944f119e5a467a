"""The end of `convert`: a verdict, what changed, and on request what each expert saw and lost, and costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.containers.folders.plan import FolderSettings, scheme_groups
from moequant.escape import shown, size
from moequant.evaluate import Comparison, Estimate, Measured
from moequant.progress import Forecast, StageCost
from moequant.report.shown import Shown
from moequant.report.style import line, parts_table, table
from moequant.text.corpus import Rows
from moequant.values import Calibration, ExpertLoss, Plan, Role

OUTLIER = 10.0
"""An expert that lost so many times as much as its weight's middle one is counted in the verdict."""

WORST = 5
"""Experts listed as hit worst."""

NAMED = 10
"""Experts, or layers of them, that are named where nobody asked for all."""


@dataclass(frozen=True, slots=True)
class How:
    """How an output was made.

    `rounded_on` is the text under whose Hessians weights were rounded, None for the plain search; `coupled`
    says whether layers correct those before them. `folder` has the settings of a folder, None for a file.
    """

    rounded_on: Rows | None = None
    coupled: bool = False
    folder: FolderSettings | None = None


@dataclass(frozen=True, slots=True)
class Report(Shown):
    """Everything that a conversion knows of one output at its end.

    `measured` is what the comparison found, None where nothing was compared. `forecast` is what the run
    was expected to take; None for one that is short, that goes on after it was killed, or that runs on a GPU.
    `notes` are what a person should know of the output. `checked` is what the self-check found. `parts` are
    the files of an output and their bytes; of several, `out` is the first.
    """

    model: Path
    out: Path
    file_bytes: int
    checkpoint: Checkpoint
    plan: Plan
    calibration: Calibration | None = None
    losses: tuple[ExpertLoss, ...] = ()
    measured: Measured | None = None
    stages: tuple[StageCost, ...] = ()
    forecast: Forecast | None = None
    notes: tuple[str, ...] = ()
    checked: str | None = None
    how: How = How()
    parts: Mapping[Path, int] = field(default_factory=dict)

    @property
    def comparison(self) -> Comparison | None:
        """Figures of before and after; None where they were not measured."""
        return None if self.measured is None else self.measured.comparison

    @property
    def calibrated_on(self) -> tuple[int, str] | None:
        """Tokens and source of the text of the statistics or, without any, of Hessians; None: no text."""
        text = self.calibration or self.how.rounded_on
        return None if text is None else (text.tokens, text.source)

    @property
    def bits_per_weight(self) -> float:
        """Bits of weight data per weight of the model."""
        return 8 * self.plan.bytes / sum(weight.numel for weight in self.checkpoint.weights)

    def renderable(self, details: bool = True) -> RenderableType:
        """The report for a rich console: the verdict, what changed, notes, and the tables of `details`."""
        heading = line(f"{shown(self.model)} → {shown(self.out)}", style="bold")
        parts: list[RenderableType] = [heading, line(f"{verdict(self)}\n"), _before_after(self)]
        if self.comparison is not None:
            parts.append(line(f"{self.comparison.tokens:,} tokens scored of: {self.comparison.source}\n"))
        parts += [parts_table(self.parts)] if len(self.parts) > 1 else []
        parts += [_types(self)] if details else []
        parts += made_how(self, details, worst=True)
        parts += [stages(self.stages)] if details else []
        return Group(*parts)

    @property
    def command(self) -> str:
        """See `Shown`."""
        return "convert"

    def value(self) -> dict[str, Any]:
        """See `Shown`; the same as that of a conversion to this one size."""
        from moequant.report.conversion import Conversion  # made of reports

        return Conversion((self,)).value()

    def html(self) -> str:
        """See `Shown`."""
        from moequant.report.conversion import Conversion

        return Conversion((self,)).html()


def verdict(report: Report) -> str:
    """One sentence: what it is, what it lost, and whether an expert was left behind."""
    told = []
    if (found := report.comparison) is not None:
        change = found.perplexity.value / found.base_perplexity.value - 1
        told.append(f"perplexity {change:+.1%}, {found.same_top:.1%} of top tokens kept")
    if seen := experts_seen(report):
        count = sum(int((tokens == 0).sum()) for tokens in seen.values())
        told.append(f"{count or 'no'} {'expert' if count < 2 else 'experts'} unseen")
        hurt = len(_hurt(report.losses))
        told.append(f"{hurt or 'none'} hurt over {OUTLIER:g} times the median")
    size_of_it = f"{kind(report)}, {report.bits_per_weight:.2f} bits"
    return f"{size_of_it}: {'; '.join(told)}." if told else f"{size_of_it}."


def kind(report: Report) -> str:
    """What the output is called: a file its preset, a folder its scheme."""
    if report.how.folder is None:
        return report.plan.preset
    named = list(scheme_groups(report.plan))
    return "mixed precision" if len(named) > 1 else report.plan.preset


def _hurt(losses: tuple[ExpertLoss, ...]) -> set[tuple[int | None, int]]:
    """Layer and number of the experts that lost far more than the others in one of their weights."""
    return {
        (loss.layer, expert)
        for loss in losses
        if loss.role.is_expert
        for expert in (loss.error > OUTLIER * loss.error.median()).nonzero()[:, 0].tolist()
    }


def made_how(report: Report, details: bool, worst: bool = False) -> list[RenderableType]:
    """What text the experts saw, which of them it hit worst if that is asked for, and notes."""
    parts: list[RenderableType] = []
    if report.calibrated_on is not None:
        tokens, source = report.calibrated_on
        parts.append(line(f"calibrated on {tokens:,} tokens of: {source}\n"))
    if seen := experts_seen(report):
        parts += [_routing(seen)] if details else []
        parts += _unseen(seen, tables=not details)
        parts += [_worst(report.losses)] if details and worst else []
    parts += [line(note) for note in _fallbacks(report.losses)]
    notes = (*report.notes, *([] if report.checked is None else [report.checked]))
    return parts + [line(f"note: {note}") for note in notes]


def _before_after(report: Report) -> Table:
    made = table("", "", "before", "after", "change")
    source = report.checkpoint.source_bytes
    weights = sum(weight.numel for weight in report.checkpoint.weights)
    made.add_row("size", size(source), size(report.file_bytes), f"{report.file_bytes / source - 1:+.1%}")
    made.add_row("bits per weight", f"{8 * source / weights:.2f}", f"{report.bits_per_weight:.2f}", "")
    found = report.comparison
    if found is not None:
        base, now = found.base_perplexity, found.perplexity
        made.add_row("perplexity", estimate(base, 3), estimate(now, 3), f"{now.value / base.value - 1:+.2%}")
        made.add_row("KL divergence, mean", "", estimate(found.kl_mean, 5), "")
        if report.plan.kl is not None:
            made.add_row("  expected by the plan", "", f"{report.plan.kl:.5f}", "")
        made.add_row("KL divergence, median / 99 %", "", f"{found.kl_median:.5f} / {found.kl_99:.4f}", "")
        made.add_row("same top token", "", f"{found.same_top:.2%}", "")
    return made


def estimate(found: Estimate, digits: int) -> str:
    """A figure with its error."""
    return f"{found.value:.{digits}f} ± {found.error:.{digits}f}"


def _types(report: Report) -> Table:
    made = table("types", "role", "format", "tensors", "size", "why")
    made.columns[1].justify = made.columns[4].justify = "left"
    roles = {weight.name: weight.role for weight in report.checkpoint.weights}
    rows: dict[tuple[str, str, str], list[int]] = {}
    for choice in report.plan.choices:
        rows.setdefault((roles[choice.weight], choice.format, choice.reason), []).append(choice.bytes)
    order = list(dict.fromkeys(role for role, _, _ in rows))
    for (role, name, reason), sizes in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        made.add_row(role, name, str(len(sizes)), size(sum(sizes)), reason)
    return made


def experts_seen(report: Report) -> dict[int, Tensor]:
    """Tokens i64 [E] that each expert saw, by layer: in the statistics pass or, without one, while it was
    rounded."""
    if report.calibration is not None:
        return {route.layer: route.tokens for route in report.calibration.routes}
    return {
        loss.layer: loss.tokens
        for loss in report.losses
        if loss.role is Role.UP and loss.layer is not None and loss.tokens is not None
    }


def _routing(seen: Mapping[int, Tensor]) -> Table:
    made = table("tokens an expert saw", "layer", "min", "median", "max", "unseen")
    for layer, tokens in seen.items():
        made.add_row(
            str(layer),
            f"{int(tokens.min()):,}",
            f"{int(tokens.median()):,}",
            f"{int(tokens.max()):,}",
            str(int((tokens == 0).sum())),
        )
    return made


def unseen(seen: Mapping[int, Tensor]) -> list[str]:
    """Experts without tokens, as layer.expert."""
    return [
        f"{layer}.{expert}"
        for layer, tokens in seen.items()
        for expert in (tokens == 0).nonzero()[:, 0].tolist()
    ]


def _unseen(seen: Mapping[int, Tensor], tables: bool) -> list[RenderableType]:
    """Experts that calibration never reached, some by name: they are quantized on their layer's statistics.
    With `tables` also what the others of some of those layers saw."""
    names = unseen(seen)
    if not names:
        return []
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    told = line(
        f"{len(names):,} {'expert' if len(names) == 1 else 'experts'} saw no token and took the importance "
        f"of the whole layer (layer.expert): {', '.join(names[:NAMED])}{more}"
    )
    hit = [layer for layer, tokens in seen.items() if (tokens == 0).any()]
    return [_routing({layer: seen[layer] for layer in hit[:NAMED]}), told] if tables else [told]


def _worst(losses: tuple[ExpertLoss, ...]) -> Table:
    made = table("worst-hit experts", "layer.expert", "projection", "format", "relative error", "tokens")
    rows = [
        (float(loss.error[expert]), loss, expert)
        for loss in losses
        if loss.role.is_expert
        for expert in range(len(loss.error))
    ]
    for error, loss, expert in sorted(rows, key=lambda row: -row[0])[:WORST]:
        seen = "" if loss.tokens is None else f"{int(loss.tokens[expert]):,}"
        made.add_row(f"{loss.layer}.{expert}", str(loss.role), loss.format, f"{error:.3%}", seen)
    return made


def _fallbacks(losses: tuple[ExpertLoss, ...]) -> list[str]:
    """How many experts were rounded by the plain search instead of under their Hessian, by reason."""
    reasons = Counter(reason for loss in losses for reason in loss.fallbacks)
    return [f"rounded by the plain search, {count} times: {reason}" for reason, count in reasons.items()]


def stages(costs: tuple[StageCost, ...]) -> Table:
    """What every stage took."""
    made = table("cost", "stage", "seconds", "peak memory", "read")
    for cost in costs:
        read = "" if cost.read_bytes is None else size(cost.read_bytes)
        made.add_row(cost.name, f"{cost.seconds:.1f}", size(cost.peak_bytes), read)
    return made
