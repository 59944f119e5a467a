"""The table of `--dry-run`: every tensor's type and the exact size of the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType

from moequant.checkpoint import Checkpoint
from moequant.escape import shown
from moequant.report.style import line, parts_table, size, table
from moequant.values import Choice, Plan


def dry_run_table(
    checkpoint: Checkpoint, plan: Plan, parts: Mapping[Path, int], limit: int | None = None
) -> Group:
    """One row a tensor, in file order; the last line has the file's size in bytes. `parts` are its files.

    `limit` is the largest file that the conversion may make when it will measure and choose again.
    """
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
    return Group(made, *lines)


def _kl(choice: Choice) -> str:
    """A choice's share of the expected KL divergence."""
    return f"{choice.kl:.2e}" if choice.kl else ""
