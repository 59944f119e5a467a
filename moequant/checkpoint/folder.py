"""The files of a model: a folder of small ones, and its weights, wherever those lie."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from moequant.errors import CheckpointError
from moequant.files.local import LocalFile
from moequant.files.read import read_json
from moequant.values import File

MISTRAL = "params.json"
"""What Mistral calls its config, beside names of tensors of its own."""

INDEX = "model.safetensors.index.json"

WHOLE = "model.safetensors"
"""The weights of a model in one file."""

_SHARD = re.compile(r"[^/\\\0\ud800-\udfff]{1,200}\.safetensors")
"""A file of the folder itself, of a name that a file can have."""

_SHARED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")
"""Names in the blobs that all models of a Hugging Face cache share."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A model folder: `path` has config, tokenizer and whatever else is small; `weights` are the
    safetensors files by their names, or the parts of `gguf`, a file that has the weights instead. `beside`
    names safetensors files that are not the model's."""

    path: Path
    weights: Mapping[str, File]
    gguf: Path | None = None
    beside: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What must not be written over while the model is read."""
        return (self.path,) if self.gguf is None else (self.gguf, self.path / "config.json")


def folder_of(model: Path | Folder) -> Folder:
    """A folder of this machine as a `Folder`; what is one already stays. CheckpointError for what is none."""
    if isinstance(model, Folder):
        return model
    if not model.exists():
        raise CheckpointError(
            f"{model}: no such file or folder; give a model folder, or OWNER/NAME of a model on the Hub"
        )
    if model.is_file():
        raise CheckpointError(
            f"{model}: is a file; give the folder with config.json and *.safetensors, or a .gguf file"
        )
    if not (model / "config.json").is_file():
        if (model / MISTRAL).is_file():
            raise CheckpointError(
                f"{model}: has {MISTRAL} and no config.json, which is Mistral's own format; give the model "
                "as transformers saves it"
            )
        raise CheckpointError(
            f"{model}: not a Hugging Face model folder; give the one that has config.json and *.safetensors"
        )
    there = {file.name: LocalFile(file) for file in sorted(model.glob("*.safetensors"))}
    chosen = files_of_model(there, read_index(model))
    beside = tuple(name for name in there if name not in chosen)
    return Folder(model, {name: there[name] for name in chosen if name in there}, beside=beside)


def files_of_model(names: Collection[str], weight_map: Mapping[str, str]) -> list[str]:
    """Which safetensors files are the model, as transformers decides it: the one that has all of it, else
    those of the index, and without an index all. Others, such as Mistral's own or adapters, lie beside it."""
    indexed = sorted(set(weight_map.values()))
    if WHOLE in names and WHOLE not in indexed:
        return [WHOLE]
    return indexed or sorted(names)


def read_index(folder: Path) -> dict[str, str]:
    """The file of every tensor as the index says, checked: files lie in the folder itself. Empty without an
    index."""
    if not (folder / INDEX).is_file():
        return {}
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map; is the download complete?")
    for tensor, name in found.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"{folder / INDEX}: {tensor!r} is said to lie in {name!r}; a *.safetensors file of the "
                "folder was expected"
            )
    return found


def belongs(file: Path, source: Path) -> bool:
    """Whether `file` is a regular file of the model.

    A symlink must stay inside the model folder, or lead to where Hugging Face's cache keeps the files of
    this model, or what models share; any other could make a stranger's folder publish something of this
    machine.
    """
    try:
        root, real = source.resolve(), file.resolve()
    except (OSError, RuntimeError):  # links that lead to each other
        return False
    if not real.is_file():
        return False
    if real.is_relative_to(root):
        return True
    if root.parent.name != "snapshots":
        return False
    model, shared = root.parent.parent, root.parents[2] / "blobs"
    if real.parent == model / "blobs":
        return True
    return real.is_relative_to(shared) and bool(_SHARED.fullmatch(real.relative_to(shared).as_posix()))
