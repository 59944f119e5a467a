"""Which text to draw next so that every expert gets enough tokens.

Routing is known by domain: how many tokens of a domain reached each expert. The next rows are
drawn greedily from the domains that promise the starved experts most of what they lack; what
really happened is measured, and the plan made again, until nobody starves or the text is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.statistics.store import combine
from moequant.text.corpus import Rows
from moequant.values import Calibration, RouteStats

PRIOR_TOKENS = 512.0
"""Tokens of the average text that every domain's rates start from: a domain of one row knows little."""

GROWTH = 1.0
"""A round draws at most so many times the text seen before it: its plan rests on no more than that."""


@dataclass(frozen=True, slots=True)
class Starved:
    """An expert that got fewer tokens than it was meant to."""

    layer: int
    expert: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """What feeding starved experts came to. `target` tokens were wanted by expert, `drawn` rows by domain.

    `stopped` says why no more was drawn: every expert was fed, or the budget or the pool ended.
    """

    calibration: Calibration
    target: int
    rounds: int
    drawn: dict[str, int]
    starved: tuple[Starved, ...]
    stopped: str


def target_tokens(routes: Sequence[RouteStats], ratio: float) -> int:
    """`ratio` times the fair share: what each expert had got of this text if all had got the same."""
    shares = [ratio * float(route.tokens.sum()) / len(route.tokens) for route in routes]
    return -int(-max(shares, default=0.0) // 1)


def starved(routes: Sequence[RouteStats], target: int) -> tuple[Starved, ...]:
    """Every expert below `target` tokens, by layer and number."""
    return tuple(
        Starved(route.layer, expert, count)
        for route in routes
        for expert, count in enumerate(route.tokens.tolist())
        if count < target
    )


def rates(routes: Sequence[RouteStats], tokens: Sequence[int]) -> Tensor:
    """Expected tokens for every expert of every layer from one token of each domain: f64 [D, layers * E].

    `tokens` by domain were seen. Each rate is shrunk to that of all text, and half a token
    is added to every count, so that an expert nobody reached is hoped for most in the domain
    that was tried least.
    """
    counts = torch.cat([route.domain_tokens.double() for route in routes], 1)
    seen = torch.tensor(tokens, dtype=torch.float64)[:, None]
    pooled = counts.sum(0) / seen.sum().clamp(min=1)
    return (counts + PRIOR_TOKENS * pooled + 0.5) / (seen + PRIOR_TOKENS)


def choose(need: Tensor, gain: Tensor, available: Sequence[int], rows: int) -> list[int]:
    """How many rows of each domain to draw, at most `rows` and `available` of each.

    need f64 [experts] in tokens; gain f64 [D, experts] is what one row is expected to bring.
    Greedy: every row comes from the domain that covers most of what is still lacking; done
    when nothing is.
    """
    lacking = need.clamp(min=0).clone()
    taken = [0] * len(available)
    for _ in range(rows):
        # Shares of each expert's need, so that the rarest counts as much as the one that lacks most.
        covered = (torch.minimum(gain, lacking) / need.clamp(min=1)).sum(1)
        empty = [count >= limit for count, limit in zip(taken, available, strict=True)]
        covered[torch.tensor(empty)] = 0.0
        best = int(covered.argmax())
        if covered[best] <= 0:
            break
        taken[best] += 1
        lacking = (lacking - gain[best]).clamp(min=0)
    return taken


def cover(
    checkpoint: Checkpoint,
    pool: Rows,
    first_tokens: int,
    ratio: float,
    budget: int,
    calibrate: Callable[[Checkpoint, Rows], Calibration],
) -> Coverage:
    """Calibrate on the first `first_tokens` of `pool`, then on what feeds the experts that starve.

    Every expert of every layer shall see `ratio` times its fair share of those first tokens; the
    target stays, or text drawn for one expert would raise what all others are owed. At most `budget`
    tokens are drawn in all. Each round is one pass of `calibrate`; their statistics are added.
    """
    length, total = pool.ids.shape[1], len(pool.ids)
    limit = min(total, budget // length)
    first = min(limit, max(1, first_tokens // length))
    used = list(range(first))
    calibration = calibrate(checkpoint, take(pool, used))
    target = target_tokens(calibration.routes, ratio)
    rounds = 1
    while starved(calibration.routes, target) and len(used) < limit:
        most = min(limit - len(used), max(1, int(GROWTH * len(used))))
        chosen = _next_rows(calibration, pool, used, target, most)
        if not chosen:
            break
        calibration = combine([calibration, calibrate(checkpoint, take(pool, chosen))])
        used += chosen
        rounds += 1
    left = starved(calibration.routes, target)
    stopped = "every expert is fed" if not left else "pool" if len(used) >= total else "budget"
    drawn = dict.fromkeys(pool.domains, 0)
    for row in used:
        drawn[pool.domains[row]] += 1
    return Coverage(calibration, target, rounds, drawn, left, stopped)


def take(pool: Rows, chosen: Sequence[int]) -> Rows:
    """Some rows of a pool, in the given order."""
    ids = pool.ids[torch.tensor(chosen, dtype=torch.int64)]
    return Rows(ids, tuple(pool.domains[row] for row in chosen), pool.source, ids.numel())


def _next_rows(
    calibration: Calibration, pool: Rows, used: Sequence[int], target: int, most: int
) -> list[int]:
    """Rows of the pool not used yet, at most `most`, from the domains that feed whoever starves."""
    length = pool.ids.shape[1]
    names = list(dict.fromkeys(pool.domains))
    spent = set(used)
    left: dict[str, list[int]] = {name: [] for name in names}
    seen = dict.fromkeys(names, 0)
    for row, domain in enumerate(pool.domains):
        if row in spent:
            seen[domain] += length
        else:
            left[domain].append(row)
    need = torch.cat([target - route.tokens.double() for route in calibration.routes])
    # The pool may have domains that no row was drawn from yet: they start with nothing counted.
    routes = [_by_name(route, calibration.domains, names) for route in calibration.routes]
    gain = rates(routes, [seen[name] for name in names]) * length
    counts = choose(need, gain, [len(left[name]) for name in names], most)
    return sorted(row for name, count in zip(names, counts, strict=True) for row in left[name][:count])


def _by_name(route: RouteStats, domains: Sequence[str], names: Sequence[str]) -> RouteStats:
    """The route with a row of domain_tokens for every one of `names`."""
    rows = torch.zeros(len(names), len(route.tokens), dtype=torch.int64)
    for index, domain in enumerate(domains):
        rows[names.index(domain)] = route.domain_tokens[index]
    return RouteStats(route.layer, route.tokens, route.gate_mass, rows, route.pairs, route.gate_entropy)
