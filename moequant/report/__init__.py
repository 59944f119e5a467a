"""What a conversion did, as a value and as text."""

from moequant.report.conversion import Conversion
from moequant.report.summary import How, Report

__all__ = ["Conversion", "How", "Report"]
