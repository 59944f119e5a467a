"""How far to trust a Hessian: an expert's own, its layer's and its diagonal, mixed as held-out tokens say.

The Hessian of an expert that saw few tokens is mostly noise, and rounding by it makes outputs worse. Mixed in
are its diagonal D (which needs few tokens) and the layer's correlation rescaled to it, L = D^½ C D^½:

    own · H + layer · L + diagonal · D

Experts are classed by tokens per input column. For each class the weights are chosen among a few mixes: some
rows of some experts are rounded by the Hessians of the first half of the tokens, and the error is taken under
those of the second. "Diagonal only", which is the plain search, is always among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from moequant import formats
from moequant.formats import Format
from moequant.rounding.feedback import Options, outputs_lost, round_to_hessian


@dataclass(frozen=True, slots=True)
class Mix:
    """Weights of an expert's own Hessian, of the layer's correlation, and of the diagonal."""

    own: float
    layer: float
    diagonal: float


DIAGONAL = Mix(0, 0, 1)
MIXES = (
    DIAGONAL,
    Mix(0.9, 0, 0.1),
    Mix(0.6, 0.2, 0.2),
    Mix(0.25, 0.5, 0.25),
    Mix(0.1, 0.5, 0.4),
    Mix(0.25, 0, 0.75),
)

QUICK = Options(effort="fast", rounds=1)

PRIOR_TOKENS = 32.0
"""A diagonal is shrunk to the layer's as if the expert had seen so many more tokens of the layer's."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How to choose.

    mixes: what is tried beside the diagonal. bounds: tokens per column that separate the classes. experts
    and rows: how many are rounded for each class.
    """

    mixes: tuple[Mix, ...] = MIXES
    bounds: tuple[float, ...] = (0.25, 1.0, 4.0, 16.0)
    experts: int = 2
    rows: int = 32

    def sampled(self, rows: int) -> Tensor:
        """Which of so many rows are rounded, i64 [n]."""
        return torch.linspace(0, rows - 1, min(self.rows, rows)).round().long()


@dataclass(frozen=True, slots=True)
class Choice:
    """The mix of one class of experts, with at least `above` tokens per column.

    `errors` has the held-out error of every mix over that of the diagonal alone, mean over the experts tried;
    it is empty where no expert of the class could be tried and the mix is that of the nearest class.
    """

    above: float
    experts: tuple[int, ...]
    mix: Mix
    errors: dict[Mix, float]


@dataclass(frozen=True, slots=True)
class Shrunk:
    """hessian f32 [E, in, in] of all tokens, mixed as the choice of each expert's class says."""

    hessian: Tensor
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Class:
    """Experts with at least `above` tokens per column, and those of them that are tried."""

    above: float
    experts: tuple[int, ...]
    tried: tuple[int, ...]


def shrink(
    fmt: Format | str,
    weights: Tensor,
    halves: tuple[Tensor, Tensor],
    tokens: Tensor,
    trial: Trial = Trial(),
    options: Options = QUICK,
) -> Shrunk:
    """Hessians of experts [E, in, in], shrunk as serves `fmt` best.

    weights [E, out, in], all rows or those of `Trial.sampled`; halves: sums of x xᵀ over two halves of the
    tokens, [E, in, in] each; tokens i64 [E] in both together. Non-finite Hessians take no part and stay as
    they are, for `round_to_hessian` to refuse.
    """
    usable = _seen(halves[0]) & _seen(halves[1])
    first = Layer.of(halves[0], tokens // 2)
    every = classes(tokens, usable, weights.shape[2], trial)
    errors = {
        expert: tried(fmt, weights[expert], (halves[0][expert], halves[1][expert]), first, trial, options)
        for each in every
        for expert in each.tried
    }
    choices = choose(every, errors)
    layer = Layer.of(halves[0] + halves[1], tokens)
    return Shrunk(Shrinking(layer, choices).of(halves, range(len(weights))), choices)


def classes(tokens: Tensor, usable: Tensor, columns: int, trial: Trial) -> tuple[Class, ...]:
    """Experts by tokens per column, fewest first: tokens i64 [E]; bool [E], who may be tried."""
    edges = (0.0, *trial.bounds, float("inf"))
    share = (tokens.double() / columns).tolist()
    found = [(low, [e for e, s in enumerate(share) if low <= s < high]) for low, high in pairwise(edges)]
    return tuple(
        Class(low, tuple(members), tuple(_spread([e for e in members if usable[e]], trial.experts)))
        for low, members in found
        if members
    )


def tried(
    fmt: Format | str,
    weights: Tensor,
    halves: tuple[Tensor, Tensor],
    layer: Layer,
    trial: Trial,
    options: Options = QUICK,
) -> dict[Mix, float]:
    """What some rows of an expert [out, in] lose under the Hessian of the second half [in, in], rounded by
    that of the first, for every mix; over the loss of the diagonal alone. Nothing where it cannot be tried.

    Mixes that come to the same are tried once, and one alone, which is the diagonal, not at all.
    """
    if not bool(_seen(torch.stack(halves)).all()):
        return {}
    comes_to = {mix: layer.plain(mix) for mix in (DIAGONAL, *trial.mixes)}
    apart = list(dict.fromkeys(comes_to.values()))
    if len(apart) == 1:
        return dict.fromkeys(comes_to, 1.0)
    mixed = torch.stack([layer.mixed(halves[0], mix) for mix in apart])
    sample = weights[trial.sampled(len(weights))].expand(len(apart), -1, -1)
    lost = _held_out(fmt, sample, mixed, halves[1], options)
    found = dict(zip(apart, (lost / lost[0]).tolist(), strict=True))
    return {mix: found[each] for mix, each in comes_to.items()}


def choose(every: Sequence[Class], errors: Mapping[int, Mapping[Mix, float]]) -> tuple[Choice, ...]:
    """The best mix of every class by what its tried experts lost; `errors` as of `tried`, by expert."""
    choices = []
    for each in every:
        found = [errors[expert] for expert in each.tried if errors[expert]]
        mean = {mix: sum(one[mix] for one in found) / len(found) for mix in found[0]} if found else {}
        best = min(mean, key=mean.__getitem__) if mean else DIAGONAL
        choices.append(Choice(each.above, each.experts, best, mean))
    return _fill(choices)


def _held_out(
    fmt: Format | str, weights: Tensor, hessians: Tensor, judge: Tensor, options: Options
) -> Tensor:
    """f64 [n], never 0: tr(E J Eᵀ) of weights [n, out, in] rounded by `hessians`, J being `judge`."""
    data = round_to_hessian(fmt, weights, hessians, options).data
    kind = formats.get(fmt) if isinstance(fmt, str) else fmt
    lost = [outputs_lost(kind, *each, judge) for each in zip(weights, data, strict=True)]
    return torch.stack(lost).clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True, slots=True)
