"""Model folders: stored tensors, and the model weights that they hold."""

from moequant.checkpoint.open import Checkpoint, load, not_finite, open_checkpoint

__all__ = ["Checkpoint", "load", "not_finite", "open_checkpoint"]
