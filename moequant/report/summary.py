"""The table at the end of `convert`: what changed, what each expert saw and lost, what it cost."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.escape import shown
from moequant.evaluate import Comparison, Estimate
from moequant.progress import StageCost
from moequant.report.style import line, parts_table, size, table
from moequant.values import Calibration, ExpertLoss, Plan, Role

WORST = 5
"""Experts listed as hit worst."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a conversion knows at its end; `summary` is what the command line prints.

    `parts` are the files of the output and their bytes, where it is one file or several."""

    model: Path
    out: Path
    file_bytes: int
    parts: Mapping[Path, int]
    checkpoint: Checkpoint
    plan: Plan
    calibration: Calibration | None
    losses: tuple[ExpertLoss, ...]
    comparison: Comparison | None
    stages: tuple[StageCost, ...]
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits of weight data per weight of the model."""
        return 8 * self.plan.bytes / sum(weight.numel for weight in self.checkpoint.weights)

    def renderable(self) -> RenderableType:
        """The report for a rich console."""
        heading = line(f"{shown(self.model)} → {shown(next(iter(self.parts)))}", style="bold")
        parts: list[RenderableType] = [heading, _before_after(self)]
        if self.comparison is not None:
            parts.append(line(f"{self.comparison.tokens:,} tokens scored of: {self.comparison.source}\n"))
        parts.append(_types(self))
        if len(self.parts) > 1:
            parts.append(parts_table(self.parts))
        if self.calibration is not None:
            parts.append(
                line(f"calibrated on {self.calibration.tokens:,} tokens of: {self.calibration.source}\n")
            )
        if seen := _seen(self):
            parts += [_routing(seen), *_unseen(seen), _worst(self.losses)]
        parts += [line(note) for note in _fallbacks(self.losses)]
        parts += [line(f"note: {note}") for note in self.notes]
        parts.append(_stages(self.stages))
        return Group(*parts)

    def summary(self, width: int = 100) -> str:
        """The report as plain text."""
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self.renderable())
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue().rstrip() + "\n"


def _before_after(report: Report) -> Table:
    made = table("", "", "before", "after", "change")
    source = report.checkpoint.source_bytes
    weights = sum(weight.numel for weight in report.checkpoint.weights)
    made.add_row("size", size(source), size(report.file_bytes), f"{report.file_bytes / source - 1:+.1%}")
    made.add_row("bits per weight", f"{8 * source / weights:.2f}", f"{report.bits_per_weight:.2f}", "")
    found = report.comparison
    if found is not None:
        base, now = found.base_perplexity, found.perplexity
        made.add_row("perplexity", _pm(base, 3), _pm(now, 3), f"{now.value / base.value - 1:+.2%}")
        made.add_row("KL divergence, mean", "", _pm(found.kl_mean, 5), "")
        if report.plan.kl is not None:
            made.add_row("  expected by the plan", "", f"{report.plan.kl:.5f}", "")
        made.add_row("KL divergence, median / 99 %", "", f"{found.kl_median:.5f} / {found.kl_99:.4f}", "")
        made.add_row("same top token", "", f"{found.same_top:.2%}", "")
    return made


def _pm(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


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


def _seen(report: Report) -> dict[int, Tensor]:
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


def _unseen(seen: Mapping[int, Tensor]) -> list[Text]:
    """Experts that calibration never reached, by name: they are quantized on their layer's statistics."""
    names = [
        f"{layer}.{expert}"
        for layer, tokens in seen.items()
        for expert in (tokens == 0).nonzero()[:, 0].tolist()
    ]
    if not names:
        return []
    return [
        line(
            f"{len(names)} experts saw no token and were quantized with their layer's pooled importance "
            f"(layer.expert): {', '.join(names)}"
        )
    ]


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


def _stages(stages: tuple[StageCost, ...]) -> Table:
    made = table("cost", "stage", "seconds", "peak memory", "read")
    for cost in stages:
        read = "" if cost.read_bytes is None else size(cost.read_bytes)
        made.add_row(cost.name, f"{cost.seconds:.1f}", size(cost.peak_bytes), read)
    return made
