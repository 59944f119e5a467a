"""The frozen values that one step of the line hands to the next."""

from moequant.values.plans import Choice, ExpertLoss, Packed, Plan
from moequant.values.statistics import Calibration, InputStats, RouteStats
from moequant.values.stored import Codec, File, Stored, TensorRef
from moequant.values.weights import ModelShape, Origin, Place, Role, Site, Stack, Weight

__all__ = [
    "Calibration",
    "Choice",
    "Codec",
    "ExpertLoss",
    "File",
    "InputStats",
    "ModelShape",
    "Origin",
    "Packed",
    "Place",
    "Plan",
    "Role",
    "RouteStats",
    "Site",
    "Stack",
    "Stored",
    "TensorRef",
    "Weight",
]
