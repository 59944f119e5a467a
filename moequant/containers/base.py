"""What a conversion needs of an output: one protocol for every container."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moequant.checkpoint import Checkpoint
from moequant.values import Calibration, Packed, Plan, Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file or folder: its size in bytes and the CRC-32 of every tensor's data, by its name
    there. Of a file in several parts `path` is the first. `notes` are what a person should know of it."""

    path: Path
    bytes: int
    checksums: Mapping[str, int]
    notes: tuple[str, ...] = ()


class Opened(Protocol):
    """A written file or folder, decoded by somebody else's code."""

    def load(self, weight: Weight) -> Tensor:
        """Decoded values of a weight of the model, in the model's order: a `forward.model.Provider`."""


class Container(Protocol):
    """One kind of output for one model: opened before any weight is read, refusing what it cannot hold.

    `checkpoint` is the model cut into the weights that this output rounds, under their own statistics.
    `is_folder` says what stands under the target's name. `notes` are what a person should know.
    """

    checkpoint: Checkpoint
    is_folder: bool
    notes: tuple[str, ...]

    def size(self, plan: Plan) -> int:
        """The exact bytes of what `write` will make."""

    def parts(self, plan: Plan) -> tuple[int, ...]:
        """The exact bytes of each part, of an output in several of them; else those of the whole."""

    def check_target(self, path: Path, plan: Plan) -> None:
        """OutputError when it cannot be put there."""

    def formats(self, plan: Plan) -> dict[str, str]:
        """By weight, the formats in which they are rounded; one that is copied as it is stored is not
        there."""

    def write(
        self, path: Path, plan: Plan, packed: Iterable[Packed], calibration: Calibration | None = None
    ) -> Written:
        """Write the plan; `packed` yields the weights of `formats` in the plan's order. Some schemes also
        store what `calibration` says of inputs."""

    def verify(self, written: Written, plan: Plan) -> None:
        """Read it again. VerifyError names what is not as it was meant."""

    def open(self, path: Path) -> Opened:
        """What was written, for a comparison."""
