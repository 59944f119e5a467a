"""Codecs: one file for each way in which checkpoints store numbers."""

from moequant.checkpoint.codecs.base import plain, read_part
from moequant.values import Codec, Stored

__all__ = ["Codec", "Stored", "plain", "read_part"]
