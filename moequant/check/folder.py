"""A quantized folder under check, whoever made it; compressed-tensors is the other decoder."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.check.damage import Span, of_values
from moequant.check.forms import Form, form_of, matrix_of
from moequant.check.others import by_others
from moequant.check.record import record_of
from moequant.check.source import ALTERED, Entry, Plain, three
from moequant.checkpoint import Checkpoint, folder_of, load, open_checkpoint
from moequant.checkpoint.folder import INDEX, read_index
from moequant.checkpoint.headers import read_headers
from moequant.checkpoint.open import quantization_of
from moequant.containers.gguf.same import equal
from moequant.errors import MoequantError, VerifyError
from moequant.evaluate.open_source import same_model
from moequant.families.config import text_config
from moequant.kernels import Matrix
from moequant.statistics.store import identity
from moequant.values import Stored, TensorRef, Weight

_CHUNK = 1 << 24
"""Bytes that are read at once for a checksum."""

CONFIG = "config.json"

UNDECLARED = "has no quantization_config: readers take codes for weights"

UNGROUPED = "has no config_groups: readers of compressed-tensors take codes for weights"


class FolderSource:
    """See `Source`. Its weights are read as a conversion of the folder would, as `compare` does."""

    def __init__(self, path: Path, baseline: Checkpoint | None) -> None:
        self.path, self.model = path, baseline
        self._record = record_of(path)
        self._checksums = None if self._record is None else self._record.crc32
        self.recorded = self._record is not None
        self._refs = read_headers(folder_of(path))
        self._opened = opened = self._open()
        if baseline is not None:
            same_model(opened, baseline)
        self._all = {weight.name: weight for weight in opened.weights}
        self._quantized = {name: each for name, each in self._all.items() if _is_quantized(each)}
        if not self._quantized:
            raise VerifyError(f"{path}: is not quantized; give a GGUF file or a quantized folder")
        # The baseline's: what a quantized folder calls a weight's place, or what it is fed, is the same.
        self._own = {} if baseline is None else {weight.name: weight for weight in baseline.weights}
        self.weights = {name: weight for name, weight in self._own.items() if name in self._quantized}
        self._forms = {name: form_of(each.origin.stored[0]) for name, each in self._quantized.items()}
        self.entries = tuple(_entry(each, self._forms[name]) for name, each in self._quantized.items())

    def _open(self) -> Checkpoint:
        """The folder by its headers. VerifyError: it has other tensors than were written, and is no model."""
        try:
            return open_checkpoint(self.path)
        except MoequantError as error:
            written = self._checksums or self._refs
            if others := sorted(written.keys() ^ self._refs.keys()):
                what = "is missing" if others[0] in written else "was not written by moequant"
                more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
                raise VerifyError(f"{self.path}: {others[0]} {what}{more}; convert it again") from error
            raise

    def matrix(self, entry: Entry) -> Matrix | None:
        """See `Source`."""
        return matrix_of(self._quantized[entry.name], entry.shape)

    def decode(self, entry: Entry, matrix: Matrix | None) -> Tensor:
        """See `Source`."""
        return _values(self._quantized[entry.name], entry)

    def reference(self, entry: Entry, matrix: Matrix | None) -> Tensor:
        """See `Source`."""
        return _values(by_others(self._quantized[entry.name]), entry)

    def span(self, entry: Entry, matrix: Matrix | None, expert: int, decoded: Tensor) -> Span:
        """See `Source`."""
        return of_values(decoded, self._forms[entry.name].columns)

    def load(self, weight: Weight) -> Tensor:
        """See `Source`."""
        return load(self._all[weight.name].like(weight))

    def altered(self, entry: Entry, matrix: Matrix | None) -> tuple[int, ...]:
        """See `Source`."""
        if self._checksums is None:
            return ()
        parts = [{ref.name for ref in each.parts.values()} for each in self._stored(entry)]
        changed = self._changed(set().union(*parts))
        if len(parts) != entry.shape[0]:  # several tensors for a matrix, or one for all experts
            return tuple(range(entry.shape[0])) if changed else ()
        return tuple(expert for expert, names in enumerate(parts) if names & changed)

    def altered_rest(self) -> tuple[tuple[str, str], ...]:
        """See `Source`; also tensors that are new, gone, or said to be of another type or shape."""
        if self._record is None:
            return ()
        parts = (each.parts.values() for weight in self._quantized.values() for each in weight.origin.stored)
        quantized = {ref.name for refs in parts for ref in refs}
        kept, there = self._record.crc32.keys() - quantized, self._refs.keys()
        return (
            *((name, ALTERED) for name in sorted(self._changed(kept & there))),
            *((name, "is missing") for name in sorted(kept - there)),
            *((name, "was not written by moequant") for name in sorted(there - self._record.crc32.keys())),
            *self._record.relabelled(self._refs),
        )

    def said(self) -> tuple[tuple[str, str], ...]:
        """See `Source`."""
        config, told = self._opened.raw, list[tuple[str, str]]()
        declared = quantization_of(self.path, config) or {}
        if not declared:
            told.append((CONFIG, UNDECLARED))
        elif declared.get("quant_method") == "compressed-tensors" and not declared.get("config_groups"):
            told.append((CONFIG, UNGROUPED))
        if self._record is not None:
            told += [
                (CONFIG, f"{key} is {now}, was written as {was}")
                for key, was, now in self._record.changed(config)
            ]
        if self.model is not None:
            mine, theirs = _computes(self.model), _computes(self._opened)
            told += [
                (CONFIG, f"{key} is {theirs.get(key)}, the baseline's {mine.get(key)}")
                for key in sorted(mine.keys() | theirs.keys())
                if not equal(mine.get(key), theirs.get(key))
            ]
        named = read_index(self.path)
        indexed = {name for name, ref in self._refs.items() if ref.file.name in named.values()}
        left = sorted(indexed - named.keys())
        told += [(name, f"is not in {INDEX}, and readers that go by it leave it out") for name in left]
        return tuple(told)

    def plain(self) -> Iterator[Plain]:
        """See `Source`."""
        for name, weight in self._all.items():
            if name not in self._quantized:
                names = {ref.name for each in weight.origin.stored for ref in each.parts.values()}
                yield Plain(name, frozenset(names), partial(load, weight), self._own.get(name))

    def label(self, entry: Entry, expert: int) -> str:
        """Tensor, expert, and the module's own name."""
        stored = self._stored(entry)
        own = entry.stacked and len(stored) > 1
        module = stored[expert if own else 0].name.removesuffix(".weight").removesuffix("_blocks")
        if not entry.stacked:
            return f"{entry.name} ({module})"
        return f"{entry.name} expert {expert} ({module if own else f'{module}[{expert}]'})"

    def _stored(self, entry: Entry) -> tuple[Stored, ...]:
        return self._quantized[entry.name].origin.stored

    def _changed(self, names: set[str]) -> set[str]:
        """Which stored tensors are not those that were written."""
        known = self._checksums or {}
        return {name for name in names if _crc(self._refs[name]) != known.get(name)}


