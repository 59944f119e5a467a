"""A quantized model folder: safetensors that vLLM and transformers load, written in one pass.

Tensors go to the disk as they are made and are not kept; what stays in the checkpoint's own
precision is copied as bytes. `moequant.json` says how the folder was made, which files in it are
moequant's, and the CRC-32 of every tensor: `moequant check` names what changed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moequant import __version__
from moequant.checkpoint import Checkpoint, load
from moequant.checkpoint.codecs.base import DTYPES, read_bytes
from moequant.containers.base import Written
from moequant.containers.folders import compressed_tensors, shards, side_files
from moequant.containers.folders.layouts import LAYOUTS, Scales
from moequant.containers.folders.narrow import NarrowScales
from moequant.containers.folders.plan import (
    BITS_OF,
    FolderSettings,
    kept_dtype,
    kept_linears,
    scheme_groups,
    stored_names,
    stores,
    targets,
)
from moequant.containers.folders.schemes import find
from moequant.containers.folders.shards import Bytes, Entry, Shard, ShardWriter
from moequant.containers.folders.storage import decode
from moequant.errors import CheckpointError, OutputError, VerifyError
from moequant.files import RECORD, check_kept
from moequant.progress import counted
from moequant.values import Packed, Plan, Stored, Weight

_CHUNK = 1 << 24


def folder_bytes(checkpoint: Checkpoint, plan: Plan, settings: FolderSettings) -> int:
    """Bytes of the weight files that `write` will produce."""
    return sum(shard.bytes for shard in _shards(checkpoint, plan, settings))


def check_target(path: Path, checkpoint: Checkpoint, plan: Plan, settings: FolderSettings) -> None:
    """OutputError, before any work is done, when a file of somebody else's is in the place of one that
    `write` will make."""
    files = _shards(checkpoint, plan, settings)
    copied = (file.relative_to(checkpoint.path).as_posix() for file in side_files.side_files(checkpoint.path))
    made = {"config.json", "README.md", RECORD, *(shard.name for shard in files), *copied}
    made |= {shards.INDEX} if len(files) > 1 else set()
    beside = LAYOUTS[settings.layout].beside
    made |= set() if beside is None else {beside}
    check_kept(path, made)


def write(
    folder: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    settings: FolderSettings,
    packed: Iterable[Packed],
    inputs: Scales,
) -> Written:
    """Write a plan into the empty `folder`: weights, config, tokenizer and all side files; the card comes
    later.

    `inputs` are of the weights whose scheme scales those. `packed` must yield the plan's rounded weights, in
    the formats of their `Storage` and the plan's order; each is written as it comes and not kept. Raises
    OutputError when the disk refuses.
    """
    layout, kinds = LAYOUTS[settings.layout], stores(checkpoint, plan, settings.layout)
    files = _shards(checkpoint, plan, settings)
    by_name = {weight.name: weight for weight in checkpoint.weights}
    stream, held, narrow = iter(packed), list[Packed](), NarrowScales()
    with ShardWriter(folder, files) as writer:
        for choice in plan.choices:
            if choice.weight in kinds:
                item = next(stream)
                if item.weight.name != choice.weight:
                    raise VerifyError(f"{item.weight.name}: came where {choice.weight} was planned")
                held.append(item)
                del item
                storage = kinds[choice.weight]
                if whole := layout.entries(held[-1].weight, storage):
                    for entry, parts in zip(whole, layout.values(held, storage, inputs), strict=True):
                        writer.put(entry.name, map(_bytes, narrow.seen(entry, parts)))
                    held.clear()
                continue
            for entry, source in _kept(by_name[choice.weight]):
                if entry.name not in writer.checksums:
                    writer.put(entry.name, _chunks(entry, source))
        for item in stream:  # to its end: several processes end a stage together
            raise VerifyError(f"{item.weight.name}: came where nothing more was planned")
    config = quantization(checkpoint, plan, settings)
    record = {
        "made_by": f"moequant {__version__}",
        "settings": asdict(settings),
        "quantization_config": config,
        "crc32": writer.checksums,
        "tensors": {each.name: f"{each.dtype} {list(each.shape)}" for file in files for each in file.entries},
    }
    _write_side_files(folder, checkpoint, files, config, record)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    advice = "; --format safetensors stores them in BF16" if settings.layout in BITS_OF else ""
    return Written(folder, size, writer.checksums, narrow.notes(advice))


def quantization(checkpoint: Checkpoint, plan: Plan, settings: FolderSettings) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    kept, named = kept_linears(checkpoint, plan), scheme_groups(plan)
    if len(named) == 1:
        groups = [(find(name), [compressed_tensors.LINEAR]) for name in named]
    else:
        by_name = {weight.name: weight for weight in checkpoint.weights}
        groups = [(find(name), targets([by_name[w] for w in weights])) for name, weights in named.items()]
    found = LAYOUTS[settings.layout].config(groups, kept)
    # transformers 5.24 fails on modules without a plain weight where it makes an encoder and a decoder.
    return found | {"dequantize": True} if checkpoint.encodes else found


def verify(written: Written, checkpoint: Checkpoint, plan: Plan, settings: FolderSettings) -> int:
    """Read the folder again: every byte as written, and of each rounded weight one expert decoded twice.

    The second decoder is the loader's: compressed-tensors. Returns how many weights both decoded;
    VerifyError names the tensor that is missing, differs, or decodes to something else.
    """
    on_disk = LAYOUTS[settings.layout].open(written.path)
    if differing := set(on_disk.tensors) ^ written.checksums.keys():
        raise VerifyError(f"{written.path}: tensor {min(differing)} is in only one of plan and folder")
    for name, expected in counted("verify", written.checksums.items(), "tensor"):
        if zlib.crc32(_bytes(on_disk.tensor(name))) != expected:
            raise VerifyError(
                f"{written.path}: bytes of {name} are not those that were written; is the disk healthy?"
            )
    by_name = {weight.name: weight for weight in checkpoint.weights}
    decoded = 0
    for number, (name, storage) in enumerate(stores(checkpoint, plan, settings.layout).items()):
        weight = by_name[name]
        expert = number % weight.matrices
        theirs = on_disk.decode(weight, expert).float()
        ours = decode(storage, on_disk.stored(weight, expert), weight.n_in)
        if not torch.equal(ours, theirs) or not torch.isfinite(theirs).all():
            module = on_disk.label(weight, expert)
            raise VerifyError(f"{written.path}: {module} decodes to other values than meant")
        decoded += theirs.numel()
    return decoded


def _shards(checkpoint: Checkpoint, plan: Plan, settings: FolderSettings) -> tuple[Shard, ...]:
    """Every tensor of the folder in the plan's order, cut into files."""
    layout, kinds = LAYOUTS[settings.layout], stores(checkpoint, plan, settings.layout)
    by_name = {weight.name: weight for weight in checkpoint.weights}
    entries: dict[str, Entry] = {}
    for choice in plan.choices:
        weight = by_name[choice.weight]
        if weight.name in kinds:
            entries |= {entry.name: entry for entry in layout.entries(weight, kinds[weight.name])}
        else:
            entries |= {entry.name: entry for entry, _ in _kept(weight)}
    return shards.cut(list(entries.values()), settings.shard_bytes)


