"""Routing health as tables for a terminal, as JSON, and as a heatmap."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moequant.errors import OutputError
from moequant.files import atomic
from moequant.report.style import line, table
from moequant.statistics.coverage import Coverage
from moequant.statistics.health import STARVED_BELOW, Health, Load
from moequant.values import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 12
"""Experts named in a line; the JSON has them all."""

PICTURES = (".png", ".svg", ".pdf")

LABELLED = 300
"""Cells of the heatmap that still have room for a number each."""

DARK = 0.45
"""Below this part of the colour scale white numbers are easier to read than black ones."""


def routing_tables(found: Health, coverage: Coverage | None = None) -> RenderableType:
    """Everything a person looks at first: layers, extremes, domains, and who still starves."""
    parts: list[RenderableType] = [line(f"routed {found.tokens:,} tokens of: {found.source}\n")]
    if not found.layers:
        return Group(*parts, line("a dense model: there are no routers"))
    parts += [_layers(found), *_absent(found), _extremes(found)]
    if len(found.domains) > 1:
        parts.append(_domains(found))
    if coverage is not None:
        parts += [line(text) for text in coverage_lines(coverage)]
    return Group(*parts)


def coverage_lines(coverage: Coverage) -> list[str]:
    """What feeding starved experts did, and whom it could not feed."""
    drawn = ", ".join(f"{name} {rows}" for name, rows in coverage.drawn.items() if rows)
    lines = [
        f"each expert was to see {coverage.target:,} tokens; {coverage.rounds} rounds, "
        f"rows by domain: {drawn}; stopped: {coverage.stopped}"
    ]
    if coverage.starved:
        named = _named(f"{one.layer}.{one.expert} ({one.tokens:,})" for one in coverage.starved)
        lines.append(f"{len(coverage.starved)} experts stay starved, layer.expert (tokens): {named}")
    return lines


def _layers(found: Health) -> Table:
    made = table(
        "routers",
        "layer",
        "experts",
        "max / mean",
        "variation",
        "load entropy",
        "gate entropy",
        "starved",
        "unseen",
        "most often together",
    )
    for layer in found.layers:
        pair = (
            f"{layer.pair.experts[0]}, {layer.pair.experts[1]}: {layer.pair.together:.2f}"
            if layer.pair
            else ""
        )
        made.add_row(
            str(layer.layer),
            str(layer.experts),
            f"{layer.imbalance:.2f}",
            f"{layer.variation:.2f}",
            f"{layer.load_entropy:.3f}",
            f"{layer.gate_entropy:.3f}",
            str(len(layer.starved)),
            str(len(layer.dead)),
            pair,
        )
    made.caption = (
        "variation: standard deviation over mean; entropies: 1 is even; "
        f"starved: below {STARVED_BELOW:g} of the fair share; together: cosine of the token sets"
    )
    made.caption_justify = "left"
    return made


def _absent(found: Health) -> list[Text]:
    """Experts that saw no token at all, by name."""
    dead = [f"{layer.layer}.{expert}" for layer in found.layers for expert in layer.dead]
    experts = "expert" if len(dead) == 1 else "experts"
    return [line(f"{len(dead)} {experts} saw no token (layer.expert): {_named(dead)}\n")] if dead else []


def _extremes(found: Health) -> Table:
    headers = ("layer.expert", "tokens", "of fair share")
    made = table("coldest and hottest experts", *headers, *headers)
    for cold, hot in zip(found.coldest, found.hottest, strict=True):
        made.add_row(*_load(cold), *_load(hot))
    return made


def _load(load: Load) -> tuple[str, str, str]:
    return f"{load.layer}.{load.expert}", f"{load.tokens:,}", f"{load.fair:.3g}"


def _domains(found: Health) -> Table:
    made = table(
        "domains", "domain", "tokens", "load entropy", "most alike", "least alike", "feeds (layer.expert)"
    )
    made.columns[5].justify = "left"
    for domain in found.domains:
        feeds = ", ".join(f"{layer}.{expert} ×{times:.1f}" for layer, expert, times in domain.favourites[:3])
        made.add_row(
            domain.domain,
            f"{domain.tokens:,}",
            f"{domain.load_entropy:.3f}",
            _other(domain.nearest),
            _other(domain.farthest),
            feeds,
        )
    return made


def _other(other: tuple[str, float] | None) -> str:
    return f"{other[0]} {other[1]:.2f}" if other else ""


def _named(names: Iterable[str]) -> str:
    every = list(names)
    rest = f", … ({len(every) - NAMED} more)" if len(every) > NAMED else ""
    return ", ".join(every[:NAMED]) + rest


def routing_json(found: Health, calibration: Calibration, coverage: Coverage | None = None) -> dict[str, Any]:
    """All figures, and every expert's tokens by layer and by domain, for a machine."""
    value: dict[str, Any] = asdict(found)
    value["domain_names"] = list(calibration.domains)
    for layer, route in zip(value["layers"], calibration.routes, strict=True):
        layer["expert_tokens"] = route.tokens.tolist()
        layer["expert_gate_mass"] = route.gate_mass.tolist()
        layer["domain_tokens"] = route.domain_tokens.tolist()
    if coverage is not None:
        value["coverage"] = {
            "target": coverage.target,
            "rounds": coverage.rounds,
            "rows": coverage.drawn,
            "stopped": coverage.stopped,
            "starved": [asdict(one) for one in coverage.starved],
        }
    return value


