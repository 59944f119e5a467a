"""What a conversion did, as a value and as text."""

from moequant.report.conversion import Conversion
from moequant.report.summary import Report

__all__ = ["Conversion", "Report"]
