"""The size/quality curve of a model, as a table for a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from moequant.escape import mathtext, size
from moequant.files import atomic
from moequant.plan import Point
from moequant.plan.curve import Curve
from moequant.report.figures import by_decades
from moequant.report.style import line, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, THEIRS = "#1f5fa8", "#c2571a"
"""Blue and orange: told apart by everybody, and in grey print."""

_OTHERS = {
    "gguf": ("llama.cpp's files", "preset", "its types", "llama.cpp's types"),
    "safetensors": ("one scheme for all experts", "scheme", "all in it", "one scheme for all experts"),
}
"""What our plans stand beside: the table's title and two of its columns, and the name in the picture."""


def curve_tables(curve: Curve) -> RenderableType:
    """What was asked for, the curve, and what others of the same size are expected to cost."""
    parts: list[RenderableType] = [line(f"{curve.title}: predicted KL divergence, from {curve.source}\n")]
    if curve.wanted:
        parts.append(_table("asked for", curve, curve.wanted))
    parts.append(_table("every size", curve, curve.plans))
    if curve.presets:
        title, name, theirs_as, _ = _OTHERS[curve.format]
        made = table(title, name, "size", theirs_as, "ours at that size")
        for theirs, ours in curve.presets:
            made.add_row(
                theirs.label, size(theirs.file_bytes), f"{theirs.predicted:.5f}", f"{ours.predicted:.5f}"
            )
        parts.append(made)
    return Group(*parts)


def _table(title: str, curve: Curve, points: Iterable[Point]) -> RenderableType:
    made = table(title, "", "size", "bytes", "bits per weight", "predicted KL", "experts as")
    made.columns[5].justify = "left"
    for point in points:
        label = "" if points is curve.plans else point.label
        bits = f"{8 * point.plan.bytes / curve.weights:.2f}" if point.plan else ""
        made.add_row(
            label,
            size(point.file_bytes),
            f"{point.file_bytes:,}",
            bits,
            f"{point.predicted:.5f}",
            _mix(point),
        )
    return made


def _mix(point: Point, most: int = 3) -> str:
    """The types that most bytes are in: `IQ3_S 61 %, Q4_K 30 %, ...`."""
    if point.plan is None:
        return ""
    totals: dict[str, int] = {}
    for choice in point.plan.choices:
        totals[choice.format] = totals.get(choice.format, 0) + choice.bytes
    every = sum(totals.values())
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    parts = [f"{name} {count / every:.0%}" for name, count in ranked[:most]]
    return ", ".join(parts) + (", …" if len(ranked) > most else "")


def draw(curve: Curve, path: Path) -> None:
    """The curve into a .png, .svg or .pdf: KL divergence (logarithmic) over file size.

    The same curve gives the same bytes. Raises OutputError when the disk refuses.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    scale, unit = (1e9, "GB") if curve.plans[-1].file_bytes >= 1e9 else (1e6, "MB")
    with rc_context({"svg.hashsalt": "moequant", "svg.fonttype": "none"}), atomic(path) as partial:
        figure = Figure(figsize=(9.0, 5.5), layout="constrained")
        axes = figure.add_subplot()
        _plot(axes, curve.plans, scale, {"color": OURS, "marker": ".", "label": "moequant"})
        _plot(axes, curve.wanted, scale, {"color": OURS, "marker": "o", "linestyle": "", "markersize": 9})
        theirs = [point for point, _ in curve.presets]
        _plot(
            axes,
            theirs,
            scale,
            {"color": THEIRS, "marker": "x", "linestyle": "", "label": _OTHERS[curve.format][3]},
        )
        below = {"xytext": (-6, -6), "ha": "right", "va": "top"}
        _name(axes, curve.wanted, scale, below)
        _name(axes, theirs, scale, {"xytext": (3, 3), "ha": "left", "va": "bottom"})
        by_decades(axes)
        axes.set_xlabel(f"file size, {unit}")
        axes.set_ylabel("predicted KL divergence")
        axes.set_title(mathtext(curve.title), loc="left", fontsize=10)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(frameon=False)
        kind = path.suffix[1:]
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(partial, format=kind, dpi=150, metadata=undated)


def _plot(axes: Axes, points: Sequence[Point], scale: float, style: dict[str, Any]) -> None:
    """Points with a KL divergence, which a logarithmic axis can show."""
    drawn = [point for point in points if point.predicted > 0]
    axes.plot([point.file_bytes / scale for point in drawn], [point.predicted for point in drawn], **style)


def _name(axes: Axes, points: Sequence[Point], scale: float, style: dict[str, Any]) -> None:
    """Labels beside points, aslant because presets lie close together."""
    for point in points:
        if point.predicted > 0:
            where = (point.file_bytes / scale, point.predicted)
            axes.annotate(
                mathtext(point.label), where, textcoords="offset points", fontsize=7, rotation=30, **style
            )
