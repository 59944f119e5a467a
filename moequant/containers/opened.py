"""A model to read, whatever its weights lie in."""

from __future__ import annotations

from pathlib import Path

from moequant.checkpoint import Checkpoint, Folder, folder_of, open_checkpoint
from moequant.containers.gguf.source import open_gguf


def open_model(model: Path | Folder) -> Checkpoint:
    """A model by its headers: a folder of safetensors, or of a config and a GGUF file. Raises what
    `open_checkpoint` and `open_gguf` raise."""
    folder = folder_of(model)
    return open_checkpoint(folder) if folder.gguf is None else open_gguf(folder)
