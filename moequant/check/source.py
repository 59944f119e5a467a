"""What `check` asks of a file, whatever its container: numbers, packed bytes, and an independent decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moequant.check.damage import Span
from moequant.checkpoint import Checkpoint
from moequant.kernels import Matrix
from moequant.values import Weight

ALTERED = "bytes are not those that were written"


@dataclass(frozen=True, slots=True)
class Entry:
    """A quantized tensor of shape (E, out, in), E = 1 when dense; `stacked` when it has experts.

    `format` is what its numbers are called, `alike` the format of `formats.get` that rounds as coarsely.
    Two decoders may differ by `steps` of f32's last place: where they multiply in another order.
    """

    name: str
    format: str
    shape: tuple[int, int, int]
    stacked: bool
    alike: str
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Plain:
    """A tensor that is not quantized, and the baseline's weight if there is one.

    `label` is how the file calls it, `names` the stored tensors that it is read from; `values` reads it.
    """

    label: str
    names: frozenset[str]
    values: Callable[[], Tensor]
    weight: Weight | None


class Source(Protocol):
    """What `check` needs of a file.

    `model` is the baseline cut into weights as the file has them, None without one; `weights` are those, by
    the names of entries. `recorded`: the file has checksums.
    """

    path: Path
    entries: tuple[Entry, ...]
    recorded: bool

    @property
    def model(self) -> Checkpoint | None:
        """See the class."""

    @property
    def weights(self) -> Mapping[str, Weight]:
        """See the class."""

    def matrix(self, entry: Entry) -> Matrix | None:
        """All experts of a tensor, packed as a kernel takes them; None where no kernel takes such numbers."""

    def decode(self, entry: Entry, matrix: Matrix | None) -> Tensor:
        """All experts f32 [E, out, in], by moequant's decoder."""

    def reference(self, entry: Entry, matrix: Matrix | None) -> Tensor:
        """The same by somebody else's decoder."""

    def span(self, entry: Entry, matrix: Matrix | None, expert: int, decoded: Tensor) -> Span:
        """What the codes of an expert reach, which is `decoded` [out, in]."""

    def load(self, weight: Weight) -> Tensor:
        """Decoded values of a weight of `model`: a `forward.model.Provider`."""

    def altered(self, entry: Entry, matrix: Matrix | None) -> tuple[int, ...]:
        """Experts whose bytes are not those that were written; none where nothing is recorded."""

    def altered_rest(self) -> tuple[tuple[str, str], ...]:
        """(name, what) of tensors that are not quantized and not as they were written."""

    def said(self) -> tuple[tuple[str, str], ...]:
        """(where, what) header or config say otherwise than was written, and than the baseline."""

    def plain(self) -> Iterator[Plain]:
        """Every tensor that is not quantized."""

    def label(self, entry: Entry, expert: int) -> str:
        """How the file calls one expert of a tensor."""


def three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A matrix or a stack of them as (E, out, in)."""
    rows, n_in = shape[-2:]
    return (shape[0] if len(shape) == 3 else 1, rows, n_in)
