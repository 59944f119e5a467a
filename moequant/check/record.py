"""What moequant wrote of a folder into `moequant.json` beside its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moequant.checkpoint.open import quantization_of, read_config
from moequant.errors import CheckpointError, VerifyError
from moequant.files import RECORD
from moequant.files.read import read_json
from moequant.values import TensorRef

QUANTIZATION = "quantization_config"


@dataclass(frozen=True, slots=True)
class Record:
    """`crc32` of every stored tensor's bytes; `tensors`, its type and shape, and `config`, the model's own
    keys of config.json, are empty in folders of older versions."""

    crc32: Mapping[str, int]
    tensors: Mapping[str, str]
    config: Mapping[str, Any]

    def relabelled(self, refs: Mapping[str, TensorRef]) -> Iterator[tuple[str, str]]:
        """(name, what) of tensors that are said to be of another type or shape than was written."""
        for name, was in self.tensors.items():
            ref = refs.get(name)
            if ref is not None and (now := said(ref.dtype, ref.shape)) != was:
                yield name, f"is said to be {now}, was written as {was}"

    def changed(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """(key, what was written, what is there) of a config.json that says otherwise."""
        if self.config:
            yield from differing(
                self.config, {key: value for key, value in config.items() if key != QUANTIZATION}
            )


def said(dtype: str, shape: tuple[int, ...]) -> str:
    """How a record describes a stored tensor."""
    return f"{dtype} {list(shape)}"


def record_of(path: Path) -> Record | None:
    """The record of a folder, None when it has none.

    VerifyError for one that is damaged, and when config.json reads the codes otherwise than they were
    written.
    """
    file = path / RECORD
    if not file.is_file():
        return None
    now = quantization_of(path, read_config(path)[0]) or {}
    try:
        found = read_json(file)
    except CheckpointError as error:
        raise VerifyError(str(error)) from None
    parts = [found.get(key, {}) for key in ("crc32", "tensors", "config", QUANTIZATION)]
    if not found.get("crc32") or not all(isinstance(part, dict) for part in parts):
        raise VerifyError(f"{file}: has no checksums of tensors; convert it again, or remove the file")
    for name, was, says in differing(parts[3], now):
        raise VerifyError(
            f"{path}: config.json says {name} is {says}, its weights were written with {was}; restore "
            "config.json"
        )
    return Record(*parts[:3])


def differing(written: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, written, now) of everything in two JSON objects that is not the same."""
    was, says = (dict(_leaves("", config)) for config in (written, now))
    for name in dict.fromkeys((*was, *says)):
        if was.get(name) != says.get(name):
            yield name.removeprefix("."), was.get(name), says.get(name)


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """(dotted name, value) of everything in a JSON value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value
