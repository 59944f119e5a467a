"""Weights as GGUF files hold them: blocks of a ggml type, and weights in several parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moequant import formats
from moequant.checkpoint.codecs.base import plain, read_part
from moequant.errors import CheckpointError
from moequant.formats import FORMATS
from moequant.values import Stored, TensorRef
from moequant.values.ops import Ops, put

PLAIN = ("F32", "F16", "BF16")


def of_type(ref: TensorRef) -> Stored:
    """A tensor of a GGUF file, whose `ref` has its ggml type as dtype and its shape in weights.

    CheckpointError for a type that is not read.
    """
    if ref.dtype in (*PLAIN, "I32"):
        return plain(ref)
    if ref.dtype not in FORMATS:
        raise CheckpointError(
            f"{ref.file}: tensor {ref.name} is of {ref.dtype}, which is not read; known are "
            f"{', '.join(FORMATS)}"
        )
    row = FORMATS[ref.dtype].row_bytes(ref.shape[-1])
    packed = replace(ref, dtype="U8", shape=(*ref.shape[:-1], row))
    return Stored(ref.name, ref.shape, "F32", {"": packed}, Ggml(ref.dtype))


@dataclass(frozen=True, slots=True)
class Ggml:
    """Blocks of one type, which is its name."""

    name: str

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`: f32."""
        return formats.dequantize(self.name, self.blocks(stored, index, rows))

    def blocks(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """The bytes of these rows, u8 [.., row_bytes]."""
        return read_part(stored.parts[""], index, rows)


def joined(name: str, shape: tuple[int, ...], pieces: tuple[tuple[Ops, Stored], ...]) -> Stored:
    """A weight of that shape whose parts are stored on their own, as the ops cut them out of it."""
    parts = {f"{piece.name}/{key}": ref for _, piece in pieces for key, ref in piece.parts.items()}
    return Stored(name, shape, "F32", parts, Pieces(pieces))


@dataclass(frozen=True, slots=True)
class Pieces:
    """Parts of a weight, each put back where its ops took it from."""

    pieces: tuple[tuple[Ops, Stored], ...]
    name: str = "pieces"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`: f32. Rows are not stored in their order, so that a matrix is read whole."""
        out = torch.empty(stored.shape if index is None else stored.shape[1:])
        for ops, piece in self.pieces:
            put(ops, out, piece.read(index).float())
        return out if rows is None else out[rows.start : rows.stop]
