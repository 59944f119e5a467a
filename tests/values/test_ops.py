"""Ops: `shape` says what `apply` makes, `put` is its inverse, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moequant.values.ops import (
    Exp,
    Grouped,
    Interleaved,
    Joined,
    NegativeExp,
    Op,
    Part,
    Plus,
    Squeezed,
    Stacked,
    Taken,
    Transposed,
    View,
    apply,
    numel,
    on_rows,
    put,
    shape_after,
)

Shape = tuple[int, ...]

SIZES = st.integers(1, 4).map(lambda n: 2 * n) | st.integers(1, 7)
SHAPES = st.lists(SIZES, min_size=1, max_size=4).map(tuple)
ELEMENTWISE = (Plus, NegativeExp, Exp)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def axes(shape: Shape, wanted: Callable[[int], bool]) -> list[int]:
    return [at - len(shape) for at, size in enumerate(shape) if wanted(size)]


def is_even(size: int) -> bool:
    return size % 2 == 0


def goes(kind: type[Op], shape: Shape) -> bool:
    """Whether some op of a kind goes with a shape."""
    if kind in (Transposed, Joined):
        return len(shape) > 1
    if kind is Squeezed:
        return len(shape) > 1 and 1 in shape
    return kind is not Interleaved or bool(axes(shape, is_even))


@dataclass
class Fitting:
    """Draws ops that go with a shape."""

    data: st.DataObject

    def one(self, shape: Shape, kinds: tuple[type[Op], ...]) -> Op | None:
        """An op of a kind that goes with the shape; None where none does."""
        fitting = [kind for kind in kinds if goes(kind, shape)]
        if not fitting:
            return None
        op: Op = getattr(self, self.data.draw(st.sampled_from(fitting)).__name__.lower())(shape)
        return op

    def axis(self, shape: Shape) -> int:
        return self.data.draw(st.integers(-len(shape), -1))

    def part(self, shape: Shape) -> Op:
        axis = self.axis(shape)
        start = self.data.draw(st.integers(0, shape[axis] - 1))
        stop = self.data.draw(st.integers(start + 1, shape[axis]))
        return Part(start, stop, self.data.draw(st.integers(1, 3)), axis)

    def transposed(self, shape: Shape) -> Op:
        return Transposed()

    def stacked(self, shape: Shape) -> Op:
        axis = self.axis(shape)
        return Stacked(self.data.draw(st.sampled_from(divisors(shape[axis]))), axis)

    def squeezed(self, shape: Shape) -> Op:
        return Squeezed(self.data.draw(st.sampled_from(axes(shape, lambda size: size == 1))))

    def joined(self, shape: Shape) -> Op:
        return Joined(self.data.draw(st.integers(1 - len(shape), -1)))

    def grouped(self, shape: Shape) -> Op:
        axis = self.axis(shape)
        a = self.data.draw(st.sampled_from(divisors(shape[axis])))
        return Grouped(a, self.data.draw(st.sampled_from(divisors(shape[axis] // a))), axis)

    def interleaved(self, shape: Shape) -> Op:
        axis = self.data.draw(st.sampled_from(axes(shape, is_even)))
        return Interleaved(self.data.draw(st.sampled_from(divisors(shape[axis] // 2))), axis)

    def taken(self, shape: Shape) -> Op:
        axis = self.axis(shape)
        order = self.data.draw(st.permutations(range(shape[axis])))
        return Taken(tuple(order[: self.data.draw(st.integers(1, shape[axis]))]), axis)

    def plus(self, shape: Shape) -> Op:
        return Plus(self.data.draw(st.sampled_from([-1.0, 1.0, 0.5])))

    def negativeexp(self, shape: Shape) -> Op:
        return NegativeExp()

    def exp(self, shape: Shape) -> Op:
        return Exp()


MOVES = (
    Part,
    Transposed,
    Stacked,
    Squeezed,
    Joined,
    Grouped,
    Interleaved,
    Taken,
)
KINDS = (*MOVES, *ELEMENTWISE)


def numbered(shape: Shape) -> Tensor:
    """Every entry another number."""
    return torch.arange(float(prod(shape))).view(shape)


def checked(ops: tuple[Op, ...], shape: Shape, exact: bool) -> None:
    """`shape_after` and `apply` agree; `put` gives what `apply` took, and leaves the rest alone."""
    x = numbered(shape) / 8
    made = apply(ops, x)
    assert shape_after(ops, shape) == tuple(made.shape) and numel(tuple(made.shape)) == made.numel()
    wanted = made.clone()
    into = torch.full(shape, 77.0)
    put(ops, into, wanted)
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(apply(ops, into), wanted, **close)
    if exact:  # ops that move entries: those that were taken are back, all others are as they were
        taken = torch.isin(x, wanted.contiguous())
        assert int(taken.sum()) == wanted.numel()
        assert torch.equal(into, torch.where(taken, x, torch.full_like(x, 77.0)))


@pytest.mark.parametrize("kind", MOVES)
@settings(max_examples=50)
@given(data=st.data(), shape=SHAPES)
def test_put_is_the_inverse_of_apply(kind: type[Op], data: st.DataObject, shape: Shape) -> None:
    op = Fitting(data).one(shape, (kind,))
    if op is not None:
        checked((op,), shape, exact=True)
        if isinstance(op, View):
            x = numbered(shape)
            assert op.apply(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", ELEMENTWISE)
@settings(max_examples=50)
@given(data=st.data(), shape=SHAPES)
def test_values_that_are_changed_come_back(kind: type[Op], data: st.DataObject, shape: Shape) -> None:
    op = Fitting(data).one(shape, (kind,))
    assert op is not None
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5
    into = torch.zeros(shape)
    op.put(into, op.apply(x))
    assert op.shape(shape) == shape
    torch.testing.assert_close(into, x)


@given(data=st.data(), shape=SHAPES)
def test_chains_are_put_back_too(data: st.DataObject, shape: Shape) -> None:
    ops: list[Op] = []
    at, fitting = shape, Fitting(data)
    for _ in range(data.draw(st.integers(0, 5))):
        op = fitting.one(at, MOVES)
        assert op is not None
        ops.append(op)
        at = op.shape(at)
    checked(tuple(ops), shape, exact=True)
    checked((*ops, Plus(1.0)), shape, exact=False)
    checked((Plus(1.0), *ops), shape, exact=False)


@settings(max_examples=50)
@given(data=st.data(), shape=SHAPES, other=SHAPES)
def test_what_does_not_go_is_a_value_error(data: st.DataObject, shape: Shape, other: Shape) -> None:
    """An op of one shape on another: `shape_after` says what comes out, or ValueError, and nothing else."""
    op = Fitting(data).one(shape, KINDS)
    assert op is not None
    try:
        expected = shape_after((op,), other)
    except ValueError:
        return
    assert tuple(op.apply(numbered(other)).shape) == expected


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Part(0, 5), (4, 9)),
        (Part(2, 2), (4, 9)),
        (Part(0, 2), (9,)),
        (Transposed(), (9,)),
        (Stacked(3), (4, 9)),
        (Stacked(0), (4, 9)),
        (Squeezed(-2), (4, 9)),
        (Joined(-1), (9,)),
        (Grouped(2, 3), (4, 9)),
        (Interleaved(2), (6, 9)),
        (Taken((4,)), (4, 9)),
    ],
    ids=str,
)
def test_ops_say_what_they_cannot_do(op: Op, shape: Shape) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        shape_after((op,), shape)


def test_interleaved_is_the_order_of_rotary_pairs() -> None:
    """Two heads of six rows: halves x0 x1 x2 y0 y1 y2 become x0 y0 x1 y1 x2 y2."""
    rows = torch.arange(12.0)[:, None].expand(12, 5)
    found = Interleaved(2).apply(rows)[:, 0].tolist()
    assert found == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_grouped_reads_one_way_and_lays_out_the_other() -> None:
    """Six groups of two, read as [3, 2, 2] and laid out as [2, 3, 2]."""
    found = Grouped(3, 2, axis=-1).apply(torch.arange(12.0)).tolist()
    assert found == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


def test_parts_of_one_tensor_lie_beside_each_other() -> None:
    """Gate and up in rows 0, 2, 4 … and 1, 3, 5 …, put back one after the other."""
    whole = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    gate, up = Part(0, 8, 2), Part(1, 8, 2)
    assert torch.equal(gate.apply(whole), whole[:, ::2]) and torch.equal(up.apply(whole), whole[:, 1::2])
    back = torch.empty_like(whole)
    for op in (gate, up):
        put((op,), back, op.apply(whole))
    assert torch.equal(back, whole)


def test_rows_are_moved_in_the_bytes_of_a_format_too() -> None:
    """`on_rows` is said of exactly those ops that do to a row's bytes what they do to its numbers."""
    rows = [Part(0, 2), Interleaved(1), Grouped(2, 1), Taken((1, 0))]
    columns = [Part(0, 2, axis=-1), Interleaved(1, axis=-1), Grouped(2, 1, axis=-1), Taken((0,), axis=-1)]
    others = (Plus(1.0), NegativeExp(), Exp())
    assert all(map(on_rows, rows))
    assert not any(map(on_rows, (*columns, Transposed(), Stacked(2), Joined(), *others)))
    for op in rows:  # 4 rows of 6 numbers, or of 20 bytes
        assert op.shape((4, 6))[0] == op.shape((4, 20))[0]
