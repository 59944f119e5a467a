"""Model folders: stored tensors, and the model weights that they hold."""

from moequant.checkpoint.open import Checkpoint, open_checkpoint
from moequant.checkpoint.read import load, load_packed, not_finite

__all__ = ["Checkpoint", "load", "load_packed", "not_finite", "open_checkpoint"]
