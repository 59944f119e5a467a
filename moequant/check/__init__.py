"""`moequant check`: what the packed bytes of a file compute, against decoders, products and the model."""

from moequant.check.figures import CheckReport
from moequant.check.run import CheckSettings, check

__all__ = ["CheckReport", "CheckSettings", "check"]