def check_picture(path: Path) -> None:
    """OutputError when no picture can be drawn into a file of that name: said before any work is done."""
    if path.suffix not in PICTURES:
        raise OutputError(f"{path}: pictures are {', '.join(PICTURES)}; give one of these suffixes")
    try:
        import matplotlib  # noqa: F401  asked for here, so that nobody waits for a pass and then has no picture
    except ImportError:
        raise OutputError(f"{path}: drawing needs matplotlib; pip install matplotlib") from None


def heatmap(calibration: Calibration, path: Path) -> None:
    """Tokens of every expert of every layer, as multiples of the fair share, into a .png, .svg or .pdf.

    Colours are cividis on a logarithmic scale: even in lightness, so it reads the same in
    grey print and for people who do not tell red from green; experts without any token are crossed.
    The same statistics give the same bytes. Raises OutputError when the disk refuses.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    layers, experts = len(calibration.routes), max(len(route.tokens) for route in calibration.routes)
    width = min(12.0, 3.0 + 0.42 * experts)
    height = min(9.0, 2.0 + 0.36 * layers)
    with rc_context({"svg.hashsalt": "moequant", "svg.fonttype": "none"}), atomic(path) as partial:
        figure = Figure(figsize=(max(width, 6.0), max(height, 2.6)), layout="constrained")
        _draw(figure.add_subplot(), calibration, experts)
        kind = path.suffix[1:]
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(partial, format=kind, dpi=150, metadata=undated)


def _draw(axes: Axes, calibration: Calibration, experts: int) -> None:
    fair = [_fair(route.tokens.tolist(), experts) for route in calibration.routes]
    logs = [[math.log2(value) if value > 0 else math.nan for value in row] for row in fair]
    # As wide as the loads, but never so narrow that an even router looks uneven, and not past 1/16.
    limit = min(4, max([2, *(math.ceil(abs(log)) for row in logs for log in row if not math.isnan(log))]))
    image = axes.imshow(logs, cmap="cividis", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    few = len(logs) * experts <= LABELLED
    for row, (shares, route) in enumerate(zip(fair, calibration.routes, strict=True)):
        for column, value in enumerate(shares):
            if value == 0:
                axes.text(column, row, "×", ha="center", va="center", color="black", fontsize=7)
            elif few and value > 0:
                colour = "white" if (math.log2(value) + limit) / (2 * limit) < DARK else "black"
                label = _short(int(route.tokens[column]))
                axes.text(column, row, label, ha="center", va="center", color=colour, fontsize=7)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    step = max(1, math.ceil(len(logs) / 40))
    axes.set_yticks(range(0, len(logs), step), [str(route.layer) for route in calibration.routes[::step]])
    if experts <= 64:
        axes.set_xticks(range(experts))
    axes.set_title(f"tokens of every expert ({calibration.tokens:,} routed; × none)", loc="left", fontsize=10)
    ticks = range(-limit, limit + 1)
    bar = axes.figure.colorbar(image, ax=axes, extend="both", ticks=ticks)
    bar.ax.set_yticklabels([f"1/{2**-tick}" if tick < 0 else str(2**tick) for tick in ticks])
    bar.set_label("times the fair share")


def _fair(counts: list[int], experts: int) -> list[float]:
    """Multiples of the layer's mean; NaN where a layer has fewer experts than the widest."""
    mean = sum(counts) / len(counts)
    return [count / mean if mean else 0.0 for count in counts] + [math.nan] * (experts - len(counts))


def _short(count: int) -> str:
    """A count in at most four characters."""
    for limit, unit in ((1_000, ""), (1_000_000, "k"), (1_000_000_000, "M")):
        if count < limit:
            value = count * 1_000 / limit
            return str(count) if not unit else f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"
    return f"{count / 1e9:.0f}G"
