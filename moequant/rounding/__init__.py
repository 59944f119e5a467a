"""Weights rounded so that outputs stay what they are: `round_to_hessian`, and Hessians worth trusting."""

from moequant.rounding.feedback import Fallback, Options, Rounded, round_to_hessian

__all__ = ["Fallback", "Options", "Rounded", "round_to_hessian"]
