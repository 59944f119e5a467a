"""What a row may be rounded to once its scales stand: the points of a format, columns first.

Everything here is laid out [E, columns, rows]: a column of all rows is contiguous, because rounding
with feedback walks from column to column and treats all rows (and experts) alike.

    weight = step · level - offset,  step = d · scales[scale],  offset = dmin · minima[minimum]

A scalar format's level belongs to a weight, a vector format's to a group of 4 or 8: a row of the grid
with its signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from moequant.errors import FormatError
from moequant.formats import Format
from moequant.formats.grids import Layout
from moequant.formats.layout import half
from moequant.formats.parts import Parts, Scalar, Vector, VectorParts, count_up, look_up
from moequant.formats.signs import join_signs
from moequant.native import WIDE, Levels, Steps
from moequant.rounding.vectors import DOWN, EIGHT


@dataclass(frozen=True, slots=True)
class Fields:
    """What `columns` of some rows are made of. Updated in place as rounding proceeds.

    level f32 [E, columns, R]; scale and minimum f32 [E, columns / sub, R], integer codes; d and dmin
    f32 [E, columns / block, R], exact as the format stores them; row i32 [E, columns / grid.group, R] of a
    grid (plus `vectors.DOWN`). Where a format has no such field there is no column of it.
    """

    level: Tensor
    scale: Tensor
    minimum: Tensor
    d: Tensor
    dmin: Tensor
    row: Tensor

    def all(self) -> tuple[Tensor, ...]:
        """Every field, in order."""
        return self.level, self.scale, self.minimum, self.d, self.dmin, self.row

    def rows(self, which: Tensor) -> Fields:
        """A copy of those rows."""
        return Fields(*(x[:, :, which] for x in self.all()))

    def put(self, which: Tensor, other: Fields) -> None:
        """Replace those rows."""
        for own, new in zip(self.all(), other.all(), strict=True):
            own[:, :, which] = new

    def copy(self) -> Fields:
        """Fields that can be changed without changing these."""
        return Fields(*(x.clone() for x in self.all()))

    def where(self, changed: Tensor, other: Fields) -> Fields:
        """`other` for the rows that are `changed` [E, R]."""
        pairs = zip(other.all(), self.all(), strict=True)
        return Fields(*(torch.where(changed[:, None], new, old) for new, old in pairs))


@dataclass(frozen=True)
class Lattice:
    """A format as rounding sees it; scales ascend with their codes."""

    fmt: Format
    group: int
    sub: int
    scales: tuple[float, ...]
    scale_codes: range
    minima: tuple[float, ...]
    moves_d: bool

    @property
    def block(self) -> int:
        """Weights that share d."""
        return self.fmt.block

    def block_of(self, f: Fields, begin: int) -> Fields:
        """A view of the fields of the block that starts at column `begin`."""

        def cut(x: Tensor, share: int) -> Tensor:
            return x[:, begin // share : (begin + self.block) // share]

        per_row = self.group if self.group == 1 else self.layout.grid.group
        shares = (1, self.sub, self.sub, self.block, self.block, per_row)
        return Fields(*(cut(x, share) for x, share in zip(f.all(), shares, strict=True)))

    def step(self, f: Fields) -> Tensor:
        """[E, sub-blocks, R]: what the levels are multiplied with."""
        return self.spread(f.d, self.block // self.sub) * look_up(self.scales, f.scale)

    def offset(self, f: Fields) -> Tensor | None:
        """[E, sub-blocks, R]: what is subtracted, None where nothing ever is."""
        if not self.minima:
            return None
        return self.spread(f.dmin, self.block // self.sub) * look_up(self.minima, f.minimum)

    def value(self, f: Fields) -> Tensor:
        """[E, columns, R]: the weights."""
        value = self.scaled(self.step(f), f.level)
        offset = self.offset(f)
        return value if offset is None else value.sub_(self.spread(offset, self.sub))

    def scaled(self, each: Tensor, level: Tensor) -> Tensor:
        """[E, columns, R]: levels times what `each` sub-block [E, sub-blocks, R] has."""
        return (each[:, :, None] * level.view(len(level), -1, self.sub, level.shape[2])).view(level.shape)

    @staticmethod
    def spread(x: Tensor, times: int) -> Tensor:
        """[E, n, R] -> [E, n · times, R], each repeated in place."""
        return x if times == 1 else x[:, :, None].expand(-1, -1, times, -1).flatten(1, 2)

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The levels of a scalar format, ascending, each once."""
        view = self._scalar
        return tuple(sorted({view.levels[code] for code in view.codes}))

    @cached_property
    def counts_up(self) -> bool:
        """Whether the levels are all integers between the first and the last."""
        return self.levels == count_up(int(self.levels[0]), int(self.levels[-1]))

    @cached_property
    def native(self) -> Levels | None:
        """The levels as compiled loops take them; None where they are no integers."""
        if self._scalar.snap is not None:
            return None
        low, high = self.levels[0], self.levels[-1]
        table = None if self.counts_up else _nearest_by_halves(self.levels, torch.device("cpu")).data_ptr()
        return Levels(low, high, table)

    @cached_property
    def native_steps(self) -> Steps | None:
        """Scales and minima as compiled loops take them; None where a block is too wide for them, or d is not
        stored in 16 bits."""
        stored = self.fmt.view.storable if isinstance(self.fmt.view, Scalar) else half
        if self.block > WIDE or (self.moves_d and stored is not half):
            return None
        first, last = self.scale_codes[0], self.scale_codes[-1]
        only = self.minima[0] if len(self.minima) == 1 else 0.0
        moves_scales, scales = len(self.scale_codes) > 1, _table(self.scales).data_ptr()
        return Steps(self.sub, first, last, len(self.minima), moves_scales, self.moves_d, only, scales)

    def storable(self, d: Tensor) -> Tensor:
        """d or dmin, f32, as a block can hold it."""
        view = self.fmt.view
        return view.storable(d) if isinstance(view, Scalar) else half(d)

    def snap(self, t: Tensor) -> Tensor:
        """The level nearest to t; `t` may be overwritten. Scalar formats only."""
        if self._scalar.snap is not None:
            return self._scalar.snap(t)
        low, high = self.levels[0], self.levels[-1]
        if self.counts_up:
            return t.round_().clamp_(low, high)
        # All levels are integers: between two multiples of 1/2 the nearest level does not change.
        near = _nearest_by_halves(self.levels, t.device)
        at = (t * 2).floor_().clamp_(2 * low, 2 * high) - 2 * low
        return torch.take(near, at.to(torch.int64))  # half the time that indexing takes

    @property
    def _scalar(self) -> Scalar:
        assert isinstance(self.fmt.view, Scalar)
        return self.fmt.view

    @property
    def layout(self) -> Layout:
        """The grid of a vector format."""
        assert isinstance(self.fmt.view, Vector)
        return self.fmt.view.layout

    def read(self, packed: Tensor) -> Fields:
        """uint8 [E, R, bytes of whole blocks] -> its fields."""
        blocks = packed.reshape(-1, self.fmt.block_bytes)
        view = self.fmt.view
        if isinstance(view, Vector):
            vector = view.unpack(blocks)
            row = vector.row | vector.down.to(torch.int32) * DOWN if self.layout.signed else vector.row
            none = blocks[:, :0]
            each = (view.points(vector), vector.scale, none, vector.d, none, row)
        else:
            parts = self._scalar.unpack(blocks)
            level = look_up(self._scalar.levels, parts.codes)
            each = (level, parts.scale, parts.minimum, parts.d, parts.dmin, blocks[:, :0].to(torch.int32))
        whole = (x.reshape(*packed.shape[:2], -1).transpose(1, 2) for x in each)
        dtypes = (torch.float32,) * 5 + (torch.int32,)
        return Fields(*(x.to(t).contiguous() for x, t in zip(whole, dtypes, strict=True)))

    def write(self, f: Fields) -> Tensor:
        """The inverse of `read`: uint8 [E, R, row_bytes]."""
        experts, columns, n = f.level.shape

        def blocks(x: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
            """[E, k · blocks of a row, R] -> [blocks, k]."""
            whole = x.transpose(1, 2).to(dtype)
            return whole.reshape(experts * n * (columns // self.block), -1)

        exact, view = torch.float32, self.fmt.view
        if isinstance(view, Vector):
            row, level = blocks(f.row, torch.int32), blocks(f.level, torch.float32)
            signs = join_signs(level[:, :0] if self.layout.signed else level)
            down = (row >> 16).to(torch.uint8)
            vector = VectorParts(row & 0xFFF, signs, down, blocks(f.scale), blocks(f.d, exact))
            return view.pack(vector).view(experts, n, -1)
        known = self._scalar.code_of
        code = known(f.level) if known else _code_of(self._scalar.levels, self._scalar.codes, f.level)
        parts = Parts(
            blocks(code), blocks(f.scale), blocks(f.minimum), blocks(f.d, exact), blocks(f.dmin, exact)
        )
        return self._scalar.pack(parts).view(experts, n, -1)


@cache
def lattice_of(fmt: Format) -> Lattice:
    """The lattice of a block format; FormatError for those that have none."""
    view = fmt.view
    if isinstance(view, Scalar):
        moves_d = view.stores_d and fmt.shared is None
        return Lattice(fmt, 1, view.sub, view.scales, view.scale_codes, view.minima, moves_d)
    if isinstance(view, Vector):
        layout = view.layout
        odd = range(layout.ladder.lowest, layout.ladder.highest + 1, layout.ladder.step)
        scales = tuple(layout.unit * level for level in odd)
        return Lattice(fmt, EIGHT, layout.sub, scales, range(len(scales)), (), True)
    raise FormatError(f"{fmt.name} has no blocks whose scales could be set; round to a quantized type")


@cache
def _table(numbers: tuple[float, ...]) -> Tensor:
    """The same, f32, which stay where they are."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


@cache
def _nearest_by_halves(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """f32: the nearest level for every half step from the lowest to the highest level."""
    table = torch.tensor(levels, dtype=torch.float32, device=device)
    steps = torch.arange(2 * int(levels[0]), 2 * int(levels[-1]) + 1, dtype=torch.float32, device=device)
    middle = steps / 2 + 0.25
    return table[(middle[:, None] - table).abs().argmin(1)]


def _code_of(levels: tuple[float, ...], codes: range, level: Tensor) -> Tensor:
    """The code that stands for each level."""
    if levels == count_up(int(levels[0]), int(levels[-1])):
        return level - levels[0]
    table = torch.zeros(int(max(levels) - min(levels)) + 1, dtype=torch.float32, device=level.device)
    for code in reversed(codes):  # of two codes for 0, the first
        table[int(levels[code] - min(levels))] = code
    return table[(level - min(levels)).to(torch.int32)]
