"""One tensor of the file: bytes, decoder, kernel, and every expert against the baseline's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.check.activations import TOKENS, Collector
from moequant.check.baseline import ALTERED, Entry, Source
from moequant.check.damage import Marks, expected_error, find, marks
from moequant.check.figures import KERNEL_LIMIT, Damage, ExpertFigures, TensorFigures
from moequant.check.product import Product
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
    damages = [Damage(source.label(entry, e), ALTERED) for e in changed or ()]
    decoded, reference = source.decode(entry, matrix), source.reference(entry, matrix)
    same = [_same_bits(*pair) for pair in zip(decoded, reference, strict=True)]
    damages += [
        Damage(source.label(entry, e), "the reference decoder makes other values of it")
        for e, agrees in enumerate(same)
        if not agrees
    ]
    expected = expected_error(entry.format)
    rows = _rows(entry, against)
    name, figures = _products(matrix, product, rows, same, reference)
    damages += [
        Damage(
            source.label(entry, f.expert), f"kernel is off by {f.kernel_error:.2g} (limit {KERNEL_LIMIT:g})"
        )
        for f in figures
        if not f.kernel_error <= KERNEL_LIMIT
    ]
    if against is not None:
        values = load(against.weight).float().view(entry.shape)
        found = [marks(matrix, e, values[e], decoded[e]) for e in range(entry.shape[0])]
        figures = [_with_baseline(f, m, values, decoded, rows) for f, m in zip(figures, found, strict=True)]
        vouched = [changed is not None and e not in changed for e in range(entry.shape[0])]
        told = find(found, vouched, expected, values, decoded)
        damages += [Damage(source.label(entry, e), what) for e, what in told]
    return TensorFigures(entry.name, entry.format, entry.shape, name, expected, tuple(figures)), damages


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, any NaN equal to any other."""
    both = torch.isnan(a) & torch.isnan(b)
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | both).all())


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


def _products(
    matrix: Matrix, product: Product, rows: _Rows, same: list[bool], reference: Tensor
) -> tuple[str, list[ExpertFigures]]:
    """What multiplied, and each expert's product against float32 of its decoded weights."""
    name, multiply = product.of(matrix, len(rows.x))
    got, figures = multiply(rows.x, matrix, rows.expert), []
    # Groups: loaders round code · scale to the scale's precision, kernels need not; both are near this.
    exact = reference if matrix.scales is None else matrix.decode()
    for expert, weights in enumerate(exact):
        of = rows.expert == expert
        want = rows.x[of] @ weights.T
        figures.append(ExpertFigures(expert, same[expert], _relative(got[of], want), rows.real[expert]))
    return name, figures


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
