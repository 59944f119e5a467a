"""Heatmaps of experts for a page: a row a layer, a column an expert, the value under the pointer.

A map is a picture that needs nothing (an 8-bit PNG inside the page) and 16 bits a value for the page's
script, so that 94 layers of 256 experts take some 100 kB.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from moequant.values import Role

if TYPE_CHECKING:
    from torch import Tensor

    from moequant.evaluate import RoutingChange

Kind = Literal["tokens", "error", "moved"]

COLOURS: dict[Kind, str] = {"tokens": "cividis", "error": "magma", "moved": "viridis"}
"""Even in lightness: the same in grey print, and for people who do not tell red from green."""

NONE, UNSEEN = 0, 1
"""Entries of the palette that are no part of the scale: no value, and an expert without tokens."""

RED = (229, 72, 77)
FIRST = 2
STEPS = 254

MISSING = 0xFFFF
"""The code of a cell without a value."""

LEAST = 1e-12
"""Errors below this are drawn like it: logarithms have to end somewhere."""

LINE = 14
"""Pixels of a label's height."""

TALL, ROW = 460, (4, 24)
"""Pixels of a map, about, and of a layer: at least and at most."""


@dataclass(frozen=True, slots=True)
class Map:
    """One heatmap: `values` f64 [layers, experts], NaN where there is none, and the scale of its colours.

    Tokens are drawn as multiples of the fair share, of 1/16 to 16; errors on a logarithmic scale from `low`
    to `high`; shares of tokens that moved from 0 to `high`.
    """

    kind: Kind
    title: str
    layers: tuple[int, ...]
    values: NDArray[np.float64]
    low: float
    high: float

    @property
    def picture(self) -> str:
        """The map as a data: address of a PNG, a pixel a cell."""
        return "data:image/png;base64," + base64.b64encode(_png(self._cells(), _palette(self.kind))).decode()

    @property
    def codes(self) -> str:
        """Base64 of a little-endian integer a cell, see `width`, `start` and `step`."""
        return base64.b64encode(self._codes().tobytes()).decode()

    @property
    def width(self) -> int:
        """Bits of a code: counts are exact, so large ones take 32."""
        return 32 if self.kind == "tokens" and np.nanmax(self.values, initial=0) >= MISSING else 16

    @property
    def start(self) -> float:
        """The value of code 0, its logarithm for errors."""
        return math.log(self.low) if self.kind == "error" else 0.0

    @property
    def step(self) -> float:
        """What the next code adds to it."""
        if self.kind == "tokens":
            return 1.0
        span = math.log(self.high) - self.start if self.kind == "error" else self.high
        return span / (MISSING - 1)

    @property
    def row(self) -> int:
        """Pixels of a layer on the page."""
        return max(ROW[0], min(ROW[1], TALL // len(self.layers)))

    @property
    def rows(self) -> list[tuple[float, int]]:
        """(place from 0 to 1, layer) of the labels beside the map."""
        return _ticks(self.layers, math.ceil(LINE / self.row))

    @property
    def columns(self) -> list[tuple[float, int]]:
        """(place from 0 to 1, expert) of the labels below it."""
        count = self.values.shape[1]
        return _ticks(range(count), max(1, math.ceil(count / 16)))

    @property
    def gradient(self) -> str:
        """The scale's colours for CSS."""
        stops = [_palette(self.kind)[FIRST + at] for at in np.linspace(0, STEPS - 1, 9).astype(int)]
        return f"linear-gradient(90deg, {', '.join(f'#{bytes(stop).hex()}' for stop in stops)})"

    @property
    def ends(self) -> tuple[str, str]:
        """What the ends of the scale are called."""
        if self.kind == "tokens":
            return "1/16 of the fair share or less", "16 times or more"
        return f"{100 * self.low:.3g} %", f"{100 * self.high:.3g} %"

    def _cells(self) -> NDArray[np.uint8]:
        """An entry of the palette for every cell."""
        known = ~np.isnan(self.values)
        values = np.where(known, self.values, 0.0)
        if self.kind == "tokens":
            fair = np.nanmean(np.where(known, self.values, np.nan), axis=1, keepdims=True)
            ratio = np.clip(values / np.maximum(fair, 1e-9), 1 / 16, 16)
            part = (np.log2(ratio) + 4) / 8
        elif self.kind == "error":
            part = (np.log(np.maximum(values, self.low)) - self.start) / (math.log(self.high) - self.start)
        else:
            part = values / self.high
        cells = FIRST + np.rint(np.clip(part, 0, 1) * (STEPS - 1))
        if self.kind == "tokens":
            cells = np.where(values == 0, UNSEEN, cells)
        return np.asarray(np.where(known, cells, NONE), np.uint8)

    def _codes(self) -> NDArray[np.unsignedinteger]:
        known = ~np.isnan(self.values)
        values = np.where(known, self.values, self.low)
        shown = np.log(np.maximum(values, self.low)) if self.kind == "error" else values
        codes = np.rint((shown - self.start) / self.step) if self.step else np.zeros_like(shown)
        wide = self.width == 32
        return np.where(known, codes, 2**32 - 1 if wide else MISSING).astype("<u4" if wide else "<u2")


def tokens(seen: Mapping[int, Tensor], title: str) -> Map | None:
    """Tokens i64 [E] that every expert of a layer saw, by layer; None without any."""
    return _map("tokens", title, seen, 0.0, 0.0)


def moved(changes: Sequence[RoutingChange], title: str) -> Map | None:
    """Of the tokens of every expert, the share that another expert computes in the candidate."""
    shares = {change.layer: change.by_expert for change in changes if change.by_expert}
    high = max((share for row in shares.values() for share in row if share is not None), default=0.0)
    return _map("moved", title, shares, 0.0, max(high, 1e-4))


def errors(losses: Sequence[tuple[Role, int | None, Tensor]]) -> list[Map]:
    """Errors f64 [E] of weights (role, layer, error): a map a projection, one scale for all."""
    expert = [(role, layer, error) for role, layer, error in losses if role.is_expert and layer is not None]
    found: list[Map] = []
    values = [value for _, _, error in expert for value in error.tolist()]
    low, high = max(LEAST, min(values, default=LEAST)), max(2 * LEAST, max(values, default=1.0))
    for role in dict.fromkeys(role for role, _, _ in expert):
        rows = {layer: error for each, layer, error in expert if each is role}
        made = _map("error", str(role), rows, min(low, high / 2), high)
        assert made is not None
        found.append(made)
    return found


def _map(
    kind: Kind,
    title: str,
    rows: Mapping[int, Tensor] | Mapping[int, Sequence[float | None]],
    low: float,
    high: float,
) -> Map | None:
    """Rows of any lengths as one map, NaN beyond their ends."""
    if not rows:
        return None
    lists = [list(row) if isinstance(row, Sequence) else row.tolist() for row in rows.values()]
    values = np.full((len(lists), max(map(len, lists))), math.nan)
    for at, row in enumerate(lists):
        values[at, : len(row)] = [math.nan if value is None else value for value in row]
    return Map(kind, title, tuple(rows), values, low, high)


def _ticks(names: Sequence[int], step: int) -> list[tuple[float, int]]:
    return [((at + 0.5) / len(names), names[at]) for at in range(0, len(names), step)]


@cache
def _palette(kind: Kind) -> NDArray[np.uint8]:
    """Colours [256, 3]."""
    from matplotlib import colormaps

    scale = colormaps[COLOURS[kind]](np.linspace(0, 1, STEPS))[:, :3]
    return np.vstack([[(128, 128, 128), RED], np.rint(255 * scale)]).astype(np.uint8)


def _png(cells: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """A picture with a palette; entry NONE is transparent. https://www.w3.org/TR/png-3/"""
    height, width = cells.shape
    lines = np.hstack([np.zeros((height, 1), np.uint8), cells])  # every line begins with its filter, none
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette.tobytes()),
        (b"tRNS", bytes([0])),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
