"""llama.cpp's importance matrices: ours written for llama-quantize, theirs (GGUF and .dat) read for us.

A GGUF imatrix has, for every weight, `<name>.in_sum2` F32 [matrices, in], the sum of x² over
the tokens, and `<name>.counts` F32 [matrices, 1], how many tokens those were; llama-quantize
divides one by the other, and takes 1 for every column where the count is 0. The older .dat
keeps one count a tensor and the mean times that count (llama.cpp b11434, tools/imatrix,
common/imatrix-loader.cpp).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf import GGUFValueType, GGUFWriter
from torch import Tensor

from moequant.containers.gguf.export import Exported
from moequant.containers.gguf.header import Header, plain
from moequant.containers.gguf.read import GgufFile
from moequant.errors import CheckpointError, CorpusError, VerifyError
from moequant.escape import text_names
from moequant.files import atomic
from moequant.statistics.importance import Gating, importance
from moequant.statistics.store import stacked
from moequant.values import Calibration, InputStats, Role, RouteStats, Weight

log = logging.getLogger(__name__)

LEGACY_CHUNK = 512
"""Tokens in a call of a .dat file, which does not say: llama-imatrix's default context."""

_COUNT = 2**31
"""Chunks, and tokens in one, are below: i32 in llama.cpp."""

_TOKENS = 2.0**53
"""Tokens of an expert are below: doubles count no further."""

_FUSED = {".ffn_gate_exps.": ".ffn_gate_up_exps.", ".ffn_up_exps.": ".ffn_gate_up_exps."}
"""Gate and up may be one tensor in the model that an imatrix was made with; their input is the same."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of an imatrix: `sums` f64 [matrices * in] of x² over `counts` i64 [matrices or 1] tokens."""

    sums: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class Imatrix:
    """An imatrix file as it is, before anybody asks whether it fits a model."""

    path: Path
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int
    legacy: bool


