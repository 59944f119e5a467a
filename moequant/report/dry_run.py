"""The table of `--dry-run`: every tensor's type and the exact size of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType

from moequant.checkpoint import Checkpoint
from moequant.escape import shown, size
from moequant.report.style import line, parts_table, table
from moequant.values import Choice, Plan


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a conversion would write: the bytes of its files, `parts`; `limit`, the largest file where it will
    measure and choose again; and what a person should know of it."""

    checkpoint: Checkpoint
    plan: Plan
    parts: Mapping[Path, int]
    limit: int | None = None
    notes: tuple[str, ...] = ()


def dry_run_table(found: DryRun) -> Group:
    """One row a tensor, in file order; below them the file's size in bytes, and the notes."""
    checkpoint, plan, parts, limit = found.checkpoint, found.plan, found.parts, found.limit
    weights = {weight.name: weight for weight in checkpoint.weights}
    known = plan.kl is not None
    made = table("", "tensor", "shape", "type", "size", *(["expected KL"] if known else []), "why")
    made.columns[0].no_wrap = made.columns[1].no_wrap = True
    made.columns[-1].justify = "left"
    for choice in plan.choices:
        shape = " x ".join(map(str, weights[choice.weight].shape))
        kl = [_kl(choice)] if known else []
        made.add_row(choice.weight, shape, choice.format, size(choice.bytes), *kl, choice.reason)
    total = sum(weight.numel for weight in checkpoint.weights)
    total_line = (
        f"{shown(checkpoint.source)} as {plan.target or plan.preset}: {sum(parts.values()):,} bytes, "
        f"{8 * plan.bytes / total:.2f} bits per weight "
        f"(checkpoint: {checkpoint.source_bytes:,} bytes of weights)"
    )
    lines: list[RenderableType] = [line(total_line)]
    if len(parts) > 1:
        lines.append(parts_table(parts))
    if limit is not None:
        lines.append(
            line(
                "These types come from tables. The conversion measures this model and may choose others, "
                f"in a file of at most {limit:,} bytes; --effort fast keeps these."
            )
        )
    if known:
        lines.append(line(f"expected KL divergence to the checkpoint: {plan.kl:.5f}"))
    return Group(made, *lines, *(line(f"note: {note}") for note in found.notes))


def _kl(choice: Choice) -> str:
    """A choice's share of the expected KL divergence."""
    return f"{choice.kl:.2e}" if choice.kl else ""
