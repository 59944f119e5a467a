"""Mamba-2 (Dao and Gu 2024): a layer that carries a state from token to token in the place of attention."""

from __future__ import annotations

from moequant.families.base import Slot
from moequant.families.blocks import linear, seen
from moequant.values import Role


def mamba2(layer: int, module: str, *, adds: bool = True) -> tuple[Slot, ...]:
    """The slots of a Mamba-2 mixer; `module` is its name within the layer. Only its two projections
    multiply activations; the rest is small and steers the state."""
    own, at = f"layers.{layer}.ssm", f"model.layers.{layer}.{module}"
    into = seen(layer, "ssm.input", f"{module}.in_proj")
    out = seen(layer, "ssm.output", f"{module}.out_proj")
    return (
        *linear(layer, "ssm.in", Role.SSM_IN, f"{module}.in_proj", into, biased=True),
        Slot(f"{own}.conv", Role.CONV, f"{at}.conv1d.weight"),
        Slot(f"{own}.conv.bias", Role.BIAS, f"{at}.conv1d.bias", optional=True),
        Slot(f"{own}.dt", Role.BIAS, f"{at}.dt_bias"),
        Slot(f"{own}.a", Role.STATE, f"{at}.A_log"),
        Slot(f"{own}.d", Role.STATE, f"{at}.D"),
        Slot(f"{own}.norm", Role.NORM, f"{at}.norm.weight"),
        *linear(layer, "ssm.out", Role.SSM_OUT, f"{module}.out_proj", out, biased=True, adds=adds),
    )
