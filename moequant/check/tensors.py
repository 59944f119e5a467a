"""One tensor of the file: bytes, decoder, kernel, and every expert against the baseline's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.check.activations import TOKENS, Collector
from moequant.check.damage import Marks, expected_error, find, marks
from moequant.check.figures import KERNEL_LIMIT, Damage, ExpertFigures, TensorFigures
from moequant.check.product import NO_KERNEL, Product
from moequant.check.source import ALTERED, Entry, Source
from moequant.checkpoint import load
from moequant.kernels import Matrix
from moequant.values import Weight


@dataclass(frozen=True, slots=True)
class Against:
    """The baseline's weight, and what it is fed there."""

    weight: Weight
    seen: Collector


@dataclass(frozen=True, slots=True)
class _Rows:
    """Inputs of all experts, one after the other: x f32 [n, in], expert i64 [n], how many are real."""

    x: Tensor
    expert: Tensor
    real: list[int]


def check_tensor(
    source: Source, entry: Entry, product: Product, against: Against | None
) -> tuple[TensorFigures, list[Damage]]:
    """Everything about one tensor, and what is wrong with it."""
    matrix = source.matrix(entry)
    changed = source.altered(entry, matrix)
    damages = [Damage(source.label(entry, e), ALTERED) for e in changed]
    decoded, reference = source.decode(entry, matrix), source.reference(entry, matrix)
    same = [_same(*pair, entry.steps) for pair in zip(decoded, reference, strict=True)]
    damages += [
        Damage(source.label(entry, e), "the reference decoder makes other values of it")
        for e, agrees in enumerate(same)
        if not agrees
    ]
    expected = expected_error(entry.alike)
    rows = _rows(entry, against)
    name, got = _product(matrix, decoded, product, rows)
    figures = _figures(got, reference, rows, same)
    damages += [
        Damage(
            source.label(entry, f.expert), f"kernel is off by {f.kernel_error:.2g} (limit {KERNEL_LIMIT:g})"
        )
        for f in figures
        if not f.kernel_error <= KERNEL_LIMIT
    ]
    if against is not None:
        values = load(against.weight).float().view(entry.shape)
        found = [
            marks(source.span(entry, matrix, e, decoded[e]), values[e], decoded[e])
            for e in range(entry.shape[0])
        ]
        figures = [_with_baseline(f, m, values, decoded, rows) for f, m in zip(figures, found, strict=True)]
        vouched = [source.recorded and e not in changed for e in range(entry.shape[0])]
        told = find(found, vouched, expected, values, decoded)
        damages += [Damage(source.label(entry, e), what) for e, what in told]
    return TensorFigures(entry.name, entry.format, entry.shape, name, expected, tuple(figures)), damages


def _same(a: Tensor, b: Tensor, steps: int) -> bool:
    """Equal bit for bit, any NaN equal to any other; or as near as so many steps of f32's last place."""
    equal = (a.view(torch.int32) == b.view(torch.int32)) | (torch.isnan(a) & torch.isnan(b))
    if steps:
        equal |= (a - b).abs() <= steps * torch.finfo(torch.float32).eps * b.abs()
    return bool(equal.all())


def _rows(entry: Entry, against: Against | None) -> _Rows:
    """Real inputs where calibration has some, normal ones where the router sent nothing."""
    generator = torch.Generator().manual_seed(0)
    xs, experts, real = [], [], []
    for expert in range(entry.shape[0]):
        key = None
        if against is not None and against.weight.site is not None:
            key = (against.weight.site.name, expert if against.weight.matrices > 1 else 0)
        x = None if against is None or key is None else against.seen.inputs.get(key)
        real.append(0 if x is None else len(x))
        xs.append(torch.randn(TOKENS, entry.shape[2], generator=generator) if x is None else x)
        experts.append(torch.full((len(xs[-1]),), expert))
    return _Rows(torch.cat(xs), torch.cat(experts), real)


def _product(matrix: Matrix | None, decoded: Tensor, product: Product, rows: _Rows) -> tuple[str, Tensor]:
    """What multiplied, and what came out [n, out]."""
    if matrix is None:
        return NO_KERNEL, product.of_values(rows.x, decoded, rows.expert)
    name, multiply = product.of(matrix, len(rows.x))
    return name, multiply(rows.x, matrix, rows.expert)


def _figures(got: Tensor, reference: Tensor, rows: _Rows, same: list[bool]) -> list[ExpertFigures]:
    """Each expert's product against float32 of its weights as the other decoder has them."""
    figures = []
    for expert, weights in enumerate(reference):
        of = rows.expert == expert
        want = rows.x[of] @ weights.T
        figures.append(ExpertFigures(expert, same[expert], _relative(got[of], want), rows.real[expert]))
    return figures


def _with_baseline(
    figures: ExpertFigures, mark: Marks, values: Tensor, decoded: Tensor, rows: _Rows
) -> ExpertFigures:
    """Errors of weights and, on real inputs, of outputs."""
    expert, output, cosine, largest = figures.expert, None, None, None
    if figures.tokens:
        x = rows.x[rows.expert == expert]
        want, got = x @ values[expert].T, x @ decoded[expert].T
        output, cosine, largest = _relative(got, want), *shape_of_error(got, want)
    return ExpertFigures(
        expert,
        figures.same_decoded,
        figures.kernel_error,
        figures.tokens,
        mark.error,
        output,
        cosine,
        largest,
    )


def shape_of_error(got: Tensor, want: Tensor) -> tuple[float, float]:
    """(cosine, largest difference in units of the root mean square of `want`)."""
    cosine = (got * want).sum() / (got.norm() * want.norm()).clamp_min(1e-30)
    return float(cosine), float((got - want).abs().max() / want.square().mean().sqrt().clamp_min(1e-30))


def _relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; infinite when a value is not finite."""
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    return error if error == error else float("inf")
