"""The two streams of a coupled pass: in full precision, and of the model as it is rounded so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from moequant.forward.hidden import Hidden, InMemory, Lasting, OnDisk, settled
from moequant.forward.stream import LayerStream
from moequant.ranks import ALONE, Ranks
from moequant.rounding.parts import Parts
from moequant.rounding.results import Result

ROOMS = 7
"""What is kept for every token: hidden states of both streams, what experts are fed and give in both, and the
error of the residual stream."""

STREAMS = ("exact", "rounded")
"""Folders of their hidden states."""


@dataclass(frozen=True, slots=True)
class Streams:
    """Hidden states in full precision, and those of the model as it is rounded so far; what is kept within a
    layer lies under `folder` as well, where memory is limited."""

    exact: Hidden
    rounded: Hidden
    folder: Path
    ranks: Ranks = ALONE

    @classmethod
    def under(cls, folder: Path, stream: LayerStream) -> Streams:
        """Room for both, spilled to sub-folders of `folder` where memory is limited."""
        both = [folder / name for name in STREAMS]
        for each in both:
            each.mkdir()
        exact, rounded = (stream.new_hidden(each, among=ROOMS) for each in both)
        return cls(exact, rounded, folder, stream.resources.ranks)

    def kept(self, parts: Parts, stream: LayerStream) -> Streams:
        """The same that outlive the process, beside `parts`, from where an earlier one stopped. OutputError
        when what that left is damaged."""
        exact, rounded = (
            Lasting(
                OnDisk(parts.folder / name, stream.shapes, parts.again),
                each if isinstance(each, InMemory) else None,
            )
            for name, each in zip(STREAMS, (self.exact, self.rounded), strict=True)
        )
        for each in (exact, rounded) if parts.count else ():
            each.resume(parts.count - 1, stream.mine)
            each.drop(parts.count - 2)  # it may have died before it did
        return replace(self, exact=exact, rounded=rounded)

    def finished(self, results: list[Result], layer: int, parts: Parts | None) -> list[Result]:
        """What lies in front of `layer` is packed, and both streams are there. The results, kept in
        `parts`."""
        both = self.exact, self.rounded
        if parts is None:
            for each in both:
                each.drop(layer - 1)
            return results
        with settled(both, layer, self.ranks):
            parts.add(results)
        return results