class Layer:
    """What the experts of a layer have in common: correlation f32 [in, in], mean square of inputs f64 [in].

    Where they have nothing but a scale in common, there is no correlation and the mean square is one number.
    """

    correlation: Tensor | None
    square: Tensor

    @classmethod
    def of(cls, hessian: Tensor, tokens: Tensor) -> Layer:
        """Pooled over the experts whose Hessian is finite."""
        finite = torch.isfinite(hessian).flatten(1).all(1)
        pooled = torch.zeros(hessian.shape[1:], dtype=torch.float64, device=hessian.device)
        for expert in finite.nonzero().flatten().tolist():
            pooled += hessian[expert]
        diagonal = pooled.diagonal().clone()
        scale = torch.where(diagonal > 0, diagonal.clamp_min(1e-300).rsqrt(), 0.0)
        seen = float(tokens.to(finite.device)[finite].sum())
        correlation = pooled.mul_(scale[:, None]).mul_(scale).float()
        return cls(correlation, diagonal / max(seen, 1.0))

    def plain(self, mix: Mix) -> Mix:
        """What a mix comes to: without a correlation, the layer's share is the diagonal's."""
        return mix if self.correlation is not None else Mix(mix.own, 0.0, mix.diagonal + mix.layer)

    def mixed(self, hessian: Tensor, mix: Mix) -> Tensor:
        """An expert's Hessian f32 [in, in], mixed; f32."""
        mix, diagonal = self.plain(mix), hessian.diagonal().double() + PRIOR_TOKENS * self.square
        made = hessian.float() * mix.own
        if mix.layer and self.correlation is not None:
            root = diagonal.sqrt().float()
            made.addcmul_(self.correlation * root, root[:, None], value=mix.layer)
        made.diagonal().add_((mix.diagonal * diagonal).float())
        return made


@dataclass(frozen=True, slots=True)
class Shrinking:
    """How the experts of a layer are shrunk, as it was chosen for each class of them."""

    layer: Layer
    choices: tuple[Choice, ...]

    def of(self, halves: tuple[Tensor, Tensor], experts: range) -> Tensor:
        """f32 [E, in, in]: the Hessians of these experts, both halves [E, in, in] together, mixed."""
        mixes = {expert: choice.mix for choice in self.choices for expert in choice.experts}
        whole = halves[0] + halves[1]
        for at, expert in enumerate(experts):
            whole[at] = self.layer.mixed(whole[at], mixes[expert])
        return whole.float()


def _seen(hessian: Tensor) -> Tensor:
    """bool [E]: finite, and not zero."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    return torch.isfinite(hessian).flatten(1).all(1) & (diagonal.sum(1) > 0)


def _spread(experts: list[int], count: int) -> list[int]:
    """At most `count` of them, evenly spread."""
    if len(experts) <= count:
        return experts
    return [experts[(2 * i + 1) * len(experts) // (2 * count)] for i in range(count)]


def _fill(choices: list[Choice]) -> tuple[Choice, ...]:
    """Classes that could not be tried get the mix of the nearest that could; the diagonal if none could."""
    tried = [i for i, choice in enumerate(choices) if choice.errors]
    if not tried:
        return tuple(choices)
    nearest = [min(tried, key=lambda j, i=i: abs(i - j)) for i in range(len(choices))]  # type: ignore[misc]
    return tuple(replace(c, mix=choices[n].mix) for c, n in zip(choices, nearest, strict=True))
