"""Plans, and what packing made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moequant.values.weights import Role, Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """The format of one weight, why, and what it is expected to add to the KL divergence (None: unknown)."""

    weight: str
    format: str
    bytes: int
    reason: str
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A format for every weight of the file, in file order.

    `preset` is llama.cpp's name for a file that is mostly of such types, `target` what
    was asked for, and `budget` its limit in bytes of aligned weight data.
    """

    preset: str
    choices: tuple[Choice, ...]
    budget: int
    target: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of weight data, alignment left out."""
        return sum(choice.bytes for choice in self.choices)

    @property
    def kl(self) -> float | None:
        """Predicted KL divergence to the unquantized model; None when a choice's share is unknown."""
        shares = [choice.kl for choice in self.choices]
        known = [share for share in shares if share is not None]
        return sum(known) if len(known) == len(shares) else None


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight in the bytes of its format: `data` u8 [..., rows, row_bytes]."""

    weight: Weight
    format: str
    data: Tensor


@dataclass(frozen=True, slots=True)
class ExpertLoss:
    """What rounding cost each expert of one weight.

    `error` f64 [E], relative squared error of its outputs: under the Hessian of its inputs where it was
    rounded with one, by every fourth row where there are more than 256; else under their mean squares.
    `fallbacks` are the reasons why experts were rounded by the plain search instead.
    """

    weight: str
    role: Role
    layer: int | None
    format: str
    error: Tensor
    tokens: Tensor | None
    fallbacks: tuple[str, ...] = ()
