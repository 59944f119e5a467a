"""A GGUF file under check; gguf-py is the other decoder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moequant import formats
from moequant.check.damage import Span, of_codes
from moequant.check.source import ALTERED, Entry, Plain, three
from moequant.checkpoint import Checkpoint
from moequant.containers.gguf import checksums
from moequant.containers.gguf.export import export
from moequant.containers.gguf.header import TensorInfo
from moequant.containers.gguf.read import WHOLE, GgufFile, decode
from moequant.containers.gguf.same import check_same, differing
from moequant.containers.gguf.weights import GgufWeights
from moequant.errors import VerifyError
from moequant.kernels import Matrix
from moequant.values import Weight

HEADER = "header"
"""Where keys are."""


class GgufSource:
    """See `Source`: every type has a kernel, so that every tensor has a matrix."""

    def __init__(self, path: Path, baseline: Checkpoint | None) -> None:
        self.path = path
        self._file = GgufFile(path)
        exported = None if baseline is None else export(baseline)
        self.model = None if exported is None else exported.checkpoint
        self.weights: dict[str, Weight] = {}
        self._exported = exported
        if exported is not None:
            check_same(self._file.header, exported)
            self.weights = {exported.names[weight.name]: weight for weight in exported.weights}
            self._decoded = GgufWeights(path, exported, self._file)
        if not self._file.tensors:
            raise VerifyError(f"{path}: no tensors in it; give the file of a whole model")
        self._checksums = checksums.recorded(self._file)
        self.recorded = self._checksums is not None
        self.entries = tuple(
            Entry(tensor.name, tensor.type, three(tensor.shape), len(tensor.shape) == 3, tensor.type)
            for tensor in self._file.header.tensors
            if _is_quantized(path, tensor)
        )

    def matrix(self, entry: Entry) -> Matrix:
        """See `Source`."""
        data = torch.from_numpy(self._file.data(entry.name)).view(*entry.shape[:2], -1)
        return Matrix(entry.format, entry.shape, data)

    def decode(self, entry: Entry, matrix: Matrix | None) -> Tensor:
        """See `Source`."""
        return _there(matrix).decode()

    def reference(self, entry: Entry, matrix: Matrix | None) -> Tensor:
        """See `Source`."""
        return torch.from_numpy(decode(_there(matrix).data.numpy(), entry.format, entry.name))

    def span(self, entry: Entry, matrix: Matrix | None, expert: int, decoded: Tensor) -> Span:
        """See `Source`."""
        return of_codes(entry.format, _there(matrix).data[expert])

    def load(self, weight: Weight) -> Tensor:
        """See `Source`."""
        return self._decoded.as_cut(weight)

    def altered(self, entry: Entry, matrix: Matrix | None) -> tuple[int, ...]:
        """See `Source`."""
        if self._checksums is None:
            return ()
        wanted = self._checksums[entry.name]
        found = checksums.of_slices(_there(matrix).data.numpy(), len(wanted))
        return tuple(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)

    def altered_rest(self) -> tuple[tuple[str, str], ...]:
        """See `Source`."""
        quantized = {entry.name for entry in self.entries}
        return tuple(
            (name, ALTERED)
            for name, wanted in (self._checksums or {}).items()
            if name not in quantized and checksums.of_slices(self._file.data(name), len(wanted)) != wanted
        )

    def said(self) -> tuple[tuple[str, str], ...]:
        """See `Source`."""
        other = () if self._exported is None else differing(self._file.header, self._exported)
        told = [(HEADER, f"{key} is {theirs}, the baseline's {mine}") for key, theirs, mine in other]
        if checksums.header_changed(self._file):
            told.insert(0, (HEADER, "keys, tokens, types or shapes are not those that were written"))
        return tuple(told)

    def plain(self) -> Iterator[Plain]:
        """See `Source`."""
        quantized = {entry.name for entry in self.entries}
        for name in self._file.tensors:
            if name not in quantized:
                read = partial(self._file.values, name)
                yield Plain(name, frozenset({name}), read, self.weights.get(name))

    def label(self, entry: Entry, expert: int) -> str:
        """Tensor and expert."""
        return f"{entry.name} expert {expert}" if entry.stacked else entry.name


def _there(matrix: Matrix | None) -> Matrix:
    assert matrix is not None
    return matrix


def _is_quantized(path: Path, tensor: TensorInfo) -> bool:
    """Whether a tensor is packed in blocks. VerifyError for what nobody here decodes."""
    if len(tensor.shape) < 2 or tensor.type == WHOLE:
        return False
    if tensor.type not in formats.FORMATS:
        raise VerifyError(f"{path}: {tensor.name} is {tensor.type}, which moequant cannot decode")
    quantized = formats.get(tensor.type).block > 1
    if quantized and len(tensor.shape) > 3:
        raise VerifyError(f"{path}: {tensor.name} is {tensor.shape}, expected a matrix or a stack of them")
    return quantized
