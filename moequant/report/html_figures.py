"""The pictures of the comparison's page, drawn by matplotlib as SVG that takes the page's own colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moequant.escape import mathtext
from moequant.evaluate import Measured, WeightError
from moequant.evaluate.compared import Compared

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
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {  # rc_context wants every key as a literal
        **dict.fromkeys(ink, INK),
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
    }
    with rc_context(settings):
        yield


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def sizes(found: Compared) -> str:
    """Size against mean KL divergence, every candidate by name."""
    largest = max(source.bytes for source in found.candidates)
    scale, unit = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    with style("sizes"):
        figure, axes = _figure(3.2)
        for number, (source, one) in enumerate(zip(found.candidates, found.measured, strict=True)):
            kl = one.comparison.kl_mean
            x, y = source.bytes / scale, max(kl.value, FLOOR)
            axes.errorbar(x, y, yerr=min(kl.error, 0.9 * y), fmt="o", color=PALETTE[number % 10], capsize=2)
            axes.annotate(mathtext(one.name), (x, y), xytext=(6, 4), textcoords="offset points", color=INK)
        axes.set_yscale("log")
        axes.margins(x=0.25, y=0.15)
        axes.set_xlabel(f"size, {unit}")
        axes.set_ylabel("mean KL divergence")
        return svg(figure)


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


def rerouted(found: Compared) -> str:
    """Share of tokens whose set of experts changed, layer by layer."""
    with style("rerouted"):
        figure, axes = _figure(2.4)
        for number, one in enumerate(found.measured):
            layers = [layer.layer for layer in one.routing]
            shares = [100 * layer.changed for layer in one.routing]
            axes.plot(layers, shares, "o-", ms=3, color=PALETTE[number % 10], label=mathtext(one.name))
        axes.set_xlabel("layer")
        axes.set_ylabel("tokens rerouted, %")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
        return svg(figure)


def errors(one: Measured) -> str:
    """Relative error of every expert of every layer, a panel a projection; one scale for all."""
    roles = list(dict.fromkeys(weight.role for weight in one.errors if weight.role.is_expert))
    grids = [np.log10(np.maximum(_grid([w for w in one.errors if w.role is role]), FLOOR)) for role in roles]
    low, high = min(float(grid.min()) for grid in grids), max(float(grid.max()) for grid in grids)
    with style(f"errors {one.name}"):
        figure = Figure(figsize=(WIDTH, len(roles) * _height(len(grids[0])) + 0.3), layout="constrained")
        panels = figure.subplots(len(roles), 1, squeeze=False)[:, 0]
        for axes, role, grid in zip(panels, roles, grids, strict=True):
            image = axes.imshow(
                grid,
                cmap="magma",
                vmin=low,
                vmax=max(high, low + 0.1),
                aspect="auto",
                interpolation="nearest",
            )
            axes.set_title(str(role), loc="left", fontsize=9)
            _layers(axes)
        panels[-1].set_xlabel("expert")
        bar = figure.colorbar(image, ax=list(panels))
        bar.set_label("relative squared error, log10", color=INK)
        return svg(figure)


def routing(one: Measured) -> str:
    """Tokens of every expert as multiples of its fair share; experts without any are crossed."""
    seen = {weight.layer: weight for weight in one.errors if weight.tokens is not None}
    counts = np.array(
        [weight.tokens.tolist() for weight in seen.values() if weight.tokens is not None], float
    )
    fair = counts / np.maximum(counts.mean(1, keepdims=True), 1e-9)
    with style("routing"):
        figure, axes = _figure(_height(len(fair)) + 0.5)
        shown = np.log2(np.maximum(fair, 2.0**-4))
        image = axes.imshow(shown, cmap="cividis", vmin=-4, vmax=4, aspect="auto", interpolation="nearest")
        for layer, expert in zip(*np.nonzero(counts == 0), strict=True):
            axes.text(expert, layer, "×", ha="center", va="center", color="white", fontsize=7)
        axes.set_xlabel("expert")
        _layers(axes)
        bar = figure.colorbar(image, ax=axes, ticks=range(-4, 5, 2))
        bar.ax.set_yticklabels(["1/16", "1/4", "1", "4", "16"])
        bar.set_label("times the fair share", color=INK)
        return svg(figure)


def types(found: Compared, number: int) -> str:
    """The type of every tensor of a candidate: a row a layer, a column a projection."""
    source, one = found.candidates[number], found.measured[number]
    inside = [weight for weight in one.errors if weight.layer is not None and not weight.role.keeps_precision]
    roles = list(dict.fromkeys(weight.role for weight in inside))
    layers = sorted({weight.layer for weight in inside if weight.layer is not None})
    names = sorted({source.types[weight.weight] for weight in inside})
    grid = np.full((len(layers), len(roles)), math.nan)
    for weight in inside:
        assert weight.layer is not None
        grid[layers.index(weight.layer), roles.index(weight.role)] = names.index(source.types[weight.weight])
    with style(f"types {number}"):
        figure, axes = _figure(_height(len(layers)) + 0.7)
        colours = ListedColormap([PALETTE[at % 10] for at in range(len(names))])
        axes.imshow(
            grid, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto", interpolation="nearest"
        )
        axes.set_xticks(range(len(roles)), [str(role) for role in roles])
        _layers(axes)
        handles = [Patch(color=PALETTE[at % 10], label=mathtext(name)) for at, name in enumerate(names)]
        axes.legend(
            handles=handles, ncols=min(6, len(names)), loc="lower left", bbox_to_anchor=(0, 1), frameon=False
        )
        return svg(figure)


def _grid(weights: list[WeightError]) -> NDArray[np.float64]:
    """Errors [layers, experts]."""
    return np.array([weight.error.tolist() for weight in weights])


def _layers(axes: Axes) -> None:
    """Rows are layers: the axis has whole numbers only."""
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _height(layers: int) -> float:
    return min(7.0, 1.0 + 0.11 * layers)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, loc="best")
