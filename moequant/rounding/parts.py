"""What rounding of one output has finished, on disk, so that a killed run goes on where it stopped.

One sealed file a part, in the order of the output: packed weights, and what their experts lost. A coupled
pass makes a part of what is in front of the layers, of each layer, and of what is behind them; beside its
parts lie the hidden states of both streams in front of the first layer that is not finished. Of that layer
the experts that are rounded lie in pieces, where they are taken some at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moequant.errors import OutputError
from moequant.files import atomic
from moequant.files.read import unreadable
from moequant.rounding.results import Result
from moequant.statistics import sealed
from moequant.values import ExpertLoss, Packed, Weight

PART_BYTES = 1 << 28
"""Packed bytes after which a part of the plain search ends, within a layer too."""


class Parts:
    """The finished parts in `folder`, of a run that is called `run`: weights of `formats`, rounded to those.

    `again` ends the message about a part that is no good. Of several ranks the first `writes`.
    """

    def __init__(
        self, folder: Path, weights: Iterable[Weight], formats: Mapping[str, str], run: str, again: str
    ) -> None:
        self.folder, self.formats, self.run, self.again = folder, formats, run, again
        self._weights = {weight.name: weight for weight in weights}
        self.writes, self.count = True, 0
        while self._path(self.count).exists():
            self.count += 1

    def results(self) -> Iterator[Result]:
        """All weights that are finished, in their order. OutputError for a file that is damaged, or that
        belongs to another place or run."""
        for number in range(self.count):
            yield from self._read(self._path(number), number, None)

    def add(self, results: list[Result]) -> None:
        """One more part is finished. OutputError when the disk refuses."""
        if self.writes:
            self._write(self._path(self.count), results)
            for piece in self.folder.glob("piece-*"):
                piece.unlink()
        self.count += 1

    def has_piece(self, side: str, experts: range) -> bool:
        """Whether these experts of the first layer that is not finished are rounded: their matrices that are
        fed there, "experts" or "inner"."""
        return self._piece(side, experts).exists()

    def piece(self, side: str, experts: range) -> list[Result]:
        """They, as they were rounded. OutputError as of `results`."""
        return self._read(self._piece(side, experts), self.count, experts)

    def add_piece(self, side: str, experts: range, results: list[Result]) -> None:
        """They are rounded. OutputError when the disk refuses."""
        if self.writes:
            self._write(self._piece(side, experts), results)

    def _read(self, path: Path, part: int, experts: range | None) -> list[Result]:
        """What a file holds of a part: weights, or some experts of them."""
        try:
            meta, tensors = sealed.opened(path)
            if (meta["run"], meta["part"]) != (self.run, part):
                raise ValueError("of another part or another run")
            tensors |= {name: _mapped(self._large(path, name), *told) for name, told in meta["large"].items()}
            each = enumerate(meta["losses"])
            return [self._result(losses, tensors, str(at), experts) for at, losses in each]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path}: cannot be continued from ({error}); {self.again}") from None

    def _write(self, path: Path, results: list[Result]) -> None:
        tensors: dict[str, Tensor] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        large: dict[str, tuple[list[int], int]] = {}
        for number, (packed, loss) in enumerate(results):
            name = f"{number}/data"
            tensors |= loss_tensors(loss, str(number))
            if packed.weight.is_table:
                large[name] = list(packed.data.shape), _spill(self._large(path, name), packed.data)
            else:
                tensors[name] = packed.data
        losses = [loss_fields(loss) for _, loss in results]
        meta = {"run": self.run, "part": self.count, "losses": losses, "large": large}
        # One may be there behind those that are missing, of a run that died while it removed them.
        sealed.write(path, meta, tensors, overwrite=True)

    def kept(self, results: Iterable[Result]) -> Iterator[Result]:
        """The same results; every layer's are a part, and of a large layer several."""
        waiting: list[Result] = []
        for result in results:
            if waiting and waiting[0][0].weight.layer != result[0].weight.layer:
                self.add(waiting)
                yield from waiting
                waiting = []
            waiting.append(result)
            if sum(packed.data.numel() for packed, _ in waiting) >= PART_BYTES:
                self.add(waiting)
                yield from waiting
                waiting = []
        if waiting:
            self.add(waiting)
            yield from waiting

    def _result(
        self, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], number: str, experts: range | None
    ) -> Result:
        """ValueError for a type that is not the plan's, KeyError for a weight that is not."""
        weight, data = self._weights[fields["weight"]], tensors[f"{number}/data"]
        if fields["format"] != self.formats[weight.name]:
            raise ValueError(f"{weight.name} is {fields['format']}, not {self.formats[weight.name]}")
        part = weight if experts is None else weight.of(experts)
        return Packed(part, fields["format"], data), loss_of(weight, fields, tensors, number)

    def _large(self, path: Path, name: str) -> Path:
        return path.with_name(f"{path.stem}-{name.partition('/')[0]}.bytes")

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:04d}.safetensors"

    def _piece(self, side: str, experts: range) -> Path:
        name = f"piece-{self.count:04d}-{side}-{experts.start}-{experts.stop}.safetensors"
        return self.folder / name


def _spill(path: Path, data: Tensor) -> int:
    """Write a table's bytes, which may be more than memory holds; their CRC-32. OutputError when the disk
    refuses."""
    with atomic(path, True) as partial, partial.open("wb") as file:
        data.numpy().tofile(file)
    return zlib.crc32(data.numpy().data)


def _mapped(path: Path, shape: list[int], crc: int) -> Tensor:
    """The same bytes, which are read as they are used; ValueError where they are others, UnreadableError
    where the system does not let us read them."""
    try:
        found = np.memmap(path, np.uint8, "c", shape=tuple(shape))
    except FileNotFoundError:
        raise ValueError(f"{path.name}: is gone") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if zlib.crc32(found.data) != crc:
        raise ValueError(f"{path.name}: checksum differs")
    return torch.from_numpy(found)


def loss_fields(loss: ExpertLoss) -> dict[str, Any]:
    """What JSON holds of a loss; its tensors are `loss_tensors`."""
    return {"weight": loss.weight, "format": loss.format, "fallbacks": list(loss.fallbacks)}


def loss_tensors(loss: ExpertLoss, name: str) -> dict[str, Tensor]:
    """The tensors of a loss, under names that begin so."""
    found = {f"{name}/error": loss.error}
    return found if loss.tokens is None else {**found, f"{name}/tokens": loss.tokens}


def loss_of(
    weight: Weight, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str
) -> ExpertLoss:
    """The loss that `loss_fields` and `loss_tensors` were made of."""
    return ExpertLoss(
        weight.name,
        weight.role,
        weight.layer,
        fields["format"],
        tensors[f"{name}/error"],
        tensors.get(f"{name}/tokens"),
        tuple(fields["fallbacks"]),
    )
