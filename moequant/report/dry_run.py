"""The table of `--dry-run`: every tensor's type and the exact size of the file."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from moequant.checkpoint import Checkpoint
from moequant.report.summary import size, table
from moequant.values import Plan


def dry_run_table(checkpoint: Checkpoint, plan: Plan, file_bytes: int) -> Group:
    """One row a tensor, in file order; the last line has the file's size in bytes."""
    weights = {weight.name: weight for weight in checkpoint.weights}
    made = table("", "tensor", "shape", "type", "size", "why")
    made.columns[0].no_wrap = made.columns[1].no_wrap = True
    made.columns[4].justify = "left"
    for choice in plan.choices:
        shape = " x ".join(map(str, weights[choice.weight].shape))
        made.add_row(choice.weight, shape, choice.format, size(choice.bytes), choice.reason)
    total = sum(weight.numel for weight in checkpoint.weights)
    line = (
        f"{checkpoint.path} as {plan.preset}: {file_bytes:,} bytes, {8 * plan.bytes / total:.2f} bits per "
        f"weight (checkpoint: {checkpoint.source_bytes:,} bytes of weights)"
    )
    return Group(made, Text(line))
