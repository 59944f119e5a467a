"""What the measuring of types has finished, on disk, so that a killed run goes on where it stopped.

One small sealed file a figure: the relative errors of a weight, the divergence of a version. Of versions on
their way across the layers the hidden states lie beside them, in front of the first layer that is not
finished; the figure `reached` says which that is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moequant.errors import OutputError
from moequant.forward.hidden import Batches, Hidden, InMemory, Lasting, OnDisk, settled
from moequant.ranks import Ranks
from moequant.statistics import sealed

FILE_BYTES = 4096
"""What a figure takes on the disk at most, small as it is."""

_REACHED = "reached"


@dataclass(frozen=True, slots=True)
class Figures:
    """The finished figures in `folder`, of a run that is called `run`, by kind and number.

    `again` ends the message about a file that is no good.
    """

    folder: Path
    run: str
    again: str

    def within(self, name: str) -> Figures:
        """Those of a folder in there."""
        return replace(self, folder=self.folder / name)

    def kept(self, kind: str, number: int | None = None) -> Any:
        """A figure, None where it is not finished. OutputError for a file that is damaged, or that belongs
        to another place or run."""
        path = self._path(kind, number)
        if not path.exists():
            return None
        try:
            meta, _ = sealed.opened(path)
            if (meta["run"], meta["place"]) != (self.run, self._place(path)):
                raise ValueError("of another place or another run")
            return json.loads(meta["value"])
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path}: cannot be continued from ({error}); {self.again}") from None

    def every(self, kind: str, numbers: Iterable[int]) -> dict[int, Any]:
        """Those of these numbers that are finished."""
        found = ((number, self.kept(kind, number)) for number in numbers)
        return {number: value for number, value in found if value is not None}

    def keep(self, value: Any, kind: str, number: int | None = None) -> None:
        """It is finished. OutputError when the disk refuses."""
        path = self._path(kind, number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path.parent}: cannot keep what is finished ({error})") from None
        # As text: what types cost keeps the order of the types.
        meta = {"run": self.run, "place": self._place(path), "value": json.dumps(value)}
        sealed.write(path, meta, {}, overwrite=True)

    @property
    def reached(self) -> int:
        """The layer in front of which the states of all versions lie that some weight in front of it changed,
        and the model's; 0 where nothing is finished."""
        return self.kept(_REACHED) or 0

    def forget_states(self) -> None:
        """All versions have come to their end."""
        for file in self.folder.glob("hidden-*.f32"):
            file.unlink()

    def _path(self, kind: str, number: int | None) -> Path:
        name = kind if number is None else f"{kind}-{number:04d}"
        return self.folder / f"{name}.safetensors"

    def _place(self, path: Path) -> str:
        return f"{path.parent.name}/{path.name}"


@dataclass(frozen=True, slots=True)
class Crossing:
    """Versions on their way across the layers: `figures`, and on `disk` the hidden states of the model and,
    behind those, of every version, by number. Each of `ranks` has some of the versions."""

    figures: Figures
    disk: OnDisk
    ranks: Ranks

    @classmethod
    def of(
        cls, figures: Figures, shapes: list[tuple[int, ...]], numbers: Iterable[int], ranks: Ranks
    ) -> Crossing:
        """Of versions with these numbers, whose hidden states have these shapes."""
        states = 2 + max(numbers, default=0)  # the model's too
        return cls(figures, OnDisk(figures.folder, shapes * states, figures.again), ranks)

    @property
    def reached(self) -> int:
        """See `Figures`. It changes only when all ranks have finished a layer, and so have asked."""
        return self.figures.reached

    def lasting(self, states: Hidden, shapes: list[tuple[int, ...]], number: int | None) -> Lasting:
        """The states of a version, or of the model, that outlive the process."""
        # All ranks write those of the model: the same bytes.
        first = 0 if number is None else (1 + number) * len(shapes)
        return Lasting(Batches(self.disk, first), states if isinstance(states, InMemory) else None)

    def finish(self, layer: int) -> None:
        """All versions of all ranks are in front of `layer`."""
        with settled([self.disk], layer, self.ranks):
            if self.ranks.first:
                self.figures.keep(layer, _REACHED)
