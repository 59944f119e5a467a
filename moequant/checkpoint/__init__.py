"""Model folders as stored tensors: headers first, then one weight at a time."""

from moequant.checkpoint.open import Checkpoint, load, not_finite, open_checkpoint, uninterleave

__all__ = ["Checkpoint", "load", "not_finite", "open_checkpoint", "uninterleave"]
