"""What calibration learned, as sums over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class InputStats:
    """What the inputs of a weight looked like during calibration; E = 1 when dense, heads count as experts
    do.

    `tokens` i64 [E] rows seen; `gate_mass` f64 [E] sum of the router's weights g;
    `moment` f64 [E, in] sum of x²; `gated_moment` f64 [E, in] sum of g²·x², and
    `gate_square` f64 [E] sum of g². `peak` f64 [E] is the largest |x|, 0 where nothing was seen; None in
    statistics that do not know it.
    """

    tokens: Tensor
    gate_mass: Tensor
    gate_square: Tensor
    moment: Tensor
    gated_moment: Tensor
    peak: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RouteStats:
    """Where one layer's router sent the calibration tokens.

    `tokens` i64 [E]; `gate_mass` f64 [E], sum of the router's weights; `domain_tokens`
    i64 [D, E], tokens by domain of the text; `pairs` i64 [E, E], tokens that chose both
    experts (the diagonal is `tokens`); `gate_entropy`, the sum over tokens of the entropy,
    in nats, of their top-k weights divided by their sum.
    """

    layer: int
    tokens: Tensor
    gate_mass: Tensor
    domain_tokens: Tensor
    pairs: Tensor
    gate_entropy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that the calibration pass learned: by layer for routers, by site for weights.

    `domains` names the rows of `RouteStats.domain_tokens`.
    """

    routes: tuple[RouteStats, ...]
    inputs: dict[str, InputStats]
    rows: int
    tokens: int
    source: str
    domains: tuple[str, ...]
