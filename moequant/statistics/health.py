"""How well a router spreads its tokens: figures of one layer, and of domains against each other.

Pure functions of what calibration counted. "Load" is the share of a layer's routed tokens that
an expert got; entropies are in nats, and relative ones divided by their largest value, ln E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.values import Calibration, RouteStats

STARVED_BELOW = 0.1
"""Below this multiple of its fair share an expert counts as starved."""


@dataclass(frozen=True, slots=True)
class Load:
    """One expert's tokens, and how often its fair share that is."""

    layer: int
    expert: int
    tokens: int
    fair: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two experts of a layer: `together` is the cosine of their token sets, 1 when always chosen together."""

    layer: int
    experts: tuple[int, int]
    together: float


@dataclass(frozen=True, slots=True)
class LayerHealth:
    """One layer's router.

    `imbalance` is the busiest expert's load over the mean (1 is even); `variation` the loads'
    standard deviation over their mean; `load_entropy` relative, 1 when even; `gate_entropy` the mean
    over tokens of the entropy of their top-k weights, relative to ln k (0: one expert decides);
    `dead` experts saw nothing, `starved` ones (dead included) less than STARVED_BELOW of their share.
    """

    layer: int
    experts: int
    tokens: int
    imbalance: float
    variation: float
    load_entropy: float
    gate_entropy: float
    dead: tuple[int, ...]
    starved: tuple[int, ...]
    pair: Pair | None


@dataclass(frozen=True, slots=True)
class DomainHealth:
    """One domain of the text, over all layers.

    `tokens` of it; `load_entropy` as in `LayerHealth`, mean of the layers; `nearest` and
    `farthest` other domain with the overlap; `favourites` are the experts that it feeds
    most above their load on all text: (layer, expert, times).
    """

    domain: str
    tokens: int
    load_entropy: float
    nearest: tuple[str, float] | None
    farthest: tuple[str, float] | None
    favourites: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, slots=True)
class Health:
    """A model's routers on some text. `coldest` and `hottest` experts come sorted, worst first."""

    tokens: int
    source: str
    layers: tuple[LayerHealth, ...]
    domains: tuple[DomainHealth, ...]
    coldest: tuple[Load, ...]
    hottest: tuple[Load, ...]


def health(calibration: Calibration, top: int = 5) -> Health:
    """Every figure of a calibration; lists of experts are `top` long."""
    loads = [load for route in calibration.routes for load in layer_loads(route)]
    order = sorted(loads, key=lambda load: (load.fair, load.layer, load.expert))
    return Health(
        tokens=calibration.tokens,
        source=calibration.source,
        layers=tuple(layer_health(route, calibration.tokens) for route in calibration.routes),
        domains=domain_health(calibration, top),
        coldest=tuple(order[:top]),
        hottest=tuple(order[::-1][:top]),
    )


def layer_loads(route: RouteStats) -> list[Load]:
    """Every expert of a layer in order."""
    counts = route.tokens.tolist()
    mean = sum(counts) / len(counts)
    return [
        Load(route.layer, expert, count, count / mean if mean else 0.0) for expert, count in enumerate(counts)
    ]


def layer_health(route: RouteStats, tokens: int) -> LayerHealth:
    """One layer's figures; `tokens` is how many went through it."""
    counts = route.tokens.double()
    total, experts = float(counts.sum()), len(counts)
    mean = total / experts
    # How many experts a token chose: not kept, but every token chose as many.
    k = round(total / tokens) if tokens else 0
    fair = counts / mean if mean else counts
    return LayerHealth(
        layer=route.layer,
        experts=experts,
        tokens=tokens,
        imbalance=float(fair.max()),
        variation=float(fair.std(unbiased=False)),
        load_entropy=relative_entropy(counts),
        gate_entropy=route.gate_entropy / (tokens * math.log(k)) if k > 1 else 0.0,
        dead=tuple((counts == 0).nonzero()[:, 0].tolist()),
        starved=tuple((fair < STARVED_BELOW).nonzero()[:, 0].tolist()),
        pair=closest_pair(route),
    )


