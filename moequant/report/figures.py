"""The pictures of pages, drawn by matplotlib as SVG that takes the page's own colours.

It is imported where something is drawn: a command that draws nothing starts without it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moequant.escape import mathtext
from moequant.evaluate import Estimate, Measured
from moequant.evaluate.compared import Compared
from moequant.files import atomic
from moequant.values import Role

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Drawn for whatever is text or line, and replaced by the page's colour: pages are light or dark."""

WIDTH = 7.2
"""Inches; the page scales every picture to its column."""

PALETTE = (
    "#3b76af",
    "#e08a3c",
    "#4f9d69",
    "#c2514b",
    "#8a6bb1",
    "#8c6d4f",
    "#c97fb6",
    "#7f7f7f",
    "#a9a83c",
    "#4aa8b5",
)
"""Ten colours that hold against white and black."""

FLOOR = 1e-12
"""Errors below this are drawn like it: logarithms have to end somewhere."""


def svg(figure: Figure) -> str:
    """The figure as an <svg> element that scales, its ink the colour of the text around it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"',
        r"<svg \1",
        re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", text, count=1),
        count=1,
    )


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Settings under which a figure is made and written; `salt` keeps ids of several pictures apart."""
    from matplotlib import rc_context

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {  # rc_context wants every key as a literal
        **dict.fromkeys(ink, INK),
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
    }
    with rc_context(settings):
        yield


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


@dataclass(frozen=True, slots=True)
class Point:
    """One file in the picture of sizes."""

    name: str
    bytes: int
    kl: Estimate


@dataclass(frozen=True, slots=True)
class Typed:
    """The type of one weight of a layer."""

    role: Role
    layer: int
    type: str


def sizes(points: Sequence[Point]) -> str:
    """Size against mean KL divergence, every file by name."""
    with style("sizes"):
        return svg(_sizes(points))


def draw_sizes(points: Sequence[Point], path: Path) -> None:
    """The same as a .png, dark on white. OutputError when the disk refuses."""
    with style("sizes"), atomic(path) as partial:
        _sizes(points).savefig(partial, format="png", dpi=150, facecolor="white")


def _sizes(points: Sequence[Point]) -> Figure:
    scale, unit = (1e9, "GB") if max(point.bytes for point in points) >= 1e9 else (1e6, "MB")
    figure, axes = _figure(3.2)
    for number, point in enumerate(points):
        x, y = point.bytes / scale, max(point.kl.value, FLOOR)
        error = min(point.kl.error, 0.9 * y)
        axes.errorbar(x, y, yerr=error, fmt="o", color=PALETTE[number % 10], capsize=2)
        axes.annotate(mathtext(point.name), (x, y), xytext=(6, 4), textcoords="offset points", color=INK)
    by_decades(axes)
    axes.margins(x=0.25, y=0.15)
    axes.set_xlabel(f"size, {unit}")
    axes.set_ylabel("mean KL divergence")
    return figure


def by_decades(axes: Axes) -> None:
    """A logarithmic vertical axis whose labels read 0.02, and not 2 × 10⁻²."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Labels the same ticks, with plain numbers."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain())


def domains(found: Compared) -> str:
    """Mean KL divergence of every domain, candidates side by side."""
    count = len(found.measured)
    with style("domains"):
        figure, axes = _figure(1.0 + 0.22 * len(found.domains) * count)
        for number, one in enumerate(found.measured):
            at = np.arange(len(found.domains)) + (number + 0.5) / count * 0.8
            values = [part.kl_mean.value for part in one.domains]
            errors = [part.kl_mean.error for part in one.domains]
            axes.barh(
                at,
                values,
                0.8 / count,
                xerr=errors,
                color=PALETTE[number % 10],
                ecolor=INK,
                label=mathtext(one.name),
            )
        axes.set_yticks(np.arange(len(found.domains)) + 0.4, [mathtext(domain) for domain in found.domains])
        axes.invert_yaxis()
        axes.set_xlabel("mean KL divergence")
        _legend(axes)
        return svg(figure)


def rerouted(measured: Sequence[Measured]) -> str:
    """Share of tokens whose set of experts changed, layer by layer."""
    from matplotlib.ticker import MaxNLocator

    with style("rerouted"):
        figure, axes = _figure(2.4)
        for number, one in enumerate(measured):
            layers = [layer.layer for layer in one.routing]
            shares = [100 * layer.changed for layer in one.routing]
            axes.plot(layers, shares, "o-", ms=3, color=PALETTE[number % 10], label=mathtext(one.name))
        axes.set_xlabel("layer")
        axes.set_ylabel("tokens rerouted, %")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
        return svg(figure)


def types(weights: Sequence[Typed], salt: str) -> str:
    """The type of every weight: a row a layer, a column a projection."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    roles = list(dict.fromkeys(weight.role for weight in weights))
    layers = sorted({weight.layer for weight in weights})
    names = sorted({weight.type for weight in weights})
    grid = np.full((len(layers), len(roles)), math.nan)
    for weight in weights:
        grid[layers.index(weight.layer), roles.index(weight.role)] = names.index(weight.type)
    with style(salt):
        figure, axes = _figure(_height(len(layers)) + 0.7)
        colours = ListedColormap([PALETTE[at % 10] for at in range(len(names))])
        axes.imshow(
            grid, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto", interpolation="nearest"
        )
        axes.set_xticks(range(len(roles)), [str(role) for role in roles])
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [Patch(color=PALETTE[at % 10], label=mathtext(name)) for at, name in enumerate(names)]
        axes.legend(
            handles=handles, ncols=min(6, len(names)), loc="lower left", bbox_to_anchor=(0, 1), frameon=False
        )
        return svg(figure)


def _height(layers: int) -> float:
    return min(7.0, 1.0 + 0.11 * layers)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, loc="best")
