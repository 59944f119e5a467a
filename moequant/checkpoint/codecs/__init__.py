"""Codecs: one file for each way in which checkpoints store numbers.

`recognise` makes the tensors of a model out of those of its files, `Stored.read` decodes them a range of
rows at a time, and `repack` takes over into a ggml type those that it holds exactly.
"""

from moequant.checkpoint.codecs.base import WHOLE, plain, read_part, whole_numbers
from moequant.checkpoint.codecs.recognise import activation_scales, recognise
from moequant.checkpoint.codecs.repack import as_shipped, multiplier, repack
from moequant.values import Codec, Stored

RELEASED = ("plain", "fp8", "mxfp8", "mxfp4")
"""What models are trained or released in: of those there is often no other original."""

__all__ = [
    "RELEASED",
    "WHOLE",
    "Codec",
    "Stored",
    "activation_scales",
    "as_shipped",
    "multiplier",
    "plain",
    "read_part",
    "recognise",
    "repack",
    "whole_numbers",
]