def _computes(model: Checkpoint) -> dict[str, Any]:
    """What decides how a model computes; whether the head is tied as config.json says it, since readers do
    not look which tensors are there."""
    tied = text_config(model.raw).get("tie_word_embeddings", model.config.tie_word_embeddings)
    return {**identity(model), "tie_word_embeddings": tied}


def _is_quantized(weight: Weight) -> bool:
    """Whether it is a matrix, or a stack of them, that is stored as codes."""
    return len(weight.shape) in (2, 3) and weight.origin.stored[0].codec.name != "plain"


def _entry(weight: Weight, form: Form) -> Entry:
    return Entry(weight.name, form.name, three(weight.shape), len(weight.shape) == 3, form.alike, form.steps)


def _values(weight: Weight, entry: Entry) -> Tensor:
    # -0, which a code of 0 and FP4's second 0 may be, is no other number.
    return load(weight).to(torch.float32).view(entry.shape) + 0.0


def _crc(ref: TensorRef) -> int:
    """CRC-32 of a stored tensor's bytes."""
    found, left = 0, ref.end - ref.begin
    with ref.file.open() as file:
        file.seek(ref.begin)
        while left and (data := file.read(min(left, _CHUNK))):
            found, left = zlib.crc32(data, found), left - len(data)
    return found
