"""llama.cpp's importance matrices: ours written for llama-quantize, theirs (GGUF and .dat) read for us.

A GGUF imatrix has, for every weight, `<name>.in_sum2` F32 [matrices, in], the sum of x² over
the tokens, and `<name>.counts` F32 [matrices, 1], how many tokens those were; llama-quantize
divides one by the other, and takes 1 for every column where the count is 0. The older .dat
keeps one count a tensor and the mean times that count (llama.cpp b11434, tools/imatrix,
common/imatrix-loader.cpp).
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.errors import CorpusError
from moequant.files import atomic
from moequant.statistics.importance import Gating, importance
from moequant.values import Calibration, InputStats, Role, RouteStats, Weight

log = logging.getLogger(__name__)

LEGACY_CHUNK = 512
"""Tokens in a call of a .dat file, which does not say: llama-imatrix's default context."""

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


def write(path: Path, checkpoint: Checkpoint, calibration: Calibration, gating: Gating = "gate2") -> None:
    """Write `calibration` as a GGUF imatrix for llama-quantize.

    With "gate2" the mean that llama.cpp computes is our `importance`, with its router
    weights and its prior; an expert without tokens gets a count of 1, since llama.cpp would
    overrule a count of 0. With "none" the file is what llama-imatrix itself defines: plain
    sums over the expert's tokens. `counts` are tokens either way.
    Raises OutputError when the disk refuses.
    """
    writer = GGUFWriter(None, checkpoint.family.gguf_arch)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [calibration.source])
    writer.add_uint32("imatrix.chunk_count", calibration.rows)
    writer.add_uint32("imatrix.chunk_size", calibration.tokens // max(1, calibration.rows))
    writer.add_string("moequant.gating", gating)
    for weight in sorted(checkpoint.weights, key=lambda weight: weight.name):
        if weight.input is not None:
            sums, counts = _export(calibration.inputs[weight.input], gating)
            writer.add_tensor(f"{weight.name}.in_sum2", sums.float().numpy())
            writer.add_tensor(f"{weight.name}.counts", counts.float()[:, None].numpy())
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


def read(path: Path, checkpoint: Checkpoint) -> Calibration:
    """An imatrix of either format as statistics for the weights of `checkpoint`.

    Every expert's count is kept (0 too: `importance` then takes the layer's pooled mean).
    llama-imatrix knows no router weights, so each token weighs 1, and no domains, pairs or
    entropies: those are 0. A .dat file does not say how many tokens an expert saw; each is
    taken to have seen as many as the busiest, but one whose values are all 1 saw none. The
    output head may be absent, as llama-imatrix leaves it out: its columns then count alike.
    Raises CorpusError for a damaged file and for one of another model.
    """
    found = parse(path)
    inputs: dict[str, InputStats] = {}
    for weight in checkpoint.weights:
        if weight.input is not None and weight.input not in inputs:
            inputs[weight.input] = _stats(found, weight, checkpoint.weights)
    routes = tuple(
        _route(weight, inputs[weight.input].tokens)
        for weight in checkpoint.weights
        if weight.role is Role.GATE and weight.input is not None
    )
    source = f"{path.name} ({', '.join(found.datasets) or 'text not named'})"
    return Calibration(routes, inputs, found.chunks, found.chunks * found.chunk_size, source, ())


def _stats(found: Imatrix, weight: Weight, weights: tuple[Weight, ...]) -> InputStats:
    """The moments of `weight`'s input, under the name of any weight that multiplies the same activations."""
    names = [other.name for other in weights if other.input == weight.input]
    names += [name.replace(one, fused) for name in names for one, fused in _FUSED.items() if one in name]
    entries = [(name, found.entries[name]) for name in dict.fromkeys(names) if name in found.entries]
    if not entries:
        if weight.role not in (Role.OUTPUT, Role.EMBEDDING):
            raise CorpusError(f"{found.path}: no entry for {weight.name}; the imatrix of another model?")
        log.warning("%s: no entry for %s, whose columns count alike", found.path, weight.name)
        return _plain(torch.zeros(1, weight.n_in, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
    (name, entry), others = entries[0], entries[1:]
    experts, n_in = weight.n_experts, weight.n_in
    if entry.sums.numel() != experts * n_in or len(entry.counts) not in (1, experts):
        raise CorpusError(
            f"{found.path}: {name} has {entry.sums.numel()} values and {len(entry.counts)} counts, "
            f"expected {experts} x {n_in} and {experts}; the imatrix of another model?"
        )
    for other, same in others:
        if same.sums.shape != entry.sums.shape or not torch.allclose(same.sums, entry.sums, rtol=1e-3):
            raise CorpusError(
                f"{found.path}: {name} and {other} multiply the same activations, but their values differ"
            )
    sums, tokens = entry.sums.view(experts, n_in), entry.counts.expand(experts).clone()
    if found.legacy and experts > 1:
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
        with path.open("rb") as file:
            magic = file.read(4)
        found = _parse_gguf(path) if magic == b"GGUF" else _parse_legacy(path)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not found.entries:
        raise CorpusError(f"{path}: an imatrix without any entry")
    for name, entry in found.entries.items():
        if not torch.isfinite(entry.sums).all() or (entry.sums < 0).any():
            raise CorpusError(f"{path}: {name} has values that are negative, NaN or infinite; make it again")
    return found


def _parse_gguf(path: Path) -> Imatrix:
    try:
        reader = GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise CorpusError(f"{path}: damaged GGUF file ({' '.join(str(error).split())})") from None
    if meta.get("general.type") != "imatrix":
        raise CorpusError(f"{path}: GGUF of type {meta.get('general.type')!r}, expected 'imatrix'")
    keys = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    for key, kind in zip(keys, (list, int, int), strict=True):
        if not isinstance(meta.get(key), kind):
            raise CorpusError(
                f"{path}: key {key} is missing or no {kind.__name__}; llama-quantize needs it too"
            )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    entries = {}
    for full, tensor in tensors.items():
        name, _, kind = full.rpartition(".")
        if kind != "in_sum2":
            continue
        counts = tensors.get(f"{name}.counts")
        if counts is None or tensor.tensor_type.name != "F32" or counts.tensor_type.name != "F32":
            raise CorpusError(f"{path}: {name} needs in_sum2 and counts, both F32")
        sizes = np.array(counts.data, dtype=np.float64).reshape(-1)
        if not np.isfinite(sizes).all() or (sizes < 0).any():
            raise CorpusError(f"{path}: {name} has counts that are negative, NaN or infinite; make it again")
        sums = np.array(tensor.data, dtype=np.float64).reshape(-1)
        entries[name] = Entry(torch.from_numpy(sums), torch.from_numpy(sizes.round().astype(np.int64)))
    datasets, chunks, chunk_size = (meta[key] for key in keys)
    return Imatrix(path, entries, tuple(datasets), int(chunks), int(chunk_size), legacy=False)


def _parse_legacy(path: Path) -> Imatrix:
    """i32 n; n times i32 length, name, i32 calls, i32 values, f32s; then i32 chunks, i32 length, text."""
    data, at = path.read_bytes(), 0

    def take(size: int) -> bytes:
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise CorpusError(f"{path}: neither a GGUF nor a complete .dat imatrix (stops at byte {at})")
        at += size
        return data[at - size : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries = {}
    for _ in range(number()):
        name = take(number()).decode(errors="replace")
        calls, values = number(), number()
        stored = torch.from_numpy(np.frombuffer(take(4 * values), "<f4").astype(np.float64))
        # Without calls the values are means already.
        calls = max(1, calls)
        entries[name] = Entry(stored / calls * (calls * LEGACY_CHUNK), torch.tensor([calls * LEGACY_CHUNK]))
    # The trailer came later than the format: a file may end here.
    chunks = number() if at < len(data) else 0
    datasets = (take(number()).decode(errors="replace"),) if at < len(data) else ()
    return Imatrix(path, entries, datasets, chunks, LEGACY_CHUNK, legacy=True)
