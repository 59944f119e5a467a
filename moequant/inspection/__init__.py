"""What a model is, from headers alone: a Hugging Face folder of any family, or a GGUF file from anyone."""

from __future__ import annotations

from moequant.errors import CheckpointError
from moequant.hub import HubModel, Model, located
from moequant.inspection.values import Inspection, PresetSize, RoleBytes, Runtime

__all__ = ["Inspection", "PresetSize", "RoleBytes", "Runtime", "inspect"]


def inspect(model: Model) -> Inspection:
    """Describe a model folder, a model of the Hub or a GGUF file; no weight is read.

    Raises CheckpointError for what is none of them, and for files that are cut off; HubError for a model of
    the Hub that is not to be had.
    """
    path = located(model)
    if isinstance(path, HubModel) and path.file:
        from moequant.hub.fetch import gguf_header
        from moequant.inspection.gguf_file import inspect_gguf

        return inspect_gguf(gguf_header(path))
    if isinstance(path, HubModel) or path.is_dir():
        from moequant.hub.fetch import headers
        from moequant.inspection.folder import inspect_folder

        return inspect_folder(headers(path))
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; give a Hugging Face model folder or a GGUF file"
        )
    from moequant.containers.gguf.read import read_header  # without torch: a second faster
    from moequant.inspection.gguf_file import inspect_gguf

    return inspect_gguf(read_header(path))
