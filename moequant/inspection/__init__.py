"""What a model is, from headers alone: a Hugging Face folder of any family, or a GGUF file from anyone."""

from __future__ import annotations

from pathlib import Path

from moequant.errors import CheckpointError
from moequant.inspection.values import Inspection, PresetSize, RoleBytes, Runtime

__all__ = ["Inspection", "PresetSize", "RoleBytes", "Runtime", "inspect"]


def inspect(path: Path) -> Inspection:
    """Describe a model folder or a GGUF file; no weight is read.

    Raises CheckpointError for what is neither, and for files that are cut off.
    """
    if path.is_dir():
        from moequant.inspection.folder import inspect_folder

        return inspect_folder(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; give a Hugging Face model folder or a GGUF file"
        )
    from moequant.inspection.gguf_file import inspect_gguf  # without torch: a second faster

    return inspect_gguf(path)
