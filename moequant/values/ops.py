"""Ways from one layout of a tensor to another: what lies between stored tensors, model weights and files.

An op is plain data. `shape` and `apply` go from the whole to what the op makes of it, `put` writes such a
thing back to where it came from. Ops count axes from the last, so that they serve a stack as well as one of
its matrices. Those whose `apply` gives a view need no `put` of their own: writing into the view does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Op:
    """One step. Subclasses say what `apply` does to a tensor, and `shape` to a shape."""

    def shape(self, shape: Shape) -> Shape:
        """The shape of what `apply` makes of a tensor of that shape; ValueError when it cannot."""
        raise NotImplementedError

    def apply(self, x: Tensor) -> Tensor:
        """What the op makes of x."""
        raise NotImplementedError

    def put(self, into: Tensor, x: Tensor) -> None:
        """Give `into` the values for which `apply(into)` is x."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class View(Op):
    """An op whose `apply` gives a view."""

    def put(self, into: Tensor, x: Tensor) -> None:
        """See `Op`."""
        self.apply(into).copy_(x)


@dataclass(frozen=True, slots=True)
class Part(View):
    """Entries start, start + step, … before `stop` of an axis."""

    start: int
    stop: int
    step: int = 1
    axis: int = -2

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        if not 0 <= self.start < self.stop <= shape[self.axis]:
            raise ValueError(f"entries {self.start} to {self.stop} of {shape[self.axis]}")
        return _replaced(shape, self.axis, (len(range(self.start, self.stop, self.step)),))

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        rows = x.transpose(self.axis, 0)[self.start : self.stop : self.step]
        return rows.transpose(self.axis, 0)


@dataclass(frozen=True, slots=True)
class Transposed(View):
    """The last two axes change places."""

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        return (*shape[:-2], shape[-1], shape[-2])

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        return x.transpose(-1, -2)


