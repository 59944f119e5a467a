"""Stored tensors: what the files of a checkpoint hold, before any family says what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class File(Protocol):
    """A file of weights, on this disk or at the other end of a network. Its text is what errors call it."""

    @property
    def name(self) -> str:
        """Its name in the model folder."""

    @property
    def bytes(self) -> int:
        """Its length."""

    @property
    def stamp(self) -> str:
        """What changes when the file does."""

    def open(self) -> BinaryIO:
        """The file from its first byte, to read and to seek in; whoever opens it closes it."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of a safetensors file: where its bytes are, nothing read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: File
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint as the numbers that it holds; nothing is read yet.

    `shape` and `dtype` ("BF16", "F16" or "F32"; of whole numbers "I32" or "I64") are those of the decoded
    values; `parts` are the tensors in the files behind it, by what the codec calls them (a plain tensor has
    one part, `""`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[str, TensorRef]
    codec: Codec

    @property
    def bytes(self) -> int:
        """Bytes that it takes in the files."""
        return sum(ref.end - ref.begin for ref in self.parts.values())

    def read(self, index: int | None = None, rows: range | None = None) -> Tensor:
        """Decoded values [len(rows), in] of a matrix, or of matrix `index` of a stack [E, rows, in]; `rows`
        None is all of them. Vectors and other shapes are read whole. CheckpointError for bytes that are
        not there or make no number."""
        if rows is None and (index is not None or len(self.shape) == 2):
            rows = range(self.shape[-2])
        return self.codec.decode(self, index, rows)


class Codec(Protocol):
    """One way in which tensors are stored."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Stored.read`: a new tensor in `stored.dtype`; `rows` is contiguous; None: a tensor that is
        no matrix."""
