"""The files of a model: a folder of small ones, and its weights, wherever those lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moequant.errors import CheckpointError
from moequant.files.local import LocalFile
from moequant.values import File

MISTRAL = "params.json"
"""What Mistral calls its config, beside names of tensors of its own."""

_SHARED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")
"""Names in the blobs that all models of a Hugging Face cache share."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A model folder: `path` has config, tokenizer and whatever else is small; `weights` are the
    safetensors files by their names, or the parts of `gguf`, a file that has the weights instead."""

    path: Path
    weights: Mapping[str, File]
    gguf: Path | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What must not be written over while the model is read."""
        return (self.path,) if self.gguf is None else (self.gguf, self.path / "config.json")


def folder_of(model: Path | Folder) -> Folder:
    """A folder of this machine as a `Folder`; what is one already stays. CheckpointError for what is none."""
    if isinstance(model, Folder):
        return model
    if not model.exists():
        raise CheckpointError(f"{model}: no such folder; give a Hugging Face model folder")
    if not (model / "config.json").is_file():
        if (model / MISTRAL).is_file():
            raise CheckpointError(
                f"{model}: has {MISTRAL} and no config.json, which is Mistral's own format; give the model "
                "as transformers saves it"
            )
        raise CheckpointError(
            f"{model}: not a Hugging Face model folder (config.json and *.safetensors expected)"
        )
    return Folder(model, {file.name: LocalFile(file) for file in sorted(model.glob("*.safetensors"))})


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