@dataclass(frozen=True, slots=True)
class Stacked(View):
    """An axis cut into `count` equal parts, one behind the other: [.., count·n, ..] -> [.., count, n, ..]."""

    count: int
    axis: int = -2

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        if self.count < 1 or shape[self.axis] % self.count:
            raise ValueError(f"{shape[self.axis]} in {self.count} equal parts")
        return _replaced(shape, self.axis, (self.count, shape[self.axis] // self.count))

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        return _cut(x, x.ndim + self.axis, (self.count, -1))


@dataclass(frozen=True, slots=True)
class Squeezed(View):
    """An axis of one entry goes."""

    axis: int

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        if shape[self.axis] != 1:
            raise ValueError(f"an axis of {shape[self.axis]} entries, not 1")
        return _replaced(shape, self.axis, ())

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        return x.squeeze(self.axis)


@dataclass(frozen=True, slots=True)
class Joined(Op):
    """An axis and the one before it as one: [.., m, n, ..] -> [.., m·n, ..]."""

    axis: int = -2

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        at = len(shape) + self.axis
        if at < 1:
            raise ValueError(f"{len(shape)} axes, of which none lies before axis {self.axis}")
        return (*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :])

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        at = x.ndim + self.axis
        return x.flatten(at - 1, at)

    def put(self, into: Tensor, x: Tensor) -> None:
        """See `Op`."""
        into.copy_(x.reshape(into.shape))


@dataclass(frozen=True, slots=True)
class Grouped(Op):
    """An axis of a·b·n entries, read as [a, b, n], in the order [b, a, n]."""

    a: int
    b: int
    axis: int = -2

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        if shape[self.axis] % (self.a * self.b):
            raise ValueError(f"{shape[self.axis]} in {self.a} x {self.b} equal parts")
        return shape

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        return self._swapped(x, self.a, self.b)

    def put(self, into: Tensor, x: Tensor) -> None:
        """See `Op`."""
        into.copy_(self._swapped(x, self.b, self.a))

    def _swapped(self, x: Tensor, a: int, b: int) -> Tensor:
        at = x.ndim + self.axis
        return _cut(x, at, (a, b, -1)).transpose(at, at + 1).reshape(x.shape)


@dataclass(frozen=True, slots=True)
class Interleaved(Op):
    """Rows of every head from rotary halves (x0 … y0 …) to pairs (x0 y0 x1 y1 …)."""

    heads: int
    axis: int = -2

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        if shape[self.axis] % (2 * self.heads):
            raise ValueError(f"{shape[self.axis]} rows in {self.heads} heads of pairs")
        return shape

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        return self._swapped(x, 2, x.shape[self.axis] // self.heads // 2)

    def put(self, into: Tensor, x: Tensor) -> None:
        """See `Op`."""
        into.copy_(self._swapped(x, x.shape[self.axis] // self.heads // 2, 2))

    def _swapped(self, x: Tensor, a: int, b: int) -> Tensor:
        at = x.ndim + self.axis
        return _cut(x, at, (self.heads, a, b)).transpose(at + 1, at + 2).reshape(x.shape)


@dataclass(frozen=True, slots=True)
class Taken(Op):
    """Entries of an axis in the order of `index`, each at most once."""

    index: tuple[int, ...]
    axis: int = -2

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        if max(self.index) >= shape[self.axis]:
            raise ValueError(f"entry {max(self.index)} of {shape[self.axis]}")
        return _replaced(shape, self.axis, (len(self.index),))

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        return x.index_select(x.ndim + self.axis, self._index(x))

    def put(self, into: Tensor, x: Tensor) -> None:
        """See `Op`."""
        into.index_copy_(into.ndim + self.axis, self._index(into), x.to(into))

    def _index(self, like: Tensor) -> Tensor:
        return like.new_empty(0).long().new_tensor(self.index)  # never as floats: bf16 counts to 256


@dataclass(frozen=True, slots=True)
class Plus(Op):
    """Every value plus a number: norms that a model applies as 1 + w."""

    value: float

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        return shape

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        return x.float() + self.value

    def put(self, into: Tensor, x: Tensor) -> None:
        """See `Op`."""
        into.copy_(x - self.value)


@dataclass(frozen=True, slots=True)
class NegativeExp(Op):
    """-exp(x): decay rates that a model stores as logarithms."""

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        return shape

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        return -x.float().exp()

    def put(self, into: Tensor, x: Tensor) -> None:
        """See `Op`."""
        into.copy_((-x).log())


@dataclass(frozen=True, slots=True)
class Exp(Op):
    """exp(x): decay rates of either sign are stored as logarithms."""

    def shape(self, shape: Shape) -> Shape:
        """See `Op`."""
        return shape

    def apply(self, x: Tensor) -> Tensor:
        """See `Op`."""
        return x.float().exp()

    def put(self, into: Tensor, x: Tensor) -> None:
        """See `Op`."""
        into.copy_(x.log())


Ops = tuple[Op, ...]


def on_rows(op: Op) -> bool:
    """Whether an op moves whole rows: it does the same to rows in the bytes of a format."""
    return isinstance(op, Part | Interleaved | Grouped | Taken) and op.axis == -2


def shape_after(ops: Sequence[Op], shape: Shape) -> Shape:
    """The shape of what the ops make, one after the other; ValueError when one cannot."""
    for op in ops:
        try:
            shape = op.shape(shape)
        except IndexError:
            raise ValueError(f"{len(shape)} axes, too few for {op}") from None
    return shape


def apply(ops: Sequence[Op], x: Tensor) -> Tensor:
    """x through the ops, one after the other; a view where all of them give views."""
    for op in ops:
        x = op.apply(x)
    return x


def put(ops: Sequence[Op], into: Tensor, x: Tensor) -> None:
    """Give `into` values such that `apply(ops, into)` is x, of whatever dtype and device; what the ops leave
    out stays as it is."""
    if not ops:
        into.copy_(x.reshape(into.shape))
        return
    first, rest = ops[0], ops[1:]
    if not rest:
        first.put(into, x)
        return
    part = first.apply(into)
    put(rest, part, x)
    if part.untyped_storage().data_ptr() != into.untyped_storage().data_ptr():  # else written by the view
        first.put(into, part)


def numel(shape: Shape) -> int:
    """How many numbers a tensor of that shape holds."""
    return prod(shape)


def _cut(x: Tensor, at: int, sizes: Shape) -> Tensor:
    """An axis as several: a view."""
    found: Tensor = x.unflatten(at, sizes)  # type: ignore[no-untyped-call]
    return found


def _replaced(shape: Shape, axis: int, by: Shape) -> Shape:
    at = len(shape) + axis
    return (*shape[:at], *by, *shape[at + 1 :])
