"""State space layers (Mamba, 2023; Mamba-2, 2024) in the place of attention."""

from __future__ import annotations

from moequant.families.base import Slot
from moequant.families.blocks import bias, linear, norm, seen
from moequant.values import Role, Site
from moequant.values.ops import Squeezed


def mamba2(layer: int, module: str, *, adds: bool = True) -> tuple[Slot, ...]:
    """A Mamba-2 mixer: one projection makes gate, inputs, B, C and time steps; a decay rate and a skip a
    head."""
    into = seen(layer, "ssm.input", f"{module}.in_proj")
    out = seen(layer, "ssm.output", f"{module}.out_proj")
    return (
        *linear(layer, "ssm.in", Role.SSM_IN, f"{module}.in_proj", into, biased=True),
        *_kernel(layer, module),
        _state(layer, "ssm.dt", f"{module}.dt_bias"),
        *_rates(layer, module),
        norm(layer, "ssm.norm", f"{module}.norm"),
        *linear(layer, "ssm.out", Role.SSM_OUT, f"{module}.out_proj", out, biased=True, adds=adds),
    )


def mamba(layer: int, module: str) -> tuple[Slot, ...]:
    """A Mamba mixer with norms on B, C and time steps; these are made of a narrow projection of their own,
    whose weight the model multiplies itself, so that its input is seen where it is made."""
    at = f"model.layers.{layer}.{module}"
    into = seen(layer, "ssm.input", f"{module}.in_proj")
    inner = seen(layer, "ssm.inner", f"{module}.x_proj")
    steps = Site(f"layers.{layer}.ssm.steps", f"{at}.dt_layernorm", "output")
    out = seen(layer, "ssm.output", f"{module}.out_proj")
    return (
        *linear(layer, "ssm.in", Role.SSM_IN, f"{module}.in_proj", into, biased=True),
        *_kernel(layer, module),
        *linear(layer, "ssm.x", Role.SSM_X, f"{module}.x_proj", inner),
        *(norm(layer, f"ssm.{name}_norm", f"{module}.{name}_layernorm") for name in ("dt", "b", "c")),
        *linear(layer, "ssm.dt", Role.SSM_DT, f"{module}.dt_proj", steps, biased=True),
        *_rates(layer, module),
        *linear(layer, "ssm.out", Role.SSM_OUT, f"{module}.out_proj", out, biased=True, adds=True),
    )


def _kernel(layer: int, module: str) -> tuple[Slot, ...]:
    """A convolution with a kernel of its own for every channel: [n, 1, K] as stored."""
    own, at = f"layers.{layer}.ssm.conv", f"model.layers.{layer}.{module}.conv1d"
    return (Slot(own, Role.CONV, f"{at}.weight", ops=(Squeezed(-2),)), bias(own, at))


def _rates(layer: int, module: str) -> tuple[Slot, ...]:
    """Logarithms of decay rates, and what skips the state."""
    return (_state(layer, "ssm.a", f"{module}.A_log"), _state(layer, "ssm.d", f"{module}.D"))


def _state(layer: int, name: str, param: str) -> Slot:
    return Slot(f"layers.{layer}.{name}", Role.STATE, f"model.layers.{layer}.{param}")
