"""Model folders: stored tensors, and the model weights that they hold."""

from moequant.checkpoint.open import Checkpoint, load, load_packed, not_finite, open_checkpoint, repository

__all__ = ["Checkpoint", "load", "load_packed", "not_finite", "open_checkpoint", "repository"]
