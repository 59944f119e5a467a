"""Codecs: one file for each way in which checkpoints store numbers."""

from moequant.checkpoint.codecs.base import Codec, Stored, plain, read_part

__all__ = ["Codec", "Stored", "plain", "read_part"]