def _kept(weight: Weight) -> list[tuple[Entry, Stored | Weight]]:
    """The tensors of a weight that is not rounded, under the names that loaders know them by, and what each
    holds: of experts one after another, as those that are rounded; else what is stored, under the release's
    name unless it is only a part of the weight or holds other weights too. What is stored in fewer bits than
    floats is written in bf16."""
    dtype, origin = kept_dtype(weight), weight.origin
    if weight.is_expert and len(weight.shape) == 3:
        names = enumerate(stored_names(weight))
        return [(Entry(name, dtype, weight.shape[1:]), weight.of(range(at, at + 1))) for at, name in names]
    is_whole = not origin.ops and len(origin.stored) == 1
    named = [weight.names[0]] if is_whole else [stored.name for stored in origin.stored]
    return [
        (Entry(name, dtype, stored.shape), stored) for name, stored in zip(named, origin.stored, strict=True)
    ]


def _bytes(tensor: Tensor) -> memoryview:
    flat: np.ndarray[tuple[int], np.dtype[np.uint8]] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return flat.data


def _chunks(entry: Entry, source: Stored | Weight) -> Iterator[Bytes]:
    """A tensor's bytes as they are written, an expert or a few megabytes at a time; decoded where they are
    stored otherwise. CheckpointError for values that are NaN or infinite."""
    dtype = DTYPES[entry.dtype]
    if isinstance(source, Weight):
        yield _finite(entry, _bytes(load(source).to(dtype)))
    elif source.codec.name != "plain":
        for index in range(source.shape[0]) if len(source.shape) == 3 else (None,):
            yield _finite(entry, _bytes(source.read(index).to(dtype)))
    else:
        (ref,) = source.parts.values()
        for at in range(ref.begin, ref.end, _CHUNK):
            yield _finite(entry, read_bytes(ref, at, min(_CHUNK, ref.end - at)))


def _finite(entry: Entry, data: Bytes) -> Bytes:
    """The bytes, whose numbers are all numbers."""
    values = torch.frombuffer(bytearray(data), dtype=DTYPES[entry.dtype])
    if not torch.isfinite(values).all():
        raise CheckpointError(
            f"tensor {entry.name}: holds values that are NaN or infinite; the checkpoint is damaged"
        )
    return data


def _unquantized(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without a word of how the checkpoint was quantized: models that see may say it of their
    text alone."""
    config = {key: value for key, value in raw.items() if key != "quantization_config"}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return config


def _write_side_files(
    folder: Path,
    checkpoint: Checkpoint,
    files: tuple[Shard, ...],
    quantization: dict[str, Any],
    record: dict[str, Any],
) -> None:
    """Everything but weights and card: config, index, record, and what lies beside the weights."""
    config = _unquantized(checkpoint.raw)
    record["config"] = config
    texts = {"config.json": json.dumps(config | {"quantization_config": quantization}, indent=2) + "\n"}
    if len(files) > 1:
        texts[shards.INDEX] = shards.index(files)
    if (beside := LAYOUTS[quantization["quant_method"]].beside) is not None:
        texts[beside] = json.dumps(quantization, indent=2) + "\n"
    try:
        side_files.copy(checkpoint.path, folder)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        files_here = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
        record["files"] = sorted([RECORD, "README.md", *(name.as_posix() for name in files_here)])
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error})") from error
