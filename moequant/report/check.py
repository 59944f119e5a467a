"""What `check` found, as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType

from moequant.check.figures import KERNEL_LIMIT, CheckReport, ExpertFigures, TensorFigures
from moequant.report.style import line, table

NAMED = 20
"""Damages listed in the terminal; the JSON has all."""


def check_json(report: CheckReport) -> dict[str, Any]:
    """Everything, ready for `json.dumps`."""
    return {"holds": report.holds, **asdict(report)}


def check_report(report: CheckReport) -> RenderableType:
    """The report for a rich console: tensors by layer and type, blocks, damages, and what was not checked."""
    against = f" against {report.baseline}" if report.baseline else ""
    parts: list[RenderableType] = [line(f"{report.out}{against}", style="bold"), line(report.product + "\n")]
    if report.tensors:
        parts.append(_tensors(report))
    if report.blocks:
        parts.append(_blocks(report))
    if report.speed:
        parts.append(_speed(report))
    parts += [line(f"note: {note}") for note in report.notes]
    parts.append(line(", ".join(f"{name} {version}" for name, version in report.versions.items())))
    parts += [line(f"DAMAGED {damage.where}: {damage.what}") for damage in report.damages[:NAMED]]
    if len(report.damages) > NAMED:
        parts.append(line(f"and {len(report.damages) - NAMED} more (--json has all)"))
    count = sum(len(tensor.experts) for tensor in report.tensors)
    held = "all hold" if report.holds else f"{len(report.damages)} do not hold"
    parts.append(line(f"{len(report.tensors)} tensors, {count} matrices: {held}", style="bold"))
    return Group(*parts)


def _tensors(report: CheckReport) -> RenderableType:
    made = table(
        f"relative errors, worst expert of each tensor (product: {KERNEL_LIMIT:g} at most)",
        "tensor",
        "type",
        "decoded",
        "product",
        "weights",
        "usual",
        "outputs",
        "cosine",
        "largest",
    )
    made.columns[1].justify = made.columns[2].justify = "left"
    made.columns[0].no_wrap = made.columns[1].no_wrap = True
    for tensor in report.tensors:
        same = "same bits" if all(expert.same_decoded for expert in tensor.experts) else "DIFFERS"
        made.add_row(
            tensor.name,
            tensor.format,
            same,
            f"{max(expert.kernel_error for expert in tensor.experts):.1e}",
            _worst(tensor, "weight_error"),
            f"{tensor.expected:.4f}",
            _worst(tensor, "output_error"),
            _worst(tensor, "cosine", lowest=True),
            _worst(tensor, "largest"),
        )
    return made


def _worst(tensor: TensorFigures, name: str, lowest: bool = False) -> str:
    """The largest (or lowest) of a figure and, among several, whose it is."""
    known: list[tuple[float, ExpertFigures]] = [
        (value, expert) for expert in tensor.experts if (value := getattr(expert, name)) is not None
    ]
    if not known:
        return ""
    value, expert = (min if lowest else max)(known, key=lambda pair: pair[0])
    return f"{value:.4f}" + (f" ({expert.expert})" if len(tensor.experts) > 1 else "")


def _blocks(report: CheckReport) -> RenderableType:
    made = table(
        "MoE blocks",
        "layer",
        "output error",
        "limit",
        "cosine",
        "largest",
        "same experts, same input",
        "same experts, own input",
        "same first",
    )
    for block in report.blocks:
        made.add_row(
            str(block.layer),
            f"{block.output_error:.4f}",
            f"{block.limit:.3f}",
            f"{block.cosine:.5f}",
            f"{block.largest:.3f}",
            f"{block.local_routing:.2%}",
            f"{block.routing:.2%}",
            f"{block.top:.2%}",
        )
    return made


def _speed(report: CheckReport) -> RenderableType:
    keys = tuple(report.speed[0])
    made = table("speed", *keys)
    for row in report.speed:
        made.add_row(*(f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in keys))
    return made
