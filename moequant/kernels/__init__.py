"""Triton dequantize-and-multiply: weights stay packed, as they lie in the file, until a tile needs them.

One small file a format with the decoder of a tile; the two products (`products.py`) are written
once and take the decoder as a compile-time argument. Importing this package imports no Triton;
`matmul.py` does.
"""

from moequant.kernels.matrix import KERNEL_FORMATS, Matrix

__all__ = ["KERNEL_FORMATS", "Matrix"]
