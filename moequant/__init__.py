"""moequant: mixture-of-experts aware quantization."""

__version__ = "0.1.0"
