"""Weights rounded so that outputs stay what they are, and Hessians worth trusting.

`round_to_hessian` rounds one tensor; `shrink` makes Hessians for it from two halves of the tokens.
"""

from moequant.rounding.feedback import Fallback, Options, Rounded, outputs_lost, round_to_hessian
from moequant.rounding.shrinkage import Choice, Mix, Shrunk, Trial, shrink

__all__ = [
    "Choice",
    "Fallback",
    "Mix",
    "Options",
    "Rounded",
    "Shrunk",
    "Trial",
    "outputs_lost",
    "round_to_hessian",
    "shrink",
]
