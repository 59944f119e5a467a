"""Triton dequantize-and-multiply: weights stay packed, as they lie in the file, until a tile needs them.

A decoder a format turns a piece of a row into words of integer codes and their scales (`decoders.py`
has the table); two products, for few tokens (`products.py`) and for many (`tiles.py`), are written once and
take the decoder as a compile-time argument. Importing this package imports no Triton; `matmul.py` does.
"""

from moequant.kernels.matrix import KERNEL_FORMATS, Matrix

__all__ = ["KERNEL_FORMATS", "Matrix"]