def write(path: Path, exported: Exported, calibration: Calibration, gating: Gating = "gate2") -> None:
    """Write `calibration` as a GGUF imatrix for llama-quantize.

    With "gate2" the mean that llama.cpp computes is our `importance`, with its router
    weights and its prior; an expert without tokens gets a count of 1, since llama.cpp would
    overrule a count of 0. With "none" the file is what llama-imatrix itself defines: plain
    sums over the expert's tokens. `counts` are tokens either way.
    Raises OutputError when the disk refuses.
    """
    writer = GGUFWriter(None, exported.arch)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text_names(calibration.source)])
    writer.add_uint32("imatrix.chunk_count", calibration.rows)
    writer.add_uint32("imatrix.chunk_size", calibration.tokens // max(1, calibration.rows))
    writer.add_string("moequant.gating", gating)
    for weight in sorted(exported.weights, key=lambda weight: exported.names[weight.name]):
        if weight.site is not None:
            sums, counts = _export(calibration.inputs[weight.site.name], gating)
            name, shape = exported.names[weight.name], exported.shapes[weight.name]
            if len(shape) == 3 and len(sums) == 1:  # a stack whose matrices are all fed the same
                sums, counts = sums.expand(shape[0], -1), counts.expand(shape[0])
            writer.add_tensor(f"{name}.in_sum2", sums.float().contiguous().numpy())
            writer.add_tensor(f"{name}.counts", counts.float()[:, None].contiguous().numpy())
    with atomic(path) as partial:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _export(stats: InputStats, gating: Gating) -> tuple[Tensor, Tensor]:
    """What stands in the file for one weight: sums f64 [E, in], counts i64 [E]."""
    if gating == "none":
        return stats.moment, stats.tokens
    counts = stats.tokens.clamp(min=1)
    return importance(stats, gating).double() * counts[:, None], counts


def read(path: Path, exported: Exported) -> Calibration:
    """An imatrix of either format as statistics for the weights of a model.

    Every expert's count is kept (0 too: `importance` then takes the layer's pooled mean).
    llama-imatrix knows no router weights, so each token weighs 1, and no domains, pairs or
    entropies: those are 0. A .dat file does not say how many tokens an expert saw; each is
    taken to have seen as many as the busiest, but one whose values are all 1 saw none. Some
    entries may be absent: llama-imatrix leaves the head out, and stacks of which an expert saw nothing. Their
    columns then count alike, and the log says so.
    Raises CorpusError for a damaged file and for one of another model.
    """
    found = parse(path)
    inputs: dict[str, InputStats] = {}
    absent = []
    for weight in exported.weights:
        if weight.site is not None and weight.site.name not in inputs:
            stats = _stats(found, weight, exported)
            if stats is None:
                absent.append(exported.names[weight.name])
                columns = torch.zeros(stacked(weight), weight.n_in, dtype=torch.float64)
                stats = _plain(columns, torch.zeros(stacked(weight), dtype=torch.int64))
            inputs[weight.site.name] = stats
    if len(absent) > len(inputs) / 2:
        raise CorpusError(f"{path}: no entry for {absent[0]}; the imatrix of another model?")
    for name in absent:
        log.warning("%s: no entry for %s; all of its columns get the same importance", path, name)
    routes = tuple(
        _route(weight, inputs[weight.site.name].tokens)
        for weight in exported.weights
        if weight.role is Role.UP and weight.site is not None and weight.runs
    )
    source = f"{path.name} ({', '.join(found.datasets) or 'text not named'})"
    return Calibration(routes, inputs, found.chunks, found.chunks * found.chunk_size, source, ())


def _stats(found: Imatrix, weight: Weight, exported: Exported) -> InputStats | None:
    """The moments of a weight's input, under the name of any weight that multiplies the same activations;
    None when there is no entry."""
    same = [other for other in exported.weights if other.site == weight.site and other.runs]
    names = [exported.names[other.name] for other in same]
    names += [name.replace(one, fused) for name in names for one, fused in _FUSED.items() if one in name]
    entries = [(name, found.entries[name]) for name in dict.fromkeys(names) if name in found.entries]
    if not entries:
        return None
    (name, entry), others = entries[0], entries[1:]
    matrices, n_in = stacked(weight), weight.n_in
    if matrices == 1 and entry.sums.numel() > n_in and entry.sums.numel() % n_in == 0:
        # A stack whose matrices are all fed the same: its entry says so once for each.
        entry = Entry(entry.sums.view(-1, n_in).mean(0), entry.counts[:1])
    if entry.sums.numel() != matrices * n_in or len(entry.counts) not in (1, matrices):
        raise CorpusError(
            f"{found.path}: {name} has {entry.sums.numel()} values and {len(entry.counts)} counts, "
            f"expected {matrices} x {n_in} and {matrices}; the imatrix of another model?"
        )
    for other, twin in others:
        alike = twin.sums.shape == entry.sums.shape and torch.allclose(twin.sums, entry.sums, rtol=1e-3)
        if twin.sums.shape == entry.sums.shape and not alike:
            raise CorpusError(
                f"{found.path}: {name} and {other} multiply the same activations, but their values differ"
            )
    sums, tokens = entry.sums.view(matrices, n_in), entry.counts.expand(matrices).clone()
    if found.legacy and matrices > 1:
        # What a .dat file holds for an expert that saw nothing: a mean of exactly 1 everywhere.
        tokens[(sums == tokens[:, None]).all(1)] = 0
    return _plain(sums, tokens)


def _plain(sums: Tensor, tokens: Tensor) -> InputStats:
    """Statistics in which every token weighs 1."""
    seen = sums * (tokens > 0)[:, None]
    mass = tokens.double()
    return InputStats(tokens, mass, mass.clone(), seen, seen.clone())


def _route(weight: Weight, tokens: Tensor) -> RouteStats:
    """What an imatrix tells of a router: how many tokens each expert got."""
    nothing = torch.zeros(0, len(tokens), dtype=torch.int64)
    return RouteStats(weight.layer or 0, tokens, tokens.double(), nothing, torch.diag(tokens), 0.0)


def parse(path: Path) -> Imatrix:
    """An imatrix file of either format. CorpusError when it is neither, damaged, or not finite."""
    try:
        if path.exists() and not path.is_file():
            raise CorpusError(f"{path}: cannot be read (not a regular file)")
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            found = _parse_gguf(path) if magic == b"GGUF" else _Legacy(path, file).imatrix()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (CheckpointError, VerifyError) as error:
        raise CorpusError(str(error)) from None
    if not found.entries:
        raise CorpusError(f"{path}: an imatrix without any entry")
    if not (0 <= found.chunks < _COUNT and 0 <= found.chunk_size < _COUNT):
        raise CorpusError(
            f"{path}: {found.chunks} chunks of {found.chunk_size} tokens, expected 0 to 2**31; make it again"
        )
    for name, entry in found.entries.items():
        if not torch.isfinite(entry.sums).all() or (entry.sums < 0).any():
            raise CorpusError(f"{path}: {name} has values that are negative, NaN or infinite; make it again")
    return found


def _parse_gguf(path: Path) -> Imatrix:
    file = GgufFile(path)
    if (kind := file.header.text("general.type")) != "imatrix":
        raise CorpusError(
            f"{path}: GGUF of type {kind!r}, expected 'imatrix'; give one that llama-imatrix wrote"
        )
    chunks, chunk_size = (_number(file.header, f"imatrix.{key}") for key in ("chunk_count", "chunk_size"))
    array = file.header.arrays.get("imatrix.datasets")
    if array is None or array.kind is not GGUFValueType.STRING:
        raise CorpusError(f"{path}: key imatrix.datasets is missing or no list; llama-quantize needs it too")
    names = [name.removesuffix(".in_sum2") for name in file.tensors if name.endswith(".in_sum2")]
    return Imatrix(
        path,
        {name: _entry(file, name) for name in names},
        tuple(plain(text) for text in array.values()),
        chunks,
        chunk_size,
        legacy=False,
    )


def _number(header: Header, key: str) -> int:
    value = header.metadata.get(key)
    if not isinstance(value, int):
        raise CorpusError(f"{header.path}: key {key} is missing or no int; llama-quantize needs it too")
    return value


def _entry(file: GgufFile, name: str) -> Entry:
    """One weight's sums and counts."""
    kinds = ("in_sum2", "counts")
    tensors = [file.tensors.get(f"{name}.{kind}") for kind in kinds]
    if any(tensor is None or tensor.type != "F32" for tensor in tensors):
        raise CorpusError(f"{file.path}: {name} needs in_sum2 and counts, both F32")
    sums, counts = (file.values(f"{name}.{kind}").double().flatten() for kind in kinds)
    if not ((counts >= 0) & (counts < _TOKENS)).all():
        raise CorpusError(f"{file.path}: {name} has counts that are negative, NaN or infinite; make it again")
    return Entry(sums, counts.round().long())


class _Legacy:
    """A .dat file as it is read: no length in it is believed beyond the file's own."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.left = path, file, path.stat().st_size

    def imatrix(self) -> Imatrix:
        """i32 n; n times i32 length, name, i32 calls, i32 values, f32s; then i32 chunks, i32 length, text."""
        entries = {}
        for _ in range(self.number()):
            name = plain(self.take(self.number()).decode(errors="replace"))
            calls, values = self.number(), self.number()
            stored = torch.from_numpy(np.frombuffer(self.take(4 * values), "<f4").astype(np.float64))
            # Without calls the values are means already.
            calls = max(1, calls)
            entries[name] = Entry(
                stored / calls * (calls * LEGACY_CHUNK), torch.tensor([calls * LEGACY_CHUNK])
            )
        # The trailer came later than the format: a file may end here.
        chunks = self.number() if self.left else 0
        datasets = (plain(self.take(self.number()).decode(errors="replace")),) if self.left else ()
        return Imatrix(self.path, entries, datasets, chunks, LEGACY_CHUNK, legacy=True)

    def number(self) -> int:
        """An i32."""
        return int.from_bytes(self.take(4), "little", signed=True)

    def take(self, size: int) -> bytes:
        """The next bytes. CorpusError when the file has no so many."""
        found = self.file.read(size) if 0 <= size <= self.left else b""
        if len(found) != size:
            raise CorpusError(f"{self.path}: neither a GGUF nor a complete .dat imatrix (stops {self.left} "
                              "bytes before its end)")  # fmt: skip
        self.left -= size
        return found
