"""What a check found, as values."""

from __future__ import annotations

from dataclasses import dataclass, field

KERNEL_LIMIT = 1e-3
"""Largest relative error of a product against the float32 product of the decoded weights."""

LOCAL_ROUTING = 0.99
"""Routers are stored unquantized: on the same input they must choose the same experts."""


@dataclass(frozen=True, slots=True)
class ExpertFigures:
    """One expert of one tensor (expert 0 of a dense one).

    `kernel_error` ||kernel - decoded product|| / ||decoded product||. Against the baseline (None
    without one): `weight_error` ||w - q|| / ||w||; on `tokens` real inputs, 0 where the router sent
    none: `output_error` and `cosine` of the products, `largest` difference of an output in units of
    the baseline outputs' root mean square.
    """

    expert: int
    same_decoded: bool
    kernel_error: float
    tokens: int = 0
    weight_error: float | None = None
    output_error: float | None = None
    cosine: float | None = None
    largest: float | None = None


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """One tensor: `product` says what computed (b), `expected` the format's error on normal weights."""

    name: str
    format: str
    shape: tuple[int, int, int]
    product: str
    expected: float
    experts: tuple[ExpertFigures, ...]


@dataclass(frozen=True, slots=True)
class BlockFigures:
    """One MoE block, baseline against candidate.

    On the baseline's inputs: relative L2 error, cosine and largest difference (in RMS of the
    baseline's) of the block's output, `local_routing` the share of chosen experts that agree. In the
    candidate's own forward pass: `routing` likewise, `top` the share of tokens whose first expert agrees.
    """

    layer: int
    tokens: int
    output_error: float
    limit: float
    cosine: float
    largest: float
    local_routing: float
    routing: float
    top: float


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as it must be: where (tensor and expert, or block), and what."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Everything `check` found; `notes` say what was not checked, and why."""

    out: str
    baseline: str | None
    product: str
    tensors: tuple[TensorFigures, ...]
    blocks: tuple[BlockFigures, ...]
    damages: tuple[Damage, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    speed: tuple[dict[str, float | int | str], ...] = field(default=())

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages
