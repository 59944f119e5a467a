"""A file or folder, opened for a check."""

from __future__ import annotations

from pathlib import Path

from moequant.check.folder import FolderSource
from moequant.check.gguf_file import GgufSource
from moequant.check.source import Source
from moequant.checkpoint import Checkpoint


def open_source(path: Path, baseline: Checkpoint | None) -> Source:
    """A GGUF file, or a quantized folder of any tool. VerifyError for what is none, and for another model
    than the baseline."""
    return FolderSource(path, baseline) if path.is_dir() else GgufSource(path, baseline)