def relative_entropy(counts: Tensor) -> float:
    """Entropy of counts [E] as a distribution over ln E: 1 even, 0 all in one (or nothing counted)."""
    total = float(counts.sum())
    if not total or len(counts) < 2:
        return 0.0
    return float(torch.special.entr(counts.double() / total).sum()) / math.log(len(counts))


def coactivation(route: RouteStats) -> Tensor:
    """f64 [E, E]: tokens that chose both experts over the geometric mean of the tokens that chose either.

    That is the cosine of the two experts' token sets (the Ochiai coefficient): 0 never
    together, 1 always; the diagonal is 1 for every expert that saw a token.
    """
    counts = route.tokens.double()
    scale = (counts[:, None] * counts).sqrt()
    return torch.where(scale > 0, route.pairs.double() / scale.clamp(min=1), 0.0)


def closest_pair(route: RouteStats) -> Pair | None:
    """The two experts chosen together most, None when none ever are (top-1, or not counted)."""
    together = coactivation(route).triu(1)
    best = int(together.argmax())
    first, second = divmod(best, together.shape[1])
    value = float(together[first, second])
    return Pair(route.layer, (first, second), value) if value > 0 else None


def domain_loads(route: RouteStats) -> Tensor:
    """f64 [D, E]: each domain's distribution over a layer's experts; zeros for a domain without tokens."""
    counts = route.domain_tokens.double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def domain_overlap(routes: tuple[RouteStats, ...]) -> Tensor:
    """f64 [D, D]: 1 minus the Jensen-Shannon divergence (in bits) of two domains' loads, mean of the layers.

    1: both feed the same experts alike; 0: they share none.
    """
    return torch.stack([_overlap(domain_loads(route)) for route in routes]).mean(0)


def _overlap(loads: Tensor) -> Tensor:
    """One layer's overlaps from its loads f64 [D, E]."""
    middle = (loads[:, None] + loads) / 2
    own = torch.special.entr(loads).sum(-1)
    divergence: Tensor = torch.special.entr(middle).sum(-1) - (own[:, None] + own) / 2
    return (1 - divergence / math.log(2)).clamp(0, 1)


def domain_health(calibration: Calibration, top: int) -> tuple[DomainHealth, ...]:
    """Every domain against the others; empty when routes are not counted by domain."""
    routes, names = calibration.routes, calibration.domains
    if not routes or not names:
        return ()
    overlap = domain_overlap(routes)
    # How many experts a token chose is the same for every domain.
    per_token = max(1, round(int(routes[0].tokens.sum()) / max(1, calibration.tokens)))
    found = []
    for index, name in enumerate(names):
        others = sorted(
            (float(overlap[index, other]), names[other]) for other in range(len(names)) if other != index
        )
        entropies = [relative_entropy(route.domain_tokens[index]) for route in routes]
        found.append(
            DomainHealth(
                domain=name,
                tokens=int(routes[0].domain_tokens[index].sum()) // per_token,
                load_entropy=sum(entropies) / len(entropies),
                nearest=others[-1][::-1] if others else None,
                farthest=others[0][::-1] if others else None,
                favourites=_favourites(routes, index, top),
            )
        )
    return tuple(found)


def _favourites(routes: tuple[RouteStats, ...], domain: int, top: int) -> tuple[tuple[int, int, float], ...]:
    """The experts whose load in a domain is the highest multiple of their load on all text."""
    found = []
    for route in routes:
        overall = route.tokens.double() / route.tokens.sum().clamp(min=1)
        lift = torch.where(overall > 0, domain_loads(route)[domain] / overall.clamp(min=1e-300), 0.0)
        found += [(route.layer, expert, value) for expert, value in enumerate(lift.tolist()) if value > 1]
    return tuple(sorted(found, key=lambda item: -item[2])[:top])
