"""Model folders: stored tensors, and the model weights that they hold."""

from moequant.checkpoint.folder import Folder, folder_of
from moequant.checkpoint.open import Checkpoint, around, open_checkpoint, repository
from moequant.checkpoint.read import load, load_packed, not_finite

__all__ = [
    "Checkpoint",
    "Folder",
    "around",
    "folder_of",
    "load",
    "load_packed",
    "not_finite",
    "open_checkpoint",
    "repository",
]
